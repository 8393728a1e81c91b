//! Startup, probe schedule and probe results.

use super::*;
use crate::control::probing;

#[test]
fn table_is_empty_and_no_timer_is_set_without_a_configuration() {
    let controller = Controller::new(1, 0);
    assert_eq!(controller.next_due(), None);
    assert!(controller.current_table().frontends.is_empty());
    assert_eq!(controller.status(tidegate_net::clock::now()).generation, 0);
}

#[test]
fn pool_without_probes_is_eligible_at_once() {
    let bench = Bench::new(unprobed(&["a", "b"]));
    assert_eq!(bench.serving(), ["a", "b"]);
    assert_eq!(bench.status("a").observation, Observation::Unknown);
    assert_eq!(bench.controller.next_due(), None);
}

#[test]
fn backend_is_eligible_after_its_first_success() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    assert!(bench.serving().is_empty());
    bench.pass(Duration::from_millis(1));
    let asked = std::mem::take(&mut bench.asked);
    assert_eq!(asked.len(), 2, "a small pool is probed at once");
    let effects = bench.answer(asked[0].0, asked[0].1, None);
    assert_eq!(publishes(&effects), 1);
    assert_eq!(logs(&effects), ["a: unknown -> up: first probe succeeded"]);
    assert_eq!(bench.serving(), ["a"]);
    let effects = bench.answer(asked[1].0, asked[1].1, Some("connection refused"));
    assert_eq!(logs(&effects), ["b: unknown -> down: first probe failed: connection refused"]);
    assert_eq!(publishes(&effects), 0, "not eligible before either");
}

#[test]
fn pool_without_any_result_fails_open_after_the_grace() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    bench.pass(GRACE - Duration::from_nanos(1));
    assert!(bench.serving().is_empty());
    let effects = bench.pass(Duration::from_nanos(1));
    assert_eq!(publishes(&effects), 1);
    assert_eq!(bench.serving(), ["a", "b"]);
    assert!(logs(&effects)[0].starts_with("-: no probe result within startup_grace; failing open"));
    let (a, token) = bench.asked[0];
    bench.answer(a, token, Some("broken"));
    assert_eq!(bench.serving(), ["b"], "the other backend has no result yet");
}

#[test]
fn one_result_within_the_grace_prevents_failing_open() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    bench.pass(Duration::from_millis(1));
    let (a, token) = bench.asked[0];
    bench.answer(a, token, Some("broken"));
    bench.pass(GRACE * 2);
    assert!(bench.serving().is_empty());
}

#[test]
fn backend_added_to_a_pool_with_results_waits_for_its_first_success() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.configure(pool(&["a", "b"]));
    assert_eq!(bench.serving(), ["a"]);
    bench.answer_all_for(Duration::from_millis(10), None);
    assert_eq!(bench.serving(), ["a", "b"]);
}

#[test]
fn adding_a_probe_removes_no_backend_before_a_result() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.configure(pool(&["a", "b", "c"]));
    assert_eq!(bench.serving(), ["a", "b"], "c is new and waits");
    bench.answer_all_for(Duration::from_millis(10), Some("broken"));
    assert!(bench.serving().is_empty());
}

#[test]
fn removing_the_probe_drops_its_results() {
    let mut bench = Bench::new(pool(&["a"]));
    bench.answer_all_for(Duration::from_millis(10), Some("broken"));
    let effects = bench.configure(unprobed(&["a"]));
    assert_eq!(logs(&effects), ["a: down -> unknown: the pool no longer has probes"]);
    assert_eq!(bench.serving(), ["a"]);
    assert_eq!(bench.controller.next_due(), None, "no probes");
}

