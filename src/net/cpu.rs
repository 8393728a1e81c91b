//! The CPUs that this process may use, its quota of CPU time, and pinning of threads.
//!
//! Used at the start. It never names a CPU outside the cpuset of the process (container,
//! taskset(1)). Container runtimes set the quota as their CPU limit.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs;
use std::io;
use std::path::Path;

/// Returns the CPUs that this process may run on, ascending and never empty.
pub fn available() -> Vec<usize> {
    let allowed = sched_getaffinity(None)
        .map(|set| (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect::<Vec<_>>());
    match allowed {
        Ok(cpus) if !cpus.is_empty() => cpus,
        // The host has more CPUs than the set can hold. Their numbers are a guess then.
        _ => (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect(),
    }
}

/// Mount point of control groups (cgroups(7)).
const CGROUPS: &str = "/sys/fs/cgroup";

/// Returns the quota of CPU time in CPUs, rounded up. `None`: no control group sets a
/// quota.
pub fn quota() -> Option<usize> {
    let membership = fs::read_to_string("/proc/self/cgroup").ok()?;
    quota_of(Path::new(CGROUPS), &membership)
}

/// Returns the smallest quota of the groups in `membership` (/proc/PID/cgroup) and of
/// their parent groups.
fn quota_of(root: &Path, membership: &str) -> Option<usize> {
    let mut smallest: Option<usize> = None;
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let mounts: &[&str] = match controllers {
            // Version 2, alone or together with version 1.
            "" => &["", "unified"],
            some if some.split(',').any(|one| one == "cpu") => &["cpu", "cpu,cpuacct"],
            _ => continue,
        };
        for mount in mounts.iter().map(|mount| root.join(mount)) {
            let group = mount.join(group.trim_start_matches('/'));
            // In a container, only some of the groups may be visible.
            for directory in group.ancestors().take_while(|one| one.starts_with(&mount)) {
                let found = quota_in(directory);
                smallest = smallest.into_iter().chain(found).min();
            }
        }
    }
    smallest
}

/// Returns the quota of a control group.
fn quota_in(group: &Path) -> Option<usize> {
    let read = |file: &str| fs::read_to_string(group.join(file)).ok();
    let (quota, period) = match read("cpu.max") {
        Some(text) => {
            let (quota, period) = text.trim().split_once(' ')?;
            (quota.to_owned(), period.to_owned())
        }
        None => (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?),
    };
    // "max" and -1 mean that the group has no quota. They do not parse.
    let quota: usize = quota.trim().parse().ok()?;
    let period: usize = period.trim().parse().ok().filter(|period| *period > 0)?;
    Some(quota.div_ceil(period).max(1))
}

/// Returns the kernel's ID of the calling thread.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the quota of `membership` in a hierarchy with these files.
    fn quota(files: &[(&str, &str)], membership: &str) -> Option<usize> {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        quota_of(root.path(), membership)
    }

    #[test]
    fn quota_is_rounded_up_to_whole_cpus() {
        let v2 = |text| quota(&[("a/b/cpu.max", text)], "0::/a/b\n");
        assert_eq!(v2("150000 100000\n"), Some(2));
        assert_eq!(v2("200000 100000\n"), Some(2));
        assert_eq!(v2("10000 100000\n"), Some(1));
        assert_eq!(v2("max 100000\n"), None);
        assert_eq!(v2("nonsense"), None);
        assert_eq!(quota(&[], "0::/a/b\n"), None);
    }

    #[test]
    fn smallest_quota_of_all_parent_groups_applies() {
        let files = [("cpu.max", "400000 100000"), ("a/cpu.max", "100000 100000")];
        assert_eq!(quota(&files, "0::/a/b\n"), Some(1));
        assert_eq!(quota(&files, "0::/elsewhere\n"), Some(4));
        // In a container, its own group is the root of the mounted hierarchy.
        assert_eq!(quota(&[("cpu.max", "300000 100000")], "0::/\n"), Some(3));
    }

    #[test]
    fn quota_of_cgroups_version_1_is_read() {
        let files = |quota| {
            [
                ("cpu,cpuacct/x/cpu.cfs_quota_us", quota),
                ("cpu,cpuacct/x/cpu.cfs_period_us", "50000"),
            ]
        };
        let membership = "12:memory:/x\n4:cpu,cpuacct:/x\n";
        assert_eq!(quota(&files("125000\n"), membership), Some(3));
        assert_eq!(quota(&files("-1\n"), membership), None);
    }
}
