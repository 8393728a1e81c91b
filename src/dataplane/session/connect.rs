//! Connecting upstream: pick, connect with a deadline, try another backend.
//!
//! Called by `session` before any byte was forwarded. A backend is never tried
//! twice for one session. Local trouble is counted as ours; only what the
//! backend or its path is to blame for is reported.

use crate::accept::gate::SlotWaiters;
use crate::access_log::TryRecord;
use crate::local_errors;
use crate::relay::{ConnectEnd, RelayHandle};
use crate::worker::context::{WorkerContext, WorkerReport};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::balance::trial::{TrialId, TrialPhase};
use tidegate_core::health::ConnectFailure;
use tidegate_core::metrics::counters::{LocalErrorKind, LocalErrorPlace};
use tidegate_core::model::{BackendAddr, Policy};
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::table::source_addrs::CountedSource;
use tidegate_core::table::state::BackendState;
use tidegate_core::table::{NoBackend, PoolTable, Reservation};
use tidegate_net::clock;
use tidegate_net::stream::{self, ConnectTarget, Connecting};

/// A reset that comes later is not early: clients that only send, such as those of a
/// log server, are reset one day by a restart, and that says nothing of how the backend
/// takes new sessions.
pub(crate) const EARLY_MAX: Duration = Duration::from_secs(10);

/// A session's hold on its backend; dropping it gives the slot back and opens
/// the gate.
#[derive(Debug)]
pub(crate) struct BackendSlot {
    reserved: Option<Reservation>,
    backend: Arc<BackendState>,
    gate: Arc<SlotWaiters>,
    /// The trial this session decides, until it has.
    trial: Option<TrialId>,
    /// A connection that stands is no success yet.
    early_resets: bool,
    worker: u16,
    /// Whose port the connection holds, where that is counted by the way.
    way: Option<Arc<CountedSource>>,
}

/// A connected backend.
#[derive(Debug)]
pub(crate) struct ConnectedBackend {
    pub(crate) held: BackendSlot,
    /// Of the attempt that succeeded.
    pub(crate) connect_time: Duration,
    pub(crate) since: Instant,
}

/// Nobody has been tried.
pub(crate) const NOBODY: SessionEnd =
    SessionEnd { cause: Cause::NoBackend, phase: Phase::Admit, errno: 0, closed_first: None };

/// What the dialling left behind, for the session's record and for another try.
#[derive(Debug, Default)]
pub(crate) struct ConnectAttempts {
    pub(crate) count: u8,
    /// Waits for a backend below its cap.
    pub(crate) queued: bool,
    /// Whom the newest attempt went to.
    pub(crate) last: Option<Arc<BackendState>>,
    /// `None` while none failed: most sessions keep no room for it.
    tries: Option<Box<Tries>>,
}

/// Attempts that failed; at most `connect_attempts`.
#[derive(Debug, Default)]
struct Tries {
    /// For the session's record.
    told: Vec<TryRecord>,
    /// Whom they went to, by their places in the pool.
    backends: Vec<usize>,
}

/// Why one attempt came to nothing.
enum AttemptFailure {
    Backend(ConnectFailure, i32),
    Local(LocalErrorKind, i32),
    SessionEnded(SessionEnd),
}

