//! Which CPUs there are for us, and pinning a thread to one.
//!
//! Used at start-up. The cpuset of the process (container, taskset) is
//! respected: CPUs outside it are never named.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::io;

/// The CPUs this process may run on, ascending; never empty.
pub fn available() -> Vec<usize> {
    let allowed = sched_getaffinity(None)
        .map(|set| (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>());
    match allowed {
        Ok(cpus) if !cpus.is_empty() => cpus,
        // More CPUs than the set has room for: count them without names.
        _ => (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect(),
    }
}

/// The calling thread, as the kernel numbers it.
pub fn current_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Binds the calling thread to `cpu`.
pub fn pin_current_thread(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)?;
    Ok(())
}
