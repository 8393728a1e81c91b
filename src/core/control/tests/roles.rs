//! Pools that use the backends of another pool, and pools that need a role.

use super::*;
use crate::control::handover::Saved;
use crate::health::ProbeAnswer;
use crate::model::{NodeRole, ProbeKind, ProbeLogin};

const PRIMARY: Option<NodeRole> = Some(NodeRole::Primary);
const REPLICA: Option<NodeRole> = Some(NodeRole::Replica);

fn base(backends: &[&str]) -> PoolConfig {
    let kind = ProbeKind::Redis(ProbeLogin::default());
    PoolConfig { probe: Some(Arc::new(ProbeSpec { kind, ..probe_spec() })), ..pool(backends) }
}

fn of_base(base: &PoolConfig, name: &str, role: Option<NodeRole>) -> PoolConfig {
    PoolConfig {
        name: name.into(),
        of: Some(Arc::clone(&base.name)),
        role,
        discover: None,
        ..base.clone()
    }
}

/// The pools `web`, `rw` and `ro`.
fn three(base: PoolConfig) -> Vec<PoolConfig> {
    let (rw, ro) = (of_base(&base, "rw", PRIMARY), of_base(&base, "ro", REPLICA));
    vec![base, rw, ro]
}

fn bench(backends: &[&str]) -> Bench {
    let mut bench = Bench::new(base(backends));
    bench.apply(ControlEvent::Configure(config(three(base(backends)))));
    bench
}

impl Bench {
    /// Ticks for a time; each probe ends with the answer of its backend: no answer is a
    /// failure.
    fn probe_for(
        &mut self,
        span: Duration,
        answers: &[(&str, Option<NodeRole>)],
    ) -> Vec<ControlEffect> {
        let end = self.now + span;
        let mut effects = Vec::new();
        loop {
            for (id, token) in std::mem::take(&mut self.asked) {
                let (pool, name) = self.controller.name_of(id).unwrap();
                assert_eq!(&*pool, "web", "only the first pool is probed");
                let answer = answers.iter().find(|(one, _)| *one == &*name);
                effects.extend(self.role(id, token, answer.and_then(|(_, role)| *role)));
            }
            let Some(due) = self.controller.next_due().filter(|due| *due <= end) else { break };
            self.now = due;
            effects.extend(self.apply(ControlEvent::Tick));
        }
        self.now = end;
        effects
    }

    fn role(
        &mut self,
        backend: BackendId,
        token: ProbeToken,
        role: Option<NodeRole>,
    ) -> Vec<ControlEffect> {
        let outcome = match role {
            Some(role) => {
                ProbeOutcome::Success { took: Duration::ZERO, answer: ProbeAnswer::Role(role) }
            }
            None => ProbeOutcome::failure("no answer"),
        };
        self.apply(ControlEvent::Probed { backend, token, outcome })
    }

