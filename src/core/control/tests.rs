//! Test bench for the controller's rules in virtual time. The tests are in the submodules.

mod agents;
mod discovery;
mod ejections;
mod handover;
mod heartbeats;
mod members;
mod on_down;
mod on_recover;
mod probing;
mod reloads;
mod roles;
mod scale;
mod settling;
mod slow_backends;

use super::*;
use crate::balance::trial::TrialPhase;
use crate::discovery::{Announced, Told, WholeSet, Wish};
use crate::health::Observation;
use crate::health::ejection::TRIAL_CHECK_INTERVAL;
use crate::model::{
    BackendAddr, BackendConfig, Bind, Config, DiscoverSpec, DnsConfig, EjectionSpec, EmptyAnswer,
    FrontendConfig, NameFamily, NameQuestion, NameRecord, NamedBackend, OnRemoval, Policy,
    PoolConfig, ProbeKind, ProbeSpec, ProbeTarget, SourceKey, SourceQuestion, ViewGuards,
    WhenNoneEligible,
};
use crate::testing;
use std::time::Duration;
use tidegate_heartbeat::Heartbeat;

const INTERVAL: Duration = Duration::from_secs(2);
const FAST: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_millis(400);
const GRACE: Duration = Duration::from_secs(3);

fn probe_spec() -> ProbeSpec {
    ProbeSpec {
        kind: ProbeKind::Tcp,
        interval: INTERVAL,
        fast_interval: FAST,
        down_interval: INTERVAL,
        timeout: TIMEOUT,
        rise: 2,
        fall: 3,
        target: ProbeTarget::default(),
    }
}

/// Returns a backend from `name` or `name@port`. Without a port, the address follows from
/// the name.
fn backend(text: &str) -> BackendConfig {
    let (name, port) = match text.split_once('@') {
        Some((name, port)) => (name, port.parse().unwrap()),
        None => (text, 1000 + u16::from(text.as_bytes()[0])),
    };
    BackendConfig {
        name: name.into(),
        address: BackendAddr::Tcp(([127, 0, 0, 1], port).into()),
        weight: 10,
        tier: 0,
        connections_max: 0,
    }
}

fn pool(backends: &[&str]) -> PoolConfig {
    PoolConfig {
        startup_grace: GRACE,
        probe: Some(Arc::new(probe_spec())),
        ejection: Some(EjectionSpec {
            failures: 5,
            time: Duration::from_secs(10),
            max_ejected_percent: 50,
            early_resets: true,
            slow_first_byte: None,
        }),
        backends: backends.iter().map(|text| backend(text)).collect(),
        ..testing::pool("web")
    }
}

fn unprobed(backends: &[&str]) -> PoolConfig {
    PoolConfig { probe: None, ..pool(backends) }
}

fn config(pools: Vec<PoolConfig>) -> Arc<Config> {
    let frontends = vec![testing::frontend("in", 80, &pools[0])];
    Arc::new(testing::config(frontends, pools.into_iter().map(Arc::new).collect()))
}

/// Returns the pool with a `discover` table whose guards accept everything at once.
fn discovering(pool: PoolConfig) -> PoolConfig {
    discovering_with(pool, open_guards())
}

fn discovering_with(pool: PoolConfig, guards: ViewGuards) -> PoolConfig {
    let spec = DiscoverSpec {
        question: SourceQuestion::File { path: "/members.json".into() },
        guards,
        first_wait: Duration::from_secs(10),
    };
    PoolConfig { discover: Some(Arc::new(spec)), ..pool }
}

fn open_guards() -> ViewGuards {
    ViewGuards {
        empty: EmptyAnswer::Accept,
        max_removed: 100,
        min_backends: 0,
        missing: 1,
        overlap: Duration::ZERO,
        weight_max: 1000,
        ..ViewGuards::of_name(&DnsConfig::default())
    }
}

