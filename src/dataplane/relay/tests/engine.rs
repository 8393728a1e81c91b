//! Tests of the engine task with a faulty [`EngineIo`]. Other tasks of the worker must still
//! run.

use super::*;
use crate::relay::close_state::{CloseState, TurnBytes, TurnNext};
use crate::relay::engine::{ConnectResult, EngineIo, EngineSession, StopMode, TurnResult};
use crate::relay::stages::EngineState;
use socket2::{Domain, Socket, Type};
use std::cell::Cell;
use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};
use tidegate_net::reactor;
use tokio::io::unix::AsyncFd;

/// An engine that always reports work and never does any, like a ring whose flag for deferred
/// work is stale.
#[derive(Debug)]
struct BusyEngine {
    /// Wake-up through the reactor: the sending socket and the watched socket.
    waker: Option<(Socket, AsyncFd<Arc<Socket>>)>,
    /// The engine sleeps.
    sleeps: bool,
    /// Number of sessions stopped with [`StopMode::Reset`].
    resets: Rc<Cell<u32>>,
    suspend: Suspend,
}

/// Suspends the process for [`SUSPENDED_FOR`] between the system call and the reading of the
/// clock, while its first session connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suspend {
    Never,
    Soon,
    Done,
}

const SUSPENDED_FOR: Duration = Duration::from_secs(3);

/// A session whose operations never complete.
#[derive(Debug)]
struct StuckSession(CloseState);

impl BusyEngine {
    fn new(has_waker: bool) -> BusyEngine {
        let waker = has_waker.then(|| {
            let (sender, waker) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
            waker.set_nonblocking(true).unwrap();
            (sender, reactor::watch_readable(Arc::new(waker)).unwrap())
        });
        BusyEngine { waker, sleeps: false, resets: Rc::default(), suspend: Suspend::Never }
    }
}

impl EngineIo for BusyEngine {
    type Session = StuckSession;

    fn wants_tick(&self, _: bool) -> bool {
        true
    }

    fn has_work(&self) -> bool {
        !self.sleeps
    }

    fn round(state: &mut EngineState<BusyEngine>) -> io::Result<TurnResult> {
        state.now = clock::now();
        match state.io.suspend {
            Suspend::Never => {}
            Suspend::Soon if state.sessions.is_empty() => {}
            Suspend::Soon => {
                state.now += SUSPENDED_FOR;
                state.io.suspend = Suspend::Done;
            }
            Suspend::Done => {
                state.now += SUSPENDED_FOR;
                state.connect_decided(0, ConnectResult::Connected);
            }
        }
        Ok(TurnResult { drained: true, busy: false })
    }

    fn tick(_: &mut EngineState<BusyEngine>) -> Duration {
        Duration::from_millis(100)
    }

    fn arm_wakeup(&mut self) -> bool {
        self.sleeps
    }

    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.sleeps {
            return Poll::Pending;
        }
        let Some((_, waker)) = &self.waker else { return Poll::Ready(Ok(())) };
        waker.poll_read_ready(cx).map(|guard| guard.map(|mut guard| guard.clear_ready()))
    }

    fn signal_wakeup(&self) -> io::Result<bool> {
        let Some((sender, waker)) = &self.waker else { return Ok(false) };
        let _ = waker.get_ref().recv(&mut [MaybeUninit::uninit(); 8]);
        sender.send(b"!").map(|_| true)
    }

    fn open(&mut self, _: OwnedFd) -> StuckSession {
        StuckSession(CloseState::default())
    }

    fn attach(&mut self, _: u32, _: &mut StuckSession, _: OwnedFd, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn detach(&mut self, _: &mut StuckSession) {}

    fn watch_client(&mut self, _: u32, _: &mut StuckSession, _: bool) {}

    fn begin(&mut self, _: u32, _: &mut StuckSession, _: &mut TurnBytes) -> TurnNext {
        TurnNext::Wait
    }

    fn stop(&mut self, _: &mut StuckSession, how: StopMode) {
        self.resets.set(self.resets.get() + u32::from(how == StopMode::Reset));
    }

    fn request_progress(&mut self, _: &mut StuckSession) -> bool {
        false
    }
}

