//! Upgrading the binary in place: another process of the program takes the
//! sockets and goes on, this one drains.
//!
//! Driven by the control loop for SIGUSR2 and the admin API. The files:
//! `process` (who starts and ends the new one), `outgoing` (the old process's side,
//! on a thread of its own), `incoming` (the new one's, during its start), `message`
//! (what they say), `counts` (what they count), `stepping` (the old one's last
//! second), `reports` (what the old one says while it drains), `orders` (what it is told).
//! Sockets are handed on and never bound
//! anew: closing one of several listeners of an address would reset whoever is in
//! its queue. What caps are compared with is shared (`daemon::shared_counts`).
//!
//! The order, and who serves: the old process starts the new one and offers its
//! sockets (old); the new one validates, builds, says *ready* (old); the old one
//! gives the word with everything known by then (old); the new one says
//! *serving*, and accepts (both, on the same queues); the old one stops accepting
//! and drains (new). For one second more it keeps sockets and table, and accepts again
//! if the new one ends in that time.

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
pub(super) use incoming::OldProcessLink as PredecessorDraining;
pub(super) use message::OfferedAdmin;
pub(super) use process::Starter;

use super::control_loop::Control;
use super::due;
use super::shared_counts::SharedCounts;
use crate::admin::{UpgradeCounts, UpgradeDoc, UpgradeError};
use counts::HandoverCounts;
use incoming::Word;
use message::{Commit, LEVEL, Offer, OfferedBind, PROTOCOL, SavedEstimate};
use outgoing::{OfferedState, ReadyProcess, UpgradeAttempt, UpgradeHandle, UpgradeProgress};
use reports::{OldProcessOrder, OldProcessReport, Reporter};
use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use stepping::SteppingDown;
use tidegate_core::control::handover::Saved;
use tidegate_net::clock;
use tidegate_net::fd_channel::HandoverChannel;
use tidegate_supervisor::Wish;
use tokio::sync::{mpsc, oneshot};

/// How long the new process may take from the word to serving: it has all it
/// needs by then, and meanwhile the control loop does nothing else.
const COMMIT_MAX: Duration = Duration::from_secs(5);

/// How long a new process waits for the heartbeats of backends that serve: many
/// times a usual interval, half of which the old process receives meanwhile.
const ACQUAINTED_MAX: Duration = Duration::from_secs(3);
const ACQUAINTED_STEP: Duration = Duration::from_millis(20);

/// Orders that may wait for the control loop.
const ORDERS_MAX: usize = 16;

/// Who asked gets this.
type UpgradeReply = oneshot::Sender<Result<UpgradeDoc, UpgradeError>>;

/// Everything about upgrades, past and present.
#[derive(Debug)]
pub(super) struct Upgrades {
    /// `None` where there is nothing to start: inside another program.
    starter: Option<Starter>,
    counts: UpgradeCounts,
    /// What caps are compared with.
    shared: Arc<SharedCounts>,
    under_way: Option<RunningUpgrade>,
    successor: Option<NewProcess>,
    stepping_down: Option<SteppingDown>,
    predecessor: Option<PredecessorDraining>,
    /// Sessions of the processes before.
    elsewhere: u32,
}

#[derive(Debug)]
struct RunningUpgrade {
    outgoing: UpgradeHandle,
    /// `None` for a signal.
    reply: Option<UpgradeReply>,
    /// The file has changed meanwhile.
    reload: bool,
}

/// The process that took over.
#[derive(Debug)]
struct NewProcess {
    channel: HandoverChannel,
    /// `None` where no thread was available for it.
    reporter: Option<Reporter>,
    orders: mpsc::Receiver<OldProcessOrder>,
    /// A first signal to stop says nothing new to a process that drains already.
    signalled: bool,
}

