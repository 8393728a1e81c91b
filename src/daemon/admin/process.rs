//! The kernel's facts about this process: descriptors, memory, processor time.
//!
//! Read by `rendering` for each metrics text, from `/proc/self` (proc(5)). What cannot be
//! read is left out, never guessed.

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A link for each open descriptor (proc(5)).
const OPEN_FDS: &str = "/proc/self/fd";

/// See the fields; `None` where `/proc` does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ProcessFacts {
    /// Open descriptors.
    pub open_fds: Option<u64>,
    /// Soft limit on those.
    pub max_fds: Option<u64>,
    /// Memory in RAM, in bytes.
    pub resident_bytes: Option<u64>,
    /// User and system time of all threads.
    pub cpu: Option<Duration>,
    /// When the process started, since 1970.
    pub started: Option<Duration>,
}

impl ProcessFacts {
    /// Reads them now. `started` is the start of the process, which the caller noted.
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

/// How many descriptors are open. Since Linux 6.2 that is the size of a directory
/// (`proc_readfd_count` in the kernel). Before, the directory must be listed: half
/// a millisecond for each thousand, which a worker on the same CPU has to wait for.
fn open_fds() -> Option<u64> {
    let size = fs::metadata(OPEN_FDS).ok()?.len();
    if size > 0 { Some(size) } else { listed_fds() }
}

/// The listing holds a descriptor itself.
fn listed_fds() -> Option<u64> {
    Some((fs::read_dir(OPEN_FDS).ok()?.count() as u64).saturating_sub(1))
}

/// `VmRSS:   1234 kB`
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_descriptors_memory_and_a_start() {
        let before = ProcessFacts::read(tidegate_net::clock::wall());
        let _more: Vec<_> = (0..10).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = ProcessFacts::read(tidegate_net::clock::wall());
        // Other tests open and close files meanwhile; the order of size holds.
        assert!(after.open_fds.unwrap() >= 10 && after.open_fds <= after.max_fds);
        assert!(listed_fds().unwrap() >= 10, "as older kernels tell it");
        assert!(after.resident_bytes.unwrap() > 100_000);
        assert!(after.cpu >= before.cpu && after.cpu.unwrap() > Duration::ZERO);
        assert!(after.started.unwrap() > Duration::from_secs(1_700_000_000));
    }

    #[test]
    fn strange_text_gives_no_memory_instead_of_a_wrong_one() {
        assert_eq!(resident(""), None);
        assert_eq!(resident("VmRSS: x kB"), None);
        assert_eq!(resident("VmRSS: 12"), None);
        assert_eq!(resident("VmSize:\t 99 kB\nVmRSS:\t    12 kB\n"), Some(12 * 1024));
    }
}
