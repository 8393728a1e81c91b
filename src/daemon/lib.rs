//! The running balancer: start and stop order, and the control thread.
//!
//! Called by `cli::run`, `lab::cli::demo` and tests. It owns every thread: workers,
//! control thread, access-log writer, configuration watcher. It decides
//! nothing about traffic; it carries events to the controller and its effects
//! out.
//!
//! Start: privileges given up and sandbox ([`confine()`]), configuration, descriptor limit, engine, access log, admin socket,
//! listeners, the receiver of heartbeats, first table, workers, accepting,
//! probes, ready. Stop: not ready, listeners retire, sessions finish or are cut
//! (heartbeats and probes go on until then), workers end, access log is flushed,
//! the admin socket goes last.
//!
//! # When something panics
//!
//! A worker begins anew by itself (see `dataplane::worker::supervisor`), five times in a minute at
//! most; then the process ends. So it does, at once, when the control thread
//! panics. The sessions could go on, by the last table; but without probes,
//! heartbeats and reloads the table is soon wrong, nobody could tell or mend it
//! through the admin API, and no signal would end the process. A service manager
//! that starts a new one within a second does better, and sockets it holds keep
//! their queues. What the control thread runs was never trusted with traffic:
//! rendering status and metrics is contained on its own.

mod activation;
pub mod admin;
mod admin_api;
pub mod admin_place;
mod binds;
mod builder;
mod config_reloads;
pub mod config_watch;
mod control_loop;
mod drain;
mod due;
mod effects;
mod engine;
mod evidence;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod given_sockets;
pub mod heartbeat;
mod heartbeats;
mod in_force;
mod lifecycle;
mod listeners;
mod logging;
mod notify;
mod panics;
mod planes;
mod ports;
mod preflight;
pub mod probe;
mod refused;
mod reload;
mod reload_diff;
mod rendering;
mod requests;
mod sandbox;
mod saved_intents;
mod session_cap;
mod shared_counts;
mod signals;
mod start;
mod state_directory;
mod supervised;
mod telemetry;
mod transition_log;
mod upgrade;
mod watchdog;
mod worker_set;

pub use crate::sandbox::{AppliedSandbox, Before, confine};
pub use activation::{PassedSockets, passed};
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
    /// Obey SIGTERM, SIGINT, SIGHUP and SIGUSR2. Off for a balancer inside another
    /// program.
    pub signals: bool,
    /// Write the program's log. Off where another program does its own.
    pub logging: bool,
}

/// What a balancer that is a process of its own has around it; nothing, by
/// default.
#[derive(Debug, Default)]
pub struct ProcessEnvironment {
    /// The process whose place it takes.
    pub predecessor: Option<OldProcess>,
    /// Sockets a service manager has passed.
    pub activated: Option<PassedSockets>,
    /// The process that has started it and starts others.
    pub supervised: Supervised,
    /// What to start when it is upgraded, where it has no supervisor; without either, it
    /// cannot be.
    pub program: Option<Program>,
    /// The way to a service manager.
    pub notifier: Notifier,
    /// Where to leave its number.
    pub pid_file: Option<PathBuf>,
    /// What it has given up.
    pub confined: AppliedSandbox,
}

/// Why a balancer did not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration was refused.
    #[error("{0}")]
    Config(Problems),
    /// Something that the configuration asks for cannot be had now, such as an
    /// address that is taken.
    #[error("{0}")]
    At(Box<Problem>),
    /// An address is taken, a thread or descriptor could not be had.
    #[error("{0}")]
    Runtime(String),
}

/// How a balancer that ran came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunEnd {
    /// Every session finished, or was cut at the drain deadline.
    Drained {
        /// How many were cut.
        cut: u32,
    },
    /// A second signal: at once, whatever was open.
    SecondSignal,
    /// A worker fell too often, or the receiver of heartbeats died.
    ThreadExited,
    /// The control thread panicked: nobody would reload, probe or answer.
    ControlPanicked,
}

/// A balancer that is up and serving.
#[derive(Debug)]
pub struct RunningBalancer {
    requests: mpsc::Sender<AdminRequest>,
    thread: JoinHandle<RunEnd>,
}

/// Starts a balancer on threads of its own; returns once it is ready.
///
/// # Errors
/// See [`Failure`]. Nothing is left behind.
pub fn start(options: Options) -> Result<RunningBalancer, Failure> {
    start::start(options, ProcessEnvironment::default())
}

/// The same for a process of its own: with sockets it was given, and with
/// somebody to tell that it is ready.
///
/// # Errors
/// See [`Failure`]. Nothing is left behind, and a process before goes on.
pub fn start_within(
    options: Options,
    surroundings: ProcessEnvironment,
) -> Result<RunningBalancer, Failure> {
    start::start(options, surroundings)
}

// === impl RunningBalancer ===

impl RunningBalancer {
    /// The way to the control loop, as the admin API uses it.
    pub fn requests(&self) -> mpsc::Sender<AdminRequest> {
        self.requests.clone()
    }

    /// Waits for the end.
    pub fn wait(self) -> RunEnd {
        let exit = self.thread.join().unwrap_or(RunEnd::ControlPanicked);
        logging::flush();
        exit
    }
}
