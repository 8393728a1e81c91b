//! Picking a backend: all policies, weighted and lock-free.
//!
//! `core::table::build` builds a [`Balancer`] for one tier of a pool, and [`tiered`] combines
//! those of several tiers. Workers call [`Balancer::pick`] through the table they loaded. A
//! balancer is immutable except for atomics. It does no I/O, reads no clock and generates no
//! randomness: the caller passes random bits in.
//!
//! # Rules for every policy
//!
//! - A pick raises the in-flight count of the chosen candidate with the
//!   compare-and-swap that enforces the cap.
//! - A pick skips candidates that were tried or are at their caps. It fails only after
//!   it has looked at every candidate.
//! - While other candidates are below their caps, a candidate in slow start gets at
//!   most its share of the picks, whatever the loads are.
//! - Every pick is bounded: at most 17 looks at single candidates and then 10 scans
//!   over all candidates. A slow start doubles this.

mod alias;
pub mod count;
pub mod in_flight;
pub mod latency;
mod least_connections;
mod maglev;
mod peak_ewma;
mod position;
mod random;
mod random_stream;
mod recorder;
mod round_robin;
mod scan;
mod slow_start;
mod smooth_sequence;
mod source_hash;
pub mod tiered;
pub mod trial;
mod two_choices;

pub use recorder::PickRecord;

use crate::balance::random_stream::DrawStream;
use crate::model::{HASH_SLOTS, Policy};
use crossbeam::utils::CachePadded;
use in_flight::InFlight;
use latency::Latency;
use least_connections::LeastConnections;
use peak_ewma::PeakEwma;
use random::Random;
use recorder::{PickRecorder, Rehearsal, Unrecorded};
use round_robin::RoundRobin;
use slow_start::{Excluded, SlowStarts};
use source_hash::SourceHash;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use two_choices::TwoChoices;

/// A backend that a balancer may pick.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Canonical name: the address as text. It orders the Maglev table, so that every
    /// machine computes the same table.
    pub key: Arc<str>,
    /// Effective weight, at least 1.
    pub weight: u32,
    /// Cap on `in_flight`; 0 means no cap.
    pub connections_max: u32,
    /// Whether the backend is in slow start. Its share of the picks is then at most the
    /// share of its weight, even if it has no load.
    pub slow_start: bool,
    /// Shared by all workers and all tables.
    pub in_flight: Arc<InFlight>,
    /// Shared by all workers and all tables; read by `peak-ewma` only.
    pub latency: Arc<Latency>,
}

/// Input of one pick, in addition to the candidates.
#[derive(Debug, Clone, Copy)]
pub struct PickKey {
    /// The client's address, hashed by `source-hash`.
    pub client: IpAddr,
    /// Fresh random bits. A pick mixes them before use, so a counter with a random
    /// start is enough.
    pub draw: u64,
    /// Time of the pick in milliseconds of `net::clock::millis`. `peak-ewma` decays its
    /// estimates to this time.
    pub at: u64,
}

/// Why a pick returned no candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PickError {
    /// Every candidate was already tried, or the list is empty.
    Exhausted,
    /// At least one candidate is untried, and all untried candidates are at their caps.
    AtCapacity,
}

/// A policy prepared for one tier of a pool.
#[derive(Debug)]
pub struct Balancer {
    policy: Policy,
    /// Size of the Maglev table.
    hash_slots: u32,
    candidates: Box<[Candidate]>,
    prepared: PolicyState,
    /// Set for policies that compare loads, while a candidate is in slow start.
    slow_starts: Option<SlowStarts>,
    /// Whether at least one candidate has no cap. [`Balancer::has_room`] is then always
    /// true.
    uncapped: bool,
    /// Index of the candidate that was last found below its cap.
    room_seen: CachePadded<AtomicUsize>,
}

/// Position of a round robin in its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RoundRobinPosition {
    /// Index of the next place; less than `period`.
    pub place: u64,
    /// Number of picks after which the sequence repeats.
    pub period: u64,
}

/// What each policy computes at table build.
#[derive(Debug)]
enum PolicyState {
    /// No candidates, with any policy.
    Empty,
    RoundRobin(RoundRobin),
    LeastConnections(LeastConnections),
    Random(Random),
    TwoChoices(TwoChoices),
    PeakEwma(PeakEwma),
    SourceHash(SourceHash),
}

// === impl Balancer ===

