//! Single-writer counters: a plain load, add and store instead of a locked
//! read-modify-write.
//!
//! Each worker owns one shard of every counter set, on separate cache lines. The admin
//! API sums the shards. A counter never decreases.

use crate::metrics::progress::WorkerProgress;
use crossbeam::utils::CachePadded;
#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU64, Ordering};

/// A count with exactly one writing thread and any number of readers. It includes the
/// count of the old process after an upgrade.
#[derive(Debug, Default)]
pub struct Counter {
    own: AtomicU64,
    /// Written by the control thread only.
    before: AtomicU64,
}

impl Counter {
    /// Adds `n`. Only the owning thread may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        self.own.store(self.own.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Returns the count at some recent moment.
    #[inline]
    pub fn get(&self) -> u64 {
        self.before.load(Ordering::Relaxed).wrapping_add(self.own.load(Ordering::Relaxed))
    }

    /// Returns the count of this process alone.
    #[inline]
    pub fn own(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
    }

    /// Sets the count of the old process, replacing the previous value. One thread
    /// other than the owner can call this.
    pub fn carry(&self, before: u64) {
        self.before.store(before, Ordering::Relaxed);
    }
}

/// A level with exactly one writing thread. It can increase and decrease.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the level. Only the owning thread may call this.
    #[inline]
    pub fn set(&self, level: u64) {
        self.0.store(level, Ordering::Relaxed);
    }

    /// Returns the level at some recent moment.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A table of counters with a fixed size, such as cause by phase.
#[derive(Debug)]
pub struct CounterTable {
    columns: usize,
    cells: Box<[Counter]>,
}

impl CounterTable {
    /// Creates a table of zeros.
    pub fn new(rows: usize, columns: usize) -> CounterTable {
        CounterTable { columns, cells: (0..rows * columns).map(|_| Counter::default()).collect() }
    }

    /// Returns a cell. `row` and `column` must be less than the sizes given to `new`.
    #[inline]
    pub fn cell(&self, row: usize, column: usize) -> &Counter {
        &self.cells[row * self.columns + column]
    }
}

/// One `T` per worker, each on separate cache lines.
#[derive(Debug)]
pub struct Sharded<T>(Box<[CachePadded<T>]>);

impl<T> Sharded<T> {
    /// Creates one shard per worker.
    pub fn new(workers: usize, make: impl Fn() -> T) -> Sharded<T> {
        Sharded((0..workers).map(|_| CachePadded::new(make())).collect())
    }

    /// Returns the shard of `worker`, which only this worker writes.
    #[inline]
    pub fn of(&self, worker: usize) -> &T {
        &self.0[worker]
    }

    /// Returns the sum over all workers.
    pub fn sum(&self, read: impl Fn(&T) -> u64) -> u64 {
        self.0.iter().map(|shard| read(shard)).fold(0, u64::wrapping_add)
    }

    /// Returns every shard, in worker order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|shard| &**shard)
    }
}

/// What one worker counts, except per frontend and backend.
#[derive(Debug)]
pub struct WorkerCounters {
    /// Ended sessions: row `core::outcome::Cause`, column `core::outcome::Phase`.
    pub session_end: CounterTable,
    /// Accepted connections.
    pub accepted: Counter,
    /// Ended sessions, including rejected ones.
    pub ended: Counter,
    /// Times a listener stopped accepting because a cap was reached.
    pub accept_held_at_cap: Counter,
    /// Sessions that waited in a queue for a backend.
    pub queued: Counter,
    /// Probes delayed because too many probes ran.
    pub probes_waited: Counter,
    /// Commands of probes delayed because too many commands ran.
    pub commands_waited: Counter,
    /// Times the probe helper ended unexpectedly.
    pub helper_failures: Counter,
    /// Sessions that waited for the first probe results of their pool.
    pub undecided_waits: Counter,
    /// Local errors: row [`LocalErrorKind`], column [`LocalErrorPlace`].
    pub local_errors: CounterTable,
    /// Connect attempts beyond a session's first.
    pub connect_retries: Counter,
    /// Reports dropped because the queue to the control thread was full.
    pub reports_dropped: Counter,
    /// Access-log lines dropped because their queue was full.
    pub access_log_dropped: Counter,
    /// Events inside the worker's io_uring (row [`RingEvent`]).
    pub ring_events: CounterTable,
    /// Panics (row [`PanicScope`]).
    pub panics: CounterTable,
    /// Restarts of the worker after a panic.
    pub restarts: Counter,
    /// Stalls of the event loop; written by the control thread.
    pub stalls: Counter,
    /// Progress of the event loop.
    pub pulse: CachePadded<WorkerProgress>,
    /// Bytes of the ring's buffer pool that hold received and unsent data.
    pub ring_held: Gauge,
}

/// What a panic ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PanicScope {
    /// One session.
    Session,
    /// The worker's thread and all its sessions.
    Worker,
}

/// Events inside an io_uring, other than moved bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RingEvent {
    /// The completion queue overflowed.
    Overflow,
    /// A receive found no free buffer.
    Starved,
    /// A short send was resumed.
    Resumed,
    /// A completion named an operation that had already ended.
    Stray,
    /// The kernel's flag for deferred work was set without any work.
    StaleFlag,
    /// Operations of an ended session did not complete, and its sockets were reset.
    TornDown,
}

/// Kind of a local error. Local errors are never attributed to a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum LocalErrorKind {
    /// EMFILE, ENFILE.
    Descriptors,
    /// EADDRNOTAVAIL, EADDRINUSE: no local port is free, or the source address is not
    /// local any more.
    Ports,
    /// ENOBUFS, ENOMEM; ENOSPC of an epoll set.
    Memory,
    /// ENETUNREACH, ENETDOWN, ENONET from connect(2): this host has no route.
    Route,
    /// Any other local error.
    Other,
}

/// What Tidegate was doing when a local error occurred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum LocalErrorPlace {
    /// Accepting a connection, or opening a listener.
    Accept,
    /// Starting a session, or connecting to its backend.
    Connect,
    /// Moving bytes, or opening a pipe for them.
    Relay,
    /// Accepting a connection of the admin API.
    Admin,
    /// Probing a backend.
    Probe,
    /// Rereading the configuration.
    Reload,
}

impl LocalErrorPlace {
    /// Every place, in numeric order.
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
    /// Every kind, in numeric order.
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
    /// Every event, in numeric order.
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
    /// Both scopes, in numeric order.
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
    /// Counts a local error.
    pub fn count_local_error(&self, kind: LocalErrorKind, at: LocalErrorPlace) {
        self.local_errors.cell(kind as usize, at as usize).add(1);
    }

    /// Creates counters of zero for this number of causes and phases.
    pub fn new(causes: usize, phases: usize) -> WorkerCounters {
        WorkerCounters {
            session_end: CounterTable::new(causes, phases),
            accepted: Counter::default(),
            ended: Counter::default(),
            accept_held_at_cap: Counter::default(),
            queued: Counter::default(),
            probes_waited: Counter::default(),
            commands_waited: Counter::default(),
            helper_failures: Counter::default(),
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

#[cfg(all(test, feature = "loom"))]
mod loom_models {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn reader_sees_a_non_decreasing_count_and_the_final_sum() {
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
