//! Connecting to a backend: with a deadline, and again to another after a failure.
//!
//! A stage of `session`, before any byte is relayed. A backend is never tried
//! twice for one session. Local errors are counted as such; only what the
//! backend or its path caused is reported.

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

/// A reset that comes later is not early: clients that only send, such as those of a
/// log server, are reset one day by a restart, and that says nothing of how the backend
/// takes new sessions.
pub(super) const EARLY_MAX: Duration = Duration::from_secs(10);

/// A session's slot on its backend, from the first attempt to connect to the end of the
/// session; dropping it gives the slot back and wakes those that wait for one.
#[derive(Debug)]
pub(super) struct BackendSlot {
    reserved: Option<Reservation>,
    backend: Arc<BackendState>,
    ctx: Rc<WorkerContext>,
    /// When the connect began, then when it succeeded.
    pub(super) since: Instant,
    /// The trial this session decides, until it has.
    trial: Option<TrialId>,
    /// A connection that is established is no success yet.
    early_resets: bool,
    /// The source address whose port the connection holds, where that is counted by it.
    source: Option<Arc<CountedSource>>,
}

/// Attempts that failed; at most `connect_attempts`.
#[derive(Debug, Default)]
pub(super) struct FailedTries {
    pub(super) records: Vec<TryRecord>,
    /// The backends, by their places in the pool.
    backends: Vec<usize>,
}

/// Why an attempt failed.
enum AttemptFailure {
    Backend(ConnectFailure, i32),
    Local(LocalErrorKind, i32),
    SessionEnded(SessionEnd),
}

impl Session {
    /// Connects to a backend of the session's pool. `first` is the pick that was made, `why`
    /// how the session ends where there is no backend. Waits for a slot, at most
    /// `queue_timeout`, where every untried backend is at its cap.
    pub(super) async fn connect(
        &mut self,
        first: Result<Reservation, NoBackend>,
        mut why: SessionEnd,
    ) -> Result<BackendSlot, SessionEnd> {
        let mut pick = first;
        loop {
            let reserved = match pick {
                Ok(reserved) => reserved,
                // Boxed, as rare: the room would be every session's otherwise.
                Err(NoBackend::AtCapacity) => Box::pin(self.wait_for_slot()).await?,
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
                    self.note_failed(&slot, failure.name(), errno);
                    why = slot.count_failure(failure, errno);
                }
                Err(AttemptFailure::Local(kind, errno)) => {
                    self.note_failed(&slot, kind.name(), errno);
                    let error = io::Error::from_raw_os_error(errno);
                    self.ctx().local_error(kind, LocalErrorPlace::Connect, &error);
                    why = SessionEnd { errno, ..ended(Phase::Connect, Cause::LocalResource) };
                    // Each destination has ports and routes of its own.
                    if !matches!(kind, LocalErrorKind::Ports | LocalErrorKind::Route) {
                        return Err(why);
                    }
                }
            }
            if self.attempts >= self.pool().spec.connect_attempts {
                return Err(why);
            }
            self.leave(&slot);
            drop(slot);
            pick = self.pick_untried();
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
        slot
    }

    async fn attempt(&self, slot: &mut BackendSlot) -> Result<(), AttemptFailure> {
        let deadline = slot.since + self.pool().spec.connect_timeout;
        let ((upstream, how_far), source) = start(self.ctx(), &slot.backend)
            .map_err(|e| classify_failure(&e, local_errors::local_error_now(&e)))?;
        slot.source = source;
        if how_far == Connecting::Done {
            // Only this host has a part in that.
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
        let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        self.connect_micros = NonZeroU32::new(micros.max(1));
    }

    /// Notes that the backend reset the connection before a byte was sent.
    pub(super) fn note_reset(&mut self, slot: &BackendSlot, errno: i32) {
        self.leave(slot);
        self.note_failed(slot, ConnectFailure::EarlyReset.name(), errno);
    }

    /// Notes that an attempt failed.
    fn note_failed(&mut self, slot: &BackendSlot, failure: &'static str, errno: i32) {
        let (backend, took) = (Arc::clone(&slot.backend.name), clock::now() - slot.since);
        let record = TryRecord { backend, failure, errno, took };
        self.failed.get_or_insert_default().records.push(record);
    }

    /// That backend is not tried again.
    fn leave(&mut self, slot: &BackendSlot) {
        let index = slot.reserved.as_ref().map(|reserved| reserved.index);
        self.failed.get_or_insert_default().backends.extend(index);
    }

    /// Backends that are not tried again.
    pub(super) fn tried(&self) -> &[usize] {
        self.failed.as_ref().map_or(&[], |failed| &failed.backends)
    }
}

/// A connection that has begun, and its source address where that counts its ports.
type StartedConnect = ((OwnedFd, Connecting), Option<Arc<CountedSource>>);

/// Starts the connection, from the next source address in turn that has a free port.
fn start(ctx: &WorkerContext, backend: &BackendState) -> io::Result<StartedConnect> {
    let peer = match &backend.address {
        BackendAddr::Tcp(address) => ConnectTarget::Tcp(*address),
        BackendAddr::Unix(path) => return Ok((stream::connect(ConnectTarget::Unix(path))?, None)),
    };
    let now = clock::millis(clock::now());
    let mut ended = io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
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

/// What failed: this host where `local` says so, else the backend or its path.
fn classify_failure(error: &io::Error, local: Option<LocalErrorKind>) -> AttemptFailure {
    let code = error.raw_os_error().unwrap_or(libc::EIO);
    if let Some(kind) = local {
        return AttemptFailure::Local(kind, code);
    }
    let failure = match code {
        // A Unix socket that no process has bound is as refused as a closed port.
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

    /// Its port stays in TIME_WAIT once the connection is closed.
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

    /// The backend gave the session what it wanted; `proven` by a first byte or
    /// by an end in order, otherwise by nothing but a connection on which the
    /// client was silent.
    pub(super) fn succeeded(&mut self, proven: bool) {
        if proven {
            self.backend.succeeded();
        }
        self.decide(TrialPhase::Passed);
    }

    /// The connection broke before either side had sent a byte.
    pub(super) fn failed_trial(&mut self) {
        self.decide(TrialPhase::Failed);
    }

    /// The backend reset the connection before either side had sent a byte: as good as
    /// refused, where it comes soon.
    pub(super) fn reset_unused(&mut self) {
        self.decide(TrialPhase::Failed);
        self.backend.counters.of(self.ctx.id).connect_failures.add(1);
        if clock::now() - self.since <= EARLY_MAX {
            self.report(ConnectFailure::EarlyReset, self.since);
        }
    }

    /// The backend reset the connection before it had sent a byte.
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

    /// Makes the row of failures longer and tells the control thread.
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
        // Nothing was learnt: the next session tries.
        self.decide(TrialPhase::Open);
        if let Some(counts) = self.source.as_ref().and_then(|source| source.counts()) {
            counts.of(self.ctx.id).ended.add(1);
        }
        // The slot first: a session that is woken must find it free.
        self.reserved = None;
        self.ctx.shared.waiters.slot_freed();
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
