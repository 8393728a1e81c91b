//! Bringing a balancer up, in order, and putting everything back when a step
//! fails.
//!
//! Runs on the control thread, which it then hands to the control loop.

use super::admin_api::AdminApi;
use super::admin_place;
use super::asked::Asked;
use super::binds::{Binds, NewBinds};
use super::builder::Builder;
use super::control_loop::Control;
use super::engine::choose_runtime;
use super::heartbeats::HeartbeatReceiver;
use super::logging::LogHandle;
use super::preflight::{access_log_refusal, token_problem, try_sources};
use super::refused::BindError;
use super::rendering::{Latencies, Rendering};
use super::shared_counts::SharedCounts;
use super::signals::Signals;
use super::supervised::{KeptSnapshot, KeptState};
use super::upgrade::{RareCounters, Starter, Upgrades};
use super::watchdog::Watchdog;
use super::{Failure, OldProcess, Options, ProcessEnvironment, RunEnd, RunningBalancer, panics};
use crate::admin::{self, AdminListener, AdminRequest, ReadyState, ReloadCounts, TokenStore};
use crate::maintenance::Maintenance;
use crate::probe::runner::ProbeRunner;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_config::{Loaded, Origin};
use tidegate_config::{Problems, Spot};
use tidegate_core::balance::count::COUNT_MAX;
use tidegate_core::balance::in_flight::{Counted, Counts};
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::{AccessLogTarget, Admin, BindKey, Config};
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::accept::wait_queue::SlotWaiters;
use tidegate_dataplane::access_log::{AccessLog, AccessLogDestination, AccessLogSender};
use tidegate_dataplane::worker::catch_panic::catch_panic;
use tidegate_dataplane::worker::context::{ProcessContext, ReportQueue};
use tidegate_dataplane::worker::{EngineKind, Worker, WorkerCommand, WorkerConfig};
use tidegate_net::budget::MemoryBudget;
use tidegate_net::clock;
use tidegate_net::{cpu, limits};
use tidegate_supervisor::pid_file::PidFile;
use tokio::sync::mpsc;

/// Probe results that may wait for the control loop.
const PROBE_RESULTS_MAX: usize = 1024;

/// Descriptors kept for everything but sessions: standard streams, log files,
/// epoll sets, rings, admin connections, probes.
const DESCRIPTORS_RESERVED: u64 = 256;

/// A session's: client and backend.
const DESCRIPTORS_A_SESSION: u64 = 2;

/// How long a new process waits for an address that the one before has just given
/// up, and is still closing.
const GIVEN_UP_MAX: Duration = Duration::from_secs(1);
const GIVEN_UP_STEP: Duration = Duration::from_millis(20);

pub(super) fn start(
    options: Options,
    surroundings: ProcessEnvironment,
) -> Result<RunningBalancer, Failure> {
    let (requests, inbox) = mpsc::channel(admin::REQUESTS_MAX);
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let to_control = requests.clone();
    let thread = std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control_thread(&options, surroundings, to_control, inbox, &ready))
        .map_err(|error| Failure::Runtime(format!("cannot start a thread: {error}")))?;
    match started.recv() {
        Ok(Ok(())) => Ok(RunningBalancer { requests, thread }),
        Ok(Err(failure)) => {
            let _ = thread.join();
            Err(failure)
        }
        Err(_) => Err(Failure::Runtime("the control thread died while it started".to_owned())),
    }
}

fn control_thread(
    options: &Options,
    surroundings: ProcessEnvironment,
    requests: mpsc::Sender<AdminRequest>,
    inbox: mpsc::Receiver<AdminRequest>,
    ready: &std::sync::mpsc::SyncSender<Result<(), Failure>>,
) -> RunEnd {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::Runtime(format!("cannot start a runtime: {error}"));
            let _ = ready.send(Err(failure));
            return RunEnd::Drained { cut: 0 };
        }
    };
    runtime.block_on(async {
        match bring_up(options, surroundings, requests).await {
            Ok(control) => {
                let _ = ready.send(Ok(()));
                // What it owned is given up, in order, after the panic.
                Box::pin(catch_panic(control.run(inbox))).await.unwrap_or_else(|_| {
                    tracing::error!("the control thread panicked: the process ends");
                    RunEnd::ControlPanicked
                })
            }
            Err(failure) => {
                let _ = ready.send(Err(failure));
                RunEnd::Drained { cut: 0 }
            }
        }
    })
}

