//! When a change of a watched file is complete: every writer has closed it and
//! nothing has happened for a moment. Fed by the watcher with events and the
//! time; pure, so that each rule is tested without a file system.
//!
//! # Rules
//! - A write opens a file for the watcher: more is expected until the writer
//!   closes it, or until the name leads to another file.
//! - A writer that is silent for [`Times::silence`] is not waited for any more.
//! - Every event restarts the pause of [`Times::settle`]. Events that write nothing
//!   delay the reading by [`Times::settle_max`] at most.
//! - What only a look at the file has shown is confirmed by a second, equal look
//!   after [`Times::confirm`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long each wait may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// Without an event before a change counts as complete.
    pub(super) settle: Duration,
    /// The same in all since a writer closed last, while other events keep coming.
    pub(super) settle_max: Duration,
    /// Between two equal looks at a file whose changes raise no event.
    pub(super) confirm: Duration,
    /// Without a write before an open writer is no longer waited for.
    pub(super) silence: Duration,
    /// Between two warnings about a writer that never stops.
    pub(super) warn: Duration,
}

/// What happened to a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Happening {
    /// Data was written, or the file was created empty: its writer has it open.
    Written,
    /// A writer closed it, or the name leads to another file.
    Whole,
    /// Anything else.
    Touched,
}

/// Whether what changed may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may.
    Settled,
    /// Not before that moment.
    Wait(Instant),
}

/// Something to warn of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WatchWarning {
    /// The file is read although a silent writer still has it open.
    StillOpen(PathBuf),
    /// The file has been written to for that long without a pause.
    StillWritten(PathBuf, Duration),
}

/// The events since everything was settled last.
#[derive(Debug, Default)]
pub(super) struct FileSettling {
    /// Files that a writer has open, with its last write.
    open: HashMap<PathBuf, Instant>,
    /// The first event.
    since: Option<Instant>,
    /// The first event since the last writer closed.
    closed: Option<Instant>,
    /// End of the pause that the last event began.
    due: Option<Instant>,
    warned: Option<Instant>,
}

impl FileSettling {
    /// Notes what happened to `path`.
    pub(super) fn event(&mut self, path: &Path, what: Happening, now: Instant, times: &Times) {
        match what {
            Happening::Written => drop(self.open.insert(path.to_owned(), now)),
            Happening::Whole => {
                if self.open.remove(path).is_some() {
                    self.closed = Some(now);
                }
            }
            Happening::Touched => {}
        }
        self.since.get_or_insert(now);
        self.closed.get_or_insert(now);
        self.due = Some(now + times.settle);
    }

    /// Notes that a file looks different and no event said so.
    pub(super) fn looks_different(&mut self, now: Instant, times: &Times) {
        self.since.get_or_insert(now);
        self.closed.get_or_insert(now);
        self.due = Some(now + times.confirm);
    }

    /// Forgets writers of files that are no longer watched.
    pub(super) fn keep_only(&mut self, watched: impl Fn(&Path) -> bool) {
        self.open.retain(|path, _| watched(path));
    }

    /// A file that a writer has open.
    pub(super) fn open_file(&self) -> Option<&Path> {
        self.open.keys().next().map(PathBuf::as_path)
    }

    /// Whether what changed may be read at `now`.
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
            // A moment to count from; its value means nothing.
            let start = tidegate_net::clock::now();
            Case { settling: FileSettling::default(), start, warnings: Vec::new() }
        }

        fn event(&mut self, millis: u64, what: Happening) {
            let now = self.start + Duration::from_millis(millis);
            self.settling.event(Path::new("/t.toml"), what, now, &TIMES);
        }

        /// Milliseconds until the next look; `None` once settled.
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
    fn a_file_is_not_read_before_its_writer_closes_it() {
        let mut case = Case::new();
        for at in (0..3000).step_by(150) {
            case.event(at, Happening::Written);
            assert!(case.waits(at + 149).is_some(), "at {at}");
        }
        case.event(3000, Happening::Whole);
        assert_eq!(case.waits(3000), Some(100));
        assert_eq!(case.waits(3100), None);
        assert_eq!(case.warnings, []);
    }

    #[test]
    fn every_event_restarts_the_pause() {
        let mut case = Case::new();
        case.event(0, Happening::Whole);
        case.event(90, Happening::Touched);
        assert_eq!(case.waits(100), Some(90));
        assert_eq!(case.waits(190), None);
        assert_eq!(case.waits(191), None, "nothing has happened since");
    }

    #[test]
    fn events_without_end_delay_the_reading_by_two_seconds_at_most() {
        let mut case = Case::new();
        for at in (0..2000).step_by(50) {
            case.event(at, Happening::Touched);
            assert!(case.waits(at + 1).is_some(), "at {at}");
        }
        case.event(2000, Happening::Touched);
        assert_eq!(case.waits(2000), None);
    }

    #[test]
    fn a_silent_writer_is_waited_for_ten_seconds_with_a_warning() {
        let mut case = Case::new();
        case.event(0, Happening::Written);
        assert_eq!(case.waits(1), Some(9_999));
        assert_eq!(case.waits(10_000), None);
        assert_eq!(case.warnings, [WatchWarning::StillOpen("/t.toml".into())]);
    }

    #[test]
    fn a_writer_that_never_stops_is_warned_of_once_a_minute_and_never_read() {
        let mut case = Case::new();
        for at in (0..150_000).step_by(1000) {
            case.event(at, Happening::Written);
            assert!(case.waits(at).is_some(), "at {at}");
        }
        let for_a =
            |seconds| WatchWarning::StillWritten("/t.toml".into(), Duration::from_secs(seconds));
        assert_eq!(case.warnings, [for_a(60), for_a(120)]);
    }

    #[test]
    fn a_change_without_an_event_needs_a_second_look() {
        let mut case = Case::new();
        let now = case.start;
        case.settling.looks_different(now, &TIMES);
        assert_eq!(case.waits(0), Some(500));
        case.settling.looks_different(now + Duration::from_millis(500), &TIMES);
        assert_eq!(case.waits(500), Some(500));
        assert_eq!(case.waits(1000), None);
    }
}
