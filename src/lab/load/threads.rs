//! Threads that start together, report their progress and stop on request.
//!
//! Used by the generator and by the servers. It knows only the progress of the threads,
//! not what they do.

use crossbeam::utils::CachePadded;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use tidegate_net::cpu;

/// Progress of a thread. Only that thread writes it.
#[derive(Debug, Default)]
pub struct LoadProgress {
    /// Answered requests; opened connections in modes without requests.
    pub units: AtomicU64,
    /// Bytes received and sent.
    pub bytes: AtomicU64,
    /// Errors of any kind.
    pub errors: AtomicU64,
    /// Open connections.
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

/// What a thread shares with the other threads.
#[derive(Debug)]
pub(super) struct ThreadHandle {
    pub(super) index: usize,
    pub(super) count: usize,
    shared: Arc<LoadShared>,
}

/// Running threads; `T` is the result of each.
#[derive(Debug)]
pub struct LoadThreads<T> {
    shared: Arc<LoadShared>,
    threads: Vec<JoinHandle<io::Result<T>>>,
}

// === impl ThreadHandle ===

impl ThreadHandle {
    /// Returns whether the threads must stop.
    #[inline]
    pub(super) fn stopped(&self) -> bool {
        self.shared.stop.load(Relaxed)
    }

    /// Makes all threads stop.
    pub(super) fn stop(&self) {
        self.shared.stop.store(true, Relaxed);
    }

    /// Waits until all threads have called this. Each must call it exactly once, also
    /// after a failure.
    pub(super) fn wait_for_all(&self) {
        self.shared.ready.wait();
    }

    /// Returns the progress of this thread.
    pub(super) fn gauge(&self) -> &LoadProgress {
        &self.shared.gauges[self.index]
    }

    /// Returns this thread's part of `total`. The first threads get one more each if it
    /// does not divide evenly.
    pub(super) fn share(&self, total: usize) -> usize {
        total / self.count + usize::from(self.index < total % self.count)
    }
}

// === impl LoadThreads ===

impl<T: Send + 'static> LoadThreads<T> {
    /// Runs `work` on `count` threads, the i-th pinned to the i-th of `cpus`. If there
    /// are fewer CPUs than threads, they are reused. Without CPUs the threads are not
    /// pinned.
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
                let handle = ThreadHandle { index, count, shared: Arc::clone(&shared) };
                let work = Arc::clone(&work);
                let cpu = (!cpus.is_empty()).then(|| cpus[index % cpus.len()]);
                std::thread::Builder::new().name(format!("{name}-{index}")).spawn(move || {
                    // The command has checked the CPU. If the CPU was removed since,
                    // the thread runs unpinned.
                    let _ = cpu.map(cpu::pin_current_thread);
                    work(handle)
                })
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok(LoadThreads { shared, threads })
    }

    /// Returns the progress of all threads.
    pub fn gauges(&self) -> impl Iterator<Item = &LoadProgress> {
        self.shared.gauges.iter().map(|gauge| &**gauge)
    }

    /// Makes the threads stop. They end within about one second.
    pub fn stop(&self) {
        self.shared.stop.store(true, Relaxed);
    }

    /// Returns whether every thread has finished.
    pub fn finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for the threads and returns their results.
    ///
    /// # Errors
    /// The first failure of a thread.
    pub fn join(self) -> io::Result<Vec<T>> {
        let panicked = || io::Error::other("a load thread panicked");
        self.threads.into_iter().map(|thread| thread.join().map_err(|_| panicked())?).collect()
    }
}
