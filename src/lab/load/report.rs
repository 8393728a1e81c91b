//! Results of a generator: requests, bytes, latencies, errors by kind.
//!
//! Each thread fills its own, `lab::cli::bench` merges and prints them. No I/O.

use hdrhistogram::Histogram;
use std::io;
use std::time::Duration;

/// Three digits: 0.1 % of a latency, far below the noise of any machine.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Largest recorded latency; longer ones are clamped to it.
const LATENCY_MAX: Duration = Duration::from_secs(3_600);

/// What can go wrong with a connection or a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum LoadErrorKind {
    /// The connect was refused.
    ConnectRefused,
    /// The connect timed out.
    ConnectTimedOut,
    /// The connect failed for another reason.
    ConnectFailed,
    /// The peer reset an established connection.
    Reset,
    /// The peer closed an established connection with FIN, before the answer or while
    /// the connection was to be held.
    Closed,
    /// An established connection failed for another reason.
    Failed,
    /// More bytes arrived than the answer has.
    Excess,
    /// A request had no answer when the run ended or its connection was lost.
    Unanswered,
    /// A message was due and was not sent, because no connection was established or too
    /// many messages were unanswered.
    NotSent,
    /// No local port was free. More `--sources` help.
    NoPorts,
    /// No descriptor was free.
    NoDescriptors,
}

/// All kinds with their names in reports, in numeric order.
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

/// Measured values.
#[derive(Debug, Clone)]
pub struct LoadReport {
    /// Requests answered within the measured time.
    pub requests: u64,
    /// Requests answered after the measured time; not part of any rate.
    pub late: u64,
    /// Connections established, including those before the measured time.
    pub opened: u64,
    /// Connections established within the measured time.
    pub opened_timed: u64,
    /// Bytes received within the measured time.
    pub bytes_in: u64,
    /// Bytes sent within the measured time.
    pub bytes_out: u64,
    /// The measured time: the longest of all threads.
    pub elapsed: Duration,
    latency: Histogram<u64>,
    errors: [u64; KINDS.len()],
}

// === impl LoadErrorKind ===

impl LoadErrorKind {
    /// Returns the kind of a connect error.
    pub(super) fn of_connect(error: &io::Error) -> LoadErrorKind {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => LoadErrorKind::ConnectRefused,
            Some(libc::ETIMEDOUT) => LoadErrorKind::ConnectTimedOut,
            Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE) => LoadErrorKind::NoPorts,
            Some(libc::EMFILE | libc::ENFILE) => LoadErrorKind::NoDescriptors,
            // The connection was established, and reset before the first check.
            Some(libc::ECONNRESET | libc::EPIPE) => LoadErrorKind::Reset,
            _ => LoadErrorKind::ConnectFailed,
        }
    }

    /// Returns the kind of an error of an established connection.
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

    /// Records a latency in nanoseconds.
    #[inline]
    pub(super) fn record(&mut self, nanos: u64) {
        self.latency.saturating_record(nanos);
    }

    /// Counts `times` errors.
    pub(super) fn fail(&mut self, kind: LoadErrorKind, times: u64) {
        self.errors[kind as usize] += times;
    }

    /// Adds the results of another thread.
    #[must_use]
    pub fn merge(mut self, other: &LoadReport) -> LoadReport {
        self.requests += other.requests;
        self.late += other.late;
        self.opened += other.opened;
        self.opened_timed += other.opened_timed;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.elapsed = self.elapsed.max(other.elapsed);
        // Adding can fail only for different ranges, and both ranges are the same.
        let _ = self.latency.add(&other.latency);
        for (sum, more) in self.errors.iter_mut().zip(other.errors) {
            *sum += more;
        }
        self
    }

    /// Returns the number of errors of a kind.
    pub fn errors(&self, kind: LoadErrorKind) -> u64 {
        self.errors[kind as usize]
    }

    /// Returns the kinds of errors that occurred, by name.
    pub fn errors_by_name(&self) -> impl Iterator<Item = (&'static str, u64)> {
        KINDS.iter().map(|(kind, name)| (*name, self.errors(*kind))).filter(|(_, n)| *n > 0)
    }

    /// Returns the number of all errors.
    pub fn errors_total(&self) -> u64 {
        self.errors.iter().sum()
    }

    /// Returns the number of recorded latencies.
    pub fn latencies(&self) -> u64 {
        self.latency.len()
    }

    /// Returns the latency that `percentile` (0 to 100) of the requests did not exceed.
    pub fn latency_at(&self, percentile: f64) -> Duration {
        Duration::from_nanos(self.latency.value_at_percentile(percentile))
    }

    /// Returns the longest latency.
    pub fn latency_max(&self) -> Duration {
        Duration::from_nanos(self.latency.max())
    }

    /// Returns the mean latency.
    pub fn latency_mean(&self) -> Duration {
        Duration::from_nanos(self.latency.mean() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kinds_are_in_numeric_order() {
        for (index, (kind, name)) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, index, "{name}");
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
    fn latency_beyond_the_range_is_clamped() {
        let mut report = LoadReport::new();
        report.record(u64::MAX);
        assert_eq!(report.latencies(), 1);
        assert!(report.latency_max() >= LATENCY_MAX);
    }
}
