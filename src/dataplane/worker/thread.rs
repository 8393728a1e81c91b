//! The event loop of a worker's thread: commands, listeners and the engine's task.
//!
//! Called by `supervisor`. [`ListenerSet`] keeps the listening sockets. If the thread panics,
//! the next thread gets them, so no client in a listen queue is lost.

use super::context::WorkerContext;
use super::{Mailbox, WorkerCommand, sessions};
use crate::accept::listener::{Listener, ListenerRetirement};
#[cfg(debug_assertions)]
use crate::fault_points::FaultPoint;
use socket2::Socket;
use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tidegate_core::metrics::progress::WorkerStage;
use tidegate_core::model::BindKey;
use tidegate_core::outcome::Cause;
#[cfg(debug_assertions)]
use tidegate_net::clock;
use tokio::task::JoinError;

/// The listeners of a thread.
#[derive(Debug, Default)]
pub(crate) struct ListenerSet(RefCell<Vec<ListenerEntry>>);

#[derive(Debug)]
struct ListenerEntry {
    bind: BindKey,
    socket: Arc<Socket>,
    retirement: Rc<ListenerRetirement>,
}

/// A listener handed over to the next thread.
#[derive(Debug)]
pub(crate) struct InheritedListener {
    pub(crate) bind: BindKey,
    pub(crate) socket: Arc<Socket>,
    /// End of the retirement, if it had begun.
    pub(crate) retires: Option<Instant>,
}

impl ListenerSet {
    pub(crate) fn add(
        &self,
        bind: BindKey,
        socket: Arc<Socket>,
        retirement: Rc<ListenerRetirement>,
    ) {
        self.0.borrow_mut().push(ListenerEntry { bind, socket, retirement });
    }

    /// Removes the entry of a listener that has ended.
    pub(crate) fn remove(&self, retirement: &Rc<ListenerRetirement>) {
        self.0.borrow_mut().retain(|entry| !Rc::ptr_eq(&entry.retirement, retirement));
    }

    /// Calls `retire` for all listeners of the bind that are not retiring yet.
    pub(crate) fn retire(&self, bind: &BindKey, retire: impl Fn(&ListenerRetirement)) {
        let listeners = self.0.borrow();
        listeners
            .iter()
            .filter(|entry| entry.bind == *bind && entry.retirement.deadline().is_none())
            .for_each(|entry| retire(&entry.retirement));
    }

    /// Takes the listeners for the next thread, except those released to another process.
    pub(crate) fn take_listeners(&self) -> Vec<InheritedListener> {
        let listeners = std::mem::take(&mut *self.0.borrow_mut());
        let kept = listeners.into_iter().filter(|entry| !entry.retirement.is_released());
        kept.map(|ListenerEntry { bind, socket, retirement }| InheritedListener {
            bind,
            socket,
            retires: retirement.deadline(),
        })
        .collect()
    }
}

/// How a thread ended.
pub(super) enum ThreadExit {
    Stopped,
    StartFailed(io::Error),
    Panicked(&'static str),
}

/// Notifies the event loop if a listener's task panics.
struct ListenerPanicGuard(Rc<WorkerContext>);

/// Starts a listener's task.
pub(super) fn listen(
    ctx: &Rc<WorkerContext>,
    listeners: &Rc<ListenerSet>,
    bind: BindKey,
    socket: Arc<Socket>,
    retirement: Rc<ListenerRetirement>,
) {
    listeners.add(bind.clone(), Arc::clone(&socket), Rc::clone(&retirement));
    let (watch, listeners) = (ListenerPanicGuard(Rc::clone(ctx)), Rc::clone(listeners));
    tokio::task::spawn_local(async move {
        let watch = watch;
        Listener::serve(Rc::clone(&watch.0), bind, socket, Rc::clone(&retirement)).await;
        listeners.remove(&retirement);
    });
}

/// Runs commands until `Stop` or a panic. The engine, the listeners and the sessions are
/// separate tasks.
pub(super) async fn serve(
    ctx: &Rc<WorkerContext>,
    inbox: &Mailbox,
    listeners: &Rc<ListenerSet>,
) -> ThreadExit {
    let mut engine = tokio::task::spawn_local(Rc::clone(&ctx.engine).run());
    let pulse = &ctx.counters.pulse;
    loop {
        pulse.at(WorkerStage::Waiting);
        let command = tokio::select! {
            command = inbox.next(pulse) => command,
            ended = &mut engine => return ThreadExit::Panicked(engine_ended(ctx, ended)),
            () = ctx.engine.broken().notified() => {
                return ThreadExit::Panicked("session panicked in the relay engine");
            }
            () = ctx.listener_panicked.notified() => return ThreadExit::Panicked("listener panicked"),
        };
        pulse.at(WorkerStage::RunningCommand);
        if matches!(command, WorkerCommand::Stop) {
            break;
        }
        run_command(ctx, listeners, command);
    }
    // Dropped sessions count as `drain-deadline`.
    ctx.interrupted_by.set(Cause::DrainDeadline);
    engine.abort();
    ThreadExit::Stopped
}

fn run_command(ctx: &Rc<WorkerContext>, listeners: &Rc<ListenerSet>, command: WorkerCommand) {
    match command {
        WorkerCommand::Listen(bind, socket) => {
            listen(ctx, listeners, bind, socket, Rc::new(ListenerRetirement::default()));
        }
        WorkerCommand::Retire(bind) => listeners.retire(&bind, ListenerRetirement::begin),
        WorkerCommand::Release(bind) => listeners.retire(&bind, ListenerRetirement::release),
        WorkerCommand::ResetBackend(backend, cause) => {
            ctx.engine.abort_backend(backend, cause);
        }
        WorkerCommand::ResetAll(cause) => {
            ctx.engine.abort_all(cause);
        }
        WorkerCommand::ListSessions(query, reply) => {
            let listing = sessions::list(Rc::clone(ctx), query);
            tokio::task::spawn_local(async move { reply.send(listing.await) });
        }
        WorkerCommand::EndSessions(order, reply) => {
            let ending = sessions::end(Rc::clone(ctx), order);
            tokio::task::spawn_local(async move { reply.send(ending.await) });
        }
        // If the caller has given up, the next `Collect` gets the histograms.
        WorkerCommand::Collect(reply) if reply.is_closed() => {}
        WorkerCommand::Collect(reply) => {
            let _ = reply.send(ctx.recorder.borrow_mut().take());
        }
        WorkerCommand::ReturnHistograms(spent) => ctx.recorder.borrow_mut().give_back(spent),
        WorkerCommand::Stop => {}
        #[cfg(debug_assertions)]
        WorkerCommand::Fault(fault) => {
            ctx.engine.arm_fault(fault);
            ctx.faults.arm(fault);
            ctx.faults.pass(FaultPoint::Worker);
        }
        #[cfg(debug_assertions)]
        WorkerCommand::Stall(time) => clock::pause(time),
    }
}

/// Returns the reason for the log.
fn engine_ended(ctx: &WorkerContext, ended: Result<io::Result<()>, JoinError>) -> &'static str {
    match ended {
        Ok(Err(error)) => {
            tracing::error!(worker = ctx.id, %error, "relay engine failed; restarting the worker");
            "relay engine failed"
        }
        _ => "relay engine panicked",
    }
}

// === impl ListenerPanicGuard ===

impl Drop for ListenerPanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.listener_panicked.notify_one();
        }
    }
}
