//! Upgrades in place: a new process takes over the sockets, and the old process drains.
//!
//! Driven by the control loop, for SIGUSR2 and the admin API. Sockets are handed over and
//! never rebound: closing one of several listeners of an address would reset the clients
//! in its listen queue. The counts that caps are compared with are shared
//! (`daemon::shared_counts`).
//!
//! 1. The old process starts the new process and offers its sockets.
//! 2. The new process validates, builds and sends *ready*.
//! 3. The old process sends *commit* with its current state.
//! 4. The new process sends *serving* and accepts. Both accept from the same listen queues.
//! 5. The old process stops accepting and drains. It keeps its sockets for 1 s, and accepts
//!    again if the new process fails in that time.
//!
//! | file | part |
//! |---|---|
//! | `process` | starts and ends the new process |
//! | `outgoing` | the old process until *serving*, on its own thread |
//! | `incoming` | the new process during its start |
//! | `stepping` | the last second in which the old process can still accept again |
//! | `message`, `counts` | messages and counters |
//! | `reports`, `orders` | what the old and the new process send during the drain |

mod counts;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod incoming;
mod message;
mod orders;
mod outgoing;
mod process;
mod reports;
mod stepping;

pub use incoming::OldProcess;

pub(super) use counts::RareCounters;
pub(super) use incoming::OldProcessLink;
pub(super) use message::OfferedAdmin;
pub(super) use process::Starter;

use super::control_loop::Control;
use super::due;
use super::shared_counts::SharedCounts;
use crate::admin::{UpgradeCounts, UpgradeDoc, UpgradeError};
use crate::event_log::NewEvent;
use counts::HandoverCounts;
use incoming::OldProcessMessage;
use message::{Commit, LEVEL, Offer, OfferedBind, PROTOCOL, SavedEstimate};
use outgoing::{OfferedState, ReadyProcess, UpgradeAttempt, UpgradeHandle, UpgradeProgress};
use reports::{OldProcessOrder, OldProcessReport, Reporter};
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use stepping::SteppingDown;
use tidegate_api::names::EventLevelName;
use tidegate_core::control::handover::Saved;
use tidegate_net::clock;
use tidegate_net::fd_channel::HandoverChannel;
use tidegate_supervisor::SuccessorChanges;
use tokio::sync::{mpsc, oneshot};

/// Timeout from *commit* to *serving*. The control loop of the old process waits, and the
/// new process needs no other data.
const COMMIT_MAX: Duration = Duration::from_secs(5);

/// Maximum wait of a new process for the heartbeats of backends in rotation. It is many
/// times a usual interval, because the old process receives half of the heartbeats.
const HEARTBEAT_WAIT_MAX: Duration = Duration::from_secs(3);
const HEARTBEAT_WAIT_STEP: Duration = Duration::from_millis(20);

/// Cap on orders that wait for the control loop.
const ORDERS_MAX: usize = 16;

/// The reply to a request for an upgrade.
type UpgradeReply = oneshot::Sender<Result<UpgradeDoc, UpgradeError>>;

/// State of upgrades: the current one, the old process and the new process.
#[derive(Debug)]
pub(super) struct Upgrades {
    /// `None` if the balancer is embedded in another program.
    starter: Option<Starter>,
    counts: UpgradeCounts,
    /// The counts that caps are compared with.
    shared: Arc<SharedCounts>,
    under_way: Option<RunningUpgrade>,
    new_process: Option<NewProcess>,
    stepping_down: Option<SteppingDown>,
    old_process: Option<OldProcessLink>,
    /// Open sessions of old processes.
    elsewhere: u32,
}

#[derive(Debug)]
struct RunningUpgrade {
    outgoing: UpgradeHandle,
    /// `None` if a signal started the upgrade.
    reply: Option<UpgradeReply>,
    /// The originator, as events name it.
    who: String,
    /// A reload was postponed until the upgrade has ended.
    reload: bool,
}

/// The process that took over.
#[derive(Debug)]
struct NewProcess {
    channel: HandoverChannel,
    /// `None` if its thread could not be started.
    reporter: Option<Reporter>,
    orders: mpsc::Receiver<OldProcessOrder>,
    /// A stop signal has arrived. The first one is ignored, because the process drains.
    signalled: bool,
}

