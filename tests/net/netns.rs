//! Network namespaces as hosts: created, entered, joined by veth, and removed.
//!
//! A namespace is named `tg-PID-N-ROLE` after its owning process and is removed when its handle
//! drops, also after a panic. The next run removes the namespaces of a killed run. Nothing in
//! the machine's own namespace changes.

use crate::common::{self, servers};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// The directory of named namespaces of iproute2 (ip-netns(8)).
const DIRECTORY: &str = "/run/netns";

/// A host with its own interfaces, addresses, routes and ports.
pub struct Namespace {
    name: String,
    handle: File,
}

/// Returns true if this machine allows namespaces and TUN devices.
///
/// If it does not, the test reports that it is skipped. In CI it then fails unless
/// `TIDEGATE_NO_NETNS` is set.
pub fn networks_run() -> bool {
    let Err(why) = try_everything() else { return true };
    if std::env::var_os("TIDEGATE_NO_NETNS").is_some() {
        common::report("SKIPPED", &format!("TIDEGATE_NO_NETNS is set ({why})"));
    } else {
        common::skip(&why);
    }
    false
}

fn try_everything() -> Result<(), String> {
    if servers::find("ip").is_none() {
        return Err("ip (iproute2) not found".into());
    }
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    tun.map_err(|error| format!("/dev/net/tun: {error}"))?;
    Namespace::try_new("try").map(drop)
}

// === impl Namespace ===

impl Namespace {
    /// Creates a namespace with only a loopback interface, which is up.
    #[track_caller]
    pub fn new(role: &str) -> Namespace {
        Namespace::try_new(role).unwrap_or_else(|why| panic!("no namespace: {why}"))
    }

    fn try_new(role: &str) -> Result<Namespace, String> {
        static SWEEP: Once = Once::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        SWEEP.call_once(sweep);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{number}-{role}", prefix(std::process::id()));
        ip(&["netns", "add", &name], "")?;
        let path = format!("{DIRECTORY}/{name}");
        let handle = File::open(path).map_err(|error| error.to_string())?;
        let namespace = Namespace { name, handle };
        ip(&["-n", &namespace.name, "link", "set", "lo", "up"], "")?;
        Ok(namespace)
    }

    /// The name for `ip netns exec NAME`, for manual inspection.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `act` on a thread in this namespace. Its sockets, threads and programs belong to this
    /// host permanently.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        // The thread gets the name of the test for the notes.
        let name = std::thread::current().name().unwrap_or("?").to_string();
        let thread = std::thread::Builder::new().name(name);
        let inside = || {
            move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("the owner of a namespace can enter it");
            act()
        };
        let ended = std::thread::scope(|scope| {
            thread.spawn_scoped(scope, inside).expect("one more thread").join()
        });
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs commands of ip(8) in this namespace, one per line.
    #[track_caller]
    pub fn ip(&self, lines: &str) {
        let done = ip(&["-n", &self.name, "-batch", "-"], lines);
        done.unwrap_or_else(|why| panic!("in {}: {why}", self.name));
    }

    /// Sets a kernel value below `/proc/sys/net` on this host.
    #[track_caller]
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{name}");
        let written = self.run(|| std::fs::write(&path, value));
        written.unwrap_or_else(|error| panic!("{path}: {error}"));
    }

    /// Joins two hosts by an ideal cable with the interface `device` on both hosts. Addresses
    /// include their prefix lengths.
    #[track_caller]
    pub fn join_by_veth(&self, address: &str, peer: &Namespace, peer_address: &str, device: &str) {
        let (here, there) = (&self.name, &peer.name);
        let made = ip(
            &["-batch", "-"],
            &format!("link add {device} netns {here} type veth peer name {device} netns {there}"),
        );
        made.unwrap_or_else(|why| panic!("{why}"));
        for (end, address) in [(self, address), (peer, peer_address)] {
            end.ip(&format!("address add {address} dev {device}\nlink set {device} up"));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // An error cannot be reported during unwinding. The next run removes the namespace.
        let _ = ip(&["netns", "delete", &self.name], "");
    }
}

/// The prefix of the namespace names of a process.
fn prefix(pid: u32) -> String {
    format!("tg-{pid}-")
}

/// Names of the namespaces of a process, for tests of this harness.
pub fn owned_by(pid: u32) -> Vec<String> {
    let prefix = prefix(pid);
    existing().into_iter().filter(|name| name.starts_with(&prefix)).collect()
}

fn existing() -> Vec<String> {
    let entries = std::fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Removes the namespaces of killed runs and kills the programs in them.
pub fn sweep() {
    for name in existing() {
        let owner = name.strip_prefix("tg-").and_then(|rest| rest.split('-').next());
        let Some(owner) = owner.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !common::proc::is_dead(owner) {
            continue;
        }
        // Each step can fail, because another run can do the same.
        let inside = ip(&["netns", "pids", &name], "").unwrap_or_default();
        for pid in inside.lines().filter_map(|pid| pid.trim().parse().ok()) {
            common::proc::signal(pid, Signal::KILL);
        }
        let _ = ip(&["netns", "delete", &name], "");
    }
}

/// Runs ip(8) and returns its output.
fn ip(arguments: &[&str], input: &str) -> Result<String, String> {
    let program = servers::find("ip").ok_or("ip not found")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("ip: {error}"))?;
    let mut stdin = child.stdin.take().expect("piped");
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let Output { status, stdout, stderr } =
        child.wait_with_output().map_err(|error| format!("ip: {error}"))?;
    let said = String::from_utf8_lossy(&stderr);
    if status.success() {
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    } else {
        Err(format!("ip {} <<< {input:?}: {}", arguments.join(" "), said.trim()))
    }
}
