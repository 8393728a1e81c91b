//! Names and registries: verification, wishes, names with several addresses, first answers.

use super::*;
use crate::control::views::SourceStatus;
use crate::discovery::SourceFailure;
use crate::model;
use tidegate_heartbeat::SenderState;

mod carried;
mod detached;
mod registry;
mod together;

const PACE: Duration = publish::pacer::PACE;

impl Bench {
    /// Lets the `discover` table list these members with these wishes.
    fn wish(&mut self, members: &[(&str, Wish, &str)]) -> Vec<ControlEffect> {
        let members = members.iter().map(|(name, wish, raw)| Announced {
            wish: *wish,
            raw: (*raw).into(),
            ..announced(name)
        });
        self.told(None, whole_of(members.collect()))
    }

    /// Answers the probes of all backends but `failed`.
    fn answer_for(&mut self, span: Duration, failed: &[&str]) -> Vec<ControlEffect> {
        let end = self.now + span;
        let mut effects = Vec::new();
        loop {
            for (id, token) in std::mem::take(&mut self.asked) {
                let entry = self.controller.state.backends.get(id);
                let name = entry.map(|entry| entry.state.name.to_string()).unwrap_or_default();
                let failure = failed.contains(&name.as_str()).then_some("connect timed out");
                effects.extend(self.answer(id, token, failure));
            }
            let Some(due) = self.controller.next_due().filter(|due| *due <= end) else { break };
            self.now = due;
            effects.extend(self.apply(ControlEvent::Tick));
        }
        self.now = end;
        effects
    }

    fn names_in_status(&self) -> Vec<String> {
        let status = self.controller.status(self.now);
        status.pools[0].backends.iter().map(|one| one.state.name.to_string()).collect()
    }

    fn sources(&self) -> Vec<SourceStatus> {
        self.controller.status(self.now).pools.remove(0).sources
    }

    fn weight_of(&self, name: &str) -> f64 {
        self.status(name).effective_weight
    }
}

#[test]
fn member_of_a_registry_gets_sessions_after_one_connect() {
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    let effects = bench.list(&["b"]);
    let asked = effects.iter().find_map(|effect| match effect {
        ControlEffect::Probe { spec, .. } => Some(Arc::clone(spec)),
        _ => None,
    });
    let asked = asked.expect("a connect");
    assert_eq!((asked.kind.clone(), asked.timeout), (ProbeKind::Tcp, Duration::from_secs(5)));
    assert!(bench.status("b").unverified);
    bench.pass(PACE);
    assert_eq!(bench.serving(), ["a"], "no result yet");
    let effects = bench.answer_asked(None);
    bench.pass(PACE);
    assert_eq!(bench.serving(), ["a", "b"], "{:?}", logs(&effects));
    let silent = bench.answer_for(Duration::from_secs(60), &[]);
    assert_eq!(probes(&silent), 0, "verified once");
}

#[test]
fn failed_connects_are_repeated_at_growing_intervals() {
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    bench.list(&["b"]);
    let mut times = Vec::new();
    for _ in 0..8 {
        let (id, token) = bench.asked.pop().expect("a connect");
        let began = bench.now;
        bench.answer(id, token, Some("connection refused"));
        while bench.asked.is_empty() {
            bench.now = bench.controller.next_due().expect("a timer");
            bench.apply(ControlEvent::Tick);
        }
        times.push((bench.now - began).as_millis());
    }
    assert_eq!(times, [200, 400, 800, 1_600, 3_200, 5_000, 5_000, 5_000]);
    assert_eq!(bench.serving(), ["a"]);
    bench.answer_asked(None);
    bench.pass(PACE);
    assert_eq!(bench.serving(), ["a", "b"], "it recovers by itself");
}

#[test]
fn renamed_members_serve_without_another_connect() {
    let mut bench = Bench::new(discovering(unprobed(&[])));
    bench.list(&["b", "c"]);
    bench.answer_for(PACE * 2, &[]);
    assert_eq!(bench.serving(), ["b", "c"]);
    let effects = rename(&mut bench, &[("x", "b"), ("y", "c")]);
    bench.pass(PACE);
    assert_eq!(bench.serving(), ["x", "y"], "{:?}", logs(&effects));
    let later = bench.answer_for(Duration::from_secs(10), &[]);
    assert_eq!(probes(&effects) + probes(&later), 0);
}

/// Lists the addresses of these members under other names.
fn rename(bench: &mut Bench, names: &[(&str, &str)]) -> Vec<ControlEffect> {
    let renamed = names
        .iter()
        .map(|(name, before)| Announced { address: announced(before).address, ..announced(name) });
    bench.told(None, whole_of(renamed.collect()))
}

