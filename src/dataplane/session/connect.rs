//! Connects a session to a backend, with a timeout and retries.
//!
//! A stage of `session`, before any byte is relayed.
//!
//! - A session never tries the same backend twice.
//! - A failure of the backend or its path is reported to the control thread.
//! - A local error is counted, but never against a backend.

use super::decide::failure_kind;
use super::route::client_reset;
use super::{Session, ended};
use crate::access_log::TryRecord;
use crate::local_errors;
use crate::relay::ConnectEnd;
use crate::worker::context::{WorkerContext, WorkerReport};
use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::balance::trial::{TrialId, TrialPhase};
use tidegate_core::decision::AttemptFailureKind;
use tidegate_core::health::ConnectFailure;
use tidegate_core::metrics::counters::{LocalErrorKind, LocalErrorPlace};
use tidegate_core::metrics::histograms::Series;
use tidegate_core::model::{BackendAddr, Policy, SourceAddr};
use tidegate_core::outcome::{Cause, Phase, SessionEnd};
use tidegate_core::table::source_addrs::CountedSource;
use tidegate_core::table::state::BackendState;
use tidegate_core::table::{NoBackend, Reservation};
use tidegate_net::clock;
use tidegate_net::stream::{self, ConnectTarget, Connecting};

/// A reset after this time is not early. A client that only sends, such as that of a log
/// server, waits for an answer until the backend restarts. That reset says nothing about
/// new sessions.
pub(super) const EARLY_MAX: Duration = Duration::from_secs(10);

/// A session's slot on its backend, from the connect attempt to the end of the session.
/// Dropping it frees the slot and wakes waiting sessions and listeners.
#[derive(Debug)]
pub(super) struct BackendSlot {
    reserved: Option<Reservation>,
    backend: Arc<BackendState>,
    ctx: Rc<WorkerContext>,
    /// Start of the connect; once connected, the time of success.
    pub(super) since: Instant,
    /// The trial whose result this session decides; `None` once decided.
    trial: Option<TrialId>,
    /// Resets before the first byte count as failures, so a connect is not yet a success.
    early_resets: bool,
    /// The source address of the connection, if it counts its ports.
    source: Option<Arc<CountedSource>>,
}

/// Failed attempts of a session; at most `connect_attempts`.
#[derive(Debug, Default)]
pub(super) struct FailedTries {
    pub(super) records: Vec<TryRecord>,
    /// Backends to exclude from the next pick, as indices into the pool's `serving`.
    backends: Vec<usize>,
}

/// Why a connect attempt failed.
enum AttemptFailure {
    Backend(ConnectFailure, i32),
    Local(LocalErrorKind, i32),
    SessionEnded(SessionEnd),
}

impl Session {
    /// Connects the session to a backend of its pool, starting with `first`, the pick made at
    /// accept. Retries on untried backends. If all of them are at their caps, waits up to
    /// `queue_timeout` for a slot. If all have failed, waits if the pool lets clients wait.
    /// `why` is the end of the session if no backend is available.
    pub(super) async fn connect(
        &mut self,
        first: Result<Reservation, NoBackend>,
        mut why: SessionEnd,
    ) -> Result<BackendSlot, SessionEnd> {
        let mut pick = first;
        loop {
            let reserved = match pick.inspect_err(|&reason| self.log_not_picked(reason)) {
                Ok(reserved) => reserved,
                // Boxed because it is rare: inline, it would enlarge every session's future.
                Err(NoBackend::AtCapacity) => Box::pin(self.wait_for_slot()).await?,
                Err(NoBackend::Exhausted) if self.waits_out_failures() => {
                    Box::pin(self.wait_for_other_table(why)).await?
                }
                Err(_) => return Err(why),
            };
            let mut slot = self.begin_attempt(reserved);
            match self.attempt(&mut slot).await {
                Ok(()) => {
                    self.connected(&mut slot);
                    return Ok(slot);
                }
                Err(AttemptFailure::SessionEnded(ending)) => return Err(ending),
                Err(AttemptFailure::Backend(failure, errno)) => {
                    slot.decide(TrialPhase::Failed);
                    self.note_failed(&slot, failure_kind(failure), errno);
                    why = slot.count_failure(failure, errno);
                }
                Err(AttemptFailure::Local(kind, errno)) => {
                    self.note_failed(&slot, AttemptFailureKind::Local(kind), errno);
                    let error = io::Error::from_raw_os_error(errno);
                    self.ctx().local_error(kind, LocalErrorPlace::Connect, &error);
                    why = SessionEnd { errno, ..ended(Phase::Connect, Cause::LocalResource) };
                    // Local ports and routes are per destination: another backend can work.
                    if !matches!(kind, LocalErrorKind::Ports | LocalErrorKind::Route) {
                        return Err(why);
                    }
                }
            }
            if self.attempts >= self.pool().spec.connect_attempts {
                return Err(why);
            }
            self.exclude(&slot);
            drop(slot);
            pick = self.pick_retry();
        }
    }

