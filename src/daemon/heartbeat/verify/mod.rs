//! What is believed, and why the rest is not.
//!
//! `listen` asks the [`Gate`] about every datagram and passes on what it
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
//! The sender's clock must be within [`Limits::skew_max`] of ours, *and* the
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
use senders::{Moment, Senders};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidegate_heartbeat::Heartbeat;
use tidegate_heartbeat::keys::KeyRing;
use tidegate_heartbeat::wire::{Malformed, Parsed};

pub use senders::{SENDERS_MAX, WINDOW};

/// Clocks kept by NTP differ by milliseconds; half a minute forgives one that
/// has been alone for weeks.
pub const SKEW_MAX: Duration = Duration::from_secs(30);

/// How strict the gate is.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest difference of the sender's clock to ours, either way.
    pub skew_max: Duration,
}

/// Why a datagram was refused. Each has a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reject {
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
pub struct Refused<'d> {
    /// Why.
    pub reason: Reject,
    /// Who it says it is, where it could be read.
    pub claim: Option<Claim<'d>>,
    /// The sender's clock less ours, in milliseconds.
    pub skew: Option<i64>,
}

/// Who a datagram says it is; proven only where [`Reject::is_signed`] says so.
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
pub struct Gate {
    keys: KeyRing,
    limits: Limits,
    limiter: Limiter,
    senders: Senders,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Limits { skew_max: SKEW_MAX }
    }
}

// === impl Gate ===

impl Gate {
    /// Knows nobody yet. `seed` drives its draws and must not be guessable
    /// from outside.
    pub fn new(keys: KeyRing, limits: Limits, seed: u64) -> Gate {
        Gate { keys, limits, limiter: Limiter::new(seed), senders: Senders::default() }
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
    ) -> Result<Heartbeat, Reject> {
        self.judge(datagram, from, now, wall).map_err(|refused| refused.reason)
    }

    /// The same, and what can be told of a sender that is not believed.
    ///
    /// # Errors
    /// As [`Gate::admit`].
    pub fn judge<'d>(
        &mut self,
        datagram: &'d [u8],
        from: SocketAddr,
        now: Instant,
        wall: SystemTime,
    ) -> Result<Heartbeat, Refused<'d>> {
        let unread = |wrong: Malformed| Refused { reason: wrong.into(), claim: None, skew: None };
        let parsed = Parsed::read(datagram).map_err(unread)?;
        let wall = wall.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64;
        let moment = Moment { now, wall, skew_max: self.limits.skew_max };
        let source = from.ip().to_canonical();
        self.believe(&parsed, source, moment).map_err(|reason| Refused {
            reason,
            claim: Some(Claim { pool: parsed.pool, name: parsed.name, key_id: parsed.key_id }),
            skew: reason.is_signed().then(|| parsed.sent.wrapping_sub(wall) as i64),
        })
    }

    fn believe(
        &mut self,
        parsed: &Parsed<'_>,
        source: IpAddr,
        moment: Moment,
    ) -> Result<Heartbeat, Reject> {
        let key = self.keys.get(parsed.key_id).ok_or(Reject::UnknownKey)?;
        self.limiter.pass(source, moment.now)?;
        if !parsed.verify(&key.secret) {
            return Err(Reject::Signature);
        }
        if !key.covers_pool(parsed.pool) {
            return Err(Reject::WrongPool);
        }
        if !key.covers_address(parsed.address.ip()) {
            return Err(Reject::WrongAddress);
        }
        let (pool, name) = self.senders.judge(parsed, moment)?;
        self.limiter.proven(source, moment.now);
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

// === impl Reject ===

impl Reject {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Reject; 14] = [
        Reject::Malformed,
        Reject::UnknownVersion,
        Reject::UnknownKey,
        Reject::Limited,
        Reject::Overload,
        Reject::Signature,
        Reject::WrongPool,
        Reject::WrongAddress,
        Reject::Stale,
        Reject::Future,
        Reject::OldIncarnation,
        Reject::Replayed,
        Reject::Reordered,
        Reject::SendersFull,
    ];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            Reject::Malformed => "malformed",
            Reject::UnknownVersion => "unknown-version",
            Reject::UnknownKey => "unknown-key",
            Reject::Limited => "limited",
            Reject::Overload => "overload",
            Reject::Signature => "signature",
            Reject::WrongPool => "wrong-pool",
            Reject::WrongAddress => "wrong-address",
            Reject::Stale => "stale",
            Reject::Future => "future",
            Reject::OldIncarnation => "old-incarnation",
            Reject::Replayed => "replayed",
            Reject::Reordered => "reordered",
            Reject::SendersFull => "senders-full",
        }
    }

    /// Whether a key in force had signed the datagram: its sender is proven.
    pub fn is_signed(self) -> bool {
        match self {
            Reject::Malformed
            | Reject::UnknownVersion
            | Reject::UnknownKey
            | Reject::Limited
            | Reject::Overload
            | Reject::Signature => false,
            Reject::WrongPool
            | Reject::WrongAddress
            | Reject::Stale
            | Reject::Future
            | Reject::OldIncarnation
            | Reject::Replayed
            | Reject::Reordered
            | Reject::SendersFull => true,
        }
    }

    /// Whether senders with that reason are listed: not where the network
    /// reorders datagrams, and not those in a flood, which are counted.
    pub fn is_listed(self) -> bool {
        !matches!(self, Reject::Reordered | Reject::Limited | Reject::Overload)
    }

    /// What an operator can do about it.
    pub fn help(self) -> &'static str {
        match self {
            Reject::Malformed => "this is no heartbeat; find out what sends to this port",
            Reject::UnknownVersion => "run the same version of Tidegate on both sides",
            Reject::UnknownKey => "no [[heartbeat.key]] has this id; correct the id on one side",
            Reject::Limited | Reject::Overload => "find out what floods this port",
            Reject::Signature => "compare the key files of both sides",
            Reject::WrongPool => "add the pool to the pools of its [[heartbeat.key]]",
            Reject::WrongAddress => "add the address to the addresses of its [[heartbeat.key]]",
            Reject::Stale | Reject::Future => {
                "synchronise the clocks of both hosts; at most 30s may lie between them"
            }
            Reject::OldIncarnation => {
                "another sender of this name started later, or this one's clock was set back; \
                 give each backend one sender, or restart it"
            }
            Reject::Replayed => "the network repeats datagrams, or two senders share one identity",
            Reject::Reordered => "the network reorders datagrams",
            Reject::SendersFull => "10,000 senders are known; start fewer under new names",
        }
    }

    /// Whether the datagram may have been the heartbeat of a known sender that
    /// we were too busy for: a loss of ours, not to be blamed on a backend.
    /// `limited` ones are not: a flood from strangers would else excuse every
    /// backend's silence.
    pub fn is_our_loss(self) -> bool {
        self == Reject::Overload
    }
}

impl From<Malformed> for Reject {
    fn from(wrong: Malformed) -> Reject {
        match wrong {
            Malformed::Version => Reject::UnknownVersion,
            _ => Reject::Malformed,
        }
    }
}
