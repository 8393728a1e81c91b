//! Verifies heartbeats: accepts a datagram or rejects it with a reason.
//!
//! The receiving thread calls the [`Verifier`] for every datagram. The verifier is pure:
//! the caller passes the time, the wall clock and a seed. The same datagrams at the same
//! times give the same results.
//!
//! # Order of the checks
//!
//! 1. *Form*: length, magic, version, bounds of every field, and whether the key id is
//!    known. Takes tens of nanoseconds.
//! 2. *Rate*, before a hash is computed (see [`limit`]). Sources with an accepted heartbeat
//!    within [`limit::KNOWN_FOR`] have a high limit, all others a low limit. Above a
//!    limit, datagrams are rejected at random, so a flood cannot displace all heartbeats
//!    of a sender by its timing.
//! 3. *Signature*, in constant time. Takes less than a microsecond.
//! 4. *Authority*: the key is valid for the pool and the address.
//! 5. *Freshness*: see below.
//!
//! The source address is used only for the rate. UDP source addresses can be forged, and
//! a backend can send from another address than it serves on.
//!
//! # Freshness
//!
//! A heartbeat must satisfy all three:
//!
//! - The sender's clock differs from the local clock by at most
//!   [`VerifierLimits::skew_max`].
//! - The incarnation is not older than the newest accepted one of this pool and name. An
//!   older incarnation is accepted again after the newer one has been silent for twice
//!   the skew, because all older recordings are stale then.
//! - Within an incarnation, the sequence is newer than the newest accepted one.
//!
//! The clock is checked even if the sequence is newer. Otherwise an attacker could delay
//! heartbeats and replay them one by one, so that a failed backend appears alive. After a
//! restart, no sequence is known, and only the clock distinguishes a recording from the
//! sender.
//!
//! A jump of the local clock must not remove all backends. Each heartbeat that agrees with
//! the local wall clock sets an anchor: the time on the wall clock and on the monotonic
//! clock. A later heartbeat of the same incarnation that disagrees with the wall clock is
//! accepted if it agrees with the anchor plus the elapsed monotonic time. A new
//! incarnation is rejected while the local clock is wrong, as `stale` or `future`.
//! [`tidegate_core::suspicion::rejections`] reports the sender in the log and in status.
//!
//! A heartbeat that is older than the newest one is rejected: as `reordered` if it is
//! among the last [`WINDOW`] sequences and was not received before, else as `replayed`.
//!
//! # Bounds
//!
//! | what | bound | at the bound |
//! |---|---|---|
//! | senders | [`SENDERS_MAX`] | New senders are rejected (`senders-full`) until another one has been silent for twice the skew. Removing a sender earlier would allow replays. |
//! | known sources | [`limit::KNOWN_MAX`] | Further sources have the limit of unknown sources. |
//! | unknown sources | [`limit::SLOTS`] slots | Sources share a slot. |

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

/// Default of [`VerifierLimits::skew_max`]. Clocks with NTP differ by milliseconds. A
/// clock without NTP can differ by 30 s after weeks.
pub const SKEW_MAX: Duration = Duration::from_secs(30);

/// Limits of the verifier.
#[derive(Debug, Clone)]
pub struct VerifierLimits {
    /// Largest difference between the sender's clock and the local clock, in either
    /// direction.
    pub skew_max: Duration,
}

/// Why a datagram was rejected. Each reason has a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RejectReason {
    /// Not a heartbeat, or a field is out of bounds.
    Malformed,
    /// A heartbeat of another version of the format.
    UnknownVersion,
    /// No key has this id.
    UnknownKey,
    /// Rate limit of unknown sources.
    Limited,
    /// Rate limit of known sources.
    Overload,
    /// Not signed with the secret of the key.
    Signature,
    /// The key is not valid for this pool.
    WrongPool,
    /// The key is not valid for this address.
    WrongAddress,
    /// Sent too long ago, or the sender's clock is too far behind.
    Stale,
    /// The sender's clock is too far ahead.
    Future,
    /// A newer incarnation of the sender was accepted.
    OldIncarnation,
    /// Received before, or too old to know.
    Replayed,
    /// Older than the newest accepted heartbeat.
    Reordered,
    /// The largest number of senders is reached.
    SendersFull,
}

/// A rejected datagram and what is known about its sender.
#[derive(Debug, Clone, Copy)]
pub struct RejectedDatagram<'d> {
    /// The reason.
    pub reason: RejectReason,
    /// The sender that the datagram names; `None` if it could not be parsed.
    pub claim: Option<Claim<'d>>,
    /// The sender's clock minus the local clock, in milliseconds; only if signed.
    pub skew: Option<i64>,
}

/// The sender that a datagram names. Authentic only if [`RejectReason::is_signed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim<'d> {
    /// Pool name.
    pub pool: &'d str,
    /// Backend name.
    pub name: &'d str,
    /// Key id.
    pub key_id: u32,
}

