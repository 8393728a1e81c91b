//! Helpers for tests: a secret, a key, and a sender with a settable clock and numbers.
//!
//! Used by tests of this and other crates. Never part of a release build.

#![allow(missing_docs, clippy::unwrap_used, clippy::new_without_default, reason = "only for tests")]

use super::SenderState;
use super::keys::{HeartbeatKey, KeyRing, Secret};
use super::wire::{EncodedHeartbeat, HeartbeatFields, SenderIdentity, encode};
use std::time::Duration;

/// Wall-clock time at the start of tests, in ms since 1970.
pub const START: u64 = 1_800_000_000_000;

/// Returns a secret of 32 equal bytes.
pub fn secret(byte: u8) -> Secret {
    Secret::new(&[byte; 32]).unwrap()
}

/// Returns key 7, valid for the pool `web`, 10.0.0.0/8 and fd00::/8.
pub fn key() -> HeartbeatKey {
    HeartbeatKey {
        id: 7,
        secret: secret(1),
        pools: vec!["web".into()],
        addresses: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
    }
}

pub fn ring(keys: impl IntoIterator<Item = HeartbeatKey>) -> KeyRing {
    KeyRing::new(keys).unwrap()
}

/// A sender that sends the values of its fields.
#[derive(Clone)]
pub struct TestSender {
    pub identity: SenderIdentity,
    pub key_id: u32,
    pub secret: Secret,
    pub incarnation: u64,
    pub sequence: u64,
    pub sent: u64,
}

impl TestSender {
    /// Makes a sender of backend `a` in pool `web`, started at [`START`].
    pub fn new() -> TestSender {
        TestSender::named("web", "a", "10.0.0.1:80")
    }

    pub fn named(pool: &str, name: &str, address: &str) -> TestSender {
        TestSender {
            identity: SenderIdentity::new(pool, name, address.parse().unwrap()).unwrap(),
            key_id: 7,
            secret: secret(1),
            incarnation: START,
            sequence: 1,
            sent: START,
        }
    }

    pub fn draft(&self) -> HeartbeatFields<'_> {
        HeartbeatFields {
            identity: &self.identity,
            key_id: self.key_id,
            incarnation: self.incarnation,
            sequence: self.sequence,
            sent: self.sent,
            interval: Duration::from_millis(100),
            state: SenderState::Ready,
            weight: 3,
            in_flight: 17,
            load: 250,
        }
    }

    /// Returns the next datagram and increases the sequence number.
    pub fn send(&mut self) -> EncodedHeartbeat {
        let datagram = encode(&self.draft(), &self.secret);
        self.sequence += 1;
        datagram
    }
}
