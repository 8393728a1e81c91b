//! The tables against the reader: the set of keys, every default, the bounds of every range.

mod samples;

use super::*;
use samples::forms;
use std::collections::{BTreeMap, BTreeSet};
use tidegate_core::model::Config;

/// Every table with the keys that it must have.
const BASE: [(&str, &str); 16] = [
    ("[process]", ""),
    ("[admin]", ""),
    ("[log]", ""),
    ("[frontend.NAME]", "bind = '127.0.0.1:1'\npool = 'NAME'"),
    ("[[frontend.NAME.route]]", "ports = 1\npool = 'NAME'"),
    ("[frontend.NAME.sources]", ""),
    ("[pool.NAME]", ""),
    ("[pool.NAME.probe]", ""),
    ("[pool.NAME.ejection]", ""),
    ("[pool.NAME.heartbeat]", ""),
    ("[pool.NAME.discover]", "kind = 'file'\npath = '/x'"),
    ("[[pool.NAME.backend]]", "address = '192.0.2.1:2'"),
    ("[heartbeat]", "listen = '127.0.0.1:1'"),
    ("[[heartbeat.key]]", "id = 1\nfile = '/key'\npools = 'NAME'\naddresses = '127.0.0.1'"),
    ("[registry.NAME]", "kind = 'consul'\nservers = '127.0.0.1:1'"),
    ("[dns]", ""),
];

/// A table that needs a bind with `proxy_protocol = true`.
const RECEIVED_HEADERS: &str = "[frontend.NAME.proxy_protocol]";

/// A registry of each other kind, for the keys of questions, and a second frontend. The one of the
/// base file can then be disabled.
const OTHERS: &str = "
[frontend.other]
bind = '127.0.0.9:60000'
pool = 'NAME'
[registry.etcd]
kind = 'etcd'
servers = '127.0.0.1:1'
[registry.kube]
kind = 'kubernetes'
[registry.zoo]
kind = 'zookeeper'
servers = '127.0.0.1:1'
";

