//! The counters of a process, handed over in an upgrade.
//!
//! Used by the old and the new process. Totals are keyed by name, so that a program with
//! other causes or reasons can read them. If the new process has fewer workers, the totals
//! of the surplus workers are added to its last worker. Counters are changed only with
//! [`Counter::carry`].
//!
//! [`Counter::carry`]: tidegate_core::metrics::counters::Counter::carry

use crate::admin::{ReloadCounts, UpgradeCounts};
use crate::heartbeats::SavedReceiver;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use tidegate_core::metrics::counters::{
    Counter, LocalErrorKind, LocalErrorPlace, PanicScope, RingEvent, WorkerCounters,
};
use tidegate_core::outcome::{Cause, Phase};

/// All counters of a process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct HandoverCounts {
    workers: Vec<SavedWorker>,
    /// Counters of the process.
    #[serde(rename = "rarities")]
    pub(super) rare: RareCounters,
    /// First session number of the new process.
    pub(super) session_numbers: u64,
    /// Changed, unchanged, refused.
    reloads: (u64, u64, u64),
    /// Done, failed, refused.
    upgrades: (u64, u64, u64),
    heartbeats: SavedReceiver,
}

/// Counters of rare events, one of each per process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RareCounters {
    /// Dropped log lines.
    pub(crate) log_dropped: u64,
    /// Backend state changes not logged because of the rate limit.
    pub(crate) unlogged: u64,
    /// Admin connections closed to accept newer ones.
    #[serde(rename = "admin_crowded")]
    pub(crate) admin_dropped: u64,
    /// Reads postponed because the cap on buffer memory was reached.
    pub(crate) buffers_refused: u64,
    /// Failed writes of operator intents to the state directory.
    pub(crate) state_unwritten: u64,
}

/// Totals by name.
type Totals = BTreeMap<String, u64>;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct SavedWorker {
    /// By cause and phase.
    ends: BTreeMap<String, Totals>,
    local_errors: Totals,
    ring_events: Totals,
    panics: Totals,
    #[serde(flatten)]
    numbers: SavedNumbers,
}

/// Declares the counters with one number per worker: name in the message, and counter.
macro_rules! saved_numbers {
    ($($name:ident = $counter:ident),+ $(,)?) => {
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(default)]
        struct SavedNumbers {
            $($name: u64),+
        }

        impl SavedNumbers {
            fn save(worker: &WorkerCounters) -> SavedNumbers {
                SavedNumbers { $($name: worker.$counter.get()),+ }
            }

            fn add(&mut self, other: &SavedNumbers) {
                $(add(&mut self.$name, other.$name);)+
            }

            fn carry(&self, worker: &WorkerCounters) {
                $(worker.$counter.carry(self.$name);)+
            }
        }
    };
}

saved_numbers! {
    accepted = accepted,
    held_at_cap = accept_held_at_cap,
    connect_retries = connect_retries,
    queued = queued,
    undecided_waits = undecided_waits,
    reports_dropped = reports_dropped,
    access_log_dropped = access_log_dropped,
    commands_waited = commands_waited,
    helper_failures = helper_failures,
    restarts = restarts,
    stalls = stalls,
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
            // The counters of the control thread are saved as one more worker.
            workers: workers
                .iter()
                .map(|worker| SavedWorker::save(worker))
                .chain([SavedWorker::save(control)])
                .collect(),
            rare: RareCounters::default(),
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

    /// Adds the totals to the counters of `workers`, which must not be empty. A later call
    /// with newer totals replaces the earlier ones.
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
        let mut ends: BTreeMap<String, Totals> = BTreeMap::new();
        for (cause, phase, cell) in end_cells(worker) {
            let total = cell.get();
            if total > 0 {
                let by_phase = ends.entry(cause.name().to_owned()).or_default();
                by_phase.insert(phase.name().to_owned(), total);
            }
        }
        SavedWorker {
            ends,
            local_errors: totals(local_cells(worker)),
            ring_events: totals(ring_cells(worker)),
            panics: totals(panic_cells(worker)),
            numbers: SavedNumbers::save(worker),
        }
    }

    fn add(&mut self, other: &SavedWorker) {
        for (cause, by_phase) in &other.ends {
            add_totals(self.ends.entry(cause.clone()).or_default(), by_phase);
        }
        add_totals(&mut self.local_errors, &other.local_errors);
        add_totals(&mut self.ring_events, &other.ring_events);
        add_totals(&mut self.panics, &other.panics);
        self.numbers.add(&other.numbers);
    }

    fn carry(&self, worker: &WorkerCounters) {
        for (cause, phase, cell) in end_cells(worker) {
            let by_phase = self.ends.get(cause.name());
            let total = by_phase.and_then(|ends| ends.get(phase.name())).copied();
            cell.carry(total.unwrap_or_default());
        }
        carry_totals(local_cells(worker), &self.local_errors);
        carry_totals(ring_cells(worker), &self.ring_events);
        carry_totals(panic_cells(worker), &self.panics);
        self.numbers.carry(worker);
        // The old process reports its open sessions itself. All carried sessions count as
        // ended.
        worker.ended.carry(self.numbers.accepted);
    }
}

fn end_cells(worker: &WorkerCounters) -> impl Iterator<Item = (Cause, Phase, &Counter)> {
    let cell =
        |cause, phase| (cause, phase, worker.session_end.cell(cause as usize, phase as usize));
    Cause::ALL
        .into_iter()
        .flat_map(move |cause| Phase::ALL.into_iter().map(move |phase| cell(cause, phase)))
}

fn local_cells(worker: &WorkerCounters) -> impl Iterator<Item = (String, &Counter)> {
    LocalErrorKind::ALL.into_iter().flat_map(move |kind| {
        LocalErrorPlace::ALL.into_iter().map(move |at| {
            let cell = worker.local_errors.cell(kind as usize, at as usize);
            (format!("{} {}", kind.name(), at.name()), cell)
        })
    })
}

fn ring_cells(worker: &WorkerCounters) -> impl Iterator<Item = (String, &Counter)> {
    let cell = |event: RingEvent| worker.ring_events.cell(event as usize, 0);
    RingEvent::ALL.into_iter().map(move |event| (event.name().to_owned(), cell(event)))
}

fn panic_cells(worker: &WorkerCounters) -> impl Iterator<Item = (String, &Counter)> {
    let cell = |scope: PanicScope| worker.panics.cell(scope as usize, 0);
    PanicScope::ALL.into_iter().map(move |scope| (scope.name().to_owned(), cell(scope)))
}

fn totals<'c>(cells: impl Iterator<Item = (String, &'c Counter)>) -> Totals {
    cells.map(|(name, cell)| (name, cell.get())).collect()
}

fn add_totals(sums: &mut Totals, more: &Totals) {
    for (name, n) in more {
        add(sums.entry(name.clone()).or_default(), *n);
    }
}

fn carry_totals<'c>(cells: impl Iterator<Item = (String, &'c Counter)>, totals: &Totals) {
    for (name, cell) in cells {
        cell.carry(totals.get(&name).copied().unwrap_or_default());
    }
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
    fn counters_survive_an_upgrade_to_fewer_workers() {
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
        assert_eq!(
            new[1].accepted.get() - new[1].ended.get(),
            1,
            "only the session of the new process is open"
        );
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
