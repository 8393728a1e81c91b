//! The counts that caps are compared with, in memory that the processes of an upgrade
//! share.
//!
//! Made at the start, or taken from the process before; given to the controller for
//! what it is to count, and to the next process. While another process has a part in
//! it, a thread wakes who waits for a slot that the other gives back, and gives back
//! what a process held that was killed. Nothing is shared where the process before knows
//! nothing of it, or there is no memory: its reports stand in, as they come.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_core::balance::count::{self, Count, cleared, unit};
use tidegate_core::balance::in_flight::{Counted, Counts, InFlight};
use tidegate_dataplane::accept::wait_queue::SlotWaiters;
use tidegate_net::cells::{self, CELLS_MAX, Memory};
use tidegate_net::clock;

/// How long a slot that another process gives back may stay unnoticed.
const LOOK: Duration = Duration::from_millis(5);

/// Every so many looks: does the other process live?
const LOOKS_A_CLEANING: u32 = 20;

/// A word has room for every column the file may give out.
const _: () = assert!(count::COLUMNS == cells::COLUMNS);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct SharedCounts {
    /// `None` where this process counts alone.
    memory: Option<Arc<Memory>>,
    /// It is the one of the process before.
    taken: bool,
    /// The thread runs.
    watched: Arc<Mutex<bool>>,
    /// It was said that there are too many.
    said: AtomicBool,
}

// === impl SharedCounts ===

impl SharedCounts {
    /// Goes on with the counts in that file, or begins with its own.
    pub(super) fn new(before: Option<OwnedFd>) -> SharedCounts {
        let joined = before.map(Memory::join);
        if let Some(Err(error)) = &joined {
            tracing::warn!(%error, "cannot share counts with the old process; caps use its reports until it exits");
        }
        let taken = matches!(joined, Some(Ok(_)));
        let memory = match joined {
            Some(Ok(memory)) => Some(memory),
            _ => Memory::create()
                .inspect_err(|error| {
                    tracing::warn!(%error, "cannot allocate shared counts; caps use reports after an upgrade");
                })
                .ok(),
        };
        SharedCounts {
            memory: memory.map(Arc::new),
            taken,
            watched: Arc::default(),
            said: AtomicBool::new(false),
        }
    }

    /// For the next process.
    pub(super) fn memory(&self) -> Option<Arc<Memory>> {
        self.memory.clone()
    }

    /// Whether the process before counts here.
    pub(super) fn are_taken(&self) -> bool {
        self.taken
    }

    /// Looks after what another process gives back, until there is none.
    pub(super) fn watch(&self, gate: &Arc<SlotWaiters>) {
        let Some(memory) = &self.memory else { return };
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if *watched || !memory.is_shared() {
            return;
        }
        let (memory, gate, flag) =
            (Arc::clone(memory), Arc::clone(gate), Arc::clone(&self.watched));
        let named = std::thread::Builder::new().name("shared-counts".to_owned());
        match named.spawn(move || watch(&memory, &gate, &flag)) {
            Ok(_) => *watched = true,
            Err(error) => {
                tracing::warn!(%error, "cannot start the thread for shared counts; slots freed by the other process are noticed late");
            }
        }
    }
}

fn watch(memory: &Memory, gate: &SlotWaiters, watched: &Mutex<bool>) {
    let mut looks = 0_u32;
    loop {
        clock::pause(LOOK);
        gate.slot_freed();
        looks = looks.wrapping_add(1);
        if !looks.is_multiple_of(LOOKS_A_CLEANING) {
            continue;
        }
        if memory.clean(clear) {
            tracing::debug!("another process exited; its slots are free");
            gate.slot_freed();
        }
        let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
        if !memory.is_shared() {
            *watched = false;
            return;
        }
    }
}

/// Takes what a column holds off a word.
fn clear(word: &AtomicU64, column: u32) {
    let cleared = |word| Some(cleared(word, column));
    let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, cleared);
}

impl Counts for SharedCounts {
    fn count(&self, whose: Counted<'_>) -> InFlight {
        let Some(memory) = &self.memory else { return InFlight::new() };
        match memory.count(key(whose).as_bytes()) {
            Some((word, hold)) => {
                InFlight::counting(Count::shared(word, hold), unit(memory.column()))
            }
            None => {
                if !self.said.swap(true, Ordering::Relaxed) {
                    let max = CELLS_MAX;
                    tracing::warn!(
                        max,
                        "shared counts are full; further caps use reports after an upgrade"
                    );
                }
                InFlight::new()
            }
        }
    }
}

/// No part of a name or an address holds a zero.
fn key(whose: Counted<'_>) -> String {
    match whose {
        Counted::Process => "process".to_owned(),
        Counted::Frontend(name) => format!("frontend\0{name}"),
        Counted::Backend { pool, name, address } => format!("backend\0{pool}\0{name}\0{address}"),
    }
}
