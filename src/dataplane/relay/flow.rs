//! A session's handle on the engine, and the values that cross the seam.
//!
//! Used by `session` and `connect`. Dropping the handle takes the flow out of
//! the engine and closes its sockets.

use super::Engine;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tidegate_core::balance::trial::{TrialId, TrialPhase};
use tidegate_core::outcome::{Cause, SessionEnd};
use tidegate_core::table::state::{BackendState, FrontendState};
use tidegate_net::clock;

/// One session's sockets, inside the engine.
#[derive(Debug)]
pub struct RelayHandle {
    pub(super) engine: Engine,
    pub(super) key: u32,
}

/// A flow that is relayed; resolves, once, when that is over. Idle sessions are
/// made of such futures: it is written by hand to be no bigger than a flow.
#[derive(Debug)]
pub struct RelayFuture(RelayHandle);

/// How waiting for a connect ended otherwise than by success.
#[derive(Debug)]
pub enum ConnectEnd {
    /// The kernel's verdict on the connect.
    Failed(io::Error),
    /// The deadline came first.
    TimedOut,
    /// The client reset its connection meanwhile.
    ClientGone(i32),
    /// The session is cut from outside.
    Aborted(Cause),
}

/// A session's timers.
#[derive(Debug, Clone, Copy)]
pub struct SessionTimeouts {
    /// Nobody has said a word for so long: over. `None` is off.
    pub first_byte: Option<Duration>,
    /// Nothing moved for so long: over. `None` is off.
    pub idle: Option<Duration>,
    /// The same once one side has ended. `None` is off.
    pub half_closed: Option<Duration>,
    /// How long at least a peer without room may take nothing before one of the three
    /// above acts. `None`: as they say.
    pub stalled: Option<Duration>,
    /// TCP keepalive of the upstream leg.
    pub keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT` of the upstream leg.
    pub user_timeout: Option<Duration>,
}

/// Where a flow's bytes are counted while they move.
#[derive(Debug)]
pub struct SessionMeter {
    /// The writing worker. Small: see the size of `SessionTimers`.
    pub worker: u16,
    /// The session's frontend.
    pub frontend: Arc<FrontendState>,
    /// The session's backend.
    pub backend: Arc<BackendState>,
    /// The session decides its backend's trial.
    pub trial: Option<TrialId>,
    /// Whether somebody balances by first-byte times.
    pub timed: bool,
}

/// What a session moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Sent on to the backend.
    pub bytes_in: u64,
    /// Sent on to the client.
    pub bytes_out: u64,
    /// Come from either side, and not taken by the kernel of the other when it was
    /// over; none of a session that finished.
    pub undelivered: u64,
}

/// A finished relay: how it ended, what it moved, and its sockets.
#[derive(Debug)]
pub struct RelayResult {
    /// Cause, phase, who closed first.
    pub ending: SessionEnd,
    /// What it moved.
    pub bytes: Bytes,
    /// When the backend's first byte came.
    pub first_byte: Option<Instant>,
    /// When the client spoke, if the backend never answered.
    pub unanswered_since: Option<Instant>,
    /// The backend reset the connection before either side had said or ended
    /// anything: another may serve the client as if this one had never been.
    pub untouched: bool,
    /// Client's and backend's, still open. Where both have ended, it may be the
    /// closing of these that tells the side that ended first.
    pub sockets: [OwnedFd; 2],
}

/// What a relay has come to that is broken off.
#[derive(Debug)]
pub struct PartialResult {
    /// As if it ended now.
    pub ending: SessionEnd,
    /// What it moved.
    pub bytes: Bytes,
    /// When the backend's first byte came.
    pub first_byte: Option<Instant>,
}

// === impl SessionMeter ===

impl SessionMeter {
    /// The client spoke, and before the backend did.
    pub(super) fn client_spoke(&self) {
        self.backend.count_client_spoke(self.worker.into());
        self.advance_trial(TrialPhase::ClientSpoke);
    }

    /// The backend's first byte is there, that long after the client's.
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
    /// Waits until `upstream`, on which a connect is pending, is decided. On
    /// success it is the flow's backend socket; otherwise it is closed.
    pub async fn connected(&self, upstream: OwnedFd, deadline: Instant) -> Result<(), ConnectEnd> {
        self.engine.connected(self.key, upstream, deadline).await
    }

    /// Makes the already connected `upstream` the flow's backend socket.
    pub fn attach(&self, upstream: OwnedFd) -> io::Result<()> {
        self.engine.attach(self.key, upstream)
    }

    /// Resolves when the client has reset its connection or the session is cut
    /// from outside; pending otherwise, for ever.
    pub async fn interrupted(&self) -> ConnectEnd {
        self.engine.interrupted(self.key).await
    }

    /// Whether the client has ended its side (FIN) without having said anything.
    /// For a flow that is not relayed yet.
    pub fn client_left_silently(&self) -> bool {
        self.engine.client_left_silently(self.key)
    }

    /// Moves bytes both ways to the end, beginning now. Needs a connected
    /// backend socket.
    pub fn relay(self, limits: SessionTimeouts, meter: SessionMeter) -> RelayFuture {
        self.engine.start_relay(self.key, limits, meter);
        RelayFuture(self)
    }

    /// Turns the client away with RST, for a session that ends before it is
    /// relayed; gives the number of bytes it had sent.
    pub fn refuse(self) -> u64 {
        self.engine.refuse(self.key)
    }
}

// === impl RelayFuture ===

impl RelayFuture {
    /// What it has come to if `cause` breaks it off now; `None` where nobody can
    /// tell any more.
    pub fn so_far(&self, cause: Cause) -> Option<PartialResult> {
        self.0.engine.so_far(self.0.key, cause)
    }
}

impl Future for RelayFuture {
    type Output = RelayResult;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RelayResult> {
        self.0.engine.poll_relayed(self.0.key, cx)
    }
}

impl Drop for RelayHandle {
    fn drop(&mut self) {
        self.engine.remove(self.key);
    }
}
