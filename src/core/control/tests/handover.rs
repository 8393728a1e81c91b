//! What the next process knows when it takes over.

use super::*;
use crate::control::handover::Saved;
use crate::control::sessions_elsewhere::{HeldBackend, HeldFrontend};
use crate::control::tests::slow_backends::watched;
use proptest::prelude::*;

/// A controller of another process that goes on with what `old` knew, after the
/// way through text.
fn successor(old: &Bench, pool: PoolConfig) -> Bench {
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
    let next = successor(&old, pool(&["a", "b"]));
    assert_eq!(next.serving(), ["b"]);
    assert_eq!(next.status("a").observation, Observation::Down);
    assert_eq!(next.controller.generation(), old.controller.generation());
    assert!(next.controller.current_table().serial > old.controller.current_table().serial);
}

#[test]
fn a_backend_that_is_new_waits_for_its_first_result() {
    let old = Bench::up(pool(&["a"]));
    let mut next = successor(&old, pool(&["a", "n"]));
    assert_eq!(next.serving(), ["a"]);
    next.pass(GRACE * 2);
    assert_eq!(next.serving(), ["a"], "the pool is known: nobody fails open");
}

#[test]
fn an_operators_drain_and_health_go_by_the_address() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.operator("a", Intent::Draining);
    let same = successor(&old, pool(&["a", "b"]));
    assert_eq!(same.status("a").intent, Intent::Draining);
    let mut moved = successor(&old, pool(&["a@9", "b"]));
    assert_eq!(moved.status("a").intent, Intent::Ready);
    assert_eq!(moved.status("a").observation, Observation::Unknown);
    moved.configure(pool(&["a", "b"]));
    assert_eq!(moved.status("a").intent, Intent::Draining, "it has come back");
}

#[test]
fn a_drained_backend_that_is_out_of_the_file_meanwhile_comes_back_drained() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.operator("a", Intent::Draining);
    old.configure(pool(&["b"]));
    old.pass(Duration::from_secs(5));
    let back = successor(&old, pool(&["a", "b"]));
    assert_eq!(back.status("a").intent, Intent::Draining);
    let mut later = successor(&old, pool(&["b"]));
    later.pass(Duration::from_secs(5));
    later.configure(pool(&["a", "b"]));
    assert_eq!(later.status("a").intent, Intent::Draining);
    assert_eq!(later.serving(), ["b"]);
}

/// As after a crash: intents are written at once, all else now and then.
#[test]
fn intents_that_are_newer_than_all_else_rule() {
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

/// As where the next process ends in its first second.
#[test]
fn intents_of_the_next_process_are_taken_back_by_the_one_before() {
    let mut old = Bench::up(pool(&["a", "b", "c", "d"]));
    for name in ["a", "d"] {
        old.operator(name, Intent::Draining);
    }
    let mut next = successor(&old, pool(&["a", "b", "c"]));
    next.operator("a", Intent::Ready);
    next.operator("b", Intent::Draining);
    let newer = next.controller.save_intents(next.now);
    old.controller.adopt_intents(&newer, old.now);
    let intents = ["a", "b", "c", "d"].map(|name| old.status(name).intent);
    let (ready, draining) = (Intent::Ready, Intent::Draining);
    assert_eq!(intents, [ready, draining, ready, draining], "d was not configured there");
    assert_eq!(old.serving(), ["a", "c"]);
}

/// A pool that is missing for once does not put a drained backend back into service.
#[test]
fn intents_of_a_pool_that_left_are_kept_across_an_upgrade() {
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
fn history_goes_on_and_is_not_told_twice() {
    let mut old = Bench::up(pool(&["a", "b"]));
    old.pass(Duration::from_secs(7));
    old.operator("a", Intent::Draining);
    let reasons = |bench: &Bench| -> Vec<(String, Duration)> {
        let explained = bench.controller.explain("web", "a", bench.now).unwrap();
        let age = |t: &crate::health::Transition| bench.now - t.at;
        explained.history.iter().map(|t| (format!("{} {}", t.to, t.reason), age(t))).collect()
    };
    let mut next = successor(&old, pool(&["a", "b"]));
    assert_eq!(reasons(&next), reasons(&old));
    assert_eq!(reasons(&next).len(), 2);
    next.operator("a", Intent::Ready);
    let saved = old.controller.save(old.now);
    next.controller.adopt(&saved, next.now);
    assert_eq!(reasons(&next).len(), 3);
    let explained = next.controller.explain("web", "a", next.now).unwrap();
    assert_eq!(explained.history[0].to, "ready", "the newest is what happened here");
}

#[test]
fn what_a_program_without_heartbeats_and_history_says_is_understood() {
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
fn sessions_elsewhere_count_until_they_end_there() {
    let old = Bench::new(unprobed(&["a", "b"]));
    let mut next = successor(&old, unprobed(&["a", "b"]));
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

    // What leaves here is cut there as well.
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

    /// Twenty times as many take twenty times as long, not four hundred times.
    #[test]
    fn ten_thousand_backends_are_handed_over_in_no_time() {
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
                    next.find_saved(&pool.name, &one.name, &one.address).expect("it is there");
                }
            }
            let took = tidegate_net::clock::now() - began;
            assert!(took < Duration::from_secs(4), "{pools} x {each}: {took:?}");
        }
    }
}

