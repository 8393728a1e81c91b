//! A candidate in slow start gets at most its share of the picks, whatever the loads
//! are.

use super::*;

const BY_LOAD: [Policy; 3] = [Policy::LeastConnections, Policy::TwoChoices, Policy::PeakEwma];

/// Weight, sessions held and whether it is in slow start.
type Spec = (u32, u32, bool);

fn pool(specs: &[Spec]) -> Vec<Candidate> {
    let mut candidates = weighted(&specs.iter().map(|spec| spec.0).collect::<Vec<_>>());
    for (candidate, &(_, held, slow_start)) in candidates.iter_mut().zip(specs) {
        candidate.slow_start = slow_start;
        (0..held).for_each(|_| assert!(candidate.in_flight.try_enter(0)));
    }
    candidates
}

fn share(specs: &[Spec], index: usize) -> f64 {
    let total: u32 = specs.iter().map(|spec| spec.0).sum();
    f64::from(specs[index].0) / f64::from(total)
}

/// A number of picks that a fair draw with this share almost never exceeds.
fn at_most(share: f64, picks: u64) -> f64 {
    let mean = share * picks as f64;
    mean + 5.0 * mean.sqrt() + 5.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn share_of_a_candidate_in_slow_start_is_bounded_under_any_load(
        specs in prop::collection::vec((1u32..1_000, 0u32..300, any::<bool>()), 2..90),
        keep: bool,
        from: u32,
    ) {
        prop_assume!(specs.iter().any(|spec| !spec.2));
        const PICKS: u64 = 2_000;
        for policy in BY_LOAD {
            let balancer = Balancer::new(policy, pool(&specs), None);
            let mut hits = vec![0_u64; specs.len()];
            for number in 0..PICKS {
                let key = key(u64::from(from) << 32 | number);
                let index = if keep { balancer.pick(key, &[]) } else { touch(&balancer, key, &[]) };
                hits[index.unwrap()] += 1;
            }
            for (index, hit) in hits.iter().enumerate().filter(|(index, _)| specs[*index].2) {
                let bound = at_most(share(&specs, index), PICKS);
                prop_assert!(*hit as f64 <= bound, "{policy:?}: {index} got {hit}, at most {bound}");
            }
        }
    }
}

#[test]
fn idle_candidate_in_slow_start_gets_exactly_its_share() {
    for (policy, others) in BY_LOAD.into_iter().flat_map(|p| [2, 63, 64, 299].map(|n| (p, n))) {
        let mut specs = vec![(1_000, 200, false); others];
        specs.push((1_000, 0, true));
        for percent in [10, 15, 50, 95] {
            specs[others].0 = percent * 10;
            let hits = hits(&Balancer::new(policy, pool(&specs), None), 20_000)[others] as f64;
            let expected = share(&specs, others) * 20_000.0;
            let off = (hits - expected).abs();
            assert!(off <= 5.0 * expected.sqrt() + 1.0, "{policy:?}: {hits} of {expected}");
        }
    }
}

#[test]
fn candidates_in_slow_start_each_get_their_own_share() {
    let specs = [(100, 50, false), (10, 0, true), (100, 90, false), (40, 3, true), (20, 0, true)];
    for policy in BY_LOAD {
        let hits = hits(&Balancer::new(policy, pool(&specs), None), 27_000);
        for (index, expected) in [(1, 1_000.0), (4, 2_000.0)] {
            let hit = hits[index] as f64;
            assert!((hit - expected).abs() <= 5.0 * f64::sqrt(expected), "{policy:?}: {hits:?}");
        }
    }
}

#[test]
fn loaded_candidate_in_slow_start_gets_less_than_its_share() {
    let specs = [(100, 0, false), (100, 0, false), (50, 90, true)];
    for policy in BY_LOAD {
        let hits = hits(&Balancer::new(policy, pool(&specs), None), 1_000);
        assert_eq!(hits[2], 0, "{policy:?}: {hits:?}");
    }
}

#[test]
fn candidate_in_slow_start_gets_all_sessions_if_others_are_full() {
    for (policy, others) in BY_LOAD.into_iter().flat_map(|p| [2, 80].map(|n| (p, n))) {
        let mut candidates = pool(&vec![(1_000, 1, false); others]);
        candidates.iter_mut().for_each(|candidate| candidate.connections_max = 1);
        candidates.extend(pool(&[(1, 0, true)]));
        candidates[others].connections_max = 100;
        let balancer = Balancer::new(policy, candidates, None);
        for number in 0..100 {
            assert_eq!(balancer.pick(key(number), &[]), Ok(others), "{policy:?}");
        }
        assert_eq!(balancer.pick(key(100), &[]), Err(PickError::AtCapacity));
        balancer.candidates()[others].in_flight.leave();
        let all_others: Vec<usize> = (0..others).collect();
        assert_eq!(balancer.pick(key(101), &all_others), Ok(others), "the others were tried");
        balancer.candidates()[others].in_flight.leave();
        assert_eq!(balancer.pick(key(102), &[others]), Err(PickError::AtCapacity));
    }
}

#[test]
fn pool_of_only_slow_starts_is_balanced_normally() {
    let specs: [Spec; 3] = [(10, 0, false), (20, 5, false), (10, 0, false)];
    for policy in BY_LOAD {
        let plain = hits(&Balancer::new(policy, pool(&specs), None), 1_000);
        let slow = specs.map(|(weight, held, _)| (weight, held, true));
        assert_eq!(hits(&Balancer::new(policy, pool(&slow), None), 1_000), plain, "{policy:?}");
    }
}

#[test]
fn slow_start_does_not_change_picks_of_policies_that_ignore_load() {
    let specs = [(1_000, 200, false), (1_000, 200, false), (100, 0, true)];
    for policy in [Policy::WeightedRoundRobin, Policy::Random] {
        let hits = hits(&Balancer::new(policy, pool(&specs), None), 21_000)[2];
        assert!(hits.abs_diff(1_000) <= 160, "{policy:?}: {hits}");
    }
    let plain = specs.map(|(weight, held, _)| (weight, held, false));
    for policy in [Policy::WeightedRoundRobin, Policy::Random, Policy::SourceHash] {
        let of = |specs: &[Spec]| hits(&Balancer::new(policy, pool(specs), None), 1_000);
        assert_eq!(of(&specs), of(&plain), "{policy:?}");
    }
}

#[test]
fn balancer_is_reused_until_a_slow_start_begins_or_ends() {
    let (starting, plain) = (pool(&[(10, 0, true), (10, 0, false)]), |mut all: Vec<Candidate>| {
        all.iter_mut().for_each(|candidate| candidate.slow_start = false);
        all
    });
    let balancer = Balancer::new(Policy::LeastConnections, starting.clone(), None);
    let does_for = |all: &[Candidate]| balancer.can_reuse_for(Policy::LeastConnections, all, 1);
    assert!(does_for(&starting) && !does_for(&plain(starting.clone())));
}
