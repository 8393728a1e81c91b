//! The relay engines: what moves a session's bytes.
//!
//! A session opens a [`RelayHandle`] for its client, connects it, and awaits one
//! completion. One long-lived engine task per worker drives all sessions; one task per
//! session measured 10 to 25 % more CPU. There are two engines: `ring` on an io_uring of
//! its own, `epoll` on an epoll set. They share `engine` and `stages`
//! (the table of sessions), `task` (the loop), `close_state` (which side ended, and how the session ends) and
//! `session_timers` (timers and counting).

mod close_state;
mod delivery;
mod engine;
mod epoll;
mod handle;
mod panics;
mod ring;
mod session_timers;
mod stages;
mod task;
#[cfg(test)]
mod tests;
mod timers;

pub(crate) use handle::{
    Bytes, ConnectEnd, RelayHandle, RelayResult, SessionMeter, SessionTimeouts,
};
pub(crate) use ring::SETTINGS as RING_SETTINGS;
pub(crate) use tidegate_net::ring::RingSettings;

#[cfg(debug_assertions)]
use crate::fault_points::FaultPoint;
use engine::EngineCore;
use epoll::EpollEngine;
use ring::RingEngine;
use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::BackendId;
use tidegate_net::budget::MemoryBudget;
use tokio::sync::Notify;

/// One worker's engine; cheap to clone.
pub(crate) type Engine = Rc<dyn RelayEngine>;

/// What sessions and the worker ask of an engine, whichever it is. Sessions use it through
/// [`RelayHandle`]. A call is virtual: one per step of a session, none per message.
pub(crate) trait RelayEngine: Debug {
    /// A session for an accepted client; gives its key.
    fn open(&self, client: OwnedFd) -> u32;

    /// Makes the connected `upstream` its backend socket.
    fn attach(&self, key: u32, upstream: OwnedFd) -> io::Result<()>;

    /// Waits from now on for the connect that is pending on `upstream`.
    fn start_connect(&self, key: u32, upstream: OwnedFd, deadline: Instant) -> io::Result<()>;

    /// How that ended. After a failure the socket is closed.
    fn poll_connected(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>>;

    /// Has the client's reset noticed from now on, and its bytes where `readable`: once
    /// as many as the socket's low-water mark wait, or it has ended its side.
    fn watch_client(&self, key: u32, readable: bool);

    /// Ready when the client was reset or the session is aborted, or else, once, when the
    /// client is readable.
    fn poll_client(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>>;

    /// Sets the low-water mark of the client's socket.
    fn set_low_water(&self, key: u32, bytes: u32) -> io::Result<()>;

    /// Whether the client has sent FIN and nothing before it.
    fn client_left_silently(&self, key: u32) -> bool;

    /// Bytes the client has sent that are not received yet.
    fn unread(&self, key: u32) -> u64;

    /// Moves bytes both ways from now on.
    fn start_relay(&self, key: u32, limits: SessionTimeouts, meter: SessionMeter);

    /// Ready, once, when the relay is over.
    fn poll_relayed(&self, key: u32, cx: &Context<'_>) -> Poll<RelayResult>;

    /// The result if `cause` ended the session now, without sockets; `None` where the
    /// engine is in no state to say.
    fn so_far(&self, key: u32, cause: Cause) -> Option<RelayResult>;

    /// Takes a session out. Sockets that were not given away are reset.
    fn remove(&self, key: u32);

    /// Sessions that are open now.
    fn open_flows(&self) -> usize;

    /// Ends every session, whatever it is doing; gives their number.
    fn abort_all(&self, cause: Cause) -> usize;

    /// Ends every relayed session of one backend; gives their number.
    fn abort_backend(&self, backend: BackendId, cause: Cause) -> usize;

    /// Notified when a panic has left the engine in no state to continue.
    fn broken(&self) -> &Notify;

    /// The worker has panicked: from now on [`RelayEngine::remove`] only counts, so that the
    /// account of thousands of sessions waits for no system call.
    fn mark_broken(&self);

    /// Has every socket left in the engine reset when that is dropped.
    fn close_all(&self);

    /// The next pass of that place panics; for tests.
    #[cfg(debug_assertions)]
    fn arm_fault(&self, fault: FaultPoint);

    /// Whether everything the engine had of buffers and operations is back.
    #[cfg(all(test, feature = "sim"))]
    fn is_clean(&self) -> bool;

    /// Drives every session; runs as long as the worker.
    fn run(self: Rc<Self>) -> Pin<Box<dyn Future<Output = io::Result<()>>>>;
}

/// An epoll engine for the current thread's runtime. `spin` is how long to poll after the
/// last activity before sleeping, `budget` what all engines of the process together may
/// hold, `worker` where events inside are counted.
pub(crate) fn epoll_engine(
    spin: Option<Duration>,
    budget: Arc<MemoryBudget>,
    worker: Arc<WorkerCounters>,
) -> io::Result<Engine> {
    Ok(EngineCore::new(EpollEngine::new(budget, Arc::clone(&worker))?, spin, worker))
}

/// An io_uring engine for the current thread and its runtime; as [`epoll_engine`].
pub(crate) fn ring_engine(
    spin: Option<Duration>,
    settings: RingSettings,
    budget: Arc<MemoryBudget>,
    worker: Arc<WorkerCounters>,
) -> io::Result<Engine> {
    Ok(EngineCore::new(RingEngine::new(settings, budget, Arc::clone(&worker))?, spin, worker))
}
