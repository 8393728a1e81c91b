//! The control thread's loop: takes events from every side, feeds the
//! controller, performs its effects, answers the admin API.
//!
//! Entered by `start`. It may block or fall behind without a session noticing:
//! the last published table stays.

use super::RunEnd;
use super::admin_api::AdminApi;
use super::asked::Asked;
use super::binds::Binds;
use super::builder::Builder;
use super::drain::{DrainState, Leaving};
use super::heartbeats::HeartbeatReceiver;
use super::logging::LogHandle;
use super::notify::Notifier;
use super::rendering::{Latencies, Reader, Rendering};
use super::shared_counts::SharedCounts;
use super::signals::{SignalKindReceived, Signals};
use super::start::SessionCap;
use super::supervised::Supervised;
use super::transition_log::TransitionLog;
use super::upgrade::{RareCounters, UpgradeEvent, Upgrades};
use super::watchdog::{Watchdog, WatchdogEvent};
use crate::admin::{self, AdminRequest, ReadyState, ReloadCounts, TokenStore};
use crate::config_watch::ConfigWatcher;
use crate::maintenance::Maintenance;
use crate::probe::runner::ProbeRunner;
use crate::sandbox::AppliedSandbox;
use crate::watchdog;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tidegate_core::control::{ControlEffect, ControlEvent, Controller};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::Config;
use tidegate_core::outcome::Cause;
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::access_log::AccessLog;
#[cfg(debug_assertions)]
use tidegate_dataplane::fault_points::FaultPoint;
use tidegate_dataplane::worker::context::{ProcessContext, WorkerReport};
use tidegate_dataplane::worker::{EngineKind, Worker, WorkerCommand};
use tidegate_net::clock;
use tidegate_supervisor::pid_file::PidFile;
use tidegate_supervisor::{News, Wish};
use tokio::sync::{Notify, mpsc};

/// How often given-up addresses are looked at until they are closed: before
/// that, new clients get no answer instead of a refusal.
const RETIRE_STEP: Duration = Duration::from_millis(20);

/// Sleeping without a due time.
const FAR: Duration = Duration::from_secs(3600);

/// Everything the control thread owns.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) path: PathBuf,
    pub(super) signals: Signals,
    pub(super) digest: u64,
    /// What cannot change without a restart is as it was in this one.
    pub(super) started_with: Arc<Config>,
    pub(super) config: Arc<Config>,
    pub(super) started: Instant,
    pub(super) started_wall: SystemTime,
    pub(super) controller: Controller,
    pub(super) counts: Arc<SharedCounts>,
    pub(super) tables: TablePublisher,
    pub(super) builder: Builder,
    pub(super) workers: Vec<Worker>,
    pub(super) counters: Vec<Arc<WorkerCounters>>,
    pub(super) binds: Binds,
    pub(super) shared: ProcessContext,
    pub(super) probes: ProbeRunner,
    pub(super) probed: mpsc::Receiver<ControlEvent>,
    pub(super) reception: HeartbeatReceiver,
    pub(super) latency: Latencies,
    pub(super) rendering: Rendering,
    /// `None` only at the very end.
    pub(super) access_log: Option<AccessLog>,
    pub(super) log: LogHandle,
    pub(super) readiness: ReadyState,
    pub(super) tokens: Arc<TokenStore>,
    pub(super) runtime: EngineKind,
    pub(super) engine_reason: String,
    pub(super) reloads: ReloadCounts,
    /// `None` until the loop runs, or where the file cannot be watched.
    pub(super) watcher: Option<ConfigWatcher>,
    pub(super) asked: Asked,
    pub(super) restart_needed: Vec<String>,
    pub(super) session_cap: SessionCap,
    pub(super) transitions: TransitionLog,
    pub(super) draining: Option<DrainState>,
    /// `None` once it drains.
    pub(super) leaving: Option<Leaving>,
    pub(super) upgrades: Upgrades,
    pub(super) notifier: Notifier,
    pub(super) supervised: Supervised,
    pub(super) watchdog: Watchdog,
    pub(super) confined: AppliedSandbox,
    /// `None` only at the very start.
    pub(super) admin: Option<AdminApi>,
    pub(super) pid_file: Option<PidFile>,
    /// What this thread counts.
    pub(super) local: Arc<WorkerCounters>,
    pub(super) upkeep: Maintenance,
    /// Of the processes before.
    pub(super) rarities_before: RareCounters,
}

