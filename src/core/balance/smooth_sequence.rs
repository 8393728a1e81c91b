//! The smooth weighted sequence: which candidate each place of a round robin period
//! belongs to.
//!
//! Called at table build by `round_robin`. It computes the same sequence as nginx's
//! smooth weighted round robin, only faster. In that algorithm each step adds its
//! weight to the credit of every candidate. The candidate with the highest credit is
//! chosen and pays the sum of all weights.

use std::collections::BTreeMap;

/// Longest period that is not scaled: a `u32` per place makes 256 KiB per pool. Weights
/// up to 1,000 stay exact for any 65 backends, and for thousands that share a common
/// divisor.
pub(super) const PERIOD_MAX: u64 = 65_536;

/// Places per candidate that a period can have even beyond [`PERIOD_MAX`]. With 16,
/// rounding changes the share of a candidate of average weight by at most 1/32.
pub(super) const PLACES_PER_CANDIDATE: u64 = 16;

/// Reduces weights to lowest terms, and scales them down if the period would exceed the
/// bounds above.
///
/// Scaling rounds to the nearest whole place but leaves every candidate at least one. A
/// scaled period is therefore at most the bound plus one place per candidate.
pub(super) fn places(weights: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut places = in_lowest_terms(weights.collect());
    let period: u64 = places.iter().copied().map(u64::from).sum();
    let bound = PERIOD_MAX.max(places.len() as u64 * PLACES_PER_CANDIDATE);
    if period <= bound {
        return places;
    }
    for place in &mut places {
        let scaled =
            (u128::from(*place) * u128::from(bound) + u128::from(period / 2)) / u128::from(period);
        *place = (scaled as u32).max(1);
    }
    in_lowest_terms(places)
}

fn in_lowest_terms(mut weights: Vec<u32>) -> Vec<u32> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    for weight in &mut weights {
        *weight /= divisor;
    }
    weights
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Computes one period of the smooth sequence. `places` is the number of places of each
/// candidate. The cost is the period times the number of different weights, which is at
/// most the square root of twice the period.
pub(super) fn sequence(places: &[u32]) -> Vec<u32> {
    let mut state = SmoothState::new(places);
    (0..state.period).map(|_| state.step()).collect()
}

/// The state between two steps, by group: candidates of the same weight.
///
/// The members of a group gain alike. Among them the least chosen, then the first, is
/// chosen: plain rotation. So only the member whose turn it is must be compared with
/// other groups. The groups are stored as columns because the comparison is nearly the
/// whole cost of a long sequence.
struct SmoothState {
    period: i64,
    weight: Vec<i64>,
    /// Credit of the member whose turn it is.
    current: Vec<i64>,
    /// The member whose turn it is.
    front: Vec<u32>,
    rotation: Vec<Rotation>,
}

struct Rotation {
    /// Ascending.
    members: Vec<u32>,
    turn: usize,
}

// === impl SmoothState ===

impl SmoothState {
    fn new(places: &[u32]) -> SmoothState {
        let mut by_weight: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (index, &weight) in places.iter().enumerate() {
            by_weight.entry(weight).or_default().push(index as u32);
        }
        SmoothState {
            period: places.iter().copied().map(i64::from).sum(),
            weight: by_weight.keys().copied().map(i64::from).collect(),
            current: vec![0; by_weight.len()],
            front: by_weight.values().map(|members| members[0]).collect(),
            rotation: by_weight
                .into_values()
                .map(|members| Rotation { members, turn: 0 })
                .collect(),
        }
    }

    fn step(&mut self) -> u32 {
        let (mut best, mut most) = (0, i64::MIN);
        for (group, (current, weight)) in self.current.iter_mut().zip(&self.weight).enumerate() {
            *current += weight;
            if *current > most || (*current == most && self.front[group] < self.front[best]) {
                (best, most) = (group, *current);
            }
        }
        self.take(best)
    }

