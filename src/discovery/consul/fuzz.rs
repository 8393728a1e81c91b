//! Entry point of the fuzz target in `tests/fuzz`: any bytes to the decoders of Consul.
//!
//! Built only for tests and for the fuzzer. It panics if a decoder violates a guarantee: the
//! instances are unique, usable and bounded, and the order of the entries does not matter.

use super::codec::{HealthAnswer, InstanceHost, read_health, read_meta};
use serde_json::Value;
use std::time::Duration;
use tidegate_core::control::MEMBERS_MAX;

/// Passes `data` to the decoder that the first byte selects.
pub fn check(data: &[u8]) {
    let Some((way, data)) = data.split_first() else { return };
    match way % 8 {
        0 => check_headers(data),
        _ => check_body(data),
    }
}

/// Each line is a header.
fn check_headers(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let meta = read_meta(|name| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .find(|header| header.0 == name)?
            .1
            .into()
    });
    let all = Duration::MAX;
    assert!(!(meta.filtered && meta.is_trusted(all, false, false)));
    assert!(meta.known_leader || !meta.is_trusted(all, false, false));
}

fn check_body(data: &[u8]) {
    let read = read_health(data);
    assert_eq!(read, read_health(data));
    let answer = match read {
        Ok(answer) => answer,
        Err(problem) => return assert!(!problem.is_empty()),
    };
    check_answer(&answer);
    // A document with repeated keys is another one after this.
    let Ok(Value::Array(mut entries)) = serde_json::from_slice(data) else { return };
    let again = |entries: &[Value]| read_health(&serde_json::to_vec(entries).expect("JSON"));
    let forth = again(&entries);
    entries.reverse();
    assert_eq!(forth, again(&entries), "the order of the entries matters");
}

fn check_answer(answer: &HealthAnswer) {
    let HealthAnswer { instances, .. } = answer;
    assert!(instances.len() <= MEMBERS_MAX);
    assert!(instances.is_sorted_by(|one, other| one.name < other.name));
    for instance in instances {
        assert!(instance.port != 0 && instance.weight != Some(0), "{instance:?}");
        assert!(!instance.name.is_empty() && !instance.name.contains(char::is_control));
        match &instance.host {
            InstanceHost::Ip(ip) => {
                let announced = instance.announced(*ip).address.ip();
                assert!(!announced.is_unspecified() && !announced.is_multicast(), "{instance:?}");
            }
            InstanceHost::Name(name) => assert!((1..=253).contains(&name.len())),
        }
    }
}
