//! Runs the probes the controller asks for, so many at a time.
//!
//! `app` passes each [`Effect::Probe`](crate::control::Effect::Probe) on and
//! feeds the events that come back to the controller. It keeps the order of
//! requests, never runs two probes of one backend, and judges nothing.

use super::sources::Turns;
use crate::config::{BackendAddress, ProbeSpec};
use crate::control::{Event, ProbeToken};
use crate::health::ProbeOutcome;
use crate::table::state::BackendId;
use crate::telemetry::counters::{LocalAt, WorkerCounters};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

/// Probes that run at once: a descriptor each, so well below the usual limits,
/// and enough for ten thousand hanging backends to have their turn within ten
/// timeouts. More wait in order of request.
pub const PROBES_RUNNING_MAX: usize = 1024;

/// Hands requests to the task that runs them; dropping it ends the task and
/// all its probes.
#[derive(Debug)]
pub struct ProbeRunner {
    requests: mpsc::UnboundedSender<Request>,
}

/// One probe to run.
#[derive(Debug)]
struct Request {
    backend: BackendId,
    token: ProbeToken,
    address: BackendAddress,
    spec: Arc<ProbeSpec>,
}

type Ended = (BackendId, ProbeToken, ProbeOutcome);

/// The running task's state.
#[derive(Debug)]
struct Running {
    running_max: usize,
    /// Backends in order of request; each is in `requested`.
    queue: VecDeque<BackendId>,
    /// Bounded by the number of backends: a newer request takes the place of
    /// an older one.
    requested: HashMap<BackendId, Request>,
    running: HashMap<BackendId, AbortHandle>,
    tasks: JoinSet<Ended>,
    turns: Turns,
    /// Of the thread this runs on.
    counters: Option<Arc<WorkerCounters>>,
}

// === impl ProbeRunner ===

impl ProbeRunner {
    /// Starts the task on the current runtime. Results come as
    /// [`Event::Probed`]; a receiver that is dropped ends the task.
    pub fn start(results: mpsc::Sender<Event>) -> ProbeRunner {
        ProbeRunner::with_running_max(results, PROBES_RUNNING_MAX)
    }

    /// As [`ProbeRunner::start`] with another bound, at least 1.
    pub fn with_running_max(results: mpsc::Sender<Event>, running_max: usize) -> ProbeRunner {
        ProbeRunner::build(results, running_max, None)
    }

    /// As [`ProbeRunner::start`]; trouble of our own is counted there, which this
    /// thread alone writes.
    pub fn counting(results: mpsc::Sender<Event>, counters: Arc<WorkerCounters>) -> ProbeRunner {
        ProbeRunner::build(results, PROBES_RUNNING_MAX, Some(counters))
    }

    fn build(
        results: mpsc::Sender<Event>,
        running_max: usize,
        counters: Option<Arc<WorkerCounters>>,
    ) -> ProbeRunner {
        let (requests, incoming) = mpsc::unbounded_channel();
        let running = Running {
            running_max: running_max.max(1),
            queue: VecDeque::new(),
            requested: HashMap::new(),
            running: HashMap::new(),
            tasks: JoinSet::new(),
            turns: Turns::default(),
            counters,
        };
        tokio::spawn(running.serve(incoming, results));
        ProbeRunner { requests }
    }

    /// Runs the probe as soon as there is room. An older probe of the same
    /// backend that has not ended is given up without a result.
    pub fn probe(
        &self,
        backend: BackendId,
        token: ProbeToken,
        address: BackendAddress,
        spec: Arc<ProbeSpec>,
    ) {
        // It fails only when nobody listens for results any more.
        let _ = self.requests.send(Request { backend, token, address, spec });
    }
}

// === impl Running ===

impl Running {
    async fn serve(
        mut self,
        mut incoming: mpsc::UnboundedReceiver<Request>,
        results: mpsc::Sender<Event>,
    ) {
        loop {
            tokio::select! {
                request = incoming.recv() => match request {
                    Some(request) => self.enqueue(request),
                    None => return,
                },
                Some(ended) = self.tasks.join_next_with_id() => {
                    if let Some((backend, token, outcome)) = self.ended(ended) {
                        let event = Event::Probed { backend, token, outcome };
                        if results.send(event).await.is_err() {
                            return;
                        }
                    }
                }
                () = results.closed() => return,
            }
            self.fill();
        }
    }

    fn enqueue(&mut self, request: Request) {
        let backend = request.backend;
        if let Some(older) = self.running.remove(&backend) {
            older.abort();
        }
        if self.requested.insert(backend, request).is_none() {
            self.queue.push_back(backend);
        }
    }

    /// Starts what there is room for.
    fn fill(&mut self) {
        while self.running.len() < self.running_max {
            let Some(backend) = self.queue.pop_front() else { return };
            let Some(request) = self.requested.remove(&backend) else { continue };
            let counters = self.counters.clone();
            let turn = self.turns.next(backend, &request.spec.source);
            let task = self.tasks.spawn(async move {
                let probe = super::run_and_tell(&request.address, &request.spec, turn);
                let (outcome, short) = probe.await;
                if let (Some(kind), Some(counters)) = (short, counters) {
                    counters.local_trouble(kind, LocalAt::Probe);
                }
                (request.backend, request.token, outcome)
            });
            self.running.insert(backend, task);
        }
    }

    /// The result, unless the probe was given up.
    fn ended(&mut self, ended: Result<(Id, Ended), JoinError>) -> Option<Ended> {
        let (id, backend) = match &ended {
            Ok((id, (backend, ..))) => (*id, *backend),
            // Aborted, or a panic in it: only the task's name is left.
            Err(error) => {
                let id = error.id();
                let mut running = self.running.iter();
                (id, running.find(|(_, task)| task.id() == id).map(|(backend, _)| *backend)?)
            }
        };
        if self.running.get(&backend).is_none_or(|task| task.id() != id) {
            return None;
        }
        self.running.remove(&backend);
        ended.ok().map(|(_, result)| result)
    }
}
