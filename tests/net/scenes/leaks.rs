//! Checks that a finished scene leaves no resources.
//!
//! Sessions and slots according to Tidegate; sockets, descriptors and memory according to the
//! kernel. Called by `play` after the session has ended and the links are repaired. It ends
//! nothing itself.

use super::candidate::Candidate;
use super::site::Site;
use crate::common::{eventually, patience, secs};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// TCP states of `/proc/net/tcp` (`net/tcp_states.h` in Linux).
const ESTABLISHED: &str = "01";
const TIME_WAIT: &str = "06";
const LISTEN: &str = "0A";

/// Memory that the first sessions of a process can keep: code pages, buffers and pipes.
const GROWTH_KIB_MAX: u64 = 8 * 1024;

/// The time in which the kernel must close all sockets over a repaired link.
const CLOSE_MAX: Duration = secs(20);

/// One line of the kernel's socket table.
struct Entry {
    local: u16,
    remote: u16,
    state: String,
}

/// Returns true if the current thread's host has a listener on the port.
pub fn listens(port: u16) -> bool {
    table().iter().any(|entry| entry.state == LISTEN && entry.local == port)
}

/// Returns true if a connection to the port of the current thread's host is established.
pub fn is_established(port: u16) -> bool {
    table().iter().any(|entry| entry.state == ESTABLISHED && entry.local == port)
}

/// Returns the candidate's remaining sockets on Tidegate's host, except listeners and sockets in
/// TIME_WAIT. Waits until none is left, for at most [`CLOSE_MAX`].
pub fn sockets_left(candidate: &Candidate, site: &Site) -> Vec<String> {
    let deadline = Instant::now() + patience(CLOSE_MAX);
    loop {
        let left = site.balancer.run(|| sockets(candidate.frontend, candidate.backend));
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn sockets(frontend: SocketAddr, backend: SocketAddr) -> Vec<String> {
    let its = |entry: &Entry| entry.local == frontend.port() || entry.remote == backend.port();
    let over = |entry: &Entry| entry.state == LISTEN || entry.state == TIME_WAIT;
    let left = table().into_iter().filter(|entry| its(entry) && !over(entry));
    let show = |Entry { local, remote, state }| format!("{local} to {remote}: state {state}");
    left.map(show).collect()
}

fn table() -> Vec<Entry> {
    let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
    let texts = tables.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let lines = texts.iter().flat_map(|text| text.lines().skip(1));
    let port = |address: &str| {
        let (_, port) = address.rsplit_once(':').expect("address:port");
        u16::from_str_radix(port, 16).expect("a port in hexadecimal digits")
    };
    let entry = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        Entry { local: port(fields[1]), remote: port(fields[2]), state: fields[3].to_string() }
    };
    lines.map(entry).collect()
}

/// Checks that Tidegate holds nothing new: no session, slot or socket, and little
/// memory. Dropping the proxy handle checks descriptors and the exit code.
#[track_caller]
pub fn assert_none(candidate: &Candidate, site: &Site, rss_before: u64) {
    let Some(proxy) = candidate.tidegate() else { return };
    eventually(secs(10), &format!("{}: no session is left", candidate.name), || {
        proxy.metric("tidegate_sessions_active", &[]) == 0.0
            && proxy.metric("tidegate_backend_in_flight", &[]) == 0.0
    });
    let left = sockets_left(candidate, site);
    assert!(left.is_empty(), "{}: sockets are left: {left:#?}", candidate.name);
    let grown = proxy.rss_kib().saturating_sub(rss_before);
    assert!(grown < GROWTH_KIB_MAX, "{}: {grown} KiB grown", candidate.name);
}
