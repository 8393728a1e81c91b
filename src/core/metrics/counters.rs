//! Single-writer counters: a plain load, add and store instead of a locked
//! read-modify-write.
//!
//! Each worker owns one shard of every counter set, on cache lines of its own;
//! the admin API sums the shards. A counter never goes down.

use crate::metrics::progress::WorkerProgress;
use crossbeam::utils::CachePadded;
#[cfg(tidegate_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(tidegate_loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// A count with exactly one writing thread and any number of readers, on top of
/// what was counted before the process took over from another.
#[derive(Debug, Default)]
pub struct Counter {
    own: AtomicU64,
    /// Written by the control thread alone.
    before: AtomicU64,
}

impl Counter {
    /// Adds `n`. Only the owning thread may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.own.store(self.own.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The count as of some recent moment.
    #[inline]
    pub fn get(&self) -> u64 {
        self.before.load(Ordering::Relaxed).wrapping_add(self.own.load(Ordering::Relaxed))
    }

    /// Says what a predecessor has counted; replaces what was said before. Any
    /// one thread may call this, beside the owning one.
    pub fn carry(&self, before: u64) {
        self.before.store(before, Ordering::Relaxed);
    }
}

/// A level with exactly one writing thread: goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// It is `level` now. Only the owning thread may call this.
    #[inline]
    pub fn set(&self, level: u64) {
        self.0.store(level, Ordering::Relaxed);
    }

    /// The level as of some recent moment.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A fixed table of counters, such as cause by phase.
#[derive(Debug)]
pub struct CounterTable {
    columns: usize,
    cells: Box<[Counter]>,
}

impl CounterTable {
    /// All zero.
    pub fn new(rows: usize, columns: usize) -> CounterTable {
        CounterTable { columns, cells: (0..rows * columns).map(|_| Counter::default()).collect() }
    }

    /// The cell of that row and column; both are below the sizes given to `new`.
    #[inline]
    pub fn cell(&self, row: usize, column: usize) -> &Counter {
        &self.cells[row * self.columns + column]
    }
}

/// One `T` for each worker, each on its own cache lines.
#[derive(Debug)]
pub struct Sharded<T>(Box<[CachePadded<T>]>);

impl<T> Sharded<T> {
    /// One shard a worker.
    pub fn new(workers: usize, make: impl Fn() -> T) -> Sharded<T> {
        Sharded((0..workers).map(|_| CachePadded::new(make())).collect())
    }

    /// The shard that `worker` alone writes.
    #[inline]
    pub fn of(&self, worker: usize) -> &T {
        &self.0[worker]
    }

    /// The sum over all workers.
    pub fn sum(&self, read: impl Fn(&T) -> u64) -> u64 {
        self.0.iter().map(|shard| read(shard)).fold(0, u64::wrapping_add)
    }

    /// Every shard, in worker order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|shard| &**shard)
    }
}

/// What one worker counts besides its frontends and backends.
#[derive(Debug)]
pub struct WorkerCounters {
    /// Ended sessions: row `core::outcome::Cause`, column `core::outcome::Phase`.
    pub session_end: CounterTable,
    /// Connections taken off the listen queues.
    pub accepted: Counter,
    /// Sessions that have ended, refused ones included.
    pub ended: Counter,
    /// Times a listener stopped accepting because a cap was reached.
    pub accept_held_at_cap: Counter,
    /// Sessions that had to wait in line for a backend.
    pub queued: Counter,
    /// Probes that had to wait for others to end.
    pub probes_waited: Counter,
    /// Sessions that had to wait for their pool's first verdict.
    pub undecided_waits: Counter,
    /// Trouble of our own: row [`LocalErrorKind`], column [`LocalErrorPlace`].
    pub local_errors: CounterTable,
    /// Connect attempts beyond a session's first.
    pub connect_retries: Counter,
    /// Reports to the control thread that found its queue full.
    pub reports_dropped: Counter,
    /// Access-log lines that found their queue full.
    pub access_log_dropped: Counter,
    /// What went on inside the worker's ring (row [`RingEvent`]).
    pub ring_events: CounterTable,
    /// Panics (row [`PanicScope`]).
    pub panics: CounterTable,
    /// Times the worker began anew after a panic.
    pub restarts: Counter,
    /// Times its loop did not turn; written by the control thread.
    pub stalls: Counter,
    /// Whether its loop turns.
    pub pulse: CachePadded<WorkerProgress>,
    /// Bytes of the ring's pool that hold what was received and not yet sent.
    pub ring_held: Gauge,
}

/// What a panic was the end of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PanicScope {
    /// One session.
    Session,
    /// The worker's thread, and every session on it.
    Worker,
}

/// What goes on inside a ring beside moving bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RingEvent {
    /// Completions had outgrown their queue.
    Overflow,
    /// A receive found no buffer.
    Starved,
    /// A send came back short and was resumed.
    Resumed,
    /// A completion named an operation long over.
    Stray,
    /// The kernel's flag for deferred work stood for none.
    StaleFlag,
    /// Operations of an ended session did not come back: its sockets were reset.
    TornDown,
}

