//! The workers of this process, with their counters, watchdog and access log.
//!
//! Started by `start`, owned by the control loop. It sends commands to workers, logs
//! stalled workers and joins the threads at the end. It makes no decision about traffic.

use super::Failure;
use super::event_log::{EventLog, NewEvent};
use super::logging;
use super::watchdog::{self, Watchdog, WatchdogEvent};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::{AccessLogTarget, Config, Log};
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::access_log::{AccessLog, AccessLogDestination, AccessLogSender};
#[cfg(debug_assertions)]
use tidegate_dataplane::fault_points::FaultPoint;
use tidegate_dataplane::worker::context::ProcessContext;
use tidegate_dataplane::worker::{EngineKind, Worker, WorkerCommand, WorkerConfig};
use tidegate_net::clock;

/// How long workers can take to end after the stop command.
const JOIN_MAX: Duration = Duration::from_secs(2);

/// Time between two checks of workers that end.
const JOIN_STEP: Duration = Duration::from_millis(2);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct WorkerSet {
    workers: Vec<Worker>,
    counters: Vec<Arc<WorkerCounters>>,
    context: ProcessContext,
    watchdog: Watchdog,
    /// `None` after the workers have ended.
    access_log: Option<AccessLog>,
    engine: (EngineKind, String),
    events: EventLog,
}

/// Parameters for the start of the workers.
pub(super) struct WorkerPlan<'a> {
    pub(super) config: &'a Config,
    /// The engine, and the reason for the choice.
    pub(super) engine: (EngineKind, String),
    pub(super) cpus: &'a [usize],
    pub(super) context: ProcessContext,
    pub(super) tables: &'a TablePublisher,
    pub(super) counters: Vec<Arc<WorkerCounters>>,
    pub(super) access_log: AccessLog,
    pub(super) senders: Vec<AccessLogSender>,
    pub(super) seed: u64,
    pub(super) events: EventLog,
}

// === impl WorkerSet ===

impl WorkerSet {
    /// Starts all workers, or none.
    ///
    /// # Errors
    /// A thread or an engine is not available.
    pub(super) fn start(plan: WorkerPlan<'_>) -> Result<WorkerSet, Failure> {
        let WorkerPlan { config, engine, cpus, context, tables, counters, access_log, .. } = plan;
        let mut workers = Vec::with_capacity(counters.len());
        for (id, (sender, counters)) in plan.senders.into_iter().zip(&counters).enumerate() {
            let started = Worker::start(WorkerConfig {
                id,
                cpu: config.process.pin.then(|| cpus[id % cpus.len()]),
                runtime: engine.0,
                spin: config.process.spin,
                shared: context.clone(),
                tables: tables.clone(),
                counters: Arc::clone(counters),
                access_log: sender,
                seed: plan.seed.wrapping_add(id as u64 + 1),
            });
            match started {
                Ok(worker) => workers.push(worker),
                Err(error) => {
                    stop_and_join(workers);
                    return Err(Failure::Runtime(format!("cannot start worker {id}: {error}")));
                }
            }
        }
        let watchdog = Watchdog::new(workers.len(), clock::now());
        let access_log = Some(access_log);
        let events = plan.events;
        Ok(WorkerSet { workers, counters, context, watchdog, access_log, engine, events })
    }

    /// Returns all workers, ordered by number.
    pub(super) fn list(&self) -> &[Worker] {
        &self.workers
    }

    /// Returns the counters of each worker.
    pub(super) fn counters(&self) -> &[Arc<WorkerCounters>] {
        &self.counters
    }

    /// Returns the state that all workers share.
    pub(super) fn context(&self) -> &ProcessContext {
        &self.context
    }

    /// Returns the number of open sessions in this process.
    pub(super) fn sessions(&self) -> u32 {
        self.context.sessions.load(Ordering::Relaxed)
    }

    /// Returns the name of the engine and the reason for the choice.
    pub(super) fn engine(&self) -> (&'static str, &str) {
        (self.engine.0.name(), &self.engine.1)
    }

    /// Sends a command to every worker.
    pub(super) fn send_all(&self, command: impl Fn() -> WorkerCommand) {
        for worker in &self.workers {
            worker.mailbox.send(command());
        }
    }

    /// Changes the target of the access log.
    ///
    /// # Errors
    /// The file cannot be opened. The target stays the same.
    pub(super) fn set_access_log(&mut self, target: AccessLogDestination) -> std::io::Result<()> {
        match &mut self.access_log {
            Some(access_log) => access_log.set_target(target),
            None => Ok(()),
        }
    }

