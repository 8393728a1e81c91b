//! Operators' requests and reloads.

use super::*;
use crate::control::removal;

#[test]
fn draining_is_logged_once_and_idempotent() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    let effects = bench.operator("a", Intent::Draining);
    assert_eq!(publishes(&effects), 1);
    assert_eq!(logs(&effects), ["a: ready -> draining: operator: drain; open sessions: 0"]);
    assert_eq!(bench.serving(), ["b"]);
    assert!(bench.operator("a", Intent::Draining).is_empty());
    let effects = bench.operator("a", Intent::Ready);
    assert_eq!(logs(&effects), ["a: draining -> ready: operator: undrain"]);
    assert_eq!(bench.serving(), ["a", "b"]);
}

#[test]
fn unknown_pool_and_unknown_backend_are_different_errors() {
    let mut bench = Bench::new(unprobed(&["a"]));
    let now = bench.now;
    let mut set = |pool, name| bench.controller.set_intent(pool, name, Intent::Draining, now);
    assert_eq!(set("nope", "a").unwrap_err(), OperatorError::UnknownPool);
    assert_eq!(set("web", "nope").unwrap_err(), OperatorError::UnknownBackend);
}

#[test]
fn drain_survives_reloads_and_does_not_move_to_another_address() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.operator("a", Intent::Draining);
    bench.configure(unprobed(&["b", "a"]));
    assert_eq!(bench.serving(), ["b"]);
    bench.configure(unprobed(&["b", "a@4711"]));
    assert_eq!(bench.serving(), ["b", "a"]);
    assert_eq!(bench.status("a").intent, Intent::Ready);
    bench.configure(unprobed(&["b", "a"]));
    assert_eq!(bench.status("a").intent, Intent::Draining, "the drained address");
}

#[test]
fn drained_backend_returns_drained_within_ten_minutes() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.operator("a", Intent::Draining);
    for away in [Duration::from_millis(1500), REMOVED_INTENTS_FOR - Duration::from_secs(1)] {
        bench.configure(unprobed(&["b"]));
        bench.pass(away);
        bench.configure(unprobed(&["a", "b"]));
        assert_eq!(bench.status("a").intent, Intent::Draining, "after {away:?}");
        assert_eq!(bench.serving(), ["b"]);
    }
    bench.configure(unprobed(&["b"]));
    bench.pass(REMOVED_INTENTS_FOR);
    bench.configure(unprobed(&["a", "b"]));
    assert_eq!(bench.status("a").intent, Intent::Ready, "dropped after ten minutes");
}

#[test]
fn draining_a_down_backend_causes_no_table() {
    let mut bench = Bench::new(pool(&["a"]));
    bench.answer_all_for(Duration::from_millis(1), Some("broken"));
    assert_eq!(publishes(&bench.operator("a", Intent::Draining)), 0);
    let last_resort =
        PoolConfig { when_none_eligible: WhenNoneEligible::TryAll, ..pool(&["a", "b"]) };
    let mut bench = Bench::new(last_resort);
    assert_eq!(publishes(&bench.operator("a", Intent::Draining)), 1, "try-all can pick it");
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn backend_keeps_its_state_across_a_reload() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let before = bench.status("a").state;
    let frontend = Arc::clone(&bench.controller.status(bench.now).frontends[0].state);
    let mut changed = PoolConfig { balance: Policy::LeastConnections, ..pool(&["b", "a"]) };
    changed.backends[1].weight = 77;
    changed.backends[1].connections_max = 5;
    let effects = bench.configure(changed);
    assert!(Arc::ptr_eq(&before, &bench.status("a").state));
    assert!(Arc::ptr_eq(&frontend, &bench.controller.status(bench.now).frontends[0].state));
    assert_eq!((bench.status("a").weight, bench.status("a").effective_weight), (77, 77.0));
    assert_eq!(bench.serving(), ["b", "a"]);
    assert_eq!(publishes(&effects), 1);
    assert_eq!(bench.controller.status(bench.now).generation, 2);
}

#[test]
fn new_address_with_the_old_name_is_a_new_backend() {
    let mut bench = Bench::up(pool(&["a"]));
    let old = bench.status("a").state;
    assert!(old.in_flight.try_enter(0));
    bench.configure(pool(&["a@4711"]));
    assert_ne!(bench.id("a"), old.id);
    let table = bench.controller.current_table();
    assert_eq!(table.pools[0].serving[0].id, old.id, "the new backend waits for its first result");
    assert_eq!(bench.controller.status(bench.now).leaving.len(), 1);
    old.in_flight.leave();
}

