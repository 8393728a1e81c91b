//! A backend for the ledger's streams that can be killed and restarted.
//!
//! Used by `tidegate selftest` and `tidegate streams`. It runs one thread per
//! connection, because it holds only a few at a time. It does not decide what is a
//! fault. It reports which streams it reset.

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

/// Pause of the accept loop while no client connects.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Time from the last handshake to its accept. Handshakes on loopback take
/// microseconds.
const SETTLE: Duration = Duration::from_millis(2);

/// Time in which a connection must send its seed.
const SEED_MAX: Duration = Duration::from_secs(2);

/// A backend, listening or stopped.
#[derive(Debug)]
pub struct LedgerBackend {
    address: SocketAddr,
    ledger: Arc<Ledger>,
    running: Option<RunningBackend>,
}

#[derive(Debug)]
struct RunningBackend {
    listener: Arc<Socket>,
    shared: Arc<LedgerShared>,
    acceptor: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct LedgerShared {
    stopping: AtomicBool,
    open: Mutex<HashMap<u64, OpenStream>>,
}

#[derive(Debug)]
struct OpenStream {
    socket: Arc<Socket>,
    /// Known once it was received.
    seed: Option<u64>,
}

// === impl LedgerBackend ===

impl LedgerBackend {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// No port, descriptor or thread is available.
    pub fn start(ledger: Arc<Ledger>) -> io::Result<LedgerBackend> {
        LedgerBackend::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), ledger)
    }

    /// Listens on `address`; port 0 picks a free port.
    ///
    /// # Errors
    /// As [`LedgerBackend::start`], or the address is in use.
    pub fn start_at(address: SocketAddr, ledger: Arc<Ledger>) -> io::Result<LedgerBackend> {
        let mut backend = LedgerBackend { address, ledger, running: None };
        backend.restart()?;
        Ok(backend)
    }

    /// Returns its address, also while it is stopped.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns whether it listens.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Listens on the same address again.
    ///
    /// # Errors
    /// The address is in use, or no descriptor or thread is available.
    pub fn restart(&mut self) -> io::Result<()> {
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
        self.running = Some(RunningBackend { listener, shared, acceptor });
        Ok(())
    }

    /// Stops as a crashed backend does: refuses connects and resets its connections.
    /// Returns the number of reset streams. All of them are excused.
    ///
    /// No balancer could save one of these streams: every connection that the kernel
    /// established was accepted, and its stream has begun.
    pub fn kill(&mut self) -> usize {
        let Some(RunningBackend { listener, shared, acceptor }) = self.running.take() else {
            return 0;
        };
        let mut cut = self.cut(&shared);
        // If this fails, a few more streams are reset, and these are not excused.
        let _ = listen::retire(&listener);
        clock::pause(SETTLE);
        shared.stopping.store(true, Ordering::Relaxed);
        let _ = acceptor.join();
        drop(listener);
        // Connections that were established in between.
        let deadline = clock::now() + SEED_MAX;
        loop {
            cut += self.cut(&shared);
            let silent = |open: &OpenStream| open.seed.is_none();
            if !held(&shared.open).values().any(silent) || clock::now() >= deadline {
                return cut;
            }
            clock::pause(POLL_INTERVAL);
        }
    }

    /// Resets every connection whose seed is known.
    fn cut(&self, shared: &LedgerShared) -> usize {
        let mut cut = 0;
        held(&shared.open).retain(|_, open| {
            let Some(seed) = open.seed else { return true };
            self.ledger.excuse(seed);
            let _ = open.socket.set_linger(Some(Duration::ZERO));
            // Wakes the reading thread. The close that follows resets the connection.
            let _ = open.socket.shutdown(Shutdown::Read);
            cut += 1;
            false
        });
        cut
    }
}

impl Drop for LedgerBackend {
    fn drop(&mut self) {
        if let Some(RunningBackend { shared, acceptor, .. }) = self.running.take() {
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
            // Ends only with an empty queue.
            Err(_) if shared.stopping.load(Ordering::Relaxed) => return,
            Err(_) => clock::pause(POLL_INTERVAL),
        }
    }
}

fn serve(number: u64, socket: OwnedFd, shared: &Arc<LedgerShared>, ledger: &Arc<Ledger>) {
    let socket = Arc::new(Socket::from(socket));
    if socket.set_nonblocking(false).is_err() {
        return;
    }
    held(&shared.open).insert(number, OpenStream { socket: Arc::clone(&socket), seed: None });
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
    fn streams_are_complete_and_a_killed_backend_refuses() {
        let ledger = ledger();
        let mut backend = LedgerBackend::start(Arc::clone(&ledger)).unwrap();
        ledger.run(&[backend.address()], 0..100, 4);
        assert!(ledger.faults().is_empty() && ledger.is_settled());
        assert_eq!(backend.kill(), 0);
        ledger.run(&[backend.address()], 100..101, 1);
        let faults = ledger.faults();
        assert!(faults.len() == 1 && faults[0].kind == StreamFaultKind::Refused, "{faults:?}");
        backend.restart().unwrap();
        ledger.run(&[backend.address()], 101..120, 4);
        assert_eq!(ledger.faults().len(), 1);
    }

    #[test]
    fn only_streams_of_a_killed_backend_are_excused() {
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
        // Refused connects are faults, because no balancer retries them.
        let cut_unexcused =
            ledger.faults().iter().filter(|one| one.kind != StreamFaultKind::Refused).count();
        assert_eq!(cut_unexcused, 0, "{cut} excused: {:?}", ledger.faults());
    }
}