#[test]
fn an_ejection_ends_when_it_would_have_ended() {
    let mut old = Bench::new(unprobed(&["a", "b"]));
    old.refuse("a", 1, 5);
    old.pass(Duration::from_secs(4));
    let mut next = successor(&old, unprobed(&["a", "b"]));
    assert!(next.status("a").ejected);
    assert_eq!(next.status("a").ejections_total, 1);
    next.pass(Duration::from_millis(5900));
    assert_eq!(next.serving(), ["b"]);
    next.pass(Duration::from_millis(200));
    assert_eq!(next.serving(), ["a", "b"]);
}

#[test]
fn a_suspect_stays_one_until_it_answers() {
    let spec = watched(&["a", "b", "c"]);
    let mut old = Bench::new(spec.clone());
    old.looks(10, &["a", "b", "c"], &[]);
    old.looks(10, &["a", "b"], &["c"]);
    assert_eq!(old.status("c").observation, Observation::Suspect);
    let mut next = successor(&old, spec.clone());
    assert_eq!(next.status("c").observation, Observation::Suspect);
    assert_eq!(next.status("c").effective_weight, 1.0);
    // Before anybody has asked anything there is no news of it.
    next.looks(5, &[], &[]);
    assert_eq!(next.status("c").observation, Observation::Suspect);
    next.looks(5, &["a", "b", "c"], &[]);
    assert_ne!(next.status("c").observation, Observation::Suspect);
    let unwatched = successor(&old, unprobed(&["a", "b", "c"]));
    assert_eq!(unwatched.status("c").effective_weight, 10.0, "nobody looks at it any more");
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
    let mut next = successor(&old, slow(&["a", "b", "late"]));
    assert_eq!((share(&next, "a"), share(&next, "b"), share(&next, "late")), (100, 100, 40));
    assert_eq!(next.status("late").effective_weight, 4.0);
    next.pass(Duration::from_millis(1100));
    assert_eq!(share(&next, "late"), 50);
    next.pass(Duration::from_secs(6));
    assert_eq!(share(&next, "late"), 100);
    // The pool has been in service for long: who comes now starts slowly.
    next.configure(slow(&["a", "b", "late", "new"]));
    assert_eq!(share(&next, "new"), 10);
}

#[test]
fn restarted_probes_begin_no_slow_start() {
    let slow = || PoolConfig { slow_start: Some(Duration::from_secs(10)), ..pool(&["a", "b"]) };
    let mut old = Bench::up(slow());
    old.answer_all_for(Duration::from_secs(20), None);
    let next = successor(&old, slow());
    assert_eq!(next.serving(), ["a", "b"]);
    assert_eq!(next.status("b").ramp_percent, 100);
}

#[test]
fn counts_go_on_and_may_be_brought_up_to_date() {
    let old = Bench::new(unprobed(&["a", "b"]));
    let counters = &old.status("a").state.counters;
    counters.of(0).sessions.add(5);
    counters.of(1).bytes_in.add(100);
    let mut next = successor(&old, unprobed(&["a"]));
    let state = next.status("a").state;
    state.counters.of(0).sessions.add(1);
    assert_eq!(state.counters.sum(|c| c.sessions.get()), 6);
    assert_eq!(state.counters.sum(|c| c.bytes_in.get()), 100);
    counters.of(1).sessions.add(2);
    next.controller.adopt_counts(&old.controller.save(old.now));
    assert_eq!(state.counters.sum(|c| c.sessions.get()), 8);
}

#[test]
fn tables_made_before_go_on_being_counted_by_their_reason() {
    let mut old = Bench::new(unprobed(&["a", "b"]));
    old.refuse("a", 1, 5);
    // The ejection ends here: the next process makes no table for it.
    old.pass(Duration::from_secs(60));
    let published = |bench: &Bench| bench.controller.status(bench.now).published;
    let before = published(&old);
    let next = successor(&old, unprobed(&["a", "b"]));
    for ((reason, was), (_, is)) in before.iter().zip(published(&next)) {
        assert!(is >= *was, "{reason:?} fell from {was} to {is}");
    }
}

#[test]
fn a_round_robin_goes_on_where_it_was() {
    let old = Bench::new(unprobed(&["a", "b", "c"]));
    let pick = |bench: &Bench| {
        let key = crate::balance::PickKey { client: [127, 0, 0, 1].into(), draw: 0, at: 0 };
        let table = bench.controller.current_table();
        table.pools[0].pick(key, &[]).unwrap().backend().name.to_string()
    };
    let before: Vec<String> = (0..4).map(|_| pick(&old)).collect();
    let next = successor(&old, unprobed(&["a", "b", "c"]));
    let after: Vec<String> = (0..2).map(|_| pick(&next)).collect();
    assert_eq!([before, after].concat(), ["a", "b", "c", "a", "b", "c"]);
}

#[test]
fn a_pool_that_serves_without_results_goes_on_doing_so() {
    let mut old = Bench::new(pool(&["a"]));
    old.pass(GRACE * 2);
    assert_eq!(old.serving(), ["a"]);
    assert_eq!(successor(&old, pool(&["a"])).serving(), ["a"]);
}

proptest! {
    #[test]
    fn whatever_is_said_nothing_breaks(text in "\\PC{0,40}", n: u64, turn: (u64, u64)) {
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
