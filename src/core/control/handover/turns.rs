//! Positions of round robins in a handover.
//!
//! Used by `handover`. A pool has one position, or one per tier while sessions spill.

use super::{Controller, Saved, SavedPool};
use crate::balance::RoundRobinPosition;
use crate::balance::tiered::TierBalancers;
use crate::table::PoolTable;
use std::collections::{BTreeMap, HashMap};

/// The position of the lowest tier that serves, and those of all tiers if sessions spill.
pub(super) fn saved_turns(
    table: Option<&PoolTable>,
) -> (Option<RoundRobinPosition>, BTreeMap<u8, RoundRobinPosition>) {
    let balancer = table.and_then(|table| table.balancer.as_ref());
    let spills = balancer.is_some_and(TierBalancers::spills);
    let turns: Vec<_> = balancer.into_iter().flat_map(TierBalancers::positions).collect();
    let lowest = turns.first().map(|(_, turn)| *turn);
    (lowest, turns.into_iter().filter(|_| spills).collect())
}

impl Controller {
    /// Moves the round robins to the saved positions.
    pub(super) fn resume_turns(&self, saved: &Saved) {
        let pools: HashMap<&str, &SavedPool> =
            saved.pools.iter().map(|pool| (&*pool.name, pool)).collect();
        for pool in &self.publisher.table().pools {
            let (Some(saved), Some(balancer)) = (pools.get(&*pool.spec.name), &pool.balancer)
            else {
                continue;
            };
            if let (Some(turn), Some(lowest)) = (saved.turn, balancer.tiers().first()) {
                lowest.balancer.resume_at(turn);
            }
            for (tier, turn) in &saved.tier_turns {
                balancer.resume_at(*tier, *turn);
            }
        }
    }
}
