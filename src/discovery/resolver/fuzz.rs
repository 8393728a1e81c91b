//! Entry points of two fuzz targets in `tests/fuzz`: any bytes to the parsers of the resolver.
//!
//! Built only for tests and for the fuzzer. They panic if a parser violates a guarantee.

use super::hosts::{ADDRESSES_MAX, HostsTable};
use super::resolv_conf::ResolvConf;
use super::wire::{DnsName, RECORDS_MAX, RecordKind, RecordQuestion, decode};
use std::fmt::Write;

/// The id of the question that the bytes answer.
const ID: u16 = 7;

/// An answer of a DNS server to the question that the first byte selects.
pub fn check_answers(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 3 {
        0 => check_answer(data, RecordKind::A),
        1 => check_answer(data, RecordKind::Aaaa),
        _ => check_answer(data, RecordKind::Srv),
    }
}

fn check_answer(data: &[u8], kind: RecordKind) {
    let Ok(name) = DnsName::parse("web.example") else { return };
    let mut message = data.to_vec();
    if let Some(id) = message.first_chunk_mut() {
        *id = ID.to_be_bytes();
    }
    if let Ok(reply) = decode(&message, ID, &RecordQuestion { name, kind }) {
        let records = reply.records;
        assert!(records.addresses.is_sorted() && records.addresses.len() <= RECORDS_MAX);
        assert!(records.services.is_empty() || kind == RecordKind::Srv);
        assert!(records.addresses.iter().all(|ip| ip.is_ipv4() == (kind == RecordKind::A)));
    }
}

/// The file that the first byte selects.
pub fn check_files(data: &[u8]) {
    let Some((file, data)) = data.split_first() else { return };
    let text = String::from_utf8_lossy(data);
    match file % 2 {
        0 => check_resolv_conf(&text),
        _ => check_hosts(&text),
    }
}

fn check_resolv_conf(text: &str) {
    let conf = ResolvConf::parse(text);
    assert!((1..=3).contains(&conf.servers.len()) && conf.search.len() <= 32);
    assert!(conf.ndots <= 15 && (1..=5).contains(&conf.attempts));
    assert!((1..=30).contains(&conf.timeout.as_secs()));
    assert_eq!(ResolvConf::parse(&written(&conf)), conf);
}

/// The file with the same meaning.
fn written(conf: &ResolvConf) -> String {
    let mut text = String::new();
    for server in &conf.servers {
        let _ = match server {
            std::net::SocketAddr::V6(v6) if v6.scope_id() != 0 => {
                writeln!(text, "nameserver {}%{}", v6.ip(), v6.scope_id())
            }
            _ => writeln!(text, "nameserver {}", server.ip()),
        };
    }
    let search: Vec<&str> = conf.search.iter().map(DnsName::as_str).collect();
    let (timeout, attempts) = (conf.timeout.as_secs(), conf.attempts);
    let _ = writeln!(text, "search {}", search.join(" "));
    let _ = writeln!(text, "options ndots:{} timeout:{timeout} attempts:{attempts}", conf.ndots);
    text
}

fn check_hosts(text: &str) {
    let table = HostsTable::parse(text);
    assert!(table.addresses("web.example").len() <= text.len());
    assert_eq!(HostsTable::parse(&format!("{text}\n{text}")), table);
    // A name has the address of its line, in any case.
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let Some(Ok(address)) = words.next().map(str::parse) else { continue };
        for name in words {
            let known = table.addresses(&name.to_ascii_uppercase());
            assert!(known.contains(&address) || known.len() == ADDRESSES_MAX, "{name:?}");
        }
    }
}