/// Everything up to the first accepted connection. Must be called within the
/// control thread's runtime.
async fn bring_up(
    options: &Options,
    mut surroundings: ProcessEnvironment,
    requests: mpsc::Sender<AdminRequest>,
) -> Result<Control, Failure> {
    let Loaded { config, text, digest, warnings, origin } =
        surroundings.supervised.in_force.load(&options.config)?;
    surroundings.confined.check(&config)?;
    let log = match options.logging {
        true => {
            panics::install();
            LogHandle::install(&config.log)
        }
        false => LogHandle::none(),
    };
    for warning in &warnings {
        tracing::warn!("{}:{}:{}: {}", warning.file, warning.line, warning.column, warning.message);
    }
    // Before anybody can be told that this process serves.
    let signals = if options.signals { Signals::obey()? } else { Signals::default() };
    let (mut kept, known) = surroundings.supervised.begin().map_err(Failure::Runtime)?;
    let (runtime, engine_reason) = choose_runtime(config.process.engine);
    let cpus = cpu::available();
    let count = config.process.workers.unwrap_or_else(|| auto_workers(cpus.len()));
    let descriptors = limits::raise_descriptor_limit();

    let (access_log, senders) = AccessLog::start(access_target(&config.log.access), count)
        .map_err(|error| origin.error(&Spot::AccessLog, access_log_refusal(&error), None))
        .map_err(|problem| Failure::Config(Problems::from(problem)))?;
    let token = surroundings.supervised.in_force.load_token(&config);
    let token = token.map_err(|why| token_problem(&origin, why));
    let token = token.map_err(|problem| Failure::Config(Problems::from(*problem)))?;
    surroundings.supervised.in_force.started_with(&options.config, text, &config);
    let heartbeats = kept.take_heartbeats();
    let Listeners { admin, admin_taken, binds, fresh, not_taken } =
        listeners(&config, &origin, count, &mut surroundings, kept)?;
    let mut reception = HeartbeatReceiver::default();
    reception.inherit(match &mut surroundings.predecessor {
        Some(before) => before.take_heartbeats(),
        None => heartbeats,
    });
    try_sources(&config)
        .map_err(|(at, why)| Failure::At(Box::new(origin.error(&Spot::Source(at), why, None))))?;
    let heartbeats = reception.prepare(&config).map_err(Failure::Runtime)?;
    reception.adopt(heartbeats);

    let seed = fastrand::u64(..);
    let before = surroundings.predecessor.as_mut().and_then(OldProcess::take_counts);
    let counts = Arc::new(SharedCounts::new(before));
    let mut controller = Controller::new(count, seed).counting(Arc::clone(&counts) as _);
    if let Some(before) = &surroundings.predecessor {
        let generation = before.generation_of(digest);
        controller.add_carried_counts(generation.saturating_sub(1), before.state().serial);
    } else if let Some(KeptSnapshot { digest: before, state }) = &known {
        let generation = state.generation.saturating_add(u64::from(*before != digest));
        controller.add_carried_counts(generation.saturating_sub(1), state.serial);
    }
    let tables = TablePublisher::new(controller.current_table());
    let shared = ProcessContext {
        in_flight: Arc::new(counts.count(Counted::Process)),
        sessions: Arc::default(),
        waiters: Arc::new(SlotWaiters::new()),
        numbers: Arc::default(),
        reports: Arc::new(ReportQueue::new()),
        ended: Arc::default(),
        buffers: Arc::new(MemoryBudget::new(config.process.buffers_max)),
    };
    let counters: Vec<Arc<WorkerCounters>> =
        (0..count).map(|_| Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))).collect();
    let local = Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
    let workers = start_workers(Workers {
        config: &config,
        runtime,
        cpus: &cpus,
        shared: &shared,
        tables: &tables,
        counters: &counters,
        senders,
        seed,
    })?;

    let (probe_results, probed) = mpsc::channel(PROBE_RESULTS_MAX);
    let tokens = Arc::new(TokenStore::new(token));
    let config = Arc::new(config);
    let mut session_cap = SessionCap::new(descriptors);
    let in_force = session_cap.apply(&config, 0);
    let effects = controller.apply(ControlEvent::Configure(in_force), clock::now());
    let starter = Starter::of(surroundings.supervised.link(), surroundings.program.take());
    let mut control = Control {
        path: options.config.clone(),
        signals,
        digest,
        started_with: Arc::clone(&config),
        config: Arc::clone(&config),
        started: clock::now(),
        started_wall: clock::wall(),
        controller,
        counts,
        tables,
        builder: Builder::new(),
        workers,
        counters,
        binds: Binds::new(count),
        shared,
        probes: ProbeRunner::counting(probe_results, Arc::clone(&local)),
        probed,
        reception,
        latency: Latencies::default(),
        rendering: Rendering::default(),
        access_log: Some(access_log),
        log,
        readiness: ReadyState::new(),
        tokens,
        runtime,
        engine_reason,
        reloads: ReloadCounts::default(),
        watcher: None,
        asked: Asked::default(),
        transitions: Default::default(),
        restart_needed: Vec::new(),
        session_cap,
        draining: None,
        leaving: None,
        upgrades: Upgrades::new(starter),
        notifier: std::mem::take(&mut surroundings.notifier),
        supervised: std::mem::take(&mut surroundings.supervised),
        watchdog: Watchdog::new(count, clock::now()),
        confined: std::mem::take(&mut surroundings.confined),
        admin: None,
        pid_file: None,
        local,
        upkeep: Maintenance::new(clock::now()),
        rarities_before: RareCounters::default(),
    };
    control.apply_effects(effects);
    if let Some(KeptSnapshot { state, .. }) = &known {
        let effects = control.controller.adopt(state, clock::now());
        control.apply_effects(effects);
    }
    control.signals.let_through();
    let opening = PendingListeners { admin, admin_taken, fresh, not_taken, requests, origin };
    let predecessor = surroundings.predecessor.take();
    match control.open(opening, binds, &surroundings.pid_file, predecessor).await {
        Ok(()) => Ok(control),
        Err(failure) => {
            for worker in control.workers {
                worker.mailbox.send(WorkerCommand::Stop);
                worker.join();
            }
            Err(failure)
        }
    }
}

