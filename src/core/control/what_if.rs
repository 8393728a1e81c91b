//! Pools as they would be with a backend removed or with another weight.
//!
//! `daemon` calls [`Controller::what_if`] for `tidegate explain --without` and `--with`, and
//! builds the tables on another thread. Nothing here publishes a table or changes a backend.

use super::publish::BackendTableState;
use super::{Controller, OperatorError};
use crate::model::BackendId;
use crate::table::build::{PoolBuild, PoolInput};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

/// A change of one backend that a question assumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WhatIf {
    /// Pool name.
    pub pool: String,
    /// Backend name.
    pub backend: String,
    /// The change.
    pub change: AssumedChange,
}

/// What a question assumes about a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AssumedChange {
    /// It is not eligible.
    Excluded,
    /// This is its configured weight.
    Weight(u16),
}

/// The pools that a question changes.
#[derive(Debug, Default)]
pub struct AssumedPools {
    /// One build per changed pool. Each replaces the pool's published part.
    pub builds: Vec<PoolBuild>,
    /// The backends that are excluded.
    pub excluded: Vec<BackendId>,
}

/// A change that names an unknown pool or backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownAssumption {
    /// The change.
    pub assumed: WhatIf,
    /// What is unknown.
    pub error: OperatorError,
}

// === impl Controller ===

