//! Failed connects, ejection and its guard.

use super::*;

#[test]
fn burst_of_refused_connects_is_one_transition_one_log_line_and_one_table() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let effects = bench.refuse("a", 1, 500);
    assert_eq!(publishes(&effects), 1);
    assert_eq!(
        logs(&effects),
        ["a: up -> down: 3 connects failed in a row, last: connection refused"]
    );
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn burst_of_refused_connects_ejects_once_without_probes() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    let effects = bench.refuse("a", 1, 500);
    assert_eq!(publishes(&effects), 1);
    assert_eq!(
        logs(&effects),
        ["a: unknown -> ejected: 5 connects failed in a row, last: connection refused; \
          ejected for 10s (ejection 1 in a row)"]
    );
    assert!(bench.status("a").ejected);
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn burst_is_one_transition_if_ejection_needs_fewer_failures_than_fall() {
    let spec = ProbeSpec { fall: 10, ..probe_spec() };
    let mut bench = Bench::up(PoolConfig { probe: Some(Arc::new(spec)), ..pool(&["a", "b"]) });
    let effects = bench.refuse("a", 1, 500);
    assert_eq!((publishes(&effects), logs(&effects).len()), (1, 1));
    assert!(bench.status("a").ejected);
    assert_eq!(bench.status("a").observation, Observation::Up);
}

#[test]
fn failed_connect_brings_the_next_probe_forward() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.refuse("a", 1, 1);
    assert!(bench.controller.next_due().unwrap() <= bench.now + FAST);
}

#[test]
fn ejection_ends_on_time_and_the_next_needs_a_full_row_and_lasts_longer() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.refuse("a", 1, 5);
    let effects = bench.pass(Duration::from_secs(10));
    assert_eq!(
        logs(&effects),
        ["a: ejected -> trial: ejection ended after its time; admitting one trial session"]
    );
    assert_eq!(bench.serving(), ["a", "b"]);
    let effects = bench.run_trial("a", TrialPhase::Passed);
    assert_eq!(logs(&effects), ["a: trial -> unknown: back in rotation: trial session succeeded"]);
    assert_eq!(publishes(&effects), 0, "the table has not changed");
    assert!(effects.iter().any(|effect| matches!(effect, ControlEffect::SlotsFreed)));
    assert!(bench.refuse("a", 801, 804).is_empty());
    let effects = bench.refuse("a", 805, 805);
    assert!(logs(&effects)[0].ends_with("ejected for 20s (ejection 2 in a row)"), "{effects:?}");
}

#[test]
fn failures_during_an_ejection_do_not_count_after_it() {
    let spec = ProbeSpec { fall: 10, interval: Duration::from_secs(60), ..probe_spec() };
    let mut bench = Bench::up(PoolConfig { probe: Some(Arc::new(spec)), ..pool(&["a", "b"]) });
    bench.refuse("a", 1, 500);
    bench.pass(Duration::from_secs(10));
    assert!(!bench.status("a").ejected);
    assert!(logs(&bench.refuse("a", 500, 501)).is_empty(), "only the trial session counts");
    bench.run_trial("a", TrialPhase::Passed);
    assert!(logs(&bench.refuse("a", 501, 501)).is_empty(), "one failure after the trial");
}

#[test]
fn trial_admits_one_session_and_its_failure_ejects_for_longer() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.refuse("a", 1, 5);
    bench.pass(Duration::from_secs(10));
    let state = bench.status("a").state;
    assert!(state.in_flight.try_enter(0));
    assert!(!state.in_flight.try_enter(0), "a second session");
    let trial = state.in_flight.claim_trial().unwrap();
    state.in_flight.advance_trial(trial, TrialPhase::Failed);
    let effects = bench.pass(TRIAL_CHECK_INTERVAL);
    assert_eq!(
        logs(&effects),
        ["a: trial -> ejected: trial session failed; ejected for 20s (ejection 2 in a row)"]
    );
    assert_eq!(bench.serving(), ["b"]);
    assert!(!state.in_flight.try_enter(0), "with an older table");
    bench.pass(Duration::from_secs(20));
    bench.run_trial("a", TrialPhase::Passed);
    assert!((0..3).all(|_| state.in_flight.try_enter(0)));
}

#[test]
fn next_session_is_the_trial_session_if_the_first_client_leaves() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.refuse("a", 1, 5);
    bench.pass(Duration::from_secs(10));
    assert!(logs(&bench.run_trial("a", TrialPhase::Open)).is_empty());
    assert_eq!(logs(&bench.run_trial("a", TrialPhase::Passed)).len(), 1);
}

