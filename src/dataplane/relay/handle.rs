//! A session's handle on its engine, and the values that pass between the two.
//!
//! Used by `session`. Dropping the handle takes the session out of the engine and resets
//! the sockets that are left there.

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

/// One session's sockets, inside the engine.
#[derive(Debug)]
pub(crate) struct RelayHandle {
    engine: Engine,
    key: u32,
}

/// How waiting for a connect ended otherwise than by success.
#[derive(Debug)]
pub(crate) enum ConnectEnd {
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
pub(crate) struct SessionTimeouts {
    /// Nobody has said a word for so long: over. `None` is off.
    pub(crate) first_byte: Option<Duration>,
    /// Nothing moved for so long: over. `None` is off.
    pub(crate) idle: Option<Duration>,
    /// The same once one side has ended. `None` is off.
    pub(crate) half_closed: Option<Duration>,
    /// How long at least a peer without room may take nothing before one of the three
    /// above acts. `None`: as they say.
    pub(crate) stalled: Option<Duration>,
    /// TCP keepalive of the upstream leg.
    pub(crate) keepalive: Option<Duration>,
    /// `TCP_USER_TIMEOUT` of the upstream leg.
    pub(crate) user_timeout: Option<Duration>,
}

/// Where a flow's bytes are counted while they move.
#[derive(Debug)]
pub(crate) struct SessionMeter {
    /// The writing worker. Small: see the size of `SessionTimers`.
    pub(crate) worker: u16,
    /// The session's frontend.
    pub(crate) frontend: Arc<FrontendState>,
    /// The session's backend.
    pub(crate) backend: Arc<BackendState>,
    /// The session decides its backend's trial.
    pub(crate) trial: Option<TrialId>,
    /// Whether somebody balances by first-byte times.
    pub(crate) timed: bool,
}

/// What a session moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    /// Sent on to the backend.
    pub(crate) bytes_in: u64,
    /// Sent on to the client.
    pub(crate) bytes_out: u64,
    /// Come from either side, and not taken by the kernel of the other when it was
    /// over; none of a session that finished.
    pub(crate) undelivered: u64,
}

/// How a relay ended or, where it is broken off, would end now.
#[derive(Debug)]
pub(crate) struct RelayResult {
    /// Cause, phase, which side closed first.
    pub(crate) ending: SessionEnd,
    /// What it moved.
    pub(crate) bytes: Bytes,
    /// When the backend's first byte came.
    pub(crate) first_byte: Option<Instant>,
    /// When the client spoke, if the backend never answered.
    pub(crate) unanswered_since: Option<Instant>,
    /// The backend reset the connection before either side had said or ended
    /// anything: another can serve the client as if this one had never been.
    pub(crate) untouched: bool,
    /// Client's and backend's, still open; `None` where the relay was broken off. Where
    /// both have ended, it may be the closing of these that tells the side that ended first.
    pub(crate) sockets: Option<[OwnedFd; 2]>,
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
    /// A session for an accepted client. From now on it can be aborted.
    pub(crate) fn open(engine: &Engine, client: OwnedFd) -> RelayHandle {
        RelayHandle { engine: Rc::clone(engine), key: engine.open(client) }
    }

    /// Waits for the end of the connect that is pending on `upstream`. After a success it is
    /// the session's backend socket; otherwise it is closed.
    pub(crate) async fn connected(
        &self,
        upstream: OwnedFd,
        deadline: Instant,
    ) -> Result<(), ConnectEnd> {
        let started = self.engine.start_connect(self.key, upstream, deadline);
        started.map_err(ConnectEnd::Failed)?;
        poll_fn(|cx| self.engine.poll_connected(self.key, cx)).await
    }

    /// Makes the already connected `upstream` the session's backend socket.
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

    /// Resolves when so many bytes of the client wait to be received, or it has ended its
    /// side after fewer.
    pub(crate) async fn client_sent(&self, bytes: u32) -> Result<(), ConnectEnd> {
        self.engine.set_low_water(self.key, bytes).map_err(ConnectEnd::Failed)?;
        self.engine.watch_client(self.key, true);
        poll_fn(|cx| self.engine.poll_client(self.key, cx)).await?;
        self.engine.set_low_water(self.key, 1).map_err(ConnectEnd::Failed)
    }

    /// Whether the client has ended its side (FIN) without having said anything.
    /// For a session that is not relayed yet.
    pub(crate) fn client_left_silently(&self) -> bool {
        self.engine.client_left_silently(self.key)
    }

    /// Moves bytes both ways to the end, from now on. Needs a connected backend socket.
    pub(crate) fn start_relay(&self, limits: SessionTimeouts, meter: SessionMeter) {
        self.engine.start_relay(self.key, limits, meter);
    }

    /// Resolves, once, when the relay is over. Idle sessions are made of this future: it
    /// holds nothing but a reference.
    pub(crate) fn relayed(&self) -> impl Future<Output = RelayResult> {
        poll_fn(|cx| self.engine.poll_relayed(self.key, cx))
    }

    /// The result if `cause` broke the relay off now; `None` where it cannot be told.
    pub(crate) fn so_far(&self, cause: Cause) -> Option<RelayResult> {
        self.engine.so_far(self.key, cause)
    }

    /// Bytes the client has sent, of a session that is not relayed.
    pub(crate) fn unread(&self) -> u64 {
        self.engine.unread(self.key)
    }
}

impl Drop for RelayHandle {
    fn drop(&mut self) {
        self.engine.remove(self.key);
    }
}
