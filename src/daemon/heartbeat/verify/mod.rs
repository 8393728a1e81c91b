//! What is believed, and why the rest is not.
//!
//! `listen` asks the [`Verifier`] about every datagram and passes on what it
//! believes. Pure: time, the wall clock and a seed come in; the same datagrams
//! at the same times give the same answers.
//!
//! # In which order
//!
//! 1. *Form*: length, magic, version, every field's bounds; then whether the key
//!    id is known. Tens of nanoseconds.
//! 2. *Rate*, before any hashing: see [`limit`]. Sources that have sent a proven
//!    heartbeat within [`limit::KNOWN_FOR`] go through a wide gate, all others
//!    through a narrow one. At either, what is too much is refused by lot and not
//!    first come first served, so a flood cannot time itself into taking every
//!    place: each real heartbeat keeps its chance.
//! 3. *Signature*, in constant time: below a microsecond.
//! 4. *Authority*: the key may speak for that pool and announce that address.
//! 5. *Freshness*: see below.
//!
//! Where a datagram came from proves nothing and is checked nowhere but in 2:
//! UDP sources can be forged, and a backend may send from another address than
//! it serves at.
//!
//! # Freshness
//!
//! The sender's clock must be within [`VerifierLimits::skew_max`] of ours, *and* the
//! incarnation must be no older than the newest believed of that pool and name,
//! *and* within the incarnation the sequence must be newer than the newest
//! believed. (An older incarnation may speak again once the newer has been
//! silent for twice the skew: all that was recorded before is stale by then.) Refusing for the clock alone, even where the sequence is newer, is
//! deliberate: who can hold datagrams back could otherwise feed them to us one
//! by one and keep a dead backend alive; and after a restart, when no sequence
//! is known, the clock alone tells a recording from the sender.
//!
//! Our own clock may jump, too, and must not take every backend out at once. So
//! whenever a heartbeat agrees with our wall clock, the time is noted by both
//! our clocks. One of the same incarnation that disagrees later is believed all
//! the same where it agrees with what the wall clock would show had it gone on
//! as the monotonic one has. An incarnation that begins while our clock is wrong
//! is refused; `stale` or `future` then count up, and [`tidegate_core::suspicion::rejections`] has the
//! sender named in the log and in status.
//!
//! A heartbeat older than the newest carries no news, so it is refused:
//! `reordered` if it is among the last [`WINDOW`] and new to us, `replayed` if
//! it has been believed before or is older.
//!
//! # Bounds
//!
//! | what | bound | beyond it |
//! |---|---|---|
//! | senders | [`SENDERS_MAX`] | new ones are refused (`senders-full`) until others have been silent for twice the allowed skew; forgetting them sooner would let recordings in |
//! | sources known | [`limit::KNOWN_MAX`] | newer ones stay in the narrow gate |
//! | sources unknown | [`limit::SLOTS`] places of fixed size | sources share a place |

pub mod limit;
mod senders;
#[cfg(test)]
mod tests;

use limit::Limiter;
use senders::{ReceiveTime, SenderTable};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidegate_heartbeat::Heartbeat;
use tidegate_heartbeat::keys::KeyRing;
use tidegate_heartbeat::wire::{ParseError, ParsedHeartbeat};

pub use senders::{SENDERS_MAX, WINDOW};

/// Clocks kept by NTP differ by milliseconds; half a minute forgives one that
/// has been alone for weeks.
pub const SKEW_MAX: Duration = Duration::from_secs(30);

/// How strict the gate is.
#[derive(Debug, Clone)]
pub struct VerifierLimits {
    /// Largest difference of the sender's clock to ours, either way.
    pub skew_max: Duration,
}

/// Why a datagram was refused. Each has a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RejectReason {
    /// Not a heartbeat, or one with a field out of bounds.
    Malformed,
    /// A heartbeat of another version of the format.
    UnknownVersion,
    /// No key of that number.
    UnknownKey,
    /// Too many from sources that have proven nothing.
    Limited,
    /// Too many from sources that are known.
    Overload,
    /// Not signed with that key's secret.
    Signature,
    /// The key may not speak for that pool.
    WrongPool,
    /// The key may not announce that address.
    WrongAddress,
    /// Sent too long ago, or by a clock too far behind.
    Stale,
    /// Sent in the future, by a clock too far ahead.
    Future,
    /// The sender has been restarted since.
    OldIncarnation,
    /// Believed before.
    Replayed,
    /// Overtaken by a newer one.
    Reordered,
    /// No room for one more sender.
    SendersFull,
}

