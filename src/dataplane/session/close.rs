//! The end of a relay. A stage of `session`, called once the relay has ended.
//!
//! - Retries on another backend if the backend reset the connection before any byte.
//! - Updates the backend's failure count and trial.
//! - Closes both sockets with FIN or RST.

use super::Session;
use super::connect::{BackendSlot, EARLY_MAX};
use super::route::BackendChoice;
use crate::relay::{RelayHandle, RelayResult};
use std::time::Duration;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_net::clock;
use tidegate_net::stream;

impl Session {
    /// Closes and accounts for a session whose relay has ended. Returns the session instead
    /// if it can retry on another backend.
    pub(super) fn end(mut self, relayed: RelayResult) -> Option<(Session, BackendChoice)> {
        let mut slot = self.slot.take()?;
        if relayed.untouched && self.attempts < self.pool().spec.connect_attempts {
            return self.try_another(slot, relayed);
        }
        let RelayResult { ending, bytes, first_byte, .. } = relayed;
        let first_byte = first_byte.map(|at| at.saturating_duration_since(slot.since));
        self.record_times(slot.backend(), first_byte);
        slot.record_end(&relayed);
        if leaves_time_wait(ending, bytes.undelivered) {
            slot.note_time_wait();
        }
        // FIN if the session finished, or if a timeout ended it and no byte is undelivered.
        // RST otherwise: to a peer, a truncated stream must not look complete.
        if !ending.cause.closes_in_order(bytes.undelivered) {
            relayed.sockets.into_iter().flatten().for_each(stream::reset);
        } else {
            drop(relayed.sockets);
        }
        drop(slot);
        self.account(ending, bytes, first_byte);
        None
    }

    /// Gives up a backend that has sent and received nothing, to retry on another.
    fn try_another(
        mut self,
        mut slot: BackendSlot,
        relayed: RelayResult,
    ) -> Option<(Session, BackendChoice)> {
        let [client, _] = relayed.sockets?;
        slot.reset_unused();
        self.note_reset(&slot, relayed.ending.errno);
        // The next pick may need this slot.
        drop(slot);
        self.relay = RelayHandle::open(&self.ctx().engine, client, self.identity(), self.started);
        Some((self, BackendChoice::Retry(relayed.ending)))
    }
}

impl BackendSlot {
    /// Counts the end of a session as a success or failure of its backend, or as neither.
    fn record_end(&mut self, relayed: &RelayResult) {
        let SessionEnd { cause, .. } = relayed.ending;
        match relayed.unanswered_since {
            Some(since) if is_early_reset(relayed.ending, clock::now() - since) => {
                self.reset_early();
            }
            // The session ended while the client waited for an answer. That is neither a
            // success nor a failure.
            Some(_) if cause != Cause::Finished => {}
            None if relayed.first_byte.is_none() && is_backend_failure(cause) => {
                self.failed_trial();
            }
            _ => self.succeeded(cause == Cause::Finished || relayed.first_byte.is_some()),
        }
    }
}

/// Whether the backend's connection failed. Before the client has sent a byte this does not
/// count as a failure (such clients are often probes), but a trial session fails by it.
fn is_backend_failure(cause: Cause) -> bool {
    matches!(cause, Cause::BackendReset | Cause::BackendLost)
}

/// Whether the backend reset the connection while the client waited for an answer.
///
/// A FIN without a byte is not an early reset, and neither is a RST after that FIN: Linux
/// reports such a RST as EPIPE (`tcp_reset`).
fn is_early_reset(ending: SessionEnd, waited: Duration) -> bool {
    ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && ending.errno == libc::ECONNRESET
        && ending.closed_first == Some(SessionSide::Backend)
        && waited <= EARLY_MAX
}

/// Whether this host closed the backend connection first. The kernel then keeps the local
/// port in TIME-WAIT for a minute (RFC 9293 section 3.3.2).
fn leaves_time_wait(ending: SessionEnd, undelivered: u64) -> bool {
    match ending.cause {
        Cause::Finished => ending.closed_first == Some(SessionSide::Client),
        cause if !cause.closes_in_order(undelivered) => false,
        Cause::SessionMax => ending.closed_first != Some(SessionSide::Backend),
        Cause::HalfClosedTimeout => ending.closed_first == Some(SessionSide::Client),
        _ => true,
    }
}