/// What the control loop is woken for.
#[derive(Debug)]
pub(super) enum UpgradeEvent {
    Progress(UpgradeProgress),
    /// The process that took over has ended, with no success.
    Ended(ExitStatus),
    /// It has lived long enough.
    SteppedDown,
    /// The process before says something; `None`: it has ended without a farewell.
    Word(Option<Word>),
    /// The next process wants something.
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
            successor: None,
            stepping_down: None,
            predecessor: None,
            elsewhere: 0,
        }
    }

    pub(super) fn counts(&self) -> UpgradeCounts {
        self.counts
    }

    /// Whether the process before counts where this one does.
    pub(super) fn shares_counts(&self) -> bool {
        self.shared.are_taken()
    }

    /// Whether another process serves now.
    pub(super) fn handed_over(&self) -> bool {
        self.successor.is_some()
    }

    /// Whether the process this one took over from still drains. Until it ends,
    /// its last sessions are not counted, and it may hold addresses.
    pub(super) fn awaits_old_process(&self) -> bool {
        self.predecessor.is_some()
    }

    /// Sessions of the processes before, as they last said.
    pub(super) fn sessions_elsewhere(&self) -> u32 {
        self.elsewhere
    }

    /// Whether this signal to stop asks for nothing that is not under way.
    pub(super) fn ignores_first_stop_signal(&mut self) -> bool {
        let first = |successor: &mut NewProcess| !std::mem::replace(&mut successor.signalled, true);
        self.successor.as_mut().is_some_and(first)
    }

    /// Whether a reload has to wait for the upgrade that is under way; it is
    /// made up for if that comes to nothing.
    pub(super) fn postpones_reload(&mut self) -> bool {
        if let Some(under_way) = &mut self.under_way {
            under_way.reload = true;
        }
        self.under_way.is_some()
    }

    /// What happens next.
    pub(super) async fn wake(&mut self) -> UpgradeEvent {
        let progress = self.under_way.as_mut().map(|upgrade| upgrade.outgoing.next());
        let word = self.predecessor.as_mut().map(PredecessorDraining::next);
        let order = self.successor.as_mut().map(|successor| successor.orders.recv());
        let stepping_down = self.stepping_down.as_mut().map(SteppingDown::next);
        tokio::select! {
            event = due::if_any(stepping_down) => event,
            progress = due::if_any(progress) => UpgradeEvent::Progress(progress),
            word = due::if_any(word) => UpgradeEvent::Word(word),
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
                let listen = move || while pass_order_on(&to_read, &tell).is_some() {};
                let named = std::thread::Builder::new().name("successor".to_owned());
                named.spawn(listen).and_then(|_| Reporter::start(to_write, shares)).ok()
            }
            _ => None,
        };
        NewProcess { channel, reporter, orders, signalled: false }
    }
}

/// Waits for one order; `None` when the next process is gone.
fn pass_order_on(channel: &HandoverChannel, tell: &mpsc::Sender<OldProcessOrder>) -> Option<()> {
    let order = message::receive(channel, clock::now() + incoming::DRAIN_MAX).ok()?;
    tell.blocking_send(order).ok()
}

// === impl Control ===

impl Control {
    /// Starts an upgrade; who asked is answered when it has ended.
    pub(super) fn begin_upgrade(
        &mut self,
        wish: Wish,
        asked_over: Option<Arc<OwnedFd>>,
        reply: Option<UpgradeReply>,
    ) {
        match self.start_upgrade(wish, asked_over) {
            Ok(outgoing) => {
                self.upgrades.under_way = Some(RunningUpgrade { outgoing, reply, reload: false });
            }
            Err(why) => self.refuse_upgrade(why, reply),
        }
    }

    fn refuse_upgrade(&mut self, why: String, reply: Option<UpgradeReply>) {
        self.upgrades.counts.refused += 1;
        tracing::error!(reason = %why, "upgrade rejected");
        if let Some(reply) = reply {
            let _ = reply.send(Err(UpgradeError::Refused(why)));
        }
    }

