//! Decides when a change of a watched file is complete.
//!
//! The watcher feeds it events and the time. The code is pure, so that each rule is
//! tested without a file system.
//!
//! # Rules
//! - After a write, the file is open until its writer closes it or its name leads to
//!   another file. An open file is not read.
//! - A writer without a write for [`Times::silence`] is ignored.
//! - A change is complete [`Times::settle`] after the last event. Events that write
//!   nothing delay this by at most [`Times::settle_max`].
//! - A change that only the periodic check detected needs a second, equal check after
//!   [`Times::confirm`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Length of each wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// Without an event before a change is complete.
    pub(super) settle: Duration,
    /// Upper bound of `settle` since the last writer closed the file, if further events
    /// arrive.
    pub(super) settle_max: Duration,
    /// Between two equal checks of a file whose changes cause no event.
    pub(super) confirm: Duration,
    /// Without a write before an open writer is ignored.
    pub(super) silence: Duration,
    /// Between two warnings about a writer that never stops.
    pub(super) warn: Duration,
}

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileEvent {
    /// Data was written, or the file was created empty: the file is open.
    Written,
    /// A writer closed the file, or the path leads to another file.
    Complete,
    /// Anything else.
    Touched,
}

/// Whether the changed files can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The change is complete.
    Settled,
    /// The change is not complete before this time.
    Wait(Instant),
}

/// A warning for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WatchWarning {
    /// The file is read although it is still open.
    StillOpen(PathBuf),
    /// Writes have continued for this time.
    StillWritten(PathBuf, Duration),
}

/// The events since the last complete change.
#[derive(Debug, Default)]
pub(super) struct FileSettling {
    /// Files that a writer has open, with the time of the last write.
    open: HashMap<PathBuf, Instant>,
    /// Time of the first event.
    since: Option<Instant>,
    /// Time when the last writer closed its file, or of the first event.
    closed: Option<Instant>,
    /// End of the wait that the last event started.
    due: Option<Instant>,
    warned: Option<Instant>,
}

impl FileSettling {
    /// Records an event of `path`.
    pub(super) fn event(&mut self, path: &Path, what: FileEvent, now: Instant, times: &Times) {
        match what {
            FileEvent::Written => drop(self.open.insert(path.to_owned(), now)),
            FileEvent::Complete => {
                if self.open.remove(path).is_some() {
                    self.closed = Some(now);
                }
            }
            FileEvent::Touched => {}
        }
        self.since.get_or_insert(now);
        self.closed.get_or_insert(now);
        self.due = Some(now + times.settle);
    }

    /// Records that a check found a difference without an event.
    pub(super) fn differs(&mut self, now: Instant, times: &Times) {
        self.since.get_or_insert(now);
        self.closed.get_or_insert(now);
        self.due = Some(now + times.confirm);
    }

    /// Removes writers of files that are no longer watched.
    pub(super) fn keep_only(&mut self, watched: impl Fn(&Path) -> bool) {
        self.open.retain(|path, _| watched(path));
    }

    /// Returns a file that a writer has open.
    pub(super) fn open_file(&self) -> Option<&Path> {
        self.open.keys().next().map(PathBuf::as_path)
    }

