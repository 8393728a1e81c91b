//! What is believed, and why the rest is not.

use super::Heartbeat;
use super::keys::KeyRing;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

/// How much is believed of whom.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Difference of clocks a datagram may show, either way: 30 s by default.
    pub skew_max: Duration,
}

/// Why a datagram was refused; a closed set, each with a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Reject {
    Malformed,
    UnknownVersion,
    UnknownKey,
    Limited,
    Shed,
    Signature,
    PoolNotAllowed,
    AddressNotAllowed,
    Stale,
    Future,
    OldIncarnation,
    Replayed,
    Reordered,
    SendersFull,
}

impl Reject {
    /// Metric label.
    pub fn name(self) -> &'static str {
        unimplemented!()
    }
}

/// Judges datagrams.
#[derive(Debug)]
pub struct Gate;

impl Gate {
    /// `seed` drives its random draws.
    pub fn new(_keys: KeyRing, _limits: Limits, _seed: u64) -> Gate {
        unimplemented!()
    }

    /// Judges one datagram.
    pub fn admit(
        &mut self,
        _datagram: &[u8],
        _from: SocketAddr,
        _now: Instant,
        _wall: SystemTime,
    ) -> Result<Heartbeat, Reject> {
        unimplemented!()
    }

    /// Takes other keys; senders stay known.
    pub fn set_keys(&mut self, _keys: KeyRing) {}
}