/// Trouble of our own, never blamed on a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum LocalErrorKind {
    /// EMFILE, ENFILE.
    Descriptors,
    /// EADDRNOTAVAIL: no source port left, or the source address is gone.
    Ports,
    /// ENOBUFS, ENOMEM; ENOSPC of an epoll set.
    Memory,
    /// ENETUNREACH, ENETDOWN from connect(2) itself: this host has no way there.
    Route,
    /// Anything else that is ours.
    Other,
}

/// What was being done when we ran short ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum LocalErrorPlace {
    /// Taking a client off a listen queue, or listening at all.
    Accept,
    /// Opening a session, or its connection to a backend.
    Connect,
    /// Moving bytes, or opening a pipe for them.
    Relay,
    /// Taking a connection of the admin API.
    Admin,
    /// Probing a backend.
    Probe,
    /// Reading the configuration again.
    Reload,
}

impl LocalErrorPlace {
    /// Every one, in the order of their numbers.
    pub const ALL: [LocalErrorPlace; 6] = [
        LocalErrorPlace::Accept,
        LocalErrorPlace::Connect,
        LocalErrorPlace::Relay,
        LocalErrorPlace::Admin,
        LocalErrorPlace::Probe,
        LocalErrorPlace::Reload,
    ];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            LocalErrorPlace::Accept => "accept",
            LocalErrorPlace::Connect => "connect",
            LocalErrorPlace::Relay => "relay",
            LocalErrorPlace::Admin => "admin",
            LocalErrorPlace::Probe => "probe",
            LocalErrorPlace::Reload => "reload",
        }
    }
}

impl LocalErrorKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [LocalErrorKind; 5] = [
        LocalErrorKind::Descriptors,
        LocalErrorKind::Ports,
        LocalErrorKind::Memory,
        LocalErrorKind::Route,
        LocalErrorKind::Other,
    ];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            LocalErrorKind::Descriptors => "descriptors",
            LocalErrorKind::Ports => "ports",
            LocalErrorKind::Memory => "memory",
            LocalErrorKind::Route => "route",
            LocalErrorKind::Other => "other",
        }
    }
}

impl RingEvent {
    /// Every kind, in the order of their numbers.
    pub const ALL: [RingEvent; 6] = [
        RingEvent::Overflow,
        RingEvent::Starved,
        RingEvent::Resumed,
        RingEvent::Stray,
        RingEvent::StaleFlag,
        RingEvent::TornDown,
    ];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            RingEvent::Overflow => "overflow",
            RingEvent::Starved => "starved",
            RingEvent::Resumed => "resumed",
            RingEvent::Stray => "stray",
            RingEvent::StaleFlag => "stale-flag",
            RingEvent::TornDown => "torn-down",
        }
    }
}

impl PanicScope {
    /// Both, in the order of their numbers.
    pub const ALL: [PanicScope; 2] = [PanicScope::Session, PanicScope::Worker];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            PanicScope::Session => "session",
            PanicScope::Worker => "worker",
        }
    }
}

impl WorkerCounters {
    /// Counts trouble of our own.
    pub fn local_trouble(&self, kind: LocalErrorKind, at: LocalErrorPlace) {
        self.local_errors.cell(kind as usize, at as usize).add(1);
    }

    /// All zero, for that many causes and phases.
    pub fn new(causes: usize, phases: usize) -> WorkerCounters {
        WorkerCounters {
            session_end: CounterTable::new(causes, phases),
            accepted: Counter::default(),
            ended: Counter::default(),
            accept_held_at_cap: Counter::default(),
            queued: Counter::default(),
            probes_waited: Counter::default(),
            undecided_waits: Counter::default(),
            local_errors: CounterTable::new(LocalErrorKind::ALL.len(), LocalErrorPlace::ALL.len()),
            connect_retries: Counter::default(),
            reports_dropped: Counter::default(),
            access_log_dropped: Counter::default(),
            ring_events: CounterTable::new(RingEvent::ALL.len(), 1),
            panics: CounterTable::new(PanicScope::ALL.len(), 1),
            restarts: Counter::default(),
            stalls: Counter::default(),
            pulse: CachePadded::default(),
            ring_held: Gauge::default(),
        }
    }
}

#[cfg(all(test, tidegate_loom))]
mod loom_models {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn reader_sees_a_count_that_never_goes_down_and_is_whole_at_the_end() {
        loom::model(|| {
            let counter = Arc::new(Counter::default());
            let writer = {
                let counter = Arc::clone(&counter);
                loom::thread::spawn(move || {
                    counter.add(2);
                    counter.add(3);
                })
            };
            let (earlier, later) = (counter.get(), counter.get());
            assert!([0, 2, 5].contains(&earlier) && [0, 2, 5].contains(&later));
            assert!(earlier <= later);
            writer.join().expect("the writer panicked");
            assert_eq!(counter.get(), 5);
        });
    }
}