    fn begin_attempt(&mut self, reserved: Reservation) -> BackendSlot {
        let early_resets = self.pool().spec.ejection.is_some_and(|spec| spec.early_resets);
        let slot = BackendSlot::new(reserved, early_resets, Rc::clone(self.ctx()));
        self.attempts += 1;
        self.backend = Some(Arc::clone(&slot.backend));
        if self.attempts > 1 {
            self.ctx().counters.connect_retries.add(1);
        }
        self.log_picked(&slot);
        slot
    }

    async fn attempt(&self, slot: &mut BackendSlot) -> Result<(), AttemptFailure> {
        self.establish(slot).await?;
        let paced = match self.route.spec.upload_rate {
            Some(rate) => self.relay.pace_backend(rate),
            None => Ok(()),
        };
        let Err(error) = paced.and_then(|()| self.send_header()) else { return Ok(()) };
        self.relay.detach();
        Err(match error.raw_os_error() {
            Some(errno @ (libc::ECONNRESET | libc::EPIPE)) => {
                AttemptFailure::Backend(ConnectFailure::EarlyReset, errno)
            }
            _ => classify_failure(&error, local_errors::local_error_kind(&error)),
        })
    }

    async fn establish(&self, slot: &mut BackendSlot) -> Result<(), AttemptFailure> {
        let deadline = slot.since + self.pool().spec.connect_timeout;
        let ((upstream, progress), source) = start(self.ctx(), &slot.backend, self.local_port)
            .map_err(|e| classify_failure(&e, local_errors::local_error_now(&e)))?;
        slot.source = source;
        if progress == Connecting::Done {
            // The backend has no part in attaching, so every error is local.
            let attached = self.relay.attach(upstream);
            return attached.map_err(|e| classify_failure(&e, Some(local_errors::local_kind(&e))));
        }
        self.relay.connected(upstream, deadline).await.map_err(|end| match end {
            ConnectEnd::Failed(e) => classify_failure(&e, local_errors::local_error_kind(&e)),
            ConnectEnd::TimedOut => {
                AttemptFailure::Backend(ConnectFailure::Timeout, libc::ETIMEDOUT)
            }
            ConnectEnd::ClientGone(errno) => {
                AttemptFailure::SessionEnded(client_reset(Phase::Connect, errno))
            }
            ConnectEnd::Aborted(cause) => {
                AttemptFailure::SessionEnded(ended(Phase::Connect, cause))
            }
        })
    }

    fn connected(&mut self, slot: &mut BackendSlot) {
        let began = std::mem::replace(&mut slot.since, clock::now());
        let took = slot.since - began;
        slot.connected();
        let (ctx, backend) = (self.ctx(), &slot.backend);
        if self.pool().spec.balance == Policy::PeakEwma {
            backend.latency.connected(took, clock::millis(slot.since));
        }
        backend.counters.of(ctx.id).sessions.add(1);
        ctx.recorder.borrow_mut().record(backend.id.0, Series::Connect, took);
        // A decision reads `u32::MAX` as no time.
        let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX).clamp(1, u32::MAX - 1);
        self.log_connected(slot, took);
        self.connect_micros = NonZeroU32::new(micros);
        self.decision_connected();
    }

    /// Records that the backend reset the connection before any byte, and excludes the backend
    /// from the next pick.
    pub(super) fn note_reset(&mut self, slot: &BackendSlot, errno: i32) {
        self.exclude(slot);
        self.note_failed(slot, AttemptFailureKind::EarlyReset, errno);
    }

    /// Records a failed attempt for the access log and in its decision.
    fn note_failed(&mut self, slot: &BackendSlot, kind: AttemptFailureKind, errno: i32) {
        self.decision_failed(slot, kind, errno);
        let failure = kind.name();
        let (backend, took) = (Arc::clone(&slot.backend.name), clock::now() - slot.since);
        let record = TryRecord { backend, failure, errno, took };
        self.log_failed(&record);
        self.rare.get_or_insert_default().failed.records.push(record);
    }

    /// Excludes the slot's backend from later picks of this session.
    fn exclude(&mut self, slot: &BackendSlot) {
        let index = slot.reserved.as_ref().map(|reserved| reserved.index);
        self.rare.get_or_insert_default().failed.backends.extend(index);
    }

    pub(super) fn has_failed_attempts(&self) -> bool {
        self.rare.as_ref().is_some_and(|rare| !rare.failed.records.is_empty())
    }

    /// Forgets which backends failed, because the pool of a newer table has other positions.
    pub(super) fn forget_tried(&mut self) {
        if let Some(rare) = &mut self.rare {
            rare.failed.backends.clear();
        }
    }

    /// Backends excluded from the next pick, as indices into the pool's `serving`.
    pub(super) fn tried(&self) -> &[usize] {
        self.rare.as_ref().map_or(&[], |rare| &rare.failed.backends)
    }
}

