//! Session counts in memory that the processes of an upgrade share, so that caps apply
//! to all of them together.
//!
//! Created by `start`, or inherited from the old process. The controller counts in it.
//! An upgrade passes it to the new process.
//!
//! - While two processes share the memory, a thread wakes clients that wait for a slot
//!   that the other process has freed. It also frees the slots of a killed process.
//! - If the memory cannot be allocated, or the old process does not support it, caps use
//!   the periodic reports of the old process.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_core::balance::count::{self, Count, cleared, unit};
use tidegate_core::balance::in_flight::{Counted, Counts, InFlight};
use tidegate_dataplane::accept::wait_queue::SlotWaiters;
use tidegate_net::cells::{self, CELLS_MAX, Memory};
use tidegate_net::clock;

/// Time between two wake-ups of waiting clients. A slot freed by another process is
/// noticed within this time.
const POLL: Duration = Duration::from_millis(5);

/// Wake-ups between two checks whether the other process still runs.
const POLLS_PER_CLEANUP: u32 = 20;

/// A word has a column for each process that can share the memory.
const _: () = assert!(count::COLUMNS == cells::COLUMNS);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct SharedCounts {
    /// `None` if this process counts alone.
    memory: Option<Arc<Memory>>,
    /// The memory is that of the old process.
    taken: bool,
    /// Whether the thread runs.
    watched: Arc<Mutex<bool>>,
    /// Whether the warning about full memory was logged.
    warned: AtomicBool,
}

// === impl SharedCounts ===

impl SharedCounts {
    /// Joins the memory of the old process, or creates new memory.
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
            warned: AtomicBool::new(false),
        }
    }

    /// Returns the memory, for a new process.
    pub(super) fn memory(&self) -> Option<Arc<Memory>> {
        self.memory.clone()
    }

    /// Returns whether the old process counts in this memory.
    pub(super) fn are_taken(&self) -> bool {
        self.taken
    }

    /// Starts the thread that wakes waiting clients, if another process shares the
    /// memory. The thread ends when no other process shares it.
    pub(super) fn watch(&self, waiters: &Arc<SlotWaiters>) {
        let Some(memory) = &self.memory else { return };
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if *watched || !memory.is_shared() {
            return;
        }
        let (memory, waiters, flag) =
            (Arc::clone(memory), Arc::clone(waiters), Arc::clone(&self.watched));
        let named = std::thread::Builder::new().name("shared-counts".to_owned());
        match named.spawn(move || watch(&memory, &waiters, &flag)) {
            Ok(_) => *watched = true,
            Err(error) => {
                tracing::warn!(%error, "cannot start the thread for shared counts; slots freed by the other process are noticed late");
            }
        }
    }
}

fn watch(memory: &Memory, waiters: &SlotWaiters, watched: &Mutex<bool>) {
    let mut polls = 0_u32;
    loop {
        clock::pause(POLL);
        waiters.slot_freed();
        polls = polls.wrapping_add(1);
        if !polls.is_multiple_of(POLLS_PER_CLEANUP) {
            continue;
        }
        if memory.clean(clear) {
            tracing::debug!("another process exited; its slots are free");
            waiters.slot_freed();
        }
        let mut watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
        if !memory.is_shared() {
            *watched = false;
            return;
        }
    }
}

/// Subtracts the slots of a column from a word.
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
                if !self.warned.swap(true, Ordering::Relaxed) {
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

/// Returns the key of a count. Names and addresses contain no NUL.
fn key(whose: Counted<'_>) -> String {
    match whose {
        Counted::Process => "process".to_owned(),
        Counted::Frontend(name) => format!("frontend\0{name}"),
        Counted::Backend { pool, name, address } => format!("backend\0{pool}\0{name}\0{address}"),
    }
}