/// Keys that other keys need, or that widen what a range may be.
const NEEDED: &[(&str, &str, &str)] = &[
    ("bind", "mode", "address = 'unix:/s'"),
    ("[process]", "group", "user = 'a'"),
    ("[log]", "facility", "target = 'syslog:/dev/log'"),
    ("[log]", "access_facility", "access = 'syslog:/dev/log'"),
    ("[frontend.NAME.sources]", "prefix_v4", "connections_max = 1"),
    ("[frontend.NAME.sources]", "prefix_v6", "connections_max = 1"),
    ("[frontend.NAME.sources]", "connections_max", "deny = '127.0.0.1'"),
    ("[frontend.NAME.sources]", "burst", "rate = '1/s'"),
    ("[frontend.NAME.sources]", "rate", "deny = '127.0.0.1'"),
    ("[frontend.NAME.sources]", "allow", "deny = '192.0.2.9'"),
    ("[frontend.NAME.sources]", "deny", "allow = '192.0.2.0/24'"),
    ("[pool.NAME.probe]", "timeout", "interval = '30d'"),
    ("[pool.NAME.probe]", "fast_interval", "interval = '30d'\ntimeout = '1ms'"),
    ("[pool.NAME.probe]", "send", "kind = 'send-expect'\nexpect = 'x'"),
    ("[pool.NAME.probe]", "expect", "kind = 'send-expect'"),
    ("[pool.NAME.probe]", "path", "kind = 'http'"),
    ("[pool.NAME.probe]", "host", "kind = 'http'"),
    ("[pool.NAME.probe]", "method", "kind = 'http'"),
    ("[pool.NAME.probe]", "status", "kind = 'http'"),
    ("[pool.NAME.probe]", "http", "kind = 'http'"),
    ("[pool.NAME.probe]", "headers", "kind = 'http'"),
    ("[pool.NAME.probe]", "user", "kind = 'redis'\npassword_file = '/p'"),
    ("[pool.NAME.probe]", "password_file", "kind = 'redis'"),
    ("[pool.NAME.probe]", "database", "kind = 'postgres'\nuser = 'a'"),
    ("[pool.NAME.probe]", "name", "kind = 'dns'"),
    ("[pool.NAME.probe]", "record", "kind = 'dns'\nname = 'a'"),
    ("[pool.NAME.probe]", "transport", "kind = 'dns'\nname = 'a'"),
    ("[pool.NAME.probe]", "rcode", "kind = 'dns'\nname = 'a'"),
    ("[pool.NAME.probe]", "command", "kind = 'exec'"),
    ("[pool.NAME.probe]", "exit_codes", "kind = 'exec'\ncommand = ['/c']"),
    ("[pool.NAME]", "role", "probe = { kind = 'redis' }"),
    ("[pool.NAME]", "when_none_eligible", "queue_max = 1"),
    ("[pool.NAME.probe]", "steps", "kind = 'steps'"),
    ("[pool.NAME.probe]", "down_interval", "timeout = '1ms'"),
    ("[pool.NAME.heartbeat]", "interval", "ttl = '30s'"),
    ("[pool.NAME.heartbeat]", "ttl", "interval = '20ms'"),
    ("[pool.NAME.discover]", "from", "service = 'a'"),
    ("[pool.NAME.discover]", "service", "from = 'x'"),
    ("[pool.NAME.discover]", "tags", "from = 'x'\nservice = 'a'"),
    ("[pool.NAME.discover]", "datacenter", "from = 'x'\nservice = 'a'"),
    ("[pool.NAME.discover]", "filter", "from = 'x'\nservice = 'a'"),
    ("[pool.NAME.discover]", "max_stale", "from = 'x'\nservice = 'a'"),
    ("[pool.NAME.discover]", "namespace", "from = 'kube'\nservice = 'a'"),
    ("[pool.NAME.discover]", "prefix", "from = 'etcd'"),
    ("[pool.NAME.discover]", "format", "from = 'zoo'\npath = '/a'"),
    ("[pool.NAME.discover]", "name", "kind = 'dns'\nport = 1"),
    ("[pool.NAME.discover]", "record", "kind = 'dns'\nname = 'a'\nport = 1"),
    ("[pool.NAME.discover]", "family", "kind = 'dns'\nname = 'a'\nport = 1"),
    ("[pool.NAME.discover]", "port", "kind = 'dns'\nname = 'a'"),
    ("[pool.NAME.discover]", "url", "kind = 'http'"),
    ("[pool.NAME.discover]", "interval", "kind = 'http'\nurl = 'https://a/'"),
    ("[pool.NAME.discover]", "ca_file", "kind = 'http'\nurl = 'https://a/'"),
    ("[pool.NAME.discover]", "token_file", "kind = 'http'\nurl = 'https://a/'"),
    ("[pool.NAME.discover]", "min_backends", "empty = 'accept'\nbackends_max = 10000"),
    ("[registry.NAME]", "ca_file", "tls = true"),
    ("[registry.NAME]", "server_name", "tls = true"),
    ("[registry.NAME]", "cert_file", "tls = true\nkey_file = '/k'"),
    ("[registry.NAME]", "key_file", "tls = true\ncert_file = '/c'"),
    ("[registry.NAME]", "user", "kind = 'etcd'\npassword_file = '/p'"),
    ("[registry.NAME]", "password_file", "kind = 'etcd'\nuser = 'a'"),
    ("[registry.NAME]", "kubeconfig", "kind = 'kubernetes'"),
    ("[dns]", "ttl_min", "ttl_max = '1d'"),
];

/// Tables that are values of a key: the table of that key.
fn inline_in(header: &str) -> Option<&'static str> {
    match header {
        "bind" => Some("[frontend.NAME]"),
        "expect" | "tls" => Some("[pool.NAME.probe]"),
        "proxy_protocol" => Some("[pool.NAME]"),
        _ => None,
    }
}

/// How messages name the table.
fn label(header: &str) -> String {
    match header {
        "bind" => "a table of bind".to_owned(),
        "expect" | "tls" | "proxy_protocol" => format!("the table of {header}"),
        header => header.replace("NAME", "x"),
    }
}

fn needed(table: &KeyTable, key: &ConfigKey) -> &'static str {
    let of = |(header, name, _): &&(&str, &str, _)| *header == table.header && *name == key.name;
    NEEDED.iter().find(of).map_or("", |(_, _, lines)| lines)
}

