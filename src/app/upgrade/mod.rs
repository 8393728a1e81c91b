//! Upgrading the binary in place: another process of the program takes the
//! sockets and goes on, this one drains.
//!
//! Driven by the control loop for SIGUSR2 and the admin API. The files:
//! `program` (what is started), `outgoing` (the old process's side, on a thread
//! of its own), `incoming` (the new one's, during its start), `message` (what
//! they say), `counts` (what they count). Sockets are handed on and never bound
//! anew: closing one of several listeners of an address would reset whoever is in
//! its queue.
//!
//! The order, and who serves: the old process starts the new one and offers its
//! sockets (old); the new one validates, builds, says *ready* (old); the old one
//! gives the word with everything known by then (old); the new one says
//! *serving*, and accepts (both, on the same queues); the old one stops accepting
//! and drains (new).

mod counts;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod incoming;
mod message;
mod outgoing;
mod program;

pub use incoming::Predecessor;
pub use program::Program;

pub(super) use counts::Rarities;
pub(super) use incoming::Draining as PredecessorDraining;
pub(super) use message::OfferedAdmin;

use super::control_loop::Control;
use crate::admin::{UpgradeCounts, UpgradeError, Upgraded};
use crate::clock;
use crate::control::handover::Saved;
use crate::net::handover::Channel;
use counts::Counts;
use message::{Commit, Offer, OfferedBind, PROTOCOL, SavedEstimate};
use outgoing::{AtTheReady, Attempt, Outgoing, Progress};
use std::path::Path;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long the new process may take from the word to serving: it has all it
/// needs by then, and meanwhile the control loop does nothing else.
const COMMIT_MAX: Duration = Duration::from_secs(5);

/// How long a new process waits for the heartbeats of backends that serve: many
/// times a usual interval, half of which the old process receives meanwhile.
const ACQUAINTED_MAX: Duration = Duration::from_secs(3);
const ACQUAINTED_STEP: Duration = Duration::from_millis(20);

/// Who asked gets this.
type Reply = oneshot::Sender<Result<Upgraded, UpgradeError>>;

/// Everything about upgrades, past and present.
#[derive(Debug, Default)]
pub(super) struct Upgrades {
    /// `None` where there is nothing to start: inside another program.
    program: Option<Program>,
    counts: UpgradeCounts,
    under_way: Option<UnderWay>,
    successor: Option<Successor>,
    predecessor: Option<PredecessorDraining>,
}

#[derive(Debug)]
struct UnderWay {
    outgoing: Outgoing,
    /// `None` for a signal.
    reply: Option<Reply>,
    /// The file has changed meanwhile.
    reload: bool,
}

/// The process that took over.
#[derive(Debug)]
struct Successor {
    channel: Channel,
    /// A first signal to stop says nothing new to a process that drains already.
    signalled: bool,
}

/// What the control loop is woken for.
#[derive(Debug)]
pub(super) enum UpgradeEvent {
    Progress(Progress),
    /// The process before has ended; with its last counts, if it came to tell them.
    Farewell(Option<Box<Commit>>),
}

// === impl Upgrades ===

impl Upgrades {
    pub(super) fn new(program: Option<Program>) -> Upgrades {
        Upgrades { program, ..Upgrades::default() }
    }

    pub(super) fn counts(&self) -> UpgradeCounts {
        self.counts
    }

    /// Whether another process serves now.
    pub(super) fn handed_over(&self) -> bool {
        self.successor.is_some()
    }

    /// Whether the process this one took over from still drains. Until it ends,
    /// its last sessions are not counted, and it may hold addresses.
    pub(super) fn awaits_predecessor(&self) -> bool {
        self.predecessor.is_some()
    }

    /// Whether this signal to stop asks for nothing that is not under way.
    pub(super) fn excuses_signal(&mut self) -> bool {
        let first = |successor: &mut Successor| !std::mem::replace(&mut successor.signalled, true);
        self.successor.as_mut().is_some_and(first)
    }

    /// Whether a reload has to wait for the upgrade that is under way; it is
    /// made up for if that comes to nothing.
    pub(super) fn holds_reload(&mut self) -> bool {
        if let Some(under_way) = &mut self.under_way {
            under_way.reload = true;
        }
        self.under_way.is_some()
    }

