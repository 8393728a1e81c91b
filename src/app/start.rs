//! Bringing a balancer up, in order, and putting everything back when a step
//! fails.
//!
//! Runs on the control thread, which it then hands to the control loop.

use super::binds::{Binds, Refused};
use super::control_loop::Control;
use super::logging::LogHandle;
use super::{Exit, Failure, Options, Running};
use crate::admin::{self, Readiness, ReloadCounts, Request, Token, TokenStore};
use crate::clock;
use crate::config::{self, AccessLogTarget, Config, EngineChoice, Loaded};
use crate::control::{Controller, Event};
use crate::health::probe::runner::ProbeRunner;
use crate::net::{cpu, limits};
use crate::proxy::close::{Cause, Phase};
use crate::proxy::context::{Reports, Shared};
use crate::proxy::gate::Gate;
use crate::proxy::worker::{Command, Plan, Runtime, Worker};
use crate::table::publish::TablePublisher;
use crate::telemetry::access_log::{AccessLog, AccessLogSender, Target};
use crate::telemetry::counters::WorkerCounters;
use crate::telemetry::histograms::Merged;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Probe results that may wait for the control loop.
const PROBE_RESULTS_MAX: usize = 1024;

/// Descriptors kept for everything but sessions: standard streams, log files,
/// epoll sets, rings, admin connections, probes.
const DESCRIPTORS_RESERVED: u64 = 256;

/// A session's: client and backend.
const DESCRIPTORS_A_SESSION: u64 = 2;

pub(super) fn start(options: Options) -> Result<Running, Failure> {
    let (requests, inbox) = mpsc::channel(admin::REQUESTS_MAX);
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let to_control = requests.clone();
    let thread = std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control_thread(&options, to_control, inbox, &ready))
        .map_err(|error| Failure::Runtime(format!("cannot start a thread: {error}")))?;
    match started.recv() {
        Ok(Ok(())) => Ok(Running { requests, thread }),
        Ok(Err(failure)) => {
            let _ = thread.join();
            Err(failure)
        }
        Err(_) => Err(Failure::Runtime("the control thread died while it started".to_owned())),
    }
}

fn control_thread(
    options: &Options,
    requests: mpsc::Sender<Request>,
    inbox: mpsc::Receiver<Request>,
    ready: &std::sync::mpsc::SyncSender<Result<(), Failure>>,
) -> Exit {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::Runtime(format!("cannot start a runtime: {error}"));
            let _ = ready.send(Err(failure));
            return Exit::Drained { cut: 0 };
        }
    };
    runtime.block_on(async {
        match bring_up(options, requests) {
            Ok(control) => {
                let _ = ready.send(Ok(()));
                control.run(inbox).await
            }
            Err(failure) => {
                let _ = ready.send(Err(failure));
                Exit::Drained { cut: 0 }
            }
        }
    })
}

/// Everything up to the first accepted connection. Must be called within the
/// control thread's runtime.
fn bring_up(options: &Options, requests: mpsc::Sender<Request>) -> Result<Control, Failure> {
    let Loaded { config, digest, warnings } =
        config::load(&options.config).map_err(Failure::Config)?;
    let log = if options.logging { LogHandle::install(&config.log) } else { LogHandle::none() };
    for warning in &warnings {
        tracing::warn!("{}:{}:{}: {}", warning.file, warning.line, warning.column, warning.message);
    }
    let (runtime, engine_reason) = choose_runtime(config.process.engine);
    let cpus = cpu::available();
    let count = config.process.workers.unwrap_or(cpus.len());
    let descriptors = limits::raise_descriptor_limit();

    let (access_log, senders) = AccessLog::start(access_target(&config.log.access), count)
        .map_err(|error| Failure::Runtime(format!("cannot open the access log: {error}")))?;
    let token = load_token(&config).map_err(Failure::Runtime)?;
    let admin = admin::bind(&config.admin).map_err(|error| Failure::Runtime(error.to_string()))?;
    let mut binds = Binds::new(count);
    let fresh = binds.bind_new(&config).map_err(|refused| Failure::Runtime(refused.to_string()))?;

    let seed = fastrand::u64(..);
    let mut controller = Controller::new(count, seed);
    let tables = TablePublisher::new(controller.current_table());
    let shared = Shared {
        in_flight: Arc::default(),
        gate: Arc::new(Gate::new()),
        reports: Arc::new(Reports::new()),
    };
    let counters: Vec<Arc<WorkerCounters>> =
        (0..count).map(|_| Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))).collect();
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
    let readiness = Readiness::new();
    let tokens = Arc::new(TokenStore::new(token));
    let config = Arc::new(config);
    let session_cap = SessionCap { descriptors };
    let in_force = session_cap.apply(&config, 0);
    let effects = controller.apply(Event::Configure(in_force), clock::now());
    let mut control = Control {
        path: options.config.clone(),
        signals: options.signals,
        digest,
        started_with: Arc::clone(&config),
        config: Arc::clone(&config),
        started: clock::now(),
        started_wall: clock::wall(),
        controller,
        tables,
        workers,
        counters,
        binds,
        shared,
        probes: ProbeRunner::start(probe_results),
        probed,
        latency: Merged::new(),
        access_log: Some(access_log),
        log,
        readiness: readiness.clone(),
        tokens: Arc::clone(&tokens),
        runtime,
        engine_reason,
        reloads: ReloadCounts::default(),
        restart_needed: Vec::new(),
        session_cap,
        draining: None,
    };
    control.perform(effects);
    control.binds.adopt(fresh, &config, &control.workers);
    announce(&control, &config, count);
    control.serve_admin(admin, tokens, requests, readiness);
    control.readiness.set_ready();
    Ok(control)
}

