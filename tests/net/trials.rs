//! Trials of failure detection: cause a fault under load, measure the time to detection, end the
//! fault, and repeat with another backend.
//!
//! Generic over the detection method, so that methods can be compared by their histograms.
//! [`crate::testbed`] causes the faults. This module measures and checks.

use crate::common::proxy::TestProxy;
use crate::common::{eventually, long, measured, ms, patience, secs};
use crate::netns::networks_run;
use crate::testbed::{Fault, Seen, Testbed};
use crate::traffic::{Pace, Session, Traffic, errors};
use crate::watch::Watch;
use hdrhistogram::Histogram;
use std::time::Duration;

/// Trials per fault: one per backend, and with `TIDEGATE_LONG`.
const TRIALS: usize = 4;
const TRIALS_LONG: usize = 100;

/// Enough load that every backend always has sessions, and little enough that the machine does
/// not distort the results.
const PACE: Pace = Pace { at_once: 8, pause: ms(20), patience: secs(8) };

/// The load for the CPU limit: several times what 1 % of a CPU can handle.
const HEAVY_PACE: Pace = Pace { at_once: 16, pause: ms(5), patience: secs(8) };

/// The timeout with packet loss. Bytes sent during the fault can be lost repeatedly afterwards,
/// and each retransmission takes twice as long (RFC 6298).
const LOSSY_PATIENCE: Duration = secs(30);

/// A session that takes longer was affected by the fault.
const LATE: Duration = Duration::from_millis(150);

/// Maximum number of bars in a printed histogram.
const BARS_MAX: u64 = 10;

/// How long a recovered backend must have its full weight before its next fault.
fn settled(watch: &dyn Watch, fault: Fault) -> Duration {
    match fault {
        // Connects with a lost SYN wait until it is resent.
        Fault::Partitioned | Fault::PartitionedOneWay => ms(1100).max(watch.warm_up()),
        _ => watch.warm_up(),
    }
}

/// Runs the trials of one fault and reports the results. Every link loses the share `loss` of
/// packets in each direction.
pub fn run(watch: &dyn Watch, fault: Fault, loss: f64) {
    if !networks_run() {
        return;
    }
    let mut testbed = Testbed::start(watch, loss);
    let mut pace = if fault == Fault::CpuLimited { HEAVY_PACE } else { PACE };
    if loss > 0.0 {
        pace.patience = LOSSY_PATIENCE;
    }
    let traffic = Traffic::start(&testbed.hosts.client, testbed.proxy.addr("web"), pace);
    eventually(secs(10), "traffic flows", || traffic.done() > 100);
    let mut phase = fastrand::Rng::with_seed(80);
    let mut seen = Vec::new();
    for _ in 0..if long() { TRIALS_LONG } else { TRIALS } {
        seen.push(testbed.trial(fault, settled(watch, fault)));
        // The next fault occurs at a random phase of the detector.
        std::thread::sleep(ms(phase.u64(..200)));
    }
    let sessions = traffic.stop();
    let what = format!("{fault:?} by {} at {}% loss", watch.name(), loss * 100.0);
    report(&what, &seen, &sessions, &testbed.proxy);
    check(watch, fault, &seen, &sessions);
}

fn report(what: &str, seen: &[Seen], sessions: &[Session], proxy: &TestProxy) {
    let late =
        sessions.iter().filter(|session| session.result.is_ok() && session.took > LATE).count();
    let failed = sessions.iter().filter(|session| session.result.is_err()).count();
    // Down again after the fault, because of probes still in progress.
    let downs = proxy.log().lines().filter(|line| line.contains("to=\"down\"")).count();
    let relapses = downs.saturating_sub(seen.iter().filter(|trial| trial.out.is_some()).count());
    measured(&format!(
        "{what}: lowered {}; out {}; {relapses} relapses; \
         of {} sessions {failed} failed, {late} took over {LATE:?}",
        times(seen.iter().map(|trial| trial.lowered)),
        times(seen.iter().map(|trial| trial.out)),
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
            histogram.record(time.as_micros() as u64).expect("the histogram grows");
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

/// Lists the count of each span in milliseconds, without empty spans.
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
fn check(watch: &dyn Watch, fault: Fault, seen: &[Seen], sessions: &[Session]) {
    let wrongly_removed: Vec<&Seen> =
        seen.iter().filter(|trial| !trial.wrongly_removed.is_empty()).collect();
    assert!(wrongly_removed.is_empty(), "healthy backends were removed: {wrongly_removed:#?}");
    if let Some(bound) = watch.promises(fault) {
        let in_time = |trial: &Seen| trial.lowered.is_some_and(|time| time <= patience(bound));
        assert!(seen.iter().all(in_time), "not all within {bound:?}: {seen:#?}");
    }
    // From its removal until its return no session uses the failed backend.
    for trial in seen {
        let Some(out) = trial.out else { continue };
        let (from, to) = (trial.fault + out, trial.ended);
        let during = |session: &&Session| session.began > from && session.began + session.took < to;
        let failed = sessions.iter().filter(during).find(|session| session.result.is_err());
        assert!(failed.is_none(), "failed while the backend was out of rotation: {failed:?}");
    }
    if fault != Fault::Killed {
        // These faults kill no service. Clients wait and are served.
        let failed = errors(sessions, seen[0].fault);
        assert!(failed.is_empty(), "{failed:#?}");
    }
}
