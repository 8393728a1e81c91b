//! What the shell asks of an engine: the part in which the engines differ.
//!
//! Implemented by `readiness` and `ring`, called by `shell` alone.

use super::pace::EngineSleep;
use super::shell::EngineState;
use crate::relay::close_state::{Carried, CloseState, TurnBytes, TurnNext};
use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::task::{Context, Poll};
use std::time::Duration;
use tidegate_core::outcome::SessionSide;

/// Moves the bytes of sessions, each known by its key.
pub(super) trait EngineIo: Sized + Debug {
    /// One session's sockets and streams.
    type Flow: Debug;

    /// A session with only a client.
    fn open(&mut self, key: u32, client: OwnedFd) -> io::Result<Self::Flow>;

    /// Gives it a backend socket. Where a connect is `pending` on that, its end
    /// is to be reported.
    fn attach(
        &mut self,
        key: u32,
        flow: &mut Self::Flow,
        upstream: OwnedFd,
        pending: bool,
    ) -> io::Result<()>;

    /// Takes the backend socket away again and closes it.
    fn detach(&mut self, flow: &mut Self::Flow);

    /// From now on the client's failure is to be reported.
    fn watch_client(&mut self, key: u32, flow: &mut Self::Flow);

    /// Starts relaying.
    fn begin(&mut self, key: u32, flow: &mut Self::Flow, moved: &mut TurnBytes) -> TurnNext;

    /// The session is over: nothing is to be moved any more.
    fn stop_relaying(&mut self, flow: &mut Self::Flow);

    /// Whether its sockets are free to be given away: no operation uses them.
    fn is_settled(flow: &Self::Flow) -> bool;

    /// Makes it settle soon, whatever that breaks.
    fn tear_down(&mut self, flow: &mut Self::Flow);

    /// Asks for progress that has not shown yet; false where there can be none.
    fn request_progress(&mut self, flow: &mut Self::Flow) -> bool;

    fn verdict(flow: &Self::Flow) -> &CloseState;

    /// What became of that side's bytes.
    fn carried(flow: &Self::Flow, from: SessionSide) -> Carried;

    fn client(flow: &Self::Flow) -> Option<BorrowedFd<'_>>;

    fn backend(flow: &Self::Flow) -> Option<BorrowedFd<'_>>;

    /// Takes both sockets out of a settled, connected session.
    fn take_sockets(flow: &mut Self::Flow) -> Option<[OwnedFd; 2]>;

    /// Resets the client, as soon as nothing uses its socket any more.
    fn refuse(&mut self, flow: &mut Self::Flow);

    /// Whether something waits to be done at once.
    fn has_work(&self) -> bool;

    /// Handles what has happened, a batch at most.
    fn round(state: &mut EngineState<Self>, pace: &EngineSleep) -> io::Result<TurnResult>;

    /// Called every [`EngineIo::TICK`] or so, while awake or while it is wanted.
    fn tick(state: &mut EngineState<Self>, pace: &EngineSleep);

    /// Between two ticks.
    const TICK: Duration;

    /// Whether to wake for the next tick; `sessions` says whether there are any.
    fn wants_tick(&self, sessions: bool) -> bool;

    /// Gets ready to be awaited; false where there is something to do.
    fn arm_wakeup(&mut self) -> bool;

    /// Ready when there is something to do.
    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Ends what `doze` began.
    fn disarm_wakeup(&mut self);

    /// Makes `poll_wake` ready through the reactor; false where it cannot.
    fn signal_wakeup(&self) -> io::Result<bool>;
}

/// How a pending connect came to an end, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ConnectResult {
    Connected,
    /// The socket knows how.
    Failed,
    /// It goes on, but nobody would learn of its end: this host failed to wait.
    Unwatched(i32),
}

/// What a round came to.
#[derive(Debug, Clone, Copy)]
pub(super) struct TurnResult {
    /// Nothing is left to do now.
    pub(super) drained: bool,
    /// Something was done.
    pub(super) busy: bool,
}

/// Of a poll: whether the socket has failed, or the errno of the poll itself.
impl From<Result<bool, i32>> for ConnectResult {
    fn from(polled: Result<bool, i32>) -> ConnectResult {
        match polled {
            Ok(false) => ConnectResult::Connected,
            Ok(true) => ConnectResult::Failed,
            Err(errno) => ConnectResult::Unwatched(errno),
        }
    }
}
