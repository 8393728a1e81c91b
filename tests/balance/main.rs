//! Tests of the balancing policies through the public API: weights, caps, retries and
//! handover between tables, with one thread and with many.

#![allow(clippy::unwrap_used)]

mod load;
mod peak_ewma;
mod round_robin;
mod slow_start;
mod source_hash;

use proptest::prelude::*;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::balance::latency::Latency;
use tidegate_core::balance::{Balancer, Candidate, PickError, PickKey};
use tidegate_core::model::{Policy, Words};

// === helpers ===

/// Candidates `10.0.X.Y:80` with these weights and caps.
fn capped(specs: &[(u32, u32)]) -> Vec<Candidate> {
    specs
        .iter()
        .enumerate()
        .map(|(i, &(weight, connections_max))| Candidate {
            key: format!("10.0.{}.{}:80", i / 256, i % 256).into(),
            weight,
            connections_max,
            slow_start: false,
            in_flight: Arc::new(InFlight::new()),
            latency: Arc::new(Latency::new()),
        })
        .collect()
}

fn weighted(weights: &[u32]) -> Vec<Candidate> {
    capped(&weights.iter().map(|&weight| (weight, 0)).collect::<Vec<_>>())
}

fn balancer(policy: Policy, weights: &[u32]) -> Balancer {
    Balancer::new(policy, weighted(weights), None)
}

/// A key whose draw and client depend on `number`.
fn key(number: u64) -> PickKey {
    PickKey { client: IpAddr::V4(Ipv4Addr::from_bits(number as u32)), draw: number, at: 0 }
}

fn client(ip: impl Into<IpAddr>) -> PickKey {
    PickKey { client: ip.into(), draw: 0, at: 0 }
}

/// Picks and gives the slot back immediately.
fn touch(balancer: &Balancer, key: PickKey, tried: &[usize]) -> Result<usize, PickError> {
    let picked = balancer.pick(key, tried);
    if let Ok(index) = picked {
        balancer.candidates()[index].in_flight.leave();
    }
    picked
}

/// Hits of each candidate in `count` picks; slots are given back immediately.
fn hits(balancer: &Balancer, count: u64) -> Vec<u64> {
    let mut hits = vec![0; balancer.candidates().len()];
    for number in 0..count {
        hits[touch(balancer, key(number), &[]).unwrap()] += 1;
    }
    hits
}

fn held(balancer: &Balancer) -> Vec<u32> {
    balancer.candidates().iter().map(|c| c.in_flight.get()).collect()
}

fn any_policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(Policy::all().collect::<Vec<_>>())
}

// === every policy ===

proptest! {
    #[test]
    fn pick_returns_an_untried_candidate_below_its_cap_or_the_reason(
        policy in any_policy(),
        specs in prop::collection::vec((1u32..20, 0u32..4), 1..90),
        tried in prop::collection::vec(0usize..100, 0..6),
        picks in prop::collection::vec((any::<u64>(), any::<bool>()), 1..300),
    ) {
        let balancer = Balancer::new(policy, capped(&specs), None);
        let mut open = Vec::new();
        let mut model = vec![0u32; specs.len()];
        for (number, give_back) in picks {
            let untried: Vec<usize> = (0..specs.len()).filter(|i| !tried.contains(i)).collect();
            let free = |i: usize| specs[i].1 == 0 || model[i] < specs[i].1;
            match balancer.pick(key(number), &tried) {
                Ok(index) => {
                    prop_assert!(untried.contains(&index));
                    prop_assert!(free(index));
                    model[index] += 1;
                    open.push(index);
                }
                Err(PickError::Exhausted) => prop_assert!(untried.is_empty()),
                Err(PickError::AtCapacity) => {
                    prop_assert!(!untried.is_empty());
                    prop_assert!(!untried.iter().any(|&i| free(i)));
                }
            }
            prop_assert_eq!(held(&balancer), model.clone());
            let room = (0..specs.len()).any(|i| specs[i].1 == 0 || model[i] < specs[i].1);
            prop_assert_eq!(balancer.has_room(), room);
            if give_back && let Some(index) = open.pop() {
                balancer.candidates()[index].in_flight.leave();
                model[index] -= 1;
            }
        }
    }
}

#[test]
fn empty_balancer_is_exhausted() {
    for policy in Policy::all() {
        let balancer = Balancer::new(policy, Vec::new(), None);
        assert_eq!(balancer.pick(key(1), &[]), Err(PickError::Exhausted));
        assert!(!balancer.has_room());
    }
}

#[test]
fn weight_of_zero_is_treated_as_one() {
    for policy in Policy::all() {
        let hits = hits(&balancer(policy, &[0, 1]), 10_000);
        assert!(hits.iter().all(|&hit| hit > 4_000), "{policy:?}: {hits:?}");
    }
}

#[test]
fn last_free_slot_among_thousands_of_candidates_is_found() {
    for policy in Policy::all() {
        let mut specs = vec![(3, 1); 5_000];
        specs[1_234] = (1, 2);
        let balancer = Balancer::new(policy, capped(&specs), None);
        for candidate in balancer.candidates() {
            assert!(candidate.in_flight.try_enter(0));
        }
        assert!(balancer.has_room());
        assert_eq!(balancer.pick(key(7), &[]), Ok(1_234), "{policy:?}");
        assert_eq!(balancer.pick(key(8), &[]), Err(PickError::AtCapacity), "{policy:?}");
        assert!(!balancer.has_room());
    }
}

/// What the sessions of a candidate have counted themselves.
#[derive(Default)]
struct Seen {
    inside: AtomicU32,
    peak: AtomicU32,
}

/// Opens sessions as fast as possible, holds up to three, and closes them all. At the
/// start all threads hold their sessions at the same time, whatever the scheduler does.
fn hammer(balancer: &Balancer, seen: &[Seen], thread: u64, all_open: &Barrier) {
    let close = |index: usize| {
        seen[index].inside.fetch_sub(1, Ordering::SeqCst);
        balancer.candidates()[index].in_flight.leave();
    };
    let mut open = VecDeque::new();
    for number in 0..5_000 {
        match balancer.pick(key(thread << 32 | number), &[]) {
            Ok(index) => {
                let now = seen[index].inside.fetch_add(1, Ordering::SeqCst) + 1;
                seen[index].peak.fetch_max(now, Ordering::SeqCst);
                open.push_back(index);
            }
            Err(error) => assert_eq!(error, PickError::AtCapacity),
        }
        if number == 2 {
            all_open.wait();
        }
        if number > 2 && (open.len() > 2 || number % 7 == 0) {
            open.pop_front().into_iter().for_each(close);
        }
    }
    open.into_iter().for_each(close);
}

#[test]
fn eight_threads_never_exceed_a_cap_and_leave_no_slot_taken() {
    for policy in Policy::all() {
        let caps = [(5, 3), (1, 1), (2, 7), (1, 2)];
        let balancer = Balancer::new(policy, capped(&caps), None);
        let seen: [Seen; 4] = Default::default();
        let all_open = Barrier::new(8);
        thread::scope(|scope| {
            for thread in 0..8 {
                let (balancer, seen, all_open) = (&balancer, &seen, &all_open);
                scope.spawn(move || hammer(balancer, seen, thread, all_open));
            }
        });
        for (seen, (_, cap)) in seen.iter().zip(caps) {
            let peak = seen.peak.load(Ordering::SeqCst);
            assert!((1..=cap).contains(&peak), "{policy:?}: {peak} of {cap}");
        }
        assert_eq!(held(&balancer), [0, 0, 0, 0]);
    }
}