/// Everything clients and operators connect to, and what was not wanted of it.
struct Listeners {
    admin: AdminListener,
    /// It is the one of the process before.
    admin_taken: bool,
    binds: Binds,
    /// Nobody gets in yet.
    fresh: NewBinds,
    /// Of the process before.
    not_taken: Vec<BindKey>,
}

/// Takes what this process was given, and binds the rest.
fn listeners(
    config: &Config,
    origin: &Origin,
    workers: usize,
    surroundings: &mut ProcessEnvironment,
    mut kept: KeptState,
) -> Result<Listeners, Failure> {
    let mut binds = Binds::new(workers);
    let mut passed = surroundings.activated.take().or_else(|| kept.activated.take());
    let mut admin = passed.as_mut().and_then(|passed| passed.take_admin(config));
    let settled = match &admin {
        Some(_) => config.admin.clone(),
        None => admin_settled(config, surroundings)?,
    };
    if let Some(before) = &mut surroundings.predecessor {
        binds.inherit(before.take_sockets());
        admin = before.take_admin(&settled);
    } else if let Some(activated) = passed {
        binds.inherit(activated.take_sockets(config)?);
    } else {
        admin = kept.take_admin(&settled);
        binds.inherit(kept.take_binds());
    }
    let admin_taken = admin.is_some();
    let admin = match admin {
        Some(admin) => admin,
        None => admin::bind(&settled).map_err(|error| {
            Failure::At(Box::new(origin.error(&Spot::AdminListen, error.to_string(), None)))
        })?,
    };
    let known = &surroundings.confined.in_the_way;
    let at =
        |refused: BindError| Failure::At(Box::new(refused.with(known).problem(config, origin)));
    let before = surroundings.predecessor.as_ref();
    let mut fresh = reserve(&mut binds, config, before).map_err(at)?;
    if before.is_none() {
        fresh.start().map_err(at)?;
    }
    let not_taken = binds.release(&fresh);
    Ok(Listeners { admin, admin_taken, binds, fresh, not_taken })
}