/// The base file with these lines in one table. They replace lines of the same keys.
fn file(header: &str, lines: &str) -> String {
    let receives = header == RECEIVED_HEADERS || lines.contains("proxy_protocol = true");
    if receives {
        let own = if header == RECEIVED_HEADERS { lines } else { "" };
        let from = if own.starts_with("from") { "" } else { "from = '127.0.0.1'\n" };
        let text = file("", "") + &format!("{RECEIVED_HEADERS}\n{from}{own}\n");
        let bind = "{ address = '127.0.0.1:1', proxy_protocol = true }";
        return text
            .replace("bind = '127.0.0.1:1'", &format!("bind = {bind}"))
            .replace("NAME", "x");
    }
    let (header, lines) = match (inline_in(header), header) {
        (Some(outer), "bind") if lines.contains("unix:") => {
            let lines = lines.replace('\n', ", ");
            (outer, format!("bind = ['127.0.0.1:1', {{ {lines} }}]"))
        }
        (Some(outer), "bind") if lines.starts_with("address") => {
            (outer, format!("bind = {{ {lines} }}"))
        }
        (Some(outer), "bind") if lines.is_empty() => (outer, "bind = '127.0.0.1:1'".to_owned()),
        (Some(outer), "bind") => (outer, format!("bind = {{ address = '127.0.0.1:1', {lines} }}")),
        (Some(outer), "tls") => (outer, format!("tls = {{ {lines} }}")),
        (Some(outer), "proxy_protocol") if lines.is_empty() => {
            (outer, "proxy_protocol = 'v2'".to_owned())
        }
        (Some(outer), "proxy_protocol") if lines.starts_with("version") => {
            (outer, format!("proxy_protocol = {{ {lines} }}"))
        }
        (Some(outer), "proxy_protocol") => {
            (outer, format!("proxy_protocol = {{ version = 'v2', {lines} }}"))
        }
        (Some(outer), key) => (outer, format!("kind = 'send-expect'\n{key} = {{ {lines} }}")),
        (None, header) => (header, lines.to_owned()),
    };
    let key_of = |line: &str| line.split(" =").next().unwrap_or_default().to_owned();
    let given: BTreeSet<String> = lines.lines().map(key_of).collect();
    let mut text = String::new();
    for (known, base) in BASE {
        let own = known == header;
        // A pool with `of` has no tables of its own members.
        let of_another = given.contains("of") && is_taken_by_of(known);
        // A role needs a probe that finds it.
        let roles = given.contains("role") && known == "[pool.NAME.probe]";
        // `ejection = "off"` is in the place of a table.
        if of_another
            || roles
            || given.iter().any(|key| known == header.replace(']', &format!(".{key}]")))
        {
            continue;
        }
        text += &format!("{known}\n");
        let other = own && asks_another(header, &given);
        let base = if other { "" } else { base };
        let kept = base.lines().filter(|line| !own || !given.contains(&key_of(line)));
        // A route that rejects clients has no pool.
        let kept =
            kept.filter(|line| !(own && lines == "refuse = true" && line.starts_with("pool")));
        kept.for_each(|line| text += &format!("{line}\n"));
        if own {
            text += &format!("{lines}\n");
        }
    }
    if given.contains("of") {
        text += "[pool.other]\nbackend = [{ address = '192.0.2.1:2' }]\n";
    }
    let text = (text + OTHERS).replace("NAME", "x");
    // Only a helper runs commands.
    let text = match lines.contains("'exec'") {
        true => text.replace("[process]\n", "[process]\nprobe_helper = true\n"),
        false => text,
    };
    // A probe sends only the header of its pool.
    match header == "[pool.NAME.probe]" && given.contains("proxy_protocol") {
        true => text.replace("[pool.x]\n", "[pool.x]\nproxy_protocol = 'v2'\n"),
        false => text,
    }
}

fn is_taken_by_of(header: &str) -> bool {
    let tables = ["probe", "heartbeat", "discover"].map(|key| format!("[pool.NAME.{key}]"));
    tables.iter().any(|table| table == header)
        || ["[[pool.NAME.backend]]", "[[heartbeat.key]]", "[heartbeat]"].contains(&header)
}

/// Whether the lines replace the question of the base file.
fn asks_another(header: &str, given: &BTreeSet<String>) -> bool {
    let has = |key: &str| given.contains(key);
    match header {
        "[pool.NAME.discover]" => has("from") || has("kind"),
        "[registry.NAME]" => has("kubeconfig"),
        _ => false,
    }
}

