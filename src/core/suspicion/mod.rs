//! The failure detector for heartbeats: what silence means, for one backend
//! and for many at once.
//!
//! The controller feeds it heartbeats, probe answers and due times and does
//! what it asks for. It never reads a clock, sends nothing, and never decides
//! who takes traffic: that is derived in [`super`].
//!
//! # How silence is judged
//!
//! Sequence numbers tell losses from delays, so [`arrivals`] *measures* how
//! many heartbeats are lost, and how often one loss follows another, and allows
//! for as many missing in a row as make a false suspicion rare (one in four
//! hours), 3 to 12 of them. Phi accrual ([`phi`]) knows gaps only, takes two
//! lost packets for a catastrophe or needs many seconds, and is exported as a
//! figure; nothing acts on it.
//!
//! # What follows
//!
//! ```text
//! Waiting --heartbeat--> Recovering --probe answered--> Up
//! Up --overdue, or a session's connect was refused--> Suspect
//! Suspect --all tries of a probe failed, or one was refused--> Down
//! Suspect --heartbeat (silent) or probe answered (refused)--> Up
//! Down --heartbeat--> Recovering --3 heartbeats, hold-down over, probe answered--> Up
//! any --the sender says it stops--> Down
//! ```
//!
//! - **What clears what.** Each suspicion is cleared by evidence of its own
//!   kind. A silent backend is up again with its next heartbeat, as long as
//!   nothing was confirmed. One whose service refused a connect needs a probe
//!   that is answered: heartbeats come from beside the service.
//! - **Silent but answering.** Where probes are answered and heartbeats stay
//!   away (the sidecar died, the service did not), the backend stays suspect,
//!   at [`SUSPECT_WEIGHT_PERCENT`], and is probed every [`DOUBT_INTERVAL`] for
//!   as long as that lasts. It never goes down while it answers.
//! - **What a probe is.** The pool's own probe where it has one, a plain TCP
//!   connect where it has none; each try is a fresh connect, since the kernel
//!   would repeat a lost SYN only after a second. It has as long as answers have
//!   taken so far ([`answer_time`]): 100 ms for backends nearby, up to a second, but no
//!   longer than the pool's own probe (or its connects) may take. Trouble of our own (no descriptors, no ports) proves nothing: the
//!   try is made again.
//! - **Coming back** takes heartbeats, a hold-down that doubles with each
//!   failure ([`flap_damping`]), a probe, and then a slow start ([`ramp`]).
//!
//! Before anything is taken out, [`guards`] asks whether the trouble might be
//! ours.
//!
//! # How it is driven
//!
//! 1. Before anything else, if [`is_late`]: [`HeartbeatDetector::ignore_silence_until`] for
//!    all, [`ChannelGuard::ignore_silence`]. A tick every interval keeps this honest.
//!    The same if the socket dropped datagrams.
//! 2. A heartbeat: [`ChannelGuard::beat`], then [`HeartbeatDetector::beat`] or
//!    [`HeartbeatDetector::stopping`].
//! 3. At [`HeartbeatDetector::due`]: [`HeartbeatDetector::check`] with
//!    [`ChannelGuard::state`].
//! 4. Whenever a backend became suspect, and at [`PathGuard::due`]:
//!    [`PathGuard::look`] with the pool's [`PathView`], and with everybody's.
//!    A [`FreezeChange::Ended`] asks for [`HeartbeatDetector::reconsider`].
//! 5. [`DetectorRequest::Eject`], after step 4: [`may_remove`], then
//!    [`HeartbeatDetector::eject`] or [`HeartbeatDetector::hold_in_rotation`].
//!
//! Views and the channel's state cost a walk over the backends: make them once
//! for everything that happens at one moment. `tests/detector_sim/world.rs`
//! drives many backends this way.
//!
//! # Bounds
//!
//! A silent death is confirmed within `12.5 · interval + 2 tries` of the last
//! heartbeat's arrival, 1.45 s at 100 ms, whatever was measured; above 15 % loss
//! a third try is made where it ends within `14.5 · interval`. A try is 100 ms
//! where answers take less than about half of that, else up to a second. That
//! holds while probes can be made here and no guard objects: those that die
//! together with half of their pool are out about a quarter of a second later
//! than one alone, where the others are heard.
//!
//! What the bound costs: a path that is dead for longer than that, in both
//! directions and for one backend alone, looks like a death. `scripts/detector-sim`
//! measures how rarely a healthy backend is taken out: never in 2,777
//! backend-hours at each of 0.1 to 30 % independent loss; where whole bursts of
//! 150 ms are lost, 0.08 to 3 times an hour.