/// An event for the control loop.
#[derive(Debug)]
pub(super) enum UpgradeEvent {
    Progress(UpgradeProgress),
    /// The new process has exited with an error.
    Ended(ExitStatus),
    /// The new process has served long enough; this process gives up its sockets.
    SteppedDown,
    /// A message of the old process. `None`: it has exited without final counts.
    OldProcess(Option<OldProcessMessage>),
    /// An order of the new process.
    Order(OldProcessOrder),
}

// === impl Upgrades ===

impl Upgrades {
    pub(super) fn new(starter: Option<Starter>, shared: Arc<SharedCounts>) -> Upgrades {
        Upgrades {
            starter,
            counts: UpgradeCounts::default(),
            shared,
            under_way: None,
            new_process: None,
            stepping_down: None,
            old_process: None,
            elsewhere: 0,
        }
    }

    pub(super) fn counts(&self) -> UpgradeCounts {
        self.counts
    }

    /// Returns whether this process shares counts with the old process.
    pub(super) fn shares_counts(&self) -> bool {
        self.shared.are_taken()
    }

    /// Returns whether a new process serves.
    pub(super) fn handed_over(&self) -> bool {
        self.new_process.is_some()
    }

    /// Returns whether the old process still drains. Until it exits, its last sessions
    /// are not counted, and it can occupy addresses.
    pub(super) fn awaits_old_process(&self) -> bool {
        self.old_process.is_some()
    }

    /// Returns the open sessions of old processes, from their last report.
    pub(super) fn sessions_elsewhere(&self) -> u32 {
        self.elsewhere
    }

    /// Returns true for the first stop signal after an upgrade: the process drains already.
    pub(super) fn ignores_first_stop_signal(&mut self) -> bool {
        let first =
            |new_process: &mut NewProcess| !std::mem::replace(&mut new_process.signalled, true);
        self.new_process.as_mut().is_some_and(first)
    }

    /// Returns whether a reload must wait for an upgrade in progress. The reload takes
    /// place if the upgrade fails.
    pub(super) fn postpones_reload(&mut self) -> bool {
        if let Some(under_way) = &mut self.under_way {
            under_way.reload = true;
        }
        self.under_way.is_some()
    }

    /// Waits for the next event.
    pub(super) async fn wake(&mut self) -> UpgradeEvent {
        let progress = self.under_way.as_mut().map(|upgrade| upgrade.outgoing.next());
        let message = self.old_process.as_mut().map(OldProcessLink::next);
        let order = self.new_process.as_mut().map(|new_process| new_process.orders.recv());
        let stepping_down = self.stepping_down.as_mut().map(SteppingDown::next);
        tokio::select! {
            event = due::if_any(stepping_down) => event,
            progress = due::if_any(progress) => UpgradeEvent::Progress(progress),
            message = due::if_any(message) => UpgradeEvent::OldProcess(message),
            Some(order) = due::if_any(order) => UpgradeEvent::Order(order),
        }
    }
}

// === impl NewProcess ===

impl NewProcess {
    fn new(channel: HandoverChannel, shares: bool) -> NewProcess {
        let (tell, orders) = mpsc::channel(ORDERS_MAX);
        let reporter = match (channel.try_clone(), channel.try_clone()) {
            (Ok(to_read), Ok(to_write)) => {
                let listen = move || while forward_order(&to_read, &tell).is_some() {};
                let named = std::thread::Builder::new().name("new-process".to_owned());
                named.spawn(listen).and_then(|_| Reporter::start(to_write, shares)).ok()
            }
            _ => None,
        };
        NewProcess { channel, reporter, orders, signalled: false }
    }
}

/// Receives one order and forwards it. Returns `None` once the new process has closed the
/// connection.
fn forward_order(channel: &HandoverChannel, tell: &mpsc::Sender<OldProcessOrder>) -> Option<()> {
    let order = message::receive(channel, clock::now() + incoming::DRAIN_MAX).ok()?;
    tell.blocking_send(order).ok()
}

// === impl Control ===

impl Control {
    /// Starts an upgrade. The reply is sent when the upgrade has ended.
    pub(super) fn begin_upgrade(
        &mut self,
        changes: SuccessorChanges,
        asked_over: Option<Arc<OwnedFd>>,
        who: String,
        reply: Option<UpgradeReply>,
    ) {
        match self.start_upgrade(changes, asked_over) {
            Ok(outgoing) => {
                self.record(EventLevelName::Info, "upgrade started".to_owned(), &who);
                self.upgrades.under_way =
                    Some(RunningUpgrade { outgoing, reply, who, reload: false });
            }
            Err(why) => self.refuse_upgrade(why, &who, reply),
        }
    }

