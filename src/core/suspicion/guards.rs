//! Guards over many detectors: they prevent removals whose cause can be on this host.
//!
//! The controller owns one [`ChannelGuard`] for the process, and one [`PathGuard`] per
//! pool and for all pools together. It calls them before it removes a backend. Guards
//! know no single backend and read no clock.
//!
//! - [`is_late`]: the control loop ran late. That time does not count as silence: call
//!   [`HeartbeatDetector::ignore_silence_until`] on every detector. The controller
//!   schedules a tick every interval to notice it.
//! - [`ChannelGuard`]: no heartbeat arrives from any backend. The cause can be the local
//!   socket, the key or a switch. Silence no longer makes a backend suspect; probes
//!   decide.
//! - [`PathGuard`]: at least two backends and at least half of a path became suspect
//!   together. Removals are frozen until other backends have sent heartbeats again, an
//!   interval or more after the freeze began. That takes a little more than
//!   [`CORRELATED_LOOK`] if the path works. The freeze lasts while it does not.
//! - [`may_remove`]: at most a percentage of a pool is down at a time; one backend of a
//!   pool of two or three, none of a pool of one.
//!
//! No guard prevents a *proven* removal: a refused connect shows that path and host work
//! and the service does not.

use super::arrivals::later;
use super::{DetectorState, HeartbeatDetector};
use std::time::{Duration, Instant};

/// How often a frozen path is checked for heartbeats of other backends. Shorter than the
/// confirmation of a suspicion, longer than two usual intervals.
pub const CORRELATED_LOOK: Duration = Duration::from_millis(250);

/// After this time a backend that is not overdue counts as heard, because its sender can
/// have a longer interval.
const CORRELATED_HOLD: Duration = Duration::from_secs(1);

/// Suspicions up to this many intervals apart are one event. Backends differ in phase by
/// one interval, and in the heartbeats allowed to be missing by several.
const CORRELATED_INTERVALS: u32 = 5;

/// The channel is silent after this many intervals without any heartbeat. Shorter than the
/// timeout of any backend, so that the guard acts before the first suspicion.
const SILENT_INTERVALS: f64 = 2.2;

/// The path works if one in `HEARD_PARTS` backends is heard. After `PATIENCE` a single
/// backend is sufficient, because the others may really have failed.
const HEARD_PARTS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(5);

/// State of the heartbeat channel as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelState {
    /// At least one backend is heard.
    Alive,
    /// No backend is heard.
    Silent,
}

/// Detects that no backend is heard.
#[derive(Debug, Clone, Default)]
pub struct ChannelGuard {
    last: Option<Instant>,
}

/// A freeze: no backend of the path is removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freeze {
    /// When the freeze began.
    pub since: Instant,
    /// Reason, such as `3 of 4 backends became suspect together`.
    pub reason: String,
}

/// Detects that many backends of one path became suspect together.
#[derive(Debug, Clone, Default)]
pub struct PathGuard {
    freeze: Option<Freeze>,
    /// Time of the next check while frozen.
    look_at: Option<Instant>,
}

/// Backends of one path, counted by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathView {
    /// Have sent a heartbeat and are not down.
    pub live: usize,
    /// Suspect.
    pub suspects: usize,
    /// Became suspect within the last `CORRELATED_INTERVALS`.
    pub fresh: usize,
    /// Sent heartbeats in time or answered probes; while frozen, since the freeze began.
    pub heard: usize,
    /// Answer probes.
    pub answering: usize,
    /// Down.
    pub down: usize,
    /// All backends.
    pub members: usize,
}

/// Change of a freeze, to be logged. Holds the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FreezeChange {
    /// No backend is removed from now on.
    Started(String),
    /// Confirmed backends may be removed again: call [`HeartbeatDetector::reconsider`] on
    /// every suspect.
    Ended(String),
}

/// Whether the control loop ran more than `interval` later than `due`.
pub fn is_late(due: Instant, now: Instant, interval: Duration) -> bool {
    now.saturating_duration_since(due) > interval
}

/// Returns how many of a pool's `members` may be down at a time.
pub fn down_max(percent: u8, members: usize) -> usize {
    let share = members.saturating_mul(usize::from(percent.min(100))) / 100;
    // At least one, except at 0 % and in a pool of one backend.
    if percent > 0 && members > 1 { share.max(1) } else { share }
}

/// Whether a backend confirmed as down may be removed from rotation. The error is the
/// reason for the log. `freezes` are those of the pool's path and of all paths together.
/// While no backend is heard, a quarter of the pool must answer probes.
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
    /// Records a heartbeat that counts, from any sender. `interval` is the longest of all
    /// senders. Returns true if the channel was silent before: then call
    /// [`HeartbeatDetector::reconsider`] on every suspect.
    pub fn beat(&mut self, interval: Duration, now: Instant) -> bool {
        let silent = self.silent(interval, now);
        self.last = Some(now);
        silent
    }

    /// Excludes the time `lost` before `now` from the silence.
    pub fn ignore_silence(&mut self, lost: Duration, now: Instant) {
        self.last = self.last.map(|last| later(last, lost, now));
    }

    /// Returns the state of the channel. `live` backends should be heard, the slowest every
    /// `interval`. With a single backend the channel is never silent.
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
    /// Counts the backends of a path. `frozen` is the start of its freeze, if any.
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
                // Not in rotation yet, but heard.
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

/// Whether a backend shows that its path works. After a freeze began, earlier heartbeats
/// show nothing, and neither does a backend that is not overdue yet: if heartbeats stop
/// arriving on this host, backends become overdue one after the other.
fn heard(detector: &HeartbeatDetector, frozen: Option<Instant>, now: Instant) -> bool {
    let in_time = detector.answers(now) || !detector.overdue(now);
    let Some(since) = frozen else { return in_time };
    detector.heard_since(since) || (in_time && now >= since + CORRELATED_HOLD)
}

// === impl PathGuard ===

impl PathGuard {
    /// Starts or ends the freeze. Call it after a backend became suspect, before any
    /// removal is requested, and at [`PathGuard::due`].
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

    /// Returns the time of the next check while frozen.
    pub fn due(&self) -> Option<Instant> {
        self.look_at
    }

    /// Returns the freeze, if any.
    pub fn freeze(&self) -> Option<&Freeze> {
        self.freeze.as_ref()
    }

    fn end_freeze(&mut self, reason: String) -> Option<FreezeChange> {
        self.freeze = None;
        self.look_at = None;
        Some(FreezeChange::Ended(reason))
    }
}
