//! `source-hash`: the same client goes to the same backend, on every machine.
//!
//! Prepared at table build, picked from by every worker. The choice depends on
//! the client's IP address and the candidates' keys and weights alone, never on
//! order in the file, load, time or chance.
//!
//! # The mapping, for other implementations
//!
//! 1. Sort the candidates by key (the address as text), bytewise.
//! 2. M = 65,537 for a pool of up to 650 configured backends, else 655,373.
//! 3. For each, XXH3-128 of the key with seed [`SEED`]: offset = low 64 bits
//!    mod M, skip = high 64 bits mod (M - 1) + 1.
//! 4. Fill by Maglev with weights (see `maglev::fill`).
//! 5. A client is its 4 or 16 address bytes in network order, an IPv4-mapped
//!    IPv6 address counting as IPv4; its slot is XXH3-64 with seed [`SEED`] mod M.
//! 6. The n-th alternative, where the choice is at its cap or was tried, is the
//!    same with seed [`SEED`] + n, for n from 1 to 16; after that the sorted
//!    candidates in turn, from the one at XXH3-64 (seed [`SEED`]) mod their number.

use super::Candidate;
use super::maglev::{self, Preference};
use std::net::IpAddr;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// "tidegate" in ASCII. Fixed, so that machines agree without being told.
const SEED: u64 = 0x7469_6465_6761_7465;

/// Slots for up to [`SMALL_POOL_MAX`] backends: the paper's size. 128 KiB.
const SLOTS: u32 = 65_537;

/// Backends in a pool beyond which [`SLOTS`] gives each fewer than 100 slots
/// and shares get more than 1 % apart.
const SMALL_POOL_MAX: usize = 650;

/// Slots for larger pools, also prime: 100 each up to 6,500 backends, 65 at
/// 10,000. 2.5 MiB.
const SLOTS_LARGE: u32 = 655_373;

/// Alternatives hashed before the candidates are gone through in turn.
const ALTERNATIVES_MAX: u64 = 16;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct SourceHash {
    slots: Slots,
    /// The candidates' indices, sorted by key.
    canonical: Box<[u32]>,
}

/// The index of each slot's candidate, as narrow as it fits.
#[derive(Debug)]
enum Slots {
    Narrow(Box<[u16]>),
    Wide(Box<[u32]>),
}

/// Slots for a pool with so many backends configured.
///
/// It follows the configuration rather than who is eligible: the size of the
/// table may not change with health, for with it goes nearly every client.
pub(super) fn slots_for(pool_size: usize) -> u32 {
    if pool_size <= SMALL_POOL_MAX { SLOTS } else { SLOTS_LARGE }
}

impl SourceHash {
    /// Over `candidates` (at least one) of a pool with `pool_size` backends.
    pub(super) fn new(candidates: &[Candidate], pool_size: usize) -> SourceHash {
        let size = slots_for(pool_size.max(candidates.len()));
        let mut canonical: Box<[u32]> = (0..candidates.len() as u32).collect();
        canonical.sort_by_key(|&index| &candidates[index as usize].key);
        let in_order = || canonical.iter().map(|&index| &candidates[index as usize]);
        let preferences: Vec<Preference> =
            in_order().map(|c| Preference::of(&c.key, size, SEED)).collect();
        let weights: Vec<u32> = in_order().map(|c| c.weight).collect();
        let filled = maglev::fill(size, &preferences, &weights);
        let indices = filled.into_iter().map(|order| canonical[order as usize]);
        let slots = if size == SLOTS {
            Slots::Narrow(indices.map(|index| index as u16).collect())
        } else {
            Slots::Wide(indices.collect())
        };
        SourceHash { slots, canonical }
    }

    /// The client's candidate, or its first alternative that can be used.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        client: IpAddr,
        tried: &[usize],
    ) -> Option<usize> {
        let enters = |index: usize| !tried.contains(&index) && candidates[index].try_enter();
        for alternative in 0..=ALTERNATIVES_MAX {
            let index = self.at(hash(client, alternative));
            if enters(index) {
                return Some(index);
            }
        }
        let count = self.canonical.len();
        let start = (hash(client, 0) % count as u64) as usize;
        (0..count)
            .map(|step| self.canonical[(start + step) % count] as usize)
            .find(|&index| enters(index))
    }

    #[inline]
    fn at(&self, hash: u64) -> usize {
        match &self.slots {
            Slots::Narrow(slots) => slots[(hash % u64::from(SLOTS)) as usize].into(),
            Slots::Wide(slots) => slots[(hash % u64::from(SLOTS_LARGE)) as usize] as usize,
        }
    }
}

#[inline]
fn hash(client: IpAddr, alternative: u64) -> u64 {
    let seed = SEED.wrapping_add(alternative);
    match client.to_canonical() {
        IpAddr::V4(v4) => xxh3_64_with_seed(&v4.octets(), seed),
        IpAddr::V6(v6) => xxh3_64_with_seed(&v6.octets(), seed),
    }
}
