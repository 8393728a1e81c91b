//! A fake kernel for tests: sockets, pipes, an epoll set and an io_uring behind the system
//! calls of `net`. A seed determines every result.
//!
//! The simulator of `dataplane` installs it on a thread. The code that uses `net` runs
//! unchanged. Descriptors are real (of pipes without data), so that ownership and closing
//! are also tested. It is never part of a release build.

#![allow(
    missing_docs,
    missing_debug_implementations,
    clippy::unwrap_used,
    reason = "only for tests"
)]

mod calls;
mod plan;
mod poll;
mod socket;
mod uring;

pub use calls::*;
pub use plan::{FaultSchedule, InjectedFault, SimCall, is_local_error};
pub use socket::{PeerSignal, SimSocket, SocketRole};
pub use uring::*;

use fastrand::Rng;
use poll::SimEpoll;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use uring::SimRing;

thread_local! {
    static KERNEL: RefCell<Option<SimKernel>> = const { RefCell::new(None) };
}

/// The kernel of one simulated machine.
#[derive(Debug)]
pub struct SimKernel {
    pub rng: Rng,
    pub plan: FaultSchedule,
    /// Number of calls until now that can fail.
    pub calls: u64,
    /// All these calls, if the test needs them.
    pub log: Option<Vec<SimCall>>,
    /// All sockets, including closed sockets.
    pub sockets: Vec<SimSocket>,
    by_fd: HashMap<RawFd, usize>,
    pipes: Vec<SimPipe>,
    /// Length of the listen queue of each listener.
    listeners: HashMap<RawFd, u32>,
    set: SimEpoll,
    uring: SimRing,
    /// True if connects can finish immediately, as on loopback.
    pub connects_at_once: bool,
    /// Most bytes that one call moves.
    pub most: u64,
    /// Errnos that were injected into calls.
    pub injected: Vec<i32>,
    /// Number of uses of a descriptor after its socket was closed.
    pub misused: u64,
    trace: DefaultHasher,
}

/// A pipe. Its bytes are ranges of streams.
#[derive(Debug)]
struct SimPipe {
    ends: [RawFd; 2],
    close_watches: [OwnedFd; 2],
    size: u64,
    /// Stream, offset, length.
    holds: VecDeque<(u8, u64, u64)>,
}

/// Installs a fake kernel on this thread until it is dropped.
pub struct KernelGuard;

/// Runs `run` on the fake kernel of this thread. Panics if the thread has none.
pub fn with<T>(run: impl FnOnce(&mut SimKernel) -> T) -> T {
    try_with(run).expect("a kernel is installed")
}

pub fn is_installed() -> bool {
    // If it is borrowed, a kernel is installed.
    KERNEL.with(|kernel| kernel.try_borrow().map_or(true, |kernel| kernel.is_some()))
}

fn try_with<T>(run: impl FnOnce(&mut SimKernel) -> T) -> Option<T> {
    KERNEL.with_borrow_mut(|kernel| kernel.as_mut().map(run))
}

// === impl KernelGuard ===

impl KernelGuard {
    pub fn new(kernel: SimKernel) -> KernelGuard {
        KERNEL.set(Some(kernel));
        KernelGuard
    }
}

impl Drop for KernelGuard {
    fn drop(&mut self) {
        KERNEL.set(None);
    }
}

// === impl SimKernel ===

impl SimKernel {
    pub fn new(seed: u64) -> SimKernel {
        let mut rng = Rng::with_seed(seed);
        SimKernel {
            uring: SimRing::new(&mut rng),
            connects_at_once: rng.bool(),
            most: rng.choice([7, 700, 1 << 20, 1 << 20]).unwrap_or(7),
            rng,
            plan: FaultSchedule::Never,
            calls: 0,
            log: None,
            sockets: Vec::new(),
            by_fd: HashMap::new(),
            pipes: Vec::new(),
            listeners: HashMap::new(),
            set: SimEpoll::default(),
            injected: Vec::new(),
            misused: 0,
            trace: DefaultHasher::new(),
        }
    }

