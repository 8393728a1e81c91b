//! The control thread's loop: takes events from every side, feeds the
//! controller, performs its effects, answers the admin API.
//!
//! Entered by `start`. It may block or fall behind without a session noticing:
//! the last published table stays.

use super::Exit;
use super::admin_api::AdminApi;
use super::asked::Asked;
use super::binds::Binds;
use super::builder::Builder;
use super::drain::{Draining, Leaving};
use super::heartbeats::Reception;
use super::logging::LogHandle;
use super::notify::Notifier;
use super::rendering::{Latencies, Reader, Rendering};
use super::shared_counts::SharedCounts;
use super::signals::{Caught, Signals};
use super::start::SessionCap;
use super::supervised::Supervised;
use super::transition_log::TransitionLog;
use super::upgrade::{Rarities, UpgradeEvent, Upgrades};
use super::watchdog::{Finding, Watchdog};
use crate::admin::{self, Readiness, ReloadCounts, Request, TokenStore};
use crate::config_watch::ConfigWatcher;
use crate::maintenance::Upkeep;
use crate::probe::runner::ProbeRunner;
use crate::sandbox::Confined;
use crate::watchdog;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tidegate_core::control::{Controller, Effect, Event};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::Config;
use tidegate_core::outcome::Cause;
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::access_log::AccessLog;
#[cfg(debug_assertions)]
use tidegate_dataplane::fault_points::Fault;
use tidegate_dataplane::worker::context::{Report, Shared};
use tidegate_dataplane::worker::{Command, Runtime, Worker};
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
    pub(super) shared: Shared,
    pub(super) probes: ProbeRunner,
    pub(super) probed: mpsc::Receiver<Event>,
    pub(super) reception: Reception,
    pub(super) latency: Latencies,
    pub(super) rendering: Rendering,
    /// `None` only at the very end.
    pub(super) access_log: Option<AccessLog>,
    pub(super) log: LogHandle,
    pub(super) readiness: Readiness,
    pub(super) tokens: Arc<TokenStore>,
    pub(super) runtime: Runtime,
    pub(super) engine_reason: String,
    pub(super) reloads: ReloadCounts,
    /// `None` until the loop runs, or where the file cannot be watched.
    pub(super) watcher: Option<ConfigWatcher>,
    pub(super) asked: Asked,
    pub(super) restart_needed: Vec<String>,
    pub(super) session_cap: SessionCap,
    pub(super) transitions: TransitionLog,
    pub(super) draining: Option<Draining>,
    /// `None` once it drains.
    pub(super) leaving: Option<Leaving>,
    pub(super) upgrades: Upgrades,
    pub(super) notifier: Notifier,
    pub(super) supervised: Supervised,
    pub(super) watchdog: Watchdog,
    pub(super) confined: Confined,
    /// `None` only at the very start.
    pub(super) admin: Option<AdminApi>,
    pub(super) pid_file: Option<PidFile>,
    /// What this thread counts.
    pub(super) local: Arc<WorkerCounters>,
    pub(super) upkeep: Upkeep,
    /// Of the processes before.
    pub(super) rarities_before: Rarities,
}

/// What woke the loop.
enum Woken {
    Signal(Caught),
    Request(Request),
    FileComplete,
    /// A reload that was asked for has waited too long for the file.
    AskedTooLong,
    Reports,
    Heartbeats,
    Probed(Event),
    /// A pool's part of a table is made.
    Built(Event),
    Due,
    DrainStep,
    /// Given-up addresses may be ready to be closed.
    Retiring,
    Upgrade(UpgradeEvent),
    /// The service manager wants to hear of us.
    Beat,
    /// Do the workers' loops turn?
    Watch,
    /// Status or metrics are under way.
    Rendering,
    /// A worker has ended.
    WorkerEnded,
    /// Time to look after what was put off, and what runs out.
    Upkeep,
    /// The supervisor has something to say.
    News(News),
    /// Time to leave with it what is known.
    Snapshot,
}

