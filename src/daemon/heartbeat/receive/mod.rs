//! Receives heartbeats on a separate thread and queues the accepted ones.
//!
//! `heartbeats` starts a [`Receiver`], awaits [`Receiver::arrived`] on the control thread
//! and feeds the result of [`Receiver::pop`] to the controller. The receiving thread
//! verifies the datagrams. It waits only for datagrams and commands, never for the
//! control thread.
//!
//! # Local drops
//!
//! A heartbeat that is dropped on this host says nothing about its sender. There are
//! three cases, and each is counted:
//!
//! - The kernel drops datagrams if the receiving thread is too slow and the socket buffer
//!   is full. Included in [`Receiver::dropped`].
//! - The verifier drops datagrams from known sources above its rate limit. Included in
//!   [`Receiver::dropped`].
//! - The queue merges heartbeats if more than [`QUEUE_MAX`] wait for the control thread.
//!   It keeps the newest heartbeat of each sender and the number of merged heartbeats.
//!
//! Each heartbeat has the time at which the kernel received it. So neither a busy host
//! nor a full queue makes a heartbeat appear late.

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

/// An accepted heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedHeartbeat {
    /// Its content.
    pub heartbeat: Heartbeat,
    /// When the kernel received it.
    pub at: Instant,
    /// Number of accepted heartbeats of this sender that were merged into this one,
    /// including this one. More than 1 only after the queue was full.
    pub stands_for: u32,
}

/// The receiving thread. Dropping it ends the thread and closes the sockets.
#[derive(Debug)]
pub struct Receiver {
    bound: Mutex<Vec<BoundSocket>>,
    inbox: Arc<ReceiverInbox>,
    queue: Arc<HeartbeatQueue>,
    counts: Arc<ReceiverCounts>,
    rejected: Arc<Mutex<RejectedSenders>>,
    thread: Option<JoinHandle<()>>,
}

/// Rejected senders, and warnings about them.
#[derive(Debug, Default)]
struct RejectedSenders {
    rejections: Rejections,
    /// Warnings that the control thread has not taken yet. `rejections` limits their rate.
    warnings: VecDeque<RejectionWarning>,
}

/// Warnings that wait for the control thread at most. Beyond this, which happens only if
/// the control thread is blocked for minutes, the oldest is dropped.
const WARNINGS_WAITING_MAX: usize = 256;

/// Sockets for [`Receiver::commit`]. Dropping it closes the new sockets.
#[derive(Debug)]
pub struct PreparedSockets(Vec<BoundSocket>);

/// Counts since the start. Only the receiving thread writes them.
#[derive(Debug, Default)]
pub struct ReceiverCounts {
    accepted: Counter,
    rejected: [Counter; RejectReason::ALL.len()],
    kernel_drops: Counter,
    coalesced: Counter,
}

/// A socket and its configured address.
#[derive(Debug, Clone)]
struct BoundSocket {
    configured: SocketAddr,
    socket: Arc<OwnedFd>,
}

/// A command for the receiving thread.
#[derive(Debug)]
enum ReceiverCommand {
    Listen(Vec<Arc<OwnedFd>>),
    Keys(KeyRing),
    Stop,
}

/// Commands for the receiving thread, and the file descriptor that wakes it.
#[derive(Debug)]
struct ReceiverInbox {
    commands: Mutex<Vec<ReceiverCommand>>,
    wake: OwnedFd,
}

/// Locks also after a panic of another thread: each critical section leaves the data
/// valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Receiver ===

impl Receiver {
    /// Binds every address and starts the thread. IPv6 wildcards receive only IPv6.
    ///
    /// # Errors
    /// An address cannot be bound, or no file descriptor or thread is available.
    pub fn start(listen: &[SocketAddr], verifier: Verifier) -> io::Result<Receiver> {
        Receiver::start_with(listen, Vec::new(), verifier)
    }