#[test]
fn first_probes_of_many_backends_are_spread_over_a_second() {
    let names: Vec<String> = (0..5000).map(|n| format!("b{n}@{}", 10_000 + n)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut bench = Bench::new(pool(&names));
    let half = probes(&bench.pass(FIRST_SPREAD / 2));
    assert!((2490..=2510).contains(&half), "{half}");
    bench.pass(FIRST_SPREAD / 2);
    assert_eq!(bench.asked.len(), 5000);
}

const FIRST_SPREAD: Duration = probing::FIRST_PROBES_SPREAD_MAX;

#[test]
fn probe_interval_varies_by_a_tenth() {
    let mut bench = Bench::up(pool(&["a"]));
    let mut waits = Vec::new();
    let mut last = None;
    for _ in 0..50 {
        bench.now = bench.controller.next_due().unwrap();
        assert_eq!(probes(&bench.apply(ControlEvent::Tick)), 1);
        bench.answer_asked(None);
        waits.extend(last.map(|last| bench.now - last));
        last = Some(bench.now);
    }
    assert!(waits.iter().all(|w| (INTERVAL.mul_f64(0.9)..=INTERVAL.mul_f64(1.1)).contains(w)));
    assert!(waits.iter().max().unwrap() > &INTERVAL.mul_f64(1.03), "longer waits");
    assert!(waits.iter().min().unwrap() < &INTERVAL.mul_f64(0.97), "shorter waits");
}

#[test]
fn very_long_durations_do_not_overflow() {
    let max = Duration::MAX;
    let spec = ProbeSpec { interval: max, fast_interval: max, timeout: max, ..probe_spec() };
    let ejection = EjectionSpec {
        failures: 1,
        time: max,
        max_ejected_percent: 100,
        early_resets: true,
        slow_first_byte: None,
    };
    let forever = |names: &[&str]| PoolConfig {
        probe: Some(Arc::new(spec.clone())),
        ejection: Some(ejection),
        startup_grace: max,
        on_removal: OnRemoval::CloseAfter(max),
        ..pool(names)
    };
    let mut bench = Bench::up(forever(&["a", "b", "c"]));
    assert_eq!(logs(&bench.refuse("a", 1, 1)).len(), 1);
    bench.configure(forever(&["b"]));
    bench.answer_all_for(Duration::from_secs(3600), None);
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn backend_that_is_down_is_probed_at_its_own_interval() {
    let down_interval = INTERVAL * 5;
    let spec = ProbeSpec { down_interval, ..probe_spec() };
    let mut bench = Bench::up(PoolConfig { probe: Some(Arc::new(spec)), ..pool(&["a", "b"]) });
    bench.refuse("a", 3, 3);
    bench.answer_all_for(INTERVAL * 3, Some("broken"));
    let wait = bench.controller.next_due().unwrap() - bench.now;
    assert!(wait > INTERVAL.mul_f64(1.2), "{wait:?}");
    assert!(wait <= down_interval.mul_f64(1.1), "{wait:?}");
}

#[test]
fn fast_interval_applies_during_a_row() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.now = bench.controller.next_due().unwrap();
    bench.apply(ControlEvent::Tick);
    bench.answer_asked(Some("broken"));
    let wait = bench.controller.next_due().unwrap() - bench.now;
    assert!(wait <= FAST.mul_f64(1.1), "{wait:?}");
    let effects = bench.answer_all_for(FAST * 3, Some("broken"));
    let lines = logs(&effects);
    assert_eq!(lines, ["a: up -> down: 3 probes failed in a row, last: broken"]);
    let wait = bench.controller.next_due().unwrap() - bench.now;
    assert!(wait > FAST, "no row: {wait:?}");
}

#[test]
fn down_backend_is_up_after_rise_successes_and_logs_its_duration() {
    let mut bench = Bench::new(pool(&["a"]));
    bench.answer_all_for(Duration::from_millis(1), Some("broken"));
    let effects = bench.answer_all_for(INTERVAL * 2, None);
    assert_eq!(logs(&effects), ["a: down -> up: 2 probes succeeded in a row"]);
    let transition = bench.status("a").last_transition.unwrap();
    assert!(transition.lasted > INTERVAL && transition.lasted < INTERVAL * 2);
}

#[test]
fn backend_never_has_two_probes_in_flight() {
    let mut bench = Bench::up(pool(&["a"]));
    let lost_after = TIMEOUT + probing::PROBE_LOST_MARGIN;
    bench.now = bench.controller.next_due().unwrap();
    assert_eq!(probes(&bench.apply(ControlEvent::Tick)), 1);
    assert_eq!(probes(&bench.pass(lost_after - Duration::from_nanos(1))), 0);
}

#[test]
fn lost_probe_is_repeated_and_its_late_result_is_ignored() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.now = bench.controller.next_due().unwrap();
    bench.apply(ControlEvent::Tick);
    let lost = bench.asked.pop().unwrap();
    let effects = bench.pass(TIMEOUT + probing::PROBE_LOST_MARGIN);
    assert_eq!(probes(&effects), 1, "probed again");
    for _ in 0..5 {
        bench.answer(lost.0, lost.1, Some("late"));
    }
    assert!(bench.status("a").eligible);
    bench.answer_asked(None);
    assert!(bench.controller.next_due().unwrap() > bench.now);
}