/// A connect that has started, and its source address if that counts its ports.
type StartedConnect = ((OwnedFd, Connecting), Option<Arc<CountedSource>>);

/// Starts a connect from the next source address (round robin) that has a free port.
///
/// `port`: the port that the client connected to.
fn start(ctx: &WorkerContext, backend: &BackendState, port: u16) -> io::Result<StartedConnect> {
    if let BackendAddr::Unix(path) = &backend.address {
        return Ok((stream::connect(ConnectTarget::Unix(path))?, None));
    }
    let mut ended = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    // The reader of the configuration rejects offsets that lead to no port.
    let Some(peer) = backend.address.tcp(port).map(ConnectTarget::Tcp) else { return Err(ended) };
    let now = clock::millis(clock::now());
    for source in backend.source_addrs.load().round_robin(now) {
        match stream::connect_checking_result(source.source().map(SourceAddr::ip), peer) {
            Err(error) if local_errors::local_error_kind(&error) == Some(LocalErrorKind::Ports) => {
                source.mark_exhausted(now);
                if source.source().is_some() {
                    ctx.local_error(LocalErrorKind::Ports, LocalErrorPlace::Connect, &error);
                }
                ended = error;
            }
            Err(error) => return Err(error),
            Ok(begun) => {
                let counts = source.counts();
                counts.inspect(|counts| counts.of(ctx.id).begun.add(1));
                return Ok((begun, counts.map(|_| Arc::clone(source))));
            }
        }
    }
    Err(ended)
}

/// Returns `local` as a local error if it is set. Otherwise the backend or its path failed.
fn classify_failure(error: &io::Error, local: Option<LocalErrorKind>) -> AttemptFailure {
    let code = error.raw_os_error().unwrap_or(libc::EIO);
    if let Some(kind) = local {
        return AttemptFailure::Local(kind, code);
    }
    let failure = match code {
        // A Unix socket without a listener is the same as a closed port.
        libc::ECONNREFUSED | libc::ENOENT | libc::ECONNRESET => ConnectFailure::Refused,
        libc::ETIMEDOUT => ConnectFailure::Timeout,
        libc::EHOSTUNREACH | libc::EHOSTDOWN | libc::ENETUNREACH | libc::ENETDOWN => {
            ConnectFailure::Unreachable
        }
        other => ConnectFailure::Other(other),
    };
    AttemptFailure::Backend(failure, code)
}

// === impl BackendSlot ===

impl BackendSlot {
    fn new(mut reserved: Reservation, early_resets: bool, ctx: Rc<WorkerContext>) -> BackendSlot {
        let (backend, trial) = (Arc::clone(reserved.backend()), reserved.take_trial());
        let (reserved, since) = (Some(reserved), clock::now());
        BackendSlot { reserved, backend, ctx, since, trial, early_resets, source: None }
    }

    /// Counts the connection's local port as held in TIME_WAIT after the close.
    pub(super) fn note_time_wait(&self) {
        match self.source.as_ref().and_then(|source| source.counts()) {
            Some(counts) => counts.of(self.ctx.id).lingering.add(1),
            None => self.backend.counters.of(self.ctx.id).lingering.add(1),
        }
    }