impl Balancer {
    /// Prepares `policy` for `candidates`. A weight of 0 is raised to 1. `previous` is
    /// the balancer that this one replaces in the same pool: a round robin continues
    /// from its relative position.
    pub fn new(
        policy: Policy,
        candidates: Vec<Candidate>,
        previous: Option<&Balancer>,
    ) -> Balancer {
        Balancer::of_pool(policy, candidates, HASH_SLOTS, previous)
    }

    /// Prepares `policy` as [`Balancer::new`] does, for a pool with `hash_slots` (a
    /// prime). Only `source-hash` uses the slots. Their number does not depend on the
    /// number of backends.
    pub fn of_pool(
        policy: Policy,
        mut candidates: Vec<Candidate>,
        hash_slots: u32,
        previous: Option<&Balancer>,
    ) -> Balancer {
        for candidate in &mut candidates {
            candidate.weight = candidate.weight.max(1);
        }
        let candidates = candidates.into_boxed_slice();
        let compares_loads =
            matches!(policy, Policy::LeastConnections | Policy::TwoChoices | Policy::PeakEwma);
        let slow_starts = compares_loads.then(|| SlowStarts::new(&candidates)).flatten();
        let slow = slow_starts.is_some();
        let prepared = match policy {
            _ if candidates.is_empty() => PolicyState::Empty,
            Policy::WeightedRoundRobin => PolicyState::RoundRobin(RoundRobin::new(
                &candidates,
                previous.and_then(Balancer::as_round_robin),
            )),
            Policy::LeastConnections => {
                PolicyState::LeastConnections(LeastConnections::new(&candidates, slow))
            }
            Policy::Random => PolicyState::Random(Random::new(&candidates)),
            Policy::TwoChoices => PolicyState::TwoChoices(TwoChoices::new(&candidates, slow)),
            Policy::PeakEwma => PolicyState::PeakEwma(PeakEwma::new(&candidates, slow)),
            Policy::SourceHash => PolicyState::SourceHash(SourceHash::new(&candidates, hash_slots)),
        };
        Balancer {
            policy,
            hash_slots,
            prepared,
            slow_starts,
            uncapped: candidates.iter().any(|c| c.connections_max == 0),
            candidates,
            room_seen: CachePadded::new(AtomicUsize::new(0)),
        }
    }

    /// Returns whether [`Balancer::of_pool`] with these arguments would build an
    /// equivalent balancer.
    pub fn can_reuse_for(&self, policy: Policy, candidates: &[Candidate], hash_slots: u32) -> bool {
        self.policy == policy
            && (policy != Policy::SourceHash || self.hash_slots == hash_slots)
            && self.candidates.len() == candidates.len()
            && self.candidates.iter().zip(candidates).all(|(a, b)| a.is_same_as(b))
    }

    /// Picks a candidate that is not in `tried` and raises its in-flight count within
    /// its cap. Returns its index. The caller must lower the count exactly once.
    #[inline]
    pub fn pick(&self, key: PickKey, tried: &[usize]) -> Result<usize, PickError> {
        self.pick_with(key, tried, &mut Unrecorded)
    }

    /// Picks like [`Balancer::pick`] and notes in `record` what decided; the notes of an
    /// earlier pick are forgotten.
    pub fn pick_recorded(
        &self,
        key: PickKey,
        tried: &[usize],
        record: &mut PickRecord,
    ) -> Result<usize, PickError> {
        record.clear();
        let picked = self.pick_with(key, tried, record);
        record.finish(picked.ok(), self.in_range(tried));
        picked
    }

    /// Returns what [`Balancer::pick`] would return now, and why, without taking a slot or
    /// advancing a round robin.
    pub fn rehearse(
        &self,
        key: PickKey,
        tried: &[usize],
    ) -> (Result<usize, PickError>, PickRecord) {
        let mut rehearsal = Rehearsal::default();
        let picked = self.pick_with(key, tried, &mut rehearsal);
        let mut record = rehearsal.into_record();
        record.finish(picked.ok(), self.in_range(tried));
        (picked, record)
    }