    pub(super) async fn next(&mut self) -> UpgradeEvent {
        let under_way = &mut self.under_way;
        let progress = async {
            match under_way {
                Some(under_way) => under_way.outgoing.next().await,
                None => std::future::pending().await,
            }
        };
        let predecessor = &mut self.predecessor;
        let farewell = async {
            match predecessor {
                Some(predecessor) => predecessor.farewell().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            progress = progress => UpgradeEvent::Progress(progress),
            last = farewell => UpgradeEvent::Farewell(last.map(Box::new)),
        }
    }
}

// === impl Control ===

impl Control {
    /// Starts an upgrade; who asked is answered when it has ended.
    pub(super) fn begin_upgrade(
        &mut self,
        binary: Option<&Path>,
        config: Option<&Path>,
        reply: Option<Reply>,
    ) {
        match self.start_upgrade(binary, config) {
            Ok(outgoing) => {
                self.upgrades.under_way = Some(UnderWay { outgoing, reply, reload: false });
            }
            Err(why) => {
                self.upgrades.counts.refused += 1;
                tracing::error!(reason = %why, "upgrade refused");
                if let Some(reply) = reply {
                    let _ = reply.send(Err(UpgradeError::Refused(why)));
                }
            }
        }
    }

    fn start_upgrade(
        &mut self,
        binary: Option<&Path>,
        config: Option<&Path>,
    ) -> Result<Outgoing, String> {
        if self.draining.is_some() {
            return Err("this process is draining".to_owned());
        }
        if self.upgrades.under_way.is_some() {
            return Err("an upgrade is under way".to_owned());
        }
        let Some(program) = &self.upgrades.program else {
            return Err("this balancer runs inside another program".to_owned());
        };
        if std::process::id() == 1 {
            return Err("this is process 1, and with it everything else would end: \
                        run it under an init, or replace the container"
                .to_owned());
        }
        let command = program.command_line(binary, config)?;
        tracing::info!(program = %command.path.display(), "upgrade begins");
        let attempt = self.attempt(command).map_err(|error| error.to_string())?;
        Outgoing::start(attempt).map_err(|error| error.to_string())
    }

    fn attempt(&self, command: program::CommandLine) -> std::io::Result<Attempt> {
        let active = || self.binds.active();
        let listeners = active().map(|(address, group)| OfferedBind {
            address: *address,
            sockets: u32::try_from(group.sockets.len()).unwrap_or(u32::MAX),
            holder: group.holder,
        });
        let admin = self.admin.as_ref().map(|admin| admin.offer()).transpose()?;
        let (offered, admin) = admin.unzip();
        let heartbeats = self.reception.share()?;
        let offer = Offer {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            admin: offered,
            listeners: listeners.collect(),
            heartbeats: heartbeats.iter().map(|(address, _)| *address).collect(),
            digest: self.digest,
            state: self.controller.save(clock::now()),
            confined: self.confined.inherited(),
        };
        let sockets = active().flat_map(|(_, group)| group.sockets.iter().cloned()).collect();
        let timeout = self.config.process.upgrade_timeout;
        let heartbeats = heartbeats.into_iter().map(|(_, socket)| socket).collect();
        Ok(Attempt { command, offer, admin, sockets, heartbeats, timeout })
    }

    /// Goes on with what has happened.
    pub(super) async fn upgrade_event(&mut self, event: UpgradeEvent) {
        match event {
            UpgradeEvent::Farewell(last) => {
                self.upgrades.predecessor = None;
                match last {
                    Some(last) => self.take_farewell(&last),
                    None => tracing::warn!("the process before has ended without a word"),
                }
            }
            UpgradeEvent::Progress(progress) => {
                let Some(under_way) = self.upgrades.under_way.take() else { return };
                let result = match progress {
                    Progress::Failed(why) => Err(why),
                    Progress::Ready(at) => self.commit(*at, &under_way.outgoing).await,
                };
                self.conclude(under_way, result).await;
            }
        }
    }

    /// Gives the word, and waits until the new process serves.
    async fn commit(
        &mut self,
        at: AtTheReady,
        outgoing: &Outgoing,
    ) -> Result<(Channel, AtTheReady), String> {
        let AtTheReady { hello, ready, commit, mut served } = at;
        self.collect_latency().await;
        let mut counts = self.upgrades.counts;
        counts.done += 1;
        // The thread waits for nothing else.
        let _ = commit.send(self.what_is_known(counts));
        let mut verdict = tokio::time::timeout(COMMIT_MAX, &mut served).await;
        if verdict.is_err() {
            outgoing.call_off();
            // The thread alone knows whether the word came through after all.
            verdict = Ok((&mut served).await);
        }
        let (_, done) = oneshot::channel();
        match verdict {
            Ok(Ok(Ok(channel))) => Ok((channel, AtTheReady { hello, ready, commit, served: done })),
            Ok(Ok(Err(why))) => Err(why),
            _ => Err("the upgrade's thread has died".to_owned()),
        }
    }

