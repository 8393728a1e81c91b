//! `weighted-round-robin`: exact, smooth, and continued after a reload.

use super::*;

const WRR: Policy = Policy::WeightedRoundRobin;

fn letters(balancer: &Balancer, count: u64) -> String {
    (0..count).map(|n| char::from(b'a' + touch(balancer, key(n), &[]).unwrap() as u8)).collect()
}

#[test]
fn round_robin_is_smooth() {
    assert_eq!(letters(&balancer(WRR, &[5, 1, 1]), 14), "aabacaaaabacaa");
    assert_eq!(letters(&balancer(WRR, &[300, 200, 100]), 12), "abacbaabacba");
}

proptest! {
    #[test]
    fn round_robin_is_exact_in_every_window_of_one_period(
        weights in prop::collection::vec(1u32..40, 1..20),
        offset in 0u64..1_000,
    ) {
        let balancer = balancer(WRR, &weights);
        let divisor = weights.iter().copied().reduce(gcd).unwrap();
        let period = u64::from(weights.iter().sum::<u32>() / divisor);
        hits(&balancer, offset);
        let expected: Vec<u64> = weights.iter().map(|&w| u64::from(w / divisor)).collect();
        prop_assert_eq!(hits(&balancer, period), expected);
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[test]
fn round_robin_is_exact_over_all_threads_and_unchanged_reloads() {
    let weights = [7, 3, 2];
    let candidates = weighted(&weights);
    let mut generations = vec![Balancer::new(WRR, candidates.clone(), None)];
    for _ in 0..3 {
        generations.push(Balancer::new(WRR, candidates.clone(), generations.last()));
    }
    thread::scope(|scope| {
        for thread in 0..8usize {
            let generations = &generations;
            scope.spawn(move || {
                for number in 0..1_200 {
                    let table = &generations[(thread + number) % generations.len()];
                    table.pick(key(number as u64), &[]).unwrap();
                }
            });
        }
    });
    // 9,600 picks are 800 periods of 12.
    assert_eq!(held(&generations[0]), [5_600, 2_400, 1_600]);
}

#[test]
fn changed_round_robin_continues_at_its_relative_position() {
    let old = balancer(WRR, &[1, 1, 1, 1]);
    assert_eq!(letters(&old, 6), "abcdab");
    // Half a period: two of four places, so four of eight.
    let new = Balancer::new(WRR, weighted(&[1; 8]), Some(&old));
    assert_eq!(letters(&new, 8), "efghabcd");
    // Another policy has no position.
    let other = balancer(Policy::Random, &[1; 4]);
    assert_eq!(letters(&Balancer::new(WRR, weighted(&[1; 4]), Some(&other)), 4), "abcd");
}

#[test]
fn other_candidates_in_the_same_proportions_do_not_share_a_position() {
    let old = balancer(WRR, &[1, 1]);
    let mut others = weighted(&[1, 1]);
    others[1].key = "10.9.9.9:80".into();
    let new = Balancer::new(WRR, others, Some(&old));
    assert_eq!(letters(&old, 1), "a");
    assert_eq!(letters(&new, 2), "ab");
}

#[test]
fn share_of_a_full_candidate_is_distributed_by_weight() {
    let specs = [(3, 1), (1, 0), (2, 0)];
    let balancer = Balancer::new(WRR, capped(&specs), None);
    assert!(balancer.candidates()[0].in_flight.try_enter(1));
    let hits = hits(&balancer, 9_000);
    assert_eq!(hits[0], 0);
    assert!((2_800..3_200).contains(&hits[1]), "{hits:?}");
}

#[test]
fn retries_after_a_failing_candidate_are_spread_over_the_others() {
    let balancer = balancer(WRR, &[1, 1, 1, 1]);
    let mut landed = [0u32; 4];
    for number in 0..4_000 {
        let mut chosen = touch(&balancer, key(number), &[]).unwrap();
        if chosen == 0 {
            chosen = touch(&balancer, key(number), &[0]).unwrap();
        }
        landed[chosen] += 1;
    }
    assert_eq!(landed[0], 0);
    for hits in &landed[1..] {
        assert!((1_300..1_367).contains(hits), "{landed:?}");
    }
}

#[test]
fn huge_round_robin_keeps_proportions_and_serves_every_backend() {
    let weights: Vec<u32> = (0..10_000).map(|i| 1 + i % 1_000).collect();
    let balancer = balancer(WRR, &weights);
    let hits = hits(&balancer, 170_000);
    assert!(hits.iter().all(|&hit| hit >= 1));
    let heavy: u64 = (0..10).map(|i| hits[i * 1_000 + 999]).sum();
    let half: u64 = (0..10).map(|i| hits[i * 1_000 + 499]).sum();
    assert!((heavy as f64 / half as f64 - 2.0).abs() < 0.1, "{heavy} to {half}");
}
