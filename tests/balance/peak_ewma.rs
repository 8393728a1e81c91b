//! `peak-ewma`: slow backends get few sessions, and get more after they recover.

use super::*;
use std::time::Duration;

/// In milliseconds.
const START: u64 = 1_000_000;

fn at(number: u64, at: u64) -> PickKey {
    PickKey { at, ..key(number) }
}

/// Starts one session per millisecond. Each lasts as long as its backend takes. Returns
/// the number of sessions per backend.
fn serve(balancer: &Balancer, takes: &[Duration], from: u64, sessions: u64) -> Vec<u64> {
    let mut hits = vec![0; takes.len()];
    let mut open: VecDeque<(u64, usize)> = VecDeque::new();
    for now in from..from + sessions {
        open.retain(|&(end, index)| {
            if end <= now {
                balancer.candidates()[index].latency.answered(takes[index], now);
                balancer.candidates()[index].in_flight.leave();
            }
            end > now
        });
        let index = balancer.pick(at(now, now), &[]).unwrap();
        hits[index] += 1;
        open.push_back((now + takes[index].as_millis() as u64, index));
    }
    for (_, index) in open {
        balancer.candidates()[index].in_flight.leave();
    }
    hits
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[test]
fn slow_backend_gets_far_less_than_its_share() {
    let balancer = balancer(Policy::PeakEwma, &[1, 1, 1]);
    let hits = serve(&balancer, &[millis(1), millis(1), millis(50)], START, 20_000);
    assert!(hits[2] < 20_000 / 3 / 20, "{hits:?}");
    assert!(hits[0].abs_diff(hits[1]) < 2_000, "{hits:?}");
}

#[test]
fn recovered_backend_is_tried_again_and_regains_its_share() {
    let balancer = balancer(Policy::PeakEwma, &[1, 1]);
    let hits = serve(&balancer, &[millis(1), millis(100)], START, 10_000);
    assert!(hits[1] < 100, "{hits:?}");
    let hits = serve(&balancer, &[millis(1), millis(1)], START + 10_000, 120_000);
    assert!(hits[1] > 120_000 / 4, "{hits:?}");
}

#[test]
fn unmeasured_backend_is_compared_by_load_only() {
    let balancer = balancer(Policy::PeakEwma, &[1, 1]);
    balancer.candidates()[0].latency.connected(Duration::from_micros(10), START);
    let mut hits = [0u64; 2];
    for number in 0..100 {
        hits[balancer.pick(at(number, START), &[]).unwrap()] += 1;
    }
    assert_eq!(hits, [50, 50], "the new backend does not get all sessions");
}

#[test]
fn estimate_outlives_the_table() {
    let candidates = weighted(&[1, 1]);
    candidates[0].latency.connected(Duration::from_secs(1), START);
    candidates[1].latency.connected(millis(1), START);
    let first = Balancer::new(Policy::PeakEwma, candidates.clone(), None);
    let second = Balancer::new(Policy::PeakEwma, candidates, Some(&first));
    let one = |number| touch(&second, at(number, START), &[]);
    assert!((0..100).all(|number| one(number) == Ok(1)));
}
