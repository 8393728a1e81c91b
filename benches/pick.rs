//! Cost of a pick: each policy on one core and with all cores contending, the table
//! load before it, and building tables. Run with `cargo bench --bench pick`; the last
//! argument filters by name.
//!
//! The baseline is the simplest implementation: a smooth weighted round robin behind a
//! mutex. All take a slot of the picked backend and give it back, as a session does.
//! The cost of the slot alone is `slot`.

#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::balance::latency::Latency;
use tidegate_core::balance::{Balancer, Candidate, PickKey, PickRecord};
use tidegate_core::decision::Outcome;
use tidegate_core::decision::rings::Decisions;
use tidegate_core::model;
use tidegate_core::model::{BackendAddr, ClientAddr, FrontendId, PeerAddr, Policy, Words};
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::table::Table;
use tidegate_core::table::build::{BackendInput, PoolInput, TableInput, build};
use tidegate_core::table::decide::{Picked, PickedFor};
use tidegate_core::table::publish::TablePublisher;
use tidegate_core::table::routes::RouteNumber;
use tidegate_core::table::state::{BackendId, BackendState, PoolId};
use tidegate_core::testing;
use tidegate_net::clock;

const SIZES: [usize; 4] = [3, 64, 1_000, 10_000];

/// Weights 1, 2, 3, 1, 2, 3 and so on.
fn weight(index: usize) -> u32 {
    1 + index as u32 % 3
}

/// Latency measured half a second ago, so that every estimate must decay.
fn latency(index: usize) -> Arc<Latency> {
    let latency = Latency::new();
    latency.connected(Duration::from_micros(100 + index as u64 % 7), 500);
    latency.answered(Duration::from_micros(900 + index as u64 % 13), 500);
    Arc::new(latency)
}

fn candidates(count: usize) -> Vec<Candidate> {
    (0..count)
        .map(|i| Candidate {
            key: format!("10.0.{}.{}:80", i / 256, i % 256).into(),
            weight: weight(i),
            connections_max: 1_000,
            slow_start: false,
            in_flight: Arc::new(InFlight::new()),
            latency: latency(i),
        })
        .collect()
}

fn key(number: u64) -> PickKey {
    let client = IpAddr::V4(Ipv4Addr::from_bits(number as u32));
    PickKey { client, draw: number.wrapping_mul(0x9e37_79b9_7f4a_7c15), at: 1_000 + number / 1_000 }
}

/// Picks and gives the slot back, as a session does.
fn session(balancer: &Balancer, number: u64) -> usize {
    let index = balancer.pick(key(number), &[]).unwrap();
    balancer.candidates()[index].in_flight.leave();
    index
}

/// The simplest implementation.
struct Naive {
    /// Weight and credit of each backend.
    peers: Mutex<Vec<(i64, i64)>>,
    in_flight: Vec<InFlight>,
}

impl Naive {
    fn new(count: usize) -> Naive {
        Naive {
            peers: Mutex::new((0..count).map(|i| (i64::from(weight(i)), 0)).collect()),
            in_flight: (0..count).map(|_| InFlight::new()).collect(),
        }
    }

    fn session(&self) -> usize {
        let index = self.pick();
        assert!(self.in_flight[index].try_enter(1_000));
        self.in_flight[index].leave();
        index
    }

    fn pick(&self) -> usize {
        let mut peers = self.peers.lock().unwrap();
        let (mut best, mut total) = (0, 0);
        for i in 0..peers.len() {
            peers[i].1 += peers[i].0;
            total += peers[i].0;
            if peers[i].1 > peers[best].1 {
                best = i;
            }
        }
        peers[best].1 -= total;
        best
    }
}

/// Keeps the other cores busy with `work` while `measure` runs.
fn contended(work: impl Fn(u64) -> usize + Sync, measure: impl FnOnce()) {
    let others = thread::available_parallelism().map_or(1, |n| n.get()).saturating_sub(1).max(1);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for other in 0..others as u64 {
            let (work, stop) = (&work, &stop);
            scope.spawn(move || {
                let mut number = other << 40;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    black_box(work(number));
                }
            });
        }
        measure();
        stop.store(true, Ordering::Relaxed);
    });
}

fn bench_both(c: &mut Criterion, name: &str, size: usize, work: impl Fn(u64) -> usize + Sync) {
    let measure = |c: &mut Criterion, group: &str| {
        let mut number = 0;
        c.benchmark_group(group).bench_function(BenchmarkId::new(name, size), |b| {
            b.iter(|| {
                number += 1;
                work(black_box(number))
            });
        });
    };
    measure(c, "pick");
    contended(&work, || measure(c, "pick-contended"));
}

fn picks(c: &mut Criterion) {
    for size in SIZES {
        for policy in Policy::all() {
            let balancer = Balancer::new(policy, candidates(size), None);
            bench_both(c, policy.word(), size, |number| session(&balancer, number));
        }
        let naive = Naive::new(size);
        bench_both(c, "naive-mutex", size, |_| naive.session());
    }
}

fn slot(c: &mut Criterion) {
    let slot = InFlight::new();
    let hold = |_| {
        assert!(slot.try_enter(1_000));
        slot.leave();
        0
    };
    c.benchmark_group("slot").bench_function("alone", |b| b.iter(|| hold(0)));
    contended(hold, || {
        c.benchmark_group("slot").bench_function("contended", |b| b.iter(|| hold(0)));
    });
}

