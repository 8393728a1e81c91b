//! Counts each ended session once by cause and phase, and writes its access-log record.
//!
//! The last stage of `session`. `Drop` accounts for a session that no stage accounted for:
//! its task panicked or its worker stopped.

use super::{Session, ended};
use crate::access_log::AccessLogRecord;
use crate::local_errors;
use crate::relay::Bytes;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::{LocalErrorPlace, PanicScope};
use tidegate_core::metrics::histograms::Series;
use tidegate_core::outcome::{self, Cause, Phase, RefusedReason, SessionEnd, SessionSide};
use tidegate_core::table::state::BackendState;
use tidegate_net::clock;

impl Session {
    /// Records the session's duration and its time to first byte.
    pub(super) fn record_times(&self, backend: &BackendState, first_byte: Option<Duration>) {
        // The recorder is borrowed only if a panic inside it is dropping this session.
        let Ok(mut recorder) = self.ctx().recorder.try_borrow_mut() else { return };
        if let Some(took) = first_byte {
            recorder.record(backend.id.0, Series::FirstByte, took);
        }
        recorder.record(backend.id.0, Series::Session, clock::now() - self.started);
    }

    /// Counts and logs the end of the session. Later calls do nothing.
    pub(super) fn account(
        &mut self,
        ending: SessionEnd,
        bytes: Bytes,
        first_byte: Option<Duration>,
    ) {
        if std::mem::replace(&mut self.accounted, true) {
            return;
        }
        let ctx = self.ctx();
        let SessionEnd { cause, phase, .. } = ending;
        if std::thread::panicking() && !ctx.admitting.get() {
            ctx.counters.panics.cell(PanicScope::Session as usize, 0).add(1);
        }
        if cause == Cause::LocalResource && !matches!(phase, Phase::Admit | Phase::Connect) {
            let error = io::Error::from_raw_os_error(ending.errno);
            ctx.local_error(local_errors::local_kind(&error), LocalErrorPlace::Relay, &error);
        }
        ctx.counters.session_end.cell(cause as usize, phase as usize).add(1);
        ctx.counters.ended.add(1);
        if let Some(reason) = RefusedReason::of(ending) {
            let frontend = self.route.state.counters.of(ctx.id);
            frontend.refused.cell(reason as usize, 0).add(1);
        }
        self.log_closed(ending, bytes);
        let now = clock::now();
        self.decision_ended(ending, now);
        let ctx = self.ctx();
        let log = &ctx.access_log;
        if log.enabled() && !log.push(self.record(ending, bytes, first_byte, now)) {
            ctx.counters.access_log_dropped.add(1);
        }
    }

    fn record(
        &self,
        ending: SessionEnd,
        bytes: Bytes,
        first_byte: Option<Duration>,
        now: Instant,
    ) -> AccessLogRecord {
        let backend = self.backend.as_ref();
        AccessLogRecord {
            time: clock::wall(),
            session: self.number,
            worker: self.ctx().id as u32,
            generation: self.table.generation,
            frontend: Some(Arc::clone(&self.route.state.name)),
            client: self.client,
            peer: self.peer(),
            probe: self.is_probe(),
            route: self.taken.position(),
            pool: self.route.pool_of(self.taken).map(|pool| Arc::clone(&pool.spec.name)),
            backend: backend.map(|b| Arc::clone(&b.name)),
            backend_address: backend.map(|b| Arc::clone(&b.address_text)),
            cause: ending.cause.name(),
            phase: ending.phase.name(),
            code: outcome::code(ending.cause, ending.phase),
            timer: ending.cause.timer(ending.phase),
            errno: (ending.errno != 0).then_some(ending.errno),
            closed_first: ending.closed_first.map(SessionSide::name),
            attempts: u32::from(self.attempts),
            why: self.last.why(),
            skipped: self.last.skipped(),
            tries: self.rare.as_ref().map_or_else(Vec::new, |rare| rare.failed.records.clone()),
            bytes_in: bytes.bytes_in,
            bytes_out: bytes.bytes_out,
            bytes_undelivered: bytes.undelivered,
            connect: self.connect_micros.map(|micros| Duration::from_micros(micros.get().into())),
            first_byte,
            duration: now - self.started,
        }
    }

    /// The phase of a session that has no connected backend yet.
    fn setup_phase(&self) -> Phase {
        let connecting = if self.attempts == 0 { Phase::Admit } else { Phase::Connect };
        self.waits.unwrap_or(connecting)
    }
}

impl Drop for Session {
    /// Accounts for an interrupted session with the bytes it has moved so far.
    fn drop(&mut self) {
        if self.accounted {
            return;
        }
        let cause = self.ctx().interrupted_by.get();
        if let Some(slot) = self.slot.take()
            && let Some(so_far) = self.relay.so_far(cause)
        {
            let first_byte = so_far.first_byte.map(|at| at.saturating_duration_since(slot.since));
            self.record_times(slot.backend(), first_byte);
            drop(slot);
            return self.account(so_far.ending, so_far.bytes, first_byte);
        }
        self.account(ended(self.setup_phase(), cause), Bytes::default(), None);
    }
}
