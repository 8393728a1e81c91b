//! Members that only have another name: what this host knows of their addresses continues.
//!
//! Called by `members` when members of a pool leave and join at once. A reload does the same
//! in `configure`. This module adds and removes no member.

use super::backends::BackendEntry;
use super::pools::{PoolId, StartupGrace};
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::health::Observation;
use crate::health::ejection::EjectionState;
use crate::health::probe_detector::ProbeDetector;
use crate::model::BackendAddr;
use crate::table::state::BackendId;
use std::collections::HashMap;
use std::time::Instant;

/// What is known of the addresses of members that leave.
#[derive(Debug, Default)]
pub(super) struct FormerMembers(HashMap<BackendAddr, FormerMember>);

/// A member that leaves.
#[derive(Debug)]
struct FormerMember {
    /// The result of its probes; `None`: no result, or no probes.
    detector: Option<ProbeDetector>,
    /// Its ejection.
    ejection: Option<EjectionState>,
    /// A connect to it has succeeded, or it needs none.
    verified: bool,
    /// It was in rotation, and its slow start was over.
    served: bool,
}

// === impl FormerMember ===

impl FormerMember {
    fn of(entry: &BackendEntry) -> FormerMember {
        let health = &entry.health;
        let is_known = |detector: &&ProbeDetector| detector.observation() != Observation::Unknown;
        FormerMember {
            detector: health.detector.as_ref().filter(is_known).cloned(),
            ejection: health.outlier.is_ejected().then(|| health.outlier.clone()),
            verified: !health.unverified,
            served: entry.served && entry.ramp.is_none(),
        }
    }
}

// === impl ControlState ===

impl ControlState {
    /// Returns what is known of members before they leave.
    pub(super) fn former_members(&self, leaving: &[BackendId]) -> FormerMembers {
        let entries = leaving.iter().filter_map(|id| self.backends.get(*id));
        let known = entries.map(|entry| (entry.spec.address.clone(), FormerMember::of(entry)));
        FormerMembers(known.collect())
    }

    /// Applies to a member that has joined what was known of its address.
    pub(super) fn succeed_former(
        &mut self,
        id: BackendId,
        former: &mut FormerMembers,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let Some(known) = former.0.remove(&entry.spec.address) else { return };
        let pool = entry.pool;
        entry.served = known.served;
        if known.detector.is_some() && entry.health.detector.is_some() {
            (entry.health.detector, entry.health.fails_open) = (known.detector, false);
            self.decided(pool);
        }
        if let Some(ejected) = known.ejection
            && let Some(entry) = self.backends.touch_later(id)
            && let Some(until) = ejected.until().filter(|until| *until > now)
        {
            entry.health.outlier = ejected.for_renamed_backend();
            self.ejections.note(entry);
            self.schedule.set(TimerKind::EjectionEnds(id), until);
        }
        if known.verified {
            self.trust(id);
        }
    }

    /// Records that the pool has had a result.
    pub(super) fn decided(&mut self, pool: PoolId) {
        if let Some(pool) = self.pools.observe(pool) {
            pool.startup = StartupGrace::Decided;
            self.schedule.cancel(TimerKind::GraceEnds(pool.id));
        }
    }
}