    pub(super) fn trial(&self) -> Option<TrialId> {
        self.trial
    }

    pub(super) fn backend(&self) -> &Arc<BackendState> {
        &self.backend
    }

    fn connected(&self) {
        if !self.early_resets {
            self.backend.succeeded();
        }
        if let Some(trial) = self.trial {
            self.backend.in_flight.advance_trial(trial, TrialPhase::Connected);
        }
    }

    /// Passes the backend's trial. `proven` (a first byte, or both sides closed with FIN)
    /// also resets the backend's row of failures. An unproven session was connected, but its
    /// client sent nothing.
    pub(super) fn succeeded(&mut self, proven: bool) {
        if proven {
            self.backend.succeeded();
        }
        self.decide(TrialPhase::Passed);
    }

    /// Fails the backend's trial without counting a failure: the connection failed before
    /// either side had sent a byte.
    pub(super) fn failed_trial(&mut self) {
        self.decide(TrialPhase::Failed);
    }

    /// Counts a reset before either side had sent a byte. Within [`EARLY_MAX`] it is a failure
    /// of the backend, like a refused connect.
    pub(super) fn reset_unused(&mut self) {
        self.decide(TrialPhase::Failed);
        self.backend.counters.of(self.ctx.id).connect_failures.add(1);
        if clock::now() - self.since <= EARLY_MAX {
            self.report(ConnectFailure::EarlyReset, self.since);
        }
    }

    /// Counts a reset after the client's first byte and before the backend's, if the pool
    /// counts early resets.
    pub(super) fn reset_early(&mut self) {
        if self.early_resets {
            self.decide(TrialPhase::Failed);
            self.report(ConnectFailure::EarlyReset, clock::now());
        }
    }

    /// Counts a failed connect against the backend and reports it.
    fn count_failure(&self, failure: ConnectFailure, errno: i32) -> SessionEnd {
        self.backend.counters.of(self.ctx.id).connect_failures.add(1);
        self.report(failure, self.since);
        let cause = match failure {
            ConnectFailure::Refused => Cause::ConnectRefused,
            ConnectFailure::Timeout => Cause::ConnectTimeout,
            _ => Cause::ConnectFailed,
        };
        SessionEnd { errno, ..ended(Phase::Connect, cause) }
    }

    /// Adds a failure to the backend's row and reports it to the control thread.
    fn report(&self, failure: ConnectFailure, begun: Instant) {
        let in_a_row = self.backend.failed();
        let backend = self.backend.id;
        let report = WorkerReport::ConnectFailed { backend, failure, in_a_row, begun };
        if !self.ctx.shared.reports.push(report) {
            self.ctx.counters.reports_dropped.add(1);
        }
    }

    fn decide(&mut self, phase: TrialPhase) {
        if let Some(trial) = self.trial.take() {
            self.backend.in_flight.advance_trial(trial, phase);
        }
    }
}

impl Drop for BackendSlot {
    fn drop(&mut self) {
        // An undecided trial goes to the next session.
        self.decide(TrialPhase::Open);
        if let Some(counts) = self.source.as_ref().and_then(|source| source.counts()) {
            counts.of(self.ctx.id).ended.add(1);
        }
        // Free the slot before the wake-up: a woken session looks for it.
        self.reserved = None;
        self.ctx.shared.waiters.slot_freed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts_against_backend(errno: i32, at_once: bool) -> bool {
        let error = io::Error::from_raw_os_error(errno);
        let local = match at_once {
            true => local_errors::local_error_now(&error),
            false => local_errors::local_error_kind(&error),
        };
        matches!(classify_failure(&error, local), AttemptFailure::Backend(..))
    }

    #[test]
    fn missing_local_route_is_a_local_error_but_icmp_unreachable_is_not() {
        for errno in [libc::ENETUNREACH, libc::ENETDOWN] {
            assert!(!counts_against_backend(errno, true), "{errno} at once");
            assert!(counts_against_backend(errno, false), "{errno} by ICMP");
        }
        for at_once in [true, false] {
            assert!(!counts_against_backend(libc::EADDRNOTAVAIL, at_once));
            assert!(!counts_against_backend(libc::EMFILE, at_once));
            assert!(counts_against_backend(libc::EHOSTUNREACH, at_once));
            assert!(counts_against_backend(libc::ECONNREFUSED, at_once));
        }
    }
}