/// The lines that a value needs, if it is not the one of the base file.
fn needed_by(value: &str) -> Option<&'static str> {
    match value {
        "'send-expect'" => Some("expect = 'x'"),
        "'steps'" => Some("steps = [{ expect = 'x' }]"),
        "'dns'" => Some("name = 'a'\nport = 1"),
        "'file'" => Some("path = '/a'"),
        "'http'" => Some("url = 'http://a/'"),
        _ => None,
    }
}

/// `KEY = VALUE` after the lines that the key needs.
fn with(table: &KeyTable, key: &ConfigKey, value: &str) -> String {
    // Probes have a kind "http" too.
    let by_value = needed_by(value).filter(|lines| {
        key.name == "kind"
            && ["expect", "steps"].iter().any(|word| lines.starts_with(word))
                != table.header.contains("discover")
    });
    let by_value = match (table.header.contains("probe"), value) {
        (true, "'http'") => None,
        (true, "'dns'") if key.name == "kind" => Some("name = 'a'"),
        (true, "'agent'") if key.name == "kind" => Some("port = 9"),
        (true, "'exec'") if key.name == "kind" => Some("command = ['/c']"),
        _ => by_value,
    };
    let needed = by_value.unwrap_or_else(|| needed(table, key));
    let separator = if needed.is_empty() { "" } else { "\n" };
    file(table.header, &format!("{needed}{separator}{} = {value}", key.name))
}

#[track_caller]
fn accepted(text: &str) -> Config {
    crate::parse(text, "file").unwrap_or_else(|why| panic!("{why}\nin\n{text}"))
}

/// Whether the reader rejects the value, with a message about this key or its line.
fn rejected(table: &KeyTable, key: &ConfigKey, value: &str) -> bool {
    let text = with(table, key, value);
    let Err(problems) = crate::parse(&text, "file") else { return false };
    let lines: Vec<&str> = text.lines().collect();
    let assigned = format!("{} = {value}", key.name);
    let concerns = |problem: &crate::Problem| {
        problem.message.contains(key.name) || lines[problem.line - 1] == assigned
    };
    problems.list.iter().any(concerns)
}

fn keys() -> impl Iterator<Item = (&'static KeyTable, &'static ConfigKey)> {
    TABLES.iter().flat_map(|table| table.keys.iter().map(move |key| (table, key)))
}

/// The keys that the reader knows, by table: what it lists for a key that is like no other.
fn known_to_the_reader() -> BTreeMap<String, BTreeSet<String>> {
    let mut text = "0 = 1\n".to_owned();
    for (header, lines) in BASE {
        text += &format!("{header}\n0 = 1\n{lines}\n");
    }
    text += &format!("{RECEIVED_HEADERS}\n0 = 1\n");
    let text = text
        .replace("NAME", "x")
        .replace("bind = '127.0.0.1:1'", "bind = { address = '127.0.0.1:1', 0 = 1 }")
        .replace("[pool.x]\n", "[pool.x]\nproxy_protocol = { version = 'v2', 0 = 1 }\n")
        .replace(
            "[pool.x.probe]",
            "[pool.x.probe]\nexpect = { starts = 'x', 0 = 1 }\ntls = { 0 = 1 }",
        );
    let problems = crate::parse(&text, "file").unwrap_err();
    let known = problems.list.iter().filter_map(|problem| {
        let label = problem.message.strip_prefix("unknown key \"0\" in ")?;
        let names = problem.help.as_deref()?.strip_prefix("known here: ")?;
        Some((label.to_owned(), names.split(", ").map(str::to_owned).collect()))
    });
    known.collect()
}

/// The tables directly below a table: `probe` below `[pool.NAME]`.
fn below(header: &str) -> BTreeSet<String> {
    let path = |header: &str| header.trim_matches(['[', ']']).replace(".NAME", "");
    let outer = if header.is_empty() { String::new() } else { path(header) + "." };
    let tables = TABLES.iter().filter(|table| table.header.starts_with('['));
    let inner =
        tables.filter_map(|table| path(table.header).strip_prefix(&outer).map(str::to_owned));
    inner.filter(|path| !path.contains('.')).collect()
}

