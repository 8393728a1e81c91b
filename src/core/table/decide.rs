//! Picks that leave a record: what decided, and which members of the pool were passed over.
//!
//! The data plane calls [`PoolTable::pick_recorded`] for each session and turns the record
//! into a [`Decision`]. `daemon` calls [`PoolTable::rehearse`] to say what would happen now.
//! Both run the policies of `balance`; nothing here decides a second time.

use super::routes::RouteNumber;
use super::state::BackendState;
use super::{NoBackend, PoolTable, Reservation};
use crate::balance::tiered::TierBalancers;
use crate::balance::{PickError, PickKey, PickRecord};
use crate::decision::{
    Decision, Figures, Outcome, SKIPPED_NAMED, SkipReason, Skipped, SkippedList, Why,
};
use crate::model::{ClientAddr, FrontendId, PeerAddr, Policy};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which members of a pool serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServingTier {
    /// The eligible members of some tiers, or former backends that stand in for them.
    Eligible,
    /// All members that no operator drains: none is eligible, and the pool is set to
    /// `try-all`.
    FailOpen,
}

/// Where the members of a tier begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TierStart {
    /// The tier.
    pub tier: u8,
    /// Position of its first member in `serving`.
    pub first: usize,
}

/// Members of a pool that are not eligible: the first eight, and how many there are.
#[derive(Debug, Clone, Default)]
pub struct LeftOut {
    named: Vec<Arc<BackendState>>,
    total: u32,
}

/// The session that a pick is for.
#[derive(Debug, Clone, Copy)]
pub struct PickedFor {
    /// Number of the session.
    pub session: u64,
    /// The client.
    pub client: ClientAddr,
    /// Peer of the socket, if a PROXY header announced the client.
    pub peer: Option<PeerAddr>,
    /// Frontend that accepted it.
    pub frontend: FrontendId,
    /// Route that it took.
    pub route: RouteNumber,
    /// Serial of the table.
    pub serial: u64,
    /// Which connect attempt the pick is for, from 1.
    pub attempt: u8,
    /// How long it waited in the pool's queue; `None` if it did not.
    pub waited: Option<Duration>,
    /// Time of the pick.
    pub now: Instant,
    /// The same as wall time, in microseconds since 1970.
    pub wall_micros: u64,
}

/// The result of a pick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Picked {
    /// Position in `serving`.
    pub index: usize,
    /// The session decides a trial.
    pub on_trial: bool,
}

// === impl LeftOut ===

impl LeftOut {
    /// Adds a member; beyond the eighth only the count rises.
    pub fn push(&mut self, backend: &Arc<BackendState>) {
        if self.named.len() < SKIPPED_NAMED {
            self.named.push(Arc::clone(backend));
        }
        self.total += 1;
    }

    /// The members that are named.
    pub fn named(&self) -> &[Arc<BackendState>] {
        &self.named
    }