/// Connects `flow` to a backend of `pool`. `first` is the pick that was made, `why`
/// how the session ends where that is of nobody. Waits for a slot, at most
/// `queue_timeout`, where every untried backend is at its cap.
pub(crate) async fn dial(
    ctx: &WorkerContext,
    flow: &RelayHandle,
    pool: &PoolTable,
    client: IpAddr,
    first: Result<Reservation, NoBackend>,
    attempts: &mut ConnectAttempts,
    mut why: SessionEnd,
) -> Result<ConnectedBackend, SessionEnd> {
    let mut choice = first;
    loop {
        let reserved = match choice {
            Ok(reserved) => reserved,
            Err(NoBackend::NoneEligible | NoBackend::Undecided | NoBackend::Exhausted) => {
                return Err(why);
            }
            Err(NoBackend::AtCapacity) => {
                // Boxed, as rare: the room would be every session's otherwise.
                attempts.queued = true;
                let tried = attempts.tried();
                let reserved = Box::pin(wait_for_slot(ctx, flow, pool, client, tried)).await?;
                attempts.queued = false;
                reserved
            }
        };
        let index = reserved.index;
        let mut held = BackendSlot::new(reserved, pool, ctx);
        attempts.count += 1;
        attempts.last = Some(Arc::clone(held.backend()));
        if attempts.count > 1 {
            ctx.counters.connect_retries.add(1);
        }
        let started = clock::now();
        match attempt(ctx, flow, &mut held, started + pool.spec.connect_timeout).await {
            Ok(()) => {
                let since = clock::now();
                let connect_time = since - started;
                held.connected();
                if pool.spec.balance == Policy::PeakEwma {
                    held.backend().latency.connected(connect_time, clock::millis(since));
                }
                return Ok(ConnectedBackend { held, connect_time, since });
            }
            Err(AttemptFailure::SessionEnded(ending)) => return Err(ending),
            Err(AttemptFailure::Backend(failure, errno)) => {
                held.decide(TrialPhase::Failed);
                attempts.note(held.backend(), failure.name(), errno, started);
                why = count_against_backend(ctx, held.backend(), failure, errno, started);
            }
            Err(AttemptFailure::Local(kind, errno)) => {
                attempts.note(held.backend(), kind.name(), errno, started);
                let error = io::Error::from_raw_os_error(errno);
                ctx.local_error(kind, LocalErrorPlace::Connect, &error);
                why = local_ending(Phase::Connect, &error);
                // Ports and routes are had for each destination apart.
                if !matches!(kind, LocalErrorKind::Ports | LocalErrorKind::Route) {
                    return Err(why);
                }
            }
        }
        drop(held);
        if attempts.count >= pool.spec.connect_attempts {
            return Err(why);
        }
        attempts.leave(index);
        choice = pool.pick(ctx.pick_key(client), attempts.tried());
    }
}

async fn attempt(
    ctx: &WorkerContext,
    flow: &RelayHandle,
    held: &mut BackendSlot,
    deadline: Instant,
) -> Result<(), AttemptFailure> {
    let ((upstream, how_far), way) = start(ctx, &held.backend)
        .map_err(|e| classify_failure(&e, local_errors::local_error_now(&e)))?;
    held.way = way;
    match how_far {
        // Nobody but this host has a part in that.
        Connecting::Done => flow
            .attach(upstream)
            .map_err(|e| classify_failure(&e, Some(local_errors::local_kind(&e)))),
        Connecting::Pending => flow.connected(upstream, deadline).await.map_err(|end| match end {
            ConnectEnd::Failed(error) => {
                classify_failure(&error, local_errors::local_error_kind(&error))
            }
            ConnectEnd::TimedOut => {
                AttemptFailure::Backend(ConnectFailure::Timeout, libc::ETIMEDOUT)
            }
            ConnectEnd::ClientGone(errno) => {
                AttemptFailure::SessionEnded(client_gone(Phase::Connect, errno))
            }
            ConnectEnd::Aborted(cause) => AttemptFailure::SessionEnded(cut(Phase::Connect, cause)),
        }),
    }
}

/// A connection that has begun, and the way it goes where that counts its ports.
type StartedConnect = ((OwnedFd, Connecting), Option<Arc<CountedSource>>);

/// Starts the connection, on the next way in turn that has a free port.
fn start(ctx: &WorkerContext, backend: &BackendState) -> io::Result<StartedConnect> {
    let peer = match &backend.address {
        BackendAddr::Tcp(address) => ConnectTarget::Tcp(*address),
        BackendAddr::Unix(path) => return Ok((stream::connect(ConnectTarget::Unix(path))?, None)),
    };
    let now = clock::millis(clock::now());
    let mut ended = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for way in backend.ways.load().round_robin(now) {
        match stream::connect_checking_result(way.source(), peer) {
            Err(error) if local_errors::local_error_kind(&error) == Some(LocalErrorKind::Ports) => {
                way.is_exhausted(now);
                if way.source().is_some() {
                    ctx.local_error(LocalErrorKind::Ports, LocalErrorPlace::Connect, &error);
                }
                ended = error;
            }
            Err(error) => return Err(error),
            Ok(begun) => {
                let counts = way.counts();
                counts.inspect(|counts| counts.of(ctx.id).begun.add(1));
                return Ok((begun, counts.map(|_| Arc::clone(way))));
            }
        }
    }
    Err(ended)
}

/// Whose fault a failed connect is: ours where `local` says so.
fn classify_failure(error: &io::Error, local: Option<LocalErrorKind>) -> AttemptFailure {
    let code = error.raw_os_error().unwrap_or(libc::EIO);
    if let Some(kind) = local {
        return AttemptFailure::Local(kind, code);
    }
    let failure = match code {
        // A Unix socket nobody has bound is as refused as a closed port.
        libc::ECONNREFUSED | libc::ENOENT | libc::ECONNRESET => ConnectFailure::Refused,
        libc::ETIMEDOUT => ConnectFailure::Timeout,
        libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ENETUNREACH | libc::ENETDOWN => {
            ConnectFailure::Unreachable
        }
        other => ConnectFailure::Other(other),
    };
    AttemptFailure::Backend(failure, code)
}