#[test]
fn tables_have_the_keys_that_the_reader_knows_and_no_other() {
    let mut known = known_to_the_reader();
    let mut top = below("");
    // They have no table of keys of their own.
    top.extend(["include", "defaults"].map(str::to_owned));
    assert_eq!(known.remove("the file").unwrap(), top);
    assert_eq!(known.len(), TABLES.len(), "{known:?}");
    for table in TABLES {
        let mut names: BTreeSet<String> =
            table.keys.iter().map(|key| key.name.to_owned()).collect();
        assert_eq!(names.len(), table.keys.len(), "a key of {} is listed twice", table.header);
        if table.header.starts_with('[') {
            names.extend(below(table.header));
        }
        assert_eq!(names, known[&label(table.header)], "{}", table.header);
    }
}

#[test]
fn default_of_every_key_is_what_a_file_without_it_means() {
    let mut compared = 0;
    for (table, key) in keys() {
        let (DefaultValue::Value(value) | DefaultValue::Derived(value, _)) = key.default else {
            continue;
        };
        // Other keys have their defaults, unless the file would be rejected.
        let needs = match key.default {
            DefaultValue::Derived(..) => "",
            _ => needed(table, key),
        };
        let separator = if needs.is_empty() { "" } else { "\n" };
        let without = accepted(&file(table.header, needs));
        let given = format!("{needs}{separator}{} = {value}", key.name);
        let given = accepted(&file(table.header, &given));
        assert_eq!(without, given, "{} {} = {value}", table.header, key.name);
        // Another value is another configuration, so the comparison means something.
        let model = accepted(&with(table, key, value));
        let (good, _) = samples(table, key);
        let differs = |other: &String| accepted(&with(table, key, other)) != model;
        assert!(good.iter().any(differs), "{} {} = {value}", table.header, key.name);
        compared += 1;
    }
    assert!(compared > 50, "{compared}");
}

#[test]
fn bounds_of_every_key_are_enforced() {
    for (table, key) in keys() {
        let (good, bad) = samples(table, key);
        assert!(!good.is_empty() && !bad.is_empty(), "no samples of {}", key.name);
        for value in good {
            accepted(&with(table, key, &value));
        }
        for value in bad {
            assert!(rejected(table, key, &value), "{} {} = {value}", table.header, key.name);
        }
    }
}

#[test]
fn number_of_routes_is_bounded() {
    assert_cap("[[frontend.NAME.route]]", "at most 255 routes", 255, |number| {
        let (high, low) = (number / 256, number % 256);
        format!("sources = '10.0.{high}.{low}'\npool = 'x'\n")
    });
}

#[test]
fn number_of_heartbeat_keys_is_bounded() {
    assert_cap("[[heartbeat.key]]", "1 to 64 tables", 64, |number| {
        format!("id = {}\nfile = '/k'\npools = 'x'\naddresses = '::1'\n", number + 2)
    });
}

/// The reader accepts `max` tables with this header, as the table of keys states, and no more.
#[track_caller]
fn assert_cap(header: &str, stated: &str, max: usize, lines: impl Fn(usize) -> String) {
    let known = TABLES.iter().find(|known| known.header == header).unwrap();
    assert!(known.about.contains(stated), "{header}: {}", known.about);
    let header = header.replace("NAME", "x");
    // The base file has one such table. New routes are inserted before its route, because that
    // route matches more clients.
    let text = |count: usize| {
        let more = (1..count).map(|number| format!("{header}\n{}", lines(number)));
        file("", "").replacen(&header, &(more.collect::<String>() + &header), 1)
    };
    accepted(&text(max));
    assert!(crate::parse(&text(max + 1), "file").is_err(), "{header}");
}

#[test]
fn only_required_keys_must_be_given() {
    for (table, key) in keys() {
        let lines = BASE.iter().find(|(header, _)| *header == table.header);
        let lines = lines.map_or("", |(_, lines)| lines);
        let given = lines.lines().any(|line| line.starts_with(&format!("{} = ", key.name)));
        let alternative =
            ["[[frontend.NAME.route]]", "[pool.NAME.discover]", RECEIVED_HEADERS, "proxy_protocol"];
        let alternative = alternative.contains(&table.header);
        let required = matches!(key.default, DefaultValue::Required);
        assert!(
            required == given || alternative || table.header == "bind",
            "{} {}",
            table.header,
            key.name
        );
        if required && given {
            let line = lines.lines().find(|line| line.starts_with(key.name)).unwrap();
            let text = file("", "").replace(&line.replace("NAME", "x"), "");
            let problems = crate::parse(&text, "file").unwrap_err();
            let missing = format!("missing key \"{}\"", key.name);
            assert!(problems.list.iter().any(|one| one.message.contains(&missing)), "{problems}");
        }
    }
}