#[test]
fn removed_backend_is_kept_until_its_last_session_ends() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    let removed = bench.status("a").state;
    assert!(removed.in_flight.try_enter(0));
    let effects = bench.configure(unprobed(&["b"]));
    let lines = logs(&effects);
    assert_eq!(
        lines,
        [
            "a: unknown -> removed: removed from the configuration; open sessions: 1 (finish normally)"
        ]
    );
    bench.pass(Duration::from_secs(3600));
    assert_eq!(bench.controller.status(bench.now).leaving[0].id, removed.id);
    removed.in_flight.leave();
    bench.pass(removal::CHECK_INTERVAL);
    assert!(bench.controller.status(bench.now).leaving.is_empty());
    assert_eq!(bench.controller.next_due(), None);
}

#[test]
fn close_after_resets_the_sessions_after_the_grace() {
    let rule = OnRemoval::CloseAfter(Duration::from_secs(30));
    let rest = || PoolConfig { on_removal: rule, ..unprobed(&["b"]) };
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    let removed = bench.status("a").state;
    assert!(removed.in_flight.try_enter(0));
    bench.configure(rest());
    assert!(resets(&bench.pass(Duration::from_millis(29_999))).is_empty());
    assert_eq!(resets(&bench.pass(Duration::from_millis(1))), [removed.id]);
    assert_eq!(resets(&bench.pass(Duration::from_secs(1))).len(), 1, "requested again");
    removed.in_flight.leave();
    assert!(resets(&bench.pass(Duration::from_secs(60))).is_empty());
}

#[test]
fn removed_backend_with_sessions_returns_with_its_state() {
    let rule = OnRemoval::CloseAfter(Duration::from_secs(30));
    let with = |names: &[&str]| PoolConfig { on_removal: rule, ..pool(names) };
    let mut bench = Bench::up(with(&["a", "b"]));
    let removed = bench.status("a").state;
    assert!(removed.in_flight.try_enter(0));
    bench.operator("a", Intent::Draining);
    bench.configure(with(&["b"]));
    bench.answer_all_for(Duration::from_secs(10), None);
    bench.configure(with(&["a", "b"]));
    assert!(Arc::ptr_eq(&removed, &bench.status("a").state));
    assert_eq!(bench.status("a").intent, Intent::Draining);
    assert_eq!(bench.status("a").observation, Observation::Up);
    let effects = bench.answer_all_for(Duration::from_secs(60), None);
    assert!(resets(&effects).is_empty(), "the reset is cancelled");
    removed.in_flight.leave();
}

#[test]
fn removed_backend_without_sessions_returns_with_a_new_id() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let old = bench.id("a");
    bench.configure(pool(&["b"]));
    bench.answer_all_for(Duration::from_secs(5), None);
    bench.configure(pool(&["a", "b"]));
    assert!(bench.id("a") > old);
    assert_eq!(bench.status("a").observation, Observation::Unknown);
}

#[test]
fn results_and_failures_of_removed_backends_are_ignored() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    bench.pass(Duration::from_millis(5));
    let (id, token) = bench.asked[0];
    bench.configure(pool(&["b"]));
    assert!(bench.answer(id, token, None).is_empty());
    let (failure, begun) = (ConnectFailure::Timeout, bench.now);
    let failed = ControlEvent::ConnectFailed { backend: id, failure, in_a_row: 9, begun };
    assert!(bench.apply(failed).is_empty());
}

#[test]
fn names_of_removed_pools_and_backends_are_kept() {
    use crate::control::names::NamedIds;
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    let table = bench.controller.current_table();
    let frontend = table.frontends[0].state.id;
    let ids = NamedIds {
        frontends: vec![frontend],
        pools: vec![table.pools[0].id],
        backends: table.pools[0].serving.iter().map(|backend| backend.id).collect(),
    };
    let before = bench.controller.names_of(&ids);
    assert_eq!((before.frontends.len(), before.pools.len(), before.backends.len()), (1, 1, 2));
    let b = &before.backends[&ids.backends[1]];
    assert_eq!((&*b.pool, &*b.name, &*b.address), ("web", "b", "127.0.0.1:1098"));
    let mut other = config(vec![PoolConfig { name: "other".into(), ..unprobed(&["x"]) }]);
    Arc::make_mut(&mut other).frontends[0].name = "else".into();
    bench.apply(ControlEvent::Configure(other));
    bench.pass(Duration::from_secs(5));
    assert!(!bench.controller.is_known(ids.backends[0]), "it has no session left");
    assert_eq!(bench.controller.names_of(&ids), before);
    // A restored backend keeps its name, too.
    bench.configure(unprobed(&["a"]));
    assert_eq!(bench.controller.names_of(&ids), before);
}
