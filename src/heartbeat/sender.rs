//! Sends heartbeats: the library for services written in Rust, and what
//! `tidegate heartbeat` runs on.

use super::SenderState;
use super::keys::Secret;
use super::wire::Identity;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// What is sent where.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Balancers.
    pub to: Vec<SocketAddr>,
    /// Who.
    pub identity: Identity,
    /// Number of the secret.
    pub key_id: u32,
    /// What it signs with.
    pub secret: Secret,
    /// How often.
    pub interval: Duration,
}

/// A running sender.
#[derive(Debug)]
pub struct Sender;

impl Sender {
    /// Starts the thread; the state is `Starting`, the weight 1.
    pub fn start(_settings: Settings) -> io::Result<Sender> {
        unimplemented!()
    }

    /// Sends the new state at once.
    pub fn set_state(&self, _state: SenderState) {}
    /// 1..=1000.
    pub fn set_weight(&self, _weight: u16) {}
    /// 0..=1000.
    pub fn set_load(&self, _load: u16) {}
    /// Connections.
    pub fn set_in_flight(&self, _in_flight: u32) {}
    /// Sends `Stopping` a few times and ends.
    pub fn close(self) {}
}
