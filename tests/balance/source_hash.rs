//! `source-hash`: the same client gets the same backend, on every machine.

use super::*;
use std::collections::HashSet;
use std::net::Ipv6Addr;

/// The backend of each of `count` clients, by key.
fn homes(balancer: &Balancer, count: u32) -> Vec<Arc<str>> {
    (0..count)
        .map(|n| {
            let ip = Ipv4Addr::from_bits(n.wrapping_mul(2_654_435_761));
            let index = touch(balancer, client(ip), &[]).unwrap();
            Arc::clone(&balancer.candidates()[index].key)
        })
        .collect()
}

fn moved(before: &[Arc<str>], after: &[Arc<str>]) -> f64 {
    let moved = before.iter().zip(after).filter(|(a, b)| a != b).count();
    moved as f64 / before.len() as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn removed_backend_moves_few_clients_of_the_others(count in 2usize..80, gone in 0usize..80) {
        let mut candidates = weighted(&vec![1; count]);
        let before = homes(&Balancer::new(Policy::SourceHash, candidates.clone(), None), 20_000);
        candidates.remove(gone % count);
        let after = homes(&Balancer::new(Policy::SourceHash, candidates, None), 20_000);
        let moved = moved(&before, &after);
        prop_assert!(moved <= 1.0 / count as f64 + 0.02, "{moved} of {count}");
    }

    #[test]
    fn clients_are_distributed_by_weight(weights in prop::collection::vec(1u32..20, 2..12)) {
        let balancer = balancer(Policy::SourceHash, &weights);
        let hits = hits(&balancer, 60_000);
        let total: u32 = weights.iter().sum();
        for (hit, weight) in hits.iter().zip(weights) {
            let off = *hit as f64 / 60_000.0 - f64::from(weight) / f64::from(total);
            prop_assert!(off.abs() <= 0.02, "{hits:?}");
        }
    }
}

/// Checks that adding and removing the last backend moves at most its share of the
/// clients plus 2 %.
fn one_more_and_one_less(weights: &[u32], clients: u32) {
    let (n, all) = (weights.len(), weighted(weights));
    let of = |candidates: &[Candidate]| {
        homes(&Balancer::new(Policy::SourceHash, candidates.to_vec(), None), clients)
    };
    let (with, without) = (of(&all), of(&all[..n - 1]));
    let share = f64::from(weights[n - 1]) / f64::from(weights.iter().sum::<u32>());
    let moved = moved(&with, &without);
    assert!(moved <= share + 0.02, "{moved} of the clients moved between {} and {n}", n - 1);
}

/// Pool sizes that are checked with one backend more and one less.
fn sizes() -> Vec<usize> {
    let long = std::env::var("TIDEGATE_LONG").is_ok_and(|value| value == "1");
    if long { (2..=2_000).collect() } else { vec![2, 3, 10, 100, 650, 651, 652, 1_999, 2_000] }
}

#[test]
fn added_or_removed_backend_moves_few_clients_in_pools_of_any_size() {
    for size in sizes() {
        one_more_and_one_less(&vec![1; size], 20_000);
    }
}

#[test]
fn added_or_removed_backend_moves_few_clients_with_weights() {
    for size in sizes() {
        let weights: Vec<u32> = (0..size as u32).map(|n| n.wrapping_mul(37) % 1_000 + 1).collect();
        one_more_and_one_less(&weights, 20_000);
    }
}

#[test]
fn pool_with_many_backends_down_keeps_the_clients_of_the_others() {
    let all = weighted(&[1; 700]);
    let of = |candidates: &[Candidate]| {
        homes(&Balancer::of_pool(Policy::SourceHash, candidates.to_vec(), 65_537, None), 20_000)
    };
    let (before, after) = (of(&all), of(&all[..640]));
    assert!(moved(&before, &after) <= 60.0 / 700.0 + 0.05, "{}", moved(&before, &after));
}

#[test]
fn every_backend_has_a_slot_if_slots_equal_backends() {
    let all = weighted(&[1; 251]);
    let balancer = Balancer::of_pool(Policy::SourceHash, all, 251, None);
    let hit = hits(&balancer, 20_000);
    assert!(hit.iter().all(|hits| *hits > 0), "{hit:?}");
}

