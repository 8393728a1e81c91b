//! Imports: every configuration of another balancer in `tests/import` gives exactly the expected
//! report and output next to it. `UPDATE_EXPECT=1` rewrites them. Review them afterwards.

use super::{ImportRequest, Imported, IncludeReader, IncludedFile, KINDS, fuzz};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/import");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    cases
}

/// The source in a folder.
fn source(case: &Path) -> PathBuf {
    let names = ["haproxy.cfg", "nginx.conf", "envoy.yaml", "traefik.yml", "traefik.toml"];
    names.iter().map(|name| case.join(name)).find(|path| path.exists()).unwrap_or_default()
}

fn imported(case: &Path) -> Imported {
    let path = source(case);
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let text = std::fs::read_to_string(&path).unwrap();
    let kind = super::guess(&name, &text).unwrap();
    let include = |pattern: &str| {
        let text = std::fs::read_to_string(case.join(pattern)).map_err(|e| e.to_string())?;
        Ok(vec![IncludedFile { name: pattern.to_owned(), text }])
    };
    let include: IncludeReader<'_> = &include;
    let request =
        ImportRequest { name: &name, text: &text, include: Some(include), ..Default::default() };
    super::import(kind, &request)
}

/// Compares a text with a file, or writes the file.
fn compare(path: &Path, actual: &str, differences: &mut String) {
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        return std::fs::write(path, actual).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    if kept != actual {
        *differences += &format!("=== {} has now:\n{actual}\n", path.display());
    }
}

#[test]
fn every_source_gives_its_report_and_its_output() {
    let mut differences = String::new();
    let cases = cases();
    assert!(cases.len() >= 11, "{cases:?}");
    for case in &cases {
        if !source(case).exists() {
            continue;
        }
        let imported = imported(case);
        compare(&case.join("report.expected"), &imported.report.text(), &mut differences);
        let output = imported.toml.unwrap_or_default();
        compare(&case.join("output.toml"), &output, &mut differences);
    }
    assert!(differences.is_empty(), "run with UPDATE_EXPECT=1 and review:\n{differences}");
}

#[test]
fn checks_of_a_pool_without_a_checked_server_have_no_effect() {
    let lines: Vec<String> =
        super::haproxy::CHECK_KEYWORDS.iter().map(|keyword| format!("  {keyword} 1s\n")).collect();
    let text = format!(
        "listen a\n  bind 127.0.0.1:80\n  mode tcp\n  server s 127.0.0.1:90\n{}",
        lines.concat()
    );
    let request = ImportRequest { name: "haproxy.cfg", text: &text, ..Default::default() };
    let report = super::import(super::ImportKind::Haproxy, &request).report.text();
    assert!(report.contains("no server has check"), "{report}");
    assert!(report.contains(" 0 not understood"), "{report}");
}

#[test]
fn unix_sockets_become_binds_with_their_mode() {
    let text = "listen a\n  mode tcp\n  bind /run/a.sock mode 666 user haproxy\n  \
                bind unix@/run/b.sock accept-proxy\n  bind abns@c\n  bind *:80 mode 600\n  \
                server s 127.0.0.1:90\n";
    let request = ImportRequest { name: "haproxy.cfg", text, ..Default::default() };
    let imported = super::import(super::ImportKind::Haproxy, &request);
    let (toml, report) = (imported.toml.unwrap(), imported.report.text());
    for bind in [
        "{ address = \"unix:/run/a.sock\", mode = \"0666\" }",
        "{ address = \"unix:/run/b.sock\", proxy_protocol = true }",
        "\"unix:@c\"",
        "\"0.0.0.0:80\"",
    ] {
        assert!(toml.contains(bind), "{bind}: {toml}");
    }
    assert!(!toml.contains("from ="), "{toml}");
    for word in ["belongs to the user and the group", "is 0660", "zero bytes", " 0 NOT POSSIBLE"] {
        assert!(report.contains(word), "{word}: {report}");
    }
    let text =
        "stream { server { listen unix:/run/n.sock proxy_protocol; proxy_pass 10.0.0.1:80; } }";
    let request = ImportRequest { name: "nginx.conf", text, ..Default::default() };
    let toml = super::import(super::ImportKind::Nginx, &request).toml.unwrap();
    let bind = "{ address = \"unix:/run/n.sock\", mode = \"0666\", proxy_protocol = true }";
    assert!(toml.contains(bind), "{toml}");
}

