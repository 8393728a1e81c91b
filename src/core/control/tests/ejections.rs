//! Failed connects, ejection and its guard.

use super::*;

#[test]
fn a_burst_of_refused_connects_is_one_transition_one_log_one_table() {
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
fn without_probes_a_burst_ejects_once() {
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
fn where_ejection_is_quicker_than_fall_the_burst_is_still_one_transition() {
    let spec = ProbeSpec { fall: 10, ..probe_spec() };
    let mut bench = Bench::up(PoolConfig { probe: Some(Arc::new(spec)), ..pool(&["a", "b"]) });
    let effects = bench.refuse("a", 1, 500);
    assert_eq!((publishes(&effects), logs(&effects).len()), (1, 1));
    assert!(bench.status("a").ejected);
    assert_eq!(bench.status("a").observation, Observation::Up);
}

#[test]
fn a_failed_connect_brings_the_next_probe_forward() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.refuse("a", 1, 1);
    assert!(bench.controller.next_due().unwrap() <= bench.now + FAST);
}

#[test]
fn an_ejection_ends_on_time_and_the_next_takes_a_whole_row_and_lasts_longer() {
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
    assert_eq!(publishes(&effects), 0, "the table was right already");
    assert!(effects.iter().any(|effect| matches!(effect, ControlEffect::SlotsFreed)));
    assert!(bench.refuse("a", 801, 804).is_empty());
    let effects = bench.refuse("a", 805, 805);
    assert!(logs(&effects)[0].ends_with("ejected for 20s (ejection 2 in a row)"), "{effects:?}");
}

#[test]
fn stragglers_during_an_ejection_do_not_make_a_long_row_after_it() {
    let spec = ProbeSpec { fall: 10, interval: Duration::from_secs(60), ..probe_spec() };
    let mut bench = Bench::up(PoolConfig { probe: Some(Arc::new(spec)), ..pool(&["a", "b"]) });
    bench.refuse("a", 1, 500);
    bench.pass(Duration::from_secs(10));
    assert!(!bench.status("a").ejected);
    assert!(logs(&bench.refuse("a", 500, 501)).is_empty(), "the trial is another's");
    bench.run_trial("a", TrialPhase::Passed);
    assert!(logs(&bench.refuse("a", 501, 501)).is_empty(), "one failure is no row of 501");
}

#[test]
fn during_a_trial_one_session_gets_in_and_its_failure_ejects_for_longer() {
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
    assert!(!state.in_flight.try_enter(0), "by an old table");
    bench.pass(Duration::from_secs(20));
    bench.run_trial("a", TrialPhase::Passed);
    assert!((0..3).all(|_| state.in_flight.try_enter(0)));
}

#[test]
fn trial_whose_client_went_away_is_the_next_ones() {
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
fn backups_stand_beside_primaries_that_are_all_on_trial() {
    let mut spec = unprobed(&["a", "b"]);
    spec.backends[1].backup = true;
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
fn early_resets_eject_and_leave_the_probes_verdict_alone() {
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
fn the_last_eligible_backend_is_not_ejected_and_that_is_said_once() {
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
        ["b: not ejected: last eligible backend of the pool; \
          5 connects failed in a row, last: connection refused"]
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
    assert!(logs(&effects)[0].contains("1 of 3 backends are ejected; max_ejected = 50%"));
    assert_eq!(bench.serving(), ["b", "c"]);
    bench.pass(Duration::from_secs(10));
    bench.refuse("b", 51, 51);
    assert_eq!(bench.serving(), ["a", "b", "c"], "a is still on trial");
    bench.run_trial("a", TrialPhase::Passed);
    bench.refuse("b", 52, 52);
    assert_eq!(bench.serving(), ["a", "c"], "held back no longer");
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
fn a_reload_that_shrinks_the_pool_ends_the_surplus_of_ejections() {
    let mut bench = Bench::new(unprobed(&["a", "b", "c", "d"]));
    bench.refuse("a", 1, 5);
    bench.refuse("b", 1, 5);
    bench.configure(unprobed(&["a", "b", "c"]));
    assert!(!bench.status("a").ejected, "the one that would end first");
    assert!(bench.status("b").ejected);
    bench.configure(PoolConfig { ejection: None, ..unprobed(&["a", "b", "c"]) });
    assert!(!bench.status("b").ejected);
}