    /// Starts the receiver with `inherited` sockets of another process. A socket is used
    /// if its configured address is in `listen`.
    ///
    /// # Errors
    /// Those of [`Receiver::start`].
    pub fn start_with(
        listen: &[SocketAddr],
        inherited: Vec<(SocketAddr, OwnedFd)>,
        verifier: Verifier,
    ) -> io::Result<Receiver> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let inbox = ReceiverInbox { commands: Mutex::default(), wake: eventfd(0, flags)? };
        let mut receiver = Receiver {
            bound: Mutex::default(),
            inbox: Arc::new(inbox),
            queue: Arc::default(),
            counts: Arc::default(),
            rejected: Arc::default(),
            thread: None,
        };
        *lock(&receiver.bound) = inherited
            .into_iter()
            .map(|(configured, socket)| BoundSocket { configured, socket: Arc::new(socket) })
            .collect();
        let prepared = receiver.prepare(listen)?;
        receiver.commit(prepared);
        let thread = thread::ReceiverThread::new(
            verifier,
            Arc::clone(&receiver.inbox),
            Arc::clone(&receiver.queue),
            (Arc::clone(&receiver.counts), Arc::clone(&receiver.rejected)),
        );
        let builder = std::thread::Builder::new().name("heartbeats".to_owned());
        receiver.thread = Some(builder.spawn(move || thread.run())?);
        Ok(receiver)
    }

    /// Binds the addresses that are not bound yet. The kernel buffers their datagrams
    /// until [`Receiver::commit`].
    ///
    /// # Errors
    /// An address cannot be bound. Nothing changes.
    pub fn prepare(&self, listen: &[SocketAddr]) -> io::Result<PreparedSockets> {
        let bound = lock(&self.bound);
        let own: Vec<_> = bound.iter().map(|one| one.socket.as_fd()).collect();
        let mut prepared: Vec<BoundSocket> = Vec::with_capacity(listen.len());
        for address in listen {
            if prepared.iter().any(|one| one.configured == *address) {
                continue;
            }
            let kept = bound.iter().find(|one| one.configured == *address).cloned();
            prepared.push(match kept {
                Some(kept) => kept,
                None => {
                    let socket = Arc::new(datagram::bind(*address, &own)?);
                    BoundSocket { configured: *address, socket }
                }
            });
        }
        Ok(PreparedSockets(prepared))
    }

    /// Receives on the prepared sockets and closes all others. Datagrams that wait in a
    /// closed socket are dropped.
    pub fn commit(&self, prepared: PreparedSockets) {
        let sockets = prepared.0.iter().map(|one| Arc::clone(&one.socket)).collect();
        *lock(&self.bound) = prepared.0;
        self.inbox.send(ReceiverCommand::Listen(sockets));
    }

    /// Replaces the keys, starting with the next batch of datagrams.
    pub fn set_keys(&self, keys: KeyRing) {
        self.inbox.send(ReceiverCommand::Keys(keys));
    }

    /// Returns the local addresses of the sockets. A configured port 0 is replaced by the
    /// port that the kernel chose.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let bound = lock(&self.bound);
        let address =
            |one: &BoundSocket| datagram::local_address(&one.socket).unwrap_or(one.configured);
        bound.iter().map(address).collect()
    }

    /// Duplicates the sockets, with their configured addresses.
    ///
    /// # Errors
    /// No file descriptor is available.
    pub fn share(&self) -> io::Result<Vec<(SocketAddr, OwnedFd)>> {
        let bound = lock(&self.bound);
        bound.iter().map(|one| Ok((one.configured, one.socket.try_clone()?))).collect()
    }

    /// Returns the smallest receive buffer of the sockets, in bytes as the kernel counts
    /// them (about 800 per datagram). 0 without a socket.
    pub fn receive_buffer(&self) -> usize {
        let bound = lock(&self.bound);
        let sizes = bound.iter().filter_map(|one| datagram::receive_buffer(&one.socket).ok());
        sizes.min().unwrap_or(0)
    }

    /// Takes the oldest waiting heartbeat.
    pub fn pop(&self) -> Option<ReceivedHeartbeat> {
        self.queue.pop()
    }

    /// Resolves when heartbeats or warnings may have arrived since the last call.
    pub async fn arrived(&self) {
        self.queue.arrived().await;
    }

    /// Takes the oldest waiting warning about rejected heartbeats.
    pub fn pop_warning(&self) -> Option<RejectionWarning> {
        lock(&self.rejected).warnings.pop_front()
    }

    /// Returns the rejected senders, the latest rejection first.
    pub fn rejections(&self) -> Vec<Rejection> {
        let mut all: Vec<Rejection> = lock(&self.rejected).rejections.all().cloned().collect();
        all.sort_by_key(|rejection| std::cmp::Reverse(rejection.at));
        all
    }

    /// Returns the rejections of one backend's heartbeats.
    pub fn rejection(&self, pool: &str, name: &str) -> Option<Rejection> {
        lock(&self.rejected).rejections.of(pool, name).cloned()
    }

    /// Returns whether the thread has ended unexpectedly, because of a bug.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Returns the counts, for the admin API.
    pub fn counts(&self) -> Arc<ReceiverCounts> {
        Arc::clone(&self.counts)
    }

    /// Returns the number of local drops of datagrams that may have been heartbeats of
    /// known senders. While it increases, a missing heartbeat is not evidence.
    pub fn dropped(&self) -> u64 {
        self.counts.dropped()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.inbox.send(ReceiverCommand::Stop);
        if let Some(thread) = self.thread.take() {
            // The panic hook has already logged a panic of the thread.
            let _ = thread.join();
        }
    }
}

// === impl RejectedSenders ===

impl RejectedSenders {
    /// Records a rejected datagram. Returns whether this causes a warning.
    fn add(&mut self, datagram: &RejectedDatagram<'_>, from: SocketAddr, now: Instant) -> bool {
        let reason = datagram.reason;
        let rejected = Rejected {
            claim: datagram.claim.map(|claim| (claim.pool, claim.name)),
            signed: reason.is_signed(),
            from: Some(from),
            key_id: datagram.claim.map(|claim| claim.key_id),
            reason: reason.name(),
            help: reason.help(),
            skew: datagram.skew,
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
    /// Returns the number of accepted heartbeats.
    pub fn accepted(&self) -> u64 {
        self.accepted.get()
    }

    /// Returns the number of datagrams rejected for `reason`.
    pub fn rejected(&self, reason: RejectReason) -> u64 {
        self.rejected[reason as usize].get()
    }

    /// Returns the number of datagrams that the kernel dropped because a socket buffer was
    /// full. Updated with each received datagram.
    pub fn kernel_drops(&self) -> u64 {
        self.kernel_drops.get()
    }

    /// Returns the number of accepted heartbeats that were merged into a newer heartbeat
    /// of the same sender because the queue was full.
    pub fn coalesced(&self) -> u64 {
        self.coalesced.get()
    }

    /// See [`Receiver::dropped`].
    pub fn dropped(&self) -> u64 {
        let local = RejectReason::ALL.into_iter().filter(|reason| reason.is_local_drop());
        self.kernel_drops() + local.map(|reason| self.rejected(reason)).sum::<u64>()
    }
}

// === impl ReceiverInbox ===

impl ReceiverInbox {
    fn send(&self, command: ReceiverCommand) {
        lock(&self.commands).push(command);
        // Fails only if the counter is full. The thread is awake then.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Vec<ReceiverCommand> {
        // Cleared before the commands are taken, so that a later command wakes again.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut lock(&self.commands))
    }
}
