//! Picking a backend: every policy, lock-free, weighted.
//!
//! A `Balancer` is built by `core::table::build` for one tier of one pool and is
//! immutable but for atomics; workers call [`Balancer::pick`] through the table
//! they loaded. It does no I/O, reads no clock and draws no randomness of its
//! own: the draw comes in.
//!
//! # What every policy keeps to
//!
//! - A pick raises the chosen one's in-flight count by the same
//!   compare-and-swap that enforces its cap.
//! - A candidate that is tried or at its cap is passed over; a pick fails only
//!   after every candidate was looked at.
//! - A candidate in its slow start gets at most its share of the picks while others
//!   have room, whatever the loads are.
//! - Every pick is bounded: a handful of quick looks, then at most a few scans
//!   over the candidates.

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
mod round_robin;
mod scan;
mod slow_start;
mod smooth_sequence;
mod source_hash;
pub mod trial;
mod two_choices;

use crate::balance::random_stream::DrawStream;
use crate::model::{HASH_SLOTS, Policy};
use crossbeam::utils::CachePadded;
use in_flight::InFlight;
use latency::Latency;
use least_connections::LeastConnections;
use peak_ewma::PeakEwma;
use random::Random;
use round_robin::RoundRobin;
use slow_start::{Passed, SlowStarts};
use source_hash::SourceHash;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use two_choices::TwoChoices;

/// One backend a balancer may choose.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Canonical name (`address` text): orders the Maglev table so that every
    /// machine computes the same one.
    pub key: Arc<str>,
    /// Effective weight, at least 1.
    pub weight: u32,
    /// Cap on `in_flight`; 0 means none.
    pub connections_max: u32,
    /// It is in its slow start: its share of the picks is at most that of its
    /// weight, however little load it has.
    pub slow_start: bool,
    /// Shared by all workers and all tables.
    pub in_flight: Arc<InFlight>,
    /// Likewise; read by `peak-ewma` alone.
    pub latency: Arc<Latency>,
}

/// What one pick depends on besides the candidates.
#[derive(Debug, Clone, Copy)]
pub struct PickKey {
    /// The client's address (hashed by `source-hash`).
    pub client: IpAddr,
    /// Fresh random bits. They are mixed before use, so a counter that starts
    /// at random will do.
    pub draw: u64,
    /// The time of the pick, in milliseconds of `net::clock::millis`
    /// (`peak-ewma` fades its estimates by it).
    pub at: u64,
}

/// Why no candidate was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PickError {
    /// Every candidate was tried already (or there is none).
    Exhausted,
    /// Some candidate is untried but all of those are at their cap.
    AtCapacity,
}

/// A prepared policy over one tier of one pool.
#[derive(Debug)]
pub struct Balancer {
    policy: Policy,
    /// Slots of the Maglev table.
    hash_slots: u32,
    candidates: Box<[Candidate]>,
    prepared: PolicyState,
    /// For the policies that compare loads, while some candidate starts slowly.
    slow_starts: Option<SlowStarts>,
    /// Whether some candidate has no cap: then there is always room.
    uncapped: bool,
    /// Where there was room last.
    room_seen: CachePadded<AtomicUsize>,
}

/// How far a round robin has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RoundRobinPosition {
    /// Below the period.
    pub place: u64,
    /// Picks after which it repeats itself.
    pub period: u64,
}

/// What each policy makes ahead of time.
#[derive(Debug)]
enum PolicyState {
    /// No candidates, whatever the policy.
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
    /// Prepares `policy` over `candidates` (each with a weight of at least 1).
    /// `previous` is the balancer this one replaces in the same pool: a round
    /// robin goes on from its relative position.
    pub fn new(
        policy: Policy,
        candidates: Vec<Candidate>,
        previous: Option<&Balancer>,
    ) -> Balancer {
        Balancer::of_pool(policy, candidates, HASH_SLOTS, previous)
    }

    /// The same for a pool with that `hash_slots` (a prime): `source-hash` alone
    /// uses it. The size of its table never follows the number of backends.
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

    /// Whether [`Balancer::of_pool`] with these arguments would give a balancer
    /// that does the same as this one: then this one can simply stay.
    pub fn can_reuse_for(&self, policy: Policy, candidates: &[Candidate], hash_slots: u32) -> bool {
        self.policy == policy
            && (policy != Policy::SourceHash || self.hash_slots == hash_slots)
            && self.candidates.len() == candidates.len()
            && self.candidates.iter().zip(candidates).all(|(a, b)| a.is_same_as(b))
    }

    /// Chooses a candidate that is not in `tried` and raises its in-flight
    /// count within its cap. Gives its index; whoever asked lowers the count
    /// exactly once.
    #[inline]
    pub fn pick(&self, key: PickKey, tried: &[usize]) -> Result<usize, PickError> {
        let picked = match &self.slow_starts {
            None => self.pick_passing(key, Passed::over(tried)),
            Some(slow_starts) => self.pick_slowly(slow_starts, key, tried),
        };
        picked.ok_or_else(|| self.no_pick_reason(tried))
    }

    /// Whether some candidate is below its cap at this moment. Cheap enough
    /// to ask before every accept: it looks at every candidate only when all
    /// have a cap and where there was room last there is none now.
    #[inline]
    pub fn has_room(&self) -> bool {
        if self.uncapped {
            return true;
        }
        let seen = self.room_seen.load(Ordering::Relaxed);
        self.candidates.get(seen).is_some_and(Candidate::has_room) || self.pick_with_room()
    }

    /// The candidates, in the order of their indices.
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// Where a round robin has come to; `None` for other policies.
    pub fn round_robin_position(&self) -> Option<RoundRobinPosition> {
        self.as_round_robin().map(|(policy, _)| policy.position())
    }

    /// Has a round robin go on from there, scaled to its own period.
    pub fn resume_at(&self, turn: RoundRobinPosition) {
        if let Some((policy, _)) = self.as_round_robin() {
            policy.resume_at(turn);
        }
    }

    #[inline]
    fn pick_passing(&self, key: PickKey, passed: Passed<'_>) -> Option<usize> {
        let candidates = &*self.candidates;
        let PickKey { client, draw, at } = key;
        match &self.prepared {
            PolicyState::Empty => None,
            PolicyState::RoundRobin(policy) => policy.pick(candidates, draw, passed.tried()),
            PolicyState::LeastConnections(policy) => policy.pick(candidates, draw, passed),
            PolicyState::Random(policy) => policy.pick(candidates, draw, passed.tried()),
            PolicyState::TwoChoices(policy) => policy.pick(candidates, draw, passed),
            PolicyState::PeakEwma(policy) => policy.pick(candidates, draw, at, passed),
            PolicyState::SourceHash(policy) => policy.pick(candidates, client, passed.tried()),
        }
    }

    /// The same while some candidates start slowly. Where only those that it passes
    /// over have room, one of them gets the session.
    #[cold]
    fn pick_slowly(&self, slow: &SlowStarts, key: PickKey, tried: &[usize]) -> Option<usize> {
        let mut draws = DrawStream::new(key.draw);
        let passed = slow.draw(&mut draws, tried);
        let key = PickKey { draw: draws.next(), ..key };
        self.pick_passing(key, passed).or_else(|| self.pick_passing(key, Passed::over(tried)))
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
