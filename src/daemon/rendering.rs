//! Renders status and metrics without blocking the control thread.
//!
//! Driven by the control loop. A panic while rendering fails only the requests of that
//! rendering.
//!
//! 1. The control thread copies a snapshot, in slices of [`SLICE_MAX`] between events.
//! 2. A task collects the histograms of the workers.
//! 3. A blocking thread reads kernel data and renders the text.
//!
//! Requests that arrive after step 1 has started get the next snapshot.

use super::control_loop::Control;
use super::ports;
use super::traffic::SharedTraffic;
use crate::admin::process::ProcessFacts;
use crate::admin::{self, AdminSnapshot, Observed};
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

/// How long to wait for the histograms of a worker. A busy worker answers within one turn
/// of its loop. A stalled worker must not delay the answer.
const COLLECT_MAX: Duration = Duration::from_millis(250);

/// How long the control thread copies before it handles events again.
const SLICE_MAX: Duration = Duration::from_millis(1);

/// Backends copied between two checks of the time.
const SLICE_STEP: usize = 32;

/// New backends after which the workers' histograms are collected without a request.
/// Until then a worker keeps about 10 KB for each backend that had sessions, even if the
/// backend was removed.
const UNCOLLECTED_MAX: u32 = tidegate_core::metrics::histograms::SPARE_MAX as u32;

/// A request for status or metrics.
#[derive(Debug)]
pub(super) enum Reader {
    Status(oneshot::Sender<String>),
    Metrics(oneshot::Sender<String>),
    Observed { latencies: bool, reply: oneshot::Sender<Observed> },
}

/// State of the rendering in the control loop.
#[derive(Debug, Default)]
pub(super) struct Rendering {
    /// Requests for the next snapshot. Bounded by the connections of the admin API.
    requests: Vec<Reader>,
    /// The unfinished snapshot, and the requests that it answers.
    gathering: Option<(Gathering, Vec<Reader>)>,
    running: Option<JoinHandle<()>>,
    /// Number of backends seen at the last collection of the histograms.
    collected: u32,
}

/// Merged histograms of all workers. Clones share them. The control thread locks them
/// only for an upgrade.
#[derive(Debug, Clone, Default)]
pub(crate) struct Latencies(Arc<Mutex<MergedHistograms>>);

/// Histograms that were requested from the workers.
pub(super) struct Collecting {
    replies: Vec<(Arc<Mailbox>, oneshot::Receiver<Option<HistogramDelta>>)>,
    latency: Latencies,
    traffic: SharedTraffic,
    /// The backends with an id up to `seen` that are configured or being removed.
    known: Vec<BackendId>,
    seen: u32,
}

/// Histograms received from the workers.
pub(super) struct Collected {
    deltas: Vec<(Arc<Mailbox>, HistogramDelta)>,
    latency: Latencies,
    traffic: SharedTraffic,
    known: Vec<BackendId>,
    seen: u32,
}

// === impl Reader ===

impl Reader {
    /// Whether the answer has the latencies of the workers.
    fn needs_latencies(&self) -> bool {
        match self {
            Reader::Status(_) | Reader::Metrics(_) => true,
            Reader::Observed { latencies, .. } => *latencies,
        }
    }
}

// === impl Rendering ===

impl Rendering {
    /// Resolves when [`Control::render_step`] is due. Never resolves without a request.
    pub(super) async fn due(&mut self) {
        if self.gathering.is_some() {
            // Other tasks of this thread run first.
            tokio::task::yield_now().await;
        } else if let Some(running) = &mut self.running {
            // After a panic of the task, its requests get no answer.
            let _ = running.await;
            self.running = None;
        } else if self.requests.is_empty() {
            std::future::pending().await
        }
    }
}

impl Control {
    /// Queues a request for status or metrics.
    pub(super) fn request_rendering(&mut self, request: Reader) {
        self.telemetry.rendering.requests.push(request);
    }

    /// Copies one slice of the snapshot. Starts the rendering when the snapshot is
    /// complete.
    pub(super) fn render_step(&mut self) {
        let began = clock::now();
        if self.telemetry.rendering.running.is_some() {
            return;
        }
        let unfinished = self.telemetry.rendering.gathering.take().or_else(|| {
            let requests = std::mem::take(&mut self.telemetry.rendering.requests);
            (!requests.is_empty()).then(|| (self.controller.begin_status(began), requests))
        });
        let Some((mut gathering, requests)) = unfinished else { return };
        loop {
            let now = clock::now();
            if now.saturating_duration_since(began) >= SLICE_MAX {
                self.telemetry.rendering.gathering = Some((gathering, requests));
                return;
            }
            if !self.controller.gather(&mut gathering, SLICE_STEP, now) {
                break;
            }
        }
        let snapshot = self.snapshot(gathering.finish(), clock::now());
        let collecting =
            requests.iter().any(Reader::needs_latencies).then(|| self.start_collecting());
        let (latencies, started) = (self.telemetry.latency.clone(), self.telemetry.started_wall);
        self.telemetry.rendering.running = Some(tokio::spawn(async move {
            let collected = match collecting {
                Some(collecting) => Some(collecting.arrive().await),
                None => None,
            };
            let write = move || {
                collected.into_iter().for_each(Collected::absorb);
                render(snapshot, started, latencies, requests);
            };
            // Fails only if the rendering panics.
            let _ = tokio::task::spawn_blocking(write).await;
        }));
    }

