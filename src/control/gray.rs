//! Gray backends: reads what workers count of first bytes, and makes suspects.
//!
//! Called by the controller every [`LOOK_INTERVAL`] while some pool of several
//! backends has `slow_first_byte`. The judgement is `health::gray`'s; here
//! counts go in, and the guard is kept: as many backends of a pool as may be
//! ejected at once, and at least one, may be suspect or ejected. It never takes
//! a backend out of service.

use super::schedule::Job;
use super::{Controller, PoolEntry};
use crate::health::gray::{Counts, LOOK_INTERVAL, PoolView, Verdict, Watch};
use crate::table::state::{BackendId, BackendState};
use std::time::{Duration, Instant};

/// `slow_first_byte` where there is somebody to compare with.
pub(super) fn watched(pool: &PoolEntry) -> Option<Duration> {
    let slow = pool.spec.ejection.and_then(|spec| spec.slow_first_byte);
    slow.filter(|_| pool.members.len() > 1)
}

fn counted(state: &BackendState) -> Counts {
    let counters = &state.counters;
    Counts {
        // First, so that what comes between makes nobody wait.
        questions: counters.sum(|c| c.questions.get()),
        answers: counters.sum(|c| c.answers.get()),
        unanswered: counters.sum(|c| c.unanswered.get()),
        answer_log2: counters.sum(|c| c.answer_log2.get()),
    }
}

// === impl Controller ===

impl Controller {
    /// After a reload: whoever is watched no more is no suspect, and looks go on
    /// while somebody is.
    pub(super) fn configure_gray(&mut self, now: Instant) {
        let unwatched = self.pools.iter().filter(|pool| watched(pool).is_none());
        let members: Vec<BackendId> =
            unwatched.flat_map(|pool| pool.members.iter().copied()).collect();
        for id in members {
            self.clear_suspect(id, "its first bytes are not watched any more".to_owned(), now);
            if let Some(entry) = self.backends.get_mut(&id) {
                entry.health.gray = Watch::default();
            }
        }
        if !self.pools.iter().any(|pool| watched(pool).is_some()) {
            self.schedule.cancel(Job::LookForGray);
        } else if !self.schedule.is_set(Job::LookForGray) {
            self.schedule.set(Job::LookForGray, now + LOOK_INTERVAL);
        }
    }

    /// Looks at every backend that is watched.
    pub(super) fn look_for_gray(&mut self, now: Instant) {
        let mut found = Vec::new();
        for pool in &self.pools {
            let Some(slow) = watched(pool) else { continue };
            for id in &pool.members {
                if let Some(entry) = self.backends.get_mut(id) {
                    entry.health.gray.take(counted(&entry.state), now);
                }
            }
            let watches = pool.members.iter().filter_map(|id| self.backends.get(id));
            let view = PoolView::of(watches.map(|entry| &entry.health.gray));
            for id in &pool.members {
                let Some(entry) = self.backends.get_mut(id) else { continue };
                if let Some(verdict) = entry.health.gray.judge(&view, slow, now) {
                    found.push((*id, verdict));
                }
            }
        }
        for (id, verdict) in found {
            match verdict {
                Verdict::Suspect(reason) => self.make_suspect(id, reason, now),
                Verdict::Clear(reason) => self.clear_suspect(id, reason, now),
            }
        }
        self.schedule.set(Job::LookForGray, now + LOOK_INTERVAL);
    }

    fn make_suspect(&mut self, id: BackendId, reason: String, now: Instant) {
        let Some(entry) = self.backends.get(&id) else { return };
        let Some(pool) = self.pool(entry.pool) else { return };
        // One that takes no sessions, or one alone, could not get fewer.
        if !entry.health.takes_many() || !self.guard_view(pool).allows_suspect() {
            return;
        }
        let from = entry.health.observation().name();
        let lasted = now.saturating_duration_since(entry.health.settled_since());
        if let Some(entry) = self.backends.get_mut(&id) {
            entry.health.gray.suspect(now);
            entry.observed_since = now;
        }
        self.record(id, (from, "suspect"), reason, lasted, now);
    }

    fn clear_suspect(&mut self, id: BackendId, reason: String, now: Instant) {
        let Some(entry) = self.backends.get_mut(&id) else { return };
        let from = entry.health.observation().name();
        let Some(since) = entry.health.gray.clear() else { return };
        let to = entry.health.observation().name();
        if from == to {
            // Probes or heartbeats say worse of it, or the same.
            return;
        }
        entry.observed_since = now;
        self.record(id, (from, to), reason, now.saturating_duration_since(since), now);
    }
}