    fn record(&self, level: EventLevelName, text: String, who: &str) {
        self.telemetry.events.record(NewEvent::of_process(level, text).by(who));
    }

    fn refuse_upgrade(&mut self, why: String, who: &str, reply: Option<UpgradeReply>) {
        self.upgrades.counts.refused += 1;
        self.record(EventLevelName::Warn, format!("upgrade rejected: {why}"), who);
        tracing::error!(reason = %why, "upgrade rejected");
        if let Some(reply) = reply {
            let _ = reply.send(Err(UpgradeError::Refused(why)));
        }
    }

    fn start_upgrade(
        &mut self,
        changes: SuccessorChanges,
        asked_over: Option<Arc<OwnedFd>>,
    ) -> Result<UpgradeHandle, String> {
        if !self.lifecycle.is_serving() {
            return Err("this process is draining".to_owned());
        }
        if self.upgrades.under_way.is_some() {
            return Err("an upgrade is already in progress".to_owned());
        }
        let Some(starter) = &self.upgrades.starter else {
            return Err("the balancer is embedded in another program".to_owned());
        };
        let start = starter.prepare(changes, asked_over)?;
        tracing::info!("upgrade started");
        let attempt = self.attempt(start).map_err(|error| error.to_string())?;
        UpgradeHandle::start(attempt).map_err(|error| error.to_string())
    }

    fn attempt(&self, start: process::Start) -> std::io::Result<UpgradeAttempt> {
        let active = || self.binds.active();
        let listeners = active().map(|(key, group)| OfferedBind {
            address: key.clone(),
            sockets: u32::try_from(group.sockets.len()).unwrap_or(u32::MAX),
            holder: group.holder,
        });
        let (offered, admin) = self.admin.offer()?.unzip();
        let heartbeats = self.evidence.heartbeats.share()?;
        let counts = self.upgrades.shared.memory();
        // A process that the supervisor starts has its own helper.
        let helper = match self.supervised.link() {
            Some(_) => None,
            None => self.evidence.helper.share()?,
        };
        let offer = Offer {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            admin: offered,
            listeners: listeners.collect(),
            heartbeats: heartbeats.iter().map(|(address, _)| *address).collect(),
            digest: self.reloads.digest(),
            state: self.controller.save(clock::now()),
            confined: self.lifecycle.confined().inherited(),
            level: LEVEL,
            counts: counts.is_some(),
            helper: helper.is_some(),
        };
        let sockets = active().flat_map(|(_, group)| group.sockets.iter().cloned()).collect();
        let timeout = self.reloads.config().process.upgrade_timeout;
        let heartbeats = heartbeats.into_iter().map(|(_, socket)| socket).collect();
        let offered = OfferedState { offer, admin, sockets, heartbeats, counts, helper };
        Ok(UpgradeAttempt { start, offered, timeout })
    }

    /// Handles an event.
    pub(super) async fn upgrade_event(&mut self, event: UpgradeEvent) {
        match event {
            UpgradeEvent::OldProcess(Some(OldProcessMessage::Report(report))) => {
                self.apply_report(&report);
            }
            UpgradeEvent::OldProcess(last) => {
                self.upgrades.old_process = None;
                self.upgrades.elsewhere = 0;
                self.workers.context().in_flight.set_elsewhere(0);
                self.controller.held_here_alone();
                self.workers.context().waiters.slot_freed();
                match last {
                    Some(OldProcessMessage::FinalCounts(last)) => self.add_final_counts(&last),
                    _ => tracing::warn!(
                        "old process exited without sending its final counters; its last sessions are missing from the totals"
                    ),
                }
            }
            UpgradeEvent::Ended(status) => self.resume_serving(status).await,
            UpgradeEvent::SteppedDown => self.stepped_down(),
            UpgradeEvent::Order(order) => self.execute_order(&order),
            UpgradeEvent::Progress(progress) => {
                let Some(under_way) = self.upgrades.under_way.take() else { return };
                let result = match progress {
                    UpgradeProgress::Refused(why) => {
                        return self.upgrade_refused(under_way, why).await;
                    }
                    UpgradeProgress::Failed(why) => Err(why),
                    UpgradeProgress::Ready(at) => self.commit(*at, &under_way.outgoing).await,
                };
                self.finish_upgrade(under_way, result).await;
            }
        }
    }

