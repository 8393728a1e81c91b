//! State of the new process after an upgrade.

use super::*;
use crate::control::handover::Saved;
use crate::control::sessions_elsewhere::{HeldBackend, HeldFrontend};
use crate::control::tests::slow_backends::watched;
use crate::model::Tiers;
use proptest::prelude::*;

/// Returns the controller of a new process with the state of `old`, passed as JSON.
fn new_process(old: &Bench, pool: PoolConfig) -> Bench {
    let text = serde_json::to_string(&old.controller.save(old.now)).unwrap();
    let saved: Saved = serde_json::from_str(&text).unwrap();
    let mut next =
        Bench { controller: Controller::new(2, 2), began: old.now, now: old.now, asked: vec![] };
    next.controller.add_carried_counts(saved.generation - 1, saved.serial);
    next.configure(pool);
    let effects = next.controller.adopt(&saved, next.now);
    next.note(effects);
    next
}

#[test]
fn verdict_is_kept_and_no_session_waits_for_a_probe() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.refuse("a", 1, 3);
    assert_eq!(old.serving(), ["b"]);
    let next = new_process(&old, pool(&["a", "b"]));
    assert_eq!(next.serving(), ["b"]);
    assert_eq!(next.status("a").observation, Observation::Down);
    assert_eq!(next.controller.generation(), old.controller.generation());
    assert!(next.controller.current_table().serial > old.controller.current_table().serial);
}

#[test]
fn new_backend_waits_for_its_first_result_after_an_upgrade() {
    let old = Bench::up(pool(&["a"]));
    let mut next = new_process(&old, pool(&["a", "n"]));
    assert_eq!(next.serving(), ["a"]);
    next.pass(GRACE * 2);
    assert_eq!(next.serving(), ["a"], "the pool has results, so it does not fail open");
}

#[test]
fn drain_and_health_belong_to_the_address() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.operator("a", Intent::Draining);
    let same = new_process(&old, pool(&["a", "b"]));
    assert_eq!(same.status("a").intent, Intent::Draining);
    let mut moved = new_process(&old, pool(&["a@9", "b"]));
    assert_eq!(moved.status("a").intent, Intent::Ready);
    assert_eq!(moved.status("a").observation, Observation::Unknown);
    moved.configure(pool(&["a", "b"]));
    assert_eq!(moved.status("a").intent, Intent::Draining, "the old address is back");
}

#[test]
fn drained_backend_missing_during_an_upgrade_returns_drained() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.operator("a", Intent::Draining);
    old.configure(pool(&["b"]));
    old.pass(Duration::from_secs(5));
    let back = new_process(&old, pool(&["a", "b"]));
    assert_eq!(back.status("a").intent, Intent::Draining);
    let mut later = new_process(&old, pool(&["b"]));
    later.pass(Duration::from_secs(5));
    later.configure(pool(&["a", "b"]));
    assert_eq!(later.status("a").intent, Intent::Draining);
    assert_eq!(later.serving(), ["b"]);
}

/// After a crash, the saved intents are newer than the rest of the state.
#[test]
fn newer_intents_take_precedence() {
    let mut old = Bench::up(pool(&["a", "b", "c"]));
    old.operator("a", Intent::Draining);
    let mut known = old.controller.save(old.now).without_counts();
    old.operator("a", Intent::Ready);
    old.operator("b", Intent::Draining);
    old.operator("c", Intent::Draining);
    old.configure(pool(&["a", "b"]));
    let text = serde_json::to_string(&old.controller.save_intents(old.now)).unwrap();
    known.set_intents(&serde_json::from_str(&text).unwrap());
    let mut next = Bench::new(pool(&["a", "b", "c"]));
    next.controller.adopt(&known, next.now);
    let intents = ["a", "b", "c"].map(|name| next.status(name).intent);
    assert_eq!(intents, [Intent::Ready, Intent::Draining, Intent::Draining]);
    assert_eq!(next.status("b").observation, Observation::Up);
}

/// The new process ends in its first second.
#[test]
fn old_process_adopts_the_intents_of_a_new_process_that_ended() {
    let mut old = Bench::up(pool(&["a", "b", "c", "d"]));
    for name in ["a", "d"] {
        old.operator(name, Intent::Draining);
    }
    let mut next = new_process(&old, pool(&["a", "b", "c"]));
    next.operator("a", Intent::Ready);
    next.operator("b", Intent::Draining);
    let newer = next.controller.save_intents(next.now);
    old.controller.adopt_intents(&newer, old.now);
    let intents = ["a", "b", "c", "d"].map(|name| old.status(name).intent);
    let (ready, draining) = (Intent::Ready, Intent::Draining);
    assert_eq!(intents, [ready, draining, ready, draining], "d was not configured there");
    assert_eq!(old.serving(), ["a", "c"]);
}

