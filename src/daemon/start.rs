//! Starts a balancer. If a step fails, everything opened so far is closed.
//!
//! Runs on the control thread and then enters the control loop. Each step returns a
//! value that the next step needs, so the compiler checks the order.

use super::admin_api::{AdminApi, AdminEndpoint};
use super::binds::Binds;
use super::cap_watch::CapWatch;
use super::config_reloads::ConfigReloads;
use super::control_loop::Control;
use super::engine::choose_runtime;
use super::event_log::{EventLog, NewEvent};
use super::evidence::Evidence;
use super::lifecycle::Lifecycle;
use super::listeners::Listeners;
use super::logging::LogHandle;
use super::member_sources::MemberSources;
use super::planes::{Plane, Planes};
use super::preflight::{access_log_refusal, token_problem};
use super::refused::BindError;
use super::shared_counts::SharedCounts;
use super::signals::Signals;
use super::state_directory::{self, StateDirectory};
use super::supervised::KeptSnapshot;
use super::telemetry::Telemetry;
use super::upgrade::{Starter, Upgrades};
use super::worker_set::{WorkerPlan, WorkerSet, access_log_destination};
use super::{
    Failure, OldProcess, Options, ProcessEnvironment, RunEnd, RunningBalancer, panics, reload,
};
use crate::admin::{self, AdminListener, AdminRequest, Observables, Tokens};
use crate::probe_helper::ProbeHelper;
use std::path::Path;
use std::sync::Arc;
use tidegate_api::names::EventLevelName;
use tidegate_config::{Loaded, Origin, Problems, Spot};
use tidegate_core::balance::in_flight::{Counted, Counts};
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_core::decision::rings::Decisions;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::Config;
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::accept::wait_queue::SlotWaiters;
use tidegate_dataplane::access_log::{AccessLog, AccessLogSender};
use tidegate_dataplane::worker::context::{ProcessContext, ReportQueue};
use tidegate_dataplane::worker::{EngineKind, catch_panic};
use tidegate_net::budget::MemoryBudget;
use tidegate_net::clock;
use tidegate_net::{cpu, limits};
use tokio::sync::mpsc;

pub(super) fn start(
    options: Options,
    environment: ProcessEnvironment,
) -> Result<RunningBalancer, Failure> {
    let (requests, inbox) = mpsc::channel(admin::REQUESTS_MAX);
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let to_control = requests.clone();
    let thread = std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control_thread(&options, environment, to_control, inbox, &ready))
        .map_err(|error| Failure::Runtime(format!("cannot start a thread: {error}")))?;
    match started.recv() {
        Ok(Ok(())) => Ok(RunningBalancer { requests, thread }),
        Ok(Err(failure)) => {
            let _ = thread.join();
            Err(failure)
        }
        Err(_) => Err(Failure::Runtime("control thread exited during startup".to_owned())),
    }
}

fn control_thread(
    options: &Options,
    environment: ProcessEnvironment,
    requests: mpsc::Sender<AdminRequest>,
    inbox: mpsc::Receiver<AdminRequest>,
    ready: &std::sync::mpsc::SyncSender<Result<(), Failure>>,
) -> RunEnd {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::Runtime(format!("cannot start the async runtime: {error}"));
            let _ = ready.send(Err(failure));
            return RunEnd::Drained { reset: 0 };
        }
    };
    runtime.block_on(async {
        match bring_up(options, environment, requests, inbox).await {
            Ok(control) => {
                let _ = ready.send(Ok(()));
                // `catch_panic` drops everything that the loop owned.
                Box::pin(catch_panic(control.run())).await.unwrap_or_else(|_| {
                    tracing::error!("control thread panicked; exiting");
                    RunEnd::ControlPanicked
                })
            }
            Err(failure) => {
                let _ = ready.send(Err(failure));
                RunEnd::Drained { reset: 0 }
            }
        }
    })
}

/// Runs all steps up to the first accepted connection. Must be called on the runtime of
/// the control thread.
async fn bring_up(
    options: &Options,
    mut environment: ProcessEnvironment,
    requests: mpsc::Sender<AdminRequest>,
    inbox: mpsc::Receiver<AdminRequest>,
) -> Result<Control, Failure> {
    let PreparedStart { mut control, listeners, origin, known } =
        prepare(options, &mut environment, inbox)?;
    control.configure(known.as_ref());
    if environment.old_process.is_none() {
        control.restore_intents();
        if known.is_none() {
            control.restore_views();
        }
    }
    control.lifecycle.unblock_signals();
    match control.open(listeners, requests, &origin, environment.old_process).await {
        Ok(()) => Ok(control),
        Err(failure) => {
            control.workers.abandon();
            Err(failure)
        }
    }
}