/// Values at the bounds of a key, and the first ones outside, as TOML.
fn samples(table: &KeyTable, key: &ConfigKey) -> (Vec<String>, Vec<String>) {
    let integers = |min: u64, max: u64| {
        let below = min.checked_sub(1).map_or("-1".to_owned(), |below| below.to_string());
        (vec![min.to_string(), max.to_string()], vec![below, (max + 1).to_string()])
    };
    let times = |prefix: &str, min: &str, max: &str| {
        let least = humantime::parse_duration(min).unwrap() - std::time::Duration::from_nanos(1);
        let least = humantime::format_duration(least).to_string();
        let quoted = |time: &str| format!("'{prefix}{time}'");
        let bad = vec![quoted(&least), quoted(&format!("{max} 1ns")), quoted("0s")];
        (vec![quoted(min), quoted(max)], bad)
    };
    match key.values {
        Values::Flag => (strings(&["true", "false"]), strings(&["1"])),
        Values::Words(words) => {
            let good = words().iter().map(|word| format!("'{word}'")).collect();
            (good, strings(&["'no-such-word'"]))
        }
        Values::Integer(min, max) => integers(min, max),
        Values::WordOrInteger(word, min, max) => {
            let (mut good, mut bad) = integers(min, max);
            good.push(format!("'{word}'"));
            bad.push("'no-such-word'".to_owned());
            (good, bad)
        }
        Values::Time(min, max) => {
            let (good, mut bad) = times("", min, max);
            bad.push("'off'".to_owned());
            (good, bad)
        }
        Values::WordOrTime(word, prefix, min, max) => {
            let (mut good, mut bad) = times(prefix, min, max);
            good.push(format!("'{word}'"));
            bad.retain(|value| *value != format!("'{word}'"));
            (good, bad)
        }
        Values::Size(min, max) => {
            let bytes = |size: &str, less: u64, more: u64| {
                let (number, shift) = match size.split_at(size.len() - 3) {
                    (number, "MiB") => (number, 20),
                    (number, "TiB") => (number, 40),
                    (_, unit) => panic!("{unit}"),
                };
                format!("'{}B'", (number.parse::<u64>().unwrap() << shift) + more - less)
            };
            let good = vec![format!("'{min}'"), format!("'{max}'")];
            (good, vec![bytes(min, 1, 0), bytes(max, 0, 1)])
        }
        Values::Share => (strings(&["'0%'", "'100%'"]), strings(&["'101%'", "'-1%'", "50"])),
        Values::Form(_) => forms(table.header, key.name),
    }
}

fn strings(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

#[test]
fn schema_accepts_what_the_reader_accepts_and_rejects_wrong_types() {
    let judge = jsonschema::draft202012::new(&crate::schema()).unwrap();
    let document = |text: &str| {
        let table: toml::Table = toml::from_str(text).unwrap();
        serde_json::to_value(table).unwrap()
    };
    for (table, key) in keys() {
        let (good, bad) = samples(table, key);
        for value in good {
            let given = document(&with(table, key, &value));
            let why: Vec<String> = judge.iter_errors(&given).map(|why| why.to_string()).collect();
            assert!(why.is_empty(), "{} {} = {value}: {why:?}", table.header, key.name);
        }
        // Numbers out of range, and words that do not exist.
        let data = matches!(
            key.values,
            Values::Flag | Values::Words(_) | Values::Integer(..) | Values::WordOrInteger(..)
        );
        let bad = bad.into_iter().filter(|_| data);
        for value in bad.chain(strings(&["1.5", "[{ no-such-key = 1 }]"])) {
            let text = with(table, key, &value);
            assert!(!judge.is_valid(&document(&text)), "{} {} = {value}", table.header, key.name);
        }
    }
}
