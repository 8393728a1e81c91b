//! Pools that use the backends and the probes of another pool: `of` and `role`.
//!
//! Called by `validate` after every pool was read. It gives each such pool a copy of the
//! backends of the other one.

use std::collections::HashMap;
use std::sync::Arc;

use super::pool::{PoolRead, others_join};
use super::{BACKENDS_MAX, tiers};
use crate::diagnose::ProblemCollector;
use crate::file::Section;
use crate::value::{ValueError, did_you_mean_or, shown};
use tidegate_core::model::{Policy, PoolConfig, WhenNoneEligible, Words};

/// Keys of what a pool with `of` takes from the other pool.
const TAKEN: [&str; 4] = ["backend", "discover", "heartbeat", "probe"];

/// Reports keys that a pool with `of` does not take.
pub(super) fn refuse_own(pool: &Section<'_, '_>, of: &str) {
    for key in TAKEN {
        if let Some(place) = pool.key_place(key) {
            let complaint = ValueError::new(format!("a pool with of takes no {key}"));
            let help = format!("it uses that of pool {}; write {key} there", shown(of));
            pool.report.error(place, complaint.help(help));
        }
    }
}

/// Checks `of` and `role` of all pools, and copies backends and probes. `all_pools`: no
/// pool is missing in `pools` because of an error that is reported elsewhere.
pub(super) fn resolve(report: &ProblemCollector<'_>, pools: &mut [PoolRead], all_pools: bool) {
    let places: HashMap<Arc<str>, usize> =
        pools.iter().zip(0..).map(|(pool, at)| (Arc::clone(&pool.model.name), at)).collect();
    let mut backends: usize = pools.iter().map(|pool| pool.model.backends.len()).sum();
    for at in 0..pools.len() {
        let Some(of) = pools[at].model.of.clone() else { continue };
        let place = pools[at].of.clone().unwrap_or(0..0);
        match places.get(&of).map(|base| &pools[*base].model) {
            None if all_pools => {
                let names = pools.iter().map(|pool| &*pool.model.name);
                let help = did_you_mean_or(&of, names, || {
                    "name the pool that has the backends".to_owned()
                });
                let complaint = ValueError::new(format!("there is no pool {}", shown(&of)));
                report.error(place, complaint.help(help));
            }
            None => {}
            Some(base) if base.of.is_some() => {
                let complaint = ValueError::new(format!("pool {} has an of itself", shown(&of)));
                report.error(place, complaint.help("name the pool that has the backends"));
            }
            Some(base) => {
                backends = backends.saturating_add(base.backends.len());
                let (probe, list) = (base.probe.clone(), base.backends.clone());
                let joined = others_join(base);
                enough_slots(report, &pools[at], base);
                let PoolRead { model, tier_places, .. } = &mut pools[at];
                (model.probe, model.backends) = (probe, list);
                if !joined {
                    tiers::without_effect(report, model, tier_places);
                }
            }
        }
        if backends > BACKENDS_MAX {
            let message = format!("more than {BACKENDS_MAX} backends with those of pools with of");
            report.error(pools[at].place.clone(), ValueError::new(message));
            return;
        }
    }
    pools.iter().for_each(|pool| check_role(report, pool));
}

/// Reports a role that no probe finds, and a rule that would ignore the role.
fn check_role(report: &ProblemCollector<'_>, pool: &PoolRead) {
    let (Some(role), Some(place)) = (pool.model.role, pool.role.clone()) else { return };
    let name = role.word();
    let probe = pool.model.probe.as_deref();
    // A reference to an unknown pool is reported already.
    let known = pool.model.of.is_none() || probe.is_some() || !pool.model.backends.is_empty();
    if known && !probe.is_some_and(|probe| probe.kind.finds_roles()) {
        let complaint = ValueError::new(format!("no probe finds the role \"{name}\""));
        let help = "only probes of the kinds redis, postgres (with user) and mysql (with user) \
                    find roles";
        report.error(place, complaint.help(help));
    } else if pool.model.when_none_eligible == WhenNoneEligible::TryAll {
        let message =
            "role with when_none_eligible = \"try-all\" would use backends of other roles";
        report.error(place, ValueError::new(message).help("use \"refuse\""));
    }
}

fn enough_slots(report: &ProblemCollector<'_>, pool: &PoolRead, base: &PoolConfig) {
    let (most, slots) = (base.backends.len(), pool.model.hash_slots);
    if pool.model.balance == Policy::SourceHash && most > slots as usize {
        let message = format!("{most} backends are more than hash_slots ({slots})");
        report.error(pool.place.clone(), ValueError::new(message));
    }
}