/// A pool missing from one configuration does not return a drained backend to rotation.
#[test]
fn intents_of_a_removed_pool_survive_an_upgrade() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.operator("a", Intent::Draining);
    let mut next = Bench::new(PoolConfig { name: "other".into(), ..pool(&["x"]) });
    next.controller.adopt(&old.controller.save(old.now), next.now);
    let newer = next.controller.save_intents(next.now);
    old.controller.adopt_intents(&newer, old.now);
    assert_eq!(old.status("a").intent, Intent::Draining);
    next.configure(pool(&["a", "b"]));
    assert_eq!(next.status("a").intent, Intent::Draining);
}

#[test]
fn history_continues_after_an_upgrade_without_duplicates() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.pass(Duration::from_secs(7));
    old.operator("a", Intent::Draining);
    let reasons = |bench: &Bench| -> Vec<(String, Duration)> {
        let explained = bench.controller.explain("web", "a", bench.now).unwrap();
        let age = |t: &crate::health::Transition| bench.now - t.at;
        explained.history.iter().map(|t| (format!("{} {}", t.to, t.reason), age(t))).collect()
    };
    let mut next = new_process(&old, pool(&["a", "b"]));
    assert_eq!(reasons(&next), reasons(&old));
    assert_eq!(reasons(&next).len(), 2);
    next.operator("a", Intent::Ready);
    let saved = old.controller.save(old.now);
    next.controller.adopt(&saved, next.now);
    assert_eq!(reasons(&next).len(), 3);
    let explained = next.controller.explain("web", "a", next.now).unwrap();
    assert_eq!(explained.history[0].to, "ready", "the newest transition is of this process");
}

#[test]
fn state_of_a_program_without_heartbeats_and_history_is_restored() {
    let saved: Saved = serde_json::from_str(
        r#"{"generation":1,"serial":9,"frontends":[{"name":"in","sessions":7,"bytes_in":0,
        "bytes_out":0,"refused":{},"untracked":0}],"pools":[{"name":"web","open":false,
        "turn":null,"in_service_ms":50,"backends":[{"name":"a","address":"127.0.0.1:1097",
        "intent":"draining","intent_ms":3,"eligible":false,"observation":"up",
        "observation_ms":5,"fails_open":false,"outlier":{"ejected":null,"back_ms":null,
        "repeats":0,"held_total":0,"ejections_total":0},"watch":{"suspect_ms":null,
        "usual":null},"ramp_ms":null,"sessions":4,"connect_failures":0,"bytes_in":0,
        "bytes_out":0}]}],"published":{},"heartbeats":0,"misfits":{},"excuses":0}"#,
    )
    .unwrap();
    let mut next = Bench::new(pool(&["a", "b"]));
    next.controller.adopt(&saved, next.now);
    assert_eq!(next.status("a").intent, Intent::Draining);
    assert_eq!(next.status("a").observation, Observation::Up);
    assert_eq!(next.status("a").state.counters.sum(|c| c.sessions.get()), 4);
}

#[test]
fn sessions_of_the_old_process_count_until_they_end() {
    let old = Bench::new(unprobed(&["a", "b"]));
    let mut next = new_process(&old, unprobed(&["a", "b"]));
    let address = next.status("a").state.address_text.to_string();
    let held = |name: &str, address: &str, sessions| HeldBackend {
        pool: "web".to_owned(),
        name: name.to_owned(),
        address: address.to_owned(),
        sessions,
        shared: false,
    };
    let frontends = [HeldFrontend { name: "in".to_owned(), sessions: 5, shared: false }];
    let backends = [held("a", &address, 2), held("gone", "127.0.0.9:9", 3)];
    next.controller.held_elsewhere(&backends, &frontends, next.now);
    let status = next.controller.status(next.now);
    assert_eq!(status.frontends[0].state.in_flight.get(), 5);
    assert_eq!(next.status("a").state.in_flight.get(), 2);
    assert!(!next.status("a").state.in_flight.try_enter(2), "caps count both");
    let leaving: Vec<_> = status.leaving.iter().map(|state| &*state.name).collect();
    assert_eq!(leaving, ["gone"]);

    // A removed backend's sessions are reset in the old process too.
    next.configure(PoolConfig {
        on_removal: OnRemoval::CloseAfter(Duration::from_secs(2)),
        ..unprobed(&["b"])
    });
    let a = next.controller.find_known("web", "a", &address).unwrap();
    assert_eq!(resets(&next.pass(Duration::from_millis(2100))), [a]);
    next.controller.held_elsewhere(&[held("gone", "127.0.0.9:9", 0)], &[], next.now);
    next.pass(Duration::from_secs(2));
    assert!(next.controller.find_known("web", "gone", "127.0.0.9:9").is_none());
    next.controller.held_here_alone();
    assert!(next.controller.status(next.now).leaving.is_empty());
}