#[test]
fn members_that_are_renamed_together_keep_the_results_of_their_probes() {
    let mut bench = Bench::new(discovering(pool(&[])));
    bench.list(&["b", "c", "d"]);
    bench.answer_for(Duration::from_secs(30), &["d"]);
    assert_eq!(bench.serving(), ["b", "c"]);
    let effects = rename(&mut bench, &[("x", "b"), ("y", "c"), ("z", "d")]);
    bench.pass(PACE);
    assert_eq!(bench.serving(), ["x", "y"], "{:?}", logs(&effects));
    assert_eq!(bench.status("z").observation, Observation::Down);
    bench.pass(Duration::from_secs(60));
    assert_eq!(bench.serving(), ["x", "y"], "no grace makes z fail open");
    let effects = bench.answer_for(Duration::from_secs(30), &[]);
    assert!(probes(&effects) >= 3, "all are probed");
    assert_eq!(bench.serving(), ["x", "y", "z"]);
}

#[test]
fn renamed_member_that_is_ejected_stays_ejected() {
    let mut bench = Bench::new(discovering(unprobed(&[])));
    bench.list(&["b", "c", "d"]);
    bench.answer_for(PACE * 2, &[]);
    bench.refuse("b", 1, 5);
    assert_eq!(bench.serving(), ["c", "d"]);
    rename(&mut bench, &[("x", "b"), ("y", "c"), ("z", "d")]);
    bench.pass(PACE);
    assert_eq!(bench.serving(), ["y", "z"]);
    bench.pass(Duration::from_secs(11));
    assert_eq!(bench.serving(), ["x", "y", "z"], "it is on trial");
}

#[test]
fn connect_without_a_result_is_repeated() {
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    bench.list(&["b"]);
    bench.asked.clear();
    bench.pass(Duration::from_secs(11));
    assert_eq!(bench.asked.len(), 1, "after the timeout and a margin");
}

#[test]
fn unverified_members_fail_open_only_if_no_backend_is_eligible() {
    let mut bench = Bench::new(discovering(unprobed(&[])));
    bench.list(&["b", "c"]);
    let effects = bench.answer_for(GRACE - Duration::from_millis(1), &["b", "c"]);
    assert!(bench.serving().is_empty(), "{:?}", logs(&effects));
    let effects = bench.answer_for(PACE * 2, &["b", "c"]);
    assert_eq!(bench.serving(), ["b", "c"]);
    assert!(logs(&effects)[0].contains("failing open"), "{:?}", logs(&effects));
    bench.answer_for(Duration::from_secs(20), &["b"]);
    assert_eq!(bench.serving(), ["c"], "a member that answers replaces those that do not");
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    bench.list(&["b"]);
    bench.answer_for(Duration::from_secs(60), &["b"]);
    assert_eq!(bench.serving(), ["a"], "a backend is eligible");
}

#[test]
fn unverified_members_fail_open_when_the_last_verified_one_is_drained() {
    let mut bench = Bench::new(discovering(unprobed(&["a"])));
    bench.list(&["b"]);
    bench.answer_for(GRACE * 2, &["b"]);
    bench.operator("a", Intent::Draining);
    assert!(bench.serving().is_empty());
    bench.answer_for(Duration::from_secs(11), &["b"]);
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn first_probe_decides_in_a_pool_with_probes() {
    let mut bench = Bench::up(discovering(pool(&["a"])));
    bench.list(&["b"]);
    assert!(!bench.status("b").unverified);
    bench.answer_for(Duration::from_secs(1), &["b"]);
    assert_eq!(bench.serving(), ["a"]);
    assert_eq!(bench.status("b").observation, Observation::Down);
}

#[test]
fn wishes_exclude_new_sessions_and_come_and_go() {
    let mut bench = Bench::up(discovering(pool(&["a"])));
    let (yes, no) = (Wish::Sessions, Wish::Draining);
    bench.wish(&[("b", yes, "passing"), ("c", Wish::Starting, "starting"), ("d", yes, "")]);
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving(), ["a", "b", "d"]);
    let effects = bench.wish(&[("b", no, "maintenance"), ("c", yes, ""), ("d", yes, "")]);
    assert_eq!(
        logs(&effects),
        [
            "b: ready -> draining: wish of a member source: file: maintenance; open sessions: 0",
            "c: starting -> ready: its member sources wish for sessions again"
        ]
    );
    bench.answer_for(PACE * 2, &[]);
    assert_eq!(bench.serving(), ["a", "c", "d"]);
    let status = bench.status("b");
    let (reason, _) = status.state.left_out().expect("a reason");
    assert_eq!(reason.name(), "draining-by-registry");
    assert_eq!(status.wished_by.as_deref(), Some("file"));
    assert_eq!(bench.status("c").wished_by, None);
}

