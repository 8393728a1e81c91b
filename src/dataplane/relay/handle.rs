//! A session's handle to its engine, and the types of its calls.
//!
//! Used by `session`. Dropping the handle removes the session from the engine and resets the
//! sockets that are still there.

use super::Engine;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::balance::trial::{TrialId, TrialPhase};
use tidegate_core::outcome::{Cause, SessionEnd};
use tidegate_core::table::state::{BackendState, FrontendState};
use tidegate_net::clock;

/// A session inside the engine.
#[derive(Debug)]
pub(crate) struct RelayHandle {
    engine: Engine,
    key: u32,
}

/// Why a wait for a connect, or for the client, ended without success.
#[derive(Debug)]
pub(crate) enum ConnectEnd {
    /// The connect failed.
    Failed(io::Error),
    /// The deadline passed.
    TimedOut,
    /// The client reset its connection.
    ClientGone(i32),
    /// The session was aborted.
    Aborted(Cause),
}

/// Timeouts and keepalive settings of a session. `None` is off.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionTimeouts {
    /// Ends a session in which neither side has sent a byte for this long.
    pub(crate) first_byte: Option<Duration>,
    /// Ends a session in which no byte has moved for this long.
    pub(crate) idle: Option<Duration>,
    /// Replaces `idle` once one side has ended.
    pub(crate) half_closed: Option<Duration>,
    /// Minimum time without progress towards a peer with a full receive window, before one of
    /// the timeouts above ends the session.
    pub(crate) stalled: Option<Duration>,
    /// TCP keepalive of the backend connection.
    pub(crate) keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT` of the backend connection.
    pub(crate) user_timeout: Option<Duration>,
}

/// Counters that a session updates while bytes move.
#[derive(Debug)]
pub(crate) struct SessionMeter {
    /// Number of the worker. 16 bits, to keep `SessionTimers` small.
    pub(crate) worker: u16,
    /// The session's frontend.
    pub(crate) frontend: Arc<FrontendState>,
    /// The session's backend.
    pub(crate) backend: Arc<BackendState>,
    /// The trial of the backend whose result this session decides.
    pub(crate) trial: Option<TrialId>,
    /// The pool's policy uses first-byte times.
    pub(crate) timed: bool,
}

/// Bytes of a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    /// Sent to the backend.
    pub(crate) bytes_in: u64,
    /// Sent to the client.
    pub(crate) bytes_out: u64,
    /// Received from either side and not acknowledged by the other side's kernel at the end.
    /// 0 if the session finished.
    pub(crate) undelivered: u64,
}

/// How a relay ended, or would end if it were interrupted now.
#[derive(Debug)]
pub(crate) struct RelayResult {
    /// Cause, phase and the side that closed first.
    pub(crate) ending: SessionEnd,
    /// Bytes moved.
    pub(crate) bytes: Bytes,
    /// When the backend's first byte arrived.
    pub(crate) first_byte: Option<Instant>,
    /// When the client's first byte arrived, if the backend never sent one.
    pub(crate) unanswered_since: Option<Instant>,
    /// The backend reset the connection before either side had sent a byte or a FIN. The
    /// session can retry on another backend.
    pub(crate) untouched: bool,
    /// The client's and the backend's socket, still open; `None` if the relay was interrupted.
    /// If both sides have ended, closing these sockets may send the last FIN.
    pub(crate) sockets: Option<[OwnedFd; 2]>,
}

// === impl SessionMeter ===

impl SessionMeter {
    /// Records that the client sent the first byte.
    pub(super) fn client_spoke(&self) {
        self.backend.count_client_spoke(self.worker.into());
        self.advance_trial(TrialPhase::ClientSpoke);
    }

    /// Records the backend's first byte, `after` the client's. `None`: the client had sent no
    /// byte before it.
    pub(super) fn backend_answered(&self, after: Option<Duration>, now: Instant) {
        self.backend.count_answered(self.worker.into(), after);
        self.advance_trial(TrialPhase::Passed);
        if self.timed
            && let Some(after) = after
        {
            self.backend.latency.answered(after, clock::millis(now));
        }
    }

    fn advance_trial(&self, phase: TrialPhase) {
        if let Some(trial) = self.trial {
            self.backend.in_flight.advance_trial(trial, phase);
        }
    }
}

// === impl RelayHandle ===

impl RelayHandle {
    /// Adds a session for an accepted client to the engine. The engine can abort it.
    pub(crate) fn open(engine: &Engine, client: OwnedFd) -> RelayHandle {
        RelayHandle { engine: Rc::clone(engine), key: engine.open(client) }
    }

    /// Waits for the pending connect of `upstream`. On success `upstream` becomes the backend
    /// connection; on failure it is closed.
    pub(crate) async fn connected(
        &self,
        upstream: OwnedFd,
        deadline: Instant,
    ) -> Result<(), ConnectEnd> {
        let started = self.engine.start_connect(self.key, upstream, deadline);
        started.map_err(ConnectEnd::Failed)?;
        poll_fn(|cx| self.engine.poll_connected(self.key, cx)).await
    }

    /// Adds the connected socket `upstream` as the session's backend connection.
    pub(crate) fn attach(&self, upstream: OwnedFd) -> io::Result<()> {
        self.engine.attach(self.key, upstream)
    }

    /// Resolves when the client has reset its connection or the session is aborted.
    pub(crate) async fn interrupted(&self) -> ConnectEnd {
        self.engine.watch_client(self.key, false);
        loop {
            if let Err(end) = poll_fn(|cx| self.engine.poll_client(self.key, cx)).await {
                return end;
            }
        }
    }

    /// Resolves when `bytes` bytes from the client wait in the receive queue, or when the
    /// client has sent a FIN after fewer bytes.
    pub(crate) async fn client_sent(&self, bytes: u32) -> Result<(), ConnectEnd> {
        self.engine.set_low_water(self.key, bytes).map_err(ConnectEnd::Failed)?;
        self.engine.watch_client(self.key, true);
        poll_fn(|cx| self.engine.poll_client(self.key, cx)).await?;
        self.engine.set_low_water(self.key, 1).map_err(ConnectEnd::Failed)
    }

    /// Whether the client has sent a FIN and no byte. For a session that is not relayed yet.
    pub(crate) fn client_left_silently(&self) -> bool {
        self.engine.client_left_silently(self.key)
    }

    /// Starts to move bytes in both directions. Needs a connected backend socket.
    pub(crate) fn start_relay(&self, limits: SessionTimeouts, meter: SessionMeter) {
        self.engine.start_relay(self.key, limits, meter);
    }

    /// Resolves once, when the relay has ended. Idle sessions wait in this future, so it holds
    /// only a reference.
    pub(crate) fn relayed(&self) -> impl Future<Output = RelayResult> {
        poll_fn(|cx| self.engine.poll_relayed(self.key, cx))
    }

    /// Returns the result as if `cause` ended the session now. `None` if a panic has
    /// interrupted the engine.
    pub(crate) fn so_far(&self, cause: Cause) -> Option<RelayResult> {
        self.engine.so_far(self.key, cause)
    }

    /// Returns the number of unread bytes from the client, for a session that is not relayed.
    pub(crate) fn unread(&self) -> u64 {
        self.engine.unread(self.key)
    }
}

impl Drop for RelayHandle {
    fn drop(&mut self) {
        self.engine.remove(self.key);
    }
}
