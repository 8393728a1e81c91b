//! The plan that a load generator executes.
//!
//! `lab::cli::bench` builds it from its arguments. Plain values; no I/O.

use std::net::SocketAddr;
use std::time::Duration;

/// Maximum number of connections of a plan: more than any descriptor limit allows, and
/// few enough for a `u32` slot number.
pub const CONNECTIONS_MAX: u32 = 1 << 20;

/// Maximum size of a message or write. A thread needs memory for at most two of these.
pub const SIZE_MAX: usize = 16 * 1024 * 1024;

/// A PROXY header of version 2 for TCP over IPv4, from 192.0.2.10:51234 to 198.51.100.20:443.
pub(super) const PROXY_HEADER: &[u8; 28] =
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x0a\xc6\x33\x64\x14\xc8\x22\x01\xbb";

/// What each connection does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LoadMode {
    /// Send a message, wait for the answer, repeat.
    PingPong,
    /// Connect, send one request, read its answer, close, repeat.
    Short(CloseMode),
    /// Send continuously.
    Upload,
    /// Receive continuously.
    Download,
    /// Send at a fixed rate over all connections, whether or not earlier messages are
    /// answered.
    OpenLoop {
        /// Messages per second; above zero.
        rate: f64,
    },
    /// Hold connections open.
    Idle,
    /// Hold each connection for a random time (exponential distribution), close it,
    /// repeat.
    Churn {
        /// Mean lifetime of a connection.
        lifetime: Duration,
        /// How connections are closed.
        close: CloseMode,
    },
}

/// How the generator closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseMode {
    /// With FIN; the port then stays in TIME-WAIT.
    Fin,
    /// With RST; the port is free immediately.
    Reset,
}

/// All parameters of a run.
#[derive(Debug, Clone)]
pub struct LoadPlan {
    /// Target address.
    pub target: SocketAddr,
    /// What each connection does.
    pub mode: LoadMode,
    /// Number of connections over all threads; at least one per thread.
    pub connections: usize,
    /// Bytes of a request or a write. 0 only with `Idle` and `Churn`, which then send
    /// no request.
    pub size: usize,
    /// Bytes of an answer; at least one.
    pub answer: usize,
    /// Whether a PROXY header precedes the request. Only with modes that send one request per
    /// connection.
    pub header: bool,
    /// Measured time. It starts when all connections are established.
    pub duration: Duration,
    /// Length of a window; each is reported when it ends. `None`: no windows.
    pub window: Option<Duration>,
    /// Number of threads; at least one.
    pub threads: usize,
    /// CPUs to pin the threads to; empty: no pinning.
    pub cpus: Vec<usize>,
    /// Number of source addresses, from 127.0.0.1 upwards. 1: the kernel chooses. More
    /// than one only with a loopback IPv4 target.
    pub sources: u8,
}
