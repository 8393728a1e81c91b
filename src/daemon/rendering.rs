//! Status and metrics: the control thread takes a snapshot, a slice at a time between
//! events, and another thread renders it.
//!
//! Driven by the control loop. One snapshot is taken at a time; requests that arrive in
//! that time get the next one. What needs more than a copy (the workers' histograms, the
//! kernel's facts, text) is left to the other thread.

use super::control_loop::Control;
use super::ports;
use crate::admin::process::ProcessFacts;
use crate::admin::{self, AdminSnapshot};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tidegate_api::names::ServiceState;
use tidegate_core::control::{ControlStatus, Gathering};
use tidegate_core::metrics::histograms::{HistogramDelta, MergedHistograms};
use tidegate_core::table::state::BackendId;
use tidegate_dataplane::worker::{Mailbox, WorkerCommand};
use tidegate_net::clock;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long a worker may take to hand its histograms over: a busy worker answers within
/// a turn, a stalled one must not delay the scrape.
const COLLECT_MAX: Duration = Duration::from_millis(250);

/// How long the control thread gathers before it handles events again.
const SLICE_MAX: Duration = Duration::from_millis(1);

/// Backends between two looks at the clock.
const SLICE_STEP: usize = 32;

/// New backends after which the workers' histograms are fetched without a request: until
/// then a worker keeps some 10 KB of each that had sessions, removed or not.
const UNCOLLECTED_MAX: u32 = tidegate_core::metrics::histograms::SPARE_MAX as u32;

/// A request for a text.
#[derive(Debug)]
pub(super) enum Reader {
    Status(oneshot::Sender<String>),
    Metrics(oneshot::Sender<String>),
}

/// What the control loop keeps of it.
#[derive(Debug, Default)]
pub(super) struct Rendering {
    /// For the next snapshot. Bounded by the admin API's connections.
    asked: Vec<Reader>,
    /// The snapshot under way, and the requests that were there when it began.
    gathering: Option<(Gathering, Vec<Reader>)>,
    running: Option<JoinHandle<()>>,
    /// Backends that had been seen when the histograms were last collected.
    collected: u32,
}

/// Everything measured; clones share it. The control thread takes it for upgrades
/// alone.
#[derive(Debug, Clone, Default)]
pub(super) struct Latencies(Arc<Mutex<MergedHistograms>>);

/// Histograms that the workers were asked for.
pub(super) struct Collecting {
    asked: Vec<(Arc<Mailbox>, oneshot::Receiver<Option<HistogramDelta>>)>,
    latency: Latencies,
    /// The backends up to `seen` that are configured or leaving.
    known: Vec<BackendId>,
    seen: u32,
}

/// Histograms that have arrived.
pub(super) struct Collected {
    deltas: Vec<(Arc<Mailbox>, HistogramDelta)>,
    latency: Latencies,
    known: Vec<BackendId>,
    seen: u32,
}

// === impl Rendering ===

impl Rendering {
    /// Resolves when [`Control::render_on`] has something to do; never without a
    /// request.
    pub(super) async fn due(&mut self) {
        if self.gathering.is_some() {
            // Other tasks of this thread run first.
            tokio::task::yield_now().await;
        } else if let Some(running) = &mut self.running {
            // A panic of the renderer fails its requests alone.
            let _ = running.await;
            self.running = None;
        } else if self.asked.is_empty() {
            std::future::pending().await
        }
    }
}

impl Control {
    /// Has status or metrics rendered soon.
    pub(super) fn ask_for(&mut self, asked: Reader) {
        self.telemetry.rendering.asked.push(asked);
    }

    /// Gathers for a slice; hands the snapshot over once it is complete.
    pub(super) fn render_on(&mut self) {
        let began = clock::now();
        if self.telemetry.rendering.running.is_some() {
            return;
        }
        let under_way = self.telemetry.rendering.gathering.take().or_else(|| {
            let asked = std::mem::take(&mut self.telemetry.rendering.asked);
            (!asked.is_empty()).then(|| (self.controller.begin_status(began), asked))
        });
        let Some((mut gathering, asked)) = under_way else { return };
        loop {
            let now = clock::now();
            if now.saturating_duration_since(began) >= SLICE_MAX {
                self.telemetry.rendering.gathering = Some((gathering, asked));
                return;
            }
            if !self.controller.gather(&mut gathering, SLICE_STEP, now) {
                break;
            }
        }
        let snapshot = self.snapshot(gathering.finish(), clock::now());
        let (collecting, started) = (self.start_collecting(), self.telemetry.started_wall);
        self.telemetry.rendering.running = Some(tokio::spawn(async move {
            let collected = collecting.arrive().await;
            let write = move || render(snapshot, started, collected, asked);
            // It fails only if the renderer panics.
            let _ = tokio::task::spawn_blocking(write).await;
        }));
    }

