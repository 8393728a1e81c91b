//! The bound addresses: one listening socket for each worker and address.
//!
//! Owned by the control loop. A reload binds what is new before anything else
//! changes, all or nothing, and retires what is gone afterwards. Workers hold
//! shares of the sockets; an address is closed when the last share is dropped.

use crate::config::{Config, Frontend};
use crate::net::listen;
use crate::proxy::worker::{Command, Worker};
use socket2::Socket;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

/// Sockets of one address, in worker order.
type Sockets = Vec<Arc<Socket>>;

/// Every address this process listens on.
#[derive(Debug)]
pub(super) struct Binds {
    workers: usize,
    active: BTreeMap<SocketAddr, Sockets>,
    /// Emptying their queues; closed once the workers have let go.
    retiring: Vec<(SocketAddr, Sockets)>,
}

/// Addresses bound and not yet in use.
#[derive(Debug)]
pub(super) struct Fresh(BTreeMap<SocketAddr, Sockets>);

/// An address that could not be bound.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) address: SocketAddr,
    pub(super) error: io::Error,
}

impl Binds {
    pub(super) fn new(workers: usize) -> Binds {
        Binds { workers, active: BTreeMap::new(), retiring: Vec::new() }
    }

    /// Binds the addresses of `config` that are not bound yet: all of them, or
    /// none.
    pub(super) fn bind_new(&self, config: &Config) -> Result<Fresh, Refused> {
        let mut fresh = BTreeMap::new();
        for frontend in &config.frontends {
            for address in &frontend.binds {
                if !self.active.contains_key(address) {
                    fresh.insert(*address, self.bind(*address, frontend)?);
                }
            }
        }
        Ok(Fresh(fresh))
    }

    fn bind(&self, address: SocketAddr, frontend: &Frontend) -> Result<Sockets, Refused> {
        let bound = || -> io::Result<Sockets> {
            // Sockets of ours that overlap would be in the way of the check; a
            // reload that moves from a wildcard to one address is fine.
            if !self.holds_port(address.port()) {
                listen::taken(address)?;
            }
            let sockets = listen::bind(address, self.workers)?;
            for socket in &sockets {
                listen::tune(socket, frontend.keepalive, frontend.user_timeout)?;
            }
            Ok(sockets.into_iter().map(Arc::new).collect())
        };
        bound().map_err(|error| Refused { address, error })
    }

    fn holds_port(&self, port: u16) -> bool {
        self.active.keys().any(|held| held.port() == port)
    }

    /// Whether an address that `config` wants is still being closed.
    pub(super) fn wanted_back(&mut self, config: &Config) -> bool {
        self.forget_retired();
        let wanted = |address: &SocketAddr| {
            config.frontends.iter().any(|frontend| frontend.binds.contains(address))
        };
        self.retiring.iter().any(|(address, _)| wanted(address))
    }

    /// Puts `fresh` in use, brings socket options up to date and retires what
    /// `config` no longer names.
    pub(super) fn adopt(&mut self, fresh: Fresh, config: &Config, workers: &[Worker]) {
        for (address, sockets) in fresh.0 {
            for (worker, socket) in workers.iter().zip(&sockets) {
                worker.mailbox.send(Command::Listen(address, Arc::clone(socket)));
            }
            self.active.insert(address, sockets);
        }
        let mut gone: Vec<SocketAddr> = self.active.keys().copied().collect();
        for frontend in &config.frontends {
            for address in &frontend.binds {
                gone.retain(|held| held != address);
                for socket in self.active.get(address).into_iter().flatten() {
                    if let Err(error) =
                        listen::tune(socket, frontend.keepalive, frontend.user_timeout)
                    {
                        tracing::warn!(%address, %error, "socket options not changed");
                    }
                }
            }
        }
        for address in gone {
            self.retire(address, workers);
        }
    }

    /// Retires everything.
    pub(super) fn retire_all(&mut self, workers: &[Worker]) {
        let all: Vec<SocketAddr> = self.active.keys().copied().collect();
        for address in all {
            self.retire(address, workers);
        }
    }

    fn retire(&mut self, address: SocketAddr, workers: &[Worker]) {
        let Some(sockets) = self.active.remove(&address) else { return };
        for socket in &sockets {
            if let Err(error) = listen::retire(socket) {
                // Then clients may still be queued when it closes, and be reset.
                tracing::warn!(%address, %error, "cannot keep new clients out while closing");
            }
        }
        for worker in workers {
            worker.mailbox.send(Command::Retire(address));
        }
        self.retiring.push((address, sockets));
    }

    /// Closes what the workers have let go of; true once nothing is retiring.
    pub(super) fn forget_retired(&mut self) -> bool {
        let in_use = |sockets: &Sockets| sockets.iter().any(|socket| Arc::strong_count(socket) > 1);
        self.retiring.retain(|(_, sockets)| in_use(sockets));
        self.retiring.is_empty()
    }

    /// Whether a given-up address is still open.
    pub(super) fn is_retiring(&self) -> bool {
        !self.retiring.is_empty()
    }

    /// Listening sockets open now.
    pub(super) fn sockets(&self) -> usize {
        (self.active.len() + self.retiring.len()) * self.workers
    }
}