    /// Names of the serving backends of the pools `web`, `rw` and `ro`.
    fn served(&self) -> [String; 3] {
        let table = self.controller.current_table();
        [0, 1, 2].map(|place| {
            let names = table.pools[place].serving.iter().map(|state| &*state.name);
            names.collect::<Vec<_>>().join(" ")
        })
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn one_probe_feeds_the_pool_and_the_pools_of_its_roles() {
    let mut bench = bench(&["a", "b"]);
    assert_eq!(bench.served(), ["", "", ""], "no role is known yet");
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    assert_eq!(bench.served(), ["a b", "a", "b"]);
}

#[test]
fn demotion_and_promotion_change_all_pools_in_one_table() {
    let mut bench = bench(&["a", "b"]);
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    bench.pass(3 * SECOND);
    let asked = std::mem::take(&mut bench.asked);
    let a = bench.id("a");
    for (id, token) in asked {
        let role = if id == a { REPLICA } else { PRIMARY };
        let effects = bench.role(id, token, role);
        assert_eq!(publishes(&effects), 1);
        let moved = if id == a { "a: primary -> replica" } else { "b: replica -> primary" };
        let logged = logs(&effects);
        assert_eq!(logged.iter().filter(|line| line.starts_with(moved)).count(), 3, "{logged:?}");
        if id == a && bench.served()[1].is_empty() {
            assert_eq!(bench.served(), ["a b", "", "a b"], "a left one pool and joined another");
        }
    }
    assert_eq!(bench.served(), ["a b", "b", "a"]);
}

#[test]
fn backend_that_is_down_is_in_no_pool_and_keeps_its_role() {
    let mut bench = bench(&["a", "b"]);
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    bench.probe_for(60 * SECOND, &[("b", REPLICA)]);
    assert_eq!(bench.served(), ["b", "", "b"]);
    bench.probe_for(60 * SECOND, &[("b", PRIMARY)]);
    assert_eq!(bench.served(), ["b", "b", ""]);
    let effects = bench.probe_for(60 * SECOND, &[("a", PRIMARY), ("b", PRIMARY)]);
    assert_eq!(bench.served(), ["a b", "b", ""], "b was promoted, a has returned unchanged");
    let warned = "-: several backends are primaries; at most one gets sessions: in force: b: a, b";
    let logged = logs(&effects);
    assert_eq!(logged.iter().filter(|line| *line == warned).count(), 1, "{logged:?}");
    let effects = bench.probe_for(60 * SECOND, &[("a", REPLICA), ("b", PRIMARY)]);
    assert_eq!(bench.served(), ["a b", "b", "a"]);
    assert!(logs(&effects).iter().any(|line| line.contains("at most one backend is a primary")));
}

#[test]
fn of_two_primaries_at_the_start_none_gets_sessions() {
    let mut bench = bench(&["a", "b"]);
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", PRIMARY)]);
    assert_eq!(bench.served(), ["a b", "", ""]);
    let status = bench.controller.status(bench.now);
    assert!(status.pools[1].backends.iter().all(|one| one.outranked && one.lacks_role));
}

#[test]
fn pool_with_a_role_never_fails_open() {
    let mut bench = bench(&["a", "b"]);
    bench.pass(GRACE * 2);
    assert_eq!(bench.served(), ["a b", "", ""]);
}

#[test]
fn probes_look_for_a_primary_at_the_fast_interval() {
    let mut bench = bench(&["a", "b"]);
    bench.probe_for(60 * SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    let span = 10 * probe_spec().interval;
    let settled = probes(&bench.probe_for(span, &[("a", PRIMARY), ("b", REPLICA)]));
    bench.probe_for(60 * SECOND, &[("a", REPLICA), ("b", REPLICA)]);
    let seeking = probes(&bench.probe_for(span, &[("a", REPLICA), ("b", REPLICA)]));
    assert!(seeking > 2 * settled, "{seeking} and {settled} probes");
}

#[test]
fn refused_connect_of_a_following_pool_hastens_the_probe() {
    let mut bench = bench(&["a", "b"]);
    bench.probe_for(60 * SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    let table = bench.controller.current_table();
    let (backend, begun) = (table.pools[1].serving[0].id, bench.now);
    let failure = ConnectFailure::Refused;
    bench.apply(ControlEvent::ConnectFailed { backend, failure, in_a_row: 1, begun });
    let effects = bench.pass(probe_spec().fast_interval);
    let own = table.pools[0].serving[0].id;
    let probed = |effect: &ControlEffect| matches!(effect, ControlEffect::Probe { backend, .. } if *backend == own);
    assert!(effects.iter().any(probed));
}

#[test]
fn reload_keeps_roles_and_a_new_pool_has_them_at_once() {
    let mut bench = Bench::new(base(&["a", "b"]));
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    bench.apply(ControlEvent::Configure(config(three(base(&["a", "b"])))));
    assert_eq!(bench.served(), ["a b", "a", "b"], "before any other probe");
    bench.apply(ControlEvent::Configure(config(three(base(&["a", "b", "c"])))));
    assert_eq!(bench.served(), ["a b", "a", "b"]);
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", REPLICA), ("c", REPLICA)]);
    assert_eq!(bench.served(), ["a b c", "a", "b c"]);
}

#[test]
fn backends_of_a_member_source_join_and_leave_the_following_pools() {
    let mut bench = Bench::new(base(&["a"]));
    bench.apply(ControlEvent::Configure(config(three(discovering(base(&["a"]))))));
    bench.told(None, whole(&["b", "c"]));
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", REPLICA), ("c", REPLICA)]);
    assert_eq!(bench.served(), ["a b c", "a", "b c"]);
    bench.apply(ControlEvent::Configure(config(three(discovering(base(&["a"]))))));
    assert_eq!(bench.served(), ["a b c", "a", "b c"], "a reload keeps them");
    bench.told(None, whole(&["c"]));
    bench.pass(SECOND);
    assert_eq!(bench.served(), ["a c", "a", "c"]);
}

#[test]
fn drain_in_one_pool_leaves_the_others_alone() {
    let mut bench = bench(&["a", "b"]);
    bench.probe_for(SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    bench.controller.set_intent("ro", "b", Intent::Draining, bench.now).unwrap();
    assert_eq!(bench.served(), ["a b", "a", ""]);
}

#[test]
fn upgrade_keeps_roles() {
    let mut old = bench(&["a", "b"]);
    old.probe_for(SECOND, &[("a", REPLICA), ("b", REPLICA)]);
    old.probe_for(60 * SECOND, &[("a", PRIMARY), ("b", REPLICA)]);
    let saved: Saved = old.controller.save(old.now);
    let mut next = bench(&["a", "b"]);
    next.controller.adopt(&saved, next.now);
    assert_eq!(next.served(), ["a b", "a", "b"]);
    let status = next.controller.status(next.now);
    let role = status.pools[1].backends[0].role.unwrap();
    assert!(role.changed && next.now - role.since > SECOND, "{role:?}");
}
