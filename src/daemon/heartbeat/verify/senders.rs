//! Freshness of heartbeats: incarnation, received sequences and clock of each sender.
//!
//! Used by [`super::Verifier`] for datagrams with a valid signature. A sender is removed
//! only when no recording of its heartbeats can be fresh any more.

use super::RejectReason;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_heartbeat::wire::ParsedHeartbeat;

/// Largest number of known senders, over all pools.
pub const SENDERS_MAX: usize = 10_000;

/// Number of latest sequences that are recorded as received or not.
pub const WINDOW: u64 = 64;

/// Shortest time between two sweeps for expired senders. A sweep visits all senders.
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
    /// Newest accepted sequence.
    newest: u64,
    /// Bit i: sequence `newest - i` was received.
    seen: u64,
    /// When the newest sequence was accepted.
    at: Instant,
    anchor: ClockAnchor,
}

/// A time on both local clocks at which the sender's clock agreed with the wall clock.
#[derive(Debug, Clone, Copy)]
struct ClockAnchor {
    wall: u64,
    at: Instant,
}

/// When a datagram was received.
#[derive(Clone, Copy)]
pub(super) struct ReceiveTime {
    /// On the monotonic clock.
    pub(super) now: Instant,
    /// On the local wall clock, in ms since 1970.
    pub(super) wall: u64,
    /// Largest difference of the sender's clock.
    pub(super) skew_max: Duration,
}

// === impl SenderTable ===

impl SenderTable {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Accepts a signed datagram if it is fresh. Returns shared strings for pool and name.
    pub(super) fn accept(
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
                sender.accept(parsed, moment, by_wall)?;
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
            senders.retain(|_, sender| !sender.is_expired(moment));
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

    fn accept(
        &mut self,
        parsed: &ParsedHeartbeat<'_>,
        moment: ReceiveTime,
        by_wall: Result<(), RejectReason>,
    ) -> Result<(), RejectReason> {
        if parsed.incarnation < self.incarnation && !self.is_expired(moment) {
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
        self.check_sequence(parsed.sequence)?;
        self.at = moment.now;
        if by_wall.is_ok() {
            self.anchor = moment.anchor();
        }
        Ok(())
    }

    /// Returns whether every heartbeat that the sender ever sent is stale. A heartbeat
    /// accepted at `at` has a time of at most `at + skew_max`. After that, an older
    /// incarnation is accepted again: the sender's clock was ahead at its last start.
    fn is_expired(&self, moment: ReceiveTime) -> bool {
        moment.now.saturating_duration_since(self.at) > moment.skew_max.saturating_mul(2)
    }

    fn check_sequence(&mut self, sequence: u64) -> Result<(), RejectReason> {
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
    /// Returns the time of the wall clock at `now`, assuming no jump since the anchor.
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

    /// Checks that a sender's time differs from `local` by at most `skew_max`. Both in ms.
    fn skew(&self, sent: u64, local: u64) -> Result<(), RejectReason> {
        if u128::from(sent.abs_diff(local)) <= self.skew_max.as_millis() {
            Ok(())
        } else if sent < local {
            Err(RejectReason::Stale)
        } else {
            Err(RejectReason::Future)
        }
    }
}