    /// How many there are.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Whether both name and count the same members.
    pub(super) fn is_same(&self, other: &LeftOut) -> bool {
        self.total == other.total
            && self.named.iter().zip(&other.named).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

/// A member that is not eligible, with the reason at this moment. A member that has become
/// eligible since the table was made has none.
fn skipped(backend: &BackendState, now: Instant) -> Option<Skipped> {
    let (reason, at) = backend.left_out()?;
    let time = match reason {
        SkipReason::Ejected => at.saturating_duration_since(now),
        _ => now.saturating_duration_since(at),
    };
    let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    Some(Skipped { backend: backend.id, reason, seconds })
}

// === impl Picked ===

impl Picked {
    /// Returns the result that a reservation holds.
    pub fn of(reservation: &Reservation) -> Picked {
        Picked { index: reservation.index, on_trial: reservation.is_on_trial() }
    }
}

// === impl PoolTable ===

impl PoolTable {
    /// Picks like [`PoolTable::pick`] and notes in `record` what decided.
    ///
    /// # Errors
    /// No backend could be picked.
    pub fn pick_recorded(
        &self,
        key: PickKey,
        tried: &[usize],
        record: &mut PickRecord,
    ) -> Result<Reservation, NoBackend> {
        if self.balancer.is_none() {
            // No policy runs that would remove the notes of the pick before.
            record.clear();
        }
        self.reserve(|balancer| balancer.pick_recorded(key, tried, record))
    }

    /// Returns what [`PoolTable::pick`] would return now, and why. Takes no slot, advances no
    /// round robin and claims no trial.
    pub fn rehearse(
        &self,
        key: PickKey,
        tried: &[usize],
    ) -> (Result<Picked, NoBackend>, PickRecord) {
        let Some(balancer) = &self.balancer else {
            return (Err(self.without_balancer()), PickRecord::default());
        };
        let (picked, record) = balancer.rehearse(key, tried);
        let picked = picked.map_err(NoBackend::from).map(|index| {
            let on_trial = self.serving[index].in_flight.has_open_trial();
            Picked { index, on_trial }
        });
        (picked, record)
    }

    /// Returns the decision that a pick was, with its record.
    pub fn decision(
        &self,
        session: &PickedFor,
        picked: Option<Picked>,
        record: &PickRecord,
    ) -> Decision {
        let chosen = picked.and_then(|picked| self.serving.get(picked.index));
        let id = |index: usize| self.serving.get(index).map(|backend| backend.id);
        let figures = if picked.is_some() { record.figures().named(id) } else { Figures::None };
        Decision {
            pool: Some(self.id),
            policy: self.spec.balance,
            why: picked.map_or(Why::None, |picked| self.why(session, picked, record)),
            chosen: chosen.map(|backend| backend.id),
            candidates: self.serving.len() as u32,
            tier: picked.and_then(|picked| self.tier_of(picked.index)).unwrap_or(0),
            spilled: picked.is_some() && self.spills(),
            figures,
            skipped: self.skipped(session.now, record),
            ..Decision::without_pool(session)
        }
    }

    /// Returns the tier of the backend at that position in `serving`; `None` if the members
    /// serve whatever their tiers are.
    pub fn tier_of(&self, index: usize) -> Option<u8> {
        self.tiers.iter().rev().find(|start| start.first <= index).map(|start| start.tier)
    }

    /// Returns the tiers that serve, each with its share of the new sessions in per cent. Empty
    /// if no member is eligible. While all members of a lower tier are on trial, the next tier
    /// has the share.
    pub fn tier_shares(&self) -> Vec<(u8, u8)> {
        match (&self.balancer, &*self.tiers) {
            (Some(balancer), [_, ..]) if balancer.spills() => {
                balancer.tiers().iter().map(|one| (one.tier, one.load)).collect()
            }
            (_, [.., last]) => vec![(last.tier, 100)],
            (_, []) => Vec::new(),
        }
    }

    /// Whether sessions spill over several tiers.
    pub fn spills(&self) -> bool {
        self.balancer.as_ref().is_some_and(TierBalancers::spills)
    }

    fn why(&self, session: &PickedFor, picked: Picked, record: &PickRecord) -> Why {
        let is_backup = self.tier_of(picked.index).is_some_and(|tier| tier > 0);
        let others = self.serving.len() as u32 - 1;
        match () {
            () if picked.on_trial => Why::Trial,
            () if session.attempt > 1 => Why::Retry,
            () if session.waited.is_some() => Why::Queue,
            () if self.tier == ServingTier::FailOpen => Why::FailOpen,
            () if is_backup => Why::Backup,
            () if record.passed_over_total() >= others => Why::Only,
            () => Why::of_policy(self.spec.balance),
        }
    }

    /// Candidates that the pick passed over, then members that are not eligible.
    fn skipped(&self, now: Instant, record: &PickRecord) -> SkippedList {
        let mut list = SkippedList::EMPTY;
        for (index, reason) in record.noted() {
            if let Some(backend) = self.serving.get(*index) {
                list.push(Skipped { backend: backend.id, reason: *reason, seconds: 0 });
            }
        }
        // The table leaves out a member until the next table, even if it has become eligible
        // and so has no reason any more.
        let left_out = self.left_out.named();
        left_out.iter().filter_map(|one| skipped(one, now)).for_each(|one| list.push(one));
        let all = record.passed_over_total().saturating_add(self.left_out.total());
        list.count_more(all.saturating_sub(list.total()));
        list
    }
}

// === impl Decision ===

impl Decision {
    /// The decision about a session that was rejected before a pool was asked.
    pub fn without_pool(session: &PickedFor) -> Decision {
        Decision {
            session: session.session,
            at_micros: session.wall_micros,
            serial: session.serial,
            client: session.client,
            peer: session.peer,
            frontend: session.frontend,
            route: session.route.position().unwrap_or(0),
            pool: None,
            policy: Policy::WeightedRoundRobin,
            why: Why::None,
            chosen: None,
            candidates: 0,
            tier: 0,
            spilled: false,
            figures: Figures::None,
            skipped: SkippedList::EMPTY,
            attempt: session.attempt,
            waited_micros: session.waited.map_or(0, micros),
            outcome: Outcome::default(),
        }
    }
}

impl From<PickError> for NoBackend {
    fn from(error: PickError) -> NoBackend {
        match error {
            PickError::Exhausted => NoBackend::Exhausted,
            PickError::AtCapacity => NoBackend::AtCapacity,
        }
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests;
