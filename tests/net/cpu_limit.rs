//! Limits programs to 1 % of a CPU, as a busy or throttled host does.
//!
//! Uses a cgroup (version 2 or 1) if this machine allows it. Otherwise it stops the programs for
//! 990 ms of each second. Dropping the handle removes the limit. Other cgroups are used only to
//! put the programs back.
//! came from.

use crate::common::{ms, proc};
use rustix::process::Signal;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

/// The mount point of version 2, alone or together with version 1.
const V2: &str = "/sys/fs/cgroup";

/// The mount points of version 1's cpu controller.
const V1: [&str; 2] = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];

/// Programs with limited CPU. Dropping it removes the limit.
pub struct CpuLimited {
    pids: Vec<u32>,
    means: Means,
}

enum Means {
    Cgroup {
        dir: PathBuf,
        /// The original cgroup of each program.
        origins: Vec<PathBuf>,
    },
    Signals {
        stop: Arc<AtomicBool>,
        thread: Option<JoinHandle<()>>,
    },
}

impl CpuLimited {
    /// Limits the programs together to 1 % of one CPU.
    pub fn new(pids: &[u32]) -> CpuLimited {
        let pids = pids.to_vec();
        let means = in_cgroup(&pids).unwrap_or_else(|_| by_signals(pids.clone()));
        CpuLimited { pids, means }
    }

    /// The method, for the notes.
    pub fn how(&self) -> &'static str {
        match &self.means {
            Means::Cgroup { dir, .. } if dir.join("cpu.max").exists() => "cgroup v2",
            Means::Cgroup { .. } => "cgroup v1",
            Means::Signals { .. } => "SIGSTOP and SIGCONT",
        }
    }
}

impl Drop for CpuLimited {
    fn drop(&mut self) {
        match &mut self.means {
            Means::Cgroup { dir, origins } => {
                for (pid, origin) in self.pids.iter().zip(origins) {
                    // A program that has ended cannot be moved back.
                    let _ = fs::write(origin.join("cgroup.procs"), pid.to_string());
                }
                let _ = fs::remove_dir(dir);
            }
            Means::Signals { stop, thread } => {
                stop.store(true, Ordering::Relaxed);
                let _ = thread.take().map(JoinHandle::join);
            }
        }
    }
}

fn in_cgroup(pids: &[u32]) -> io::Result<Means> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let root = V1.iter().chain([&V2]).map(Path::new).find(|root| {
        root.join("cpu.cfs_quota_us").exists() || root.join("cgroup.subtree_control").exists()
    });
    let root = root.ok_or(io::ErrorKind::NotFound)?;
    sweep(root);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = root.join(format!("tg-{}-{number}", std::process::id()));
    fs::create_dir(&dir)?;
    let origins = pids.iter().map(|pid| origin(root, *pid)).collect();
    let moved = limit(&dir).and_then(|()| {
        pids.iter().try_for_each(|pid| fs::write(dir.join("cgroup.procs"), pid.to_string()))
    });
    let means = Means::Cgroup { dir, origins };
    if let Err(error) = moved {
        drop(CpuLimited { pids: pids.to_vec(), means });
        return Err(error);
    }
    Ok(means)
}

/// Sets 10 ms per second, the longest period. A program that has used them stops for the rest of
/// the period.
fn limit(dir: &Path) -> io::Result<()> {
    if dir.join("cpu.cfs_quota_us").exists() {
        fs::write(dir.join("cpu.cfs_period_us"), "1000000")?;
        fs::write(dir.join("cpu.cfs_quota_us"), "10000")
    } else {
        // The file is missing if the cpu controller is not enabled for the root's children.
        fs::OpenOptions::new().write(true).open(dir.join("cpu.max"))?;
        fs::write(dir.join("cpu.max"), "10000 1000000")
    }
}

/// Returns the current cgroup of a program below `root`.
fn origin(root: &Path, pid: u32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let v1 = root.join("cpu.cfs_quota_us").exists();
    // `5:cpu,cpuacct:/path` in version 1, `0::/path` in version 2 (cgroups(7)).
    let path = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let fits = if v1 {
            controllers.split(',').any(|name| name == "cpu")
        } else {
            controllers.is_empty()
        };
        fits.then(|| path.trim_start_matches('/').to_string())
    });
    root.join(path.unwrap_or_default())
}

/// Removes the cgroups of killed runs. A cgroup that still has a program stays.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix("tg-").and_then(|rest| rest.split('-').next());
        let Some(owner) = owner.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if proc::is_dead(owner) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn by_signals(pids: Vec<u32>) -> Means {
    let stop = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let all = |signal| pids.iter().for_each(|pid| proc::signal(*pid, signal));
            while !stop.load(Ordering::Relaxed) {
                all(Signal::STOP);
                std::thread::sleep(ms(990));
                all(Signal::CONT);
                std::thread::sleep(ms(10));
            }
        }
    });
    Means::Signals { stop, thread: Some(thread) }
}
