//! Kernel statistics of this process: descriptors, memory, CPU time.
//!
//! Read by `rendering` from `/proc/self` (proc(5)) for each metrics text. A value that
//! cannot be read is `None`, never an estimate.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Contains one link per open descriptor (proc(5)).
const OPEN_FDS: &str = "/proc/self/fd";

/// Statistics of the process; `None` if the kernel does not provide the value.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ProcessFacts {
    /// Open descriptors.
    pub open_fds: Option<u64>,
    /// Soft limit on open descriptors.
    pub max_fds: Option<u64>,
    /// Resident memory, in bytes.
    pub resident_bytes: Option<u64>,
    /// User and system CPU time of all threads.
    pub cpu: Option<Duration>,
    /// Start time, since 1970-01-01 UTC.
    pub started: Option<Duration>,
}

impl ProcessFacts {
    /// Reads all values. `started` is the start time of the process, recorded by the caller.
    pub fn read(started: SystemTime) -> ProcessFacts {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        ProcessFacts {
            open_fds: open_fds(),
            max_fds: rustix::process::getrlimit(rustix::process::Resource::Nofile).current,
            resident_bytes: fs::read_to_string("/proc/self/status")
                .ok()
                .and_then(|text| resident(&text)),
            cpu: Duration::try_from(time).ok(),
            started: started.duration_since(UNIX_EPOCH).ok(),
        }
    }
}

/// Returns the number of open descriptors. Since Linux 6.2 it is the size of the
/// directory (`proc_readfd_count` in the kernel). Older kernels need a listing, which
/// takes 0.5 ms per 1,000 descriptors and delays a worker on the same CPU.
fn open_fds() -> Option<u64> {
    let size = fs::metadata(OPEN_FDS).ok()?.len();
    if size > 0 { Some(size) } else { listed_fds() }
}

/// Counts the links, without the descriptor of the listing itself.
fn listed_fds() -> Option<u64> {
    Some((fs::read_dir(OPEN_FDS).ok()?.count() as u64).saturating_sub(1))
}

/// Parses the line `VmRSS:   1234 kB` and returns bytes.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_this_process_are_plausible() {
        let before = ProcessFacts::read(tidegate_net::clock::wall());
        let _more: Vec<_> = (0..10).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = ProcessFacts::read(tidegate_net::clock::wall());
        // Other tests open and close files at the same time, so the counts are lower bounds.
        assert!(after.open_fds.unwrap() >= 10 && after.open_fds <= after.max_fds);
        assert!(listed_fds().unwrap() >= 10, "listing, as on older kernels");
        assert!(after.resident_bytes.unwrap() > 100_000);
        assert!(after.cpu >= before.cpu && after.cpu.unwrap() > Duration::ZERO);
        assert!(after.started.unwrap() > Duration::from_secs(1_700_000_000));
    }

    #[test]
    fn unparsable_status_gives_no_memory_value() {
        assert_eq!(resident(""), None);
        assert_eq!(resident("VmRSS: x kB"), None);
        assert_eq!(resident("VmRSS: 12"), None);
        assert_eq!(resident("VmSize:\t 99 kB\nVmRSS:\t    12 kB\n"), Some(12 * 1024));
    }
}
