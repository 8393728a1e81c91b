//! Runs the probes that the controller requests, a limited number at the same time.
//!
//! The control loop passes each
//! [`ControlEffect::Probe`](tidegate_core::control::ControlEffect::Probe) to
//! [`ProbeRunner::probe`] and feeds the resulting events to the controller. The runner
//! never runs two probes of one backend, and it does not interpret results.
//!
//! - The pool with the fewest running probes is served first.
//! - Within a pool, probes of backends whose state is about to change come first.

use super::sources::Turns;
use super::tls::TlsConfigs;
use crate::probe_helper::ProbeHelper;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use tidegate_core::control::{ControlEvent, ProbeLane, ProbeToken};
use tidegate_core::health::ProbeOutcome;
use tidegate_core::metrics::counters::{LocalErrorPlace, WorkerCounters};
use tidegate_core::model::{BackendAddr, ProbeKind, ProbeSpec};
use tidegate_core::table::state::BackendId;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

/// Probes that run at the same time; more wait. Each needs one file descriptor, so the
/// cap is well below the usual limits. It is high enough to probe 10,000 hanging
/// backends within ten timeouts.
pub const PROBES_RUNNING_MAX: usize = 1024;

/// One in this many slots is reserved for pools with few running probes. A pool whose
/// backends all hang fills the other slots, and failures in other pools are detected
/// without delay.
const RESERVED_ONE_IN: usize = 4;

/// A pool has few running probes if it runs less than one in this many of the reserved
/// slots.
const FEW_ONE_IN: usize = 8;

/// Passes requests to the task that runs the probes. Dropping it ends the task and
/// its probes.
#[derive(Debug)]
pub struct ProbeRunner {
    requests: mpsc::UnboundedSender<ProbeRequest>,
}

/// One probe to run.
#[derive(Debug)]
struct ProbeRequest {
    lane: ProbeLane,
    backend: BackendId,
    token: ProbeToken,
    /// Pool and backend.
    names: (Arc<str>, Arc<str>),
    address: BackendAddr,
    spec: Arc<ProbeSpec>,
}

type ProbeEnded = (BackendId, ProbeToken, ProbeOutcome);

/// State of the task that runs the probes.
#[derive(Debug)]
struct ProbeTask {
    running_max: usize,
    queues: ProbeQueues,
    /// Bounded by the number of backends: a newer request replaces an older one.
    requested: HashMap<BackendId, ProbeRequest>,
    running: HashMap<BackendId, (AbortHandle, u32)>,
    tasks: JoinSet<ProbeEnded>,
    turns: Turns,
    configs: Arc<TlsConfigs>,
    helper: ProbeHelper,
    /// Counters of the thread that this task runs on.
    counters: Arc<WorkerCounters>,
}

/// Decides which probe runs next.
#[derive(Debug, Default)]
struct ProbeQueues {
    /// Pools with waiting or running probes.
    pools: HashMap<u32, PoolProbes>,
    /// Pools with waiting probes: running probes, last turn, pool.
    waiting: BTreeSet<(usize, u64, u32)>,
    turn: u64,
}

/// The probes of one pool.
#[derive(Debug, Default)]
struct PoolProbes {
    running: usize,
    last_turn: u64,
    /// Oldest request first. Entries without a request in `ProbeTask::requested` are
    /// skipped.
    urgent: VecDeque<BackendId>,
    others: VecDeque<BackendId>,
}

// === impl ProbeQueues ===

impl ProbeQueues {
    fn join(&mut self, lane: ProbeLane, backend: BackendId) {
        self.change(lane.pool, |pool| {
            let queue = if lane.urgent { &mut pool.urgent } else { &mut pool.others };
            queue.push_back(backend);
        });
    }

    /// Returns the next probe to start, if a slot is free for it: `running` of `max`
    /// are in use.
    fn next(&mut self, running: usize, max: usize) -> Option<(u32, BackendId)> {
        let (own, _, pool) = *self.waiting.first()?;
        let reserved = max / RESERVED_ONE_IN;
        let few = own < (reserved / FEW_ONE_IN).max(1);
        if running >= max || (running >= max - reserved && !few) {
            return None;
        }
        self.turn += 1;
        let turn = self.turn;
        let backend = self.change(pool, |pool| {
            pool.last_turn = turn;
            pool.urgent.pop_front().or_else(|| pool.others.pop_front())
        });
        Some((pool, backend?))
    }

    fn started(&mut self, pool: u32) {
        self.change(pool, |pool| pool.running += 1);
    }

    fn ended(&mut self, pool: u32) {
        self.change(pool, |pool| pool.running = pool.running.saturating_sub(1));
    }

    /// Applies `change` to a pool and updates `waiting`.
    fn change<T>(&mut self, pool: u32, change: impl FnOnce(&mut PoolProbes) -> T) -> T {
        let queue = self.pools.entry(pool).or_default();
        self.waiting.remove(&(queue.running, queue.last_turn, pool));
        let result = change(queue);
        if !queue.urgent.is_empty() || !queue.others.is_empty() {
            self.waiting.insert((queue.running, queue.last_turn, pool));
        } else if queue.running == 0 {
            self.pools.remove(&pool);
        }
        result
    }
}

