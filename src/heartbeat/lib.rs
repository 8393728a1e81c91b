//! Heartbeats: signed datagrams with which backends announce themselves, their state and
//! their load.
//!
//! Services send them. The balancer receives them (`daemon::heartbeat`), and its
//! controller handles accepted heartbeats. This crate never decides whether a backend is
//! eligible.
//!
//! | module | purpose |
//! |---|---|
//! | [`wire`] | the datagram: encode, parse, verify (pure) |
//! | [`keys`] | secrets and the pools and addresses of each (pure) |
//! | [`key_file`] | reading a secret from its file |
//! | [`secret_file`] | reading any file that holds a secret |
//! | [`sender`] | sending heartbeats, for services written in Rust |

mod clock;
pub mod key_file;
pub mod keys;
pub mod secret_file;
pub mod sender;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// A heartbeat with a verified signature and a recent time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// The pool of the backend. The key is valid for it.
    pub pool: Arc<str>,
    /// Backend name, unique in the pool.
    pub name: Arc<str>,
    /// Address of the backend, within the address ranges of the key.
    pub address: SocketAddr,
    /// Start time of the sender, in milliseconds since 1970. It increases with every start.
    /// Each incarnation has its own sequence numbers.
    pub incarnation: u64,
    /// Increases by one with every datagram of an incarnation. A gap is a lost datagram.
    pub sequence: u64,
    /// The interval at which the sender sends.
    pub interval: Duration,
    /// The state of the backend.
    pub state: SenderState,
    /// The requested weight, 1..=1000. The configuration limits it.
    pub weight: u16,
    /// Connections that the backend serves.
    pub in_flight: u32,
    /// Load of the backend, 0..=1000.
    pub load: u16,
    /// ID of the key that signed the heartbeat.
    pub key_id: u32,
}

/// The state that a backend reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SenderState {
    /// Not serving yet.
    Starting,
    /// Serving.
    Ready,
    /// Serves its open connections and requests no new sessions.
    Draining,
    /// Will exit.
    Stopping,
}

// === impl SenderState ===

impl SenderState {
    /// Every state, in the order in which a sender has them.
    pub const ALL: [SenderState; 4] =
        [SenderState::Starting, SenderState::Ready, SenderState::Draining, SenderState::Stopping];

    /// Returns the name for logs and status.
    pub fn name(self) -> &'static str {
        match self {
            SenderState::Starting => "starting",
            SenderState::Ready => "ready",
            SenderState::Draining => "draining",
            SenderState::Stopping => "stopping",
        }
    }
}