/// State after all resources are opened and the workers are started. The table is empty
/// and no client is accepted.
struct PreparedStart {
    control: Control,
    listeners: Listeners,
    origin: Origin,
    /// State of a crashed process.
    known: Option<KeptSnapshot>,
}

fn prepare(
    options: &Options,
    environment: &mut ProcessEnvironment,
    inbox: mpsc::Receiver<AdminRequest>,
) -> Result<PreparedStart, Failure> {
    let events = EventLog::new();
    let (Loaded { config, text, digest, origin, .. }, log) =
        read_configuration(options, environment, &events)?;
    // Before this process reports ready, so that a signal after that is handled.
    let signals = if options.signals { Signals::install()? } else { Signals::default() };
    let (kept, known) = environment.supervised.begin(&events).map_err(Failure::Runtime)?;
    let state = open_state(&config, &origin)?;
    let resources = Resources::take(&config, &origin, environment)?;
    environment.supervised.in_force.started_with(&options.config, text, &config);
    let mut listeners = Listeners::open(&config, &origin, resources.workers, environment, kept)?;

    let counts = shared_counts(environment);
    let controller = controller(&resources, digest, environment, known.as_ref(), &counts);
    let context = process_context(&config, resources.workers, &counts);
    let local = Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
    let heartbeats = std::mem::take(&mut listeners.heartbeats);
    let helper = environment.confined.take_helper();
    let helper = ProbeHelper::new(helper, Arc::clone(&local), events.clone());
    let reports = Arc::clone(&context.reports);
    let evidence = Evidence::new(heartbeats, reports, Arc::clone(&local), helper);
    let tables = TablePublisher::new(controller.current_table());
    let (waiters, descriptors) = (Arc::clone(&context.waiters), resources.descriptors);
    let (workers, tokens) = resources.start_workers(&config, context, &tables, events.clone())?;
    let observables = Observables { events, ..Observables::default() };
    let control = Control {
        controller,
        evidence,
        sources: MemberSources::default(),
        planes: Planes::new(vec![Plane::Proxy { tables, waiters }]),
        workers,
        binds: Binds::new(0),
        reloads: ConfigReloads::new(options.config.clone(), digest, Arc::new(config), descriptors),
        admin: AdminEndpoint::new(tokens, observables.clone(), inbox),
        telemetry: Telemetry::new(log, observables, local),
        caps: CapWatch::default(),
        upgrades: Upgrades::new(starter(environment), counts),
        lifecycle: Lifecycle::new(signals, environment),
        supervised: std::mem::take(&mut environment.supervised),
        state,
    };
    Ok(PreparedStart { control, listeners, origin, known })
}

fn starter(environment: &mut ProcessEnvironment) -> Option<Starter> {
    Starter::of(environment.supervised.link(), environment.program.take())
}

/// Reads the configuration and starts the log with its settings.
fn read_configuration(
    options: &Options,
    environment: &mut ProcessEnvironment,
    events: &EventLog,
) -> Result<(Loaded, LogHandle), Failure> {
    let loaded = environment.supervised.in_force.load(&options.config)?;
    environment.confined.check(&loaded.config)?;
    let log = match options.logging {
        true => {
            panics::install(events.clone());
            LogHandle::install(&loaded.config.log)
        }
        false => LogHandle::none(),
    };
    loaded.warnings.iter().for_each(reload::log_warning);
    Ok((loaded, log))
}

fn open_state(config: &Config, origin: &Origin) -> Result<StateDirectory, Failure> {
    let directory = config.process.state.as_deref();
    StateDirectory::open(directory).map_err(|error| {
        let why = state_directory::refusal(directory.unwrap_or(Path::new("")), &error);
        Failure::At(Box::new(origin.error(&Spot::State, why, None)))
    })
}

/// Resources of the workers, and the tokens of the admin API.
struct Resources {
    engine: (EngineKind, String),
    cpus: Vec<usize>,
    /// Number of workers.
    workers: usize,
    /// The file descriptor limit.
    descriptors: u64,
    access_log: AccessLog,
    senders: Vec<AccessLogSender>,
    tokens: Tokens,
    /// Seed of random numbers.
    seed: u64,
}