/// Returns the pool with the backend `db`, whose address is a name.
fn naming(pool: PoolConfig) -> PoolConfig {
    let question = NameQuestion {
        name: "db.internal".into(),
        record: NameRecord::Address,
        port: Some(5432),
        family: NameFamily::Both,
    };
    let named =
        NamedBackend { name: "db".into(), question, weight: 7, tier: 0, connections_max: 5 };
    PoolConfig { named: vec![named], ..pool }
}

fn announced(text: &str) -> Announced {
    let BackendConfig { name, address: BackendAddr::Tcp(address), weight, .. } = backend(text)
    else {
        unreachable!("backends of the bench have addresses")
    };
    let (weight, raw) = (Some(weight), "".into());
    Announced {
        name,
        address,
        weight,
        tier: 0,
        wish: Wish::Sessions,
        raw,
        labels: Default::default(),
    }
}

/// Returns a complete answer; each member is `name` or `name@port`.
fn whole(names: &[&str]) -> Told {
    whole_of(names.iter().map(|text| announced(text)).collect())
}

fn whole_of(members: Vec<Announced>) -> Told {
    let (members, version) = (members.into(), String::new());
    Told::Whole(WholeSet {
        members,
        version,
        trusted: true,
        unreadable: Default::default(),
        keys: [].into(),
    })
}

/// A controller, its clock, and the probes it has requested.
struct Bench {
    controller: Controller,
    began: Instant,
    now: Instant,
    asked: Vec<(BackendId, ProbeToken)>,
}

impl Bench {
    fn new(pool: PoolConfig) -> Bench {
        let now = tidegate_net::clock::now();
        let controller = Controller::new(2, 1);
        let mut bench = Bench { controller, began: now, now, asked: vec![] };
        bench.configure(pool);
        bench
    }

    /// Returns a bench with all backends up.
    fn up(pool: PoolConfig) -> Bench {
        let mut bench = Bench::new(pool);
        bench.answer_all_for(Duration::from_secs(1), None);
        bench
    }

    fn configure(&mut self, pool: PoolConfig) -> Vec<ControlEffect> {
        self.apply(ControlEvent::Configure(config(vec![pool])))
    }

    fn apply(&mut self, event: ControlEvent) -> Vec<ControlEffect> {
        let effects = self.controller.apply(event, self.now);
        self.note(effects)
    }

    /// Lets a source of the pool `web` tell something.
    fn told(&mut self, backend: Option<&str>, told: Told) -> Vec<ControlEffect> {
        let key = SourceKey { pool: "web".into(), backend: backend.map(Into::into) };
        self.apply(ControlEvent::Told { key, told, at: self.now })
    }

    fn apply_all(&mut self, events: Vec<ControlEvent>) -> Vec<ControlEffect> {
        let effects = self.controller.apply_all(events, self.now);
        self.note(effects)
    }

    /// Runs requested builds, and records requested probes.
    fn note(&mut self, effects: Vec<ControlEffect>) -> Vec<ControlEffect> {
        let (mut others, mut built) = (Vec::new(), Vec::new());
        for effect in effects {
            match effect {
                ControlEffect::Build { token, build } => {
                    let (built_now, took) = (Box::new(build.run()), Duration::ZERO);
                    built.push(ControlEvent::Built { token, built: built_now, took });
                }
                ControlEffect::Probe { backend, token, .. } => {
                    self.asked.push((backend, token));
                    others.push(effect);
                }
                _ => others.push(effect),
            }
        }
        if !built.is_empty() {
            others.extend(self.apply_all(built));
        }
        others
    }

    /// Ticks at each due time within `span`, without probe results.
    fn pass(&mut self, span: Duration) -> Vec<ControlEffect> {
        let end = self.now + span;
        let mut effects = Vec::new();
        while let Some(due) = self.controller.next_due().filter(|due| *due <= end) {
            self.now = due;
            effects.extend(self.apply(ControlEvent::Tick));
        }
        self.now = end;
        effects
    }

