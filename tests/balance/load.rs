//! Load and weights in `least-connections`, `random` and `two-choices`.

use super::*;

/// The sum over candidates of (hits - expected)^2 / expected.
fn chi_square(hits: &[u64], weights: &[u32]) -> f64 {
    let count: u64 = hits.iter().sum();
    let total: u32 = weights.iter().sum();
    hits.iter()
        .zip(weights)
        .map(|(&hit, &weight)| {
            let expected = count as f64 * f64::from(weight) / f64::from(total);
            (hit as f64 - expected).powi(2) / expected
        })
        .sum()
}

proptest! {
    #[test]
    fn least_connections_picks_a_least_loaded_candidate(
        specs in prop::collection::vec((1u32..1_000, 0u32..60, 0u32..50), 1..=64),
        tried in prop::collection::vec(0usize..64, 0..4),
        draw: u64,
    ) {
        let candidates = capped(&specs.iter().map(|s| (s.0, s.1)).collect::<Vec<_>>());
        for (candidate, &(_, _, held)) in candidates.iter().zip(&specs) {
            for _ in 0..held {
                candidate.in_flight.try_enter(0);
            }
        }
        let usable = |i: usize| {
            let (_, cap, held) = specs[i];
            !tried.contains(&i) && (cap == 0 || held < cap)
        };
        let load = |i: usize| (specs[i].2 + 1, specs[i].0);
        let is_least = |i: usize| {
            let (held, weight) = load(i);
            (0..specs.len()).filter(|&j| usable(j)).all(|j| {
                let (other_held, other_weight) = load(j);
                held * other_weight <= other_held * weight
            })
        };
        let balancer = Balancer::new(Policy::LeastConnections, candidates, None);
        match balancer.pick(key(draw), &tried) {
            Ok(index) => prop_assert!(usable(index) && is_least(index)),
            Err(_) => prop_assert!(!(0..specs.len()).any(usable)),
        }
    }
}

#[test]
fn equal_loads_are_picked_equally_often() {
    let balancer = balancer(Policy::LeastConnections, &[2, 2, 1, 1, 1, 1, 1, 1]);
    let hits = hits(&balancer, 10_000);
    assert!((4_700..5_300).contains(&hits[0]), "{hits:?}");
    assert_eq!(hits[0] + hits[1], 10_000);
}

#[test]
fn held_connections_are_proportional_to_the_weights() {
    let balancer = balancer(Policy::LeastConnections, &[4, 2, 1]);
    for number in 0..700 {
        balancer.pick(key(number), &[]).unwrap();
    }
    for (held, share) in held(&balancer).into_iter().zip([400, 200, 100]) {
        assert!(held.abs_diff(share) <= 1, "{held} of {share}");
    }
}

#[test]
fn racing_threads_do_not_all_pick_the_same_candidate() {
    let balancer = balancer(Policy::LeastConnections, &[1; 8]);
    thread::scope(|scope| {
        for thread in 0..8 {
            let balancer = &balancer;
            scope.spawn(move || {
                (0..1_000).for_each(|n| {
                    balancer.pick(key(thread << 32 | n), &[]).unwrap();
                });
            });
        }
    });
    // Each other thread can have compared loads before this thread raised the count.
    for held in held(&balancer) {
        assert!(held.abs_diff(1_000) <= 16, "{held}");
    }
}

#[test]
fn large_pools_stay_close_to_the_weights_without_a_scan() {
    for policy in [Policy::LeastConnections, Policy::TwoChoices] {
        let weights: Vec<u32> = (0..1_000).map(|i| 1 + i % 3).collect();
        let balancer = balancer(policy, &weights);
        for number in 0..200_000 {
            balancer.pick(key(number), &[]).unwrap();
        }
        for (held, weight) in held(&balancer).into_iter().zip(weights) {
            let share = f64::from(weight) * 100.1;
            let off = (f64::from(held) - share).abs();
            assert!(off <= 6.0 + 0.05 * share, "{policy:?}: {held} of {share}");
        }
    }
}

#[test]
fn random_follows_the_weights() {
    let weights = [10, 1, 5, 4, 30, 50];
    let hits = hits(&balancer(Policy::Random, &weights), 100_000);
    // 99.9 % of fair draws with 5 degrees of freedom stay below 20.5. The keys are
    // fixed, so the result is always the same.
    assert!(chi_square(&hits, &weights) < 20.5, "{hits:?}");
}

#[test]
fn random_follows_the_weights_of_the_usable_candidates() {
    let specs = [(900, 1), (1, 0), (3, 0)];
    let balancer = Balancer::new(Policy::Random, capped(&specs), None);
    assert!(balancer.candidates()[0].in_flight.try_enter(1));
    let hits = hits(&balancer, 40_000);
    assert!(chi_square(&hits[1..], &[1, 3]) < 10.8, "{hits:?}");
}

#[test]
fn two_choices_with_two_candidates_equals_least_connections() {
    let balancer = balancer(Policy::TwoChoices, &[999, 1]);
    for number in 0..5_000 {
        balancer.pick(key(number), &[]).unwrap();
    }
    assert_eq!(held(&balancer), [4_995, 5]);
}

#[test]
fn two_choices_spread_load_better_than_random() {
    let spread = |policy| {
        let balancer = balancer(policy, &[1; 100]);
        for number in 0..10_000 {
            balancer.pick(key(number), &[]).unwrap();
        }
        held(&balancer).into_iter().max().unwrap()
    };
    assert!(spread(Policy::TwoChoices) <= 104, "{}", spread(Policy::TwoChoices));
    assert!(spread(Policy::Random) >= 115, "{}", spread(Policy::Random));
}

/// A digest of picks while loads change. One session in three gives its slot back.
fn digest(policy: Policy, pool: usize) -> u64 {
    let specs: Vec<(u32, u32)> = (0..pool as u32)
        .map(|i| (1 + i % 7 * 31, if i % 3 == 0 { 0 } else { 5 + i % 11 }))
        .collect();
    let balancer = Balancer::new(policy, capped(&specs), None);
    let (mut digest, mut open) = (0xcbf2_9ce4_8422_2325_u64, VecDeque::new());
    for number in 0..2_000_u64 {
        let tried: &[usize] = if number % 5 == 0 { &[1, 0] } else { &[] };
        let picked = balancer.pick(key(number), tried);
        let place = picked.map_or(u64::MAX, |index| index as u64);
        digest = (digest ^ place).wrapping_mul(0x0000_0100_0000_01b3);
        open.extend(picked);
        if number % 3 == 0
            && let Some(index) = open.pop_front()
        {
            balancer.candidates()[index].in_flight.leave();
        }
    }
    digest
}

#[test]
fn picks_of_a_pool_without_slow_starts_never_change() {
    let of = |policy| [3, 64, 65, 300].map(|pool| digest(policy, pool));
    let [large, larger] = [11_141_600_931_862_497_057, 2_732_424_063_310_007_167];
    assert_eq!(
        of(Policy::LeastConnections),
        [5_524_337_606_492_773_702, 12_884_080_393_330_266_714, large, larger]
    );
    for policy in [Policy::TwoChoices, Policy::PeakEwma] {
        let digests = [1_850_196_424_221_371_496, 13_532_494_057_566_551_295, large, larger];
        assert_eq!(of(policy), digests, "{policy:?}");
    }
}
