//! Many backends in two pools with their detectors and guards, driven as by the controller
//! in steps of 1 ms.
//!
//! A scenario lists faults with their backends and times. The world runs it and records the
//! transitions. A seed replays a run.

use fastrand::Rng;
use std::time::{Duration, Instant};
use tidegate_core::suspicion::{
    BeatInfo, ChannelGuard, ChannelState, DetectorRequest, DetectorState, DetectorStep, Freeze,
    FreezeChange, HeartbeatDetector, PathGuard, PathView, TryId, TryResult, is_late, may_remove,
};

pub(crate) const INTERVAL: Duration = Duration::from_millis(100);
const MAX_DOWN: u8 = 50;

/// Datagrams in the socket buffer while the loop is stalled; further ones are lost.
const SOCKET_BUFFER: usize = 4;

/// The fault of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    Fine,
    /// Its heartbeats do not arrive; its service answers.
    Mute,
    /// Nothing arrives in either direction.
    Dead,
    /// It sends no heartbeats, and its host refuses connects.
    Crashed,
    /// Heartbeats arrive; connects are refused.
    ServiceGone,
}

/// The faults, in milliseconds since the start.
pub(crate) struct Scenario {
    /// Number of backends per pool.
    pub(crate) pools: Vec<usize>,
    pub(crate) seed: u64,
    /// Share of heartbeats lost.
    pub(crate) loss: f64,
    pub(crate) doing: Box<dyn Fn(usize, u64) -> Doing>,
    /// Times in which the control loop is stalled.
    pub(crate) stalled: Box<dyn Fn(u64) -> bool>,
    pub(crate) millis: u64,
}

/// One transition.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) at: u64,
    pub(crate) backend: usize,
    pub(crate) from: DetectorState,
    pub(crate) to: DetectorState,
    pub(crate) reason: String,
}

pub(crate) struct World {
    scenario: Scenario,
    rng: Rng,
    start: Instant,
    millis: u64,
    nodes: Vec<Node>,
    channel: ChannelGuard,
    /// One guard per pool; the last one is over all pools.
    paths: Vec<PathGuard>,
    inbox: Vec<(usize, u64)>,
    pub(crate) log: Vec<Entry>,
    /// Reasons of prevented removals, each once.
    pub(crate) held: Vec<String>,
}

struct Node {
    pool: usize,
    detector: HeartbeatDetector,
    /// State at the newest step.
    due: Option<Instant>,
    phase: u64,
    sequence: u64,
    flying: Option<(u64, TryId, TryResult)>,
    proven: bool,
}

impl Default for Scenario {
    fn default() -> Scenario {
        Scenario {
            pools: vec![4, 4],
            seed: 1,
            loss: 0.0,
            doing: Box::new(|_, _| Doing::Fine),
            stalled: Box::new(|_| false),
            millis: 30_000,
        }
    }
}

// === impl World ===

impl World {
    pub(crate) fn play(scenario: Scenario) -> World {
        let start = tidegate_net::clock::now();
        let mut rng = Rng::with_seed(scenario.seed);
        let mut nodes = Vec::new();
        for (pool, count) in scenario.pools.iter().enumerate() {
            nodes.extend((0..*count).map(|_| Node {
                pool,
                detector: HeartbeatDetector::new(INTERVAL, start),
                due: None,
                phase: rng.u64(0..100),
                sequence: 0,
                flying: None,
                proven: false,
            }));
        }
        let paths = vec![PathGuard::default(); scenario.pools.len() + 1];
        let channel = ChannelGuard::default();
        let (log, held, inbox) = (Vec::new(), Vec::new(), Vec::new());
        let mut world =
            World { scenario, rng, start, millis: 0, nodes, channel, paths, inbox, log, held };
        let mut ran = 0;
        for millis in 1..=world.scenario.millis {
            world.millis = millis;
            world.send();
            if !(world.scenario.stalled)(millis) {
                world.run(ran);
                ran = millis;
            }
            // The loop is stalled, and the socket buffer overflows.
            world.inbox.truncate(SOCKET_BUFFER);
        }
        world
    }

    pub(crate) fn state(&self, backend: usize) -> DetectorState {
        self.nodes[backend].detector.state()
    }

    pub(crate) fn held(&self, backend: usize) -> Option<String> {
        self.nodes[backend].detector.reading(self.now()).held
    }

    /// Returns how often any backend reached `to`.
    pub(crate) fn count(&self, to: DetectorState) -> usize {
        self.log.iter().filter(|entry| entry.at > 1_000 && entry.to == to).count()
    }