// === impl Resources ===

impl Resources {
    fn take(
        config: &Config,
        origin: &Origin,
        environment: &ProcessEnvironment,
    ) -> Result<Resources, Failure> {
        let cpus = cpu::available();
        let workers = config.process.workers.unwrap_or_else(|| auto_workers(cpus.len()));
        let descriptors = limits::raise_descriptor_limit();
        let target = access_log_destination(&config.log);
        let (access_log, senders) = AccessLog::start(target, workers)
            .map_err(|error| origin.error(&Spot::AccessLog, access_log_refusal(&error), None))
            .map_err(|problem| Failure::Config(Problems::from(problem)))?;
        let tokens = environment.supervised.in_force.load_tokens(config);
        let tokens = tokens
            .map_err(|refusal| token_problem(origin, refusal))
            .map_err(|problem| Failure::Config(Problems::from(*problem)))?;
        let engine = choose_runtime(config.process.engine);
        let seed = fastrand::u64(..);
        Ok(Resources { engine, cpus, workers, descriptors, access_log, senders, tokens, seed })
    }

    /// Starts the workers. Also returns the tokens, which the workers do not need.
    fn start_workers(
        self,
        config: &Config,
        context: ProcessContext,
        tables: &TablePublisher,
        events: EventLog,
    ) -> Result<(WorkerSet, Tokens), Failure> {
        let Resources { engine, cpus, workers, access_log, senders, tokens, seed, .. } = self;
        let counter = || Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
        let counters = (0..workers).map(|_| counter()).collect();
        let plan = WorkerPlan {
            config,
            engine,
            cpus: &cpus,
            context,
            tables,
            counters,
            access_log,
            senders,
            seed,
            events,
        };
        Ok((WorkerSet::start(plan)?, tokens))
    }
}

fn shared_counts(environment: &mut ProcessEnvironment) -> Arc<SharedCounts> {
    let before = environment.old_process.as_mut().and_then(OldProcess::take_counts);
    Arc::new(SharedCounts::new(before))
}

/// Creates a controller without a configuration. Its generations continue those of the
/// old or crashed process.
fn controller(
    resources: &Resources,
    digest: u64,
    environment: &ProcessEnvironment,
    known: Option<&KeptSnapshot>,
    counts: &Arc<SharedCounts>,
) -> Controller {
    let controller = Controller::new(resources.workers, resources.seed);
    let mut controller = controller.counting(Arc::clone(counts) as _);
    if let Some(before) = &environment.old_process {
        let generation = before.generation_of(digest);
        controller.add_carried_counts(generation.saturating_sub(1), before.state().serial);
    } else if let Some(KeptSnapshot { digest: before, state, .. }) = known {
        let generation = state.generation.saturating_add(u64::from(*before != digest));
        controller.add_carried_counts(generation.saturating_sub(1), state.serial);
    }
    controller
}

fn process_context(config: &Config, workers: usize, counts: &SharedCounts) -> ProcessContext {
    ProcessContext {
        in_flight: Arc::new(counts.count(Counted::Process)),
        sessions: Arc::default(),
        waiters: Arc::new(SlotWaiters::new()),
        numbers: Arc::default(),
        decisions: Arc::new(Decisions::new(workers)),
        reports: Arc::new(ReportQueue::new()),
        ended: Arc::default(),
        buffers: Arc::new(MemoryBudget::new(config.process.buffers_max)),
    }
}

impl Control {
    /// Builds the first table, with the state of a crashed process.
    fn configure(&mut self, known: Option<&KeptSnapshot>) {
        let in_force = self.reloads.within_limits(0);
        let effects = self.controller.apply(ControlEvent::Configure(in_force), clock::now());
        self.apply_effects(effects);
        if let Some(KeptSnapshot { state, .. }) = known {
            let effects = self.controller.adopt(state, clock::now());
            self.apply_effects(effects);
        }
    }

    /// Restores the operators' intents from disk, unless the supervisor has newer ones.
    /// This runs before the first accept, so a drained backend gets no session.
    fn restore_intents(&mut self) {
        if self.supervised.read_intents().is_none()
            && let Some(intents) = self.state.read_intents()
        {
            let effects = self.controller.adopt_intents(&intents, clock::now());
            self.apply_effects(effects);
        }
    }

