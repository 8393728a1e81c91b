//! Guards over many detectors: is it them, or is it us?
//!
//! The controller keeps one [`ChannelGuard`] for the process and one
//! [`PathGuard`] for each pool and for all pools together, and asks them before
//! it takes anything out. They never judge a single backend, and read no clock.
//!
//! - [`is_late`]: our own loop was late, and that much silence does not count: call
//!   [`HeartbeatDetector::ignore_silence_until`] on every detector. The controller wants a
//!   tick of its own every interval, to notice.
//! - [`ChannelGuard`]: *nobody* is heard. Either all died at once or it is our
//!   socket, our key, our switch: silence no longer makes a suspect, probes
//!   decide.
//! - [`PathGuard`]: at least half of a path's backends (two at least) became
//!   suspect together. Taking them out waits until the others have been heard
//!   anew, an interval or more after it began: it takes a good
//!   [`CORRELATED_LOOK`] where the path works, and for ever where it is us.
//! - [`may_remove`]: at most so many percent of a pool are out at once; one of a
//!   pool of two or three, none of a pool of one.
//!
//! None of them holds back what is *proven*: a refused connect shows that path
//! and host work and the service does not.

use super::arrivals::later;
use super::{DetectorState, HeartbeatDetector};
use std::time::{Duration, Instant};

/// How often a frozen path is looked at for the others' signs of life. Shorter
/// than confirming a suspicion takes, and more than two usual intervals.
pub const CORRELATED_LOOK: Duration = Duration::from_millis(250);

/// From then on a backend counts as heard that is merely not overdue: senders
/// may be slower than that.
const CORRELATED_HOLD: Duration = Duration::from_secs(1);

/// Suspicions this many intervals apart are one event: backends differ in
/// phase by one interval and in what they are allowed to miss by several.
const CORRELATED_INTERVALS: u32 = 5;

/// Nobody is heard for that long, in intervals: shorter than any backend's own
/// timeout, so that the guard is there before the first suspect.
const SILENT_INTERVALS: f64 = 2.2;

/// A quarter of a path's backends must be heard for it to work; after that long
/// any will do, for nine of ten may well have died.
const HEARD_PARTS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(5);

/// What the heartbeats' channel as a whole is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelState {
    /// Somebody is heard.
    Alive,
    /// Nobody is.
    Silent,
}

/// Notices that nobody at all is heard.
#[derive(Debug, Clone, Default)]
pub struct ChannelGuard {
    last: Option<Instant>,
}

/// Why nothing is taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freeze {
    /// Since when.
    pub since: Instant,
    /// In words, such as `3 of 4 backends fell silent together`.
    pub reason: String,
}

/// Notices that many backends of one path became suspect together.
#[derive(Debug, Clone, Default)]
pub struct PathGuard {
    freeze: Option<Freeze>,
    /// Next look at whether the path works.
    look_at: Option<Instant>,
}

/// How the backends of one path stand, counted by [`PathView::of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathView {
    /// That have been heard at all, and are not down.
    pub live: usize,
    /// Suspect now.
    pub suspects: usize,
    /// Suspect, and became so together with others just now.
    pub fresh: usize,
    /// Heard in time, or answering probes; while the path is frozen: since then.
    pub heard: usize,
    /// Answering probes.
    pub answering: usize,
    /// Down.
    pub down: usize,
    /// All.
    pub members: usize,
}

/// What changed at a look; to be logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FreezeChange {
    /// Nothing is taken out from now on, for that reason.
    Started(String),
    /// What is confirmed may be taken out again, for that reason: call
    /// [`HeartbeatDetector::reconsider`] on every suspect.
    Ended(String),
}

/// Whether our own loop was late by more than `interval`; `due` is when it had
/// been asked to run.
pub fn is_late(due: Instant, now: Instant, interval: Duration) -> bool {
    now.saturating_duration_since(due) > interval
}

/// How many of a pool's `members` may be out at once.
pub fn down_max(percent: u8, members: usize) -> usize {
    let share = members.saturating_mul(usize::from(percent.min(100))) / 100;
    // Half of three is one; a pool of two lives on one, a pool of one does not
    // live on none. Zero percent means what it says.
    if percent > 0 && members > 1 { share.max(1) } else { share }
}

/// Whether a confirmed backend of a pool may be taken out; if not, why.
/// `freezes` are those of the pool's path and of all paths together. While
/// nobody is heard, the backends that answer probes have to show that the path
/// works.
pub fn may_remove(
    proven: bool,
    pool: PathView,
    max_down_percent: u8,
    channel: ChannelState,
    freezes: [Option<&Freeze>; 2],
) -> Result<(), String> {
    if proven {
        return Ok(());
    }
    if channel == ChannelState::Silent && pool.answering * HEARD_PARTS < pool.live.max(1) {
        let PathView { answering, members, .. } = pool;
        return Err(format!(
            "no heartbeats received from any backend, and only {answering} of {members} \
             answer probes; the fault may be on this host"
        ));
    }
    if let Some(freeze) = freezes.into_iter().flatten().next() {
        return Err(freeze.reason.clone());
    }
    let PathView { down, members, .. } = pool;
    if down >= down_max(max_down_percent, members) {
        return Err(format!(
            "{down} of {members} backends are down; max_ejected = {max_down_percent}%"
        ));
    }
    Ok(())
}

