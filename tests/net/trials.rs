//! Trials of failure detection: make a fault under load, see how soon the
//! balancer knows, heal it, and again with another backend.
//!
//! Generic over how backends are watched, so that ways can be compared by their
//! histograms. What is done to whom is in [`crate::testbed`]; here it is measured
//! and judged.

use crate::common::proxy::TestProxy;
use crate::common::{eventually, long, measured, ms, patience, secs};
use crate::netns::networks_run;
use crate::testbed::{Fault, Seen, Testbed};
use crate::traffic::{Pace, Session, Traffic, errors};
use crate::watch::Watch;
use hdrhistogram::Histogram;
use std::time::Duration;

/// Of each fault, once for each backend, and with `TIDEGATE_LONG`.
const TRIALS: usize = 4;
const TRIALS_LONG: usize = 100;

/// Enough that every backend always has sessions, little enough that the
/// machine is not what is measured.
const PACE: Pace = Pace { at_once: 8, pause: ms(20), patience: secs(8) };

/// For a fault that hurts by what there is to do: several times what 1 % of a
/// CPU can.
const HEAVY_PACE: Pace = Pace { at_once: 16, pause: ms(5), patience: secs(8) };

/// Where packets are lost besides, what was sent into the fault may be lost again
/// and again once it is over, each time twice as late (RFC 6298).
const LOSSY_PATIENCE: Duration = secs(30);

/// A session that took longer has felt the fault.
const LATE: Duration = Duration::from_millis(150);

/// A printed histogram has no more bars.
const BARS_MAX: u64 = 10;

/// How long a healed backend keeps its full weight before it is hurt again.
fn settled(watch: &dyn Watch, fault: Fault) -> Duration {
    match fault {
        // Connects whose SYN was lost hang until it is sent again.
        Fault::Cut | Fault::CutOneWay => ms(1100).max(watch.warms_up()),
        _ => watch.warms_up(),
    }
}

/// Runs the trials of one fault and says what came of them. All the while every
/// link loses that share of packets, each way.
pub fn run(watch: &dyn Watch, fault: Fault, loss: f64) {
    if !networks_run() {
        return;
    }
    let mut testbed = Testbed::start(watch, loss);
    let mut pace = if fault == Fault::Starved { HEAVY_PACE } else { PACE };
    if loss > 0.0 {
        pace.patience = LOSSY_PATIENCE;
    }
    let traffic = Traffic::start(&testbed.hosts.client, testbed.proxy.addr("web"), pace);
    eventually(secs(10), "traffic flows", || traffic.done() > 100);
    let mut phase = fastrand::Rng::with_seed(80);
    let mut seen = Vec::new();
    for _ in 0..if long() { TRIALS_LONG } else { TRIALS } {
        seen.push(testbed.trial(fault, settled(watch, fault)));
        // The next fault falls anywhere between two looks of the watcher.
        std::thread::sleep(ms(phase.u64(..200)));
    }
    let sessions = traffic.stop();
    let what = format!("{fault:?} by {} at {}% loss", watch.name(), loss * 100.0);
    report(&what, &seen, &sessions, &testbed.proxy);
    judge(watch, fault, &seen, &sessions);
}

fn report(what: &str, seen: &[Seen], sessions: &[Session], proxy: &TestProxy) {
    let late = sessions.iter().filter(|one| one.result.is_ok() && one.took > LATE).count();
    let failed = sessions.iter().filter(|one| one.result.is_err()).count();
    // Down again after it was healed: by what was still under way.
    let downs = proxy.log().lines().filter(|line| line.contains("to=\"down\"")).count();
    let relapses = downs.saturating_sub(seen.iter().filter(|one| one.out.is_some()).count());
    measured(&format!(
        "{what}: lowered {}; out {}; {relapses} relapses; \
         of {} sessions {failed} failed, {late} took over {LATE:?}",
        times(seen.iter().map(|one| one.lowered)),
        times(seen.iter().map(|one| one.out)),
        sessions.len(),
    ));
}

/// `p50 210 ms, p99 305 ms, max 305 ms (10 of 10; 200-220: 8, 300-320: 2)`
fn times(times: impl Iterator<Item = Option<Duration>>) -> String {
    let mut histogram = Histogram::<u64>::new(3).expect("3 digits are allowed");
    let mut trials = 0;
    for time in times {
        trials += 1;
        if let Some(time) = time {
            histogram.record(time.as_micros() as u64).expect("it resizes itself");
        }
    }
    let ms = |micros: u64| micros as f64 / 1e3;
    format!(
        "p50 {:.0} ms, p99 {:.0} ms, max {:.0} ms ({} of {trials}; {})",
        ms(histogram.value_at_quantile(0.5)),
        ms(histogram.value_at_quantile(0.99)),
        ms(histogram.max()),
        histogram.len(),
        bars(&histogram),
    )
}

/// How many fell in which span, in milliseconds; empty spans are left out.
fn bars(histogram: &Histogram<u64>) -> String {
    let range = (histogram.max() - histogram.min()) / 1000;
    let nice = [1, 2, 5, 10, 20, 50, 100, 200, 500];
    let step = nice.into_iter().find(|step| range / step < BARS_MAX).unwrap_or(1000);
    let bar = |bar: hdrhistogram::iterators::IterationValue<u64>| {
        let (to, count) = (bar.value_iterated_to() / 1000 + 1, bar.count_since_last_iteration());
        (count > 0).then(|| format!("{}-{to}: {count}", to.saturating_sub(step)))
    };
    histogram.iter_linear(step * 1000).filter_map(bar).collect::<Vec<_>>().join(", ")
}

#[track_caller]
fn judge(watch: &dyn Watch, fault: Fault, seen: &[Seen], sessions: &[Session]) {
    let blamed: Vec<&Seen> = seen.iter().filter(|one| !one.blamed.is_empty()).collect();
    assert!(blamed.is_empty(), "healthy backends were blamed: {blamed:#?}");
    if let Some(bound) = watch.promises(fault) {
        let in_time = |one: &Seen| one.lowered.is_some_and(|time| time <= patience(bound));
        assert!(seen.iter().all(in_time), "not all within {bound:?}: {seen:#?}");
    }
    // From the moment it is out to the moment it is back, nobody meets it.
    for one in seen {
        let Some(out) = one.out else { continue };
        let (from, to) = (one.fault + out, one.healed);
        let during = |session: &&Session| session.began > from && session.began + session.took < to;
        let failed = sessions.iter().filter(during).find(|session| session.result.is_err());
        assert!(failed.is_none(), "failed while it was out of service: {failed:?}");
    }
    if fault != Fault::Killed {
        // Nothing dies of these: clients wait, and are served in the end.
        let failed = errors(sessions, seen[0].fault);
        assert!(failed.is_empty(), "{failed:#?}");
    }
}
