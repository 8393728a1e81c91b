//! What the whole process has counted, for the next one to count on from.
//!
//! Used by the upgrade on both sides. By name, so that a program with other
//! causes or reasons reads it, too; a worker that the next process does not have
//! adds to its last one. It writes only what [`Counter::carry`] is for.
//!
//! [`Counter::carry`]: tidegate_core::metrics::counters::Counter::carry

use crate::admin::{ReloadCounts, UpgradeCounts};
use crate::heartbeats::SavedReceiver;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use tidegate_core::metrics::counters::{
    LocalErrorKind, LocalErrorPlace, PanicScope, RingEvent, WorkerCounters,
};
use tidegate_core::outcome::{Cause, Phase};

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct HandoverCounts {
    workers: Vec<SavedWorker>,
    /// By the whole process.
    pub(super) rarities: RareCounters,
    /// Where the next process's session numbers start.
    pub(super) session_numbers: u64,
    /// Changed, unchanged, refused.
    reloads: (u64, u64, u64),
    /// Done, failed, refused.
    upgrades: (u64, u64, u64),
    heartbeats: SavedReceiver,
}

/// What the whole process counts of things that hardly ever happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RareCounters {
    /// Lines of the log that were lost.
    pub(crate) log_dropped: u64,
    /// Changes of backends that the log left out.
    pub(crate) unlogged: u64,
    /// Admin connections closed to make room for others.
    pub(crate) admin_crowded: u64,
    /// Times bytes were left with the kernel.
    pub(crate) buffers_refused: u64,
    /// Times operators' intents could not be written to the state directory.
    pub(crate) state_unwritten: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct SavedWorker {
    /// By cause and phase.
    ends: BTreeMap<String, BTreeMap<String, u64>>,
    accepted: u64,
    held_at_cap: u64,
    local_errors: BTreeMap<String, u64>,
    connect_retries: u64,
    queued: u64,
    reports_dropped: u64,
    access_log_dropped: u64,
    ring_events: BTreeMap<String, u64>,
    panics: BTreeMap<String, u64>,
    restarts: u64,
    stalls: u64,
}

// === impl HandoverCounts ===

impl HandoverCounts {
    pub(super) fn save(
        workers: &[Arc<WorkerCounters>],
        control: &WorkerCounters,
        reloads: ReloadCounts,
        upgrades: UpgradeCounts,
        heartbeats: SavedReceiver,
    ) -> HandoverCounts {
        HandoverCounts {
            // The control thread's go as those of one more worker.
            workers: workers
                .iter()
                .map(|worker| SavedWorker::save(worker))
                .chain([SavedWorker::save(control)])
                .collect(),
            rarities: RareCounters::default(),
            session_numbers: 0,
            reloads: (reloads.changed, reloads.unchanged, reloads.refused),
            upgrades: (upgrades.done, upgrades.failed, upgrades.refused),
            heartbeats,
        }
    }

    pub(super) fn reloads(&self) -> ReloadCounts {
        let (changed, unchanged, refused) = self.reloads;
        ReloadCounts { changed, unchanged, refused }
    }

    pub(super) fn upgrades(&self) -> UpgradeCounts {
        let (done, failed, refused) = self.upgrades;
        UpgradeCounts { done, failed, refused }
    }

    pub(super) fn heartbeats(&self) -> &SavedReceiver {
        &self.heartbeats
    }

    /// Has `workers` (at least one) count on; may be called again with something
    /// newer.
    pub(super) fn carry(&self, workers: &[Arc<WorkerCounters>]) {
        let mut sums = vec![SavedWorker::default(); workers.len()];
        for (index, saved) in self.workers.iter().enumerate() {
            sums[index.min(workers.len() - 1)].add(saved);
        }
        for (worker, saved) in workers.iter().zip(&sums) {
            saved.carry(worker);
        }
    }
}

// === impl SavedWorker ===

impl SavedWorker {
    fn save(worker: &WorkerCounters) -> SavedWorker {
        let mut ends: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for (cause, phase) in cells() {
            let total = worker.session_end.cell(cause as usize, phase as usize).get();
            if total > 0 {
                let by_phase = ends.entry(cause.name().to_owned()).or_default();
                by_phase.insert(phase.name().to_owned(), total);
            }
        }
        let errors = local_cells().map(|(error, at)| {
            let total = worker.local_errors.cell(error as usize, at as usize).get();
            (local_key(error, at), total)
        });
        let ring = RingEvent::ALL.map(|event| {
            (event.name().to_owned(), worker.ring_events.cell(event as usize, 0).get())
        });
        SavedWorker {
            ends,
            accepted: worker.accepted.get(),
            held_at_cap: worker.accept_held_at_cap.get(),
            local_errors: errors.collect(),
            connect_retries: worker.connect_retries.get(),
            queued: worker.queued.get(),
            reports_dropped: worker.reports_dropped.get(),
            access_log_dropped: worker.access_log_dropped.get(),
            ring_events: ring.into(),
            panics: PanicScope::ALL
                .map(|ended| (ended.name().to_owned(), worker.panics.cell(ended as usize, 0).get()))
                .into(),
            restarts: worker.restarts.get(),
            stalls: worker.stalls.get(),
        }
    }