    /// Restores the views of member sources from disk, so that a start needs no source.
    fn restore_views(&mut self) {
        if let Some(views) = self.state.read_views() {
            let effects = self.controller.adopt_views(&views, clock::now());
            self.apply_effects(effects);
        }
    }

    /// Replaces the old process, if there is one, and starts to serve clients and the
    /// admin API.
    async fn open(
        &mut self,
        mut listeners: Listeners,
        requests: mpsc::Sender<AdminRequest>,
        origin: &Origin,
        old_process: Option<OldProcess>,
    ) -> Result<(), Failure> {
        if let Some(before) = &old_process {
            self.take_over_from(before, &mut listeners, origin).await?;
        }
        let Listeners { admin, binds, fresh, .. } = listeners;
        let api = self.admin_api(admin, requests)?;
        if let Some(before) = old_process {
            // No step can fail after this call: the old process stops accepting.
            let draining = before.serving()?;
            self.follow(draining);
        }
        self.admin.serve(api);
        if let Ok(Some((offered, socket))) = self.admin.offer() {
            self.supervised.hold_admin(offered, &socket);
        }
        let config = Arc::clone(self.reloads.config());
        self.binds = binds;
        self.binds.adopt(fresh, &config, self.workers.list(), &self.supervised);
        self.hold_heartbeats();
        self.keep_intents();
        self.supervised.in_force.write();
        self.sources.configure(&config);
        announce(self, &config);
        self.lifecycle.serve();
        Ok(())
    }

    /// Takes over the state of the old process. After this, both processes can serve.
    async fn take_over_from(
        &mut self,
        before: &OldProcess,
        listeners: &mut Listeners,
        origin: &Origin,
    ) -> Result<(), Failure> {
        let effects = self.controller.adopt(before.state(), clock::now());
        self.apply_effects(effects);
        self.await_heartbeats(before.state()).await;
        let generation = self.controller.generation();
        let shares = self.upgrades.shares_counts();
        let not_taken = std::mem::take(&mut listeners.not_taken);
        let known = before.ready(not_taken, listeners.admin_taken, generation, shares)?;
        self.take_over(&known);
        let at = |refused: BindError| refused.problem(self.reloads.config(), origin);
        listeners.fresh.start().map_err(|refused| Failure::At(Box::new(at(refused))))
    }

    fn admin_api(
        &self,
        admin: AdminListener,
        requests: mpsc::Sender<AdminRequest>,
    ) -> Result<AdminApi, Failure> {
        let (tokens, readiness) =
            (Arc::clone(self.admin.tokens()), self.lifecycle.readiness().clone());
        let (listen, local) = (admin.address().to_string(), Arc::clone(self.telemetry.local()));
        let observables = self.telemetry.observables();
        AdminApi::serve(admin, listen, tokens, requests, readiness, local, observables)
            .map_err(|error| Failure::Runtime(format!("cannot start the admin API: {error}")))
    }
}

/// Returns the number of workers for `workers = "auto"`: one per CPU, limited by the CPU
/// quota.
fn auto_workers(cpus: usize) -> usize {
    match cpu::quota() {
        Some(quota) if quota < cpus => {
            tracing::info!(cpus, quota, "using fewer workers than CPUs because of a CPU quota");
            quota
        }
        _ => cpus,
    }
}

/// Logs the start: version, engine, sandbox and addresses.
fn announce(control: &Control, config: &Config) {
    let (engine, reason) = control.workers.engine();
    let workers = control.workers.list().len();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        engine,
        engine_reason = %reason,
        workers,
        "started"
    );
    let (version, pid) = (env!("CARGO_PKG_VERSION"), std::process::id());
    let text =
        format!("started: version {version}, pid {pid}, engine {engine}, workers: {workers}");
    control.telemetry.events.record(NewEvent::of_process(EventLevelName::Good, text));
    control.lifecycle.confined().log_summary();
    for address in config.heartbeat.iter().flat_map(|heartbeat| &heartbeat.listen) {
        tracing::info!(%address, "listening for heartbeats");
    }
    for frontend in &config.frontends {
        for bind in &frontend.binds {
            tracing::info!(frontend = %frontend.name, address = %bind.key, pool = %frontend.pool, "listening");
        }
    }
}
