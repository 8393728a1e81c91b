//! Simulation of heartbeats in virtual time: senders that start, fail, return, drain and
//! lose datagrams, reloads and late ticks. Invariants are checked after every step. At the
//! end all disturbances stop, and every backend must be in rotation again.
//!
//! `SIM_SEED=n` replays a run.

use crate::drawn::random_config;
use crate::{SeedGuard, number};
use fastrand::Rng;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::{ControlEffect, ControlEvent, Controller, ProbeToken, PublishReason};
use tidegate_core::health::{Intent, Observation, ProbeOutcome, RequestedState};
use tidegate_core::model::*;
use tidegate_core::suspicion::guards::down_max;
use tidegate_core::table::Table;
use tidegate_core::table::state::BackendId;
use tidegate_heartbeat::{Heartbeat, SenderState};

const INTERVAL: Duration = Duration::from_millis(100);
const SENDERS: usize = 8;
const SEEDS: u64 = 24;

pub(crate) struct Sender {
    name: Arc<str>,
    port: u16,
    incarnation: u64,
    sequence: u64,
    state: SenderState,
    alive: bool,
    next: Instant,
}

struct Sim {
    rng: Rng,
    controller: Controller,
    now: Instant,
    start: Instant,
    config: Arc<Config>,
    senders: Vec<Sender>,
    /// Running probes, with the time of their results.
    asked: Vec<(Instant, BackendId, ProbeToken)>,
    table: Arc<Table>,
    ids: HashMap<BackendId, String>,
    /// Share of heartbeats lost, in percent.
    loss: u8,
}

pub(crate) fn heartbeat_config(rng: &mut Rng) -> Config {
    let mut config = random_config(rng, None);
    config.pools.truncate(1);
    config.frontends.truncate(1);
    let mut pool = PoolConfig::clone(&config.pools[0]);
    pool.backends.retain(|backend| backend.name.ends_with(['0', '1', '2']));
    pool.when_none_eligible = WhenNoneEligible::Refuse;
    for backend in &mut pool.backends {
        backend.tier = 0;
        let number = u16::from(backend.name.as_bytes()[1] - b'0');
        backend.address = BackendAddr::Tcp(([127, 0, 0, 1], 2000 + number).into());
    }
    pool.heartbeat = Some(Arc::new(HeartbeatSpec {
        register: true,
        require: rng.bool(),
        interval: INTERVAL,
        ttl: Duration::from_secs(rng.u64(1..10)),
        forget_after: Duration::from_secs(rng.u64(1..20)),
        backends_max: if rng.u8(..4) == 0 { 3 } else { 100 },
        weight_max: 100,
    }));
    pool.slow_start = rng.bool().then(|| Duration::from_secs(rng.u64(1..10)));
    config.pools = vec![Arc::new(pool)];
    config
}

impl Sender {
    pub(crate) fn new(number: u16, start: Instant) -> Sender {
        Sender {
            name: format!("b{number}").into(),
            port: 2000 + number,
            incarnation: 1,
            sequence: 0,
            state: SenderState::Ready,
            alive: true,
            next: start,
        }
    }

    /// Returns the next heartbeat, an older one, or one of another incarnation or address.
    pub(crate) fn advance_sender(&mut self, random: u8) -> &Sender {
        match random % 32 {
            0 => self.incarnation += 1,
            1 => self.sequence = self.sequence.saturating_sub(3),
            2 => self.state = SenderState::Draining,
            3 => self.state = SenderState::Ready,
            4 => self.port ^= 64,
            _ => self.sequence += 1,
        }
        self
    }
}

impl Sim {
    fn new(seed: u64, start: Instant) -> Sim {
        let mut rng = Rng::with_seed(seed);
        let config = Arc::new(heartbeat_config(&mut rng));
        let controller = Controller::new(2, seed);
        let senders = (0..SENDERS).map(|number| Sender {
            name: format!("b{number}").into(),
            port: 2000 + number as u16,
            incarnation: 1,
            sequence: 0,
            state: SenderState::Ready,
            alive: rng.bool(),
            next: start,
        });
        let mut sim = Sim {
            senders: senders.collect(),
            table: controller.current_table(),
            loss: *Rng::with_seed(seed).choice(&[0, 1, 10]).unwrap(),
            rng,
            controller,
            now: start,
            start,
            config,
            asked: Vec::new(),
            ids: HashMap::new(),
        };
        sim.apply([ControlEvent::Configure(Arc::clone(&sim.config))]);
        sim
    }