    /// Returns whether the change is complete at `now`.
    pub(super) fn verdict(
        &mut self,
        now: Instant,
        times: &Times,
        warn: &mut impl FnMut(WatchWarning),
    ) -> Verdict {
        self.open.retain(|path, last| {
            let open = now < *last + times.silence;
            if !open {
                warn(WatchWarning::StillOpen(path.clone()));
            }
            open
        });
        let Some(since) = self.since else { return Verdict::Settled };
        if let Some((path, last)) = self.open.iter().max_by_key(|(_, last)| **last) {
            let begun = self.warned.unwrap_or(since);
            if now >= begun + times.warn {
                warn(WatchWarning::StillWritten(path.clone(), now - since));
                self.warned = Some(now);
            }
            let warning_due = self.warned.unwrap_or(since) + times.warn;
            return Verdict::Wait((*last + times.silence).min(warning_due));
        }
        let latest = self.closed.unwrap_or(since) + times.settle_max.max(times.confirm);
        let due = self.due.map_or(now, |due| due.min(latest));
        if now < due {
            return Verdict::Wait(due);
        }
        *self = FileSettling::default();
        Verdict::Settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times = Times {
        settle: Duration::from_millis(100),
        settle_max: Duration::from_secs(2),
        confirm: Duration::from_millis(500),
        silence: Duration::from_secs(10),
        warn: Duration::from_secs(60),
    };

    struct Case {
        settling: FileSettling,
        start: Instant,
        warnings: Vec<WatchWarning>,
    }

    impl Case {
        fn new() -> Case {
            let start = crate::clock::now();
            Case { settling: FileSettling::default(), start, warnings: Vec::new() }
        }

        fn event(&mut self, millis: u64, what: FileEvent) {
            let now = self.start + Duration::from_millis(millis);
            self.settling.event(Path::new("/t.toml"), what, now, &TIMES);
        }

        /// Returns the milliseconds until the next check; `None` if settled.
        fn waits(&mut self, millis: u64) -> Option<u128> {
            let now = self.start + Duration::from_millis(millis);
            let warnings = &mut self.warnings;
            match self.settling.verdict(now, &TIMES, &mut |warning| warnings.push(warning)) {
                Verdict::Settled => None,
                Verdict::Wait(until) => Some((until - now).as_millis()),
            }
        }
    }

    #[test]
    fn file_is_not_read_before_its_writer_closes_it() {
        let mut case = Case::new();
        for at in (0..3000).step_by(150) {
            case.event(at, FileEvent::Written);
            assert!(case.waits(at + 149).is_some(), "at {at}");
        }
        case.event(3000, FileEvent::Complete);
        assert_eq!(case.waits(3000), Some(100));
        assert_eq!(case.waits(3100), None);
        assert_eq!(case.warnings, []);
    }

    #[test]
    fn every_event_restarts_the_settle_time() {
        let mut case = Case::new();
        case.event(0, FileEvent::Complete);
        case.event(90, FileEvent::Touched);
        assert_eq!(case.waits(100), Some(90));
        assert_eq!(case.waits(190), None);
        assert_eq!(case.waits(191), None, "no event since the last check");
    }

    #[test]
    fn endless_events_delay_reading_by_two_seconds_at_most() {
        let mut case = Case::new();
        for at in (0..2000).step_by(50) {
            case.event(at, FileEvent::Touched);
            assert!(case.waits(at + 1).is_some(), "at {at}");
        }
        case.event(2000, FileEvent::Touched);
        assert_eq!(case.waits(2000), None);
    }

    #[test]
    fn silent_writer_is_ignored_after_ten_seconds_with_a_warning() {
        let mut case = Case::new();
        case.event(0, FileEvent::Written);
        assert_eq!(case.waits(1), Some(9_999));
        assert_eq!(case.waits(10_000), None);
        assert_eq!(case.warnings, [WatchWarning::StillOpen("/t.toml".into())]);
    }

    #[test]
    fn endless_writer_causes_a_warning_per_minute_and_no_read() {
        let mut case = Case::new();
        for at in (0..150_000).step_by(1000) {
            case.event(at, FileEvent::Written);
            assert!(case.waits(at).is_some(), "at {at}");
        }
        let for_a =
            |seconds| WatchWarning::StillWritten("/t.toml".into(), Duration::from_secs(seconds));
        assert_eq!(case.warnings, [for_a(60), for_a(120)]);
    }

    #[test]
    fn change_without_an_event_needs_a_second_check() {
        let mut case = Case::new();
        let now = case.start;
        case.settling.differs(now, &TIMES);
        assert_eq!(case.waits(0), Some(500));
        case.settling.differs(now + Duration::from_millis(500), &TIMES);
        assert_eq!(case.waits(500), Some(500));
        assert_eq!(case.waits(1000), None);
    }
}
