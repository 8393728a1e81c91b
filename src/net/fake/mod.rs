//! A kernel that is not there: sockets, pipes, an epoll set and a ring whose
//! every answer follows from a seed, behind the system calls of `net`.
//!
//! Installed on a thread by the simulator of `dataplane`; the code above `net` runs
//! on it unchanged. Descriptors are real ones (of pipes that carry nothing), so
//! that owning and closing them is real, too. Built for tests alone.

#![allow(
    missing_docs,
    missing_debug_implementations,
    clippy::unwrap_used,
    reason = "for tests alone"
)]

mod calls;
mod plan;
mod poll;
mod socket;
mod uring;

pub use calls::*;
pub use plan::{FaultSchedule, InjectedFault, SimCall, is_ours};
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
    /// Calls so far that can fail.
    pub calls: u64,
    /// Every one of them, where they are wanted.
    pub log: Option<Vec<SimCall>>,
    /// All there ever were; closed ones stay.
    pub sockets: Vec<SimSocket>,
    by_fd: HashMap<RawFd, usize>,
    pipes: Vec<SimPipe>,
    /// Clients in their queues.
    listeners: HashMap<RawFd, u32>,
    set: SimEpoll,
    uring: SimRing,
    /// Whose connects are decided at once, as on loopback.
    pub connects_at_once: bool,
    /// How much one call moves at most.
    pub most: u64,
    /// Errnos that calls were made to give.
    pub injected: Vec<i32>,
    /// Descriptors whose socket was gone when they were used.
    pub misused: u64,
    trace: DefaultHasher,
}

/// The bytes in a pipe, as stretches of streams.
#[derive(Debug)]
struct SimPipe {
    ends: [RawFd; 2],
    alarms: [OwnedFd; 2],
    size: u64,
    /// Stream, begin, length.
    holds: VecDeque<(u8, u64, u64)>,
}

/// Puts `kernel` behind this thread's system calls, for as long as it is kept.
pub struct KernelGuard;

/// On the kernel of this thread, which has one.
pub fn with<T>(run: impl FnOnce(&mut SimKernel) -> T) -> T {
    try_with(run).expect("a kernel is installed")
}

pub fn is_installed() -> bool {
    // In use: it is there.
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

    /// What has happened so far, in a number.
    pub fn trace(&self) -> u64 {
        self.trace.finish()
    }

    /// Something that belongs to the trace.
    pub fn note(&mut self, what: impl Hash) {
        what.hash(&mut self.trace);
    }

    /// Before each call that can fail: what goes wrong with it. What says that a
    /// connection is gone makes it so.
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
                // This call tells; the next says that it is over.
                socket.error = 0;
                socket.peer_failed = true;
                self.changed(id);
            }
        }
        fault
    }

    /// A socket of the balancer's: what it owns, and its number.
    fn add_socket(&mut self, role: SocketRole) -> io::Result<(OwnedFd, usize)> {
        let (alarm, own) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (id, fd) = (self.sockets.len(), own.as_raw_fd());
        self.note_closed();
        // The number of each stream is its socket's; 0 would be that of none.
        self.sockets.push(SimSocket::new(role, (id % 250) as u8 + 1, fd, alarm));
        self.by_fd.insert(fd, id);
        Ok((own, id))
    }

    /// The socket behind a descriptor, where it is one of this kernel's.
    fn find(&self, fd: RawFd) -> Option<usize> {
        self.by_fd.get(&fd).copied()
    }

    /// One more client is in the queue of that listener.
    pub fn arrive(&mut self, listener: RawFd) {
        *self.listeners.entry(listener).or_default() += 1;
    }

    pub fn queued(&self) -> u32 {
        self.listeners.values().sum()
    }

    /// Something became of the socket that those who wait for it must learn.
    pub fn changed(&mut self, id: usize) {
        self.set.wake(id);
    }

    /// Sees which descriptors the balancer has closed, and tells their peers.
    pub fn note_closed(&mut self) {
        for id in hung_up(self.sockets.iter().map(|socket| socket.alarm.as_ref())) {
            let fd = self.sockets[id].fd;
            self.sockets[id].closed();
            self.by_fd.remove(&fd);
            self.set.forget(id);
            self.note(("closed", id, self.sockets[id].told as u8));
        }
        let gone = hung_up(self.pipes.iter().map(|pipe| Some(&pipe.alarms[0])));
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

/// Which of these are hung up.
fn hung_up<'a>(alarms: impl Iterator<Item = Option<&'a OwnedFd>>) -> Vec<usize> {
    let (mut which, mut fds) = (Vec::new(), Vec::new());
    for (index, alarm) in alarms.enumerate() {
        if let Some(alarm) = alarm {
            which.push(index);
            fds.push(PollFd::from_borrowed_fd(alarm.as_fd(), PollFlags::empty()));
        }
    }
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&at_once)).expect("polling pipes of ours");
    let told = which.into_iter().zip(&fds);
    told.filter(|(_, fd)| !fd.revents().is_empty()).map(|(index, _)| index).collect()
}

// === impl SimKernel: what peers and paths do ===

impl SimKernel {
    /// The peer sends so many more bytes.
    pub fn peer_sends(&mut self, id: usize, bytes: u64) {
        let socket = &mut self.sockets[id];
        if socket.is_open() && !socket.fin && !socket.dead {
            socket.sent += bytes;
            self.changed(id);
        }
    }

    /// The peer ends its stream; with `gone` it has closed altogether.
    pub fn peer_ends(&mut self, id: usize, gone: bool) {
        let socket = &mut self.sockets[id];
        if socket.is_open() && !socket.dead {
            socket.fin = true;
            socket.gone |= gone;
            self.changed(id);
        }
    }

    /// The connection breaks.
    pub fn peer_fails(&mut self, id: usize, errno: i32) {
        let socket = &mut self.sockets[id];
        if socket.is_open() && !socket.dead {
            socket.peer_failed = true;
            let errno = if socket.fin && errno == libc::ECONNRESET { libc::EPIPE } else { errno };
            socket.fail(errno);
            self.changed(id);
        }
    }

    /// The peer has read, so there is room for so much more.
    pub fn peer_reads(&mut self, id: usize, bytes: u64) {
        let socket = &mut self.sockets[id];
        if socket.is_open() {
            socket.room = socket.room.saturating_add(bytes);
            self.changed(id);
        }
    }

    /// A connect that is pending comes to its end.
    pub fn decide(&mut self, id: usize) {
        if self.sockets[id].standing != socket::SimSocketState::Connecting
            || !self.sockets[id].is_open()
        {
            return;
        }
        match self.fault(SimCall::Decide, Some(id)) {
            // Told by the socket, as soon as it is asked.
            Some(InjectedFault::Errno(errno)) => self.sockets[id].error = errno,
            _ => self.sockets[id].standing = socket::SimSocketState::Up,
        }
        self.changed(id);
    }

    /// What goes on by itself: bytes arrive at the peers, and operations of the ring
    /// are done.
    pub fn go_on(&mut self) {
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

    /// Wakes whoever watches that socket, for nothing.
    pub fn wake_for_nothing(&mut self, id: usize) {
        self.changed(id);
    }

    pub fn address_of(client: usize) -> SocketAddr {
        ([192, 0, 2, 1], 10_000 + client as u16).into()
    }
}
