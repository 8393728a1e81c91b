//! Secrets, and what each may speak for.
//!
//! Built when a configuration is taken, read by `trust` with every datagram and
//! by `sender`. Pure: files are read in `key_file`. A secret is never shown, and
//! its memory is overwritten when it is dropped.

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

/// Longer files are no secret but the wrong file.
pub const SECRET_BYTES_MAX: usize = 1024;

/// What signs and verifies. Holds the two hash states a secret leads to, not
/// the secret itself: every tag then costs two hashings less.
#[derive(Clone)]
pub struct Secret(Hmac<Sha256>);

/// A secret of the wrong length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a heartbeat key must have {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes; this one has {0}"
)]
pub struct InvalidSecretLength(pub usize);

/// One key: a secret and what it may speak for.
#[derive(Debug, Clone)]
pub struct HeartbeatKey {
    /// Its number in datagrams.
    pub id: u32,
    /// What senders sign with.
    pub secret: Secret,
    /// Pools it may speak for.
    pub pools: Vec<Arc<str>>,
    /// Ranges the announced addresses must lie in.
    pub addresses: Vec<IpNet>,
}

/// The keys in force, by number. Several may cover one pool: that is how a key
/// is replaced while senders still use the old one.
#[derive(Debug, Clone, Default)]
pub struct KeyRing(HashMap<u32, HeartbeatKey>);

/// Two keys with one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("two heartbeat keys have the id {0}")]
pub struct RepeatedId(pub u32);

// === impl Secret ===

impl Secret {
    /// From its bytes, which the caller had better overwrite (`zeroize`).
    ///
    /// # Errors
    /// Too few or too many bytes.
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

    /// In constant time.
    pub(super) fn verify(&self, message: &[u8], tag: &[u8]) -> bool {
        // A shorter tag would be easier to guess.
        tag.len() == TAG_BYTES
            && self.0.clone().chain_update(message).verify_truncated_left(tag).is_ok()
    }
}

/// Whether both sign alike, told in constant time: a file that holds another
/// secret is another configuration.
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
    /// Whether it may speak for that pool.
    pub fn covers_pool(&self, pool: &str) -> bool {
        self.pools.iter().any(|own| **own == *pool)
    }

    /// Whether it may announce that address. IPv4 mapped into IPv6 is IPv4.
    pub fn covers_address(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.addresses.iter().any(|range| range.contains(&address))
    }
}

// === impl KeyRing ===

impl KeyRing {
    /// The keys given.
    ///
    /// # Errors
    /// A number that stands twice.
    pub fn new(keys: impl IntoIterator<Item = HeartbeatKey>) -> Result<KeyRing, RepeatedId> {
        let mut ring = HashMap::new();
        for key in keys {
            if let Some(earlier) = ring.insert(key.id, key) {
                return Err(RepeatedId(earlier.id));
            }
        }
        Ok(KeyRing(ring))
    }

    /// The key of that number.
    pub fn get(&self, id: u32) -> Option<&HeartbeatKey> {
        self.0.get(&id)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing can be believed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
