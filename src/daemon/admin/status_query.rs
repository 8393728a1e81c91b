//! The query of `GET /v1/status`: which backends the answer has.
//!
//! Called by `routes`. Pure: it selects from a snapshot and decides nothing.

use super::questions::{number, parameters};
use tidegate_api::status::PageDoc;
use tidegate_core::control::shown::ShownState;
use tidegate_core::control::{BackendStatus, OperatorError, PoolStatus};

/// Most backends of a pool on one page.
const LIMIT_MAX: usize = 10_000;

/// Which pools and backends a client wants. The default is all of them.
#[derive(Debug, Default, PartialEq)]
pub(super) struct StatusSelection {
    /// Only this pool.
    pub(super) pool: Option<String>,
    /// Only backends with this state.
    state: Option<ShownState>,
    /// Only backends with this name.
    backend: Option<String>,
    /// Only this many backends of each pool.
    limit: Option<usize>,
    /// Only backends that come after this one in the order of the pool.
    after: Option<String>,
}

/// One page of the backends of a pool.
pub(super) struct StatusPage<'a> {
    pub(super) backends: Vec<&'a BackendStatus>,
    /// `None` if nothing was selected.
    pub(super) document: Option<PageDoc>,
}

// === impl StatusSelection ===

impl StatusSelection {
    /// Reads a query. The error names the parameter that is wrong.
    pub(super) fn parse(query: &str) -> Result<StatusSelection, String> {
        let mut parsed = StatusSelection::default();
        for pair in parameters(query) {
            let (key, value) = pair?;
            let known = match key {
                "pool" => parsed.pool.replace(value).is_none(),
                "state" => parsed.state.replace(state(&value)?).is_none(),
                "backend" => parsed.backend.replace(value).is_none(),
                "limit" => parsed.limit.replace(limit(&value)?).is_none(),
                "after" => parsed.after.replace(value).is_none(),
                _ => {
                    return Err(format!(
                        "unknown parameter {key:?}; expected pool, state, backend, limit or after"
                    ));
                }
            };
            if !known {
                return Err(format!("{key} is given twice"));
            }
        }
        match parsed {
            StatusSelection { pool: None, after: Some(_), .. } => {
                Err("after needs pool: names are unique in a pool only".to_owned())
            }
            parsed => Ok(parsed),
        }
    }

    pub(super) fn is_everything(&self) -> bool {
        *self == StatusSelection::default()
    }

    /// Returns whether the answer has this pool.
    pub(super) fn has_pool(&self, name: &str) -> bool {
        self.pool.as_ref().is_none_or(|pool| pool == name)
    }

    /// Finds the pool and the backend that the query names.
    ///
    /// # Errors
    /// One of them does not exist.
    pub(super) fn check(&self, pools: &[PoolStatus]) -> Result<(), OperatorError> {
        let Some(name) = &self.pool else { return Ok(()) };
        let pool = pools.iter().find(|pool| *pool.name == **name);
        let pool = pool.ok_or(OperatorError::UnknownPool)?;
        let has = |name: &String| pool.backends.iter().any(|one| *one.state.name == **name);
        let missing = self.after.iter().chain(&self.backend).any(|name| !has(name));
        if missing { Err(OperatorError::UnknownBackend) } else { Ok(()) }
    }

    /// Returns the name of the backend that the query names.
    pub(super) fn named_backend(&self) -> String {
        self.after.iter().chain(&self.backend).next().cloned().unwrap_or_default()
    }

    /// Returns the page of a pool.
    pub(super) fn page<'a>(&self, pool: &'a PoolStatus) -> StatusPage<'a> {
        if self.is_everything() {
            return StatusPage { backends: pool.backends.iter().collect(), document: None };
        }
        let matches = |one: &&BackendStatus| {
            self.state.is_none_or(|state| ShownState::of(one) == state)
                && self.backend.as_ref().is_none_or(|name| *one.state.name == **name)
        };
        let matched = pool.backends.iter().filter(matches).count() as u64;
        let after = self
            .after
            .as_ref()
            .and_then(|after| pool.backends.iter().position(|one| *one.state.name == **after));
        let begin = after.map_or(0, |at| at + 1);
        let limit = self.limit.unwrap_or(usize::MAX);
        let mut rest = pool.backends[begin..].iter().filter(matches);
        let backends: Vec<&BackendStatus> = rest.by_ref().take(limit).collect();
        let more = rest.next().is_some();
        let next = backends.last().filter(|_| more).map(|last| last.state.name.to_string());
        let total = pool.backends.len() as u64;
        StatusPage { backends, document: Some(PageDoc { total, matched, next }) }
    }
}