#[test]
fn order_in_the_file_does_not_matter() {
    let candidates = weighted(&[3, 1, 2, 2, 9]);
    let mut reversed = candidates.clone();
    reversed.reverse();
    let one = homes(&Balancer::new(Policy::SourceHash, candidates, None), 5_000);
    let other = homes(&Balancer::new(Policy::SourceHash, reversed, None), 5_000);
    assert_eq!(one, other);
}

#[test]
fn ipv4_mapped_client_is_hashed_as_ipv4_and_the_draw_is_ignored() {
    let balancer = balancer(Policy::SourceHash, &[1; 50]);
    for n in 0..500u64 {
        let v4 = Ipv4Addr::from_bits(n as u32 * 7_919);
        let plain = touch(&balancer, client(v4), &[]);
        let mapped = PickKey { client: v4.to_ipv6_mapped().into(), draw: n, at: 0 };
        assert_eq!(touch(&balancer, mapped, &[]), plain);
    }
}

#[test]
fn retries_of_a_client_follow_a_fixed_order() {
    let one = balancer(Policy::SourceHash, &[1, 5, 3, 1]);
    let other = balancer(Policy::SourceHash, &[1, 5, 3, 1]);
    for n in 0..300 {
        let mut tried = Vec::new();
        while let Ok(index) = touch(&one, key(n), &tried) {
            assert_eq!(touch(&other, key(n), &tried), Ok(index));
            tried.push(index);
        }
        assert_eq!(tried.iter().collect::<HashSet<_>>().len(), 4);
    }
}

#[test]
fn clients_of_a_full_backend_spread_over_the_others() {
    let balancer = Balancer::new(Policy::SourceHash, capped(&[(1, 1), (1, 0), (1, 0)]), None);
    assert!(balancer.candidates()[0].in_flight.try_enter(1));
    let hits = hits(&balancer, 9_000);
    assert!((4_200..4_800).contains(&hits[1]), "{hits:?}");
}

/// Choice and next three choices of each client. An independent implementation, written
/// from the description in `balance::source_hash`, gives the same. These values must
/// never change: a change moves clients after an upgrade, and machines with different
/// versions disagree.
#[test]
fn choices_of_clients_match_the_golden_values() {
    let clients: [IpAddr; 4] = [
        Ipv4Addr::new(192, 0, 2, 1).into(),
        Ipv4Addr::new(198, 51, 100, 77).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
        Ipv6Addr::UNSPECIFIED.into(),
    ];
    let orders = |balancer: &Balancer| -> Vec<Vec<usize>> {
        clients
            .iter()
            .map(|&ip| {
                let mut tried = Vec::new();
                while tried.len() < 4 {
                    tried.push(touch(balancer, client(ip), &tried).unwrap());
                }
                tried
            })
            .collect()
    };
    let equal = orders(&balancer(Policy::SourceHash, &[1; 5]));
    assert_eq!(equal, GOLDEN_EQUAL);
    let uneven = orders(&balancer(Policy::SourceHash, &[1, 2, 3, 4, 5]));
    assert_eq!(uneven, GOLDEN_UNEVEN);
    let many = orders(&balancer(Policy::SourceHash, &[1; 1_000]));
    assert_eq!(many, GOLDEN_MANY);
    let more_slots = Balancer::of_pool(Policy::SourceHash, weighted(&[1; 1_000]), 655_373, None);
    assert_eq!(orders(&more_slots), GOLDEN_MORE_SLOTS);
}

const GOLDEN_EQUAL: [[usize; 4]; 4] = [[2, 1, 0, 4], [4, 0, 2, 1], [4, 0, 1, 3], [2, 4, 1, 3]];
const GOLDEN_UNEVEN: [[usize; 4]; 4] = [[4, 1, 2, 3], [4, 2, 1, 3], [4, 1, 0, 3], [2, 4, 1, 3]];
const GOLDEN_MANY: [[usize; 4]; 4] =
    [[986, 665, 664, 119], [357, 878, 204, 723], [224, 138, 743, 0], [328, 5, 22, 234]];
const GOLDEN_MORE_SLOTS: [[usize; 4]; 4] =
    [[746, 9, 194, 299], [215, 15, 346, 250], [536, 468, 405, 128], [519, 137, 7, 433]];
