//! The engine's core and task with an engine that misbehaves: the worker's other tasks must not pay.

use super::*;
use crate::relay::close_state::{CloseState, TurnBytes, TurnNext};
use crate::relay::engine::{ConnectResult, EngineFlow, EngineIo, StopMode, TurnResult};
use crate::relay::stages::EngineState;
use socket2::{Domain, Socket, Type};
use std::cell::Cell;
use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};
use tidegate_net::reactor;
use tokio::io::unix::AsyncFd;

/// Never finds a reason to sleep and never does anything: what a ring looks like
/// whose flag for deferred work stands for none.
#[derive(Debug)]
struct Sleepless {
    /// To be woken through the reactor, where it can be: a socket it writes to,
    /// and the one it waits for.
    bell: Option<(Socket, AsyncFd<Arc<Socket>>)>,
    /// It does sleep after all.
    dozes: bool,
    /// Sessions that were torn down.
    torn_down: Rc<Cell<u32>>,
    /// How far its process is with being stopped.
    stopped: Stopped,
}

/// A process that is stopped for [`STOPPED_FOR`], between asking the kernel and reading the
/// time, while its first session connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    Never,
    Soon,
    Before,
}

const STOPPED_FOR: Duration = Duration::from_secs(3);

/// A session whose operations never come back.
#[derive(Debug)]
struct NoFlow(CloseState);

impl Sleepless {
    fn new(has_bell: bool) -> Sleepless {
        let bell = has_bell.then(|| {
            let (ringer, bell) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
            bell.set_nonblocking(true).unwrap();
            (ringer, reactor::watch_readable(Arc::new(bell)).unwrap())
        });
        Sleepless { bell, dozes: false, torn_down: Rc::default(), stopped: Stopped::Never }
    }
}

impl EngineIo for Sleepless {
    type Flow = NoFlow;

    fn wants_tick(&self, _: bool) -> bool {
        true
    }

    fn has_work(&self) -> bool {
        !self.dozes
    }

    fn round(state: &mut EngineState<Sleepless>) -> io::Result<TurnResult> {
        state.now = clock::now();
        match state.io.stopped {
            Stopped::Never => {}
            Stopped::Soon if state.flows.is_empty() => {}
            Stopped::Soon => {
                state.now += STOPPED_FOR;
                state.io.stopped = Stopped::Before;
            }
            Stopped::Before => {
                state.now += STOPPED_FOR;
                state.connect_decided(0, ConnectResult::Connected);
            }
        }
        Ok(TurnResult { drained: true, busy: false })
    }

    fn tick(_: &mut EngineState<Sleepless>) -> Duration {
        Duration::from_millis(100)
    }

    fn arm_wakeup(&mut self) -> bool {
        self.dozes
    }

    fn poll_wake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.dozes {
            return Poll::Pending;
        }
        let Some((_, bell)) = &self.bell else { return Poll::Ready(Ok(())) };
        bell.poll_read_ready(cx).map(|guard| guard.map(|mut guard| guard.clear_ready()))
    }

    fn signal_wakeup(&self) -> io::Result<bool> {
        let Some((ringer, bell)) = &self.bell else { return Ok(false) };
        let _ = bell.get_ref().recv(&mut [MaybeUninit::uninit(); 8]);
        ringer.send(b"!").map(|_| true)
    }

    fn open(&mut self, _: OwnedFd) -> NoFlow {
        NoFlow(CloseState::default())
    }

    fn attach(&mut self, _: u32, _: &mut NoFlow, _: OwnedFd, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn detach(&mut self, _: &mut NoFlow) {}

    fn watch_client(&mut self, _: u32, _: &mut NoFlow, _: bool) {}

    fn begin(&mut self, _: u32, _: &mut NoFlow, _: &mut TurnBytes) -> TurnNext {
        TurnNext::Wait
    }

    fn stop(&mut self, _: &mut NoFlow, how: StopMode) {
        self.torn_down.set(self.torn_down.get() + u32::from(how == StopMode::Reset));
    }

    fn request_progress(&mut self, _: &mut NoFlow) -> bool {
        false
    }
}

impl EngineFlow for NoFlow {
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

/// What the rest of a worker does: timers, sockets, and, on tokio-uring,
/// operations that are submitted only while the thread is parked.
async fn the_rest_of_a_worker(runtime: EngineKind) {
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
fn an_engine_that_never_sleeps_lets_the_workers_other_tasks_run() {
    let kinds =
        [(EngineKind::Epoll, false), (EngineKind::Epoll, true), (EngineKind::IoUring, true)];
    for (runtime, has_bell) in kinds {
        // On a thread of its own: where it is starved, so is every time-out.
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            runtime.block_on(async {
                let core = EngineCore::new(Sleepless::new(has_bell), None, counters());
                let engine = tokio::task::spawn_local(core.run());
                the_rest_of_a_worker(runtime).await;
                assert!(!engine.is_finished());
                engine.abort();
                done.send(()).unwrap();
            })
        });
        let verdict = ended.recv_timeout(PATIENCE);
        assert!(verdict.is_ok(), "the engine task starves {runtime:?}, bell: {has_bell}");
    }
}

/// How often a session was torn down a second after it was dropped, or as soon as
/// it was.
fn torn_down(dozes: bool) -> u32 {
    EngineKind::Epoll
        .block_on(async {
            let torn_down = Rc::new(Cell::new(0));
            let torn = Rc::clone(&torn_down);
            let io = Sleepless { bell: None, dozes, torn_down: torn, stopped: Stopped::Never };
            let core = EngineCore::new(io, None, counters());
            let engine = tokio::task::spawn_local(Rc::clone(&core).run());
            let (client, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
            let key = core.open(client.into());
            core.remove(key);
            let enough = if dozes { PATIENCE } else { Duration::from_secs(1) };
            let begun = clock::now();
            while begun.elapsed() < enough && torn_down.get() == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            engine.abort();
            torn_down.get()
        })
        .unwrap()
}

/// A worker that has got no processor for a second has ended sessions whose
/// operations are done, but not looked at yet: to reset those would break streams
/// that are whole.
#[test]
fn a_session_is_torn_down_only_where_nothing_else_is_left_to_come_back() {
    assert_eq!(torn_down(false), 0);
    assert_eq!(torn_down(true), 1);
}

#[test]
fn connect_done_while_the_process_was_stopped_has_not_timed_out() {
    let ended = EngineKind::Epoll.block_on(async {
        let (stopped, dozes) = (Stopped::Soon, true);
        let core = EngineCore::new(
            Sleepless { stopped, dozes, ..Sleepless::new(false) },
            None,
            counters(),
        );
        let engine = tokio::task::spawn_local(Rc::clone(&core).run());
        let (client, upstream) = std::os::unix::net::UnixStream::pair().unwrap();
        let key = core.open(client.into());
        let deadline = clock::now() + STOPPED_FOR / 2;
        core.start_connect(key, upstream.into(), deadline).unwrap();
        let ended = poll_fn(|cx| core.poll_connected(key, cx)).await;
        engine.abort();
        ended
    });
    assert!(ended.unwrap().is_ok(), "the deadline came first");
}