    /// Sends *commit* and waits for *serving*.
    async fn commit(
        &mut self,
        at: ReadyProcess,
        outgoing: &UpgradeHandle,
    ) -> Result<(HandoverChannel, ReadyProcess), String> {
        let ReadyProcess { hello, ready, commit, mut served, ended } = at;
        self.collect_latency().await;
        let mut counts = self.upgrades.counts;
        counts.done += 1;
        // On an error the thread has ended, and `served` reports it.
        let _ = commit.send(self.state_to_hand_over(counts));
        let mut result = tokio::time::timeout(COMMIT_MAX, &mut served).await;
        if result.is_err() {
            outgoing.cancel();
            // Only the thread knows whether *serving* arrived in the end.
            result = Ok((&mut served).await);
        }
        let (_, done) = oneshot::channel();
        match result {
            Ok(Ok(Ok(channel))) => {
                Ok((channel, ReadyProcess { hello, ready, commit, served: done, ended }))
            }
            Ok(Ok(Err(why))) => Err(why),
            _ => Err("upgrade thread exited unexpectedly".to_owned()),
        }
    }

    async fn finish_upgrade(
        &mut self,
        under_way: RunningUpgrade,
        result: Result<(HandoverChannel, ReadyProcess), String>,
    ) {
        // The new process can hold shared counts, even if it has exited.
        self.upgrades.shared.watch(&self.workers.context().waiters);
        match result {
            Err(why) => {
                let why = self.lifecycle.confined().explain(why);
                self.upgrades.counts.failed += 1;
                tracing::error!(reason = %why, "upgrade failed; this process keeps serving");
                let text = format!("upgrade failed; this process keeps serving: {why}");
                self.record(EventLevelName::Bad, text, &under_way.who);
                if let Some(reply) = under_way.reply {
                    let _ = reply.send(Err(UpgradeError::Failed(why)));
                }
                if under_way.reload {
                    self.reload_and_retry("upgrade").await;
                }
            }
            Ok((channel, ReadyProcess { hello, ready, ended, .. })) => {
                self.upgrades.counts.done += 1;
                let (pid, version) = (hello.pid, hello.version);
                tracing::info!(new_pid = pid, %version, "upgrade complete; the new process serves and this one drains");
                self.lifecycle.hand_over(pid);
                self.upgrades.new_process = Some(NewProcess::new(channel, ready.shares));
                self.telemetry.latency.lock().clear();
                self.step_down(&ready, pid, ended);
                if let Some(reply) = under_way.reply {
                    let _ =
                        reply.send(Ok(UpgradeDoc { pid, version, generation: ready.generation }));
                }
            }
        }
    }

    async fn upgrade_refused(&mut self, under_way: RunningUpgrade, why: String) {
        self.refuse_upgrade(why, &under_way.who, under_way.reply);
        if under_way.reload {
            self.reload_and_retry("upgrade").await;
        }
    }

    /// Returns the current state for the new process.
    fn state_to_hand_over(&self, upgrades: UpgradeCounts) -> Commit {
        let state = self.controller.save(clock::now());
        let find = |pool: &str, name: &str, address: &str| {
            self.controller.find_saved(pool, name, address).map(|id| id.0)
        };
        let latency = incoming::saved_latency(&state, find, &self.telemetry.latency.lock());
        let heartbeats = self.evidence.heartbeats.save();
        let (workers, own) = (self.workers.counters(), self.telemetry.local());
        let reloads = self.reloads.counts();
        let mut counts = HandoverCounts::save(workers, own, reloads, upgrades, heartbeats);
        counts.rare = self.rare_counters();
        counts.session_numbers = self.workers.context().numbers.for_next_process();
        let estimates = self.estimates(&state);
        let events = self.telemetry.events.after(0).events;
        Commit { counts, latency, state, estimates, events, parts: 0 }
    }

    /// Returns the latency estimates of all backends that have one.
    fn estimates(&self, state: &Saved) -> Vec<SavedEstimate> {
        let at = clock::millis(clock::now());
        let every = state
            .pools
            .iter()
            .flat_map(|pool| pool.backends.iter().map(|one| (&pool.name, &one.name, &one.address)));
        let estimate = |(pool, backend, address): (&String, &String, &String)| {
            let micros = self.controller.saved_state(pool, backend, address)?.latency.save(at)?;
            let [pool, backend, address] = [pool, backend, address].map(String::clone);
            Some(SavedEstimate { pool, backend, address, micros })
        };
        every.filter_map(estimate).collect()
    }