impl EngineSession for StuckSession {
    fn socket(&self, _: SessionSide) -> Option<BorrowedFd<'_>> {
        None
    }

    fn close_state(&self) -> &CloseState {
        &self.0
    }

    fn is_settled(&self) -> bool {
        false
    }

    fn take_sockets(&mut self) -> Option<[OwnedFd; 2]> {
        None
    }
}

/// Work of other tasks: timers, sockets, and, on tokio-uring, operations that are submitted
/// only while the thread is parked.
async fn other_tasks(runtime: EngineKind) {
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let (mut left, mut right) = tokio::net::UnixStream::pair().unwrap();
        let writing = tokio::task::spawn_local(async move { left.write_all(b"x").await });
        right.read_exact(&mut [0]).await.unwrap();
        writing.await.unwrap().unwrap();
        if runtime == EngineKind::IoUring {
            tokio_uring::no_op().await.unwrap();
        }
    }
}

#[test]
fn engine_that_never_sleeps_lets_other_tasks_run() {
    let kinds =
        [(EngineKind::Epoll, false), (EngineKind::Epoll, true), (EngineKind::IoUring, true)];
    for (runtime, has_waker) in kinds {
        // On its own thread: a blocked runtime fires no timeout.
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            runtime.block_on(async {
                let core = EngineCore::new(BusyEngine::new(has_waker), None, counters());
                let engine = tokio::task::spawn_local(core.run());
                other_tasks(runtime).await;
                assert!(!engine.is_finished());
                engine.abort();
                done.send(()).unwrap();
            })
        });
        let done = ended.recv_timeout(TIMEOUT);
        assert!(done.is_ok(), "engine task blocks {runtime:?}, waker: {has_waker}");
    }
}

/// Drops a session and returns how often it was reset: within 1 s if the engine is busy, or
/// until the first reset if the engine sleeps.
fn resets_after_drop(sleeps: bool) -> u32 {
    EngineKind::Epoll
        .block_on(async {
            let io = BusyEngine { sleeps, ..BusyEngine::new(false) };
            let resets = Rc::clone(&io.resets);
            let core = EngineCore::new(io, None, counters());
            let engine = tokio::task::spawn_local(Rc::clone(&core).run());
            let (client, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
            let key = core.open(client.into(), identity(), clock::now());
            core.remove(key);
            let limit = if sleeps { TIMEOUT } else { Duration::from_secs(1) };
            let begun = clock::now();
            while begun.elapsed() < limit && resets.get() == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            engine.abort();
            resets.get()
        })
        .unwrap()
}

/// A worker that had no CPU for a second has ended sessions whose completed operations are not
/// handled yet. A reset would break streams that can still be delivered.
#[test]
fn unsettled_session_is_reset_only_if_the_engine_is_idle() {
    assert_eq!(resets_after_drop(false), 0);
    assert_eq!(resets_after_drop(true), 1);
}

#[test]
fn connect_that_succeeds_while_the_process_is_suspended_does_not_time_out() {
    let ended = EngineKind::Epoll.block_on(async {
        let (suspend, sleeps) = (Suspend::Soon, true);
        let core = EngineCore::new(
            BusyEngine { suspend, sleeps, ..BusyEngine::new(false) },
            None,
            counters(),
        );
        let engine = tokio::task::spawn_local(Rc::clone(&core).run());
        let (client, upstream) = std::os::unix::net::UnixStream::pair().unwrap();
        let key = core.open(client.into(), identity(), clock::now());
        let deadline = clock::now() + SUSPENDED_FOR / 2;
        core.start_connect(key, upstream.into(), deadline).unwrap();
        let ended = poll_fn(|cx| core.poll_connected(key, cx)).await;
        engine.abort();
        ended
    });
    assert!(ended.unwrap().is_ok(), "timed out");
}