    /// Resolves when a worker has exited or [`WorkerSet::check`] is due.
    pub(super) async fn wake(&mut self) {
        let due = self.watchdog.next_check();
        tokio::select! {
            () = self.context.ended.notified() => {}
            () = tokio::time::sleep_until(due.into()) => {}
        }
    }

    /// Runs the watchdog if it is due. Returns the first stalled worker.
    pub(super) fn check(&mut self) -> Option<usize> {
        let now = clock::now();
        if now >= self.watchdog.next_check() {
            let wake = |worker: usize| self.workers[worker].wake();
            let facts = watchdog::thread_facts;
            for finding in self.watchdog.check(now, &self.counters, wake, facts) {
                self.log(&finding);
            }
        }
        self.counters.iter().position(|counters| counters.pulse.stalled_for().is_some())
    }

    fn log(&self, finding: &WatchdogEvent) {
        match *finding {
            WatchdogEvent::Stalled { worker, time, state } => {
                let stage = self.counters[worker].pulse.stage().name();
                let cpu = self.workers[worker].cpu();
                let thread_state = watchdog::thread_state_name(state);
                tracing::warn!(worker, cpu, stalled_for = ?time, stage, thread_state, "worker stalled");
                let text = format!("stalled for {time:?} in stage {stage}");
                self.record(EventLevelName::Warn, worker, text);
            }
            WatchdogEvent::Responsive { worker, time } => {
                tracing::warn!(worker, stalled_for = ?time, "worker responsive again");
                self.record(
                    EventLevelName::Good,
                    worker,
                    format!("responsive again after {time:?}"),
                );
            }
        }
    }

    fn record(&self, level: EventLevelName, worker: usize, text: String) {
        let subject = format!("worker {worker}");
        self.events.record(NewEvent::new(EventKindName::Process, level, subject, text));
    }

    /// Returns the longest current stall.
    pub(super) fn longest_stall(&self) -> Option<Duration> {
        watchdog::longest_stall(&self.counters)
    }

    /// Returns whether a worker has exited without a restart. In that case the process
    /// ends, so the access log is closed.
    pub(super) fn has_exited(&mut self) -> bool {
        let exited = self.workers.iter().any(Worker::is_finished);
        if exited && let Some(access_log) = self.access_log.take() {
            access_log.close();
        }
        exited
    }

    /// Injects a fault, for tests. Returns false if the place or the worker is unknown.
    #[cfg(debug_assertions)]
    pub(super) fn order_fault(&self, place: &str, worker: usize, millis: u64) -> bool {
        let command = match place {
            "control" => panic!("injected fault: control"),
            "stall" => Some(WorkerCommand::Stall(Duration::from_millis(millis))),
            place => FaultPoint::from_name(place).map(WorkerCommand::Fault),
        };
        let (Some(command), Some(worker)) = (command, self.workers.get(worker)) else {
            return false;
        };
        worker.mailbox.send(command);
        true
    }

    /// Ends the workers and flushes the access log.
    pub(super) async fn finish(&mut self) {
        self.send_all(|| WorkerCommand::Stop);
        let deadline = clock::now() + JOIN_MAX;
        while self.workers.iter().any(|worker| !worker.is_finished()) && clock::now() < deadline {
            tokio::time::sleep(JOIN_STEP).await;
        }
        for (id, worker) in self.workers.drain(..).enumerate() {
            if worker.is_finished() {
                worker.join();
            } else {
                tracing::error!(
                    worker = id,
                    "worker thread did not stop in time; exiting without it"
                );
            }
        }
        let lost = self.access_log.take().map_or(0, AccessLog::close);
        if lost > 0 {
            tracing::warn!(lines = lost, "access-log lines dropped at exit");
        }
    }

    /// Ends the workers of a process that could not start.
    pub(super) fn abandon(self) {
        stop_and_join(self.workers);
    }
}

fn stop_and_join(workers: Vec<Worker>) {
    for worker in workers {
        worker.mailbox.send(WorkerCommand::Stop);
        worker.join();
    }
}

/// Converts the target of the configuration to that of the access log.
pub(super) fn access_log_destination(log: &Log) -> AccessLogDestination {
    match &log.access {
        AccessLogTarget::Off => AccessLogDestination::Off,
        AccessLogTarget::Stdout => AccessLogDestination::Stdout,
        AccessLogTarget::File(path) => AccessLogDestination::File(path.clone()),
        AccessLogTarget::Syslog(receiver) => AccessLogDestination::Syslog(
            logging::syslog_address(receiver),
            logging::syslog_header(receiver, log.access_facility, "access"),
        ),
    }
}