/// A datagram that is not believed, and what can be told of its sender.
#[derive(Debug, Clone, Copy)]
pub struct RejectedDatagram<'d> {
    /// Why.
    pub reason: RejectReason,
    /// Who it says it is, where it could be read.
    pub claim: Option<Claim<'d>>,
    /// The sender's clock less ours, in milliseconds.
    pub skew: Option<i64>,
}

/// Who a datagram says it is; proven only where [`RejectReason::is_signed`] says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim<'d> {
    /// Pool it speaks for.
    pub pool: &'d str,
    /// Backend name.
    pub name: &'d str,
    /// The key it names.
    pub key_id: u32,
}

/// Judges datagrams.
#[derive(Debug)]
pub struct Verifier {
    keys: KeyRing,
    limits: VerifierLimits,
    limiter: Limiter,
    senders: SenderTable,
}

// === impl VerifierLimits ===

impl Default for VerifierLimits {
    fn default() -> Self {
        VerifierLimits { skew_max: SKEW_MAX }
    }
}

// === impl Verifier ===

impl Verifier {
    /// Knows nobody yet. `seed` drives its draws and must not be guessable
    /// from outside.
    pub fn new(keys: KeyRing, limits: VerifierLimits, seed: u64) -> Verifier {
        Verifier { keys, limits, limiter: Limiter::new(seed), senders: SenderTable::default() }
    }

    /// Judges one datagram that came from `from` at `now`, which was `wall` by
    /// our wall clock. `now` must not go back.
    ///
    /// # Errors
    /// Why it is not believed. A refused datagram changes nothing but what the
    /// rate of datagrams and the `reordered` ones are remembered by.
    pub fn admit(
        &mut self,
        datagram: &[u8],
        from: SocketAddr,
        now: Instant,
        wall: SystemTime,
    ) -> Result<Heartbeat, RejectReason> {
        self.judge(datagram, from, now, wall).map_err(|refused| refused.reason)
    }

    /// The same, and what can be told of a sender that is not believed.
    ///
    /// # Errors
    /// As [`Verifier::admit`].
    pub fn judge<'d>(
        &mut self,
        datagram: &'d [u8],
        from: SocketAddr,
        now: Instant,
        wall: SystemTime,
    ) -> Result<Heartbeat, RejectedDatagram<'d>> {
        let unread =
            |wrong: ParseError| RejectedDatagram { reason: wrong.into(), claim: None, skew: None };
        let parsed = ParsedHeartbeat::read(datagram).map_err(unread)?;
        let wall = wall.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64;
        let moment = ReceiveTime { now, wall, skew_max: self.limits.skew_max };
        let source = from.ip().to_canonical();
        self.believe(&parsed, source, moment).map_err(|reason| RejectedDatagram {
            reason,
            claim: Some(Claim { pool: parsed.pool, name: parsed.name, key_id: parsed.key_id }),
            skew: reason.is_signed().then(|| parsed.sent.wrapping_sub(wall) as i64),
        })
    }

    fn believe(
        &mut self,
        parsed: &ParsedHeartbeat<'_>,
        source: IpAddr,
        moment: ReceiveTime,
    ) -> Result<Heartbeat, RejectReason> {
        let key = self.keys.get(parsed.key_id).ok_or(RejectReason::UnknownKey)?;
        self.limiter.pass(source, moment.now)?;
        if !parsed.verify(&key.secret) {
            return Err(RejectReason::Signature);
        }
        if !key.covers_pool(parsed.pool) {
            return Err(RejectReason::WrongPool);
        }
        if !key.covers_address(parsed.address.ip()) {
            return Err(RejectReason::WrongAddress);
        }
        let (pool, name) = self.senders.judge(parsed, moment)?;
        self.limiter.is_proven(source, moment.now);
        Ok(Heartbeat {
            pool,
            name,
            address: parsed.address,
            incarnation: parsed.incarnation,
            sequence: parsed.sequence,
            interval: parsed.interval,
            state: parsed.state,
            weight: parsed.weight,
            in_flight: parsed.in_flight,
            load: parsed.load,
            key_id: parsed.key_id,
        })
    }

    /// Judges by other keys from now on; what was believed stays known.
    pub fn set_keys(&mut self, keys: KeyRing) {
        self.keys = keys;
    }

    /// Senders remembered.
    pub fn senders(&self) -> usize {
        self.senders.len()
    }
}