    /// As `pass`, with an immediate result for every probe.
    fn answer_all_for(&mut self, span: Duration, failure: Option<&str>) -> Vec<ControlEffect> {
        let end = self.now + span;
        let mut effects = self.answer_asked(failure);
        while let Some(due) = self.controller.next_due().filter(|due| *due <= end) {
            self.now = due;
            effects.extend(self.apply(ControlEvent::Tick));
            effects.extend(self.answer_asked(failure));
        }
        self.now = end;
        effects
    }

    fn answer_asked(&mut self, failure: Option<&str>) -> Vec<ControlEffect> {
        let asked = std::mem::take(&mut self.asked);
        asked.into_iter().flat_map(|(id, token)| self.answer(id, token, failure)).collect()
    }

    fn answer(
        &mut self,
        backend: BackendId,
        token: ProbeToken,
        failure: Option<&str>,
    ) -> Vec<ControlEffect> {
        let outcome = match failure {
            None => ProbeOutcome::success(Duration::ZERO),
            Some(reason) => ProbeOutcome::failure(reason),
        };
        self.apply(ControlEvent::Probed { backend, token, outcome })
    }

    /// Reports connect failures `from..=to` of a row.
    fn refuse(&mut self, name: &str, from: u32, to: u32) -> Vec<ControlEffect> {
        let backend = self.id(name);
        let (failure, begun) = (ConnectFailure::Refused, self.now);
        let failed = |in_a_row| ControlEvent::ConnectFailed { backend, failure, in_a_row, begun };
        (from..=to).flat_map(|k| self.apply(failed(k))).collect()
    }

    /// Starts a trial session, advances it to `phase`, and lets the controller check.
    fn run_trial(&mut self, name: &str, phase: TrialPhase) -> Vec<ControlEffect> {
        let state = self.status(name).state;
        assert!(state.in_flight.try_enter(0), "no session is admitted");
        let trial = state.in_flight.claim_trial().expect("a trial");
        state.in_flight.advance_trial(trial, phase);
        state.in_flight.leave();
        self.pass(TRIAL_CHECK_INTERVAL)
    }

    fn status(&self, name: &str) -> BackendStatus {
        let mut status = self.controller.status(self.now);
        let backends = status.pools.remove(0).backends.into_iter();
        backends.into_iter().find(|b| &*b.state.name == name).unwrap()
    }

    fn id(&self, name: &str) -> BackendId {
        self.status(name).state.id
    }

    fn serving(&self) -> Vec<String> {
        let table = self.controller.current_table();
        table.pools[0].serving.iter().map(|state| state.name.to_string()).collect()
    }

    fn operator(&mut self, name: &str, intent: Intent) -> Vec<ControlEffect> {
        self.controller.set_intent("web", name, intent, self.now).unwrap()
    }
}

fn logs(effects: &[ControlEffect]) -> Vec<String> {
    let line = |effect: &ControlEffect| match effect {
        ControlEffect::Log(t) => {
            Some(format!("{}: {} -> {}: {}", t.backend, t.from, t.to, t.reason))
        }
        ControlEffect::Notice(n) => {
            let fields = [&n.fields.reason, &n.fields.evidence].into_iter().flatten();
            let text = fields.fold(n.message.to_owned(), |text, field| text + ": " + field);
            Some(format!("{}: {text}", n.backend.as_deref().unwrap_or("-")))
        }
        _ => None,
    };
    effects.iter().filter_map(line).collect()
}

fn publishes(effects: &[ControlEffect]) -> usize {
    effects.iter().filter(|effect| matches!(effect, ControlEffect::Publish(_))).count()
}

fn probes(effects: &[ControlEffect]) -> usize {
    effects.iter().filter(|effect| matches!(effect, ControlEffect::Probe { .. })).count()
}

fn resets(effects: &[ControlEffect]) -> Vec<BackendId> {
    let reset = |effect: &ControlEffect| match effect {
        ControlEffect::ResetSessions(id, _) => Some(*id),
        _ => None,
    };
    effects.iter().filter_map(reset).collect()
}
