//! Receives heartbeats.

use super::Heartbeat;
use super::keys::KeyRing;
use super::trust::{Gate, Reject};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// An accepted heartbeat.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// What it says.
    pub heartbeat: Heartbeat,
    /// When the kernel received it.
    pub at: Instant,
    /// Accepted heartbeats of this sender it stands for, itself included; more
    /// than one only after the control thread has fallen far behind.
    pub stands_for: u32,
}

/// The thread that receives; dropping it ends the thread and closes the
/// sockets.
#[derive(Debug)]
pub struct Receiver;

/// Sockets bound for [`Receiver::commit`]; dropped, they are closed again.
#[derive(Debug)]
pub struct Prepared;

/// Counters for metrics; never go down.
#[derive(Debug)]
pub struct Counts;

impl Receiver {
    /// Binds and starts the thread.
    pub fn start(_listen: &[SocketAddr], _gate: Gate) -> io::Result<Receiver> {
        unimplemented!()
    }

    /// The oldest that waits.
    pub fn pop(&self) -> Option<Arrived> {
        unimplemented!()
    }

    /// Resolves when something may have arrived.
    pub async fn arrived(&self) {
        unimplemented!()
    }

    /// Binds what is not bound yet; changes nothing.
    pub fn prepare(&self, _listen: &[SocketAddr]) -> io::Result<Prepared> {
        unimplemented!()
    }

    /// Listens on what was prepared, and nowhere else; cannot fail.
    pub fn commit(&self, _prepared: Prepared) {}

    /// Judges by other keys from the next datagram on.
    pub fn set_keys(&self, _keys: KeyRing) {}

    /// Where it listens.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        unimplemented!()
    }

    /// Its counters, to share with the admin API.
    pub fn counts(&self) -> Arc<Counts> {
        unimplemented!()
    }

    /// Datagrams lost on this machine: never to be blamed on a backend.
    pub fn dropped(&self) -> u64 {
        unimplemented!()
    }
}

impl Counts {
    /// Believed.
    pub fn accepted(&self) -> u64 {
        unimplemented!()
    }

    /// Refused for that reason.
    pub fn rejected(&self, _reason: Reject) -> u64 {
        unimplemented!()
    }

    /// Datagrams the kernel dropped because its buffer was full.
    pub fn kernel_drops(&self) -> u64 {
        unimplemented!()
    }

    /// Heartbeats that another of the same sender stood in for.
    pub fn coalesced(&self) -> u64 {
        unimplemented!()
    }
}
