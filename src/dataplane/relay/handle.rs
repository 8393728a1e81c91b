//! A session's handle to its engine, and the types of its calls.
//!
//! Used by `session`. Dropping the handle removes the session from the engine and resets the
//! sockets that are still there.

use super::Engine;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::balance::trial::{TrialId, TrialPhase};
use tidegate_core::model::{ClientAddr, FrontendId};
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::table::state::{BackendState, FrontendState};
use tidegate_net::{clock, datagram, stream};

/// A session inside the engine.
#[derive(Debug)]
pub(crate) struct RelayHandle {
    engine: Engine,
    key: u32,
}

/// What a list of sessions needs to know of a session in any stage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionIdentity {
    /// Its number.
    pub(crate) number: u64,
    /// Its client.
    pub(crate) client: ClientAddr,
    /// Its frontend.
    pub(crate) frontend: FrontendId,
}

/// An open session, for a list of sessions.
#[derive(Debug)]
pub(crate) struct SessionView<'s> {
    pub(crate) identity: SessionIdentity,
    /// When it was accepted, to a tenth of a second.
    pub(crate) accepted: Instant,
    /// `None` before it is relayed.
    pub(crate) relayed: Option<RelayedView<'s>>,
}

/// The relay of an open session.
#[derive(Debug)]
pub(crate) struct RelayedView<'s> {
    pub(crate) meter: &'s SessionMeter,
    pub(crate) phase: Phase,
    pub(crate) last_activity: Instant,
    /// Bytes sent to the backend and to the client.
    pub(crate) bytes: [u64; 2],
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
    /// Ends a session of this age, and from a tenth before as soon as no byte has moved for 1 s.
    pub(crate) age: Option<Duration>,
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
    pub(crate) fn open(
        engine: &Engine,
        client: OwnedFd,
        identity: SessionIdentity,
        accepted: Instant,
    ) -> RelayHandle {
        let key = engine.open(client, identity, accepted);
        RelayHandle { engine: Rc::clone(engine), key }
    }

    /// Sets the client that a PROXY header has announced.
    pub(crate) fn set_client(&self, client: ClientAddr) {
        self.engine.set_client(self.key, client);
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
        // The mark of a new socket is 1.
        let mark = |mark| match bytes > 1 {
            true => self.on_client(|client| stream::set_low_water(client, mark)),
            false => Ok(()),
        };
        mark(bytes).map_err(ConnectEnd::Failed)?;
        self.engine.watch_client(self.key, true);
        poll_fn(|cx| self.engine.poll_client(self.key, cx)).await?;
        mark(1).map_err(ConnectEnd::Failed)
    }

    /// Copies received bytes of the client into `buffer` and leaves them in the receive queue.
    /// `Ok(0)`: the client sent FIN and no byte.
    pub(crate) fn peek_client(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.on_client(|client| stream::peek(client, buffer))
    }

    /// Removes as many received bytes of the client as `buffer` has. All of them must have
    /// been received.
    pub(crate) fn discard_from_client(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        self.on_client(|client| {
            while !buffer.is_empty() {
                // The kernel stops once at urgent data.
                let taken = stream::discard(client, buffer)?;
                if taken == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                buffer = std::mem::take(&mut buffer).get_mut(taken..).unwrap_or_default();
            }
            Ok(())
        })
    }

    /// Whether the client has sent FIN, after any number of bytes.
    pub(crate) fn client_has_ended(&self) -> bool {
        self.on_client(|client| Ok(stream::has_ended(client))).unwrap_or(true)
    }

    /// Returns the address that the client connected to. Makes a system call.
    pub(crate) fn client_local_address(&self) -> Option<SocketAddr> {
        self.on_client(|client| datagram::local_address(client)).ok()
    }

    /// Sends `bytes` to the backend of a session that is not relayed yet. `more`: other bytes
    /// follow at once. Returns the number of bytes that the socket took.
    pub(crate) fn send_to_backend(&self, bytes: &[u8], more: bool) -> io::Result<usize> {
        self.on(SessionSide::Backend, |backend| stream::send_first(backend, bytes, more))
    }

    /// Limits the bytes per second that the kernel sends to the backend.
    pub(crate) fn pace_backend(&self, bytes_per_second: u64) -> io::Result<()> {
        self.on(SessionSide::Backend, |backend| {
            stream::set_max_rate(backend, Some(bytes_per_second))
        })
    }

    /// Closes the backend connection of a session that is not relayed yet.
    pub(crate) fn detach(&self) {
        self.engine.detach(self.key);
    }

    fn on_client<T>(&self, act: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        self.on(SessionSide::Client, act)
    }

    /// Calls `act` with a socket of the session.
    fn on<T>(
        &self,
        side: SessionSide,
        act: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        let (mut act, mut result) = (Some(act), None);
        self.engine.with_socket(self.key, side, &mut |socket| {
            result = act.take().map(|act| act(socket));
        });
        result.unwrap_or_else(|| Err(io::Error::from_raw_os_error(libc::EBADF)))
    }

    /// Whether the client has sent a FIN and no byte. For a session that is not relayed yet.
    pub(crate) fn client_left_silently(&self) -> bool {
        matches!(self.peek_client(&mut [0]), Ok(0))
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
        self.on_client(|client| Ok(stream::unread(client))).unwrap_or(0)
    }
}

impl Drop for RelayHandle {
    fn drop(&mut self) {
        self.engine.remove(self.key);
    }
}
