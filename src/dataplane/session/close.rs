//! The end of a relay: what it says of the backend, how both sockets are closed, and
//! whether another backend serves the client instead.
//!
//! A stage of `session`.

use super::Session;
use super::connect::{BackendSlot, EARLY_MAX};
use super::route::BackendChoice;
use crate::relay::{RelayHandle, RelayResult};
use std::time::Duration;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_net::clock;
use tidegate_net::stream;

impl Session {
    /// Closes and accounts for a session whose relay is over, unless it can try
    /// another backend.
    pub(super) fn end(mut self, relayed: RelayResult) -> Option<(Session, BackendChoice)> {
        let mut slot = self.slot.take()?;
        if relayed.untouched && self.attempts < self.pool().spec.connect_attempts {
            return self.try_another(slot, relayed);
        }
        let RelayResult { ending, bytes, first_byte, .. } = relayed;
        let first_byte = first_byte.map(|at| at.saturating_duration_since(slot.since));
        self.record_times(slot.backend(), first_byte);
        slot.learn(&relayed);
        if leaves_time_wait(ending, bytes.undelivered) {
            slot.note_time_wait();
        }
        // With FIN for an end in order, and after time-outs where nothing is lost by it; with
        // RST otherwise. What a side had sent before it failed has reached the other by now,
        // or never will.
        if !ending.cause.closes_in_order(bytes.undelivered) {
            relayed.sockets.into_iter().flatten().for_each(stream::reset);
        } else {
            drop(relayed.sockets);
        }
        drop(slot);
        self.account(ending, bytes, first_byte);
        None
    }

    /// Leaves its backend, which has sent and received nothing, for another.
    fn try_another(
        mut self,
        mut slot: BackendSlot,
        relayed: RelayResult,
    ) -> Option<(Session, BackendChoice)> {
        let [client, _] = relayed.sockets?;
        slot.reset_unused();
        self.note_reset(&slot, relayed.ending.errno);
        // Before the next pick, which may need its slot.
        drop(slot);
        self.relay = RelayHandle::open(&self.ctx().engine, client);
        Some((self, BackendChoice::Retry(relayed.ending)))
    }
}

impl BackendSlot {
    /// What a session that is over says of its backend.
    fn learn(&mut self, relayed: &RelayResult) {
        let SessionEnd { cause, .. } = relayed.ending;
        match relayed.unanswered_since {
            Some(since) if is_early_reset(relayed.ending, clock::now() - since) => {
                self.reset_early();
            }
            // A client that was cut off while it waited proves nothing.
            Some(_) if cause != Cause::Finished => {}
            None if relayed.first_byte.is_none() && is_backends(cause) => self.failed_trial(),
            _ => self.succeeded(cause == Cause::Finished || relayed.first_byte.is_some()),
        }
    }
}

/// Whether the backend's connection broke. Before the client has spoken that is
/// no failure for the row (a client that connects and sends nothing is often a probe),
/// but a trial is not passed by it.
fn is_backends(cause: Cause) -> bool {
    matches!(cause, Cause::BackendReset | Cause::BackendLost)
}

/// Whether the backend reset the connection though the client had spoken and
/// was waiting. A backend that ends without a byte in order (FIN) is not meant,
/// nor is what comes after it: the reset of a connection whose peer has closed
/// reads as EPIPE (`tcp_reset` in Linux).
fn is_early_reset(ending: SessionEnd, waited: Duration) -> bool {
    ending.cause == Cause::BackendReset
        && ending.phase == Phase::Data
        && ending.errno == libc::ECONNRESET
        && ending.closed_first == Some(SessionSide::Backend)
        && waited <= EARLY_MAX
}

/// Whether this host closed the upstream connection first: the kernel then keeps
/// its port for a minute (RFC 9293 section 3.3.2, TIME-WAIT), from the moment the
/// backend's FIN comes, so that no later reset can free it.
fn leaves_time_wait(ending: SessionEnd, undelivered: u64) -> bool {
    match ending.cause {
        Cause::Finished => ending.closed_first == Some(SessionSide::Client),
        cause if !cause.closes_in_order(undelivered) => false,
        Cause::HalfClosedTimeout => ending.closed_first == Some(SessionSide::Client),
        _ => true,
    }
}
