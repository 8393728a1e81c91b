//! One `debug` log line for each step of a session.
//!
//! Called by the stages of `session`. While the level is off, an event costs one relaxed
//! load: tracing evaluates its fields only after that check. Bytes and messages are never
//! logged.

use super::Session;
use super::connect::BackendSlot;
use super::proxy_header::ReceivedHeader;
use crate::access_log::TryRecord;
use crate::relay::Bytes;
use std::time::Duration;
use tidegate_core::outcome::SessionEnd;
use tidegate_core::proxy_protocol::HeaderFault;
use tidegate_core::table::NoBackend;
use tracing::debug;

/// All steps have one target.
const TARGET: &str = "tidegate_dataplane::session";

impl Session {
    #[inline]
    pub(super) fn log_accepted(&self) {
        let (session, worker) = (self.number, self.ctx().id);
        let (frontend, client) = (&self.route.state.name, &self.client);
        debug!(target: TARGET, session, worker, %frontend, %client, "session accepted");
    }

    /// The line has no `peer` if the header announced no client.
    #[inline]
    pub(super) fn log_header(&self, header: &ReceivedHeader) {
        let (session, client, probe) = (self.number, &self.client, header.probe);
        let peer = header.peer.map(tracing::field::display);
        debug!(target: TARGET, session, %client, peer, probe, "proxy header received");
    }

    #[inline]
    pub(super) fn log_bad_header(&self, fault: HeaderFault) {
        let (session, client, fault) = (self.number, &self.client, fault.name());
        debug!(target: TARGET, session, %client, fault, "proxy header rejected");
    }

    /// The line has no `route` if the frontend's own pool applies, and no `pool` if the route
    /// rejects the client.
    #[inline]
    pub(super) fn log_routed(&self) {
        debug!(
            target: TARGET,
            session = self.number,
            route = self.taken.position(),
            pool = self.route.pool_of(self.taken).map(|pool| tracing::field::display(&pool.spec.name)),
            "session routed"
        );
    }

    /// `reason` is the failed pick, or `None` if other clients of the pool are queued already.
    #[inline]
    pub(super) fn log_queued(&self, reason: Option<NoBackend>) {
        let session = self.number;
        let reason = reason.map_or("queue-not-empty", reason_name);
        debug!(target: TARGET, session, %reason, "session queued");
    }

    #[inline]
    pub(super) fn log_picked(&self, slot: &BackendSlot) {
        let (session, attempt, backend) = (self.number, self.attempts, &slot.backend().name);
        debug!(target: TARGET, session, attempt, %backend, "backend picked");
    }

    #[inline]
    pub(super) fn log_not_picked(&self, reason: NoBackend) {
        let (session, reason) = (self.number, reason_name(reason));
        debug!(target: TARGET, session, %reason, "no backend picked");
    }

    #[inline]
    pub(super) fn log_connected(&self, slot: &BackendSlot, took: Duration) {
        let (session, backend) = (self.number, &slot.backend().name);
        debug!(target: TARGET, session, %backend, ?took, "backend connected");
    }

    #[inline]
    pub(super) fn log_failed(&self, TryRecord { backend, failure, errno, took }: &TryRecord) {
        let session = self.number;
        debug!(target: TARGET, session, %backend, %failure, errno, ?took, "attempt failed");
    }

    #[inline]
    pub(super) fn log_closed(&self, ending: SessionEnd, bytes: Bytes) {
        let (session, cause, phase) = (self.number, ending.cause.name(), ending.phase.name());
        let Bytes { bytes_in, bytes_out, .. } = bytes;
        debug!(target: TARGET, session, %cause, %phase, bytes_in, bytes_out, "session closed");
    }
}

fn reason_name(reason: NoBackend) -> &'static str {
    match reason {
        NoBackend::NoneEligible => "none-eligible",
        NoBackend::Undecided => "undecided",
        NoBackend::Awaited => "awaited",
        NoBackend::Exhausted => "exhausted",
        NoBackend::AtCapacity => "at-capacity",
    }
}