    async fn conclude(
        &mut self,
        under_way: UnderWay,
        result: Result<(Channel, AtTheReady), String>,
    ) {
        match result {
            Err(why) => {
                let why = self.confined.explain(why);
                self.upgrades.counts.failed += 1;
                tracing::error!(reason = %why, "upgrade failed; this process goes on");
                if let Some(reply) = under_way.reply {
                    let _ = reply.send(Err(UpgradeError::Failed(why)));
                }
                if under_way.reload {
                    self.reload_when_told().await;
                }
            }
            Ok((channel, AtTheReady { hello, ready, .. })) => {
                self.upgrades.counts.done += 1;
                let (pid, version) = (hello.pid, hello.version);
                tracing::info!(pid, %version, "upgrade done: that process serves, this one drains");
                self.notifier.successor(pid);
                self.upgrades.successor = Some(Successor { channel, signalled: false });
                self.latency.lock().clear();
                self.binds.hand_over(&ready.not_taken, &self.workers);
                self.reception.hand_over();
                if let Some(reply) = under_way.reply {
                    let _ = reply.send(Ok(Upgraded { pid, version, generation: ready.generation }));
                }
                if ready.admin_taken
                    && let Some(admin) = &mut self.admin
                {
                    admin.hand_over();
                }
                self.drain_what_is_left();
            }
        }
    }

    /// Everything the next process goes on with, as of now.
    fn what_is_known(&self, upgrades: UpgradeCounts) -> Commit {
        let state = self.controller.save(clock::now());
        let find = |pool: &str, name: &str, address: &str| {
            self.controller.find_saved(pool, name, address).map(|id| id.0)
        };
        let latency = incoming::saved_latency(&state, find, &self.latency.lock());
        let heartbeats = self.reception.save();
        let (workers, own) = (&self.counters, &self.local);
        let mut counts = Counts::save(workers, own, self.reloads, upgrades, heartbeats);
        counts.rarities = self.rarities();
        let estimates = self.estimates(&state);
        Commit { counts, latency, state, estimates }
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
        let effects = self.controller.adopt(&known.state, clock::now());
        self.perform(effects);
        self.reloads = known.counts.reloads();
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
    /// serves here, or [`ACQUAINTED_MAX`]: those that joined by their heartbeats
    /// are known by nothing else.
    pub(super) async fn get_acquainted(&mut self, known: &Saved) {
        let deadline = clock::now() + ACQUAINTED_MAX;
        while self.config.heartbeat.is_some() && clock::now() < deadline {
            let mut events = self.reception.take();
            events.extend(std::iter::from_fn(|| self.probed.try_recv().ok()));
            self.feed(events);
            if self.controller.serves_as(known) {
                return;
            }
            tokio::time::sleep(ACQUAINTED_STEP).await;
        }
    }

    pub(super) fn follow(&mut self, predecessor: PredecessorDraining) {
        self.upgrades.predecessor = Some(predecessor);
    }

    fn take_farewell(&mut self, last: &Commit) {
        tracing::info!("the process before has ended its last session");
        self.controller.adopt_counts(&last.state);
        self.carry(last);
    }

    fn carry(&mut self, known: &Commit) {
        known.counts.carry(&self.counters);
        self.rarities_before = known.counts.rarities;
        self.reception.count_on(known.counts.heartbeats());
        for saved in &known.latency {
            let found = self.controller.find_saved(&saved.pool, &saved.backend, &saved.address);
            if let Some(id) = found {
                self.latency.lock().add_saved(id.0, &saved.series);
            }
        }
    }

    /// Tells the process that took over what has been counted to the end.
    pub(super) async fn say_farewell(&mut self) {
        if self.upgrades.successor.is_some() {
            self.collect_latency().await;
        }
        let counts = self.upgrades.counts;
        if let Some(successor) = self.upgrades.successor.take() {
            incoming::say_farewell(&successor.channel, self.what_is_known(counts));
        }
    }

    /// Ends an upgrade that is under way: this process is to stop.
    pub(super) fn call_off_upgrade(&mut self) {
        if let Some(under_way) = self.upgrades.under_way.take() {
            under_way.outgoing.call_off();
            self.upgrades.counts.failed += 1;
            if let Some(reply) = under_way.reply {
                let why = "this process was told to stop meanwhile".to_owned();
                let _ = reply.send(Err(UpgradeError::Failed(why)));
            }
        }
    }
}
