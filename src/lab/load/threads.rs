//! Threads that start together, can be watched while they work, and stop when
//! told.
//!
//! Used by the generator and the servers alike. It never looks at what the
//! threads do beyond their gauges.

use crossbeam::utils::CachePadded;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use tidegate_net::cpu;

/// What a thread shows of its work while it is at it. Written by that thread
/// alone.
#[derive(Debug, Default)]
pub struct LoadProgress {
    /// Requests answered or, where there are none, connections opened.
    pub units: AtomicU64,
    /// Bytes received and sent.
    pub bytes: AtomicU64,
    /// Errors of any kind.
    pub errors: AtomicU64,
    /// Connections open now.
    pub open: AtomicU64,
    /// Whether the measured time has begun.
    pub started: AtomicBool,
}

#[derive(Debug)]
struct LoadShared {
    stop: AtomicBool,
    ready: Barrier,
    gauges: Vec<CachePadded<LoadProgress>>,
}

/// A thread's view of its crew.
#[derive(Debug)]
pub(super) struct ThreadHandle {
    pub(super) index: usize,
    pub(super) count: usize,
    shared: Arc<LoadShared>,
}

/// Threads at work; `T` is what each hands back.
#[derive(Debug)]
pub struct LoadThreads<T> {
    shared: Arc<LoadShared>,
    threads: Vec<JoinHandle<io::Result<T>>>,
}

// === impl ThreadHandle ===

impl ThreadHandle {
    /// Whether the crew was told to stop.
    #[inline]
    pub(super) fn stopped(&self) -> bool {
        self.shared.stop.load(Relaxed)
    }

    /// Tells the whole crew to stop.
    pub(super) fn stop(&self) {
        self.shared.stop.store(true, Relaxed);
    }

    /// Waits until every thread of the crew is here. Each must come exactly
    /// once, failed or not.
    pub(super) fn wait_for_all(&self) {
        self.shared.ready.wait();
    }

    /// This thread's gauge.
    pub(super) fn gauge(&self) -> &LoadProgress {
        &self.shared.gauges[self.index]
    }

    /// This thread's part of `total` things, the first threads taking one more
    /// where it does not divide.
    pub(super) fn share(&self, total: usize) -> usize {
        total / self.count + usize::from(self.index < total % self.count)
    }
}

// === impl LoadThreads ===

impl<T: Send + 'static> LoadThreads<T> {
    /// Runs `work` on `count` threads, the i-th on the i-th of `cpus` (again
    /// from the first when there are fewer; nowhere in particular when empty).
    pub(super) fn start(
        name: &str,
        count: usize,
        cpus: &[usize],
        work: impl Fn(ThreadHandle) -> io::Result<T> + Send + Sync + 'static,
    ) -> io::Result<LoadThreads<T>> {
        let shared = Arc::new(LoadShared {
            stop: AtomicBool::new(false),
            ready: Barrier::new(count),
            gauges: (0..count).map(|_| CachePadded::default()).collect(),
        });
        let work = Arc::new(work);
        let threads = (0..count)
            .map(|index| {
                let place = ThreadHandle { index, count, shared: Arc::clone(&shared) };
                let work = Arc::clone(&work);
                let cpu = (!cpus.is_empty()).then(|| cpus[index % cpus.len()]);
                std::thread::Builder::new().name(format!("{name}-{index}")).spawn(move || {
                    // The command has checked the CPU; it can only have gone
                    // since, and then floating is all that is left.
                    let _ = cpu.map(cpu::pin_current_thread);
                    work(place)
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(LoadThreads { shared, threads })
    }

    /// What the threads show of their work.
    pub fn gauges(&self) -> impl Iterator<Item = &LoadProgress> {
        self.shared.gauges.iter().map(|gauge| &**gauge)
    }

    /// Tells the threads to finish; they do within a second or so.
    pub fn stop(&self) {
        self.shared.stop.store(true, Relaxed);
    }

    /// Whether every thread has finished.
    pub fn finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for the threads and gives what each hands back.
    ///
    /// # Errors
    /// The first failure of a thread.
    pub fn join(self) -> io::Result<Vec<T>> {
        let died = || io::Error::other("a load thread panicked");
        self.threads.into_iter().map(|thread| thread.join().map_err(|_| died())?).collect()
    }
}