#[test]
fn last_eligible_backend_needs_no_trial() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.refuse("a", 1, 5);
    bench.pass(Duration::from_secs(10));
    let effects = bench.operator("b", Intent::Draining);
    assert!(logs(&effects)[1].contains("no other backend in the pool is eligible"), "{effects:?}");
    let state = bench.status("a").state;
    assert!((0..3).all(|_| state.in_flight.try_enter(0)));
}

#[test]
fn backups_are_in_rotation_while_all_primaries_are_on_trial() {
    let mut spec = unprobed(&["a", "b"]);
    spec.backends[1].tier = 1;
    let mut bench = Bench::new(spec);
    bench.refuse("a", 1, 5);
    assert_eq!(bench.serving(), ["b"]);
    bench.pass(Duration::from_secs(10));
    assert_eq!(bench.serving(), ["a", "b"]);
    let effects = bench.run_trial("a", TrialPhase::Passed);
    assert_eq!(publishes(&effects), 1);
    assert_eq!(bench.serving(), ["a"]);
}

#[test]
fn early_resets_eject_and_do_not_change_the_probe_result() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let backend = bench.id("a");
    let (failure, begun) = (ConnectFailure::EarlyReset, bench.now);
    let effects: Vec<ControlEffect> = (1..=5)
        .map(|in_a_row| ControlEvent::ConnectFailed { backend, failure, in_a_row, begun })
        .flat_map(|event| bench.apply(event))
        .collect();
    assert_eq!(
        logs(&effects),
        ["a: up -> ejected: 5 sessions failed in a row, last: \
          connection reset before the first byte; ejected for 10s (ejection 1 in a row)"]
    );
    assert_eq!(bench.status("a").observation, Observation::Up);
}

#[test]
fn last_eligible_backend_is_not_ejected_and_one_notice_is_logged() {
    let always = EjectionSpec {
        failures: 5,
        time: Duration::from_secs(10),
        max_ejected_percent: 100,
        early_resets: true,
        slow_first_byte: None,
    };
    let mut bench = Bench::new(PoolConfig { ejection: Some(always), ..unprobed(&["a", "b"]) });
    bench.refuse("a", 1, 5);
    let effects = bench.refuse("b", 1, 100);
    assert_eq!(
        logs(&effects),
        ["b: ejection prevented; backend stays in rotation: it is the last eligible backend of \
          the pool: 5 connects failed in a row, last: connection refused"]
    );
    assert_eq!(bench.status("b").ejections_held_total, 1);
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn max_ejected_is_rounded_down_and_never_exceeded() {
    let mut bench = Bench::new(unprobed(&["a", "b", "c"]));
    bench.refuse("a", 1, 5);
    let effects = bench.refuse("b", 1, 50);
    assert_eq!(logs(&effects).len(), 1);
    let reason = "max_ejected = 50% allows 1 of 3 backends to be removed, and 1 already is";
    assert!(logs(&effects)[0].contains(reason));
    assert_eq!(bench.serving(), ["b", "c"]);
    bench.pass(Duration::from_secs(10));
    bench.refuse("b", 51, 51);
    assert_eq!(bench.serving(), ["a", "b", "c"], "a is still on trial");
    bench.run_trial("a", TrialPhase::Passed);
    bench.refuse("b", 52, 52);
    assert_eq!(bench.serving(), ["a", "c"], "max_ejected allows it now");
}

#[test]
fn last_backend_returns_from_ejection() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.refuse("a", 1, 5);
    let effects = bench.operator("b", Intent::Draining);
    assert_eq!(bench.serving(), ["a"]);
    assert_eq!(publishes(&effects), 1);
    assert!(logs(&effects)[1].contains("no other backend in the pool is eligible"));
}

#[test]
fn reload_that_shrinks_the_pool_ends_surplus_ejections() {
    let mut bench = Bench::new(unprobed(&["a", "b", "c", "d"]));
    bench.refuse("a", 1, 5);
    bench.refuse("b", 1, 5);
    bench.configure(unprobed(&["a", "b", "c"]));
    assert!(!bench.status("a").ejected, "the ejection that was due first");
    assert!(bench.status("b").ejected);
    bench.configure(PoolConfig { ejection: None, ..unprobed(&["a", "b", "c"]) });
    assert!(!bench.status("b").ejected);
}

#[test]
fn single_failure_that_ejects_is_reported_in_the_singular() {
    let ejection = EjectionSpec {
        failures: 1,
        time: Duration::from_secs(10),
        max_ejected_percent: 50,
        early_resets: true,
        slow_first_byte: None,
    };
    let mut bench = Bench::new(PoolConfig { ejection: Some(ejection), ..unprobed(&["a", "b"]) });
    let effects = bench.refuse("a", 1, 1);
    assert_eq!(
        logs(&effects),
        ["a: unknown -> ejected: 1 connect failed: connection refused; \
          ejected for 10s (ejection 1 in a row)"]
    );
}