impl Control {
    /// Runs until the process is to end.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Request>) -> Exit {
        let changed = Arc::new(Notify::new());
        self.watcher = self.watch_file(&changed);
        self.watch_named_files();
        if self.upgrades.awaits_predecessor() || self.supervised.in_force.awaits_the_file() {
            self.catch_up().await;
        }
        loop {
            match self.woken(&mut inbox, &changed).await {
                Woken::Signal(Caught::Stop(name)) if self.upgrades.excuses_signal() => {
                    tracing::info!(signal = name, "draining already; the next signal ends it");
                }
                Woken::Signal(Caught::Stop(_)) if self.draining.is_some() => {
                    tracing::warn!("second signal: exiting at once");
                    return Exit::Forced;
                }
                Woken::Signal(Caught::Stop(name)) => self.told_to_stop(name),
                Woken::Signal(Caught::Reload) => self.reload_by_signal().await,
                Woken::FileComplete => self.file_is_complete().await,
                Woken::AskedTooLong => self.refuse_asked(),
                Woken::Signal(Caught::Upgrade) => self.begin_upgrade(Wish::default(), None, None),
                Woken::Upgrade(event) => self.upgrade_event(event).await,
                Woken::Beat => self.beat(),
                Woken::Watch => self.watch(),
                Woken::Rendering => self.render_on(),
                Woken::Upkeep => self.upkeep().await,
                Woken::News(news) => self.hear(news).await,
                Woken::Snapshot => self.supervised.write(self.digest, &self.controller),
                Woken::Request(request) => self.answer(request).await,
                Woken::Reports => self.take_reports(),
                Woken::Probed(event) => self.take_probed(event),
                Woken::Built(event) => self.feed([event]),
                // Taken with every event; this turn is for them alone.
                Woken::Heartbeats | Woken::Due => {
                    self.feed([Event::Tick]);
                    self.transitions.catch_up(clock::now());
                }
                Woken::Retiring | Woken::WorkerEnded => {}
                Woken::DrainStep => {
                    if let Some(cut) = self.drain_step() {
                        return self.finish(cut).await;
                    }
                }
            }
            self.bound_latency();
            // After every event: the pause before `Retiring` begins anew with each,
            // and on a busy loop would never end.
            self.binds.forget_retired();
            if self.reception.is_dead() {
                tracing::error!("the thread that receives heartbeats has died");
                return Exit::WorkerDied;
            }
            if self.workers.iter().any(Worker::is_finished) {
                tracing::error!("a worker has ended: the process ends");
                if let Some(access_log) = self.access_log.take() {
                    access_log.close();
                }
                return Exit::WorkerDied;
            }
        }
    }

    async fn woken(&mut self, inbox: &mut mpsc::Receiver<Request>, changed: &Notify) -> Woken {
        let now = clock::now();
        let dues = [self.controller.next_due(), self.transitions.due()];
        let due = dues.into_iter().flatten().fold(now + FAR, Instant::min);
        let upkeep_due = self.upkeep.next();
        let snapshot_due = self.supervised.next_write(now);
        let beat_due = self.notifier.next_beat(now);
        let watch_due = self.watchdog.next_look();
        let asked_due = self.asked.due().unwrap_or(now + FAR);
        let leave_due = self.leaving.map(|leaving| leaving.until);
        let drain_due = self.draining.as_ref().map(Draining::next_look).or(leave_due);
        tokio::select! {
            caught = self.signals.next() => Woken::Signal(caught),
            Some(request) = inbox.recv() => Woken::Request(request),
            () = changed.notified() => Woken::FileComplete,
            () = tokio::time::sleep_until(asked_due.into()) => Woken::AskedTooLong,
            () = self.shared.reports.arrived() => Woken::Reports,
            () = self.reception.arrived() => Woken::Heartbeats,
            Some(event) = self.probed.recv() => Woken::Probed(event),
            event = self.builder.made() => Woken::Built(event),
            event = self.upgrades.next() => Woken::Upgrade(event),
            news = self.supervised.news() => Woken::News(news),
            () = tokio::time::sleep_until(snapshot_due.into()) => Woken::Snapshot,
            () = self.shared.ended.notified() => Woken::WorkerEnded,
            () = self.rendering.due() => Woken::Rendering,
            () = tokio::time::sleep_until(beat_due.into()) => Woken::Beat,
            () = tokio::time::sleep_until(watch_due.into()) => Woken::Watch,
            () = tokio::time::sleep_until(due.into()) => Woken::Due,
            () = tokio::time::sleep_until(upkeep_due.into()) => Woken::Upkeep,
            () = tokio::time::sleep(RETIRE_STEP), if self.binds.is_retiring() => Woken::Retiring,
            () = tokio::time::sleep_until(drain_due.unwrap_or(now + FAR).into()) => {
                Woken::DrainStep
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
    fn beat(&mut self) {
        let stalled = watchdog::longest_stall(&self.counters);
        self.notifier.beat(clock::now(), stalled);
    }

    /// Looks after the workers' loops.
    fn watch(&mut self) {
        let wake = |worker: usize| self.workers[worker].wake();
        let facts = watchdog::thread_facts;
        let findings = self.watchdog.look(clock::now(), &self.counters, wake, facts);
        for finding in findings {
            match finding {
                Finding::Stalled { worker, time, state } => {
                    let stage = self.counters[worker].pulse.stage().name();
                    let (cpu, thread) = (self.workers[worker].cpu(), watchdog::in_words(state));
                    tracing::warn!(worker, cpu, ?time, stage, thread, "worker is stalled");
                }
                Finding::Turns { worker, time } => {
                    tracing::warn!(worker, ?time, "worker turns again");
                }
            }
        }
        let stalled = |counters: &Arc<WorkerCounters>| counters.pulse.stalled_for().is_some();
        self.readiness.set_stalled(self.counters.iter().position(stalled));
    }

    /// Feeds events to the controller and performs what follows. Heartbeats
    /// that have arrived go along: what is due may be a silence they have ended.
    pub(super) fn feed(&mut self, events: impl IntoIterator<Item = Event>) {
        let mut all = self.reception.take();
        all.extend(events);
        let effects = self.controller.apply_all(all, clock::now());
        self.perform(effects);
    }

    /// Feeds a probe's result and all that came with it: one table for many.
    fn take_probed(&mut self, first: Event) {
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
            Report::ConnectFailed { backend, failure, in_a_row, begun } => {
                Event::ConnectFailed { backend, failure, in_a_row, begun }
            }
        });
        let events: Vec<Event> = events.collect();
        if tracing::enabled!(tracing::Level::DEBUG) {
            events.iter().for_each(|event| self.log_event(event));
        }
        self.feed(events);
    }

    /// One piece of evidence, for the log at `debug`.
    fn log_event(&self, event: &Event) {
        let name = |id| self.controller.name_of(id).unwrap_or_default();
        match event {
            Event::Probed { backend, outcome, .. } => {
                let (pool, backend) = name(*backend);
                tracing::debug!(%pool, %backend, result = %outcome, "probe ended");
            }
            Event::ConnectFailed { backend, failure, in_a_row, .. } => {
                let (pool, backend) = name(*backend);
                tracing::debug!(%pool, %backend, %failure, in_a_row, "session failed at backend");
            }
            _ => {}
        }
    }

    /// Carries the controller's effects out.
    pub(super) fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Publish(table) => {
                    let (generation, serial) = (table.generation, table.serial);
                    let serving = table.pools.iter().map(|pool| pool.serving.len()).sum::<usize>();
                    let pools = table.pools.len();
                    tracing::debug!(generation, serial, pools, serving, "table published");
                    self.tables.publish(table);
                    self.readiness.set_undecided(self.controller.undecided_pools());
                    self.supervised.changed();
                    // Who waits for a slot may have new backends to wait for.
                    self.shared.gate.opened();
                }
                // Another process probes; this one only ends its sessions.
                Effect::Probe { .. }
                    if self.upgrades.handed_over() && !self.upgrades.is_stepping_down() => {}
                Effect::Opened => self.shared.gate.opened(),
                Effect::Probe { lane, backend, token, address, spec } => {
                    tracing::trace!(%address, "probe begins");
                    self.probes.probe(lane, backend, token, address, spec);
                }
                Effect::Build { token, build } => self.builder.build(token, build),
                Effect::Log(transition) => {
                    self.supervised.changed();
                    self.transitions.log(&transition, clock::now());
                }
                Effect::Notice(notice) => {
                    if notice.pool.is_empty() {
                        tracing::warn!("{}", notice.message);
                    } else {
                        let backend = notice.backend.as_deref();
                        tracing::warn!(pool = %notice.pool, backend, "{}", notice.message);
                    }
                }
                Effect::CutSessions(backend) => {
                    for worker in &self.workers {
                        worker.mailbox.send(Command::CutBackend(backend, Cause::BackendRemoved));
                    }
                    self.order_cut(backend);
                }
            }
        }
    }

    async fn answer(&mut self, request: Request) {
        // A reply that finds nobody waiting any more is nobody's loss.
        match request {
            Request::Status(reply) => self.ask_for(Reader::Status(reply)),
            Request::Metrics(reply) => self.ask_for(Reader::Metrics(reply)),
            // What has come too late for this process is answered by its end: the
            // next one is to be asked.
            Request::Reload(_) | Request::SetIntent { .. } if self.upgrades.handed_over() => {}
            Request::Reload(reply) => self.ask_for_reload(Some(reply)).await,
            Request::Upgrade { binary, config, asked_over, reply } => {
                let wish = Wish { binary, config };
                self.begin_upgrade(wish, asked_over, Some(reply));
            }
            Request::Explain { pool, backend, reply } => {
                self.feed([]);
                let explained = self.controller.explain(&pool, &backend, clock::now());
                let rejected = self.reception.rejection(&pool, &backend);
                let render = |explained| admin::explain::render(&explained, rejected.as_ref());
                let _ = reply.send(explained.map(render));
            }
            Request::SetIntent { pool, backend, intent, reply } => {
                self.feed([]);
                let done = self.controller.set_intent(&pool, &backend, intent, clock::now());
                let sent = match done {
                    Ok(_) => self.order_intent(&pool, &backend, intent),
                    Err(_) => None,
                };
                let done = done.map(|effects| self.perform(effects));
                self.supervised.write_intents(&self.controller);
                self.answer_intent(sent, reply, done);
            }
            #[cfg(debug_assertions)]
            Request::Fault { place, worker, millis, reply } => {
                let _ = reply.send(self.order_fault(&place, worker, millis));
            }
            Request::Shutdown(reply) => {
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
            "stall" => Some(Command::Stall(Duration::from_millis(millis))),
            place => Fault::from_name(place).map(Command::Fault),
        };
        let (Some(command), Some(worker)) = (command, self.workers.get(worker)) else {
            return false;
        };
        worker.mailbox.send(command);
        true
    }

    /// What hardly ever happens, as often as it did in this process and those before.
    pub(super) fn rarities(&self) -> Rarities {
        let before = self.rarities_before;
        let crowded = self.admin.as_ref().map_or(0, AdminApi::crowded);
        let refused = self.shared.buffers.refused();
        Rarities {
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
