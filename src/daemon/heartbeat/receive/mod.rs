//! Receives heartbeats on a thread of its own and hands the believed ones on.
//!
//! `daemon` starts a [`Receiver`], awaits [`Receiver::arrived`] on the control
//! thread and feeds what [`Receiver::pop`] gives to the controller. Only the
//! thread judges; it never waits for the control thread, and never blocks but to
//! wait for datagrams.
//!
//! # Losses of our own
//!
//! A heartbeat that was lost on this machine says nothing about its sender.
//! There are three such losses, each counted: the kernel's, when the thread
//! falls behind and the socket's buffer is full; the gate's, when more arrives
//! in the name of known sources than may be verified; and the queue's, when the
//! control thread falls behind by more than [`QUEUE_MAX`]. The first two are
//! [`Receiver::dropped`]. The third loses no count: the newest heartbeat of each
//! sender is kept and says for how many it stands.
//!
//! Each heartbeat comes with the time the kernel received it, so neither a busy
//! machine nor a full queue makes a punctual sender look late.

mod queue;
mod thread;

use crate::heartbeat::verify::{RejectReason, RejectedDatagram, Verifier};
use queue::HeartbeatQueue;
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;
use tidegate_core::metrics::counters::Counter;
use tidegate_core::suspicion::rejections::{Rejected, Rejection, RejectionWarning, Rejections};
use tidegate_heartbeat::Heartbeat;
use tidegate_heartbeat::keys::KeyRing;
use tidegate_net::datagram;

pub use queue::QUEUE_MAX;

/// A believed heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedHeartbeat {
    /// What it says.
    pub heartbeat: Heartbeat,
    /// When the kernel received it.
    pub at: Instant,
    /// Believed heartbeats of this sender it stands for, itself included: more
    /// than one only after the control thread has fallen far behind.
    pub stands_for: u32,
}

/// The receiving thread. Dropping it ends the thread and closes the sockets.
#[derive(Debug)]
pub struct Receiver {
    bound: Mutex<Vec<BoundSocket>>,
    inbox: Arc<ReceiverInbox>,
    queue: Arc<HeartbeatQueue>,
    counts: Arc<ReceiverCounts>,
    told: Arc<Mutex<Told>>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread has to tell of rejected heartbeats.
#[derive(Debug, Default)]
struct Told {
    rejections: Rejections,
    /// Not taken yet; `rejections` bounds how many come.
    warnings: VecDeque<RejectionWarning>,
}

/// Warnings that wait to be taken. Only where the control thread has stood still
/// for minutes are there more, and the oldest are dropped.
const WARNINGS_WAITING_MAX: usize = 256;

/// Sockets for [`Receiver::commit`]. Dropped, the new ones are closed again.
#[derive(Debug)]
pub struct PreparedSockets(Vec<BoundSocket>);

/// What has been counted since the start; only the thread writes.
#[derive(Debug, Default)]
pub struct ReceiverCounts {
    accepted: Counter,
    rejected: [Counter; RejectReason::ALL.len()],
    kernel_drops: Counter,
    coalesced: Counter,
}

/// A socket and what was asked for.
#[derive(Debug, Clone)]
struct BoundSocket {
    asked: SocketAddr,
    socket: Arc<OwnedFd>,
}

/// What the thread is told to do.
#[derive(Debug)]
enum ReceiverCommand {
    Listen(Vec<Arc<OwnedFd>>),
    Keys(KeyRing),
    Stop,
}

/// Orders, and the descriptor that wakes the thread.
#[derive(Debug)]
struct ReceiverInbox {
    orders: Mutex<Vec<ReceiverCommand>>,
    wake: OwnedFd,
}

/// A thread that panicked while it held a lock leaves the data whole: nothing
/// between taking and giving a lock here can fail half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Receiver ===

impl Receiver {
    /// Binds every address and starts the thread. IPv6 wildcards are IPv6 only.
    ///
    /// # Errors
    /// An address that cannot be bound, or no descriptors or thread to be had.
    pub fn start(listen: &[SocketAddr], gate: Verifier) -> io::Result<Receiver> {
        Receiver::start_with(listen, Vec::new(), gate)
    }

