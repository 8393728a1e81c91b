//! Model of settling pools as documented: the stand-ins, and when settling ends.

use super::model::{Model, ModelBackend, ModelPool};
use std::collections::{BTreeSet, HashMap};
use std::time::Instant;
use tidegate_core::health::{Intent, Observation};
use tidegate_core::model::Config;
use tidegate_core::table::state::BackendId;

impl ModelPool {
    /// Whether the pool is not settling.
    pub(crate) fn is_settled(&self) -> bool {
        let probed = self.probed();
        let undecided = |b: &ModelBackend| {
            b.observation == Observation::Unknown
                && b.intent == Intent::Ready
                && b.ejected_until.is_none()
                && !b.eligible(probed)
        };
        self.backends.iter().any(|b| b.eligible(probed)) || !self.backends.iter().any(undecided)
    }
}

impl Model {
    pub(crate) fn end_settling(&mut self, now: Instant) {
        let cut: Vec<BackendId> = self
            .leaving
            .iter()
            .filter(|b| b.cut_at.is_some_and(|at| at <= now))
            .map(|b| b.id)
            .collect();
        for pool in &mut self.pools {
            pool.settling.take_if(|(until, _)| *until <= now);
            pool.settling.iter_mut().for_each(|(_, ids)| ids.retain(|id| !cut.contains(id)));
        }
    }

    /// Returns the backends in rotation, by pool.
    pub(crate) fn former(&self) -> HashMap<String, Vec<BackendId>> {
        let of = |pool: &ModelPool| {
            let serving = pool.backends.iter().filter(|b| b.eligible(pool.probed())).map(|b| b.id);
            let stand_ins = pool.settling.iter().flat_map(|(_, ids)| ids.iter().copied());
            (pool.spec.name.to_string(), serving.chain(stand_ins).collect())
        };
        self.pools.iter().map(of).collect()
    }

    pub(crate) fn begin_settling(
        &mut self,
        config: &Config,
        former: &HashMap<String, Vec<BackendId>>,
        now: Instant,
    ) {
        let leaving: Vec<BackendId> = self.leaving.iter().map(|b| b.id).collect();
        for pool in &mut self.pools {
            let before = pool.settling.take();
            if pool.is_settled() {
                continue;
            }
            let name = pool.spec.name.to_string();
            let leads_here = config.frontends.iter().filter(|f| *f.pool == *name);
            let mut names: BTreeSet<&String> =
                leads_here.filter_map(|f| self.routes.get(&*f.name)).collect();
            names.insert(&name);
            let ids = names.into_iter().filter_map(|name| former.get(name)).flatten();
            let ids = ids.filter(|id| leaving.contains(id)).copied().collect();
            let until = before.map_or(now + pool.spec.startup_grace, |(until, _)| until);
            pool.settling = Some((until, ids));
        }
        let routes = config.frontends.iter().map(|f| (f.name.to_string(), f.pool.to_string()));
        self.routes = routes.collect();
    }
}
