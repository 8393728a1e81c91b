//! Streams with known bytes through Tidegate and a bad network.
//!
//! Over links with loss, reordering and duplication both ends receive exactly what the other
//! end sent. Streams that end in a reset are excluded, because a lost RST is never resent.

use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, long, measured, ms, on_every_engine};
use crate::hosts::Hosts;
use crate::link::channel::{Impairment, Loss};
use crate::netns::networks_run;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

on_every_engine!(streams_are_complete_over_bad_links);

const BAD: Impairment = Impairment {
    delay: ms(1),
    jitter: ms(1),
    loss: Loss::Independent(0.02),
    duplicate: 0.02,
    reorder: 0.02,
    reorder_by: ms(3),
    corrupt: 0.001,
    rate: None,
    queue: 256 * 1024,
    largest: None,
    partition: false,
};

/// Most streams wait for retransmissions, so the links need hundreds of streams.
const AT_ONCE: usize = 256;

/// Reads a number from the environment: the number of streams, of concurrent streams, or the
/// first seed.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// Checks that the access log has the byte counts of both ends.
fn assert_log_agrees(proxy: &TestProxy, ledger: &Ledger) {
    let lines = proxy.wait_access_log(ledger.streams() as usize);
    let sum = |field: &str| lines.iter().map(|line| line[field].as_u64().unwrap()).sum::<u64>();
    let held = (ledger.bytes_up.load(Relaxed), ledger.bytes_down.load(Relaxed));
    assert_eq!((sum("bytes_in"), sum("bytes_out")), held);
    assert_eq!(sum("bytes_undelivered"), 0);
}

fn streams_are_complete_over_bad_links(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(2, 20);
    // Large streams take 1 s each over such links and determine the duration.
    let ledger = Ledger::without_aborts(StreamSizes { most: 64 * 1024, large_one_in: 1000 });
    let _backends: Vec<_> = hosts.backends.iter().map(|host| host.serve(ledger.script())).collect();
    let proxy = hosts.start(hosts.conf(engine, hosts.pool()));
    hosts.backends.iter().for_each(|host| host.link.set(BAD));
    let streams = number("TIDEGATE_STREAMS").unwrap_or(if long() { 1_000_000 } else { 5_000 });
    let first = number("TIDEGATE_SEED").unwrap_or(0);
    let at_once = number("TIDEGATE_AT_ONCE").map_or(AT_ONCE, |many| many as usize);
    let start = Instant::now();
    hosts.client.run(|| ledger.run(&[proxy.addr("web")], first..first + streams, at_once));
    let took = start.elapsed();
    ledger.settle();
    if !ledger.faults().is_empty() {
        // Of a million lines, only those that can explain a fault.
        eprintln!("{}", proxy.access_lines_without("\"cause\":\"finished\""));
    }
    ledger.assert_clean();
    assert_eq!(ledger.streams(), streams);
    assert_log_agrees(&proxy, &ledger);
    let mut lost = 0;
    for host in &hosts.backends {
        for counts in [host.link.a_to_b().counts(), host.link.b_to_a().counts()] {
            let done = [counts.lost, counts.duplicated, counts.reordered];
            assert!(done.iter().all(|count| *count > 0), "{counts:?}");
            lost += counts.lost;
        }
        // A perfect link again, so that the last FINs do not delay the end.
        host.link.set(Impairment::default());
    }
    measured(&format!("{streams} streams in {took:?}, {lost} packets lost"));
}
