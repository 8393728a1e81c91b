//! What load to make: the plan a generator follows.
//!
//! Built by `lab::cli::bench` from its arguments. Plain values; it does no I/O.

use std::net::SocketAddr;
use std::time::Duration;

/// Most connections of one plan: more than any descriptor limit allows, and
/// they still fit a slot number.
pub const CONNECTIONS_MAX: u32 = 1 << 20;

/// Largest message or write. Two of these a thread is all the memory it takes.
pub const SIZE_MAX: usize = 16 * 1024 * 1024;

/// What each connection does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LoadMode {
    /// Send a message, wait for the answer, and again.
    PingPong,
    /// Connect, one request, its answer, close, and again.
    Short(CloseMode),
    /// Send without end.
    Upload,
    /// Receive without end.
    Download,
    /// Send this many messages a second over all connections together, whether
    /// or not earlier ones are answered.
    OpenLoop {
        /// Messages a second; above zero.
        rate: f64,
    },
    /// Hold the connections.
    Idle,
    /// Hold each for a random time (exponential), close, and again.
    Churn {
        /// Mean life of a connection.
        lifetime: Duration,
        /// How connections are closed.
        close: CloseMode,
    },
}

/// How the generator closes a connection it is done with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseMode {
    /// In order; the port then rests in TIME-WAIT.
    Fin,
    /// At once; the port is free again.
    Reset,
}

/// The whole of a run.
#[derive(Debug, Clone)]
pub struct LoadPlan {
    /// Where to connect.
    pub target: SocketAddr,
    /// What connections do.
    pub mode: LoadMode,
    /// How many, over all threads; at least one for each thread.
    pub connections: usize,
    /// Bytes of a request or of a write; 0 only for `Idle` and `Churn`, which
    /// then ask nothing.
    pub size: usize,
    /// Bytes of the answer to a request; at least one.
    pub answer: usize,
    /// How long to measure, once all connections stand.
    pub duration: Duration,
    /// Measured time that makes one window, each reported when it is over; or
    /// none but the whole.
    pub window: Option<Duration>,
    /// Threads; at least one.
    pub threads: usize,
    /// CPUs to pin them to, or none.
    pub cpus: Vec<usize>,
    /// Source addresses to connect from, 127.0.0.1 and on; 1 leaves the choice
    /// to the kernel. More than one only for a loopback IPv4 target.
    pub sources: u8,
}