/// Lines that can occur in a source, and lines that cannot.
const LINES: &[&str] = &[
    "global",
    "defaults",
    "defaults a from a",
    "frontend f",
    "listen l",
    "backend b",
    "  mode tcp",
    "  mode http",
    "  bind *:80",
    "  bind :::81-90 v6only accept-proxy ssl crt x",
    "  bind 1:2:3",
    "  bind /x.sock accept-proxy mode 0",
    "  bind unix@x,abns@y mode 777",
    "listen unix:/x proxy_protocol;",
    "  server s 10.0.0.1:80 check inter 1 rise 0 fall 999999999999 weight 0",
    "  server s 10.0.0.1 maxconn 5 backup",
    "  server-template t 1-3 h:80 check",
    "  default-server port 8 on-marked-down shutdown-sessions",
    "  default_backend b",
    "  balance source",
    "  use_backend b if { src 10.0.0.0/8 } || { dst_port 80:0 }",
    "  option httpchk GET /\u{e9}",
    "  option tcp-check",
    "  tcp-check send \"a\\r\"",
    "  tcp-check expect binary zz",
    "  timeout client 0",
    "  timeout server 99999999999999999d",
    "  timeout connect 1w",
    "  stick on src",
    "  acl a src 1.1.1.1/99",
    "  tcp-request connection reject if a !a || { src 10.0.0.0/8 }",
    ".if defined(X) || ! && y(",
    ".else",
    ".endif",
    "  tcp-request connection reject unless { src 10.0.0.0/8 }",
    "  tcp-request connection accept if a",
    "  source 0.0.0.0",
    "events {",
    "stream {",
    "upstream u {",
    "server {",
    "}",
    "listen 80 udp;",
    "listen [::]:90 ipv6only=off;",
    "proxy_pass u;",
    "proxy_pass 10.0.0.1:80;",
    "proxy_timeout 0;",
    "server 10.0.0.1:80 weight=0 max_fails=0;",
    "server a:80 backup; server a:80 down;",
    "hash $x;",
    "allow all;",
    "deny 10.0.0.0/8;",
    "include *;",
    "map $a $b {",
    "static_resources:",
    "  listeners:",
    "  - name: l",
    "    address: {socket_address: {address: 0.0.0.0, port_value: 80}}",
    "    filter_chains: [{filters: [{typed_config: {\"@type\": a.TcpProxy, cluster: c}}]}]",
    "  clusters:",
    "  - name: c",
    "    load_assignment: {endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 10.0.0.1, port_value: 1}}}}]}]}",
    "entryPoints:",
    "  a: {address: \":80\"}",
    "tcp:",
    "  routers: {r: {rule: \"HostSNI(`*`)\", service: s}}",
    "  services: {s: {loadBalancer: {servers: [{address: \"10.0.0.1:80\"}]}}}",
    "  x: [1, {a: b}",
    "[entryPoints.a]",
    "address = ':80'",
    "limit_conn z 5;",
    "limit_conn_zone $binary_remote_addr zone=z:1m;",
    "# nothing",
    "\"",
    "'",
    "\\",
    "${",
    ";",
    "{",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Of every text: no panic, one verdict for each directive line, and an output that
    /// `tidegate check` accepts.
    #[test]
    fn any_mixture_of_lines_has_verdicts_and_a_valid_output(
        lines in proptest::collection::vec(proptest::sample::select(LINES), 0..40),
        noise in ".{0,8}",
    ) {
        let text = lines.join("\n") + "\n" + &noise;
        for kind in KINDS {
            fuzz(kind, &text);
        }
    }
}

#[test]
fn rules_of_nginx_for_clients_keep_their_order_and_are_inherited_together() {
    let translate = |outer: &str, own: &str| {
        let text = format!(
            "stream {{ {outer}\n  upstream u {{ server 127.0.0.1:90; }}\n  \
             server {{ listen 127.0.0.1:80; proxy_pass u; {own} }}\n}}\n"
        );
        let request = ImportRequest { name: "nginx.conf", text: &text, ..Default::default() };
        super::import(super::ImportKind::Nginx, &request).toml.unwrap_or_default()
    };
    let denied = translate("", "deny 192.0.2.9; allow all;");
    assert!(denied.contains("deny = [\"192.0.2.9\"]"), "{denied}");
    let own = translate("allow 192.0.2.7; deny all;", "deny 192.0.2.9;");
    assert!(own.contains("deny = [\"192.0.2.9\"]") && !own.contains("192.0.2.7"), "{own}");
    let inherited = translate("allow 192.0.2.7; deny all;", "");
    assert!(inherited.contains("allow = [\"192.0.2.7\"]"), "{inherited}");
    assert!(!translate("", "allow all; deny 192.0.2.9;").contains("sources"));
}