    fn take(&mut self, group: usize) -> u32 {
        let taken = self.front[group];
        let rotation = &mut self.rotation[group];
        rotation.turn += 1;
        // The next member has been chosen as often as `taken` had been, until the turn
        // returns to the first member.
        if rotation.turn == rotation.members.len() {
            rotation.turn = 0;
            self.current[group] -= self.period;
        }
        self.front[group] = rotation.members[rotation.turn];
        taken
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The rule as nginx states it (`ngx_stream_upstream_round_robin.c`).
    fn by_the_rule(weights: &[u32], length: usize) -> Vec<u32> {
        let total: i64 = weights.iter().copied().map(i64::from).sum();
        let mut current = vec![0i64; weights.len()];
        (0..length)
            .map(|_| {
                let mut best = 0;
                for i in 0..weights.len() {
                    current[i] += i64::from(weights[i]);
                    if current[i] > current[best] {
                        best = i;
                    }
                }
                current[best] -= total;
                best as u32
            })
            .collect()
    }

    fn letters(sequence: &[u32]) -> String {
        sequence.iter().map(|&i| char::from(b'a' + i as u8)).collect()
    }

    #[test]
    fn sequence_matches_published_examples() {
        assert_eq!(letters(&sequence(&[5, 1, 1])), "aabacaa");
        assert_eq!(letters(&sequence(&[3, 2, 1])), "abacba");
        assert_eq!(letters(&sequence(&[1, 1, 1])), "abc");
        assert_eq!(letters(&sequence(&[1])), "a");
    }

    #[test]
    fn weights_are_reduced_to_lowest_terms() {
        assert_eq!(places([500, 100, 100].into_iter()), [5, 1, 1]);
        assert_eq!(places([u32::MAX, u32::MAX].into_iter()), [1, 1]);
    }

    #[test]
    fn long_period_is_scaled_and_leaves_every_candidate_a_place() {
        let weights: Vec<u32> = (1..=1000).collect();
        let scaled = places(weights.iter().copied());
        let period: u64 = scaled.iter().copied().map(u64::from).sum();
        assert!(period <= PERIOD_MAX + 1000, "{period}");
        assert!(scaled.iter().all(|&p| p >= 1));
        let (heaviest, middle) = (f64::from(scaled[999]), f64::from(scaled[499]));
        assert!((heaviest / middle - 2.0).abs() < 0.05, "{heaviest} to {middle}");
    }

    #[test]
    fn extreme_weights_do_not_overflow_and_leave_every_candidate_a_place() {
        let scaled = places([u32::MAX, 1, u32::MAX - 1].into_iter());
        assert_eq!(
            sequence(&scaled).len() as u64,
            scaled.iter().map(|&p| u64::from(p)).sum::<u64>()
        );
        assert!(sequence(&scaled).contains(&1));
    }

    proptest! {
        #[test]
        fn sequence_matches_the_rule(
            weights in prop::collection::vec(prop_oneof![1u32..5, 1u32..60], 1..40)
        ) {
            let fast = sequence(&weights);
            prop_assert_eq!(&fast, &by_the_rule(&weights, fast.len()));
        }

        #[test]
        fn rule_repeats_after_one_period(
            weights in prop::collection::vec(1u32..30, 1..12)
        ) {
            let once = sequence(&weights);
            prop_assert_eq!(once.repeat(2), by_the_rule(&weights, once.len() * 2));
        }

        #[test]
        fn every_window_is_close_to_the_weights(
            weights in prop::collection::vec(1u32..50, 1..16),
            start in 0usize..5_000,
            length in 1usize..2_000,
        ) {
            let once = sequence(&weights);
            let mut hits = vec![0f64; weights.len()];
            for place in start..start + length {
                hits[once[place % once.len()] as usize] += 1.0;
            }
            // A candidate in a prefix is less than one place ahead of its share. As in
            // the cup-emptying game, it is at most the n-th harmonic number behind.
            let harmonic: f64 = (1..=weights.len()).map(|k| 1.0 / k as f64).sum();
            for (hit, &weight) in hits.iter().zip(&weights) {
                let share = length as f64 * f64::from(weight) / once.len() as f64;
                prop_assert!((hit - share).abs() <= 1.0 + harmonic, "{hit} of {share}");
            }
        }
    }
}