fn full_pool(c: &mut Criterion) {
    for size in SIZES {
        let balancer = Balancer::new(Policy::LeastConnections, candidates(size), None);
        c.benchmark_group("has-room").bench_function(BenchmarkId::new("free", size), |b| {
            b.iter(|| balancer.has_room());
        });
        for candidate in balancer.candidates() {
            (0..1_000).for_each(|_| assert!(candidate.in_flight.try_enter(1_000)));
        }
        c.benchmark_group("has-room").bench_function(BenchmarkId::new("full", size), |b| {
            b.iter(|| balancer.has_room());
        });
    }
}

fn states(count: usize) -> Vec<Arc<BackendState>> {
    (0..count)
        .map(|i| {
            let address = BackendAddr::Tcp(([10, 0, 0, 0], 1 + i as u16).into());
            let name: Arc<str> = i.to_string().into();
            Arc::new(BackendState::new(BackendId(i as u32), "web".into(), name, address, 1))
        })
        .collect()
}

fn spec(balance: Policy) -> Arc<model::PoolConfig> {
    Arc::new(model::PoolConfig { balance, ..testing::pool("web") })
}

/// Weights that make the longest periods with the most different weights.
fn uneven(index: usize) -> u32 {
    if index < 500 { 999 - 2 * (index as u32 % 499) } else { 1 }
}

fn input(
    spec: &Arc<model::PoolConfig>,
    states: &[Arc<BackendState>],
    weight: fn(usize) -> u32,
) -> TableInput {
    let backends = states
        .iter()
        .enumerate()
        .map(|(i, state)| BackendInput {
            state: Arc::clone(state),
            effective_weight: weight(i),
            connections_max: 0,
            slow_start: false,
            tier: 0,
            eligible: true,
            on_trial: false,
            undecided: false,
            in_service: true,
        })
        .collect();
    let pools = vec![PoolInput {
        id: PoolId(1),
        spec: Arc::clone(spec),
        backends,
        stand_ins: vec![],
        undecided: false,
    }];
    TableInput { generation: 1, serial: 1, connections_max: 0, frontends: Vec::new(), pools }
}

/// A pick through the table: without a record (`plain`), with one (`noted`), and with all that
/// a session adds to it (`recorded`): the wall time, the decision in its ring, and the outcomes
/// of the connect and of the end.
fn recorded(c: &mut Criterion) {
    let all = Decisions::new(1);
    let rings = all.of(0);
    let mut record = PickRecord::default();
    let client = ClientAddr::of_peer(PeerAddr::new(([192, 0, 2, 1], 50_000).into()));
    for (policy, size) in [
        (Policy::WeightedRoundRobin, 3),
        (Policy::LeastConnections, 3),
        (Policy::LeastConnections, 64),
    ] {
        let table = build(&input(&spec(policy), &states(size), weight), None);
        let pool = &table.pools[0];
        let mut group = c.benchmark_group("decision");
        let id = |kind: &str| BenchmarkId::new(format!("{}-{kind}", policy.word()), size);
        let mut number = 0;
        group.bench_function(id("plain"), |b| {
            b.iter(|| {
                number += 1;
                black_box(pool.pick(key(number), &[]).unwrap().index)
            });
        });
        group.bench_function(id("noted"), |b| {
            b.iter(|| {
                number += 1;
                black_box(pool.pick_recorded(key(number), &[], &mut record).unwrap().index)
            });
        });
        group.bench_function(id("recorded"), |b| {
            b.iter(|| {
                number += 1;
                let pick = pool.pick_recorded(key(number), &[], &mut record).unwrap();
                let wall = clock::wall().duration_since(UNIX_EPOCH).unwrap_or_default();
                let session = PickedFor {
                    session: number,
                    client,
                    peer: None,
                    frontend: FrontendId(1),
                    route: RouteNumber::default(),
                    serial: 1,
                    attempt: 1,
                    waited: None,
                    now: clock::now(),
                    wall_micros: wall.as_micros() as u64,
                };
                let decision = pool.decision(&session, Some(Picked::of(&pick)), &record);
                let place = rings.first.push(&decision);
                let connected = Outcome { connect_micros: Some(9), ..Outcome::default() };
                rings.first.set_outcome(place, number, &connected);
                let end = Some((Cause::Finished, Phase::Closed));
                rings.first.set_outcome(place, number, &Outcome { end, ..connected });
                pick.index
            });
        });
    }
}

fn tables(c: &mut Criterion) {
    let publisher = TablePublisher::new(Arc::new(Table::empty()));
    let mut reader = publisher.reader();
    c.bench_function("table-load", |b| b.iter(|| reader.load().serial));
    for size in [10, 1_000, 10_000] {
        let states = states(size);
        for policy in Policy::all() {
            let spec = spec(policy);
            let id = BenchmarkId::new(policy.word(), size);
            c.benchmark_group("build-and-publish").bench_function(id, |b| {
                b.iter(|| publisher.publish(Arc::new(build(&input(&spec, &states, weight), None))));
            });
        }
        for policy in [Policy::WeightedRoundRobin, Policy::SourceHash] {
            let spec = spec(policy);
            let id = BenchmarkId::new(format!("{}-uneven", policy.word()), size);
            c.benchmark_group("build-and-publish").bench_function(id, |b| {
                b.iter(|| publisher.publish(Arc::new(build(&input(&spec, &states, uneven), None))));
            });
        }
        let spec = spec(Policy::SourceHash);
        let before = build(&input(&spec, &states, weight), None);
        let id = BenchmarkId::new("unchanged", size);
        c.benchmark_group("build-and-publish").bench_function(id, |b| {
            b.iter(|| {
                publisher.publish(Arc::new(build(&input(&spec, &states, weight), Some(&before))))
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(200));
    targets = picks, slot, full_pool, recorded, tables
}
criterion_main!(benches);