    /// The same, going on with sockets of another process by the addresses that
    /// were asked for there.
    ///
    /// # Errors
    /// As [`Receiver::start`].
    pub fn start_with(
        listen: &[SocketAddr],
        inherited: Vec<(SocketAddr, OwnedFd)>,
        gate: Verifier,
    ) -> io::Result<Receiver> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let inbox = ReceiverInbox { orders: Mutex::default(), wake: eventfd(0, flags)? };
        let mut receiver = Receiver {
            bound: Mutex::default(),
            inbox: Arc::new(inbox),
            queue: Arc::default(),
            counts: Arc::default(),
            told: Arc::default(),
            thread: None,
        };
        *lock(&receiver.bound) = inherited
            .into_iter()
            .map(|(asked, socket)| BoundSocket { asked, socket: Arc::new(socket) })
            .collect();
        let prepared = receiver.prepare(listen)?;
        receiver.commit(prepared);
        let thread = thread::ReceiverThread::new(
            gate,
            Arc::clone(&receiver.inbox),
            Arc::clone(&receiver.queue),
            (Arc::clone(&receiver.counts), Arc::clone(&receiver.told)),
        );
        let builder = std::thread::Builder::new().name("heartbeats".to_owned());
        receiver.thread = Some(builder.spawn(move || thread.run())?);
        Ok(receiver)
    }

    /// Binds those of the addresses that are not bound yet. Nothing is received
    /// there before [`Receiver::commit`], but the kernel keeps what arrives.
    ///
    /// # Errors
    /// An address that cannot be bound; everything stays as it was.
    pub fn prepare(&self, listen: &[SocketAddr]) -> io::Result<PreparedSockets> {
        let bound = lock(&self.bound);
        let ours: Vec<_> = bound.iter().map(|one| one.socket.as_fd()).collect();
        let mut prepared: Vec<BoundSocket> = Vec::with_capacity(listen.len());
        for address in listen {
            if prepared.iter().any(|one| one.asked == *address) {
                continue;
            }
            let kept = bound.iter().find(|one| one.asked == *address).cloned();
            prepared.push(match kept {
                Some(kept) => kept,
                None => {
                    let socket = Arc::new(datagram::bind(*address, &ours)?);
                    BoundSocket { asked: *address, socket }
                }
            });
        }
        Ok(PreparedSockets(prepared))
    }

    /// Listens on what was prepared and nowhere else. What has arrived on a
    /// socket given up here is lost.
    pub fn commit(&self, prepared: PreparedSockets) {
        let sockets = prepared.0.iter().map(|one| Arc::clone(&one.socket)).collect();
        *lock(&self.bound) = prepared.0;
        self.inbox.send(ReceiverCommand::Listen(sockets));
    }

    /// Judges by other keys from the next batch of datagrams on.
    pub fn set_keys(&self, keys: KeyRing) {
        self.inbox.send(ReceiverCommand::Keys(keys));
    }

