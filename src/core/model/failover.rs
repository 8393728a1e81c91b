//! Settings of a pool for the time while backends are down or leave.
//!
//! Read by `config`, used by the whole balancer. It decides nothing.

use super::PoolConfig;
use super::text_forms::words;
use std::time::Duration;

/// `when_none_eligible = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenNoneEligible {
    /// Reset the client immediately.
    Refuse,
    /// Balance over all backends that no operator drains.
    TryAll,
    /// Keep the client in the pool's queue until a backend is eligible.
    Wait,
}

/// `on_removal = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRemoval {
    /// Sessions continue until they end.
    Keep,
    /// Sessions still open after this long are reset.
    CloseAfter(Duration),
}

/// `on_down = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDown {
    /// Sessions continue until they end.
    Keep,
    /// Sessions are reset at once.
    Reset,
    /// Sessions still open after this long are reset, unless the backend has recovered.
    CloseAfter(Duration),
}

/// `on_recover = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRecover {
    /// Sessions continue until they end.
    Keep,
    /// Sessions still open after this long are closed, unless their backend serves again.
    CloseAfter(Duration),
}

/// `tiers = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tiers {
    /// The lowest tier with an eligible backend serves alone.
    Strict,
    /// A tier gets the share of new sessions that its eligible backends can carry. The rest
    /// goes to the next tier.
    Spill,
}

/// Highest tier of a backend.
pub const TIER_MAX: u8 = 9;

/// `backups = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backups {
    /// Every eligible backup of the tier that serves.
    All,
    /// The first eligible backup of the tier that serves.
    One,
}

/// Default of `queue_timeout` if clients wait for an eligible backend: longer than most
/// databases need for a failover.
const FAILOVER_TIMEOUT: Duration = Duration::from_secs(30);

words!(WhenNoneEligible: "refuse" => Refuse, "try-all" => TryAll, "wait" => Wait);

words!(Tiers: "strict" => Strict, "spill" => Spill);

words!(Backups: "all" => All, "one" => One);

// === impl OnDown ===

impl OnDown {
    /// Returns how long sessions stay; `None`: until they end.
    pub fn grace(self) -> Option<Duration> {
        match self {
            OnDown::Keep => None,
            OnDown::Reset => Some(Duration::ZERO),
            OnDown::CloseAfter(time) => Some(time),
        }
    }
}

// === impl OnRecover ===

impl OnRecover {
    /// Returns how long sessions stay; `None`: until they end.
    pub fn grace(self) -> Option<Duration> {
        match self {
            OnRecover::Keep => None,
            OnRecover::CloseAfter(time) => Some(time),
        }
    }
}

// === impl PoolConfig ===

impl PoolConfig {
    /// Returns `queue_timeout` if the file does not set it.
    pub fn default_queue_timeout(&self) -> Duration {
        match self.when_none_eligible {
            WhenNoneEligible::Wait => FAILOVER_TIMEOUT,
            WhenNoneEligible::Refuse | WhenNoneEligible::TryAll => self.connect_timeout,
        }
    }
}
