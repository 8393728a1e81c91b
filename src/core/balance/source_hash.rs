//! `source-hash`: the same client gets the same backend, on every machine.
//!
//! Prepared at table build, used by every worker. The choice depends only on the
//! client's IP address and on the keys and weights of the candidates. It does not
//! depend on their order in the file, on load, time or chance.
//!
//! # The mapping, for other implementations
//!
//! 1. Sort the candidates by key (the address as text), bytewise.
//! 2. M is the pool's `hash_slots`, a prime from the configuration. It does not depend
//!    on the number of backends: a different M moves nearly every client.
//! 3. Compute for each candidate the XXH3-128 of the key with seed [`SEED`]: offset =
//!    low 64 bits mod M, skip = high 64 bits mod (M - 1) + 1.
//! 4. Fill the table by Maglev with weights (see `maglev::fill`).
//! 5. A client is its 4 or 16 address bytes in network order. An IPv4-mapped IPv6
//!    address is hashed as IPv4. The slot is the XXH3-64 with seed [`SEED`], mod M.
//! 6. If the candidate is at its cap or was tried, alternative n uses seed [`SEED`] +
//!    n, for n from 1 to 16. After that the sorted candidates follow in turn, starting
//!    at the XXH3-64 (seed [`SEED`]) mod their number.
//! 7. While sessions spill over tiers, each tier has a table of its own. The XXH3-64 of the
//!    client with seed [`TIER_SEED`], mod 100, is its place in the shares of the tiers, which
//!    are per cents in the order of the tiers.

use super::Candidate;
use super::maglev::Preference;
use super::recorder::PickRecorder;
use super::slow_start::Excluded;
use crate::balance::maglev;
use crate::decision::Figures;
use std::net::IpAddr;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// "tidegate" in ASCII. A constant, so that all machines compute the same table.
const SEED: u64 = 0x7469_6465_6761_7465;

/// "tidetier" in ASCII. Another seed than [`SEED`], so that the tier of a client tells nothing
/// about its slot.
const TIER_SEED: u64 = 0x7469_6465_7469_6572;

/// Alternatives that are hashed before the candidates are tried in turn.
const ALTERNATIVES_MAX: u64 = 16;

/// The prepared policy.
#[derive(Debug)]
pub(super) struct SourceHash {
    slots: HashSlots,
    /// M: the number of slots.
    size: u32,
    /// The candidates' indices, sorted by key.
    canonical: Box<[u32]>,
}

/// The candidate's index for each slot, in 16 bits if it fits.
#[derive(Debug)]
enum HashSlots {
    Narrow(Box<[u16]>),
    Wide(Box<[u32]>),
}

impl SourceHash {
    /// Prepares the policy for `candidates` (at least one) with `size` slots (a prime).
    pub(super) fn new(candidates: &[Candidate], size: u32) -> SourceHash {
        let mut canonical: Box<[u32]> = (0..candidates.len() as u32).collect();
        canonical.sort_by_key(|&index| &candidates[index as usize].key);
        let in_order = || canonical.iter().map(|&index| &candidates[index as usize]);
        let preferences: Vec<Preference> =
            in_order().map(|c| Preference::of(&c.key, size, SEED)).collect();
        let weights: Vec<u32> = in_order().map(|c| c.weight).collect();
        let filled = maglev::fill(size, &preferences, &weights);
        let indices = filled.into_iter().map(|order| canonical[order as usize]);
        let slots = if u16::try_from(candidates.len() - 1).is_ok() {
            HashSlots::Narrow(indices.map(|index| index as u16).collect())
        } else {
            HashSlots::Wide(indices.collect())
        };
        SourceHash { slots, size, canonical }
    }

    /// Picks the client's candidate, or its first usable alternative.
    #[inline]
    pub(super) fn pick(
        &self,
        candidates: &[Candidate],
        client: IpAddr,
        tried: &[usize],
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        for alternative in 0..=ALTERNATIVES_MAX {
            let slot = self.slot(hash(client, alternative));
            let index = self.at(slot);
            if recorder.try_use(candidates, index, tried) {
                recorder.decided(|_| self.figures(slot, alternative));
                return Some(index);
            }
        }
        let excluded = Excluded::tried(tried);
        recorder.scan(candidates, excluded);
        let count = self.canonical.len();
        let start = (hash(client, 0) % count as u64) as usize;
        let index = (0..count)
            .map(|step| self.canonical[(start + step) % count] as usize)
            .find(|&index| recorder.try_use(candidates, index, tried))?;
        recorder.decided(|_| self.figures(self.slot(hash(client, 0)), ALTERNATIVES_MAX + 1));
        Some(index)
    }

    fn figures(&self, slot: usize, alternative: u64) -> Figures<usize> {
        Figures::Slot { slot: slot as u32, slots: self.size, alternative: alternative as u16 }
    }

    /// Returns the share of the slots of each of `count` candidates.
    pub(super) fn shares(&self, count: usize) -> Vec<f64> {
        let mut slots = vec![0_u32; count];
        (0..self.size as usize).for_each(|slot| slots[self.at(slot)] += 1);
        slots.into_iter().map(|own| f64::from(own) / f64::from(self.size)).collect()
    }

    #[inline]
    fn slot(&self, hash: u64) -> usize {
        (hash % u64::from(self.size)) as usize
    }

    #[inline]
    fn at(&self, slot: usize) -> usize {
        match &self.slots {
            HashSlots::Narrow(slots) => slots[slot].into(),
            HashSlots::Wide(slots) => slots[slot] as usize,
        }
    }
}

/// Returns the client's place in the shares of tiers, below 100.
pub(super) fn per_cent(client: IpAddr) -> u64 {
    seeded(client, TIER_SEED) % 100
}

#[inline]
fn hash(client: IpAddr, alternative: u64) -> u64 {
    seeded(client, SEED.wrapping_add(alternative))
}

#[inline]
fn seeded(client: IpAddr, seed: u64) -> u64 {
    match client.to_canonical() {
        IpAddr::V4(v4) => xxh3_64_with_seed(&v4.octets(), seed),
        IpAddr::V6(v6) => xxh3_64_with_seed(&v6.octets(), seed),
    }
}
