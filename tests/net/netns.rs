//! Network namespaces as hosts: made, entered, joined by veth, and taken away.
//!
//! A namespace is named `tg-PID-N-ROLE` after the process that owns it and goes
//! when its handle drops, in a panic too; what a killed run left behind is
//! swept by the next one. It never changes anything in the machine's own
//! namespace.

use crate::common::{self, servers};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Output, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where iproute2 keeps named namespaces (ip-netns(8)).
const DIRECTORY: &str = "/run/netns";

/// A host of its own: interfaces, addresses, routes, ports.
pub struct Namespace {
    name: String,
    handle: File,
}

/// Whether this machine lets us make namespaces and TUN devices.
///
/// Where it does not, the test is skipped loudly, and fails in CI unless
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
    /// A new one with nothing but a loopback interface that is up.
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

    /// For `ip netns exec NAME`, to look around by hand.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `act` on a thread inside: the sockets it opens, the threads it
    /// starts and the programs it runs belong to this host, for good.
    pub fn run<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        // Under the test's name, for its notes.
        let name = std::thread::current().name().unwrap_or("?").to_string();
        let thread = std::thread::Builder::new().name(name);
        let inside = || {
            move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("who made a namespace may enter it");
            act()
        };
        let ended = std::thread::scope(|scope| {
            thread.spawn_scoped(scope, inside).expect("one more thread").join()
        });
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs commands of ip(8) inside, one a line.
    #[track_caller]
    pub fn ip(&self, lines: &str) {
        let done = ip(&["-n", &self.name, "-batch", "-"], lines);
        done.unwrap_or_else(|why| panic!("in {}: {why}", self.name));
    }

    /// Sets a kernel value below `/proc/sys/net` of this host.
    #[track_caller]
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{name}");
        let written = self.run(|| std::fs::write(&path, value));
        written.unwrap_or_else(|error| panic!("{path}: {error}"));
    }

    /// Joins two hosts by an ideal cable: `device` at both ends, addresses with
    /// their prefix lengths.
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
        // While unwinding there is nobody to tell; the next run sweeps.
        let _ = ip(&["netns", "delete", &self.name], "");
    }
}

/// What the names of a process's namespaces start with.
fn prefix(pid: u32) -> String {
    format!("tg-{pid}-")
}

/// Names of the namespaces of that process, for the tests of the tests.
pub fn owned_by(pid: u32) -> Vec<String> {
    let prefix = prefix(pid);
    existing().into_iter().filter(|name| name.starts_with(&prefix)).collect()
}

fn existing() -> Vec<String> {
    let entries = std::fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Takes away what runs that were killed have left, with the programs that
/// still run in there.
pub fn sweep() {
    for name in existing() {
        let owner = name.strip_prefix("tg-").and_then(|rest| rest.split('-').next());
        let Some(owner) = owner.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !common::proc::is_dead(owner) {
            continue;
        }
        // Each may fail: another run may be sweeping too.
        let inside = ip(&["netns", "pids", &name], "").unwrap_or_default();
        for pid in inside.lines().filter_map(|pid| pid.trim().parse().ok()) {
            common::proc::signal(pid, Signal::KILL);
        }
        let _ = ip(&["netns", "delete", &name], "");
    }
}

/// Runs ip(8); gives what it printed.
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
