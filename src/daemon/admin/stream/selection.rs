//! The query of a stream: which pools and backends it has.

use super::super::questions::{number, parameters};
use std::collections::BTreeSet;

/// Most backends of a pool that `top:N` selects.
const TOP_MAX: usize = 1_000;

/// Which backends a stream has. The default is all backends of all pools.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct StreamSelection {
    /// Only the backends of these pools. Other pools have a head and counts.
    pools: Option<BTreeSet<String>>,
    /// Only this many backends of each pool: the worst.
    pub(super) top: Option<usize>,
}

// === impl StreamSelection ===

impl StreamSelection {
    /// Reads a query. The error names the parameter that is wrong.
    pub(super) fn parse(query: &str) -> Result<StreamSelection, String> {
        let mut parsed = StreamSelection::default();
        for pair in parameters(query) {
            let (key, value) = pair?;
            match key {
                "pools" => {
                    let names = value.split(',').filter(|name| !name.is_empty());
                    parsed.pools.get_or_insert_default().extend(names.map(str::to_owned));
                }
                "backends" => parsed.top = Some(top(&value)?),
                _ => return Err(format!("unknown parameter {key:?}; expected pools or backends")),
            }
        }
        Ok(parsed)
    }

    /// Returns whether the stream has backends of this pool.
    pub(super) fn has_pool(&self, name: &str) -> bool {
        self.pools.as_ref().is_none_or(|pools| pools.contains(name))
    }
}

fn top(value: &str) -> Result<usize, String> {
    let wrong = || format!("backends is not top:N: {value:?}");
    let count = number("backends", value.strip_prefix("top:").ok_or_else(wrong)?)?;
    let allowed = (1..=TOP_MAX).contains(&count);
    allowed
        .then_some(count)
        .ok_or_else(|| format!("backends is {value}; expected top:1 to top:{TOP_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_selects_pools_and_the_worst_backends() {
        let all = StreamSelection::parse("").unwrap();
        assert_eq!((all.has_pool("web"), all.top), (true, None));
        let some = StreamSelection::parse("pools=web,db&backends=top:50").unwrap();
        assert!(some.has_pool("db") && !some.has_pool("cache"));
        assert_eq!(some.top, Some(50));
        for (query, error) in [
            ("backends=50", "backends is not top:N"),
            ("backends=top:0", "backends is top:0; expected top:1 to top:1000"),
            ("backends=top:x", "backends is not a whole number"),
            ("pool=web", "unknown parameter \"pool\""),
        ] {
            let found = StreamSelection::parse(query).unwrap_err();
            assert!(found.starts_with(error), "{query}: {found}");
        }
    }
}