/// What woke the loop.
enum LoopEvent {
    Signal(SignalKindReceived),
    Request(AdminRequest),
    FileComplete,
    /// A reload that was asked for has waited too long for the file.
    AskedTooLong,
    Reports,
    Heartbeats,
    Probed(ControlEvent),
    /// A pool's part of a table is made.
    Built(ControlEvent),
    Due,
    DrainStep,
    /// Given-up addresses may be ready to be closed.
    Retiring,
    Upgrade(UpgradeEvent),
    /// The service manager wants to hear of us.
    NotifyWatchdog,
    /// Do the workers' loops turn?
    CheckWorkers,
    /// Status or metrics are under way.
    Rendering,
    /// A worker has ended.
    WorkerExited,
    /// Time to look after what was put off, and what runs out.
    Maintenance,
    /// The supervisor has something to say.
    News(News),
    /// Time to leave with it what is known.
    Snapshot,
}

impl Control {
    /// Runs until the process is to end.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<AdminRequest>) -> RunEnd {
        let changed = Arc::new(Notify::new());
        self.watcher = self.watch_file(&changed);
        self.watch_named_files();
        if self.upgrades.awaits_old_process() || self.supervised.in_force.awaits_the_file() {
            self.catch_up().await;
        }
        loop {
            match self.next_event(&mut inbox, &changed).await {
                LoopEvent::Signal(SignalKindReceived::Stop(name))
                    if self.upgrades.ignores_first_stop_signal() =>
                {
                    tracing::info!(signal = name, "draining already; the next signal ends it");
                }
                LoopEvent::Signal(SignalKindReceived::Stop(_)) if self.draining.is_some() => {
                    tracing::warn!("second signal: exiting at once");
                    return RunEnd::SecondSignal;
                }
                LoopEvent::Signal(SignalKindReceived::Stop(name)) => self.told_to_stop(name),
                LoopEvent::Signal(SignalKindReceived::Reload) => self.reload_by_signal().await,
                LoopEvent::FileComplete => self.file_is_complete().await,
                LoopEvent::AskedTooLong => self.refuse_asked(),
                LoopEvent::Signal(SignalKindReceived::Upgrade) => {
                    self.begin_upgrade(Wish::default(), None, None)
                }
                LoopEvent::Upgrade(event) => self.upgrade_event(event).await,
                LoopEvent::NotifyWatchdog => self.notify_watchdog(),
                LoopEvent::CheckWorkers => self.check_workers(),
                LoopEvent::Rendering => self.render_on(),
                LoopEvent::Maintenance => self.upkeep().await,
                LoopEvent::News(news) => self.hear(news).await,
                LoopEvent::Snapshot => self.supervised.write(self.digest, &self.controller),
                LoopEvent::Request(request) => self.answer(request).await,
                LoopEvent::Reports => self.take_reports(),
                LoopEvent::Probed(event) => self.take_probed(event),
                LoopEvent::Built(event) => self.feed([event]),
                // Taken with every event; this turn is for them alone.
                LoopEvent::Heartbeats | LoopEvent::Due => {
                    self.feed([ControlEvent::Tick]);
                    self.transitions.log_suppressed(clock::now());
                }
                LoopEvent::Retiring | LoopEvent::WorkerExited => {}
                LoopEvent::DrainStep => {
                    if let Some(cut) = self.drain_step() {
                        return self.finish(cut).await;
                    }
                }
            }
            self.bound_latency();
            // After every event: the pause before `Retiring` begins anew with each,
            // and on a busy loop would never end.
            self.binds.forget_retired();
            if self.reception.has_exited() {
                tracing::error!("the thread that receives heartbeats has died");
                return RunEnd::ThreadExited;
            }
            if self.workers.iter().any(Worker::is_finished) {
                tracing::error!("a worker has ended: the process ends");
                if let Some(access_log) = self.access_log.take() {
                    access_log.close();
                }
                return RunEnd::ThreadExited;
            }
        }
    }

    async fn next_event(
        &mut self,
        inbox: &mut mpsc::Receiver<AdminRequest>,
        changed: &Notify,
    ) -> LoopEvent {
        let now = clock::now();
        let dues = [self.controller.next_due(), self.transitions.due()];
        let due = dues.into_iter().flatten().fold(now + FAR, Instant::min);
        let upkeep_due = self.upkeep.next();
        let snapshot_due = self.supervised.next_write(now);
        let beat_due = self.notifier.next_beat(now);
        let watch_due = self.watchdog.next_look();
        let asked_due = self.asked.due().unwrap_or(now + FAR);
        let leave_due = self.leaving.map(|leaving| leaving.until);
        let drain_due = self.draining.as_ref().map(DrainState::next_look).or(leave_due);
        tokio::select! {
            caught = self.signals.next() => LoopEvent::Signal(caught),
            Some(request) = inbox.recv() => LoopEvent::Request(request),
            () = changed.notified() => LoopEvent::FileComplete,
            () = tokio::time::sleep_until(asked_due.into()) => LoopEvent::AskedTooLong,
            () = self.shared.reports.arrived() => LoopEvent::Reports,
            () = self.reception.arrived() => LoopEvent::Heartbeats,
            Some(event) = self.probed.recv() => LoopEvent::Probed(event),
            event = self.builder.made() => LoopEvent::Built(event),
            event = self.upgrades.next() => LoopEvent::Upgrade(event),
            news = self.supervised.news() => LoopEvent::News(news),
            () = tokio::time::sleep_until(snapshot_due.into()) => LoopEvent::Snapshot,
            () = self.shared.ended.notified() => LoopEvent::WorkerExited,
            () = self.rendering.due() => LoopEvent::Rendering,
            () = tokio::time::sleep_until(beat_due.into()) => LoopEvent::NotifyWatchdog,
            () = tokio::time::sleep_until(watch_due.into()) => LoopEvent::CheckWorkers,
            () = tokio::time::sleep_until(due.into()) => LoopEvent::Due,
            () = tokio::time::sleep_until(upkeep_due.into()) => LoopEvent::Maintenance,
            () = tokio::time::sleep(RETIRE_STEP), if self.binds.is_retiring() => LoopEvent::Retiring,
            () = tokio::time::sleep_until(drain_due.unwrap_or(now + FAR).into()) => {
                LoopEvent::DrainStep
            }
        }
    }

    async fn hear(&mut self, news: News) {
        match news {
            News::GoOn(status) => self.go_on(status).await,
            News::Alone => {
                tracing::error!("the supervisor has died: this process drains and ends");
                self.begin_drain("no supervisor");
            }
        }
    }

    /// Tells the service manager that all is well: not while a worker has been
    /// stalled for as long as the manager would wait for us.
    fn notify_watchdog(&mut self) {
        let stalled = watchdog::longest_stall(&self.counters);
        self.notifier.beat(clock::now(), stalled);
    }

    /// Looks after the workers' loops.
    fn check_workers(&mut self) {
        let wake = |worker: usize| self.workers[worker].wake();
        let facts = watchdog::thread_facts;
        let findings = self.watchdog.look(clock::now(), &self.counters, wake, facts);
        for finding in findings {
            match finding {
                WatchdogEvent::Stalled { worker, time, state } => {
                    let stage = self.counters[worker].pulse.stage().name();
                    let (cpu, thread) =
                        (self.workers[worker].cpu(), watchdog::thread_state_name(state));
                    tracing::warn!(worker, cpu, ?time, stage, thread, "worker is stalled");
                }
                WatchdogEvent::Responsive { worker, time } => {
                    tracing::warn!(worker, ?time, "worker turns again");
                }
            }
        }
        let stalled = |counters: &Arc<WorkerCounters>| counters.pulse.stalled_for().is_some();
        self.readiness.set_stalled(self.counters.iter().position(stalled));
    }

    /// Feeds events to the controller and performs what follows. Heartbeats
    /// that have arrived go along: what is due may be a silence they have ended.
    pub(super) fn feed(&mut self, events: impl IntoIterator<Item = ControlEvent>) {
        let mut all = self.reception.take();
        all.extend(events);
        let effects = self.controller.apply_all(all, clock::now());
        self.apply_effects(effects);
    }

    /// Feeds a probe's result and all that came with it: one table for many.
    fn take_probed(&mut self, first: ControlEvent) {
        let mut events = vec![first];
        while let Ok(event) = self.probed.try_recv() {
            events.push(event);
        }
        if tracing::enabled!(tracing::Level::DEBUG) {
            events.iter().for_each(|event| self.log_event(event));
        }
        self.feed(events);
    }

    fn take_reports(&mut self) {
        let reports = Arc::clone(&self.shared.reports);
        let events = std::iter::from_fn(|| reports.pop()).map(|report| match report {
            WorkerReport::ConnectFailed { backend, failure, in_a_row, begun } => {
                ControlEvent::ConnectFailed { backend, failure, in_a_row, begun }
            }
        });
        let events: Vec<ControlEvent> = events.collect();
        if tracing::enabled!(tracing::Level::DEBUG) {
            events.iter().for_each(|event| self.log_event(event));
        }
        self.feed(events);
    }

    /// One piece of evidence, for the log at `debug`.
    fn log_event(&self, event: &ControlEvent) {
        let name = |id| self.controller.name_of(id).unwrap_or_default();
        match event {
            ControlEvent::Probed { backend, outcome, .. } => {
                let (pool, backend) = name(*backend);
                tracing::debug!(%pool, %backend, result = %outcome, "probe ended");
            }
            ControlEvent::ConnectFailed { backend, failure, in_a_row, .. } => {
                let (pool, backend) = name(*backend);
                tracing::debug!(%pool, %backend, %failure, in_a_row, "session failed at backend");
            }
            _ => {}
        }
    }

    /// Carries the controller's effects out.
    pub(super) fn apply_effects(&mut self, effects: Vec<ControlEffect>) {
        for effect in effects {
            match effect {
                ControlEffect::Publish(table) => {
                    let (generation, serial) = (table.generation, table.serial);
                    let serving = table.pools.iter().map(|pool| pool.serving.len()).sum::<usize>();
                    let pools = table.pools.len();
                    tracing::debug!(generation, serial, pools, serving, "table published");
                    self.tables.publish(table);
                    self.readiness.set_undecided(self.controller.undecided_pools());
                    self.supervised.changed();
                    // Who waits for a slot may have new backends to wait for.
                    self.shared.waiters.slot_freed();
                }
                // Another process probes; this one only ends its sessions.
                ControlEffect::Probe { .. }
                    if self.upgrades.handed_over() && !self.upgrades.is_stepping_down() => {}
                ControlEffect::SlotsFreed => self.shared.waiters.slot_freed(),
                ControlEffect::Probe { lane, backend, token, address, spec } => {
                    tracing::trace!(%address, "probe begins");
                    self.probes.probe(lane, backend, token, address, spec);
                }
                ControlEffect::Build { token, build } => self.builder.build(token, build),
                ControlEffect::Log(transition) => {
                    self.supervised.changed();
                    self.transitions.log(&transition, clock::now());
                }
                ControlEffect::Notice(notice) => {
                    if notice.pool.is_empty() {
                        tracing::warn!("{}", notice.message);
                    } else {
                        let backend = notice.backend.as_deref();
                        tracing::warn!(pool = %notice.pool, backend, "{}", notice.message);
                    }
                }
                ControlEffect::ResetSessions(backend) => {
                    for worker in &self.workers {
                        worker
                            .mailbox
                            .send(WorkerCommand::ResetBackend(backend, Cause::BackendRemoved));
                    }
                    self.order_cut(backend);
                }
            }
        }
    }

    async fn answer(&mut self, request: AdminRequest) {
        // A reply that finds nobody waiting any more is nobody's loss.
        match request {
            AdminRequest::Status(reply) => self.ask_for(Reader::Status(reply)),
            AdminRequest::Metrics(reply) => self.ask_for(Reader::Metrics(reply)),
            // What has come too late for this process is answered by its end: the
            // next one is to be asked.
            AdminRequest::Reload(_) | AdminRequest::SetIntent { .. }
                if self.upgrades.handed_over() => {}
            AdminRequest::Reload(reply) => self.ask_for_reload(Some(reply)).await,
            AdminRequest::Upgrade { binary, config, asked_over, reply } => {
                let wish = Wish { binary, config };
                self.begin_upgrade(wish, asked_over, Some(reply));
            }
            AdminRequest::Explain { pool, backend, reply } => {
                self.feed([]);
                let explained = self.controller.explain(&pool, &backend, clock::now());
                let rejected = self.reception.rejection(&pool, &backend);
                let render = |explained| admin::explain::render(&explained, rejected.as_ref());
                let _ = reply.send(explained.map(render));
            }
            AdminRequest::SetIntent { pool, backend, intent, reply } => {
                self.feed([]);
                let done = self.controller.set_intent(&pool, &backend, intent, clock::now());
                let sent = match done {
                    Ok(_) => self.order_intent(&pool, &backend, intent),
                    Err(_) => None,
                };
                let done = done.map(|effects| self.apply_effects(effects));
                self.supervised.write_intents(&self.controller);
                self.answer_intent(sent, reply, done);
            }
            #[cfg(debug_assertions)]
            AdminRequest::Fault { place, worker, millis, reply } => {
                let _ = reply.send(self.order_fault(&place, worker, millis));
            }
            AdminRequest::Shutdown(reply) => {
                self.leave("admin request");
                let _ = reply.send(());
            }
        }
    }

    /// Has something go wrong; for tests. False where there is no such thing.
    #[cfg(debug_assertions)]
    fn order_fault(&self, place: &str, worker: usize, millis: u64) -> bool {
        let command = match place {
            "control" => panic!("a fault that was ordered: control"),
            "stall" => Some(WorkerCommand::Stall(Duration::from_millis(millis))),
            place => FaultPoint::from_name(place).map(WorkerCommand::Fault),
        };
        let (Some(command), Some(worker)) = (command, self.workers.get(worker)) else {
            return false;
        };
        worker.mailbox.send(command);
        true
    }

    /// What hardly ever happens, as often as it did in this process and those before.
    pub(super) fn rare_counters(&self) -> RareCounters {
        let before = self.rarities_before;
        let crowded = self.admin.as_ref().map_or(0, AdminApi::crowded);
        let refused = self.shared.buffers.refused();
        RareCounters {
            log_dropped: before.log_dropped.saturating_add(self.log.dropped()),
            unlogged: before.unlogged.saturating_add(self.transitions.unlogged()),
            admin_crowded: before.admin_crowded.saturating_add(crowded),
            buffers_refused: before.buffers_refused.saturating_add(refused),
        }
    }

    /// Waits for writers of the files that the configuration names, too.
    pub(super) fn watch_named_files(&self) {
        if let Some(watcher) = &self.watcher {
            watcher.wait_for_writers_of(self.config.named_files());
        }
    }

    fn watch_file(&self, changed: &Arc<Notify>) -> Option<ConfigWatcher> {
        let notify = Arc::clone(changed);
        match ConfigWatcher::start(&self.path, move || notify.notify_one()) {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "the configuration file is not watched; use SIGHUP");
                None
            }
        }
    }
}
