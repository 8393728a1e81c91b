//! Reads `/proc` for a child process and signals it by pid.
//!
//! Called by the handles that own children. The numbers come only from the kernel, so
//! that Tidegate's own metrics cannot hide a leak.

use rustix::process::{Pid, Signal};
use std::time::Duration;

/// Open descriptors.
pub fn fd_count(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count).unwrap_or(0)
}

/// The target of each open descriptor, sorted, for messages about leaks.
pub fn fds(pid: u32) -> Vec<String> {
    let mut links: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .map(|link| link.to_string_lossy().into_owned())
        .collect();
    links.sort();
    links
}

/// What ss(8) prints about a process's TCP sockets. Empty without ss.
pub fn tcp_sockets(pid: u32) -> Vec<String> {
    let output = std::process::Command::new("ss").args(["-tinoemH"]).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    // Two lines per socket: the addresses, then the details.
    let text = String::from_utf8_lossy(&text).replace("\n\t", "  ");
    let inodes: Vec<String> = fds(pid)
        .iter()
        .filter_map(|fd| Some(format!("ino:{} ", fd.strip_prefix("socket:[")?.strip_suffix(']')?)))
        .collect();
    let mine = |line: &&str| inodes.iter().any(|inode| line.contains(inode));
    text.lines().filter(mine).map(str::to_string).collect()
}

/// What each thread of the process waits for, and how long it has waited for a CPU.
pub fn thread_states(pid: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let read = |task: &std::path::Path, name: &str| {
        std::fs::read_to_string(task.join(name)).unwrap_or_default().trim().to_owned()
    };
    let thread = |task: std::path::PathBuf| {
        let schedule = read(&task, "schedstat");
        let delay = schedule.split(' ').nth(1).and_then(|ns| ns.parse().ok()).unwrap_or(0);
        let delay = Duration::from_nanos(delay);
        let (name, at) = (read(&task, "comm"), read(&task, "wchan"));
        format!("{pid} {name}: in {at}, waited {delay:?} for a CPU")
    };
    tasks.map(|task| thread(task.path())).collect()
}

/// Resident memory in KiB.
pub fn rss_kib(pid: u32) -> u64 {
    status_field(pid, "VmRSS:")
}

/// Number of threads.
pub fn threads(pid: u32) -> u64 {
    status_field(pid, "Threads:")
}

/// User plus system time since the start of the process.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the child is running");
    // Fields are counted after the command name, because it can contain spaces (proc(5)).
    let after = stat.rsplit_once(')').expect("a command name in brackets").1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().expect("utime is a number")
        + fields[12].parse::<u64>().expect("stime is a number");
    // USER_HZ is 100 on every supported Linux.
    Duration::from_millis(ticks * 10)
}

/// Direct children of all threads of the process.
pub fn children(pid: u32) -> Vec<u32> {
    std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok())
        .flat_map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// The probe helpers of a process: its keeper and the runner. The runner is the child of the
/// keeper.
pub fn probe_helpers(pid: u32) -> Vec<u32> {
    let keepers = children(pid).into_iter().filter(|child| is_probe_helper(*child));
    keepers.flat_map(|keeper| [vec![keeper], children(keeper)].concat()).collect()
}

/// Whether a process is a probe helper.
pub fn is_probe_helper(pid: u32) -> bool {
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split('\0').any(|word| word == "--probe-helper")
}

/// Kills a process and all its descendants. Stops each process first, so that it cannot
/// start a child in between.
pub fn kill_with_all_below(pid: u32) {
    signal(pid, Signal::STOP);
    for child in children(pid) {
        kill_with_all_below(child);
    }
    signal(pid, Signal::KILL);
}

/// The pid of the parent.
pub fn parent(pid: u32) -> u32 {
    status_field(pid, "PPid:") as u32
}

/// Returns true if every thread of the process is stopped.
pub fn is_stopped(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
    })
}

/// Returns true if the process does not exist or is a zombie.
pub fn is_dead(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| {
        stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
    })
}

/// Sends a signal. A process that has already ended is no error.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a pid is never 0");
    let _ = rustix::process::kill_process(pid, signal);
}

/// Sets another process's soft descriptor limit and returns the previous limit.
pub fn set_fd_limit(pid: u32, soft: u64) -> u64 {
    use rustix::process::{Resource, Rlimit};
    let target = Pid::from_raw(pid as i32).expect("a pid is never 0");
    let limits =
        std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("the child is running");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("NOFILE");
    let hard = line.split_whitespace().nth(4).and_then(|word| word.parse().ok());
    let new = Rlimit { current: Some(soft), maximum: hard };
    let old = rustix::process::prlimit(Some(target), Resource::Nofile, new).expect("prlimit");
    old.current.unwrap_or(u64::MAX)
}

/// Raises this process's soft descriptor limit to the hard one and returns it.
pub fn raise_own_fd_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).expect("the soft limit can be raised to the hard limit");
    limit.maximum.unwrap_or(u64::MAX)
}

fn status_field(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