    /// Advances to the next event: a heartbeat, a probe result, a timer, or `end`.
    fn advance(&mut self, end: Instant) {
        let beats = self.senders.iter().filter(|s| s.alive).map(|s| s.next);
        let answers = self.asked.iter().map(|(at, ..)| *at);
        let next = beats.chain(answers).chain(self.controller.next_due()).min();
        self.now = next.unwrap_or(end).min(end).max(self.now);
        let mut events = Vec::new();
        for sender in &mut self.senders {
            if sender.alive && sender.next <= self.now {
                sender.sequence += 1;
                sender.next = self.now + INTERVAL;
                if self.rng.u8(..100) >= self.loss {
                    events.push(beat(sender, self.now));
                }
            }
        }
        let (due, later) = self.asked.drain(..).partition(|(at, ..)| *at <= self.now);
        self.asked = later;
        for (_, backend, token) in due {
            events.push(ControlEvent::Probed { backend, token, outcome: self.outcome(backend) });
        }
        events.push(ControlEvent::Tick);
        self.apply(events);
    }

    fn outcome(&self, id: BackendId) -> ProbeOutcome {
        let alive = |name: &String| self.senders.iter().any(|s| *s.name == **name && s.alive);
        if self.ids.get(&id).is_some_and(alive) {
            ProbeOutcome::success(Duration::ZERO)
        } else {
            ProbeOutcome::failure("connect timed out")
        }
    }

    fn disturb(&mut self) {
        let index = self.rng.usize(..SENDERS);
        match self.rng.u8(..12) {
            0..=3 => {
                let sender = &mut self.senders[index];
                sender.alive = !sender.alive;
                sender.next = self.now;
                if sender.alive && self.rng.bool() {
                    (sender.incarnation, sender.sequence) = (sender.incarnation + 1, 0);
                }
                sender.state = SenderState::Ready;
            }
            4 => self.senders[index].state = SenderState::Draining,
            5 => self.senders[index].state = SenderState::Ready,
            6 if self.senders[index].port >= 2003 => {
                // The sender reports stopping, unless the backend is configured.
                let sender = &mut self.senders[index];
                (sender.state, sender.sequence) = (SenderState::Stopping, sender.sequence + 1);
                let event = beat(sender, self.now);
                sender.alive = false;
                self.apply([event]);
            }
            7 => {
                let mut config = Config::clone(&self.config);
                let mut pool = PoolConfig::clone(&config.pools[0]);
                pool.slow_start = self.rng.bool().then(|| Duration::from_secs(2));
                config.pools = vec![Arc::new(pool)];
                self.config = Arc::new(config);
                self.apply([ControlEvent::Configure(Arc::clone(&self.config))]);
            }
            8 => self.now += Duration::from_millis(self.rng.u64(..3000)),
            9 => self.apply([ControlEvent::HeartbeatsLost(3)]),
            10 => {
                let intent = *self.rng.choice(&[Intent::Ready, Intent::Draining]).unwrap();
                let name = Arc::clone(&self.senders[index].name);
                let done = self.controller.set_intent("p0", &name, intent, self.now);
                self.take(done.unwrap_or_default());
            }
            _ => {}
        }
    }

    fn apply(&mut self, events: impl IntoIterator<Item = ControlEvent>) {
        let effects = self.controller.apply_all(events, self.now);
        self.take(effects);
    }

    fn take(&mut self, effects: Vec<ControlEffect>) {
        // Most heartbeats change nothing, and a check after each takes too long.
        if effects.is_empty() && self.rng.u8(..16) > 0 {
            return;
        }
        for pool in &self.controller.status(self.now).pools {
            for backend in &pool.backends {
                let name = backend.state.name.to_string();
                let owner = self.ids.entry(backend.state.id).or_insert_with(|| name.clone());
                assert_eq!(*owner, name, "an id was reused");
            }
        }
        let mut removed = false;
        for effect in effects {
            match effect {
                ControlEffect::Publish(table) => self.table = table,
                ControlEffect::Log(t) => {
                    let confirmed = t.reason.contains("confirmation probe");
                    removed |= t.from == "suspect" && t.to == "down" && confirmed;
                }
                ControlEffect::Probe { backend, token, spec, .. } => {
                    let dead = !matches!(self.outcome(backend), ProbeOutcome::Success { .. });
                    let took = if dead { spec.timeout } else { Duration::from_millis(1) };
                    self.asked.push((self.now + took, backend, token));
                }
                _ => {}
            }
        }
        self.check(removed);
    }