    fn start_upgrade(
        &mut self,
        wish: Wish,
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
        let start = starter.prepare(wish, asked_over)?;
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
        };
        let sockets = active().flat_map(|(_, group)| group.sockets.iter().cloned()).collect();
        let timeout = self.reloads.config().process.upgrade_timeout;
        let heartbeats = heartbeats.into_iter().map(|(_, socket)| socket).collect();
        let offered = OfferedState { offer, admin, sockets, heartbeats, counts };
        Ok(UpgradeAttempt { start, offered, timeout })
    }

    /// Goes on with what has happened.
    pub(super) async fn upgrade_event(&mut self, event: UpgradeEvent) {
        match event {
            UpgradeEvent::Word(Some(Word::Report(report))) => self.take_report(&report),
            UpgradeEvent::Word(last) => {
                self.upgrades.predecessor = None;
                self.upgrades.elsewhere = 0;
                self.workers.context().in_flight.set_elsewhere(0);
                self.controller.held_here_alone();
                self.workers.context().waiters.slot_freed();
                match last {
                    Some(Word::Farewell(last)) => self.add_final_counts(&last),
                    _ => tracing::warn!(
                        "old process exited without sending its final counters; its last sessions are missing from the totals"
                    ),
                }
            }
            UpgradeEvent::Ended(status) => self.go_on(status).await,
            UpgradeEvent::SteppedDown => self.stepped_down(),
            UpgradeEvent::Order(order) => self.obey(&order),
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

    /// Gives the word, and waits until the new process serves.
    async fn commit(
        &mut self,
        at: ReadyProcess,
        outgoing: &UpgradeHandle,
    ) -> Result<(HandoverChannel, ReadyProcess), String> {
        let ReadyProcess { hello, ready, commit, mut served, ended } = at;
        self.collect_latency().await;
        let mut counts = self.upgrades.counts;
        counts.done += 1;
        // The thread waits for nothing else.
        let _ = commit.send(self.state_to_hand_over(counts));
        let mut verdict = tokio::time::timeout(COMMIT_MAX, &mut served).await;
        if verdict.is_err() {
            outgoing.cancel();
            // The thread alone knows whether the word came through after all.
            verdict = Ok((&mut served).await);
        }
        let (_, done) = oneshot::channel();
        match verdict {
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
        // It has a part in the counts, even if it has ended.
        self.upgrades.shared.watch(&self.workers.context().waiters);
        match result {
            Err(why) => {
                let why = self.lifecycle.confined().explain(why);
                self.upgrades.counts.failed += 1;
                tracing::error!(reason = %why, "upgrade failed; this process keeps serving");
                if let Some(reply) = under_way.reply {
                    let _ = reply.send(Err(UpgradeError::Failed(why)));
                }
                if under_way.reload {
                    self.reload_and_retry().await;
                }
            }
            Ok((channel, ReadyProcess { hello, ready, ended, .. })) => {
                self.upgrades.counts.done += 1;
                let (pid, version) = (hello.pid, hello.version);
                tracing::info!(new_pid = pid, %version, "upgrade complete; the new process serves and this one drains");
                self.lifecycle.hand_over(pid);
                self.upgrades.successor = Some(NewProcess::new(channel, ready.shares));
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
        self.refuse_upgrade(why, under_way.reply);
        if under_way.reload {
            self.reload_and_retry().await;
        }
    }

    /// Everything the next process goes on with, as of now.
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
        counts.rarities = self.rare_counters();
        counts.session_numbers = self.workers.context().numbers.for_next_process();
        let estimates = self.estimates(&state);
        Commit { counts, latency, state, estimates, parts: 0 }
    }

    /// What answers take, of whom something is known.
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

    /// Goes on with what the process before knew when it gave the word.
    pub(super) fn take_over(&mut self, known: &Commit) {
        self.workers.context().numbers.continue_from(known.counts.session_numbers);
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

    /// Listens to heartbeats until every backend that served in the process before
    /// serves here, or [`ACQUAINTED_MAX`]: an older program says nothing of those
    /// that joined by their heartbeats.
    pub(super) async fn exchange_hello(&mut self, known: &Saved) {
        if known.pools.iter().any(|pool| pool.takes_heartbeats) {
            return;
        }
        let deadline = clock::now() + ACQUAINTED_MAX;
        while self.reloads.config().heartbeat.is_some() && clock::now() < deadline {
            let probed: Vec<_> = self.evidence.take_probed().collect();
            self.feed(probed);
            if self.controller.serves_as(known) {
                return;
            }
            tokio::time::sleep(ACQUAINTED_STEP).await;
        }
    }

    pub(super) fn follow(&mut self, predecessor: PredecessorDraining) {
        self.upgrades.predecessor = Some(predecessor);
        self.upgrades.shared.watch(&self.workers.context().waiters);
    }

    fn take_report(&mut self, report: &OldProcessReport) {
        self.upgrades.elsewhere = report.sessions;
        if !self.upgrades.shared.are_taken() {
            self.workers.context().in_flight.set_elsewhere(report.sessions);
        }
        let (backends, frontends) = (&report.backends, &report.frontends);
        let effects = self.controller.held_elsewhere(backends, frontends, clock::now());
        self.apply_effects(effects);
        // A client that waits for a slot may get one.
        self.workers.context().waiters.slot_freed();
    }

    /// Tells the next process what sessions are left, where it is time to.
    pub(super) fn report(&mut self) {
        let sessions = self.sessions();
        let reporter = self.upgrades.successor.as_mut().and_then(|next| next.reporter.as_mut());
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
        self.telemetry.restore_counts(known.counts.rarities);
        self.evidence.heartbeats.restore_counts(known.counts.heartbeats());
        for saved in &known.latency {
            let found = self.controller.find_saved(&saved.pool, &saved.backend, &saved.address);
            if let Some(id) = found {
                self.telemetry.latency.lock().add_saved(id.0, &saved.series);
            }
        }
    }

    /// Tells the process that took over what has been counted to the end.
    pub(super) async fn send_final_counts(&mut self) {
        if self.upgrades.successor.is_some() {
            self.collect_latency().await;
        }
        let counts = self.upgrades.counts;
        if let Some(successor) = self.upgrades.successor.take() {
            if let Some(reporter) = successor.reporter {
                reporter.finish();
            }
            let known = self.state_to_hand_over(counts);
            incoming::send_final_counts(&successor.channel, known);
        }
    }

    /// Ends an upgrade that is under way: this process is to stop.
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