struct Workers<'a> {
    config: &'a Config,
    runtime: Runtime,
    cpus: &'a [usize],
    shared: &'a Shared,
    tables: &'a TablePublisher,
    counters: &'a [Arc<WorkerCounters>],
    senders: Vec<AccessLogSender>,
    seed: u64,
}

/// Starts every worker, or none.
fn start_workers(with: Workers<'_>) -> Result<Vec<Worker>, Failure> {
    let mut workers = Vec::with_capacity(with.counters.len());
    for (id, (access_log, counters)) in with.senders.into_iter().zip(with.counters).enumerate() {
        let plan = Plan {
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
                    worker.mailbox.send(Command::Stop);
                    worker.join();
                }
                return Err(Failure::Runtime(format!("cannot start worker {id}: {error}")));
            }
        }
    }
    Ok(workers)
}

/// The engine and, in words, why that one.
///
/// # Why `auto` is epoll
///
/// Measured beside each other by `scripts/bench-peers`, the ring is a few
/// percent ahead on small messages, and behind on bulk streams (it does not
/// splice yet) and in memory for each idle session. It is also the younger of
/// the two: until it has been soaked it is asked for by name.
fn choose_runtime(choice: EngineChoice) -> (Runtime, String) {
    let asked = "asked for in the configuration";
    match choice {
        EngineChoice::Epoll => (Runtime::Epoll, asked.to_owned()),
        EngineChoice::IoUring => match Runtime::io_uring_allowed() {
            Ok(()) => (Runtime::IoUring, asked.to_owned()),
            Err(error) => (Runtime::Epoll, refusal(&error)),
        },
        EngineChoice::Auto => {
            let other = match Runtime::io_uring_allowed() {
                Ok(()) => "io_uring is allowed and taken when asked for".to_owned(),
                Err(error) => refusal(&error),
            };
            (Runtime::Epoll, format!("what auto takes; {other}"))
        }
    }
}

fn refusal(error: &std::io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            match disabled.as_deref().map(str::trim) {
                Ok("1" | "2") => ": the sysctl kernel.io_uring_disabled forbids it",
                _ => ": a seccomp profile or security module forbids it",
            }
        }
        Some(libc::ENOSYS) => ": this kernel or sandbox does not have it",
        Some(libc::ENOMEM) => ": memory or locked-memory limit",
        Some(libc::EINVAL) => ": this kernel is too old for it",
        _ => "",
    };
    format!("io_uring is refused ({error}){hint}")
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
    for frontend in &config.frontends {
        for bind in &frontend.binds {
            tracing::info!(frontend = %frontend.name, address = %bind, pool = %frontend.pool, "listening");
        }
    }
}

/// How many sessions the descriptor limit allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct SessionCap {
    descriptors: u64,
}

impl SessionCap {
    /// `config` with a `connections_max` that cannot run out of descriptors;
    /// says so where that lowers it.
    pub(super) fn apply(self, config: &Arc<Config>, listeners: usize) -> Arc<Config> {
        let own = DESCRIPTORS_RESERVED + listeners as u64;
        let allowed = self.descriptors.saturating_sub(own) / DESCRIPTORS_A_SESSION;
        let allowed = u32::try_from(allowed.max(1)).unwrap_or(u32::MAX);
        if config.process.connections_max <= allowed {
            return Arc::clone(config);
        }
        tracing::warn!(
            connections_max = config.process.connections_max,
            in_force = allowed,
            descriptors = self.descriptors,
            "the limit on open descriptors allows fewer sessions; raise LimitNOFILE or ulimit -n"
        );
        let mut lowered = Config::clone(config);
        lowered.process.connections_max = allowed;
        Arc::new(lowered)
    }
}

/// The access log's target in its own terms.
pub(super) fn access_target(target: &AccessLogTarget) -> Target {
    match target {
        AccessLogTarget::Off => Target::Off,
        AccessLogTarget::Stdout => Target::Stdout,
        AccessLogTarget::File(path) => Target::File(path.clone()),
    }
}

/// The admin token, where one is configured.
pub(super) fn load_token(config: &Config) -> Result<Option<Token>, String> {
    let load = |path: &Path| Token::load(path).map_err(|error| error.to_string());
    config.admin.token_file.as_deref().map(load).transpose()
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot listen on {}: {}", self.address, self.error)
    }
}
