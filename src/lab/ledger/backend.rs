//! A backend for a ledger's streams that can die like a real one.
//!
//! Used by `tidegate selftest`. One thread a connection: it holds a handful at a
//! time. It never decides what is a fault; it says which streams it took with it.

use super::{Ledger, held};
use socket2::Socket;
use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tidegate_net::clock;
use tidegate_net::listen;

/// Pause of the accept loop while nobody comes.
const LOOK: Duration = Duration::from_millis(1);

/// From the last client let in to the last one accepted: handshakes on loopback
/// take microseconds.
const SETTLE: Duration = Duration::from_millis(2);

/// How long a connection may take to say which stream it is.
const SEED_MAX: Duration = Duration::from_secs(2);

/// A listening backend.
#[derive(Debug)]
pub struct LedgerBackend {
    address: SocketAddr,
    ledger: Arc<Ledger>,
    running: Option<LedgerConnection>,
}

#[derive(Debug)]
struct LedgerConnection {
    listener: Arc<Socket>,
    shared: Arc<LedgerShared>,
    acceptor: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct LedgerShared {
    stopping: AtomicBool,
    open: Mutex<HashMap<u64, OpenStreams>>,
}

#[derive(Debug)]
struct OpenStreams {
    socket: Arc<Socket>,
    /// Once it has said so.
    seed: Option<u64>,
}

// === impl LedgerBackend ===

impl LedgerBackend {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// No port, descriptor or thread is left.
    pub fn start(ledger: Arc<Ledger>) -> io::Result<LedgerBackend> {
        LedgerBackend::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), ledger)
    }

    /// Listens there; port 0 is any.
    ///
    /// # Errors
    /// As with [`LedgerBackend::start`], or somebody else listens there.
    pub fn start_at(address: SocketAddr, ledger: Arc<Ledger>) -> io::Result<LedgerBackend> {
        let mut backend = LedgerBackend { address, ledger, running: None };
        backend.revive()?;
        Ok(backend)
    }

    /// Where it listens, dead or alive.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it listens.
    pub fn is_alive(&self) -> bool {
        self.running.is_some()
    }

    /// Listens again where it did.
    ///
    /// # Errors
    /// Somebody else does, or no descriptor or thread is left.
    pub fn revive(&mut self) -> io::Result<()> {
        if self.running.is_some() {
            return Ok(());
        }
        let listener = listen::bind(self.address, 1)?.pop();
        let listener = Arc::new(listener.ok_or_else(|| io::Error::other("no socket"))?);
        let bound = listener.local_addr()?.as_socket();
        self.address = bound.ok_or_else(|| io::Error::other("no address"))?;
        let shared = Arc::new(LedgerShared::default());
        let accept = {
            let (listener, shared) = (Arc::clone(&listener), Arc::clone(&shared));
            let ledger = Arc::clone(&self.ledger);
            move || accept_all(&listener, &shared, &ledger)
        };
        let acceptor = std::thread::Builder::new().name("backend".to_owned()).spawn(accept)?;
        self.running = Some(LedgerConnection { listener, shared, acceptor });
        Ok(())
    }

    /// Dies: refuses connects, and resets what it has. Gives how many streams it
    /// took with it, all of which are excused. No stream is in a state that a
    /// balancer could save: every connection the kernel has let in was accepted
    /// and has begun.
    pub fn kill(&mut self) -> usize {
        let Some(LedgerConnection { listener, shared, acceptor }) = self.running.take() else {
            return 0;
        };
        let mut cut = self.cut(&shared);
        // On failure a few streams more are cut, and not excused.
        let _ = listen::retire(&listener);
        clock::pause(SETTLE);
        shared.stopping.store(true, Ordering::Relaxed);
        let _ = acceptor.join();
        drop(listener);
        // Who got in meanwhile.
        let deadline = clock::now() + SEED_MAX;
        loop {
            cut += self.cut(&shared);
            let silent = |open: &OpenStreams| open.seed.is_none();
            if !held(&shared.open).values().any(silent) || clock::now() >= deadline {
                return cut;
            }
            clock::pause(LOOK);
        }
    }

    /// Resets every connection that has said which stream it is.
    fn cut(&self, shared: &LedgerShared) -> usize {
        let mut cut = 0;
        held(&shared.open).retain(|_, open| {
            let Some(seed) = open.seed else { return true };
            self.ledger.excuse(seed);
            let _ = open.socket.set_linger(Some(Duration::ZERO));
            // Wakes whoever reads; the close that follows resets.
            let _ = open.socket.shutdown(Shutdown::Read);
            cut += 1;
            false
        });
        cut
    }
}