/// Verifies datagrams.
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
    /// Creates a verifier without known senders. `seed` is the seed of the random
    /// decisions above a rate limit. Senders must not be able to guess it.
    pub fn new(keys: KeyRing, limits: VerifierLimits, seed: u64) -> Verifier {
        Verifier { keys, limits, limiter: Limiter::new(seed), senders: SenderTable::default() }
    }

    /// Verifies a datagram received from `from` at `now`, which is `wall` on the local wall
    /// clock. `now` must not decrease between calls.
    ///
    /// # Errors
    /// The reason of the rejection. A rejected datagram changes only the rates and, for
    /// `reordered`, the received sequences.
    pub fn admit(
        &mut self,
        datagram: &[u8],
        from: SocketAddr,
        now: Instant,
        wall: SystemTime,
    ) -> Result<Heartbeat, RejectReason> {
        self.verify(datagram, from, now, wall).map_err(|rejected| rejected.reason)
    }

    /// Verifies like [`Verifier::admit`]. The error also describes the sender.
    ///
    /// # Errors
    /// Those of [`Verifier::admit`].
    pub fn verify<'d>(
        &mut self,
        datagram: &'d [u8],
        from: SocketAddr,
        now: Instant,
        wall: SystemTime,
    ) -> Result<Heartbeat, RejectedDatagram<'d>> {
        let malformed =
            |error: ParseError| RejectedDatagram { reason: error.into(), claim: None, skew: None };
        let parsed = ParsedHeartbeat::read(datagram).map_err(malformed)?;
        let wall = wall.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as u64;
        let moment = ReceiveTime { now, wall, skew_max: self.limits.skew_max };
        let source = from.ip().to_canonical();
        self.check(&parsed, source, moment).map_err(|reason| RejectedDatagram {
            reason,
            claim: Some(Claim { pool: parsed.pool, name: parsed.name, key_id: parsed.key_id }),
            skew: reason.is_signed().then(|| parsed.sent.wrapping_sub(wall) as i64),
        })
    }

    fn check(
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
        let (pool, name) = self.senders.accept(parsed, moment)?;
        self.limiter.set_known(source, moment.now);
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

    /// Replaces the keys. Known senders and sources stay.
    pub fn set_keys(&mut self, keys: KeyRing) {
        self.keys = keys;
    }

    /// Returns the number of known senders.
    pub fn senders(&self) -> usize {
        self.senders.len()
    }
}

// === impl RejectReason ===

impl RejectReason {
    /// All reasons, in the order of their numbers.
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

    /// Returns the metric label.
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

    /// Returns whether the datagram was signed with a valid key, so that its sender is
    /// authentic.
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

    /// Returns whether rejected senders are listed in status and log. Not for reordering
    /// by the network and not for floods, which are only counted.
    pub fn is_listed(self) -> bool {
        !matches!(self, RejectReason::Reordered | RejectReason::Limited | RejectReason::Overload)
    }

    /// Returns what an operator can do.
    pub fn help(self) -> &'static str {
        match self {
            RejectReason::Malformed => "not a heartbeat; check which program sends to this port",
            RejectReason::UnknownVersion => "run the same version of Tidegate on both sides",
            RejectReason::UnknownKey => {
                "no [[heartbeat.key]] has this id; correct the id on one side"
            }
            RejectReason::Limited | RejectReason::Overload => "check which hosts flood this port",
            RejectReason::Signature => "compare the key files of both sides",
            RejectReason::WrongPool => "add the pool to the pools of its [[heartbeat.key]]",
            RejectReason::WrongAddress => {
                "add the address to the addresses of its [[heartbeat.key]]"
            }
            RejectReason::Stale | RejectReason::Future => {
                "synchronise the clocks of both hosts; they can differ by at most 30s"
            }
            RejectReason::OldIncarnation => {
                "another sender with this name started later, or the clock of this sender was \
                 set back; run one sender per backend, or restart the sender"
            }
            RejectReason::Replayed => {
                "the network repeats datagrams, or two senders share one identity"
            }
            RejectReason::Reordered => "the network reorders datagrams",
            RejectReason::SendersFull => {
                "the limit of 10,000 senders is reached; start fewer senders under new names"
            }
        }
    }

    /// Returns whether the rejection is a local drop: the datagram may have been a valid
    /// heartbeat of a known sender. `limited` is not a local drop. Otherwise a flood from
    /// unknown sources would suspend the detection of missing heartbeats.
    pub fn is_local_drop(self) -> bool {
        self == RejectReason::Overload
    }
}

impl From<ParseError> for RejectReason {
    fn from(error: ParseError) -> RejectReason {
        match error {
            ParseError::Version => RejectReason::UnknownVersion,
            _ => RejectReason::Malformed,
        }
    }
}