/// Where the admin API listens; a line in the log if that is not the usual place.
fn admin_settled(config: &Config, surroundings: &mut ProcessEnvironment) -> Result<Admin, Failure> {
    let before = surroundings.predecessor.as_ref().and_then(OldProcess::admin_listen);
    let place = match surroundings.confined.admin.take() {
        Some(place) => place,
        None => admin_place::settle(&config.admin, before)?,
    };
    if let Some(reason) = &place.reason {
        tracing::info!(address = %place.listen, %reason, "admin API listens in this user's own directory");
    }
    Ok(Admin { listen: place.listen, ..config.admin.clone() })
}

/// Binds what is new. The process before may be about to close an address.
fn reserve(
    binds: &mut Binds,
    config: &Config,
    before: Option<&OldProcess>,
) -> Result<NewBinds, BindError> {
    let deadline = clock::now() + GIVEN_UP_MAX;
    loop {
        match binds.reserve_new(config) {
            Ok(fresh) => return Ok(fresh),
            Err(refused) if before.is_none() || clock::now() > deadline => return Err(refused),
            Err(_) => clock::pause(GIVEN_UP_STEP),
        }
    }
}

/// What is left to be opened once everything is built.
struct PendingListeners {
    admin: AdminListener,
    admin_taken: bool,
    fresh: NewBinds,
    not_taken: Vec<BindKey>,
    requests: mpsc::Sender<AdminRequest>,
    origin: Origin,
}

impl Control {
    /// Takes the place of the process before, if there is one, and lets clients
    /// and operators in.
    async fn open(
        &mut self,
        opening: PendingListeners,
        binds: Binds,
        pid_file: &Option<PathBuf>,
        predecessor: Option<OldProcess>,
    ) -> Result<(), Failure> {
        let PendingListeners { admin, admin_taken, mut fresh, not_taken, requests, origin } =
            opening;
        if let Some(before) = &predecessor {
            let effects = self.controller.adopt(before.state(), clock::now());
            self.apply_effects(effects);
            self.exchange_hello(before.state()).await;
            let generation = self.controller.generation();
            let shares = self.counts.are_taken();
            let known = before.ready(not_taken, admin_taken, generation, shares)?;
            self.take_over(&known);
            let at = |refused: BindError| refused.problem(&self.config, &origin);
            fresh.start().map_err(|refused| Failure::At(Box::new(at(refused))))?;
        }
        let (tokens, readiness) = (Arc::clone(&self.tokens), self.readiness.clone());
        let listen = admin.address().to_string();
        let api =
            AdminApi::serve(admin, listen, tokens, requests, readiness, Arc::clone(&self.local))
                .map_err(|error| {
                    Failure::Runtime(format!("cannot serve the admin API: {error}"))
                })?;
        if let Some(before) = predecessor {
            // Nothing can fail from here on: the process before stops accepting.
            let draining = before.serving()?;
            self.follow(draining);
        }
        api.own_file();
        if let Ok((offered, socket)) = api.offer() {
            self.supervised.hold_admin(offered, &socket);
        }
        self.admin = Some(api);
        let config = Arc::clone(&self.config);
        self.binds = binds;
        self.binds.adopt(fresh, &config, &self.workers, &self.supervised);
        self.hold_heartbeats();
        self.supervised.write_intents(&self.controller);
        self.supervised.in_force.write();
        announce(self, &config, self.workers.len());
        self.pid_file = pid_file.clone().map(|path| PidFile::at(path, false));
        self.write_pid_file();
        self.readiness.set_ready();
        self.notifier.ready();
        Ok(())
    }
}

struct Workers<'a> {
    config: &'a Config,
    runtime: EngineKind,
    cpus: &'a [usize],
    shared: &'a ProcessContext,
    tables: &'a TablePublisher,
    counters: &'a [Arc<WorkerCounters>],
    senders: Vec<AccessLogSender>,
    seed: u64,
}