impl Drop for LedgerBackend {
    fn drop(&mut self) {
        if let Some(LedgerConnection { shared, acceptor, .. }) = self.running.take() {
            shared.stopping.store(true, Ordering::Relaxed);
            let _ = acceptor.join();
        }
    }
}

fn accept_all(listener: &Socket, shared: &Arc<LedgerShared>, ledger: &Arc<Ledger>) {
    let mut number = 0u64;
    loop {
        match listen::accept(listener) {
            Ok((socket, _)) => {
                number += 1;
                serve(number, socket, shared, ledger);
            }
            // Only an empty queue ends it.
            Err(_) if shared.stopping.load(Ordering::Relaxed) => return,
            Err(_) => clock::pause(LOOK),
        }
    }
}

fn serve(number: u64, socket: OwnedFd, shared: &Arc<LedgerShared>, ledger: &Arc<Ledger>) {
    let socket = Arc::new(Socket::from(socket));
    if socket.set_nonblocking(false).is_err() {
        return;
    }
    held(&shared.open).insert(number, OpenStreams { socket: Arc::clone(&socket), seed: None });
    let (of_this, ledger) = (Arc::clone(shared), Arc::clone(ledger));
    let run = move || {
        ledger.serve(&socket, |seed| {
            if let Some(open) = held(&of_this.open).get_mut(&number) {
                open.seed = Some(seed);
            }
        });
        held(&of_this.open).remove(&number);
    };
    if std::thread::Builder::new().name("stream".to_owned()).spawn(run).is_err() {
        held(&shared.open).remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{StreamFaultKind, StreamSizes};
    use super::*;

    const SMALL: StreamSizes = StreamSizes { most: 64 * 1024, large_one_in: 0 };

    fn ledger() -> Arc<Ledger> {
        Arc::new(Ledger::new(SMALL, false, Duration::from_secs(10)))
    }

    #[test]
    fn streams_are_whole_and_a_dead_backend_refuses() {
        let ledger = ledger();
        let mut backend = LedgerBackend::start(Arc::clone(&ledger)).unwrap();
        ledger.run(&[backend.address()], 0..100, 4);
        assert!(ledger.faults().is_empty() && ledger.is_settled());
        assert_eq!(backend.kill(), 0);
        ledger.run(&[backend.address()], 100..101, 1);
        let faults = ledger.faults();
        assert!(faults.len() == 1 && faults[0].kind == StreamFaultKind::Refused, "{faults:?}");
        backend.revive().unwrap();
        ledger.run(&[backend.address()], 101..120, 4);
        assert_eq!(ledger.faults().len(), 1);
    }

    #[test]
    fn streams_a_backend_takes_with_it_are_excused_and_others_are_not() {
        let ledger = ledger();
        let mut backend = LedgerBackend::start(Arc::clone(&ledger)).unwrap();
        let address = backend.address();
        let stop = AtomicBool::new(false);
        let mut cut = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| ledger.run_from(1, &[address], &stop, 8));
            clock::pause(Duration::from_millis(200));
            cut = backend.kill();
            stop.store(true, Ordering::Relaxed);
        });
        // Connects that found nobody are faults: there is no balancer here.
        let cut_unexcused =
            ledger.faults().iter().filter(|one| one.kind != StreamFaultKind::Refused).count();
        assert_eq!(cut_unexcused, 0, "{cut} excused: {:?}", ledger.faults());
    }
}
