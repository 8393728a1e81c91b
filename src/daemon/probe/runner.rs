//! Runs the probes the controller asks for, so many at a time.
//!
//! `daemon` passes each [`ControlEffect::Probe`](tidegate_core::control::ControlEffect::Probe) on and
//! feeds the events that come back to the controller. Pools take turns, and within a
//! pool those go first whose verdict is being changed; it never runs two probes of
//! one backend, and judges nothing.

use super::sources::Turns;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use tidegate_core::control::{ControlEvent, ProbeLane, ProbeToken};
use tidegate_core::health::ProbeOutcome;
use tidegate_core::metrics::counters::{LocalErrorPlace, WorkerCounters};
use tidegate_core::model::{BackendAddr, ProbeSpec};
use tidegate_core::table::state::BackendId;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

/// Probes that run at once: a descriptor each, so well below the usual limits,
/// and enough for ten thousand hanging backends to have their turn within ten
/// timeouts. More wait; the pool that runs the fewest has the next turn.
pub const PROBES_RUNNING_MAX: usize = 1024;

/// One in so many of those is kept for pools that run few: one whose backends all
/// hang takes the others, and a death elsewhere is found as soon as ever.
const KEPT_ONE_IN: usize = 4;

/// A pool runs few while it runs less than one in so many of those that are kept.
const FEW_ONE_IN: usize = 8;

/// Hands requests to the task that runs them; dropping it ends the task and
/// all its probes.
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
    address: BackendAddr,
    spec: Arc<ProbeSpec>,
}

type ProbeEnded = (BackendId, ProbeToken, ProbeOutcome);

/// The running task's state.
#[derive(Debug)]
struct ProbeTask {
    running_max: usize,
    lanes: Lanes,
    /// Bounded by the number of backends: a newer request takes the place of
    /// an older one.
    requested: HashMap<BackendId, ProbeRequest>,
    running: HashMap<BackendId, (AbortHandle, u32)>,
    tasks: JoinSet<ProbeEnded>,
    turns: Turns,
    /// Of the thread this runs on.
    counters: Arc<WorkerCounters>,
}

/// Who is next.
#[derive(Debug, Default)]
struct Lanes {
    /// Those in which somebody waits or runs.
    pools: HashMap<u32, Lane>,
    /// Those in which somebody waits: how many run, when it had its last turn, which.
    waiting: BTreeSet<(usize, u64, u32)>,
    turn: u64,
}

/// One pool.
#[derive(Debug, Default)]
struct Lane {
    running: usize,
    last_turn: u64,
    /// In order of request; each is in `Running::requested`, or was.
    urgent: VecDeque<BackendId>,
    others: VecDeque<BackendId>,
}

// === impl Lanes ===

impl Lanes {
    fn join(&mut self, lane: ProbeLane, backend: BackendId) {
        self.change(lane.pool, |pool| {
            let queue = if lane.urgent { &mut pool.urgent } else { &mut pool.others };
            queue.push_back(backend);
        });
    }

    /// Whose turn it is, while `running` of `max` run.
    fn next(&mut self, running: usize, max: usize) -> Option<(u32, BackendId)> {
        let (own, _, pool) = *self.waiting.first()?;
        let kept = max / KEPT_ONE_IN;
        let few = own < (kept / FEW_ONE_IN).max(1);
        if running >= max || (running >= max - kept && !few) {
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

    fn began(&mut self, pool: u32) {
        self.change(pool, |pool| pool.running += 1);
    }

    fn ended(&mut self, pool: u32) {
        self.change(pool, |pool| pool.running = pool.running.saturating_sub(1));
    }

    /// Keeps `waiting` true to what `change` makes of the pool.
    fn change<T>(&mut self, pool: u32, change: impl FnOnce(&mut Lane) -> T) -> T {
        let lane = self.pools.entry(pool).or_default();
        self.waiting.remove(&(lane.running, lane.last_turn, pool));
        let result = change(lane);
        if !lane.urgent.is_empty() || !lane.others.is_empty() {
            self.waiting.insert((lane.running, lane.last_turn, pool));
        } else if lane.running == 0 {
            self.pools.remove(&pool);
        }
        result
    }
}

// === impl ProbeRunner ===

impl ProbeRunner {
    /// Starts the task on the current runtime, with at most `running_max` (at least 1)
    /// probes at once. Results come as [`ControlEvent::Probed`]; a receiver that is
    /// dropped ends the task. Local errors are counted in `counters`, which this thread
    /// alone writes.
    pub fn start(
        results: mpsc::Sender<ControlEvent>,
        running_max: usize,
        counters: Arc<WorkerCounters>,
    ) -> ProbeRunner {
        let (requests, incoming) = mpsc::unbounded_channel();
        let running = ProbeTask {
            running_max: running_max.max(1),
            lanes: Lanes::default(),
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
        lane: ProbeLane,
        backend: BackendId,
        token: ProbeToken,
        address: BackendAddr,
        spec: Arc<ProbeSpec>,
    ) {
        // It fails only when nobody listens for results any more.
        let _ = self.requests.send(ProbeRequest { lane, backend, token, address, spec });
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
            self.lanes.ended(pool);
        }
        let before = self.requested.insert(backend, request).map(|older| older.lane);
        // Its place stays, unless it has become urgent; a second place is passed over.
        if before != Some(lane) {
            self.lanes.join(lane, backend);
        }
    }

    /// Starts what there is room for.
    fn fill(&mut self) {
        while let Some((pool, backend)) = self.lanes.next(self.running.len(), self.running_max) {
            let Some(request) = self.requested.remove(&backend) else { continue };
            let counters = Arc::clone(&self.counters);
            let turn = self.turns.next(backend, &request.spec.source);
            let task = self.tasks.spawn(async move {
                let probe = super::run_with_stage(&request.address, &request.spec, turn);
                let (outcome, short) = probe.await;
                if let Some(kind) = short {
                    counters.local_trouble(kind, LocalErrorPlace::Probe);
                }
                (request.backend, request.token, outcome)
            });
            self.lanes.began(pool);
            self.running.insert(backend, (task, pool));
        }
    }

    /// The result, unless the probe was given up.
    fn ended(&mut self, ended: Result<(Id, ProbeEnded), JoinError>) -> Option<ProbeEnded> {
        let (id, backend) = match &ended {
            Ok((id, (backend, ..))) => (*id, *backend),
            // Aborted, or a panic in it: only the task's name is left.
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
            self.lanes.ended(pool);
        }
        ended.ok().map(|(_, result)| result)
    }
}
