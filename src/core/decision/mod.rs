//! Why a session got its backend: the record that each pick leaves.
//!
//! The data plane fills a [`Decision`] at each pick and keeps it in a [`DecisionRing`];
//! `daemon` reads the rings for `GET /v1/explain`. A record holds numbers, not names, and
//! keeps no table alive. Nothing here picks.

pub mod ring;
pub mod rings;
mod words;

use crate::metrics::counters::LocalErrorKind;
use crate::model::{BackendId, ClientAddr, FrontendId, PeerAddr, Policy, PoolId};
use crate::outcome::{Cause, Phase};

/// Backends passed over that a [`Decision`] names; it counts the rest.
pub const SKIPPED_NAMED: usize = 8;

/// One pick of a backend, or the failure to pick one.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// Number of the session; never 0.
    pub session: u64,
    /// Wall time of the pick, in microseconds since 1970.
    pub at_micros: u64,
    /// Serial of the table.
    pub serial: u64,
    /// The client.
    pub client: ClientAddr,
    /// Peer of the socket, if a PROXY header announced the client.
    pub peer: Option<PeerAddr>,
    /// Frontend that accepted it.
    pub frontend: FrontendId,
    /// Position of the route it took, from 1; 0 for the frontend's pool.
    pub route: u8,
    /// Pool that the route leads to; `None` if the route refuses or the client was rejected
    /// before routing.
    pub pool: Option<PoolId>,
    /// The pool's policy.
    pub policy: Policy,
    /// What decided.
    pub why: Why,
    /// The backend; `None` if there was none to pick.
    pub chosen: Option<BackendId>,
    /// Backends that the balancer could pick from.
    pub candidates: u32,
    /// Tier of the chosen backend; 0 if there is none, or if the pool fails open.
    pub tier: u8,
    /// Whether sessions spilled over several tiers.
    pub spilled: bool,
    /// What the policy decided by.
    pub figures: Figures,
    /// Backends of the pool that were passed over. In a ring, a decision with a `peer` names
    /// only five.
    pub skipped: SkippedList,
    /// Which connect attempt the pick was for, from 1.
    pub attempt: u8,
    /// How long the session waited in the pool's queue before the pick, in microseconds.
    pub waited_micros: u32,
    /// What became known later.
    pub outcome: Outcome,
}

/// What decided a pick. If several hold, the first in this order: `Trial`, `Retry`, `Queue`,
/// `FailOpen`, `Backup`, `Only`, then the policy's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Why {
    /// Nothing was picked.
    None,
    /// The next backend in turn (`weighted-round-robin`).
    Turn,
    /// The lowest load, or the lower of two (`least-connections`, `two-choices`,
    /// `peak-ewma`).
    Least,
    /// A weighted random draw (`random`).
    Draw,
    /// The hash of the client's address (`source-hash`).
    Hash,
    /// It was the only backend that could be picked.
    Only,
    /// A connect attempt to another backend had failed.
    Retry,
    /// The session decides the trial of a backend that was ejected.
    Trial,
    /// The session had waited in the pool's queue, for a slot or for a first verdict.
    Queue,
    /// No backend was eligible, and the pool fails open (`when_none_eligible =
    /// "try-all"`).
    FailOpen,
    /// The backend is of a tier above 0: lower tiers have no eligible backend, or sessions
    /// spill.
    Backup,
    /// An entry of a session table (no policy has such tables yet).
    Sticky,
}

/// What the policy compared or drew; `B` names a backend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Figures<B = BackendId> {
    /// Nothing was picked, or nothing was compared.
    None,
    /// Position in the sequence of turns, below `period`.
    Turn {
        /// Position of this pick.
        position: u64,
        /// Picks after which the sequence repeats.
        period: u64,
    },
    /// Loads before the pick: the chosen backend's, and the best other one's, if another
    /// was compared.
    Loads {
        /// Of the chosen backend.
        chosen: Load,
        /// The backend it was compared with.
        other: Option<(B, Load)>,
    },
    /// Slot of the hash table.
    Slot {
        /// Slot, below `slots`.
        slot: u32,
        /// Number of slots.
        slots: u32,
        /// 0: the client's own slot; n: its n-th alternative, because those before could
        /// not be used; above 16: the sorted candidates in turn.
        alternative: u16,
    },
    /// Weight of the chosen backend, and the sum of all candidates' weights.
    Share {
        /// Of the chosen backend.
        weight: u32,
        /// Sum over the candidates.
        total: u64,
    },
}

