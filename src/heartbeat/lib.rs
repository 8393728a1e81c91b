//! Heartbeats: signed datagrams by which backends announce themselves, their
//! state and their load.
//!
//! Used by services that send them, by the balancer, which receives them
//! (`daemon::heartbeat`), and by the controller, which learns of accepted ones alone.
//! Nothing here decides which backend takes traffic.
//!
//! | module | what it is |
//! |---|---|
//! | [`wire`] | the datagram, byte by byte: encode, read, verify (pure) |
//! | [`keys`] | secrets and what each may speak for (pure) |
//! | [`key_file`] | reading a secret from its file |
//! | [`secret_file`] | reading any file that holds a secret |
//! | [`sender`] | sending them, for services written in Rust (a shell) |

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

/// What one datagram says, once its signature and freshness have been proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// Pool it speaks for; its key may.
    pub pool: Arc<str>,
    /// Backend name, unique in the pool.
    pub name: Arc<str>,
    /// Where the backend serves; within its key's address ranges.
    pub address: SocketAddr,
    /// Grows with every start of the sender (its start time in milliseconds
    /// since 1970); sequence numbers begin anew with each.
    pub incarnation: u64,
    /// Grows by one with every datagram of an incarnation: gaps are losses.
    pub sequence: u64,
    /// How often the sender says it sends.
    pub interval: Duration,
    /// What it says of itself.
    pub state: SenderState,
    /// The share it asks for, 1..=1000. Never raises it above what the
    /// configuration allows.
    pub weight: u16,
    /// Connections it is serving now.
    pub in_flight: u32,
    /// How busy it is, 0..=1000.
    pub load: u16,
    /// The key that signed it.
    pub key_id: u32,
}

/// What a sender says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SenderState {
    /// Not serving yet.
    Starting,
    /// Serving.
    Ready,
    /// Serving what it has, wants nothing new.
    Draining,
    /// About to be gone.
    Stopping,
}

// === impl SenderState ===

impl SenderState {
    /// Every state, in the order of a life.
    pub const ALL: [SenderState; 4] =
        [SenderState::Starting, SenderState::Ready, SenderState::Draining, SenderState::Stopping];

    /// For logs and status.
    pub fn name(self) -> &'static str {
        match self {
            SenderState::Starting => "starting",
            SenderState::Ready => "ready",
            SenderState::Draining => "draining",
            SenderState::Stopping => "stopping",
        }
    }
}
