//! Starts connections from the source addresses of a plan.
//!
//! Used by every generator loop. It keeps no sockets and never waits.

use super::plan::LoadPlan;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use tidegate_net::stream::{self, ConnectTarget, Connecting};

/// Target and source addresses of connections.
#[derive(Debug)]
pub(super) struct Dialer {
    target: SocketAddr,
    sources: u8,
    next: u8,
}

// === impl Dialer ===

impl Dialer {
    /// `first` distributes the threads over the source addresses.
    pub(super) fn new(plan: &LoadPlan, first: usize) -> Dialer {
        let next = (first % usize::from(plan.sources.max(1))) as u8;
        Dialer { target: plan.target, sources: plan.sources, next }
    }

    /// Starts a connection from the next source address.
    pub(super) fn dial(&mut self) -> io::Result<(OwnedFd, Connecting)> {
        stream::connect_from(self.source(), ConnectTarget::Tcp(self.target))
    }

    fn source(&mut self) -> Option<IpAddr> {
        if self.sources <= 1 {
            return None;
        }
        let turn = self.next;
        self.next = (turn + 1) % self.sources;
        // All of 127.0.0.0/8 is this host (RFC 1122 section 3.2.1.3).
        Some(Ipv4Addr::new(127, 0, 0, turn + 1).into())
    }
}