/// Load of one backend at a pick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Open sessions.
    pub sessions: u32,
    /// Effective weight, in the table's unit.
    pub weight: u32,
    /// Expected time to answer in microseconds; 0 unless `peak-ewma` compared it.
    pub answer_micros: u32,
}

/// Backends that a pick passed over: the first [`SKIPPED_NAMED`] and the number of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkippedList {
    named: [Skipped; SKIPPED_NAMED],
    total: u32,
}

/// One backend passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Skipped {
    /// The backend.
    pub backend: BackendId,
    /// Why.
    pub reason: SkipReason,
    /// At the pick: for how many seconds the reason had held; for
    /// [`SkipReason::Ejected`], how many were left. 0 for reasons of the pick itself.
    pub seconds: u32,
}

/// Why a pick passed over a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SkipReason {
    /// Probes or heartbeats report it down.
    Down,
    /// Ejected after failures.
    Ejected,
    /// An operator drains it.
    DrainedByOperator,
    /// An operator has put it into maintenance.
    Maintenance,
    /// Its heartbeats ask for no new sessions.
    DrainedBySender,
    /// A member source asks for no new sessions.
    DrainedByRegistry,
    /// It waits for its first probe result or heartbeat.
    NoVerdict,
    /// No connect to it has succeeded since it joined, and its pool has no probes.
    Unverified,
    /// It is at its cap.
    AtCap,
    /// Its trial session is not decided yet.
    TrialOpen,
    /// Its slow start gives this pick to others.
    SlowStart,
    /// This session has tried it before.
    Tried,
    /// The question asked to leave it out (`--without`).
    Excluded,
    /// It does not have the role that the pool needs, or its role is unknown.
    OtherRole,
    /// It is a primary, but another one is in force, or none.
    Outranked,
    /// Its agent asks for no new sessions.
    DrainedByAgent,
}

/// What became known after the pick. Fields stay `None` until then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Time from the pick to the established connection, in microseconds.
    pub connect_micros: Option<u32>,
    /// Why the connect attempt failed, and its errno (0: none).
    pub failure: Option<(AttemptFailureKind, i32)>,
    /// Time from the start of the attempt to that failure, in microseconds; for an early
    /// reset, from the established connection. 0 without a failure.
    pub failed_micros: u32,
    /// How the session ended.
    pub end: Option<(Cause, Phase)>,
    /// How long the session lasted, from accept to its end, in milliseconds.
    pub lasted_millis: u32,
}

/// Why a connect attempt failed; its name is the `failure` of the access log's `tries`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptFailureKind {
    /// The backend refused.
    Refused,
    /// No answer within the connect timeout.
    Timeout,
    /// ICMP unreachable and the like.
    Unreachable,
    /// The backend reset the connection before its first byte.
    EarlyReset,
    /// Another errno that the backend or its path caused.
    Other,
    /// A local error.
    Local(LocalErrorKind),
}

// === impl Why ===

impl Why {
    /// All, in the order of their numbers.
    pub const ALL: [Why; 12] = [
        Why::None,
        Why::Turn,
        Why::Least,
        Why::Draw,
        Why::Hash,
        Why::Only,
        Why::Retry,
        Why::Trial,
        Why::Queue,
        Why::FailOpen,
        Why::Backup,
        Why::Sticky,
    ];

    /// Word of the access log and the API.
    pub fn name(self) -> &'static str {
        match self {
            Why::None => "none",
            Why::Turn => "turn",
            Why::Least => "least",
            Why::Draw => "draw",
            Why::Hash => "hash",
            Why::Only => "only",
            Why::Retry => "retry",
            Why::Trial => "trial",
            Why::Queue => "queue",
            Why::FailOpen => "fail-open",
            Why::Backup => "backup",
            Why::Sticky => "sticky",
        }
    }

    /// What decides under `policy` if nothing else does.
    pub fn of_policy(policy: Policy) -> Why {
        match policy {
            Policy::WeightedRoundRobin => Why::Turn,
            Policy::LeastConnections | Policy::TwoChoices | Policy::PeakEwma => Why::Least,
            Policy::Random => Why::Draw,
            Policy::SourceHash => Why::Hash,
        }
    }
}

// === impl Figures ===

impl<B> Figures<B> {
    /// The same figures with backends named by `name`; a backend without a name is left out.
    pub fn named<N>(self, name: impl FnOnce(B) -> Option<N>) -> Figures<N> {
        match self {
            Figures::None => Figures::None,
            Figures::Turn { position, period } => Figures::Turn { position, period },
            Figures::Loads { chosen, other } => {
                let other = other.and_then(|(backend, load)| Some((name(backend)?, load)));
                Figures::Loads { chosen, other }
            }
            Figures::Slot { slot, slots, alternative } => {
                Figures::Slot { slot, slots, alternative }
            }
            Figures::Share { weight, total } => Figures::Share { weight, total },
        }
    }
}