    fn check(&mut self, removed: bool) {
        let status = self.controller.status(self.now);
        for pool in &status.pools {
            assert!(pool.registered <= 100 && pool.registered <= pool.registered_max as usize);
            let serving = &self.table.pools[0].serving;
            for b in &pool.backends {
                let name = &b.state.name;
                assert_eq!(b.eligible, b.effective_weight > 0.0, "{name}");
                let may = b.intent == Intent::Ready
                    && b.requested == RequestedState::Ready
                    && !b.ejected
                    && b.observation != Observation::Down;
                assert!(may || !b.eligible, "{name} is eligible: {b:?}");
                assert!(!may || b.eligible || b.observation == Observation::Unknown, "{b:?}");
                let serves = serving.iter().any(|state| state.id == b.state.id);
                let found_out = b.observation == Observation::Down || b.intent != Intent::Ready;
                assert!(!(serves && found_out), "{name} is not eligible but in the table");
            }
            let registered = pool.backends.iter().filter(|b| b.origins.is_registered());
            assert_eq!(registered.count(), pool.registered);
            if removed && let Some(first) = pool.backends.first() {
                self.check_guard(&pool.name, &first.state.name);
            }
        }
        let tables = status.published.iter().find(|(r, _)| *r == PublishReason::Heartbeat);
        let span = self.now - self.start;
        assert!(u128::from(tables.unwrap().1) <= span.as_millis() / 100 + 1, "too many tables");
        assert!(self.controller.next_due().is_none_or(|due| due > self.now));
    }

    /// Checks that silence removes at most `max_ejected` of a pool.
    fn check_guard(&self, pool: &str, backend: &str) {
        let explained = self.controller.explain(pool, backend, self.now).expect("it is there");
        let guards = explained.guards;
        let (down, members) = (guards.view.down, guards.view.members);
        let most = down_max(guards.max_ejected_percent, members);
        assert!(down <= most, "{down} of {members} are down");
    }

    /// Lets all senders work, and checks that every backend returns with its full weight.
    fn recover(&mut self) {
        self.loss = 0;
        for sender in &mut self.senders {
            (sender.alive, sender.state, sender.next) = (true, SenderState::Ready, self.now);
        }
        let (all_known, end) =
            (self.now + Duration::from_secs(5), self.now + Duration::from_secs(150));
        while self.now < all_known {
            self.advance(all_known);
        }
        for number in 0..SENDERS {
            let name = format!("b{number}");
            let done = self.controller.set_intent("p0", &name, Intent::Ready, self.now);
            self.take(done.unwrap_or_default());
        }
        while self.now < end {
            self.advance(end);
        }
        let status = self.controller.status(self.now);
        let pool = &status.pools[0];
        assert!(pool.frozen.is_none() && !status.heartbeat.as_ref().unwrap().silent);
        for b in &pool.backends {
            let sends = self.senders.iter().any(|sender| sender.name == b.state.name);
            assert!(!sends || b.effective_weight == f64::from(b.weight), "{b:#?}");
        }
        assert_eq!(self.table.pools[0].serving.len(), pool.backends.len());
    }
}

pub(crate) fn beat(sender: &Sender, at: Instant) -> ControlEvent {
    let heartbeat = Heartbeat {
        pool: "p0".into(),
        name: Arc::clone(&sender.name),
        address: ([127, 0, 0, 1], sender.port).into(),
        incarnation: sender.incarnation,
        sequence: sender.sequence,
        interval: INTERVAL,
        state: sender.state,
        weight: 10,
        in_flight: 0,
        load: 0,
        key_id: 1,
    };
    ControlEvent::Heartbeat { heartbeat, at, stands_for: 1 }
}

#[test]
fn heartbeat_invariants_hold_under_arbitrary_events() {
    let start = tidegate_net::clock::now();
    let seeds = match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(SEEDS),
    };
    for seed in seeds {
        let _guard = SeedGuard(seed);
        let mut sim = Sim::new(seed, start);
        let end = start + Duration::from_secs(60);
        while sim.now < end {
            if sim.rng.u8(..20) == 0 {
                sim.disturb();
            }
            sim.advance(end);
        }
        sim.recover();
    }
}