impl Controller {
    /// Returns builds of the pools that `changes` concern, as they are published except for
    /// these changes. The last of several weights of a backend applies.
    ///
    /// # Errors
    /// A pool or a backend does not exist.
    pub fn what_if(&self, changes: &[WhatIf]) -> Result<AssumedPools, UnknownAssumption> {
        let mut inputs: BTreeMap<usize, PoolInput> = BTreeMap::new();
        let mut excluded = Vec::new();
        for assumed in changes {
            let unknown = |error| UnknownAssumption { assumed: assumed.clone(), error };
            let id = self.state.find_backend(&assumed.pool, &assumed.backend).map_err(unknown)?;
            let pool = self.state.pools.named(&assumed.pool);
            let place = pool.and_then(|pool| self.state.pools.place(pool.id));
            let place = place.ok_or_else(|| unknown(OperatorError::UnknownPool))?;
            let input = match inputs.entry(place) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let published = self.published_input(place);
                    entry.insert(published.ok_or_else(|| unknown(OperatorError::UnknownPool))?)
                }
            };
            self.assume(input, id, assumed.change);
            if assumed.change == AssumedChange::Excluded {
                excluded.push(id);
            }
        }
        let table = self.publisher.table();
        let builds = inputs.into_values().map(|input| {
            let previous = table.pools.iter().find(|pool| pool.id == input.id).cloned();
            PoolBuild { input, previous }
        });
        Ok(AssumedPools { builds: builds.collect(), excluded })
    }

    /// Returns the input of the published part of the pool at this position.
    fn published_input(&self, place: usize) -> Option<PoolInput> {
        let pool = self.state.pools.at(place)?;
        let entries = pool.members().iter().filter_map(|id| self.state.backends.get(*id));
        Some(PoolInput {
            id: pool.id,
            spec: Arc::clone(&pool.spec),
            backends: entries.map(|entry| entry.published.input(entry)).collect(),
            stand_ins: self.state.stand_ins_of(pool),
            undecided: pool.settling().is_some(),
        })
    }

    fn assume(&self, input: &mut PoolInput, id: BackendId, change: AssumedChange) {
        let Some(backend) = input.backends.iter_mut().find(|one| one.state.id == id) else {
            return;
        };
        match change {
            AssumedChange::Excluded => {
                (backend.eligible, backend.in_service) = (false, false);
                input.stand_ins.retain(|one| one.state.id != id);
            }
            AssumedChange::Weight(weight) => {
                let entry = self.state.backends.get(id);
                let pool = entry.and_then(|entry| self.state.pool(entry.pool));
                if let Some((entry, pool)) = entry.zip(pool) {
                    backend.effective_weight = BackendTableState::weight_if(entry, pool, weight);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::ControlEvent;
    use crate::health::Intent;
    use crate::model::{BackendAddr, BackendConfig, Backups, Policy, PoolConfig, Tiers};
    use crate::table::PoolTable;
    use crate::testing;
    use std::net::{IpAddr, Ipv4Addr};

    /// A controller with one pool of random picks, whose backends `a`, `b`, ... have these tiers.
    fn pool_of(tiers: &[u8], change: impl Fn(PoolConfig) -> PoolConfig) -> Controller {
        let backend = |(place, tier): (usize, &u8)| BackendConfig {
            name: String::from(char::from(b'a' + place as u8)).into(),
            address: BackendAddr::Tcp(([127, 0, 0, 1], place as u16 + 1).into()),
            weight: 1,
            tier: *tier,
            connections_max: 0,
        };
        let backends = tiers.iter().enumerate().map(backend).collect();
        let pool = PoolConfig { balance: Policy::Random, backends, ..testing::pool("web") };
        configured(change(pool))
    }

    fn configured(pool: PoolConfig) -> Controller {
        let frontends = vec![testing::frontend("in", 80, &pool)];
        let mut controller = Controller::new(1, 1);
        let config = Arc::new(testing::config(frontends, vec![Arc::new(pool)]));
        controller.apply(ControlEvent::Configure(config), tidegate_net::clock::now());
        controller
    }

    fn controller(balance: Policy) -> Controller {
        let backend = |(name, port): (&str, u16)| BackendConfig {
            name: name.into(),
            address: BackendAddr::Tcp(([127, 0, 0, 1], port).into()),
            weight: 1,
            tier: 0,
            connections_max: 0,
        };
        let backends = [("a", 1), ("b", 2), ("c", 3)].map(backend).to_vec();
        configured(PoolConfig { balance, backends, ..testing::pool("web") })
    }

    fn assumed(controller: &Controller, backend: &str, change: AssumedChange) -> Arc<PoolTable> {
        let what = WhatIf { pool: "web".into(), backend: backend.into(), change };
        let mut assumed = controller.what_if(&[what]).unwrap();
        assumed.builds.pop().unwrap().run().table
    }

    /// The share of each backend of a forecast, by name, in per cent.
    fn shares(pool: &PoolTable, client: IpAddr) -> Vec<(String, u32)> {
        let forecast = pool.forecast(client, 0, 7);
        let name = |index: usize| pool.serving[index].name.to_string();
        let share = |count: u32| (f64::from(count) / f64::from(forecast.draws) * 100.0).round();
        let mut shares: Vec<_> = match forecast.draws {
            0 => vec![(name(forecast.picked.unwrap().index), 100)],
            _ => forecast.shares.iter().map(|(i, n)| (name(*i), share(*n) as u32)).collect(),
        };
        shares.sort();
        shares
    }

    #[test]
    fn excluded_backend_gets_no_pick_of_any_policy() {
        let client = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
        for balance in Policy::ALL {
            let controller = controller(balance);
            let table = controller.current_table();
            let pool = assumed(&controller, "b", AssumedChange::Excluded);
            assert!(pool.serving.iter().all(|backend| &*backend.name != "b"), "{balance:?}");
            let shares = shares(&pool, client);
            assert!(shares.iter().all(|(name, _)| name != "b"), "{balance:?}: {shares:?}");
            assert_eq!(shares.iter().map(|(_, share)| share).sum::<u32>(), 100, "{balance:?}");
            // Nothing is published, and the published pool is as before.
            assert!(Arc::ptr_eq(&controller.current_table(), &table));
            assert_eq!(table.pools[0].serving.len(), 3);
        }
    }

    #[test]
    fn weight_changes_the_shares_of_policies_that_draw() {
        let client = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
        let random = controller(Policy::Random);
        let pool = assumed(&random, "b", AssumedChange::Weight(8));
        let shares = shares(&pool, client);
        let share = |name: &str| shares.iter().find(|(one, _)| one == name).unwrap().1;
        assert!(share("b").abs_diff(80) <= 2, "{shares:?}");
        let turns = controller(Policy::WeightedRoundRobin);
        let pool = assumed(&turns, "b", AssumedChange::Weight(8));
        let (_, position) = pool.balancer.as_ref().unwrap().positions().next().unwrap();
        assert_eq!(position.period, 10);
    }

    #[test]
    fn source_hash_without_a_backend_moves_only_its_clients() {
        let controller = controller(Policy::SourceHash);
        let pool = assumed(&controller, "b", AssumedChange::Excluded);
        let before = &controller.current_table().pools[0];
        let chosen = |pool: &PoolTable, client: IpAddr| shares(pool, client).remove(0).0;
        let mut moved = 0;
        for last in 0..=255 {
            let client = IpAddr::V4(Ipv4Addr::new(10, 0, 0, last));
            let (was, is) = (chosen(before, client), chosen(&pool, client));
            assert!(was == "b" || was == is, "{client}: {was} -> {is}");
            moved += usize::from(was == "b");
        }
        assert!(moved > 40, "{moved}");
    }

    #[test]
    fn next_backup_takes_over_without_the_one_that_serves() {
        let client = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
        for (rule, expected) in [(Backups::One, "c"), (Backups::All, "cd")] {
            let mut controller =
                pool_of(&[0, 1, 1, 1], |pool| PoolConfig { backups: rule, ..pool });
            let now = tidegate_net::clock::now();
            controller.set_intent("web", "a", Intent::Draining, now).unwrap();
            let pool = assumed(&controller, "b", AssumedChange::Excluded);
            let names: String = shares(&pool, client).into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, expected, "{rule:?}");
            assert_eq!(pool.tier_shares(), [(1, 100)]);
        }
    }

    #[test]
    fn shares_of_the_tiers_change_without_a_backend() {
        let client = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
        let spill = |pool| PoolConfig { tiers: Tiers::Spill, ..pool };
        let controller = pool_of(&[0, 0, 1, 1], spill);
        assert_eq!(controller.current_table().pools[0].tier_shares(), [(0, 100)]);
        let pool = assumed(&controller, "b", AssumedChange::Excluded);
        assert_eq!(pool.tier_shares(), [(0, 70), (1, 30)]);
        let shares = shares(&pool, client);
        let share = |name: &str| shares.iter().find(|(one, _)| one == name).unwrap().1;
        assert!(share("a").abs_diff(70) <= 2 && share("c").abs_diff(15) <= 2, "{shares:?}");
        // Nothing of tier 1 is left out: tier 0 carries all.
        let pool = assumed(&controller, "c", AssumedChange::Excluded);
        assert_eq!((pool.tier_shares(), pool.left_out.total()), (vec![(0, 100)], 0));
    }

    #[test]
    fn unknown_names_are_reported_with_the_change() {
        let controller = controller(Policy::Random);
        let ask = |pool: &str, backend: &str| {
            let change = AssumedChange::Excluded;
            let what = WhatIf { pool: pool.into(), backend: backend.into(), change };
            controller.what_if(&[what]).map(drop).unwrap_err().error
        };
        assert_eq!(ask("x", "a"), OperatorError::UnknownPool);
        assert_eq!(ask("web", "x"), OperatorError::UnknownBackend);
    }
}