#[test]
fn wish_of_a_registry_never_makes_a_backend_eligible_that_is_down_here() {
    let mut bench = Bench::up(discovering(pool(&["a", "b"])));
    bench.wish(&[("b", Wish::Draining, ""), ("z", Wish::Sessions, "")]);
    bench.answer_for(Duration::from_secs(10), &["b"]);
    assert_eq!(bench.status("b").observation, Observation::Down);
    bench.wish(&[("b", Wish::Sessions, "passing"), ("z", Wish::Sessions, "")]);
    bench.answer_for(Duration::from_secs(2), &["b"]);
    assert_eq!(bench.serving(), ["a", "z"], "the probe decides");
}

#[test]
fn wish_applies_to_backends_of_the_file_and_goes_with_the_source() {
    let mut bench = Bench::up(discovering(pool(&["a", "b"])));
    bench.wish(&[("b", Wish::Draining, ""), ("z", Wish::Sessions, "")]);
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving(), ["a", "z"]);
    bench.list(&["z"]);
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving(), ["a", "b", "z"]);
}

#[test]
fn suspect_member_keeps_a_tenth_of_its_weight() {
    let guards = ViewGuards { critical: model::CriticalRule::Suspect, ..open_guards() };
    let mut bench = Bench::up(discovering_with(pool(&["a"]), guards));
    bench.list(&["b", "c", "d"]);
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.weight_of("b"), 10.0);
    let all =
        [("b", Wish::Critical, "critical"), ("c", Wish::Sessions, ""), ("d", Wish::Sessions, "")];
    bench.wish(&all);
    bench.answer_for(Duration::from_secs(3), &[]);
    assert_eq!(bench.weight_of("b"), 1.0);
    assert_eq!(bench.status("b").observation, Observation::Suspect);
    assert_eq!(bench.weight_of("a"), 10.0);
}

#[test]
fn name_makes_one_member_per_address() {
    let mut bench = Bench::new(naming(unprobed(&[])));
    assert_eq!(bench.controller.undecided_pools(), 1);
    bench.resolve(&[4001, 4002]);
    bench.answer_for(PACE * 2, &[]);
    assert_eq!(bench.serving(), ["db@127.0.0.1:4001", "db@127.0.0.1:4002"]);
    let member = bench.status("db@127.0.0.1:4002");
    assert_eq!((member.weight, member.connections_max, member.tier), (7, 5, 0));
    assert_eq!(member.origins, Origins::of(MemberSource::Names));
    assert_eq!(bench.sources()[0].label.as_ref(), "name db.internal:5432");
    let asked = bench.controller.explain("web", "db", bench.now).map(drop);
    let members = ["db@127.0.0.1:4001".into(), "db@127.0.0.1:4002".into()];
    assert_eq!(asked.unwrap_err(), OperatorError::Members(members.into()));
}

#[test]
fn weights_of_srv_records_multiply_the_weight_in_the_file_and_keep_their_ratios() {
    let mut pool = naming(unprobed(&[]));
    let question = &mut pool.named[0].question;
    (question.record, question.port) = (NameRecord::Srv, None);
    pool.named[0].weight = 100;
    let mut bench = Bench::new(pool);
    let members = [("x@4001", 60), ("y@4002", 30), ("z@4003", 0)];
    let members =
        members.map(|(name, weight)| Announced { weight: Some(weight), ..announced(name) });
    bench.told(Some("db"), whole_of(members.into()));
    let weights: Vec<u32> =
        [4001, 4002, 4003].map(|port| bench.status(&format!("db@127.0.0.1:{port}")).weight).into();
    assert_eq!(&weights[..2], [1000, 500], "the products 6,000 and 3,000, scaled down");
    assert!((1..=16).contains(&weights[2]), "never 0: {weights:?}");
}

#[test]
fn drain_of_a_name_takes_all_members_also_later_ones() {
    let mut bench = Bench::new(naming(unprobed(&["a"])));
    bench.resolve(&[4001, 4002]);
    bench.answer_for(PACE * 2, &[]);
    let effects = bench.operator("db", Intent::Draining);
    assert_eq!(logs(&effects).len(), 2, "{:?}", logs(&effects));
    assert_eq!(bench.serving(), ["a"]);
    bench.resolve(&[4001, 4002, 4003]);
    bench.answer_for(PACE * 2, &[]);
    assert_eq!(bench.status("db@127.0.0.1:4003").intent, Intent::Draining);
    bench.configure(naming(unprobed(&["a", "b"])));
    bench.resolve(&[4001, 4002, 4003, 4004]);
    bench.answer_for(PACE * 2, &[]);
    assert_eq!(bench.serving(), ["a", "b"], "the intent outlives a reload");
    bench.operator("db", Intent::Ready);
    assert_eq!(bench.serving().len(), 6, "{:?}", bench.serving());
    bench.operator("db@127.0.0.1:4002", Intent::Draining);
    assert_eq!(bench.serving().len(), 5);
    assert_eq!(bench.status("db@127.0.0.1:4001").intent, Intent::Ready);
    bench.resolve(&[4001, 4002, 4005]);
    assert_eq!(bench.status("db@127.0.0.1:4005").intent, Intent::Ready, "one was drained");
}