mod alone {
    use super::*;

    fn many(prefix: &str, pools: u32, each: u32) -> Arc<Config> {
        let pool = |number: u32| PoolConfig {
            name: format!("{prefix}{number}").into(),
            backends: (0..each)
                .map(|one| BackendConfig {
                    name: format!("b{one}").into(),
                    address: BackendAddr::Tcp(
                        (std::net::Ipv4Addr::from_bits(number * each + one + 1), 80).into(),
                    ),
                    ..backend("a")
                })
                .collect(),
            ..unprobed(&[])
        };
        config((0..pools).map(pool).collect())
    }

    /// The time grows linearly with the number of backends.
    #[test]
    fn handover_of_10000_backends_takes_linear_time() {
        for (pools, each) in [(1, 10_000), (2_500, 4)] {
            let now = tidegate_net::clock::now();
            let mut old = Controller::new(1, 1);
            old.apply(ControlEvent::Configure(many("p", pools, each)), now);
            let saved = old.save(now);
            let mut next = Controller::new(1, 2);
            next.apply(ControlEvent::Configure(many("p", pools, each)), now);
            let began = tidegate_net::clock::now();
            next.adopt(&saved, now);
            assert!(next.serves_as(&saved));
            for pool in &saved.pools {
                for one in &pool.backends {
                    next.find_saved(&pool.name, &one.name, &one.address)
                        .expect("the backend was handed over");
                }
            }
            let took = tidegate_net::clock::now() - began;
            assert!(took < Duration::from_secs(4), "{pools} x {each}: {took:?}");
        }
    }
}

#[test]
fn ejection_ends_on_time_after_an_upgrade() {
    let mut old = Bench::new(unprobed(&["a", "b"]));
    old.refuse("a", 1, 5);
    old.pass(Duration::from_secs(4));
    let mut next = new_process(&old, unprobed(&["a", "b"]));
    assert!(next.status("a").ejected);
    assert_eq!(next.status("a").ejections_total, 1);
    next.pass(Duration::from_millis(5900));
    assert_eq!(next.serving(), ["b"]);
    next.pass(Duration::from_millis(200));
    assert_eq!(next.serving(), ["a", "b"]);
}

#[test]
fn suspect_stays_suspect_after_an_upgrade_until_it_answers() {
    let spec = watched(&["a", "b", "c"]);
    let mut old = Bench::new(spec.clone());
    old.looks(10, &["a", "b", "c"], &[]);
    old.looks(10, &["a", "b"], &["c"]);
    assert_eq!(old.status("c").observation, Observation::Suspect);
    let mut next = new_process(&old, spec.clone());
    assert_eq!(next.status("c").observation, Observation::Suspect);
    assert_eq!(next.status("c").effective_weight, 1.0);
    // Without new sessions there is no evidence.
    next.looks(5, &[], &[]);
    assert_eq!(next.status("c").observation, Observation::Suspect);
    next.looks(5, &["a", "b", "c"], &[]);
    assert_ne!(next.status("c").observation, Observation::Suspect);
    let unwatched = new_process(&old, unprobed(&["a", "b", "c"]));
    assert_eq!(unwatched.status("c").effective_weight, 10.0, "the detector is off");
}

#[test]
fn slow_start_continues_over_an_upgrade_and_no_other_begins() {
    let slow = |names: &[&str]| PoolConfig {
        slow_start: Some(Duration::from_secs(10)),
        ..unprobed(names)
    };
    let mut old = Bench::new(slow(&["a", "b"]));
    old.pass(Duration::from_secs(20));
    old.configure(slow(&["a", "b", "late"]));
    old.pass(Duration::from_secs(4));
    let share = |bench: &Bench, name: &str| bench.status(name).ramp_percent;
    assert_eq!((share(&old, "a"), share(&old, "late")), (100, 40));
    let mut next = new_process(&old, slow(&["a", "b", "late"]));
    assert_eq!((share(&next, "a"), share(&next, "b"), share(&next, "late")), (100, 100, 40));
    assert_eq!(next.status("late").effective_weight, 4.0);
    next.pass(Duration::from_millis(1100));
    assert_eq!(share(&next, "late"), 50);
    next.pass(Duration::from_secs(6));
    assert_eq!(share(&next, "late"), 100);
    // The pool has been in service for longer than slow_start, so a new backend starts slowly.
    next.configure(slow(&["a", "b", "late", "new"]));
    assert_eq!(share(&next, "new"), 10);
}

