//! What is left of a scene when it is over: nothing.
//!
//! Sessions and slots by the balancer's own word; sockets, descriptors and
//! memory by the kernel's. Called by `play` after the session has ended and the
//! cables are mended. It never ends anything itself.

use super::candidate::Candidate;
use super::site::Site;
use crate::common::{eventually, patience, secs};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// TCP states of `/proc/net/tcp` (`net/tcp_states.h` in Linux).
const ESTABLISHED: &str = "01";
const TIME_WAIT: &str = "06";
const LISTEN: &str = "0A";

/// What the first sessions of a process may cost for good: code that is paged
/// in, buffers and pipes that are kept.
const GROWTH_KIB_MAX: u64 = 8 * 1024;

/// What the kernel may take to say the last words over a mended cable.
const LAST_WORDS_MAX: Duration = secs(20);

/// A line of the kernel's socket table.
struct Entry {
    local: u16,
    remote: u16,
    state: String,
}

/// Whether somebody on this thread's host listens on that port.
pub fn listens(port: u16) -> bool {
    table().iter().any(|entry| entry.state == LISTEN && entry.local == port)
}

/// Whether a connection to that port of this thread's host stands.
pub fn stands(port: u16) -> bool {
    table().iter().any(|entry| entry.state == ESTABLISHED && entry.local == port)
}

/// Sockets that candidate still has on the balancer's host, but for listening
/// ones and those the kernel keeps for a while for TCP's sake; waits a while for
/// there to be none.
pub fn sockets_left(candidate: &Candidate, site: &Site) -> Vec<String> {
    let deadline = Instant::now() + patience(LAST_WORDS_MAX);
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

/// Ours holds nothing more than before: no session, no slot, no socket, no
/// memory to speak of. Descriptors and an exit in order are looked at when its
/// handle drops.
#[track_caller]
pub fn assert_none(candidate: &Candidate, site: &Site, rss_before: u64) {
    let Some(proxy) = candidate.ours() else { return };
    eventually(secs(10), &format!("{}: no session is left", candidate.name), || {
        proxy.metric("tidegate_sessions_active", &[]) == 0.0
            && proxy.metric("tidegate_backend_in_flight", &[]) == 0.0
    });
    let left = sockets_left(candidate, site);
    assert!(left.is_empty(), "{}: sockets are left: {left:#?}", candidate.name);
    let grown = proxy.rss_kib().saturating_sub(rss_before);
    assert!(grown < GROWTH_KIB_MAX, "{}: {grown} KiB grown", candidate.name);
}