#[test]
fn local_error_is_no_evidence_and_is_logged_once_a_minute() {
    let mut bench = Bench::up(pool(&["a"]));
    let mut notices = Vec::new();
    let end = bench.now + Duration::from_secs(61);
    while bench.now < end {
        bench.now = bench.controller.next_due().unwrap();
        bench.apply(ControlEvent::Tick);
        for (backend, token) in std::mem::take(&mut bench.asked) {
            let outcome = ProbeOutcome::Local { reason: "too many open files".into() };
            notices.extend(logs(&bench.apply(ControlEvent::Probed { backend, token, outcome })));
        }
    }
    assert_eq!(bench.status("a").observation, Observation::Up);
    assert_eq!(notices.len(), 2, "{notices:?}");
}

#[test]
fn changed_probe_settings_keep_the_result_and_restart_row_and_schedule() {
    let mut bench = Bench::up(pool(&["a"]));
    for _ in 0..2 {
        bench.now = bench.controller.next_due().unwrap();
        bench.apply(ControlEvent::Tick);
        bench.answer_asked(Some("broken"));
    }
    let changed = ProbeSpec { fall: 2, ..probe_spec() };
    let effects = bench.configure(PoolConfig { probe: Some(Arc::new(changed)), ..pool(&["a"]) });
    assert!(bench.status("a").eligible);
    assert_eq!(probes(&effects), 1, "probed with the new settings at once");
    assert!(logs(&bench.answer_asked(Some("broken"))).is_empty(), "one of two");
    let effects = bench.answer_all_for(FAST * 2, Some("broken"));
    assert_eq!(logs(&effects), ["a: up -> down: 2 probes failed in a row, last: broken"]);
}

#[test]
fn probe_from_before_a_settings_change_is_awaited_but_its_result_is_ignored() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.now = bench.controller.next_due().unwrap();
    bench.apply(ControlEvent::Tick);
    let old = bench.asked.pop().unwrap();
    let changed = ProbeSpec { fall: 1, ..probe_spec() };
    let effects = bench.configure(PoolConfig { probe: Some(Arc::new(changed)), ..pool(&["a"]) });
    assert_eq!(probes(&effects), 0, "the old probe is still running");
    let effects = bench.answer(old.0, old.1, Some("broken"));
    assert!(bench.status("a").eligible, "the result of the old probe is ignored");
    assert_eq!(probes(&effects), 1, "the new probe runs");
}

#[test]
fn events_of_one_batch_cause_one_table() {
    let mut bench = Bench::new(pool(&["a", "b", "c"]));
    bench.pass(Duration::from_millis(5));
    let asked = std::mem::take(&mut bench.asked).into_iter();
    let outcome = ProbeOutcome::success(Duration::ZERO);
    let events = asked.map(|(backend, token)| ControlEvent::Probed {
        backend,
        token,
        outcome: outcome.clone(),
    });
    let effects = bench.apply_all(events.collect());
    assert_eq!((publishes(&effects), logs(&effects).len()), (1, 3));
    assert!(matches!(effects[0], ControlEffect::Publish(_)), "the table is the first effect");
}

#[test]
fn connect_begun_before_a_backend_returned_does_not_count() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let (backend, lost_in_the_cut) = (bench.id("a"), bench.now);
    let minute = Duration::from_secs(60);
    bench.answer_all_for(minute, Some("no answer"));
    assert_eq!(bench.status("a").observation, Observation::Down);
    bench.answer_all_for(minute, None);
    assert_eq!(bench.status("a").observation, Observation::Up);
    let failure = ConnectFailure::Timeout;
    let mut fail = |begun| {
        for in_a_row in 1..=9 {
            bench.apply(ControlEvent::ConnectFailed { backend, failure, in_a_row, begun });
        }
        let status = bench.status("a");
        (status.observation, status.ejected)
    };
    assert_eq!(fail(lost_in_the_cut), (Observation::Up, false));
    let later = bench.now;
    for in_a_row in 10..=19 {
        bench.apply(ControlEvent::ConnectFailed { backend, failure, in_a_row, begun: later });
    }
    assert_eq!(bench.status("a").observation, Observation::Down);
}