/// Counts a failure against the backend and tells the control thread.
fn count_against_backend(
    ctx: &WorkerContext,
    backend: &BackendState,
    failure: ConnectFailure,
    errno: i32,
    begun: Instant,
) -> SessionEnd {
    backend.counters.of(ctx.id).connect_failures.add(1);
    report(ctx, backend, failure, begun);
    let cause = match failure {
        ConnectFailure::Refused => Cause::ConnectRefused,
        ConnectFailure::Timeout => Cause::ConnectTimeout,
        _ => Cause::ConnectFailed,
    };
    SessionEnd { cause, phase: Phase::Connect, errno, closed_first: None }
}

/// Makes the row of failures longer and tells the control thread.
fn report(ctx: &WorkerContext, backend: &BackendState, failure: ConnectFailure, begun: Instant) {
    let in_a_row = backend.failed();
    let report = WorkerReport::ConnectFailed { backend: backend.id, failure, in_a_row, begun };
    if !ctx.shared.reports.push(report) {
        ctx.counters.reports_dropped.add(1);
    }
}

/// Waits until some untried backend has a slot: beside the line of those that
/// have not tried any, for the line's next slot may be of one that was tried.
async fn wait_for_slot(
    ctx: &WorkerContext,
    flow: &RelayHandle,
    pool: &PoolTable,
    client: IpAddr,
    tried: &[usize],
) -> Result<Reservation, SessionEnd> {
    let slot = ctx.shared.gate.wait_until(|| pool.pick(ctx.pick_key(client), tried).ok());
    // All three are readiness futures: dropping the losers loses nothing.
    tokio::select! {
        reserved = slot => Ok(reserved),
        end = flow.interrupted() => Err(match end {
            ConnectEnd::Aborted(cause) => cut(Phase::Queue, cause),
            _ => client_gone(Phase::Queue, libc::ECONNRESET),
        }),
        () = tokio::time::sleep(pool.spec.queue_timeout) => Err(SessionEnd {
            cause: Cause::QueueTimeout,
            phase: Phase::Queue,
            errno: 0,
            closed_first: None,
        }),
    }
}

/// The ending when we ran out of something ourselves.
pub(crate) fn local_ending(phase: Phase, error: &io::Error) -> SessionEnd {
    let errno = error.raw_os_error().unwrap_or(0);
    SessionEnd { cause: Cause::LocalResource, phase, errno, closed_first: None }
}

fn client_gone(phase: Phase, errno: i32) -> SessionEnd {
    SessionEnd { cause: Cause::ClientReset, phase, errno, closed_first: Some(SessionSide::Client) }
}

fn cut(phase: Phase, cause: Cause) -> SessionEnd {
    SessionEnd { cause, phase, errno: 0, closed_first: None }
}

// === impl ConnectAttempts ===

impl ConnectAttempts {
    /// Notes that the backend reset the connection, which stood since then, before a
    /// word was said.
    pub(crate) fn note_reset(&mut self, held: &BackendSlot, errno: i32, since: Instant) {
        self.leave(held.index());
        self.note(held.backend(), ConnectFailure::EarlyReset.name(), errno, since);
    }

    /// Notes that an attempt failed.
    pub(crate) fn note(
        &mut self,
        backend: &BackendState,
        failure: &'static str,
        errno: i32,
        begun: Instant,
    ) {
        let (backend, took) = (Arc::clone(&backend.name), clock::now() - begun);
        self.tries.get_or_insert_default().told.push(TryRecord { backend, failure, errno, took });
    }

    /// That backend is not to be tried again.
    fn leave(&mut self, index: usize) {
        self.tries.get_or_insert_default().backends.push(index);
    }

    /// Backends that are not to be tried again.
    pub(crate) fn tried(&self) -> &[usize] {
        self.tries.as_ref().map_or(&[], |tries| &tries.backends)
    }

    /// Those that failed, for the session's record.
    pub(crate) fn failed(&self) -> Vec<TryRecord> {
        self.tries.as_ref().map_or_else(Vec::new, |tries| tries.told.clone())
    }