    /// Returns when `backend` first reached `to` after `since`.
    pub(crate) fn reached(&self, backend: usize, to: DetectorState, since: u64) -> Option<u64> {
        let mut entries = self.log.iter();
        entries
            .find(|entry| (entry.backend, entry.to) == (backend, to) && entry.at >= since)
            .map(|entry| entry.at)
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.millis)
    }

    fn doing(&self, backend: usize) -> Doing {
        (self.scenario.doing)(backend, self.millis)
    }

    fn send(&mut self) {
        for index in 0..self.nodes.len() {
            if self.millis % 100 != self.nodes[index].phase {
                continue;
            }
            self.nodes[index].sequence += 1;
            let speaks = matches!(self.doing(index), Doing::Fine | Doing::ServiceGone);
            if speaks && self.rng.f64() >= self.scenario.loss {
                self.inbox.push((index, self.nodes[index].sequence));
            }
        }
    }

    fn run(&mut self, ran: u64) {
        let now = self.now();
        let due = self.start + Duration::from_millis(ran + 1);
        if is_late(due, now, INTERVAL) {
            let lost = now - due;
            self.channel.ignore_silence(lost, now);
            for index in 0..self.nodes.len() {
                let step = self.nodes[index].detector.ignore_silence_until(lost, now);
                self.take(index, step);
            }
        }
        for (index, sequence) in std::mem::take(&mut self.inbox) {
            if self.channel.beat(INTERVAL, now) {
                self.reconsider();
            }
            let beat = BeatInfo { incarnation: 1, sequence, interval: INTERVAL };
            let (_, step) = self.nodes[index].detector.beat(&beat, now);
            self.take(index, step);
        }
        for index in 0..self.nodes.len() {
            let millis = self.millis;
            let arrived = self.nodes[index].flying.take_if(|(at, ..)| *at <= millis);
            if let Some((_, id, answer)) = arrived {
                let step = self.nodes[index].detector.probed(id, answer, now);
                self.take(index, step);
            }
            if self.nodes[index].due.is_some_and(|due| due <= now) {
                let channel = self.channel_state();
                let step = self.nodes[index].detector.check(channel, now);
                self.take(index, step);
            }
        }
        for path in 0..self.paths.len() {
            if self.paths[path].due().is_some_and(|due| due <= now) {
                self.look(path);
            }
        }
        self.assert_bounds();
    }

    fn take(&mut self, index: usize, step: DetectorStep) {
        self.nodes[index].due = self.nodes[index].detector.due();
        if let Some(change) = step.change {
            let (from, to) = (change.from, change.to);
            if to == DetectorState::Suspect {
                self.look(self.nodes[index].pool);
                self.look(self.paths.len() - 1);
            }
            let entry = Entry { at: self.millis, backend: index, from, to, reason: change.reason };
            self.log.push(entry);
        }
        match step.request {
            Some(DetectorRequest::Probe(next)) => {
                let timeout = next.timeout.as_millis() as u64;
                let (wait, answer) = match self.doing(index) {
                    Doing::Fine | Doing::Mute => (1, TryResult::Answered),
                    Doing::Crashed | Doing::ServiceGone => (1, TryResult::Refused),
                    Doing::Dead => (timeout, TryResult::Failed("connect timed out".to_owned())),
                };
                self.nodes[index].flying = Some((self.millis + wait, next.id, answer));
            }
            Some(DetectorRequest::Eject { proven }) => self.eject(index, proven),
            None => {}
        }
    }

    fn eject(&mut self, index: usize, proven: bool) {
        let pool = self.nodes[index].pool;
        let freezes: [Option<&Freeze>; 2] =
            [self.paths[pool].freeze(), self.paths[self.paths.len() - 1].freeze()];
        let now = self.now();
        match may_remove(proven, self.view(pool), MAX_DOWN, self.channel_state(), freezes) {
            Ok(()) => {
                self.nodes[index].proven = proven;
                let step = self.nodes[index].detector.eject(now);
                self.take(index, step);
            }
            Err(reason) => {
                if self.nodes[index].detector.hold_in_rotation(reason.clone())
                    && !self.held.contains(&reason)
                {
                    self.held.push(reason);
                }
            }
        }
    }

    fn look(&mut self, path: usize) {
        let (view, now) = (self.view(path), self.now());
        if let Some(FreezeChange::Ended(_)) = self.paths[path].look(view, now) {
            self.reconsider();
        }
    }

    fn reconsider(&mut self) {
        for index in 0..self.nodes.len() {
            let now = self.now();
            let step = self.nodes[index].detector.reconsider(now);
            self.take(index, step);
        }
    }

    /// Returns the view of a pool, or of all pools.
    fn view(&self, path: usize) -> PathView {
        let all = path == self.scenario.pools.len();
        let members = self.nodes.iter().filter(|node| all || node.pool == path);
        let frozen = self.paths[path].freeze().map(|freeze| freeze.since);
        PathView::of(members.map(|node| &node.detector), frozen, self.now())
    }

    fn channel_state(&self) -> ChannelState {
        let live = self.view(self.scenario.pools.len()).live;
        self.channel.state(live, INTERVAL, self.now())
    }

    /// Checks that at most half of a pool is down without proof.
    fn assert_bounds(&self) {
        for (pool, members) in self.scenario.pools.iter().enumerate() {
            let out = |node: &&Node| {
                node.pool == pool && node.detector.state() == DetectorState::Down && !node.proven
            };
            let out = self.nodes.iter().filter(out).count();
            assert!(out <= members / 2, "{out} of {members} are down at {} ms", self.millis);
        }
    }
}