// === impl SkipReason ===

impl SkipReason {
    /// All, in the order of their numbers.
    pub const ALL: [SkipReason; 16] = [
        SkipReason::Down,
        SkipReason::Ejected,
        SkipReason::DrainedByOperator,
        SkipReason::Maintenance,
        SkipReason::DrainedBySender,
        SkipReason::DrainedByRegistry,
        SkipReason::NoVerdict,
        SkipReason::Unverified,
        SkipReason::AtCap,
        SkipReason::TrialOpen,
        SkipReason::SlowStart,
        SkipReason::Tried,
        SkipReason::Excluded,
        SkipReason::OtherRole,
        SkipReason::Outranked,
        SkipReason::DrainedByAgent,
    ];

    /// Word of the API.
    pub fn name(self) -> &'static str {
        match self {
            SkipReason::Down => "down",
            SkipReason::Ejected => "ejected",
            SkipReason::DrainedByOperator => "draining",
            SkipReason::Maintenance => "maintenance",
            SkipReason::DrainedBySender => "draining-by-sender",
            SkipReason::DrainedByRegistry => "draining-by-registry",
            SkipReason::NoVerdict => "no-verdict",
            SkipReason::Unverified => "unverified",
            SkipReason::AtCap => "at-cap",
            SkipReason::TrialOpen => "trial-open",
            SkipReason::SlowStart => "slow-start",
            SkipReason::Tried => "tried",
            SkipReason::Excluded => "excluded",
            SkipReason::OtherRole => "other-role",
            SkipReason::Outranked => "outranked",
            SkipReason::DrainedByAgent => "draining-by-agent",
        }
    }
}

// === impl AttemptFailureKind ===

impl AttemptFailureKind {
    /// All, in the order of their numbers.
    pub const ALL: [AttemptFailureKind; 10] = [
        AttemptFailureKind::Refused,
        AttemptFailureKind::Timeout,
        AttemptFailureKind::Unreachable,
        AttemptFailureKind::EarlyReset,
        AttemptFailureKind::Other,
        AttemptFailureKind::Local(LocalErrorKind::Descriptors),
        AttemptFailureKind::Local(LocalErrorKind::Ports),
        AttemptFailureKind::Local(LocalErrorKind::Memory),
        AttemptFailureKind::Local(LocalErrorKind::Route),
        AttemptFailureKind::Local(LocalErrorKind::Other),
    ];

    /// Word of the access log and the API. A local error of another kind and another error
    /// of the backend have the same word.
    pub fn name(self) -> &'static str {
        match self {
            AttemptFailureKind::Refused => "refused",
            AttemptFailureKind::Timeout => "timeout",
            AttemptFailureKind::Unreachable => "unreachable",
            AttemptFailureKind::EarlyReset => "early-reset",
            AttemptFailureKind::Other => "other",
            AttemptFailureKind::Local(kind) => kind.name(),
        }
    }

    /// Position in [`AttemptFailureKind::ALL`].
    pub fn number(self) -> u8 {
        let place = AttemptFailureKind::ALL.iter().position(|kind| *kind == self);
        place.map_or(0, |place| place as u8)
    }
}

// === impl SkippedList ===

impl SkippedList {
    /// No backend.
    pub const EMPTY: SkippedList = SkippedList {
        named: [Skipped { backend: SkippedList::NONE, reason: SkipReason::Down, seconds: 0 };
            SKIPPED_NAMED],
        total: 0,
    };

    /// Marks a place without a name.
    pub(super) const NONE: BackendId = BackendId(u32::MAX);

    /// Adds a backend; beyond the eighth only the count rises.
    #[inline]
    pub fn push(&mut self, skipped: Skipped) {
        let free = self.named().len();
        if let Some(free) = self.named.get_mut(free) {
            *free = skipped;
        }
        self.total = self.total.saturating_add(1);
    }

    /// Counts backends without naming them.
    pub fn count_more(&mut self, more: u32) {
        self.total = self.total.saturating_add(more);
    }

    /// Those that are named, in the order they were added.
    pub fn named(&self) -> &[Skipped] {
        let free = self.named.iter().position(|one| one.backend == SkippedList::NONE);
        &self.named[..free.unwrap_or(SKIPPED_NAMED)]
    }

    /// How many there were.
    pub fn total(&self) -> u32 {
        self.total
    }
}

impl Default for SkippedList {
    fn default() -> SkippedList {
        SkippedList::EMPTY
    }
}
