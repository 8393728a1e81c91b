//! Secrets, and the pools and addresses that each is valid for.
//!
//! Made when a configuration is accepted. `daemon::heartbeat` uses them to verify
//! datagrams, `sender` to sign. Pure: `key_file` reads the files. A secret is never shown,
//! and its memory is overwritten on drop.

use hmac::{Hmac, KeyInit, Mac};
use ipnet::IpNet;
use sha2::Sha256;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::wire::TAG_BYTES;

/// Shorter secrets weaken HMAC-SHA-256 (RFC 2104, section 3).
pub const SECRET_BYTES_MIN: usize = 32;

/// A longer file is probably not a key file.
pub const SECRET_BYTES_MAX: usize = 1024;

/// A secret that signs and verifies.
///
/// It holds the two hash states that the secret gives instead of the secret, which saves
/// two hash computations per tag.
#[derive(Clone)]
pub struct Secret(Hmac<Sha256>);

/// A secret of the wrong length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a heartbeat key must have {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes; this one has {0}"
)]
pub struct InvalidSecretLength(pub usize);

/// A key: a secret, and the pools and addresses that it is valid for.
#[derive(Debug, Clone)]
pub struct HeartbeatKey {
    /// ID in datagrams.
    pub id: u32,
    /// The secret that senders sign with.
    pub secret: Secret,
    /// The pools that it is valid for.
    pub pools: Vec<Arc<str>>,
    /// The ranges that announced addresses must be in.
    pub addresses: Vec<IpNet>,
}

/// The keys in force by ID.
///
/// Several keys can be valid for a pool, so that a key can be replaced while senders
/// still use the old one.
#[derive(Debug, Clone, Default)]
pub struct KeyRing(HashMap<u32, HeartbeatKey>);

/// Two keys have the same ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("two heartbeat keys have the id {0}")]
pub struct RepeatedId(pub u32);

// === impl Secret ===

impl Secret {
    /// Makes a secret from its bytes. The caller should overwrite the bytes (`zeroize`).
    ///
    /// # Errors
    /// The length is out of bounds.
    pub fn new(bytes: &[u8]) -> Result<Secret, InvalidSecretLength> {
        if !(SECRET_BYTES_MIN..=SECRET_BYTES_MAX).contains(&bytes.len()) {
            return Err(InvalidSecretLength(bytes.len()));
        }
        let mac = Hmac::new_from_slice(bytes).map_err(|_| InvalidSecretLength(bytes.len()))?;
        Ok(Secret(mac))
    }

    pub(super) fn tag(&self, message: &[u8]) -> [u8; TAG_BYTES] {
        let whole = self.0.clone().chain_update(message).finalize().into_bytes();
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&whole[..TAG_BYTES]);
        tag
    }

    /// Verifies a tag in constant time.
    pub(super) fn verify(&self, message: &[u8], tag: &[u8]) -> bool {
        // A shorter tag would be easier to guess.
        tag.len() == TAG_BYTES
            && self.0.clone().chain_update(message).verify_truncated_left(tag).is_ok()
    }
}

/// Compares secrets in constant time by their tags. A configuration with another secret is
/// another configuration.
impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        const PROOF: &[u8] = b"are you the same secret?";
        self.verify(PROOF, &other.tag(PROOF))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

// === impl HeartbeatKey ===

impl HeartbeatKey {
    /// Returns whether the key is valid for the pool.
    pub fn covers_pool(&self, pool: &str) -> bool {
        self.pools.iter().any(|own| **own == *pool)
    }

    /// Returns whether the key is valid for the address. IPv4-mapped IPv6 counts as IPv4.
    pub fn covers_address(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.addresses.iter().any(|range| range.contains(&address))
    }
}

// === impl KeyRing ===

impl KeyRing {
    /// Makes a ring of these keys.
    ///
    /// # Errors
    /// Two keys have the same ID.
    pub fn new(keys: impl IntoIterator<Item = HeartbeatKey>) -> Result<KeyRing, RepeatedId> {
        let mut ring = HashMap::new();
        for key in keys {
            if let Some(earlier) = ring.insert(key.id, key) {
                return Err(RepeatedId(earlier.id));
            }
        }
        Ok(KeyRing(ring))
    }

    /// Returns the key with this ID.
    pub fn get(&self, id: u32) -> Option<&HeartbeatKey> {
        self.0.get(&id)
    }

    /// Returns the number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there is no key, so that every heartbeat is rejected.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