    fn snapshot(&self, control: ControlStatus, now: Instant) -> AdminSnapshot {
        let table = self.controller.current_table();
        let rarities = self.rare_counters();
        let (engine, engine_reason) = self.workers.engine();
        AdminSnapshot {
            control,
            workers: self.workers.counters().to_vec(),
            version: env!("CARGO_PKG_VERSION"),
            engine,
            engine_reason: engine_reason.to_owned(),
            now,
            uptime: now - self.telemetry.started,
            state: match self.lifecycle.is_serving() {
                true => ServiceState::Serving,
                false => ServiceState::Draining,
            },
            reloads: self.reloads.counts(),
            transitions_unlogged: rarities.unlogged,
            upgrades: self.upgrades.counts(),
            table_serial: table.serial,
            connections_active: self.sessions(),
            connections_max: table.connections_max,
            queued: self.workers.context().waiters.all_queued(),
            buffers: Arc::clone(&self.workers.context().buffers),
            buffers_refused: rarities.buffers_refused,
            state_unwritten: rarities.state_unwritten,
            warnings: self.reloads.warnings(),
            // What is wrong with the file since a crash.
            troubles: self.supervised.in_force.note().into_iter().collect(),
            admin_crowded: rarities.admin_crowded,
            confinement: self.lifecycle.confined().report.clone(),
            control_counts: Arc::clone(self.telemetry.local()),
            log_dropped: rarities.log_dropped,
            ports: self.telemetry.ports.watch(),
            port_limits: self.telemetry.ports.limits(),
            heartbeats: self.evidence.heartbeats.counts(),
            backend_metrics_max: self.reloads.config().admin.backend_metrics_max as usize,
        }
    }

    /// Fetches the workers' histograms without a request, once [`UNCOLLECTED_MAX`]
    /// backends are new: what is kept of removed ones could fill the memory.
    pub(super) fn bound_latency(&mut self) {
        let seen = self.controller.backends_seen();
        if seen.wrapping_sub(self.telemetry.rendering.collected) >= UNCOLLECTED_MAX {
            let collecting = self.start_collecting();
            tokio::spawn(async move {
                let collected = collecting.arrive().await;
                let _ = tokio::task::spawn_blocking(move || collected.absorb()).await;
            });
        }
    }

    /// Fetches what the workers' histograms hold, and waits for it.
    pub(super) async fn collect_latency(&mut self) {
        self.start_collecting().arrive().await.absorb();
    }

    fn start_collecting(&mut self) -> Collecting {
        let seen = self.controller.backends_seen();
        self.telemetry.rendering.collected = seen;
        let ask = |mailbox: &Arc<Mailbox>| {
            let (reply, answer) = oneshot::channel();
            mailbox.send(WorkerCommand::Collect(reply));
            (Arc::clone(mailbox), answer)
        };
        Collecting {
            asked: self.workers.list().iter().map(|worker| ask(&worker.mailbox)).collect(),
            latency: self.telemetry.latency.clone(),
            known: self.controller.all_known().collect(),
            seen,
        }
    }
}

// === impl Latencies ===

impl Latencies {
    pub(super) fn lock(&self) -> MutexGuard<'_, MergedHistograms> {
        // A panic half-way leaves counts that are a little too small.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Collecting ===

impl Collecting {
    /// Waits for the workers, for at most [`COLLECT_MAX`].
    async fn arrive(self) -> Collected {
        let Collecting { asked, latency, known, seen } = self;
        let deadline = (clock::now() + COLLECT_MAX).into();
        let mut deltas = Vec::with_capacity(asked.len());
        for (mailbox, answer) in asked {
            if let Ok(Ok(Some(delta))) = tokio::time::timeout_at(deadline, answer).await {
                deltas.push((mailbox, delta));
            }
        }
        Collected { deltas, latency, known, seen }
    }
}

// === impl Collected ===

impl Collected {
    /// Merges them, and drops those of backends that are gone for good.
    fn absorb(self) {
        let known: HashSet<BackendId> = self.known.into_iter().collect();
        let mut latency = self.latency.lock();
        for (mailbox, delta) in self.deltas {
            mailbox.send(WorkerCommand::ReturnHistograms(latency.absorb(delta)));
        }
        latency.retain(|id| id > self.seen || known.contains(&BackendId(id)));
    }
}

/// Writes what was asked for, on a thread that may take its time.
fn render(
    mut snapshot: AdminSnapshot,
    started: SystemTime,
    collected: Collected,
    asked: Vec<Reader>,
) {
    let latencies = collected.latency.clone();
    collected.absorb();
    let latency = latencies.lock();
    let backends = snapshot.control.pools.iter().flat_map(|pool| &pool.backends);
    let states = backends.map(|backend| &backend.state);
    let short = ports::warnings(&snapshot.ports, snapshot.port_limits, states);
    snapshot.troubles.splice(0..0, short);
    let (mut status, mut metrics) = (None, None);
    for asked in asked {
        // A reply that finds no receiver is the loss of its reader alone.
        let _ = match asked {
            Reader::Status(reply) => {
                let text = status.get_or_insert_with(|| admin::status::render(&snapshot, &latency));
                reply.send(text.clone())
            }
            Reader::Metrics(reply) => {
                let rendered = || {
                    let process = ProcessFacts::read(started);
                    admin::metrics::render(&snapshot, &latency, &process)
                };
                reply.send(metrics.get_or_insert_with(rendered).clone())
            }
        };
    }
}