    fn snapshot(&self, control: ControlStatus, now: Instant) -> AdminSnapshot {
        let table = self.controller.current_table();
        let rare = self.rare_counters();
        let (engine, engine_reason) = self.workers.engine();
        AdminSnapshot {
            control,
            helper_failed: self.evidence.helper.has_ended(),
            workers: self.workers.counters().to_vec(),
            version: env!("CARGO_PKG_VERSION"),
            engine,
            engine_reason: engine_reason.to_owned(),
            now,
            wall: unix_time(clock::wall()),
            uptime: now - self.telemetry.started,
            state: match self.lifecycle.is_serving() {
                true => ServiceState::Serving,
                false => ServiceState::Draining,
            },
            reloads: self.reloads.counts(),
            transitions_unlogged: rare.unlogged,
            upgrades: self.upgrades.counts(),
            table_serial: table.serial,
            connections_active: self.sessions(),
            connections_max: table.connections_max,
            table,
            queued: self.workers.context().waiters.all_queued(),
            buffers: Arc::clone(&self.workers.context().buffers),
            buffers_refused: rare.buffers_refused,
            state_unwritten: rare.state_unwritten,
            warnings: self.reloads.warnings(),
            other_warnings: (self.supervised.in_force.note().into_iter())
                .chain(self.reloads.rejected())
                .chain(self.sources.warning())
                .collect(),
            admin_dropped: rare.admin_dropped,
            events: self.telemetry.events.counts(),
            streams: self.telemetry.streams.clone(),
            event_log: self.telemetry.events.clone(),
            traffic: self.telemetry.traffic.shared().clone(),
            confinement: self.lifecycle.confined().report.clone(),
            control_counts: Arc::clone(self.telemetry.local()),
            log_dropped: rare.log_dropped,
            ports: self.telemetry.ports.watch(),
            port_limits: self.telemetry.ports.limits(),
            source_counters: self.sources.counters(),
            source_restarts: self.sources.thread_restarts(),
            resolver: self.sources.resolver(),
            ignored_members: self.controller.ignored_members().to_vec(),
            heartbeats: self.evidence.heartbeats.counts(),
            backend_metrics_max: self.reloads.config().admin.backend_metrics_max as usize,
        }
    }

    /// Collects the workers' histograms after [`UNCOLLECTED_MAX`] new backends, to bound
    /// the memory of removed backends.
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

    /// Collects the workers' histograms and waits for them.
    pub(super) async fn collect_latency(&mut self) {
        self.start_collecting().arrive().await.absorb();
    }

    /// Asks the workers for their histograms.
    pub(super) fn start_collecting(&mut self) -> Collecting {
        let seen = self.controller.backends_seen();
        self.telemetry.rendering.collected = seen;
        let request = |mailbox: &Arc<Mailbox>| {
            let (reply, answer) = oneshot::channel();
            mailbox.send(WorkerCommand::Collect(reply));
            (Arc::clone(mailbox), answer)
        };
        Collecting {
            replies: self.workers.list().iter().map(|worker| request(&worker.mailbox)).collect(),
            latency: self.telemetry.latency.clone(),
            traffic: self.telemetry.traffic.shared().clone(),
            known: self.controller.all_known().collect(),
            seen,
        }
    }
}

// === impl Latencies ===

impl Latencies {
    pub(crate) fn lock(&self) -> MutexGuard<'_, MergedHistograms> {
        // After a panic during a merge, some counts can be too small.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Collecting ===

impl Collecting {
    /// Waits for the workers, for at most [`COLLECT_MAX`].
    pub(super) async fn arrive(self) -> Collected {
        let Collecting { replies, latency, traffic, known, seen } = self;
        let deadline = (clock::now() + COLLECT_MAX).into();
        let mut deltas = Vec::with_capacity(replies.len());
        for (mailbox, answer) in replies {
            if let Ok(Ok(Some(delta))) = tokio::time::timeout_at(deadline, answer).await {
                deltas.push((mailbox, delta));
            }
        }
        Collected { deltas, latency, traffic, known, seen }
    }
}

// === impl Collected ===

impl Collected {
    /// Merges the histograms and drops those of removed backends.
    pub(super) fn absorb(self) {
        let known: HashSet<BackendId> = self.known.into_iter().collect();
        let (mut latency, mut traffic) = (self.latency.lock(), self.traffic.lock());
        for (mailbox, delta) in self.deltas {
            let spent = latency.absorb_with(delta, |backend, series, value, count| {
                traffic.record(BackendId(backend), series, value, count);
            });
            mailbox.send(WorkerCommand::ReturnHistograms(spent));
        }
        drop(traffic);
        latency.retain(|id| id > self.seen || known.contains(&BackendId(id)));
    }
}

/// Renders and sends the answers. Runs on a blocking thread.
fn render(
    mut snapshot: AdminSnapshot,
    started: SystemTime,
    latencies: Latencies,
    requests: Vec<Reader>,
) {
    let latency = latencies.lock();
    let backends = snapshot.control.pools.iter().flat_map(|pool| &pool.backends);
    let states = backends.map(|backend| &backend.state);
    let warnings = ports::warnings(&snapshot.ports, snapshot.port_limits, states);
    snapshot.other_warnings.splice(0..0, warnings);
    let (mut status, mut metrics, mut observers) = (None, None, Vec::new());
    for request in requests {
        // Fails if the client has closed its connection.
        let _ = match request {
            Reader::Status(reply) => {
                let text = status.get_or_insert_with(|| admin::status::render(&snapshot, &latency));
                reply.send(text.clone())
            }
            Reader::Observed { reply, .. } => {
                observers.push(reply);
                continue;
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
    drop(latency);
    let observed = Observed { snapshot: Arc::new(snapshot), latencies };
    for reply in observers {
        // Fails if the client has closed its connection.
        let _ = reply.send(observed.clone());
    }
}

fn unix_time(wall: SystemTime) -> f64 {
    wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as f64 / 1e3
}