#[test]
fn member_that_left_during_a_revoked_drain_returns_without_it() {
    let mut bench = Bench::new(naming(unprobed(&["a"])));
    bench.resolve(&[4001, 4002]);
    bench.operator("db", Intent::Draining);
    bench.resolve(&[4001]);
    bench.resolve(&[4001]);
    bench.answer_for(Duration::from_secs(60), &[]);
    bench.resolve(&[4001]);
    bench.answer_for(Duration::from_secs(60), &[]);
    assert_eq!(bench.names_in_status(), ["a", "db@127.0.0.1:4001"]);
    bench.operator("db", Intent::Ready);
    bench.resolve(&[4001, 4002]);
    assert_eq!(bench.status("db@127.0.0.1:4002").intent, Intent::Ready);
}

#[test]
fn pool_is_undecided_until_the_first_answer_or_first_wait() {
    let mut bench = Bench::new(discovering(unprobed(&[])));
    assert_eq!(bench.controller.undecided_pools(), 1);
    let (why, detail) = (SourceFailure::Connect, "connection refused".to_owned());
    bench.told(None, Told::Failed { why, detail });
    bench.pass(Duration::from_millis(9_900));
    assert_eq!(bench.controller.undecided_pools(), 1, "a failure is no answer");
    bench.pass(Duration::from_millis(200));
    assert_eq!(bench.controller.undecided_pools(), 0, "first_wait has passed");
    let mut bench = Bench::new(discovering(unprobed(&[])));
    bench.list(&["b"]);
    bench.answer_for(PACE * 2, &[]);
    assert_eq!((bench.controller.undecided_pools(), bench.serving()), (0, vec!["b".into()]));
    let mut bench = Bench::new(discovering(unprobed(&[])));
    bench.list(&["b"]);
    bench.pass(GRACE - Duration::from_millis(100));
    assert_eq!(bench.controller.undecided_pools(), 1, "its first result is missing");
    let bench = Bench::new(discovering(unprobed(&["a"])));
    assert_eq!(bench.controller.undecided_pools(), 0, "the file has an eligible backend");
}

#[test]
fn pool_with_names_waits_two_seconds_for_them() {
    let mut bench = Bench::new(naming(unprobed(&[])));
    bench.pass(Duration::from_millis(1_900));
    assert_eq!(bench.controller.undecided_pools(), 1);
    bench.pass(Duration::from_millis(200));
    assert_eq!(bench.controller.undecided_pools(), 0);
}

#[test]
fn members_of_a_changed_question_stay_until_the_first_answer() {
    let guards = ViewGuards { max_removed: 10, overlap: Duration::from_secs(10), ..open_guards() };
    let mut bench = Bench::new(discovering_with(unprobed(&[]), guards.clone()));
    bench.list(&["b", "c"]);
    bench.answer_for(PACE * 2, &[]);
    let mut other = discovering_with(unprobed(&[]), guards);
    let spec = Arc::make_mut(other.discover.as_mut().unwrap());
    spec.question = SourceQuestion::File { path: "/others.json".into() };
    let effects = bench.configure(other.clone());
    assert!(logs(&effects).is_empty());
    assert_eq!(bench.serving(), ["b", "c"], "a reload loses no member");
    assert!(bench.sources()[0].moved);
    bench.list(&["x", "y"]);
    assert_eq!(bench.serving(), ["b", "c"], "the new ones are not verified");
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving(), ["x", "y"], "no share of removals holds this answer");
    assert!(!bench.sources()[0].moved);
    bench.configure(other);
    assert_eq!(bench.serving(), ["x", "y"], "the same question");
}

#[test]
fn registration_by_heartbeat_and_a_registry_agree_on_one_backend() {
    let spec = model::HeartbeatSpec {
        register: true,
        require: false,
        interval: Duration::from_millis(100),
        ttl: Duration::from_secs(10),
        forget_after: Duration::from_secs(60),
        backends_max: 10,
        weight_max: 100,
    };
    let pool = PoolConfig { heartbeat: Some(Arc::new(spec)), ..discovering(unprobed(&["a"])) };
    let mut bench = Bench::new(pool);
    bench.list(&["b"]);
    bench.hear_from("b", 1, SenderState::Ready);
    bench.answer_for(Duration::from_millis(300), &[]);
    assert_eq!(bench.serving(), ["a", "b"]);
    bench.hear_from("b", 9, SenderState::Draining);
    bench.answer_for(PACE * 2, &[]);
    assert_eq!(bench.serving(), ["a"], "the most restrictive word holds");
    assert_eq!(bench.names_in_status(), ["a", "b"]);
}
