//! Streams whose every byte is known, through the balancer and a bad network.
//!
//! What TCP mends the balancer must not break: over lossy, reordering and
//! duplicating links both ends hold exactly what the other sent. Streams that
//! end in a reset stay out: a lost RST is never sent again.

use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, long, measured, ms, on_every_engine};
use crate::hosts::Hosts;
use crate::link::channel::{Impairment, Loss};
use crate::netns::networks_run;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

on_every_engine!(streams_are_whole_over_bad_links);

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

/// They mostly wait, for what was lost to be sent again: so many keep the links busy.
const AT_ONCE: usize = 256;

/// How many streams, how many at once, and the first one's seed may be said by the
/// environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// The access log has counted what both ends hold.
fn assert_log_agrees(proxy: &TestProxy, ledger: &Ledger) {
    let lines = proxy.wait_access_log(ledger.streams() as usize);
    let sum = |field: &str| lines.iter().map(|line| line[field].as_u64().unwrap()).sum::<u64>();
    let held = (ledger.bytes_up.load(Relaxed), ledger.bytes_down.load(Relaxed));
    assert_eq!((sum("bytes_in"), sum("bytes_out")), held);
    assert_eq!(sum("bytes_undelivered"), 0);
}

fn streams_are_whole_over_bad_links(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(2, 20);
    // Large ones take a second each over such links, and are what it waits for.
    let ledger = Ledger::without_aborts(StreamSizes { most: 64 * 1024, large_one_in: 1000 });
    let _backends: Vec<_> = hosts.backends.iter().map(|host| host.serve(ledger.script())).collect();
    let proxy = hosts.start(hosts.conf(engine, hosts.pool()));
    hosts.backends.iter().for_each(|host| host.link.set(BAD));
    let streams = number("TIDEGATE_STREAMS").unwrap_or(if long() { 1_000_000 } else { 10_000 });
    let first = number("TIDEGATE_SEED").unwrap_or(0);
    let at_once = number("TIDEGATE_AT_ONCE").map_or(AT_ONCE, |many| many as usize);
    let start = Instant::now();
    hosts.client.run(|| ledger.run(&[proxy.addr("web")], first..first + streams, at_once));
    let took = start.elapsed();
    ledger.settle();
    if !ledger.faults().is_empty() {
        // Of a million, those that may tell why.
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
        // Mended, so that the sessions' last FINs do not hold up the end.
        host.link.set(Impairment::default());
    }
    measured(&format!("{streams} streams in {took:?}, {lost} packets lost"));
}