#[test]
fn restarted_probes_start_no_slow_start() {
    let slow = || PoolConfig { slow_start: Some(Duration::from_secs(10)), ..pool(&["a", "b"]) };
    let mut old = Bench::up(slow());
    old.answer_all_for(Duration::from_secs(20), None);
    let next = new_process(&old, slow());
    assert_eq!(next.serving(), ["a", "b"]);
    assert_eq!(next.status("b").ramp_percent, 100);
}

#[test]
fn counts_continue_after_an_upgrade_and_can_be_updated() {
    let old = Bench::new(unprobed(&["a", "b"]));
    let counters = &old.status("a").state.counters;
    counters.of(0).sessions.add(5);
    counters.of(1).bytes_in.add(100);
    let mut next = new_process(&old, unprobed(&["a"]));
    let state = next.status("a").state;
    state.counters.of(0).sessions.add(1);
    assert_eq!(state.counters.sum(|c| c.sessions.get()), 6);
    assert_eq!(state.counters.sum(|c| c.bytes_in.get()), 100);
    counters.of(1).sessions.add(2);
    next.controller.adopt_counts(&old.controller.save(old.now));
    assert_eq!(state.counters.sum(|c| c.sessions.get()), 8);
}

#[test]
fn table_counts_by_reason_continue_after_an_upgrade() {
    let mut old = Bench::new(unprobed(&["a", "b"]));
    old.refuse("a", 1, 5);
    // The ejection ends in the old process; the new process builds no table for it.
    old.pass(Duration::from_secs(60));
    let published = |bench: &Bench| bench.controller.status(bench.now).published;
    let before = published(&old);
    let next = new_process(&old, unprobed(&["a", "b"]));
    for ((reason, was), (_, is)) in before.iter().zip(published(&next)) {
        assert!(is >= *was, "{reason:?} decreased from {was} to {is}");
    }
}

#[test]
fn round_robin_continues_at_its_position_after_an_upgrade() {
    let old = Bench::new(unprobed(&["a", "b", "c"]));
    let pick = |bench: &Bench| {
        let key = crate::balance::PickKey { client: [127, 0, 0, 1].into(), draw: 0, at: 0 };
        let table = bench.controller.current_table();
        table.pools[0].pick(key, &[]).unwrap().backend().name.to_string()
    };
    let before: Vec<String> = (0..4).map(|_| pick(&old)).collect();
    let next = new_process(&old, unprobed(&["a", "b", "c"]));
    let after: Vec<String> = (0..2).map(|_| pick(&next)).collect();
    assert_eq!([before, after].concat(), ["a", "b", "c", "a", "b", "c"]);
}

#[test]
fn pool_that_fails_open_still_does_after_an_upgrade() {
    let mut old = Bench::new(pool(&["a"]));
    old.pass(GRACE * 2);
    assert_eq!(old.serving(), ["a"]);
    assert_eq!(new_process(&old, pool(&["a"])).serving(), ["a"]);
}

proptest! {
    #[test]
    fn arbitrary_saved_state_causes_no_panic(text in "\\PC{0,40}", n: u64, turn: (u64, u64)) {
        let mut old = Bench::up(pool(&["a", "b"]));
        let mut saved = old.controller.save(old.now);
        saved.pools[0].turn = Some(crate::balance::RoundRobinPosition { place: turn.0, period: turn.1 });
        let backend = &mut saved.pools[0].backends[0];
        backend.observation = text.clone();
        backend.intent = text;
        backend.intent_ms = n;
        backend.observation_ms = n;
        backend.outlier.ejected = Some((n, n));
        backend.outlier.repeats = n as u32;
        backend.sessions = n;
        old.controller.adopt(&saved, old.now);
        old.pass(Duration::from_secs(400));
        prop_assert!(!old.status("a").ejected);
    }
}

#[test]
fn every_tier_continues_its_round_robin() {
    let mut spec = unprobed(&["a", "b", "c", "d", "e"]);
    spec.tiers = Tiers::Spill;
    spec.backends[3..].iter_mut().for_each(|backend| backend.tier = 1);
    let mut old = Bench::new(spec.clone());
    old.operator("a", Intent::Draining);
    old.operator("b", Intent::Draining);
    let position = |bench: &Bench| -> Vec<(u8, u64)> {
        let table = bench.controller.current_table();
        let positions = table.pools[0].balancer.as_ref().unwrap().positions();
        positions.map(|(tier, turn)| (tier, turn.place)).collect()
    };
    let table = old.controller.current_table();
    for draw in 0..101 {
        let client = std::net::Ipv4Addr::LOCALHOST.into();
        let key = crate::balance::PickKey { client, draw, at: 0 };
        drop(table.pools[0].pick(key, &[]).unwrap());
    }
    let before = position(&old);
    assert_eq!(before.iter().map(|(tier, _)| *tier).collect::<Vec<_>>(), [0, 1]);
    let next = new_process(&old, spec);
    assert_eq!(position(&next), before);
}
