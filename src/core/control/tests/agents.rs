//! Pools whose probe asks an agent.

use super::*;
use crate::control::handover::Saved;
use crate::health::agent::{AgentReport, AgentVerdict, AgentWish};
use crate::health::{Intent, ProbeAnswer};
use crate::model::ProbeBytes;

fn agents() -> PoolConfig {
    let kind = ProbeKind::Agent { send: ProbeBytes::default() };
    let mut config = pool(&["a", "b"]);
    for backend in &mut config.backends {
        backend.weight = 10;
        backend.connections_max = 20;
    }
    PoolConfig { probe: Some(Arc::new(ProbeSpec { kind, ..probe_spec() })), ..config }
}

fn says() -> AgentReport {
    AgentReport::default()
}

fn share(percent: u32) -> AgentReport {
    AgentReport { share: Some(percent), ..says() }
}

fn wish(wish: AgentWish) -> AgentReport {
    AgentReport { wish: Some(wish), ..says() }
}

fn verdict(verdict: AgentVerdict) -> AgentReport {
    AgentReport { verdict: Some(verdict), ..says() }
}

impl Bench {
    /// Lets the agent of `a` answer its next probe; the agents of others say `up`.
    fn agent_says(&mut self, answer: Option<AgentReport>) -> Vec<ControlEffect> {
        let a = self.id("a");
        let mut effects = Vec::new();
        loop {
            let mut heard = false;
            for (backend, token) in std::mem::take(&mut self.asked) {
                heard |= backend == a;
                let report =
                    if backend == a { answer.clone() } else { Some(verdict(AgentVerdict::Up)) };
                let outcome = match report {
                    Some(report) => ProbeOutcome::Success {
                        took: Duration::ZERO,
                        answer: ProbeAnswer::Agent(Box::new(report)),
                    },
                    None => ProbeOutcome::failure("no answer"),
                };
                effects.extend(self.apply(ControlEvent::Probed { backend, token, outcome }));
            }
            if heard {
                // Tables of slight changes can be delayed.
                self.now += Duration::from_millis(200);
                effects.extend(self.apply(ControlEvent::Tick));
                return effects;
            }
            self.now = self.controller.next_due().expect("a probe is due");
            effects.extend(self.apply(ControlEvent::Tick));
        }
    }

    /// Effective weight and cap of `a` in the table; `None` if it is not eligible.
    fn weight_of_a(&self) -> Option<f64> {
        let status = self.controller.status(self.now);
        let a = status.pools[0].backends.iter().find(|backend| &*backend.state.name == "a");
        a.filter(|a| a.eligible).map(|a| a.effective_weight)
    }

    fn in_rotation(&self) -> String {
        let table = self.controller.current_table();
        let names = table.pools[0].serving.iter().map(|state| &*state.name);
        names.collect::<Vec<_>>().join(" ")
    }
}

#[test]
fn agent_sets_the_share_of_the_weight_and_keeps_what_it_does_not_mention() {
    let mut bench = Bench::new(agents());
    bench.agent_says(Some(verdict(AgentVerdict::Up)));
    assert_eq!(bench.weight_of_a(), Some(10.0));
    bench.agent_says(Some(share(30)));
    assert_eq!(bench.weight_of_a(), Some(3.0));
    bench.agent_says(Some(verdict(AgentVerdict::Up)));
    assert_eq!(bench.weight_of_a(), Some(3.0), "up does not mention the weight");
    bench.agent_says(Some(share(400)));
    assert_eq!(bench.weight_of_a(), Some(10.0), "never above the configured weight");
    let effects = bench.agent_says(Some(share(0)));
    assert_eq!(bench.in_rotation(), "b");
    let expected = "a: ready -> draining: agent says 0%; open sessions: 0";
    assert!(logs(&effects).iter().any(|line| line.starts_with(expected)), "{:?}", logs(&effects));
}

#[test]
fn agent_drains_and_only_the_agent_undrains() {
    let mut bench = Bench::new(agents());
    bench.agent_says(Some(verdict(AgentVerdict::Up)));
    for drain in [AgentWish::Drain, AgentWish::Maint] {
        bench.agent_says(Some(wish(drain)));
        assert_eq!(bench.in_rotation(), "b");
        bench.agent_says(Some(verdict(AgentVerdict::Up)));
        bench.agent_says(None);
        assert_eq!(bench.in_rotation(), "b", "neither up nor silence means ready");
        bench.agent_says(Some(wish(AgentWish::Ready)));
        assert_eq!(bench.in_rotation(), "a b");
    }
}

#[test]
fn verdict_of_an_agent_decides_alone_and_its_silence_counts_up_to_fall() {
    let mut bench = Bench::new(agents());
    bench.agent_says(Some(verdict(AgentVerdict::Up)));
    bench.agent_says(Some(verdict(AgentVerdict::Down)));
    assert_eq!(bench.in_rotation(), "b");
    for _ in 0..5 {
        bench.agent_says(Some(share(100)));
        assert_eq!(bench.in_rotation(), "b", "only up ends down");
    }
    bench.agent_says(Some(verdict(AgentVerdict::Up)));
    assert_eq!(bench.in_rotation(), "a b");
    bench.agent_says(None);
    bench.agent_says(None);
    assert_eq!(bench.in_rotation(), "a b", "fall is 3");
    bench.agent_says(None);
    assert_eq!(bench.in_rotation(), "b");
}

#[test]
fn agent_never_overrides_an_operator() {
    let mut bench = Bench::new(agents());
    bench.agent_says(Some(verdict(AgentVerdict::Up)));
    bench.operator("a", Intent::Draining);
    let all = AgentReport { share: Some(100), ..wish(AgentWish::Ready) };
    bench.agent_says(Some(AgentReport { verdict: Some(AgentVerdict::Up), ..all }));
    assert_eq!(bench.in_rotation(), "b");
    bench.agent_says(Some(wish(AgentWish::Drain)));
    bench.operator("a", Intent::Ready);
    assert_eq!(bench.in_rotation(), "b", "the agent still drains it");
    bench.agent_says(Some(wish(AgentWish::Ready)));
    assert_eq!(bench.in_rotation(), "a b");
}

#[test]
fn words_of_agents_survive_an_upgrade_and_end_with_another_kind_of_probe() {
    let mut bench = Bench::new(agents());
    bench.agent_says(Some(verdict(AgentVerdict::Up)));
    bench.agent_says(Some(AgentReport { share: Some(50), ..wish(AgentWish::Drain) }));
    let saved: Saved = {
        let text = serde_json::to_string(&bench.controller.save(bench.now)).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let mut successor = Bench::new(agents());
    successor.controller.adopt(&saved, successor.now);
    assert_eq!(successor.in_rotation(), "b");
    let tcp = PoolConfig { probe: Some(Arc::new(probe_spec())), ..agents() };
    let mut other = Bench::new(tcp.clone());
    other.controller.adopt(&saved, other.now);
    assert_eq!(other.in_rotation(), "a b", "no agent can say ready to a probe of another kind");
    bench.configure(tcp);
    assert_eq!(bench.in_rotation(), "a b");
}