    /// Where a session stands that is not connected yet.
    pub(crate) fn phase(&self) -> Phase {
        match self.count {
            _ if self.queued => Phase::Queue,
            0 => Phase::Admit,
            _ => Phase::Connect,
        }
    }
}

// === impl BackendSlot ===

impl BackendSlot {
    fn new(mut reserved: Reservation, pool: &PoolTable, ctx: &WorkerContext) -> BackendSlot {
        let backend = Arc::clone(reserved.backend());
        let trial = reserved.take_trial();
        let early_resets = pool.spec.ejection.is_some_and(|spec| spec.early_resets);
        let gate = Arc::clone(&ctx.shared.gate);
        let (reserved, worker) = (Some(reserved), ctx.id as u16);
        BackendSlot { reserved, backend, gate, trial, early_resets, worker, way: None }
    }

    /// Its port stays in TIME_WAIT once the connection is closed.
    pub(crate) fn note_time_wait(&self) {
        let worker = self.worker.into();
        match self.way.as_ref().and_then(|way| way.counts()) {
            Some(counts) => counts.of(worker).lingering.add(1),
            None => self.backend.counters.of(worker).lingering.add(1),
        }
    }

    pub(crate) fn trial(&self) -> Option<TrialId> {
        self.trial
    }

    fn connected(&self) {
        if !self.early_resets {
            self.backend.succeeded();
        }
        if let Some(trial) = self.trial {
            self.backend.in_flight.advance_trial(trial, TrialPhase::Connected);
        }
    }

    /// The backend gave the session what it wanted; `proven` by a first byte or
    /// by an end in order, otherwise by nothing but a connection on which the
    /// client was silent.
    pub(crate) fn succeeded(&mut self, proven: bool) {
        if proven {
            self.backend.succeeded();
        }
        self.decide(TrialPhase::Passed);
    }

    /// The connection broke before anybody said anything.
    pub(crate) fn failed_trial(&mut self) {
        self.decide(TrialPhase::Failed);
    }

    /// Its backend's place in the pool.
    fn index(&self) -> usize {
        self.reserved.as_ref().map_or(usize::MAX, |reserved| reserved.index)
    }

    /// The backend reset the connection, which stood since `since`, before either side
    /// said anything: as good as refused, where it comes soon.
    pub(crate) fn reset_unused(&mut self, ctx: &WorkerContext, since: Instant) {
        self.decide(TrialPhase::Failed);
        self.backend.counters.of(ctx.id).connect_failures.add(1);
        if clock::now() - since <= EARLY_MAX {
            report(ctx, &self.backend, ConnectFailure::EarlyReset, since);
        }
    }

    /// The backend reset the connection before it said anything.
    pub(crate) fn reset_early(&mut self, ctx: &WorkerContext) {
        if self.early_resets {
            self.decide(TrialPhase::Failed);
            report(ctx, &self.backend, ConnectFailure::EarlyReset, clock::now());
        }
    }

    fn decide(&mut self, phase: TrialPhase) {
        if let Some(trial) = self.trial.take() {
            self.backend.in_flight.advance_trial(trial, phase);
        }
    }

    pub(crate) fn backend(&self) -> &Arc<BackendState> {
        &self.backend
    }
}

impl Drop for BackendSlot {
    fn drop(&mut self) {
        // Nothing was learnt: the next session is to try.
        self.decide(TrialPhase::Open);
        if let Some(counts) = self.way.as_ref().and_then(|way| way.counts()) {
            counts.of(self.worker.into()).ended.add(1);
        }
        // The slot first: whoever the gate wakes must find it free.
        self.reserved = None;
        self.gate.slot_freed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blamed(errno: i32, at_once: bool) -> bool {
        let error = io::Error::from_raw_os_error(errno);
        let local = match at_once {
            true => local_errors::local_error_now(&error),
            false => local_errors::local_error_kind(&error),
        };
        matches!(classify_failure(&error, local), AttemptFailure::Backend(..))
    }

    #[test]
    fn no_route_of_our_own_is_not_blamed_on_the_backend_but_an_icmp_message_is() {
        for errno in [libc::ENETUNREACH, libc::ENETDOWN] {
            assert!(!blamed(errno, true), "{errno} at once");
            assert!(blamed(errno, false), "{errno} by ICMP");
        }
        for at_once in [true, false] {
            assert!(!blamed(libc::EADDRNOTAVAIL, at_once));
            assert!(!blamed(libc::EMFILE, at_once));
            assert!(blamed(libc::EHOSTUNREACH, at_once));
            assert!(blamed(libc::ECONNREFUSED, at_once));
        }
    }
}
