//! What has been believed of each sender: its incarnation, the sequences seen,
//! and whether its clock agrees with ours.
//!
//! Used by [`super::Verifier`] for datagrams whose signature stands. It forgets a
//! sender only when nothing recorded of it could be fresh any more.

use super::RejectReason;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::wire::ParsedHeartbeat;

/// Senders remembered at once, over all pools: ten times the backends the
/// largest installations run behind one balancer.
pub const SENDERS_MAX: usize = 10_000;

/// Sequences behind the newest of which it is known whether they were seen.
pub const WINDOW: u64 = 64;

/// Looking for senders to forget costs a walk over all.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// All senders, by pool and name.
#[derive(Debug, Default)]
pub(super) struct SenderTable {
    pools: HashMap<Arc<str>, HashMap<Arc<str>, SenderRecord>>,
    count: usize,
    swept: Option<Instant>,
}

/// One sender.
#[derive(Debug)]
struct SenderRecord {
    incarnation: u64,
    /// Newest sequence believed.
    newest: u64,
    /// Bit i: sequence `newest - i` was seen.
    seen: u64,
    /// When the newest was believed.
    at: Instant,
    anchor: ClockAnchor,
}

/// One moment by our two clocks, at which the sender's agreed with them.
#[derive(Debug, Clone, Copy)]
struct ClockAnchor {
    wall: u64,
    at: Instant,
}

/// When a datagram is judged.
#[derive(Clone, Copy)]
pub(super) struct ReceiveTime {
    /// By the monotonic clock.
    pub(super) now: Instant,
    /// By our wall clock, ms since 1970.
    pub(super) wall: u64,
    /// Largest difference of the sender's clock.
    pub(super) skew_max: Duration,
}

// === impl SenderTable ===

impl SenderTable {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Believes a proven datagram that brings news, and gives the names back in
    /// their shared form.
    pub(super) fn judge(
        &mut self,
        parsed: &ParsedHeartbeat<'_>,
        moment: ReceiveTime,
    ) -> Result<(Arc<str>, Arc<str>), RejectReason> {
        let by_wall = moment.skew(parsed.sent, moment.wall);
        let pool = self.pools.get_key_value(parsed.pool).map(|(pool, _)| Arc::clone(pool));
        let known = self.pools.get_mut(parsed.pool).and_then(|senders| {
            let name = senders.get_key_value(parsed.name).map(|(name, _)| Arc::clone(name))?;
            Some((name, senders.get_mut(parsed.name)?))
        });
        match (pool, known) {
            (Some(pool), Some((name, sender))) => {
                sender.judge(parsed, moment, by_wall)?;
                Ok((pool, name))
            }
            (pool, _) => {
                by_wall?;
                if self.count >= SENDERS_MAX {
                    self.sweep(moment);
                }
                if self.count >= SENDERS_MAX {
                    return Err(RejectReason::SendersFull);
                }
                let pool = pool.unwrap_or_else(|| parsed.pool.into());
                let name: Arc<str> = parsed.name.into();
                let senders = self.pools.entry(Arc::clone(&pool)).or_default();
                senders.insert(Arc::clone(&name), SenderRecord::new(parsed, moment));
                self.count += 1;
                Ok((pool, name))
            }
        }
    }

    fn sweep(&mut self, moment: ReceiveTime) {
        if self.swept.is_some_and(|at| moment.now.saturating_duration_since(at) < SWEEP_EVERY) {
            return;
        }
        self.swept = Some(moment.now);
        for senders in self.pools.values_mut() {
            senders.retain(|_, sender| !sender.is_forgettable(moment));
        }
        self.pools.retain(|_, senders| !senders.is_empty());
        self.count = self.pools.values().map(HashMap::len).sum();
    }
}

// === impl SenderRecord ===

impl SenderRecord {
    fn new(parsed: &ParsedHeartbeat<'_>, moment: ReceiveTime) -> SenderRecord {
        SenderRecord {
            incarnation: parsed.incarnation,
            newest: parsed.sequence,
            seen: 1,
            at: moment.now,
            anchor: moment.anchor(),
        }
    }

    fn judge(
        &mut self,
        parsed: &ParsedHeartbeat<'_>,
        moment: ReceiveTime,
        by_wall: Result<(), RejectReason>,
    ) -> Result<(), RejectReason> {
        let gone = self.is_forgettable(moment);
        if parsed.incarnation < self.incarnation && !gone {
            return Err(RejectReason::OldIncarnation);
        }
        if parsed.incarnation != self.incarnation {
            by_wall?;
            *self = SenderRecord::new(parsed, moment);
            return Ok(());
        }
        if let Err(reason) = by_wall
            && moment.skew(parsed.sent, self.anchor.expected(moment.now)).is_err()
        {
            return Err(reason);
        }
        self.in_order(parsed.sequence)?;
        self.at = moment.now;
        if by_wall.is_ok() {
            self.anchor = moment.anchor();
        }
        Ok(())
    }

    /// Silent so long that all it ever sent is stale: what was believed at `at`
    /// had been dated `at + skew_max` at most. So an older incarnation may speak
    /// again, of a sender whose clock was ahead when it last started.
    fn is_forgettable(&self, moment: ReceiveTime) -> bool {
        moment.now.saturating_duration_since(self.at) > moment.skew_max.saturating_mul(2)
    }

    fn in_order(&mut self, sequence: u64) -> Result<(), RejectReason> {
        if let Some(ahead) = sequence.checked_sub(self.newest).filter(|ahead| *ahead > 0) {
            let shifted = u32::try_from(ahead).ok().and_then(|ahead| self.seen.checked_shl(ahead));
            self.seen = shifted.unwrap_or(0) | 1;
            self.newest = sequence;
            return Ok(());
        }
        let behind = self.newest - sequence;
        if behind >= WINDOW || self.seen >> behind & 1 == 1 {
            return Err(RejectReason::Replayed);
        }
        self.seen |= 1 << behind;
        Err(RejectReason::Reordered)
    }
}

// === impl ClockAnchor ===

impl ClockAnchor {
    /// What our wall clock would show had it not jumped since.
    fn expected(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.at).as_millis();
        self.wall.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }
}

// === impl ReceiveTime ===

impl ReceiveTime {
    fn anchor(&self) -> ClockAnchor {
        ClockAnchor { wall: self.wall, at: self.now }
    }

    /// Whether a time in milliseconds is near enough to `ours`.
    fn skew(&self, sent: u64, ours: u64) -> Result<(), RejectReason> {
        if u128::from(sent.abs_diff(ours)) <= self.skew_max.as_millis() {
            Ok(())
        } else if sent < ours {
            Err(RejectReason::Stale)
        } else {
            Err(RejectReason::Future)
        }
    }
}