mod answer_time;
pub mod arrivals;
mod confirmation;
mod detector;
pub mod flap_damping;
pub mod guards;
pub mod phi;
pub mod ramp;
pub mod rejections;
mod snapshot;
#[cfg(test)]
mod tests;

pub use crate::health::SUSPECT_WEIGHT_PERCENT;
pub use crate::suspicion::answer_time::{TRY_TIMEOUT_MAX, TRY_TIMEOUT_MIN};
pub use crate::suspicion::confirmation::{ConfirmationTry, TryId, TryResult};
pub use crate::suspicion::snapshot::DetectorReading;
pub use arrivals::{ArrivalOrder, Arrivals};
pub use detector::{HeartbeatDetector, SavedDetector};
pub use guards::{
    ChannelGuard, ChannelState, Freeze, FreezeChange, PathGuard, PathView, is_late, may_remove,
};
pub use ramp::Ramp;

use std::time::Duration;

/// Heartbeats in time that a backend needs before it is probed for coming back.
pub const RECOVERY_BEATS: u32 = 3;

/// How often a backend is probed that is silent but answers, or whose removal
/// is held back; and how soon after a failed recovery probe the next may come.
pub const DOUBT_INTERVAL: Duration = Duration::from_secs(1);

/// Intervals below are taken for this one: a receiver's timers are no finer.
pub const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Intervals above are taken for this one: a silence has to mean something.
pub const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// What a heartbeat tells the detector; its other contents are the
/// controller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeatInfo {
    /// Grows with every start of the sender.
    pub incarnation: u64,
    /// Grows by one with every datagram of an incarnation.
    pub sequence: u64,
    /// How often the sender says it sends.
    pub interval: Duration,
}

/// Where a backend stands with its heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DetectorState {
    /// Not one heartbeat yet: no opinion.
    Waiting,
    /// Heartbeats come.
    Up,
    /// Overdue or refusing, and not confirmed (or held back by a guard).
    Suspect,
    /// Confirmed, or its sender said it stops.
    Down,
    /// Heartbeats come (again); not proven yet.
    Recovering,
}

/// A change of state, with the evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetectorTransition {
    /// Before.
    pub from: DetectorState,
    /// Now.
    pub to: DetectorState,
    /// The evidence, in words for the log.
    pub reason: String,
    /// How long the state before had lasted.
    pub lasted: Duration,
    /// It comes back after it had been down: start slowly.
    pub after_down: bool,
}

/// Something the detector needs done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetectorRequest {
    /// Make one fresh connect now and report it with
    /// [`HeartbeatDetector::probed`].
    Probe(ConfirmationTry),
    /// It is confirmed: ask the guards ([`may_remove`]), then call
    /// [`HeartbeatDetector::eject`] or [`HeartbeatDetector::hold_in_rotation`].
    Eject {
        /// Proof that the path works and the service does not (a refused
        /// connect): no guard may hold this back.
        proven: bool,
    },
}

/// What follows from one input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "it may ask for a probe"]
pub struct DetectorStep {
    /// The state changed.
    pub change: Option<DetectorTransition>,
    /// Something is to be done.
    pub ask: Option<DetectorRequest>,
}

// === impl DetectorState ===

impl DetectorState {
    /// As in status and log.
    pub fn name(self) -> &'static str {
        match self {
            DetectorState::Waiting => "waiting",
            DetectorState::Up => "up",
            DetectorState::Suspect => "suspect",
            DetectorState::Down => "down",
            DetectorState::Recovering => "recovering",
        }
    }
}
