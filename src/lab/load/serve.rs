//! Servers that answer load, correctly or with faults.
//!
//! Run by `lab::cli::backend`. Each thread has its own listeners on the shared
//! addresses and serves the connections that the kernel gives it. Content is counted,
//! never inspected.

mod behaviour;
mod peer;
mod worker;

pub use behaviour::Behaviour;

use crate::load::threads::LoadThreads;
use serde::Serialize;
use socket2::Socket;
use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;
use tidegate_net::listen;

/// What to serve, and where.
#[derive(Debug, Clone)]
pub struct Service {
    /// Addresses to listen on; port 0 picks a free port. Every thread listens on each.
    pub listen: Vec<SocketAddr>,
    /// What to do with connections.
    pub behaviour: Behaviour,
    /// Bytes at the start of each connection that are not echoed.
    pub skip: u64,
    /// Number of threads; at least one.
    pub threads: usize,
    /// CPUs to pin the threads to; empty: no pinning.
    pub cpus: Vec<usize>,
    /// Run time; `None`: until stopped.
    pub duration: Option<Duration>,
}

/// Counts of the servers; `tidegate backend --json` prints them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ServeReport {
    /// Connections accepted.
    pub accepted: u64,
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// Connections that failed.
    pub failed: u64,
    /// Connections open at the end.
    pub open: u64,
    /// Connections that could not be accepted.
    pub refused: u64,
    /// Complete requests that were answered; counted by `Respond` only.
    pub requests: u64,
    /// Connections reset on purpose.
    pub reset: u64,
}

/// Starts serving. Returns the threads and the bound addresses.
///
/// # Errors
/// An address is in use, or a thread cannot be started.
pub fn serve(service: Service) -> io::Result<(LoadThreads<ServeReport>, Vec<SocketAddr>)> {
    let mut bound = Vec::with_capacity(service.listen.len());
    // One set of listeners per thread.
    let mut sets: Vec<Vec<_>> = (0..service.threads).map(|_| Vec::new()).collect();
    for address in &service.listen {
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
        };
        if address.port() != 0 {
            listen::check_unused((*address).into()).map_err(named)?;
        }
        let mut sockets = bind_all(*address, service.threads).map_err(named)?;
        let local = sockets[0].local_addr()?.as_socket();
        bound.push(local.ok_or_else(|| io::Error::other("address without a port"))?);
        for (set, socket) in sets.iter_mut().zip(sockets.drain(..)) {
            service.behaviour.tune(&socket)?;
            set.push(socket);
        }
    }
    let sets = Mutex::new(sets);
    let (threads, cpus) = (service.threads, service.cpus.clone());
    let load_threads = LoadThreads::start("backend", threads, &cpus, move |handle| {
        let listeners = sets.lock().ok().and_then(|mut sets| sets.pop()).unwrap_or_default();
        worker::run(&service, &handle, listeners)
    })?;
    Ok((load_threads, bound))
}

/// Opens `count` listeners on one address. If the kernel picks the port, all use the
/// same.
fn bind_all(address: SocketAddr, count: usize) -> io::Result<Vec<Socket>> {
    let mut sockets = listen::bind(address, 1)?;
    if count > 1 {
        let bound = sockets[0].local_addr()?.as_socket().unwrap_or(address);
        sockets.append(&mut listen::bind(bound, count - 1)?);
    }
    Ok(sockets)
}

// === impl ServeReport ===

impl ServeReport {
    /// Adds the counts of another thread.
    #[must_use]
    pub fn merge(self, other: &ServeReport) -> ServeReport {
        ServeReport {
            accepted: self.accepted + other.accepted,
            open: self.open + other.open,
            requests: self.requests + other.requests,
            bytes_in: self.bytes_in + other.bytes_in,
            bytes_out: self.bytes_out + other.bytes_out,
            failed: self.failed + other.failed,
            reset: self.reset + other.reset,
            refused: self.refused + other.refused,
        }
    }
}