// === impl RejectReason ===

impl RejectReason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [RejectReason; 14] = [
        RejectReason::Malformed,
        RejectReason::UnknownVersion,
        RejectReason::UnknownKey,
        RejectReason::Limited,
        RejectReason::Overload,
        RejectReason::Signature,
        RejectReason::WrongPool,
        RejectReason::WrongAddress,
        RejectReason::Stale,
        RejectReason::Future,
        RejectReason::OldIncarnation,
        RejectReason::Replayed,
        RejectReason::Reordered,
        RejectReason::SendersFull,
    ];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            RejectReason::Malformed => "malformed",
            RejectReason::UnknownVersion => "unknown-version",
            RejectReason::UnknownKey => "unknown-key",
            RejectReason::Limited => "limited",
            RejectReason::Overload => "overload",
            RejectReason::Signature => "signature",
            RejectReason::WrongPool => "wrong-pool",
            RejectReason::WrongAddress => "wrong-address",
            RejectReason::Stale => "stale",
            RejectReason::Future => "future",
            RejectReason::OldIncarnation => "old-incarnation",
            RejectReason::Replayed => "replayed",
            RejectReason::Reordered => "reordered",
            RejectReason::SendersFull => "senders-full",
        }
    }

    /// Whether a key in force had signed the datagram: its sender is proven.
    pub fn is_signed(self) -> bool {
        match self {
            RejectReason::Malformed
            | RejectReason::UnknownVersion
            | RejectReason::UnknownKey
            | RejectReason::Limited
            | RejectReason::Overload
            | RejectReason::Signature => false,
            RejectReason::WrongPool
            | RejectReason::WrongAddress
            | RejectReason::Stale
            | RejectReason::Future
            | RejectReason::OldIncarnation
            | RejectReason::Replayed
            | RejectReason::Reordered
            | RejectReason::SendersFull => true,
        }
    }

    /// Whether senders with that reason are listed: not where the network
    /// reorders datagrams, and not those in a flood, which are counted.
    pub fn is_listed(self) -> bool {
        !matches!(self, RejectReason::Reordered | RejectReason::Limited | RejectReason::Overload)
    }

    /// What an operator can do about it.
    pub fn help(self) -> &'static str {
        match self {
            RejectReason::Malformed => "this is no heartbeat; find out what sends to this port",
            RejectReason::UnknownVersion => "run the same version of Tidegate on both sides",
            RejectReason::UnknownKey => {
                "no [[heartbeat.key]] has this id; correct the id on one side"
            }
            RejectReason::Limited | RejectReason::Overload => "find out what floods this port",
            RejectReason::Signature => "compare the key files of both sides",
            RejectReason::WrongPool => "add the pool to the pools of its [[heartbeat.key]]",
            RejectReason::WrongAddress => {
                "add the address to the addresses of its [[heartbeat.key]]"
            }
            RejectReason::Stale | RejectReason::Future => {
                "synchronise the clocks of both hosts; at most 30s may lie between them"
            }
            RejectReason::OldIncarnation => {
                "another sender of this name started later, or this one's clock was set back; \
                 give each backend one sender, or restart it"
            }
            RejectReason::Replayed => {
                "the network repeats datagrams, or two senders share one identity"
            }
            RejectReason::Reordered => "the network reorders datagrams",
            RejectReason::SendersFull => "10,000 senders are known; start fewer under new names",
        }
    }

    /// Whether the datagram may have been the heartbeat of a known sender that
    /// we were too busy for: a loss of ours, not to be blamed on a backend.
    /// `limited` ones are not: a flood from strangers would else excuse every
    /// backend's silence.
    pub fn is_local_drop(self) -> bool {
        self == RejectReason::Overload
    }
}

impl From<ParseError> for RejectReason {
    fn from(wrong: ParseError) -> RejectReason {
        match wrong {
            ParseError::Version => RejectReason::UnknownVersion,
            _ => RejectReason::Malformed,
        }
    }
}
