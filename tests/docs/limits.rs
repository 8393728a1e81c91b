//! Compares the bounds in `docs/limits.md` and `docs/security.md` with the constants of the
//! source.
//!
//! The tests read the source as text, because many constants are private.

use crate::pages::{page, root, table};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Row of the table of bounds, folder or file below `src`, name of the constant.
const BOUNDS: [(&str, &str, &str); 54] = [
    ("files that a configuration includes", "config", "INCLUDED_FILES_MAX"),
    ("[process] connections_max", "config", "PROCESS_CONNECTIONS"),
    ("counts shared over an upgrade", "net", "CELLS_MAX"),
    ("processes that share counts", "net/cells.rs", "PROCESSES_MAX"),
    ("clients that wait for the first probe result of a pool", "dataplane", "UNDECIDED_QUEUE_MAX"),
    ("[process] buffers_max", "config", "BUFFERS_DEFAULT"),
    ("pipes in use per worker", "net", "PIPES_MAX"),
    ("access-log lines queued per worker", "dataplane/access_log", "QUEUE_MAX"),
    ("log lines queued", "logging", "QUEUE_MAX"),
    ("bytes of a line of the supervisor's log", "supervisor", "LINE_MAX"),
    ("changes of backends logged per pool and second", "daemon/transition_log.rs", "LINES_MAX"),
    ("reports of failed connects queued", "dataplane", "REPORTS_MAX"),
    ("probes at once", "daemon", "PROBES_RUNNING_MAX"),
    ("rejected senders listed", "core", "LISTED_MAX"),
    ("[pool.heartbeat] backends_max", "config", "BACKENDS"),
    ("heartbeat senders", "daemon", "SENDERS_MAX"),
    ("[admin] backend_metrics_max", "config", "BACKEND_METRICS"),
    ("processes of one supervisor", "supervisor", "CHILDREN_MAX"),
    ("drained backends remembered after they left the file", "core", "REMOVED_INTENTS_MAX"),
    ("first picks kept per worker", "core/decision", "FIRST_MAX"),
    ("failures and retries kept per worker", "core/decision", "FAILED_MAX"),
    ("changes that a forecast assumes", "daemon/admin", "ASSUMED_MAX"),
    ("sessions in a list", "core", "SESSION_LIST_MAX"),
    ("admin requests that wait for an event", "daemon/admin/events.rs", "WAITING_MAX"),
    ("names of removed frontends, pools and backends", "core", "REMOVED_NAMES_MAX"),
    ("frontends", "config", "FRONTENDS_MAX"),
    ("bind addresses", "config", "BINDS_MAX"),
    ("registries", "config", "REGISTRIES_MAX"),
    ("servers of a registry", "config/validate/registry.rs", "SERVERS_MAX"),
    ("[pool.discover] backends_max", "config/validate/guards.rs", "BACKENDS_OF_SOURCE"),
    ("member sources of a process", "discovery/thread", "QUESTIONS_MAX"),
    ("backends in one answer of a source", "core/discovery", "MEMBERS_MAX"),
    ("bytes of an answer over HTTP, or of a list file", "discovery/client", "ANSWER_BYTES_MAX"),
    ("bytes of the head of an answer over HTTP", "discovery/client", "HEAD_BYTES_MAX"),
    ("bytes of a secret file of a source", "discovery/secret.rs", "SECRET_BYTES_MAX"),
    ("bytes of a file of trusted certificates of a source", "discovery/client", "PEM_BYTES_MAX"),
    ("labels of a listed backend", "discovery/listing.rs", "LABELS_MAX"),
    ("labels of a backend that are kept", "core/discovery/labels.rs", "LABELS_KEPT_MAX"),
    ("slices and endpoints of a Kubernetes service, together", "discovery/kubernetes", "PARTS_MAX"),
    ("host names in an answer of Consul", "discovery/consul", "NAMES_MAX"),
    ("bytes of the data of a ZooKeeper child", "discovery/zookeeper", "CONTENT_BYTES_MAX"),
    ("bytes of a kubeconfig file", "discovery/kubernetes", "KUBECONFIG_BYTES_MAX"),
    ("[dns] servers", "config/validate/dns.rs", "SERVERS_MAX"),
    ("names that the resolver remembers", "discovery/resolver", "QUESTIONS_MAX"),
    ("questions that wait for DNS servers at once", "discovery/resolver", "WAITING_MAX"),
    ("records of a DNS answer", "discovery/resolver", "RECORDS_MAX"),
    ("aliases (CNAME) between a name and its records", "discovery/resolver", "ALIASES_MAX"),
    ("pools", "config", "POOLS_MAX"),
    ("backends", "config", "BACKENDS_MAX"),
    ("bytes of a PROXY header", "core/proxy_protocol", "HEADER_BYTES_MAX"),
    ("ranges of peers that send PROXY headers", "config/validate/proxy_protocol.rs", "FROM_MAX"),
    ("types of TLVs that a pool passes on", "config/validate/proxy_protocol.rs", "PASS_MAX"),
    ("workers", "config", "WORKERS_MAX"),
    ("text of a configuration", "config", "FILE_BYTES_MAX"),
];