// === impl ProbeRunner ===

impl ProbeRunner {
    /// Starts the task on the current runtime, with at most `running_max` (at least 1)
    /// probes at the same time. The task sends results as [`ControlEvent::Probed`] and
    /// ends if the receiver is dropped. It counts local errors in `counters`, which
    /// only this thread must write.
    pub(crate) fn start(
        results: mpsc::Sender<ControlEvent>,
        running_max: usize,
        counters: Arc<WorkerCounters>,
        helper: ProbeHelper,
    ) -> ProbeRunner {
        let (requests, incoming) = mpsc::unbounded_channel();
        let task = ProbeTask {
            running_max: running_max.max(1),
            queues: ProbeQueues::default(),
            requested: HashMap::new(),
            running: HashMap::new(),
            tasks: JoinSet::new(),
            turns: Turns::default(),
            configs: Arc::default(),
            helper,
            counters,
        };
        tokio::spawn(task.serve(incoming, results));
        ProbeRunner { requests }
    }

    /// Runs the probe when a slot is free. An older probe of the same backend that has
    /// not ended is cancelled without a result.
    pub fn probe(
        &self,
        lane: ProbeLane,
        backend: BackendId,
        token: ProbeToken,
        names: (Arc<str>, Arc<str>),
        address: BackendAddr,
        spec: Arc<ProbeSpec>,
    ) {
        let request = ProbeRequest { lane, backend, token, names, address, spec };
        // Fails only after the receiver of the results was dropped.
        let _ = self.requests.send(request);
    }
}

// === impl ProbeTask ===

impl ProbeTask {
    async fn serve(
        mut self,
        mut incoming: mpsc::UnboundedReceiver<ProbeRequest>,
        results: mpsc::Sender<ControlEvent>,
    ) {
        loop {
            tokio::select! {
                request = incoming.recv() => match request {
                    Some(request) => {
                        let backend = request.backend;
                        self.enqueue(request);
                        self.fill();
                        if self.requested.contains_key(&backend) {
                            self.counters.probes_waited.add(1);
                        }
                    }
                    None => return,
                },
                Some(ended) = self.tasks.join_next_with_id() => {
                    if let Some((backend, token, outcome)) = self.ended(ended) {
                        let event = ControlEvent::Probed { backend, token, outcome };
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

    fn enqueue(&mut self, request: ProbeRequest) {
        let (backend, lane) = (request.backend, request.lane);
        if let Some((older, pool)) = self.running.remove(&backend) {
            older.abort();
            self.queues.ended(pool);
        }
        let before = self.requested.insert(backend, request).map(|older| older.lane);
        // The request keeps its position in the queue, unless its urgency changed.
        // The older entry is then skipped.
        if before != Some(lane) {
            self.queues.join(lane, backend);
        }
    }

    /// Starts waiting probes while slots are free.
    fn fill(&mut self) {
        while let Some((pool, backend)) = self.queues.next(self.running.len(), self.running_max) {
            let Some(request) = self.requested.remove(&backend) else { continue };
            let counters = Arc::clone(&self.counters);
            let turn = self.turns.next(backend, &request.spec.target.source);
            let (configs, helper) = (Arc::clone(&self.configs), self.helper.clone());
            let task = self.tasks.spawn(async move {
                let (address, spec) = (&request.address, &request.spec);
                let (outcome, local_error) = match &spec.kind {
                    // In a box, because few probes run commands.
                    ProbeKind::Exec(probe) => {
                        let names = (&*request.names.0, &*request.names.1);
                        Box::pin(super::run_command(&helper, probe, names, address, spec)).await
                    }
                    _ => super::run_from(address, spec, turn, &configs).await,
                };
                if let Some(kind) = local_error {
                    counters.count_local_error(kind, LocalErrorPlace::Probe);
                }
                (request.backend, request.token, outcome)
            });
            self.queues.started(pool);
            self.running.insert(backend, (task, pool));
        }
    }

    /// Removes an ended probe. Returns its result, unless the probe was cancelled or
    /// panicked.
    fn ended(&mut self, ended: Result<(Id, ProbeEnded), JoinError>) -> Option<ProbeEnded> {
        let (id, backend) = match &ended {
            Ok((id, (backend, ..))) => (*id, *backend),
            // Cancelled or panicked: only the task id is known.
            Err(error) => {
                let id = error.id();
                let mut running = self.running.iter();
                (id, running.find(|(_, (task, _))| task.id() == id).map(|(backend, _)| *backend)?)
            }
        };
        if self.running.get(&backend).is_none_or(|(task, _)| task.id() != id) {
            return None;
        }
        if let Some((_, pool)) = self.running.remove(&backend) {
            self.queues.ended(pool);
        }
        ended.ok().map(|(_, result)| result)
    }
}