    /// Where it listens, with the port the kernel chose where 0 was asked for.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let bound = lock(&self.bound);
        let address = |one: &BoundSocket| datagram::local_address(&one.socket).unwrap_or(one.asked);
        bound.iter().map(address).collect()
    }

    /// Second handles of its sockets, by the addresses asked for.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn share(&self) -> io::Result<Vec<(SocketAddr, OwnedFd)>> {
        let bound = lock(&self.bound);
        bound.iter().map(|one| Ok((one.asked, one.socket.try_clone()?))).collect()
    }

    /// The smallest receive buffer among its sockets, in bytes, as the kernel
    /// counts them: about 800 a datagram. 0 if there is no socket.
    pub fn receive_buffer(&self) -> usize {
        let bound = lock(&self.bound);
        let sizes = bound.iter().filter_map(|one| datagram::receive_buffer(&one.socket).ok());
        sizes.min().unwrap_or(0)
    }

    /// The oldest heartbeat that waits.
    pub fn pop(&self) -> Option<ReceivedHeartbeat> {
        self.queue.pop()
    }

    /// Resolves when something may have arrived since the last time.
    pub async fn arrived(&self) {
        self.queue.arrived().await;
    }

    /// The oldest warning about rejected heartbeats that waits.
    pub fn pop_warning(&self) -> Option<RejectionWarning> {
        lock(&self.told).warnings.pop_front()
    }

    /// The rejected senders that are known, the last rejected first.
    pub fn rejections(&self) -> Vec<Rejection> {
        let mut all: Vec<Rejection> = lock(&self.told).rejections.all().cloned().collect();
        all.sort_by_key(|rejection| std::cmp::Reverse(rejection.at));
        all
    }

    /// What was rejected in the name of one backend.
    pub fn rejection(&self, pool: &str, name: &str) -> Option<Rejection> {
        lock(&self.told).rejections.of(pool, name).cloned()
    }

    /// Whether the thread has ended by itself, which only a bug can bring about.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Its counts, to share with the admin API.
    pub fn counts(&self) -> Arc<ReceiverCounts> {
        Arc::clone(&self.counts)
    }

    /// Datagrams lost on this machine that may have been heartbeats of known
    /// senders; grows only. While it grows, a missing heartbeat is no evidence.
    pub fn dropped(&self) -> u64 {
        self.counts.dropped()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.inbox.send(ReceiverCommand::Stop);
        if let Some(thread) = self.thread.take() {
            // Its panic has been reported on standard error already.
            let _ = thread.join();
        }
    }
}

// === impl Told ===

impl Told {
    /// Notes a rejected datagram; whether there is a warning about it.
    fn rejected(&mut self, refused: &RejectedDatagram<'_>, from: SocketAddr, now: Instant) -> bool {
        let reason = refused.reason;
        let rejected = Rejected {
            claim: refused.claim.map(|claim| (claim.pool, claim.name)),
            signed: reason.is_signed(),
            from: Some(from),
            key_id: refused.claim.map(|claim| claim.key_id),
            reason: reason.name(),
            help: reason.help(),
            skew: refused.skew,
            warns: reason != RejectReason::Replayed,
        };
        let Some(warning) = self.rejections.add(&rejected, now) else { return false };
        if self.warnings.len() >= WARNINGS_WAITING_MAX {
            self.warnings.pop_front();
        }
        self.warnings.push_back(warning);
        true
    }
}

// === impl ReceiverCounts ===

impl ReceiverCounts {
    /// Heartbeats believed.
    pub fn accepted(&self) -> u64 {
        self.accepted.get()
    }

    /// Datagrams refused for that reason.
    pub fn rejected(&self, reason: RejectReason) -> u64 {
        self.rejected[reason as usize].get()
    }

    /// Datagrams the kernel dropped because a socket's buffer was full, known
    /// up to the last datagram received.
    pub fn kernel_drops(&self) -> u64 {
        self.kernel_drops.get()
    }

    /// Believed heartbeats that a newer one of the same sender stands for,
    /// because the queue was full.
    pub fn coalesced(&self) -> u64 {
        self.coalesced.get()
    }

    /// See [`Receiver::dropped`].
    pub fn dropped(&self) -> u64 {
        let ours = RejectReason::ALL.into_iter().filter(|reason| reason.is_local_drop());
        self.kernel_drops() + ours.map(|reason| self.rejected(reason)).sum::<u64>()
    }
}

// === impl ReceiverInbox ===

impl ReceiverInbox {
    fn send(&self, order: ReceiverCommand) {
        lock(&self.orders).push(order);
        // It fails only when the counter is full: then the thread wakes anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Vec<ReceiverCommand> {
        // Before the orders are taken: one that comes later wakes again.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut lock(&self.orders))
    }
}
