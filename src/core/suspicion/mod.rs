//! Failure detector for heartbeats: one state machine per backend, and guards over
//! many backends.
//!
//! The controller passes in heartbeats, probe results and due times, and performs the
//! requests that the detector returns. The detector reads no clock and sends nothing.
//! It does not decide which backend is eligible: [`super::health`] derives that.
//!
//! # When silence is suspicious
//!
//! Sequence numbers distinguish losses from delays. [`arrivals`] measures how many
//! heartbeats are lost and how often one loss follows another. It allows 3 to 12 missing
//! heartbeats in a row: the smallest number for which a false suspicion occurs about
//! once in four hours. Phi accrual ([`phi`]) uses gaps only. Under packet loss it either
//! reports failures after two lost packets or needs many seconds. Tidegate therefore
//! exports phi as a metric, and nothing acts on it.
//!
//! # States
//!
//! ```text
//! Waiting --heartbeat--> Recovering --probe succeeded--> Up
//! Up --overdue, or a session's connect was refused--> Suspect
//! Suspect --all tries of a probe failed, or one was refused--> Down
//! Suspect --heartbeat (if overdue), or probe succeeded (if refused)--> Up
//! Down --heartbeat--> Recovering --3 heartbeats, hold-down over, probe succeeded--> Up
//! any --the sender reports stopping--> Down
//! ```
//!
//! - **What clears a suspicion.** Evidence of the same kind. A backend with overdue
//!   heartbeats is up again after its next heartbeat, unless probes have confirmed the
//!   failure. A backend that refused a connect needs a successful probe, because
//!   heartbeats do not come from the service itself.
//! - **Silent but answering.** If probes succeed and heartbeats are missing (the sender
//!   failed, the service works), the backend stays suspect with
//!   [`SUSPECT_WEIGHT_PERCENT`] of its weight. It is probed every
//!   [`SUSPECT_PROBE_INTERVAL`], and it is not down while probes succeed.
//! - **Confirmation probe.** The pool's own probe, or a TCP connect if the pool has none.
//!   Each try is a new connect, because the kernel retransmits a lost SYN only after 1 s.
//!   The timeout of a try follows the measured answer times ([`answer_time`]): 100 ms to
//!   1 s, and at most the timeout of the pool's probe or connects. A local error (no
//!   descriptors, no ports) is no evidence; the try is repeated.
//! - **Return.** It needs heartbeats, a hold-down that doubles with each failure
//!   ([`flap_damping`]), a successful probe, and then a slow start ([`ramp`]).
//!
//! Before a backend is removed, [`guards`] checks whether the cause can be on this host.
//!
//! # Call sequence
//!
//! 1. First, if [`is_late`]: [`HeartbeatDetector::ignore_silence_until`] on every
//!    detector, and [`ChannelGuard::ignore_silence`]. The same if the socket dropped
//!    datagrams. The controller schedules a tick every interval to measure its lateness.
//! 2. On a heartbeat: [`ChannelGuard::beat`], then [`HeartbeatDetector::beat`] or
//!    [`HeartbeatDetector::stopping`].
//! 3. At [`HeartbeatDetector::due`]: [`HeartbeatDetector::check`] with
//!    [`ChannelGuard::state`].
//! 4. When a backend became suspect, and at [`PathGuard::due`]: [`PathGuard::look`] with
//!    the [`PathView`] of the pool, and with the view of all pools. After a
//!    [`FreezeChange::Ended`]: [`HeartbeatDetector::reconsider`].
//! 5. On [`DetectorRequest::Eject`], after step 4: [`may_remove`], then
//!    [`HeartbeatDetector::eject`] or [`HeartbeatDetector::hold_in_rotation`].
//!
//! A view and the channel's state cost a scan of the backends. Compute them once for all
//! events of one moment. `tests/detector_sim/world.rs` is an example with many backends.
//!
//! # Bounds
//!
//! A silent failure is confirmed within `12.5 · interval + 2 tries` after the last
//! heartbeat, whatever was measured: 1.45 s at an interval of 100 ms. Above 15 % loss
//! there is a third try if it ends within `14.5 · interval`. A try takes 100 ms if answers
//! take less than about 50 ms, else up to 1 s. Exceptions: probes fail with local errors,
//! or a guard prevents the removal. If half of a pool fails together and the other half
//! sends heartbeats, the removal takes about 250 ms longer.
//!
//! The cost of the bound: a path that fails in both directions for longer, for one backend
//! alone, looks like a failed backend. `scripts/detector-sim` measures how often a healthy
//! backend is removed: never in 2,777 backend-hours at each independent loss rate from
//! 0.1 to 30 %; 0.08 to 3 times per hour if bursts of 150 ms are lost.

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

/// Heartbeats in time that a backend needs before its recovery probe.
pub const RECOVERY_BEATS: u32 = 3;

/// Interval of confirmation probes while a backend is silent but answering, or while a
/// guard prevents its removal; also the shortest time between two recovery probes.
pub const SUSPECT_PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// Lower bound for declared intervals. The receiver's timers are not finer.
pub const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Upper bound for declared intervals. With a longer one, silence would show nothing.
pub const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// The part of a heartbeat that the detector uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeatInfo {
    /// Increases with every start of the sender.
    pub incarnation: u64,
    /// Increases by one with every datagram of an incarnation.
    pub sequence: u64,
    /// The interval that the sender declares.
    pub interval: Duration,
}

/// State of a backend according to its heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DetectorState {
    /// No heartbeat received yet.
    Waiting,
    /// Heartbeats arrive in time.
    Up,
    /// Overdue or refused, and not confirmed, or a guard prevents the removal.
    Suspect,
    /// Confirmed, or the sender reported stopping.
    Down,
    /// Heartbeats arrive (again); no successful probe yet.
    Recovering,
}

/// A change of state, with the evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetectorTransition {
    /// The state before.
    pub from: DetectorState,
    /// The state now.
    pub to: DetectorState,
    /// The evidence, as text for the log.
    pub reason: String,
    /// How long the state before had lasted.
    pub lasted: Duration,
    /// The backend returns after it was down: use a slow start.
    pub after_down: bool,
}

/// An action that the detector requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetectorRequest {
    /// Make one new connect and report its result with [`HeartbeatDetector::probed`].
    Probe(ConfirmationTry),
    /// The failure is confirmed: call the guards ([`may_remove`]), then
    /// [`HeartbeatDetector::eject`] or [`HeartbeatDetector::hold_in_rotation`].
    Eject {
        /// A refused connect: the path works and the service does not. No guard may
        /// prevent the removal.
        proven: bool,
    },
}

/// Result of one input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "it can request a probe"]
pub struct DetectorStep {
    /// The change of state, if any.
    pub change: Option<DetectorTransition>,
    /// The action to perform, if any.
    pub request: Option<DetectorRequest>,
}

// === impl DetectorState ===

impl DetectorState {
    /// Returns the name that `status` and the log show.
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
