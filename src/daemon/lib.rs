//! The balancer process: start, stop and the control thread.
//!
//! Called by `cli::run`, `lab::cli::demo` and tests. It owns every thread: workers,
//! control thread, access-log writer, configuration watcher and heartbeat receiver. It
//! makes no decision about traffic: it feeds events to the controller and carries out
//! the effects.
//!
//! - Start: drop privileges and enter the sandbox ([`confine()`]), read the
//!   configuration, raise the file descriptor limit, open the access log, choose the
//!   engine, open the admin socket, the listeners and the heartbeat receiver, start the
//!   workers, publish the first table, accept clients, report ready.
//! - Stop: report not ready, retire the listeners, wait until sessions finish or reset
//!   them at the deadline, stop the workers, flush the access log, close the admin
//!   socket. Probes and heartbeats continue until the workers stop.
//!
//! # Panics
//!
//! - After a panic, a worker restarts (see `dataplane::worker::supervisor`). If it
//!   panics too often in a minute, the process exits.
//! - After a panic of the control thread, the process exits immediately. Sessions could
//!   continue with the last table, but that table soon becomes wrong without probes,
//!   heartbeats and reloads. The admin API and signals would not work either. A service
//!   manager starts a new process within a second, and sockets that it holds keep their
//!   listen queues.
//! - A panic while status or metrics are rendered is caught (see `rendering`).

mod activation;
pub mod admin;
mod admin_api;
pub mod admin_place;
mod binds;
mod builder;
mod cap_watch;
mod config_reloads;
mod control_loop;
mod drain;
mod due;
mod effects;
mod engine;
mod event_log;
mod evidence;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod given_sockets;
pub mod heartbeat;
mod heartbeats;
mod in_force;
mod include_watch;
mod lifecycle;
mod listeners;
mod logging;
mod member_sources;
mod notify;
mod panics;
mod planes;
mod ports;
mod preflight;
pub mod probe;
pub mod probe_helper;
mod refused;
mod reload;
mod reload_diff;
mod rendering;
mod requests;
mod sandbox;
mod saved_file;
mod saved_intents;
mod saved_views;
mod session_cap;
mod shared_counts;
mod signals;
mod start;
mod state_directory;
mod supervised;
mod telemetry;
mod traffic;
mod transition_log;
mod unix_sockets;
mod upgrade;
mod watchdog;
mod worker_set;

pub use crate::sandbox::{AppliedSandbox, Before, confine};
pub use activation::{PassedSockets, passed};
pub use event_log::{EVENTS_MAX, EventCounts, EventLog};
pub use notify::Notifier;
pub use preflight::preflight;
pub use supervised::{Supervised, activated_name};
pub use upgrade::OldProcess;

use crate::admin::AdminRequest;
use std::path::PathBuf;
use std::thread::JoinHandle;
use tidegate_config::{Problem, Problems};
use tidegate_supervisor::program::Program;
use tokio::sync::mpsc;

/// What to run and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Handle SIGTERM, SIGINT, SIGHUP and SIGUSR2. Off if the balancer runs inside
    /// another program.
    pub signals: bool,
    /// Write the program's log. Off if the balancer runs inside another program.
    pub logging: bool,
}

/// The environment of a balancer that runs as its own process. Empty by default.
#[derive(Debug, Default)]
pub struct ProcessEnvironment {
    /// The old process of an upgrade.
    pub old_process: Option<OldProcess>,
    /// Sockets passed by a service manager.
    pub activated: Option<PassedSockets>,
    /// The connection to the supervisor.
    pub supervised: Supervised,
    /// The program to start for an upgrade if there is no supervisor. Without program
    /// and supervisor, upgrades are not possible.
    pub program: Option<Program>,
    /// The connection to a service manager.
    pub notifier: Notifier,
    /// The pid file to write.
    pub pid_file: Option<PathBuf>,
    /// The sandbox of this process.
    pub confined: AppliedSandbox,
}

/// Why a balancer did not start.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration was rejected.
    #[error("{0}")]
    Config(Problems),
    /// A setting of the configuration does not work on this host, such as an address
    /// that is in use.
    #[error("{0}")]
    At(Box<Problem>),
    /// A thread, file descriptor or other resource is not available.
    #[error("{0}")]
    Runtime(String),
}

/// Why a running balancer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunEnd {
    /// Every session finished, or was reset at the drain deadline.
    Drained {
        /// How many sessions were reset.
        reset: u32,
    },
    /// A second stop signal: ended at once, with open sessions.
    SecondSignal,
    /// A worker panicked too often, or the heartbeat receiver exited.
    ThreadExited,
    /// The control thread panicked.
    ControlPanicked,
}

/// A running balancer.
#[derive(Debug)]
pub struct RunningBalancer {
    requests: mpsc::Sender<AdminRequest>,
    thread: JoinHandle<RunEnd>,
}

/// Starts a balancer on new threads. Returns when it is ready.
///
/// # Errors
/// See [`Failure`]. All threads and sockets are closed.
pub fn start(options: Options) -> Result<RunningBalancer, Failure> {
    start::start(options, ProcessEnvironment::default())
}

/// Starts a balancer that is its own process, with passed sockets, an old process or a
/// service manager.
///
/// # Errors
/// See [`Failure`]. All threads and sockets are closed, and an old process continues to
/// serve.
pub fn start_within(
    options: Options,
    environment: ProcessEnvironment,
) -> Result<RunningBalancer, Failure> {
    start::start(options, environment)
}

// === impl RunningBalancer ===

impl RunningBalancer {
    /// Returns the sender for requests to the control loop.
    pub fn requests(&self) -> mpsc::Sender<AdminRequest> {
        self.requests.clone()
    }

    /// Waits until the balancer ends.
    pub fn wait(self) -> RunEnd {
        let exit = self.thread.join().unwrap_or(RunEnd::ControlPanicked);
        logging::flush();
        exit
    }
}
