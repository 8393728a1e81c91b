//! What a generator has counted: requests, bytes, latencies, errors by kind.
//!
//! Filled by one thread, merged when all are done, read by `lab::cli::bench`. It
//! does no I/O.

use hdrhistogram::Histogram;
use std::io;
use std::time::Duration;

/// Three digits: 0.1 % of a latency, far below what any machine repeats.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Longest latency told apart; longer ones count as this.
const LATENCY_MAX: Duration = Duration::from_secs(3_600);

/// What can go wrong with a connection or a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum LoadErrorKind {
    /// Nobody listens there.
    ConnectRefused,
    /// Connecting took longer than the kernel or the run had patience for.
    ConnectTimedOut,
    /// Connecting failed in any other way.
    ConnectFailed,
    /// The peer cut an established connection (RST).
    Reset,
    /// The peer closed an established connection in order, before the answer
    /// or while it was to be held.
    Closed,
    /// An established connection failed in any other way.
    Failed,
    /// More bytes came back than the answer has.
    Excess,
    /// A request without an answer when the run ended or its connection broke.
    Unanswered,
    /// A message that was due and not sent: no connection stood, or too many
    /// were unanswered already.
    NotSent,
    /// No free port: more `--sources` help.
    NoPorts,
    /// No free descriptor.
    NoDescriptors,
}

/// All kinds with their names in reports.
pub(super) const KINDS: [(LoadErrorKind, &str); 11] = [
    (LoadErrorKind::ConnectRefused, "connect_refused"),
    (LoadErrorKind::ConnectTimedOut, "connect_timed_out"),
    (LoadErrorKind::ConnectFailed, "connect_failed"),
    (LoadErrorKind::Reset, "reset"),
    (LoadErrorKind::Closed, "closed"),
    (LoadErrorKind::Failed, "failed"),
    (LoadErrorKind::Excess, "excess"),
    (LoadErrorKind::Unanswered, "unanswered"),
    (LoadErrorKind::NotSent, "not_sent"),
    (LoadErrorKind::NoPorts, "no_ports"),
    (LoadErrorKind::NoDescriptors, "no_descriptors"),
];

/// What was measured.
#[derive(Debug, Clone)]
pub struct LoadReport {
    /// Requests answered within the measured time.
    pub requests: u64,
    /// Requests answered after it: not in any rate.
    pub late: u64,
    /// Connections established, those before the measured time included.
    pub opened: u64,
    /// Connections established within the measured time.
    pub opened_timed: u64,
    /// Bytes received within the measured time.
    pub bytes_in: u64,
    /// Bytes sent within the measured time.
    pub bytes_out: u64,
    /// The measured time: the longest of any thread.
    pub elapsed: Duration,
    latency: Histogram<u64>,
    errors: [u64; KINDS.len()],
}

// === impl LoadErrorKind ===

impl LoadErrorKind {
    /// Why a connection never stood.
    pub(super) fn of_connect(error: &io::Error) -> LoadErrorKind {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => LoadErrorKind::ConnectRefused,
            Some(libc::ETIMEDOUT) => LoadErrorKind::ConnectTimedOut,
            Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE) => LoadErrorKind::NoPorts,
            Some(libc::EMFILE | libc::ENFILE) => LoadErrorKind::NoDescriptors,
            // It stood, and was cut before anybody looked.
            Some(libc::ECONNRESET | libc::EPIPE) => LoadErrorKind::Reset,
            _ => LoadErrorKind::ConnectFailed,
        }
    }

    /// Why an established connection broke.
    pub(super) fn of_transfer(error: &io::Error) -> LoadErrorKind {
        match error.raw_os_error() {
            Some(libc::ECONNRESET | libc::EPIPE) => LoadErrorKind::Reset,
            _ => LoadErrorKind::Failed,
        }
    }
}

// === impl LoadReport ===

impl LoadReport {
    pub(super) fn new() -> LoadReport {
        let longest = u64::try_from(LATENCY_MAX.as_nanos()).expect("an hour in nanoseconds fits");
        LoadReport {
            requests: 0,
            late: 0,
            opened: 0,
            opened_timed: 0,
            bytes_in: 0,
            bytes_out: 0,
            elapsed: Duration::ZERO,
            latency: Histogram::new_with_max(longest, SIGNIFICANT_DIGITS)
                .expect("three digits and an hour are in range"),
            errors: [0; KINDS.len()],
        }
    }

    /// Counts a latency in nanoseconds.
    #[inline]
    pub(super) fn record(&mut self, nanos: u64) {
        self.latency.saturating_record(nanos);
    }

    /// Counts `times` errors.
    pub(super) fn fail(&mut self, kind: LoadErrorKind, times: u64) {
        self.errors[kind as usize] += times;
    }

    /// Adds what another thread has measured.
    #[must_use]
    pub fn merge(mut self, other: &LoadReport) -> LoadReport {
        self.requests += other.requests;
        self.late += other.late;
        self.opened += other.opened;
        self.opened_timed += other.opened_timed;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.elapsed = self.elapsed.max(other.elapsed);
        // Both have the same range, which is all that could be wrong.
        let _ = self.latency.add(&other.latency);
        for (sum, more) in self.errors.iter_mut().zip(other.errors) {
            *sum += more;
        }
        self
    }

    /// How many errors of a kind there were.
    pub fn errors(&self, kind: LoadErrorKind) -> u64 {
        self.errors[kind as usize]
    }

    /// Kinds of errors that occurred, by name.
    pub fn errors_by_name(&self) -> impl Iterator<Item = (&'static str, u64)> {
        KINDS.iter().map(|(kind, name)| (*name, self.errors(*kind))).filter(|(_, n)| *n > 0)
    }

    /// All errors.
    pub fn errors_total(&self) -> u64 {
        self.errors.iter().sum()
    }

    /// Latencies recorded.
    pub fn latencies(&self) -> u64 {
        self.latency.len()
    }

    /// The latency that `percentile` (0 to 100) of requests did not exceed.
    pub fn latency_at(&self, percentile: f64) -> Duration {
        Duration::from_nanos(self.latency.value_at_percentile(percentile))
    }

    /// The longest latency.
    pub fn latency_max(&self) -> Duration {
        Duration::from_nanos(self.latency.max())
    }

    /// The mean latency.
    pub fn latency_mean(&self) -> Duration {
        Duration::from_nanos(self.latency.mean() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_stands_at_its_own_place_in_the_list_of_names() {
        for (place, (kind, name)) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, place, "{name}");
        }
    }

    #[test]
    fn merging_adds_counts_and_keeps_the_longest_time() {
        let (mut one, mut other) = (LoadReport::new(), LoadReport::new());
        one.record(1_000);
        other.record(3_000);
        other.fail(LoadErrorKind::Reset, 2);
        other.elapsed = Duration::from_secs(2);
        other.requests = 5;
        let sum = one.merge(&other);
        assert_eq!((sum.requests, sum.latencies(), sum.errors(LoadErrorKind::Reset)), (5, 2, 2));
        assert_eq!(sum.elapsed, Duration::from_secs(2));
        assert!((2_995..=3_005).contains(&(sum.latency_max().as_nanos() as u64)));
    }

    #[test]
    fn a_latency_beyond_the_range_counts_as_the_longest() {
        let mut report = LoadReport::new();
        report.record(u64::MAX);
        assert_eq!(report.latencies(), 1);
        assert!(report.latency_max() >= LATENCY_MAX);
    }
}
