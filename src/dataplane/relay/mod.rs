//! The engine seam: what a session asks of whatever moves its bytes.
//!
//! A session opens a [`RelayHandle`] for its client, connects it, and awaits one
//! completion. One long-lived engine task a worker drives all flows; a task
//! each measured 10 to 25 % more CPU. There are two engines: `ring` on an
//! io_uring of its own, `readiness` on an epoll set. What they share is written
//! once: `shell` (stages, timers, cuts, the task), `verdict` (who ended, and how
//! the session ends), `relaying` (timers and counting).

mod close_state;
mod epoll;
mod flow;
mod mover;
mod pace;
mod ring;
mod session_timers;
mod shell;
#[cfg(test)]
mod tests;

pub use flow::{
    Bytes, ConnectEnd, PartialResult, RelayFuture, RelayHandle, RelayResult, SessionMeter,
    SessionTimeouts,
};
pub use ring::SETTINGS as RING_SETTINGS;
pub use tidegate_net::ring::RingSettings;

#[cfg(debug_assertions)]
use crate::fault_points::FaultPoint;
use crate::relay::epoll::EpollEngine;
use ring::RingEngine;
use shell::EngineCore;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::BackendId;
use tidegate_net::budget::MemoryBudget;

/// One worker's engine; a handle, cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine(EngineImpl);

#[derive(Debug, Clone)]
enum EngineImpl {
    Readiness(Rc<EngineCore<EpollEngine>>),
    Ring(Rc<EngineCore<RingEngine>>),
}

/// The same for either engine.
macro_rules! either {
    ($engine:expr, $shell:ident => $do:expr) => {
        match &$engine.0 {
            EngineImpl::Readiness($shell) => $do,
            EngineImpl::Ring($shell) => $do,
        }
    };
}

// === impl Engine ===

impl Engine {
    /// A readiness engine for the current thread's runtime. `spin` is how long
    /// to poll after the last activity before sleeping, `budget` what all engines
    /// of the process together may hold.
    pub fn readiness(spin: Option<Duration>, budget: Arc<MemoryBudget>) -> io::Result<Engine> {
        Ok(Engine(EngineImpl::Readiness(EngineCore::new(EpollEngine::new(budget)?, spin))))
    }

    /// A ring engine for the current thread and its runtime.
    pub fn ring(
        spin: Option<Duration>,
        settings: RingSettings,
        budget: Arc<MemoryBudget>,
    ) -> io::Result<Engine> {
        Ok(Engine(EngineImpl::Ring(EngineCore::new(RingEngine::new(settings, budget)?, spin))))
    }

    /// Counts what goes on inside for that worker, from now on.
    pub fn count_for(&self, worker: Arc<WorkerCounters>) {
        either!(self, shell => {
            shell.count_for(Arc::clone(&worker));
            shell.with_mover(|mover| mover.count_for(worker));
        });
    }

    /// A flow for an accepted client; its reset is noticed before long.
    pub fn open(&self, client: OwnedFd) -> io::Result<RelayHandle> {
        let key = either!(self, shell => shell.open(client))?;
        Ok(RelayHandle { engine: self.clone(), key })
    }

    /// Flows open now.
    pub fn open_flows(&self) -> usize {
        either!(self, shell => shell.open_flows())
    }

    /// Ends every flow, whatever it is doing; gives their number.
    pub fn cut_all(&self, cause: Cause) -> usize {
        either!(self, shell => shell.abort_all(cause))
    }

    /// Ends every relayed flow of one backend; gives their number.
    pub fn cut_backend(&self, backend: BackendId, cause: Cause) -> usize {
        either!(self, shell => shell.abort_backend(backend, cause))
    }

    /// Whether everything the engine had of buffers and operations is back.
    #[cfg(all(test, feature = "sim"))]
    pub(crate) fn is_clean(&self) -> bool {
        match &self.0 {
            EngineImpl::Readiness(_) => true,
            EngineImpl::Ring(shell) => {
                let mut clean = false;
                shell.with_mover(|ringed| clean = ringed.is_clean());
                clean
            }
        }
    }

    /// Drives every flow; runs as long as the worker.
    pub async fn run(self) -> io::Result<()> {
        match self.0 {
            EngineImpl::Readiness(shell) => shell.run().await,
            EngineImpl::Ring(shell) => shell.run().await,
        }
    }

    /// Resolves when a panic has left the engine in no state to go on.
    pub(super) async fn broken(&self) {
        either!(self, shell => shell.broken.notified().await)
    }

    /// The worker has fallen: dropping a session's flow only counts from now on.
    /// What is open is closed with the engine, see [`Engine::close_all`].
    pub(super) fn mark_broken(&self) {
        either!(self, shell => shell.mark_broken())
    }

    /// Drops a fallen worker's engine: every socket left in it is reset.
    pub(super) fn close_all(self) {
        either!(self, shell => shell.close_all())
    }

    /// The next pass of that place panics; for tests.
    #[cfg(debug_assertions)]
    pub(super) fn order(&self, fault: FaultPoint) {
        either!(self, shell => shell.faults.order(fault))
    }

    async fn connected(
        &self,
        key: u32,
        upstream: OwnedFd,
        deadline: Instant,
    ) -> Result<(), ConnectEnd> {
        either!(self, shell => shell.connected(key, upstream, deadline).await)
    }

    fn attach(&self, key: u32, upstream: OwnedFd) -> io::Result<()> {
        either!(self, shell => shell.attach(key, upstream))
    }

    async fn interrupted(&self, key: u32) -> ConnectEnd {
        either!(self, shell => shell.interrupted(key).await)
    }

    fn client_left_silently(&self, key: u32) -> bool {
        either!(self, shell => shell.client_left_silently(key))
    }

    fn start_relay(&self, key: u32, limits: SessionTimeouts, meter: SessionMeter) {
        either!(self, shell => shell.start_relay(key, limits, meter));
    }

    fn poll_relayed(&self, key: u32, cx: &Context<'_>) -> Poll<RelayResult> {
        either!(self, shell => shell.poll_relayed(key, cx))
    }

    fn so_far(&self, key: u32, cause: Cause) -> Option<PartialResult> {
        either!(self, shell => shell.so_far(key, cause))
    }

    fn refuse(&self, key: u32) -> u64 {
        either!(self, shell => shell.refuse(key))
    }

    fn remove(&self, key: u32) {
        either!(self, shell => shell.remove(key))
    }
}