    /// Restores the state that the old process sent with *commit*.
    pub(super) fn take_over(&mut self, known: &Commit) {
        self.workers.context().numbers.continue_from(known.counts.session_numbers);
        self.telemetry.events.continue_from(&known.events);
        let effects = self.controller.adopt(&known.state, clock::now());
        self.apply_effects(effects);
        self.reloads.restore_counts(known.counts.reloads());
        self.upgrades.counts = known.counts.upgrades();
        let at = clock::millis(clock::now());
        for saved in &known.estimates {
            let (pool, name, address) = (&saved.pool, &saved.backend, &saved.address);
            if let Some(state) = self.controller.saved_state(pool, name, address) {
                state.latency.restore(saved.micros, at);
            }
        }
        self.carry(known);
    }

    /// Receives heartbeats until every backend in rotation in the old process is in
    /// rotation here, at most [`HEARTBEAT_WAIT_MAX`]. Needed only if the old process is an
    /// older program, which does not hand over the state of heartbeats.
    pub(super) async fn await_heartbeats(&mut self, known: &Saved) {
        if known.pools.iter().any(|pool| pool.takes_heartbeats) {
            return;
        }
        let deadline = clock::now() + HEARTBEAT_WAIT_MAX;
        while self.reloads.config().heartbeat.is_some() && clock::now() < deadline {
            let probed: Vec<_> = self.evidence.take_probed().collect();
            self.feed(probed);
            if self.controller.serves_as(known) {
                return;
            }
            tokio::time::sleep(HEARTBEAT_WAIT_STEP).await;
        }
    }

    pub(super) fn follow(&mut self, old_process: OldProcessLink) {
        self.upgrades.old_process = Some(old_process);
        self.upgrades.shared.watch(&self.workers.context().waiters);
    }

    fn apply_report(&mut self, report: &OldProcessReport) {
        self.upgrades.elsewhere = report.sessions;
        if !self.upgrades.shared.are_taken() {
            self.workers.context().in_flight.set_elsewhere(report.sessions);
        }
        let (backends, frontends) = (&report.backends, &report.frontends);
        let effects = self.controller.held_elsewhere(backends, frontends, clock::now());
        self.apply_effects(effects);
        // A queued client may get a slot now.
        self.workers.context().waiters.slot_freed();
    }

    /// Reports the open sessions to the new process, if a report is due.
    pub(super) fn report(&mut self) {
        let sessions = self.sessions();
        let reporter = self.upgrades.new_process.as_mut().and_then(|next| next.reporter.as_mut());
        if let Some(reporter) = reporter {
            reporter.report(&self.controller, sessions, clock::now());
        }
    }

    fn add_final_counts(&mut self, last: &Commit) {
        tracing::info!("old process finished its last session");
        self.controller.adopt_counts(&last.state);
        self.carry(last);
    }

    fn carry(&mut self, known: &Commit) {
        known.counts.carry(self.workers.counters());
        self.telemetry.restore_counts(known.counts.rare);
        self.evidence.heartbeats.restore_counts(known.counts.heartbeats());
        for saved in &known.latency {
            let found = self.controller.find_saved(&saved.pool, &saved.backend, &saved.address);
            if let Some(id) = found {
                self.telemetry.latency.lock().add_saved(id.0, &saved.series);
            }
        }
    }

    /// Sends the final counts to the new process.
    pub(super) async fn send_final_counts(&mut self) {
        if self.upgrades.new_process.is_some() {
            self.collect_latency().await;
        }
        let counts = self.upgrades.counts;
        if let Some(new_process) = self.upgrades.new_process.take() {
            if let Some(reporter) = new_process.reporter {
                reporter.finish();
            }
            let known = self.state_to_hand_over(counts);
            incoming::send_final_counts(&new_process.channel, known);
        }
    }

    /// Cancels an upgrade in progress because of a shutdown.
    pub(super) fn cancel_upgrade(&mut self) {
        if let Some(under_way) = self.upgrades.under_way.take() {
            under_way.outgoing.cancel();
            self.upgrades.counts.failed += 1;
            if let Some(reply) = under_way.reply {
                let why = "a shutdown was requested during the upgrade".to_owned();
                let _ = reply.send(Err(UpgradeError::Failed(why)));
            }
        }
    }
}