    /// Returns the policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The tried candidates that this balancer has.
    fn in_range<'a>(&self, tried: &'a [usize]) -> impl Iterator<Item = usize> + 'a {
        let count = self.candidates.len();
        tried.iter().copied().filter(move |index| *index < count)
    }

    #[inline]
    fn pick_with(
        &self,
        key: PickKey,
        tried: &[usize],
        recorder: &mut impl PickRecorder,
    ) -> Result<usize, PickError> {
        let picked = match &self.slow_starts {
            None => self.pick_excluding(key, Excluded::tried(tried), recorder),
            Some(slow_starts) => self.pick_in_slow_start(slow_starts, key, tried, recorder),
        };
        picked.ok_or_else(|| self.no_pick_reason(tried))
    }

    /// Returns whether at least one candidate is below its cap now.
    ///
    /// Cheap enough to call before every accept. It scans the candidates only if all of
    /// them have caps and the candidate found last is now at its cap.
    #[inline]
    pub fn has_room(&self) -> bool {
        if self.uncapped {
            return true;
        }
        let seen = self.room_seen.load(Ordering::Relaxed);
        self.candidates.get(seen).is_some_and(Candidate::has_room) || self.pick_with_room()
    }

    /// Returns the share of the picks that each candidate should get over time, in index
    /// order. For `source-hash` it is the share of the slots, as if clients were spread evenly.
    pub fn shares(&self) -> Vec<f64> {
        if let PolicyState::SourceHash(policy) = &self.prepared {
            return policy.shares(self.candidates.len());
        }
        let all: u64 = self.candidates.iter().map(|c| u64::from(c.weight)).sum();
        self.candidates.iter().map(|c| f64::from(c.weight) / all.max(1) as f64).collect()
    }

    /// Returns the candidates in index order.
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// Returns the position of a round robin; `None` for other policies.
    pub fn round_robin_position(&self) -> Option<RoundRobinPosition> {
        self.as_round_robin().map(|(policy, _)| policy.position())
    }

    /// Moves a round robin to `position`, scaled to its own period. Other policies
    /// ignore it.
    pub fn resume_at(&self, position: RoundRobinPosition) {
        if let Some((policy, _)) = self.as_round_robin() {
            policy.resume_at(position);
        }
    }

    #[inline]
    fn pick_excluding(
        &self,
        key: PickKey,
        excluded: Excluded<'_>,
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        let (candidates, tried) = (&*self.candidates, excluded.tried_list());
        let PickKey { client, draw, at } = key;
        match &self.prepared {
            PolicyState::Empty => None,
            PolicyState::RoundRobin(policy) => policy.pick(candidates, draw, tried, recorder),
            PolicyState::LeastConnections(policy) => {
                policy.pick(candidates, draw, excluded, recorder)
            }
            PolicyState::Random(policy) => policy.pick(candidates, draw, tried, recorder),
            PolicyState::TwoChoices(policy) => policy.pick(candidates, draw, excluded, recorder),
            PolicyState::PeakEwma(policy) => policy.pick(candidates, draw, at, excluded, recorder),
            PolicyState::SourceHash(policy) => policy.pick(candidates, client, tried, recorder),
        }
    }

    /// Picks while some candidates are in slow start. If only excluded candidates are
    /// below their caps, one of them gets the session.
    #[cold]
    fn pick_in_slow_start(
        &self,
        slow: &SlowStarts,
        key: PickKey,
        tried: &[usize],
        recorder: &mut impl PickRecorder,
    ) -> Option<usize> {
        let mut draws = DrawStream::new(key.draw);
        let excluded = slow.draw(&mut draws, tried);
        let key = PickKey { draw: draws.next(), ..key };
        self.pick_excluding(key, excluded, recorder).or_else(|| {
            recorder.restart();
            self.pick_excluding(key, Excluded::tried(tried), recorder)
        })
    }

    fn pick_with_room(&self) -> bool {
        let found = self.candidates.iter().position(Candidate::has_room);
        if let Some(index) = found {
            self.room_seen.store(index, Ordering::Relaxed);
        }
        found.is_some()
    }

    fn as_round_robin(&self) -> Option<(&RoundRobin, &[Candidate])> {
        match &self.prepared {
            PolicyState::RoundRobin(policy) => Some((policy, &self.candidates)),
            _ => None,
        }
    }

    #[cold]
    fn no_pick_reason(&self, tried: &[usize]) -> PickError {
        if (0..self.candidates.len()).all(|index| tried.contains(&index)) {
            PickError::Exhausted
        } else {
            PickError::AtCapacity
        }
    }
}

// === impl Candidate ===

impl Candidate {
    #[inline]
    fn try_enter(&self) -> bool {
        self.in_flight.try_enter(self.connections_max)
    }

    #[inline]
    fn has_room(&self) -> bool {
        self.in_flight.has_room(self.connections_max)
    }

    fn is_same_as(&self, other: &Candidate) -> bool {
        Arc::ptr_eq(&self.in_flight, &other.in_flight)
            && Arc::ptr_eq(&self.latency, &other.latency)
            && self.key == other.key
            && self.weight.max(1) == other.weight.max(1)
            && self.connections_max == other.connections_max
            && self.slow_start == other.slow_start
    }
}