    fn add(&mut self, other: &SavedWorker) {
        for (cause, by_phase) in &other.ends {
            for (phase, n) in by_phase {
                let sum = self.ends.entry(cause.clone()).or_default();
                add(sum.entry(phase.clone()).or_default(), *n);
            }
        }
        for (error, n) in &other.local_errors {
            add(self.local_errors.entry(error.clone()).or_default(), *n);
        }
        for (event, n) in &other.ring_events {
            add(self.ring_events.entry(event.clone()).or_default(), *n);
        }
        add(&mut self.accepted, other.accepted);
        add(&mut self.held_at_cap, other.held_at_cap);
        add(&mut self.connect_retries, other.connect_retries);
        add(&mut self.queued, other.queued);
        add(&mut self.reports_dropped, other.reports_dropped);
        add(&mut self.access_log_dropped, other.access_log_dropped);
        for (ended, n) in &other.panics {
            add(self.panics.entry(ended.clone()).or_default(), *n);
        }
        add(&mut self.restarts, other.restarts);
        add(&mut self.stalls, other.stalls);
    }

    fn carry(&self, worker: &WorkerCounters) {
        for (cause, phase) in cells() {
            let by_phase = self.ends.get(cause.name());
            let total = by_phase.and_then(|ends| ends.get(phase.name())).copied();
            let cell = worker.session_end.cell(cause as usize, phase as usize);
            cell.carry(total.unwrap_or_default());
        }
        for (error, at) in local_cells() {
            let total = self.local_errors.get(&local_key(error, at)).copied();
            let cell = worker.local_errors.cell(error as usize, at as usize);
            cell.carry(total.unwrap_or_default());
        }
        for event in RingEvent::ALL {
            let total = self.ring_events.get(event.name()).copied().unwrap_or_default();
            worker.ring_events.cell(event as usize, 0).carry(total);
        }
        worker.accepted.carry(self.accepted);
        // Whoever still has sessions shows them itself: none of them is ours.
        worker.ended.carry(self.accepted);
        worker.accept_held_at_cap.carry(self.held_at_cap);
        worker.connect_retries.carry(self.connect_retries);
        worker.queued.carry(self.queued);
        worker.reports_dropped.carry(self.reports_dropped);
        worker.access_log_dropped.carry(self.access_log_dropped);
        for ended in PanicScope::ALL {
            let total = self.panics.get(ended.name()).copied().unwrap_or_default();
            worker.panics.cell(ended as usize, 0).carry(total);
        }
        worker.restarts.carry(self.restarts);
        worker.stalls.carry(self.stalls);
    }
}

fn cells() -> impl Iterator<Item = (Cause, Phase)> {
    Cause::ALL.into_iter().flat_map(|cause| Phase::ALL.into_iter().map(move |phase| (cause, phase)))
}

fn local_cells() -> impl Iterator<Item = (LocalErrorKind, LocalErrorPlace)> {
    LocalErrorKind::ALL
        .into_iter()
        .flat_map(|kind| LocalErrorPlace::ALL.into_iter().map(move |at| (kind, at)))
}

fn local_key(kind: LocalErrorKind, at: LocalErrorPlace) -> String {
    format!("{} {}", kind.name(), at.name())
}

fn add(sum: &mut u64, n: u64) {
    *sum = sum.saturating_add(n);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(count: usize) -> Vec<Arc<WorkerCounters>> {
        (0..count).map(|_| Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))).collect()
    }

    #[test]
    fn fewer_workers_count_on_from_the_same_sums() {
        let old = workers(3);
        for (n, worker) in (1..).zip(&old) {
            worker.accepted.add(n);
            worker.session_end.cell(2, 3).add(10 * n);
            worker.local_errors.cell(1, 0).add(100 * n);
            worker.ring_events.cell(2, 0).add(1000 * n);
            worker.panics.cell(0, 0).add(1000 * n);
            worker.stalls.add(n);
        }
        let reloads = ReloadCounts { changed: 1, unchanged: 2, refused: 3 };
        let upgrades = UpgradeCounts { done: 4, failed: 5, refused: 6 };
        let heartbeats = SavedReceiver::default();
        let counts = HandoverCounts::save(&old, &workers(1)[0], reloads, upgrades, heartbeats);
        let text = serde_json::to_string(&counts).unwrap();
        let saved: HandoverCounts = serde_json::from_str(&text).unwrap();
        assert_eq!((saved.reloads(), saved.upgrades()), (reloads, upgrades));

        let new = workers(2);
        saved.carry(&new);
        saved.carry(&new);
        new[1].accepted.add(1);
        let accepted: Vec<u64> = new.iter().map(|worker| worker.accepted.get()).collect();
        assert_eq!(accepted, [1, 2 + 3 + 1]);
        assert_eq!(new[1].accepted.get() - new[1].ended.get(), 1, "only its own is open");
        let ends: u64 = new.iter().map(|worker| worker.session_end.cell(2, 3).get()).sum();
        let ring: u64 = new.iter().map(|worker| worker.ring_events.cell(2, 0).get()).sum();
        assert_eq!(ring, 6000);
        let errors: u64 = new.iter().map(|worker| worker.local_errors.cell(1, 0).get()).sum();
        assert_eq!((ends, errors), (60, 600));
        let panics: u64 = new.iter().map(|worker| worker.panics.cell(0, 0).get()).sum();
        let stalls: u64 = new.iter().map(|worker| worker.stalls.get()).sum();
        assert_eq!((panics, stalls), (6000, 6));
    }
}