/// Starts every worker, or none.
fn start_workers(with: Workers<'_>) -> Result<Vec<Worker>, Failure> {
    let mut workers = Vec::with_capacity(with.counters.len());
    for (id, (access_log, counters)) in with.senders.into_iter().zip(with.counters).enumerate() {
        let plan = WorkerConfig {
            id,
            cpu: with.config.process.pin.then(|| with.cpus[id % with.cpus.len()]),
            runtime: with.runtime,
            spin: with.config.process.spin,
            shared: with.shared.clone(),
            tables: with.tables.clone(),
            counters: Arc::clone(counters),
            access_log,
            seed: with.seed.wrapping_add(id as u64 + 1),
        };
        match Worker::start(plan) {
            Ok(worker) => workers.push(worker),
            Err(error) => {
                for worker in workers {
                    worker.mailbox.send(WorkerCommand::Stop);
                    worker.join();
                }
                return Err(Failure::Runtime(format!("cannot start worker {id}: {error}")));
            }
        }
    }
    Ok(workers)
}

/// One worker per CPU, and no more than a quota of CPU time lets run at once.
fn auto_workers(cpus: usize) -> usize {
    match cpu::quota() {
        Some(quota) if quota < cpus => {
            tracing::info!(cpus, quota, "a CPU quota allows fewer workers than there are CPUs");
            quota
        }
        _ => cpus,
    }
}

/// Says what is up, once.
fn announce(control: &Control, config: &Config, workers: usize) {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        engine = control.runtime.name(),
        reason = %control.engine_reason,
        workers,
        "tidegate starts"
    );
    control.confined.log_summary();
    for address in config.heartbeat.iter().flat_map(|heartbeat| &heartbeat.listen) {
        tracing::info!(%address, "listening for heartbeats");
    }
    for frontend in &config.frontends {
        for bind in &frontend.binds {
            tracing::info!(frontend = %frontend.name, address = %bind.key, pool = %frontend.pool, "listening");
        }
    }
}

/// How many sessions the descriptor limit allows.
#[derive(Debug)]
pub(super) struct SessionCap {
    descriptors: u64,
    /// What was wanted and what was allowed when it was last said.
    said: Option<(u32, u32)>,
}

impl SessionCap {
    pub(super) fn new(descriptors: u64) -> SessionCap {
        SessionCap { descriptors, said: None }
    }

    /// `config` with a `connections_max` that cannot run out of descriptors;
    /// says so where that lowers it to another figure than before.
    pub(super) fn apply(&mut self, config: &Arc<Config>, listeners: usize) -> Arc<Config> {
        let own = DESCRIPTORS_RESERVED + listeners as u64;
        let allowed = self.descriptors.saturating_sub(own) / DESCRIPTORS_A_SESSION;
        let allowed = u32::try_from(allowed.max(1)).unwrap_or(u32::MAX).min(COUNT_MAX);
        if config.process.connections_max <= allowed {
            self.said = None;
            return Arc::clone(config);
        }
        if self.is_news(config.process.connections_max, allowed) {
            tracing::warn!(
                connections_max = config.process.connections_max,
                in_force = allowed,
                descriptors = self.descriptors,
                "the limit on open descriptors allows fewer sessions; raise LimitNOFILE or ulimit -n"
            );
        }
        let mut lowered = Config::clone(config);
        lowered.process.connections_max = allowed;
        Arc::new(lowered)
    }

    fn is_news(&mut self, wanted: u32, allowed: u32) -> bool {
        self.said.replace((wanted, allowed)) != Some((wanted, allowed))
    }
}

/// The access log's target in its own terms.
pub(super) fn access_target(target: &AccessLogTarget) -> AccessLogDestination {
    match target {
        AccessLogTarget::Off => AccessLogDestination::Off,
        AccessLogTarget::Stdout => AccessLogDestination::Stdout,
        AccessLogTarget::File(path) => AccessLogDestination::File(path.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_on_descriptors_is_said_once_for_each_figure() {
        let mut cap = SessionCap::new(1024);
        assert!(cap.is_news(5000, 384));
        assert!(!cap.is_news(5000, 384), "every reload would say it again");
        assert!(cap.is_news(5000, 380) && cap.is_news(6000, 380));
    }
}