// === impl ChannelGuard ===

impl ChannelGuard {
    /// A heartbeat that counts came, from whomever; `interval` is the slowest
    /// sender's. True if nobody had been heard for long: then what was held back
    /// is to be reconsidered ([`HeartbeatDetector::reconsider`]).
    pub fn beat(&mut self, interval: Duration, now: Instant) -> bool {
        let silent = self.silent(interval, now);
        self.last = Some(now);
        silent
    }

    /// So much of the silence was our own doing: it does not count.
    pub fn ignore_silence(&mut self, lost: Duration, now: Instant) {
        self.last = self.last.map(|last| later(last, lost, now));
    }

    /// `live` backends are expected to be heard, the slowest every `interval`.
    /// A single one is no channel: its silence is its own.
    pub fn state(&self, live: usize, interval: Duration, now: Instant) -> ChannelState {
        if live > 1 && self.silent(interval, now) {
            ChannelState::Silent
        } else {
            ChannelState::Alive
        }
    }

    fn silent(&self, interval: Duration, now: Instant) -> bool {
        let silence = self.last.map(|last| now.saturating_duration_since(last));
        silence.is_some_and(|silence| silence > interval.mul_f64(SILENT_INTERVALS))
    }
}

// === impl PathView ===

impl PathView {
    /// Counts. `frozen`: since when the path is, if it is.
    pub fn of<'a>(
        detectors: impl IntoIterator<Item = &'a HeartbeatDetector>,
        frozen: Option<Instant>,
        now: Instant,
    ) -> PathView {
        let mut view = PathView::default();
        for detector in detectors {
            let answers = detector.answers(now);
            let heard = heard(detector, frozen, now);
            view.members += 1;
            view.answering += usize::from(answers);
            match detector.state() {
                DetectorState::Waiting => {}
                DetectorState::Down => view.down += 1,
                // It is still out, but it is heard.
                DetectorState::Recovering => {
                    view.down += usize::from(detector.was_down());
                    view.heard += usize::from(heard);
                }
                DetectorState::Up => {
                    view.live += 1;
                    view.heard += usize::from(heard);
                }
                DetectorState::Suspect => {
                    view.live += 1;
                    view.suspects += 1;
                    let window = detector.interval() * CORRELATED_INTERVALS;
                    let age = now.saturating_duration_since(detector.since());
                    view.fresh += usize::from(age <= window);
                    view.heard += usize::from(heard);
                }
            }
        }
        view
    }

    fn together(self) -> bool {
        self.fresh > 1 && self.fresh * 2 >= self.live
    }
}

/// Whether it shows that its path works. On a frozen one what was heard before
/// shows nothing, nor does a silence that is not long enough yet to mean
/// anything: when we go deaf, backends fall silent one after the other.
fn heard(detector: &HeartbeatDetector, frozen: Option<Instant>, now: Instant) -> bool {
    let in_time = detector.answers(now) || !detector.overdue(now);
    let Some(since) = frozen else { return in_time };
    detector.heard_since(since) || (in_time && now >= since + CORRELATED_HOLD)
}

// === impl PathGuard ===

impl PathGuard {
    /// Looks at how the path's backends stand: to be called after a backend
    /// became suspect, before anything is asked to be taken out, and at
    /// [`PathGuard::due`].
    pub fn look(&mut self, view: PathView, now: Instant) -> Option<FreezeChange> {
        let Some(freeze) = &self.freeze else {
            if !view.together() {
                return None;
            }
            let reason =
                format!("{} of {} backends became suspect together", view.fresh, view.live);
            self.freeze = Some(Freeze { since: now, reason: reason.clone() });
            self.look_at = Some(now + CORRELATED_LOOK);
            return Some(FreezeChange::Started(reason));
        };
        if view.suspects == 0 {
            return self.end_freeze("no backend is suspect any more".to_owned());
        }
        if self.look_at.is_none_or(|at| now < at) {
            return None;
        }
        let PathView { heard, members, .. } = view;
        let held = now.saturating_duration_since(freeze.since);
        let enough = if held < PATIENCE { HEARD_PARTS } else { view.live };
        if heard > 0 && heard * enough >= view.live {
            let held = held.as_millis();
            return self.end_freeze(format!(
                "{heard} of {members} backends sent heartbeats within {held} ms; \
                 the path works"
            ));
        }
        self.look_at = Some(now + CORRELATED_LOOK);
        None
    }

    /// When it wants to look again.
    pub fn due(&self) -> Option<Instant> {
        self.look_at
    }

    /// Why nothing is taken out, if so.
    pub fn freeze(&self) -> Option<&Freeze> {
        self.freeze.as_ref()
    }

    fn end_freeze(&mut self, reason: String) -> Option<FreezeChange> {
        self.freeze = None;
        self.look_at = None;
        Some(FreezeChange::Ended(reason))
    }
}
