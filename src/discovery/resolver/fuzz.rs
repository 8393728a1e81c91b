//! Entry point of the fuzz target in `tests/fuzz`: any bytes to the parsers of the resolver.
//!
//! Built only for tests and for the fuzzer. It panics if a parser violates a guarantee.

use super::hosts::HostsTable;
use super::resolv_conf::ResolvConf;
use super::wire::{DnsName, RECORDS_MAX, RecordKind, RecordQuestion, decode};

/// The id of the question that the bytes answer.
const ID: u16 = 7;

/// Passes `data` to the parser that the first byte selects.
pub fn check(data: &[u8]) {
    let Some((parser, data)) = data.split_first() else { return };
    match parser % 5 {
        0 => check_answer(data, RecordKind::A),
        1 => check_answer(data, RecordKind::Aaaa),
        2 => check_answer(data, RecordKind::Srv),
        3 => {
            let conf = ResolvConf::parse(&String::from_utf8_lossy(data));
            assert!((1..=3).contains(&conf.servers.len()) && conf.search.len() <= 32);
            assert!(conf.ndots <= 15 && (1..=5).contains(&conf.attempts));
        }
        _ => {
            let table = HostsTable::parse(&String::from_utf8_lossy(data));
            assert!(table.addresses("web.example").len() <= data.len());
        }
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
