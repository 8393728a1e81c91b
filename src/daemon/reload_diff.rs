//! Lists the changes of a reload, for its event and for the log at `level = "debug"`.
//!
//! Called by `reload` before the new configuration is in force. Pure.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use tidegate_core::model::{Config, DiscoverSpec, NamedBackend, PoolConfig};

/// Lines per reload. One more line contains the number of further changes.
const LINES_MAX: usize = 200;

/// Returns one line for each section, frontend, pool, backend, registry or member source that
/// was added, removed or changed.
pub(super) fn diff(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    section(&mut lines, "[process]", &old.process, &new.process);
    section(&mut lines, "[log]", &old.log, &new.log);
    section(&mut lines, "[admin]", &old.admin, &new.admin);
    section(&mut lines, "[heartbeat]", &old.heartbeat, &new.heartbeat);
    let frontends = |config: &Config| {
        let all = config.frontends.iter();
        all.map(|it| (it.name.to_string(), it.clone())).collect::<BTreeMap<_, _>>()
    };
    named(&mut lines, "frontend", &frontends(old), &frontends(new));
    let pools = |config: &Config| {
        let bare = |pool: &PoolConfig| PoolConfig {
            backends: Vec::new(),
            named: Vec::new(),
            discover: None,
            ..pool.clone()
        };
        let all = config.pools.iter();
        all.map(|it| (it.name.to_string(), bare(it))).collect::<BTreeMap<_, _>>()
    };
    named(&mut lines, "pool", &pools(old), &pools(new));
    let backends = |config: &Config| {
        let of = |pool: &PoolConfig| {
            let name = pool.name.clone();
            let all = pool.backends.iter();
            all.map(move |it| (format!("{name}/{}", it.name), it.clone())).collect::<Vec<_>>()
        };
        config.pools.iter().flat_map(|pool| of(pool)).collect::<BTreeMap<_, _>>()
    };
    named(&mut lines, "backend", &backends(old), &backends(new));
    section(&mut lines, "[dns]", &old.dns, &new.dns);
    let registries = |config: &Config| {
        let all = config.registries.iter();
        all.map(|it| (it.name.to_string(), Arc::clone(it))).collect::<BTreeMap<_, _>>()
    };
    named(&mut lines, "registry", &registries(old), &registries(new));
    named(&mut lines, "source", &sources(old), &sources(new));
    let more = lines.len().saturating_sub(LINES_MAX);
    if more > 0 {
        lines.truncate(LINES_MAX);
        lines.push(format!("{more} more changes"));
    }
    lines
}

/// A member source: a `discover` table, or a backend whose address is a name.
#[derive(Debug, PartialEq)]
enum SourceForm<'c> {
    Table(&'c DiscoverSpec),
    Name(&'c NamedBackend),
}

fn sources(config: &Config) -> BTreeMap<String, SourceForm<'_>> {
    config.pools.iter().flat_map(|pool| sources_of(pool)).collect()
}

fn sources_of(pool: &PoolConfig) -> impl Iterator<Item = (String, SourceForm<'_>)> {
    let table = pool.discover.iter();
    let table = table.map(|spec| (pool.name.to_string(), SourceForm::Table(spec)));
    let names = pool.named.iter();
    let names = names.map(|it| (format!("{}/{}", pool.name, it.name), SourceForm::Name(it)));
    table.chain(names)
}

fn section<T: PartialEq>(lines: &mut Vec<String>, name: &str, old: &T, new: &T) {
    if old != new {
        lines.push(format!("{name} changed"));
    }
}

fn named<T: PartialEq + Debug>(
    lines: &mut Vec<String>,
    kind: &str,
    old: &BTreeMap<String, T>,
    new: &BTreeMap<String, T>,
) {
    for name in old.keys().filter(|name| !new.contains_key(*name)) {
        lines.push(format!("{kind} {name} removed"));
    }
    for (name, item) in new {
        match old.get(name) {
            None => lines.push(format!("{kind} {name} added")),
            Some(before) if before != item => lines.push(format!("{kind} {name} changed")),
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_config::parse;

    fn config(weight: u32, backends: &[&str], port: u16) -> Config {
        let mut text = format!("[frontend.web]\nbind = \"127.0.0.1:{port}\"\npool = \"web\"\n");
        for name in backends {
            text.push_str(&format!(
                "[[pool.web.backend]]\nname = \"{name}\"\naddress = \"unix:/{name}\"\n\
                 weight = {weight}\n"
            ));
        }
        parse(&text, "t.toml").unwrap()
    }

    #[test]
    fn each_addition_removal_and_change_is_one_line() {
        let old = config(1, &["a", "b"], 8080);
        assert_eq!(diff(&old, &old), [""; 0]);
        let new = config(1, &["b", "c"], 8081);
        let wanted = ["frontend web changed", "backend web/a removed", "backend web/c added"];
        assert_eq!(diff(&old, &new), wanted);
        assert_eq!(
            diff(&old, &config(2, &["a"], 8080)),
            ["backend web/b removed", "backend web/a changed"]
        );
    }

    #[test]
    fn changes_of_member_sources_are_lines_of_their_own() {
        let config = |path: &str, name: &str, servers: &str| {
            let text = format!(
                "[frontend.web]\nbind = \"127.0.0.1:1\"\npool = \"web\"\n\
                 [pool.web.discover]\n{path}\n[[pool.web.backend]]\nname = \"a\"\n\
                 address = \"{name}:80\"\n{servers}"
            );
            parse(&text, "t.toml").unwrap()
        };
        let registry = "[registry.main]\nkind = \"etcd\"\nservers = \"127.0.0.1:1\"\n";
        let file = "kind = \"file\"\npath = \"/a\"";
        let old = config(file, "a.example", "");
        let new = config("from = \"main\"", "b.example", registry);
        let wanted = ["registry main added", "source web changed", "source web/a changed"];
        assert_eq!(diff(&old, &new), wanted);
        let slower = registry.to_owned() + "timeout = \"9s\"\n[dns]\nttl_max = \"1m\"";
        let slower = config("from = \"main\"", "b.example", &slower);
        let wanted = ["[dns] changed", "registry main changed", "source web changed"];
        assert_eq!(diff(&new, &slower), wanted);
    }

    #[test]
    fn large_change_is_truncated_and_counted() {
        let names: Vec<String> = (0..300).map(|n| format!("b{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let lines = diff(&config(1, &["a"], 8080), &config(1, &names, 8080));
        assert_eq!((lines.len(), lines.last().unwrap().as_str()), (201, "101 more changes"));
    }
}
