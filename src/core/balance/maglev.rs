//! The Maglev lookup table: maps each hash slot to a candidate.
//!
//! Called at table build by `source_hash`. The same names and weights give the same
//! table on every machine. Load and health have no influence.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Preference list of a candidate: all slots, starting at `offset`, `skip` apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Preference {
    /// Less than the table's size.
    pub(super) offset: u32,
    /// From 1 to the table's size minus 1. The size is prime, so the list contains
    /// every slot.
    pub(super) skip: u32,
}

impl Preference {
    /// Computes the list of the candidate `name` in a table of `size` slots. The low
    /// half of the XXH3-128 of the name gives the offset, the high half gives the skip.
    pub(super) fn of(name: &str, size: u32, seed: u64) -> Preference {
        let hash = xxh3_128_with_seed(name.as_bytes(), seed);
        let (low, high) = (hash as u64, (hash >> 64) as u64);
        Preference {
            offset: (low % u64::from(size)) as u32,
            skip: (high % u64::from(size - 1)) as u32 + 1,
        }
    }
}

/// Fills a table of `size` slots (prime). The algorithm is section 3.4 of Eisenbud et
/// al., "Maglev: A fast and reliable software network load balancer" (NSDI 2016), with
/// the weights of Katran's second version.
///
/// In each round every candidate, in the given order, adds its weight to its credit. A
/// candidate whose credit reaches the largest weight takes the next free slot of its
/// list and pays the largest weight. The k-th slot of a candidate is therefore taken in
/// round ceil(k x largest / weight). A queue ordered by (round, order) gives the same
/// result without visiting candidates that take nothing. A candidate with a share below
/// one slot can get none.
///
/// Returns positions in `preferences`. At least one candidate; each weight at least 1.
pub(super) fn fill(size: u32, preferences: &[Preference], weights: &[u32]) -> Vec<u32> {
    let largest = u64::from(weights.iter().copied().max().unwrap_or(1));
    let mut slots = vec![FREE; size as usize];
    let mut used = UsedSlots::new(size);
    let mut next: Vec<u32> = preferences.iter().map(|p| p.offset).collect();
    let mut taken: Vec<u64> = vec![0; preferences.len()];
    let due = |order: u32, nth: u64| (nth * largest).div_ceil(u64::from(weights[order as usize]));
    let mut queue: BinaryHeap<Reverse<(u64, u32)>> =
        (0..preferences.len() as u32).map(|order| Reverse((due(order, 1), order))).collect();
    for _ in 0..size {
        let Some(mut first) = queue.peek_mut() else { break };
        let order = first.0.1;
        let i = order as usize;
        while used.has(next[i]) {
            next[i] = following(next[i], preferences[i].skip, size);
        }
        used.add(next[i]);
        slots[next[i] as usize] = order;
        taken[i] += 1;
        first.0.0 = due(order, taken[i] + 1);
    }
    slots
}

/// Marks a free slot; no candidate has this position.
const FREE: u32 = u32::MAX;

/// The slots that are taken. Each slot is looked up about a dozen times in random
/// order. With one bit per slot the set fits into the CPU caches, which the table does
/// not.
struct UsedSlots(Vec<u64>);

impl UsedSlots {
    fn new(size: u32) -> UsedSlots {
        UsedSlots(vec![0; size.div_ceil(64) as usize])
    }

    #[inline]
    fn has(&self, slot: u32) -> bool {
        self.0[(slot / 64) as usize] >> (slot % 64) & 1 == 1
    }

    #[inline]
    fn add(&mut self, slot: u32) {
        self.0[(slot / 64) as usize] |= 1 << (slot % 64);
    }
}

#[inline]
fn following(slot: u32, skip: u32, size: u32) -> u32 {
    let sum = slot + skip;
    if sum >= size { sum - size } else { sum }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn preferences(list: &[(u32, u32)]) -> Vec<Preference> {
        list.iter().map(|&(offset, skip)| Preference { offset, skip }).collect()
    }

    /// Katran's rule as published, round by round.
    fn by_the_rule(size: u32, preferences: &[Preference], weights: &[u32]) -> Vec<u32> {
        let largest = *weights.iter().max().unwrap();
        let mut slots = vec![FREE; size as usize];
        let mut credit = vec![0u64; weights.len()];
        let mut next: Vec<u32> = preferences.iter().map(|p| p.offset).collect();
        let mut free = size;
        loop {
            for i in 0..weights.len() {
                credit[i] += u64::from(weights[i]);
                if credit[i] < u64::from(largest) {
                    continue;
                }
                credit[i] -= u64::from(largest);
                while slots[next[i] as usize] != FREE {
                    next[i] = (next[i] + preferences[i].skip) % size;
                }
                slots[next[i] as usize] = i as u32;
                free -= 1;
                if free == 0 {
                    return slots;
                }
            }
        }
    }

    #[test]
    fn table_matches_the_example_of_the_paper() {
        let three = preferences(&[(3, 4), (0, 2), (3, 1)]);
        assert_eq!(fill(7, &three, &[1, 1, 1]), [1, 0, 1, 0, 2, 2, 0]);
        let without_the_second = preferences(&[(3, 4), (3, 1)]);
        assert_eq!(fill(7, &without_the_second, &[1, 1]), [0, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn some_candidates_get_no_slot_if_slots_are_fewer() {
        let many: Vec<Preference> =
            (0..20).map(|i| Preference::of(&format!("10.0.0.{i}:80"), 7, 0)).collect();
        let slots = fill(7, &many, &[1; 20]);
        assert_eq!(slots.iter().filter(|&&slot| slot != FREE).count(), 7);
    }

    proptest! {
        #[test]
        fn queue_fills_the_same_table_as_the_rule(
            weights in prop::collection::vec(1u32..40, 1..20)
        ) {
            let preferences: Vec<Preference> = (0..weights.len())
                .map(|i| Preference::of(&format!("10.0.0.{i}:80"), 1_009, 7))
                .collect();
            prop_assert_eq!(
                fill(1_009, &preferences, &weights),
                by_the_rule(1_009, &preferences, &weights)
            );
        }
    }
}