#[test]
fn table_of_bounds_has_the_constants_of_the_source() {
    let page = page("docs/limits.md");
    let rows = table(&page, "| bound |");
    for (bound, folder, name) in BOUNDS {
        let row = rows.iter().find(|row| row[0] == bound);
        let value = &row.unwrap_or_else(|| panic!("no row {bound:?}"))[1];
        assert_eq!(number(value), constant(folder, name), "{bound}: {name}");
    }
}

#[test]
fn admin_api_bounds_are_the_constants_of_the_source() {
    let page = page("docs/security.md");
    let rows = table(&page, "| what | bound |");
    let bound = |what: &str| &rows.iter().find(|row| row[0].starts_with(what)).unwrap()[1];
    assert_eq!(number(bound("connections")), constant("daemon/admin", "CONNECTIONS_MAX"));
    assert_eq!(number(bound("head")), constant("daemon/admin", "HEAD_BYTES_MAX"));
    assert_eq!(number(bound("body")), constant("daemon/admin", "BODY_MAX"));
}

#[test]
fn heartbeat_rates_are_the_constants_of_the_source() {
    let text = page("docs/security.md");
    let (_, rest) = text.split_once("\n## Heartbeat authentication\n").unwrap();
    let (section, _) = rest.split_once("\n## ").unwrap();
    let numbers: Vec<String> =
        section.split([' ', '.', '\n']).map(|word| word.replace(',', "")).collect();
    let rates = ["KNOWN_PER_SECOND_MAX", "UNKNOWN_PER_SECOND_MAX", "UNKNOWN_PER_SOURCE_MAX"];
    for name in rates.into_iter().chain(["SENDERS_MAX"]) {
        let value = constant("daemon/heartbeat", name).to_string();
        assert!(numbers.contains(&value), "{name} = {value}");
    }
}

#[test]
fn security_page_has_the_number_of_allowed_system_calls() {
    let source = page("src/net/sandbox/calls.rs");
    let (program, _) = source.split_once("#[cfg(test)]").unwrap();
    let words = program.split(|c: char| !c.is_alphanumeric() && c != '_');
    let calls: BTreeSet<&str> = words.filter(|word| word.starts_with("SYS_")).collect();
    let said = format!("{} remain on x86-64", calls.len());
    let text = page("docs/security.md").replace('\n', " ");
    assert!(text.contains(&said), "{said}");
}

/// The number at the start of a cell: `4,096`, `16 MiB`.
fn number(cell: &str) -> u64 {
    let mut words = cell.split([' ', ';']);
    let digits = words.next().unwrap().replace(',', "");
    let number: u64 = digits.parse().unwrap_or_else(|_| panic!("no number: {cell}"));
    match words.next().map(|unit| unit.trim_end_matches(',')) {
        Some("KiB") => number << 10,
        Some("MiB") => number << 20,
        _ => number,
    }
}

/// The value of the only constant with this name below a folder of `src`.
fn constant(folder: &str, name: &str) -> u64 {
    let mut found = Vec::new();
    collect(&root().join("src").join(folder), &format!("const {name}: "), &mut found);
    assert_eq!(found.len(), 1, "definitions of {name} in {folder}: {found:?}");
    value(&found[0])
}

fn collect(path: &Path, definition: &str, found: &mut Vec<String>) {
    if path.is_dir() {
        let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        entries.for_each(|path| collect(&path, definition, found));
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        let text = fs::read_to_string(path).unwrap();
        let lines = text.lines().filter_map(|line| line.split_once(definition));
        let values = lines.filter_map(|(_, rest)| Some(rest.split_once(" = ")?.1.to_owned()));
        found.extend(values.filter(|value| value.starts_with(|c: char| c.is_ascii_digit())));
    }
}

/// The value of integers with `*` or `<<` between them.
fn value(expression: &str) -> u64 {
    let number = |text: &str| -> u64 {
        let text = text.trim().trim_end_matches(';').replace('_', "");
        text.parse().unwrap_or_else(|_| panic!("not a number: {expression}"))
    };
    match expression.split_once("<<") {
        Some((left, right)) => number(left) << number(right),
        None => expression.split('*').map(number).product(),
    }
}

#[test]
fn numbers_parse_in_pages_and_in_source() {
    assert_eq!(number("100,000, or what descriptors allow"), 100_000);
    assert_eq!(number("16 MiB"), value("16 * 1024 * 1024;"));
    assert_eq!(value("256 << 20;"), number("256 MiB"));
}