fn state(value: &str) -> Result<ShownState, String> {
    ShownState::named(value).ok_or_else(|| {
        let names: Vec<&str> = ShownState::ALL.iter().map(|state| state.name()).collect();
        format!("unknown state {value:?}; expected one of {}", names.join(", "))
    })
}

fn limit(value: &str) -> Result<usize, String> {
    let limit = number("limit", value)?;
    let allowed = (1..=LIMIT_MAX).contains(&limit);
    allowed.then_some(limit).ok_or_else(|| format!("limit is {value}; expected 1 to {LIMIT_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::health::Observation;
    use tidegate_core::model::BackendAddr;
    use tidegate_core::table::state::{BackendId, BackendState};

    fn pool() -> PoolStatus {
        let now = tidegate_net::clock::now();
        let backend = |id: u32| {
            let address = BackendAddr::Unix("/run/a.sock".into());
            let name = format!("b{id}").into();
            let state = BackendState::new(BackendId(id), "web".into(), name, address, 1);
            let down = id.is_multiple_of(2);
            let observation = if down { Observation::Down } else { Observation::Up };
            BackendStatus { observation, ..BackendStatus::plain(state, now) }
        };
        PoolStatus::plain("web", (1..=9).map(backend).collect())
    }

    fn page(query: &str) -> (Vec<String>, Option<PageDoc>) {
        let pool = pool();
        let page = StatusSelection::parse(query).unwrap().page(&pool);
        (page.backends.iter().map(|one| one.state.name.to_string()).collect(), page.document)
    }

    #[test]
    fn pages_together_have_every_backend_that_matches_once() {
        let (mut all, mut query) = (Vec::new(), "pool=web&state=up&limit=2".to_owned());
        loop {
            let (names, document) = page(&query);
            let document = document.unwrap();
            assert_eq!((document.total, document.matched), (9, 5));
            all.extend(names);
            match document.next {
                Some(next) => query = format!("pool=web&state=up&limit=2&after={next}"),
                None => break,
            }
        }
        assert_eq!(all, ["b1", "b3", "b5", "b7", "b9"]);
    }

    #[test]
    fn query_selects_by_name_and_nothing_selects_everything() {
        let (names, document) = page("");
        assert_eq!((names.len(), document), (9, None));
        assert_eq!(page("backend=b4").0, ["b4"]);
        assert_eq!(page("backend=b4&state=up").1.unwrap().matched, 0);
        let selects = |query: &str| StatusSelection::parse(query).unwrap();
        assert!(selects("pool=web").has_pool("web") && !selects("pool=web").has_pool("db"));
        assert_eq!(selects("pool=db").check(&[pool()]), Err(OperatorError::UnknownPool));
        let gone = selects("pool=web&after=b10").check(&[pool()]);
        assert_eq!(gone, Err(OperatorError::UnknownBackend));
        assert_eq!(selects("pool=web&after=b9").check(&[pool()]), Ok(()));
    }

    #[test]
    fn invalid_query_names_the_parameter() {
        let wrong = [
            ("limit=0", "limit is 0; expected 1 to 10000"),
            ("state=well", "unknown state \"well\"; expected one of down, ejected"),
            ("after=a", "after needs pool"),
            ("pool=a&pool=b", "pool is given twice"),
            ("pol=web", "unknown parameter \"pol\""),
        ];
        for (query, error) in wrong {
            let found = StatusSelection::parse(query).unwrap_err();
            assert!(found.starts_with(error), "{query}: {found}");
        }
    }
}
