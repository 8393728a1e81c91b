//! The relay engines, which move the bytes of sessions.
//!
//! Called by `session` through [`RelayHandle`] and by `worker` through [`RelayEngine`]. It
//! never picks a backend. One engine task per worker drives all sessions: one task per session
//! used 10 to 25 % more CPU in measurements.
//!
//! - `epoll` and `ring` are the two engines: on an epoll set, and on an io_uring.
//! - `engine` and `stages` hold the table of sessions and their stages, for both engines.
//! - `task` is the engine task: rounds of events, timers, sleep.
//! - `close_state` decides when a FIN is passed on and how a session ends.
//! - `session_timers` holds timers and byte counts of a session; `timers` fires them.
//! - `delivery` reads what peers have acknowledged.

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
    Bytes, ConnectEnd, RelayHandle, RelayResult, SessionIdentity, SessionMeter, SessionTimeouts,
    SessionView,
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
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::ClientAddr;
use tidegate_core::outcome::{Cause, SessionSide};
use tidegate_core::sessions::{SessionsEnded, SessionsToEnd};
use tidegate_core::table::state::BackendId;
use tidegate_net::budget::MemoryBudget;
use tokio::sync::Notify;

/// The engine of a worker; cheap to clone.
pub(crate) type Engine = Rc<dyn RelayEngine>;

/// Interface of both engines for sessions and the worker. Sessions use it through
/// [`RelayHandle`]. Calls are virtual: one per step of a session, none per message.
pub(crate) trait RelayEngine: Debug {
    /// Adds a session for an accepted client and returns its key.
    fn open(&self, client: OwnedFd, identity: SessionIdentity, accepted: Instant) -> u32;

    /// Changes the client of a session.
    fn set_client(&self, key: u32, client: ClientAddr);

    /// Adds the connected socket `upstream` as the session's backend connection.
    fn attach(&self, key: u32, upstream: OwnedFd) -> io::Result<()>;

    /// Starts to wait for the pending connect of `upstream`, until `deadline`.
    fn start_connect(&self, key: u32, upstream: OwnedFd, deadline: Instant) -> io::Result<()>;

    /// Ready with the result of the connect. A failure closes the socket.
    fn poll_connected(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>>;

    /// Starts to watch the client for a reset. If `readable`, also for bytes (as many as the
    /// socket's low-water mark) or a FIN.
    fn watch_client(&self, key: u32, readable: bool);

    /// Ready with an error when the client has reset its connection or the session is
    /// aborted. Ready once with `Ok` when the client is readable.
    fn poll_client(&self, key: u32, cx: &Context<'_>) -> Poll<Result<(), ConnectEnd>>;

    /// Calls `act` with a socket of a session that is not relayed yet, if it has that socket.
    fn with_socket(&self, key: u32, side: SessionSide, act: &mut dyn FnMut(BorrowedFd<'_>));

    /// Closes the backend connection of a session that is not relayed yet.
    fn detach(&self, key: u32);

    /// Starts to move bytes in both directions.
    fn start_relay(&self, key: u32, limits: SessionTimeouts, meter: SessionMeter);

    /// Ready once, when the relay has ended.
    fn poll_relayed(&self, key: u32, cx: &Context<'_>) -> Poll<RelayResult>;

    /// Returns the result as if `cause` ended the session now, without sockets. `None` if a
    /// panic has interrupted the engine.
    fn so_far(&self, key: u32, cause: Cause) -> Option<RelayResult>;

    /// Removes a session. Resets the sockets that were not handed out.
    fn remove(&self, key: u32);

    /// Returns the number of open sessions.
    fn open_sessions(&self) -> usize;

    /// Calls `visit` with the sessions whose keys are in `keys`. Returns false if no session has
    /// a higher key.
    fn visit(&self, keys: Range<u32>, visit: &mut dyn FnMut(&SessionView<'_>)) -> bool;

    /// Ends the sessions of an order whose keys are in `keys`. A cause that closes in order ends
    /// only relayed sessions without undelivered bytes.
    fn end_some(&self, keys: Range<u32>, order: &SessionsToEnd) -> SessionsEnded;

    /// Ends all sessions in any stage. Returns their number.
    fn abort_all(&self, cause: Cause) -> usize;

    /// Ends all relayed sessions of a backend, except those that deliver their last bytes if the
    /// cause closes in order. Returns their number.
    fn abort_backend(&self, backend: BackendId, cause: Cause) -> usize;

    /// Notified when a panic has left the engine in an invalid state.
    fn broken(&self) -> &Notify;

    /// Called after a worker panic. [`RelayEngine::remove`] then makes no system call, so that
    /// thousands of sessions are accounted for quickly.
    fn mark_broken(&self);

    /// Sets all sockets left in the engine to reset when the engine is dropped.
    fn close_all(&self);

    /// Lets the next pass of this point panic (tests only).
    #[cfg(debug_assertions)]
    fn arm_fault(&self, fault: FaultPoint);

    /// Whether all buffers and operations of the engine have been returned.
    #[cfg(all(test, feature = "sim"))]
    fn is_clean(&self) -> bool;

    /// Drives all sessions until the worker ends.
    fn run(self: Rc<Self>) -> Pin<Box<dyn Future<Output = io::Result<()>>>>;
}

/// Creates an epoll engine on the current thread's runtime.
///
/// `spin` is how long it polls after the last activity before it sleeps. `budget` limits the
/// buffers of all engines of the process. `worker` counts events.
pub(crate) fn epoll_engine(
    spin: Option<Duration>,
    budget: Arc<MemoryBudget>,
    worker: Arc<WorkerCounters>,
) -> io::Result<Engine> {
    Ok(EngineCore::new(EpollEngine::new(budget, Arc::clone(&worker))?, spin, worker))
}

/// Creates an io_uring engine on the current thread's runtime. Parameters as for
/// [`epoll_engine`].
pub(crate) fn ring_engine(
    spin: Option<Duration>,
    settings: RingSettings,
    budget: Arc<MemoryBudget>,
    worker: Arc<WorkerCounters>,
) -> io::Result<Engine> {
    Ok(EngineCore::new(RingEngine::new(settings, budget, Arc::clone(&worker))?, spin, worker))
}