    /// Returns a hash of all events until now.
    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }

    /// Adds an event to the trace.
    pub fn note(&mut self, what: impl Hash) {
        what.hash(&mut self.trace);
    }

    /// Returns the fault of a call that can fail. Run it before each such call.
    ///
    /// An errno that means a failed connection also fails the connection.
    fn fault(&mut self, call: SimCall, socket: Option<usize>) -> Option<InjectedFault> {
        let index = self.calls;
        self.calls += 1;
        if let Some(log) = &mut self.log {
            log.push(call);
        }
        let fault = self.plan.fault(call, index, &mut self.rng);
        self.note((call, socket, fault));
        if let Some(InjectedFault::Errno(errno)) = fault {
            self.injected.push(errno);
        }
        if let Some(InjectedFault::Errno(errno)) = fault
            && let Some(id) = socket
        {
            let socket = &mut self.sockets[id];
            socket.injected.push(errno);
            if !plan::survives(errno) && !matches!(call, SimCall::Option | SimCall::Watch) {
                socket.fail(errno);
                // This call reports the error; the next reports the end of the stream.
                socket.error = 0;
                socket.peer_failed = true;
                self.changed(id);
            }
        }
        fault
    }

    /// Adds a socket of the balancer. Returns its descriptor and its number.
    fn add_socket(&mut self, role: SocketRole) -> io::Result<(OwnedFd, usize)> {
        let (close_watch, own) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (id, fd) = (self.sockets.len(), own.as_raw_fd());
        self.note_closed();
        // The number of a stream is that of its socket modulo 250, plus 1. 0 is no stream.
        self.sockets.push(SimSocket::new(role, (id % 250) as u8 + 1, fd, close_watch));
        self.by_fd.insert(fd, id);
        Ok((own, id))
    }

    /// Returns the socket of a descriptor of the fake kernel.
    fn find(&self, fd: RawFd) -> Option<usize> {
        self.by_fd.get(&fd).copied()
    }

    /// Adds a client to the listen queue of a listener.
    pub fn arrive(&mut self, listener: RawFd) {
        *self.listeners.entry(listener).or_default() += 1;
    }

    pub fn queued(&self) -> u32 {
        self.listeners.values().sum()
    }

    /// Reports a change of the socket to the epoll set.
    pub fn changed(&mut self, id: usize) {
        self.set.wake(id);
    }

    /// Finds descriptors that the balancer has closed, and closes their connections.
    pub fn note_closed(&mut self) {
        for id in hung_up(self.sockets.iter().map(|socket| socket.close_watch.as_ref())) {
            let fd = self.sockets[id].fd;
            self.sockets[id].closed();
            self.by_fd.remove(&fd);
            self.set.forget(id);
            self.note(("closed", id, self.sockets[id].last_signal as u8));
        }
        let gone = hung_up(self.pipes.iter().map(|pipe| Some(&pipe.close_watches[0])));
        for at in gone.into_iter().rev() {
            self.pipes.remove(at);
        }
    }

    pub fn open_pipes(&self) -> usize {
        self.pipes.len()
    }

    pub fn is_garbled(&self) -> bool {
        self.sockets.iter().any(|socket| socket.garbled)
    }
}

/// Returns the indices of the descriptors whose other end is closed.
fn hung_up<'a>(close_watches: impl Iterator<Item = Option<&'a OwnedFd>>) -> Vec<usize> {
    let (mut which, mut fds) = (Vec::new(), Vec::new());
    for (index, close_watch) in close_watches.enumerate() {
        if let Some(close_watch) = close_watch {
            which.push(index);
            fds.push(PollFd::from_borrowed_fd(close_watch.as_fd(), PollFlags::empty()));
        }
    }
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&at_once)).expect("polling pipes of this process");
    let polled = which.into_iter().zip(&fds);
    polled.filter(|(_, fd)| !fd.revents().is_empty()).map(|(index, _)| index).collect()
}

// === impl SimKernel: what peers and paths do ===

impl SimKernel {
    /// The peer sends `bytes` more.
    pub fn peer_sends(&mut self, id: usize, bytes: u64) {
        let socket = &mut self.sockets[id];
        if socket.is_open() && !socket.fin && !socket.dead {
            socket.sent += bytes;
            self.changed(id);
        }
    }

    /// The peer sends FIN; with `gone` it has closed its socket.
    pub fn peer_ends(&mut self, id: usize, gone: bool) {
        let socket = &mut self.sockets[id];
        if socket.is_open() && !socket.dead {
            socket.fin = true;
            socket.gone |= gone;
            self.changed(id);
        }
    }

    /// The connection fails.
    pub fn peer_fails(&mut self, id: usize, errno: i32) {
        let socket = &mut self.sockets[id];
        if socket.is_open() && !socket.dead {
            socket.peer_failed = true;
            let errno = if socket.fin && errno == libc::ECONNRESET { libc::EPIPE } else { errno };
            socket.fail(errno);
            self.changed(id);
        }
    }

    /// The peer reads `bytes`, which frees as much space.
    pub fn peer_reads(&mut self, id: usize, bytes: u64) {
        let socket = &mut self.sockets[id];
        if socket.is_open() {
            socket.room = socket.room.saturating_add(bytes);
            self.changed(id);
        }
    }

    /// A pending connect succeeds or fails.
    pub fn decide(&mut self, id: usize) {
        if self.sockets[id].state != socket::SimSocketState::Connecting
            || !self.sockets[id].is_open()
        {
            return;
        }
        match self.fault(SimCall::Decide, Some(id)) {
            // The socket returns the error at the next call.
            Some(InjectedFault::Errno(errno)) => self.sockets[id].error = errno,
            _ => self.sockets[id].state = socket::SimSocketState::Up,
        }
        self.changed(id);
    }

    /// Runs events that need no call: bytes arrive at the peers, and ring operations
    /// complete.
    pub fn run_events(&mut self) {
        self.note_closed();
        let busy = |socket: &&mut SimSocket| socket.is_open() && socket.queued() > 0;
        for socket in self.sockets.iter_mut().filter(busy) {
            match self.rng.u8(..3) {
                0 => {}
                1 => socket.deliver(self.rng.u64(1..10_000)),
                _ => socket.deliver(u64::MAX),
            }
        }
        self.run_ring(false);
    }

    /// Reports a socket without a change.
    pub fn wake_for_nothing(&mut self, id: usize) {
        self.changed(id);
    }

    pub fn address_of(client: usize) -> SocketAddr {
        ([192, 0, 2, 1], 10_000 + client as u16).into()
    }
}
