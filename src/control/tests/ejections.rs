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
          out for 10s (ejection 1 in a row)"]
    );
    assert!(bench.status("a").ejected);
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn where_ejection_is_quicker_than_fall_the_burst_is_still_one_transition() {
    let spec = ProbeSpec { fall: 10, ..probe_spec() };
    let mut bench = Bench::up(Pool { probe: Some(Arc::new(spec)), ..pool(&["a", "b"]) });
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
    assert_eq!(logs(&effects), ["a: ejected -> unknown: ejection ended: its time is over"]);
    assert_eq!(bench.serving(), ["a", "b"]);
    assert!(bench.refuse("a", 801, 804).is_empty());
    let effects = bench.refuse("a", 805, 805);
    assert!(logs(&effects)[0].ends_with("out for 20s (ejection 2 in a row)"), "{effects:?}");
}

#[test]
fn stragglers_during_an_ejection_do_not_make_a_long_row_after_it() {
    let spec = ProbeSpec { fall: 10, interval: Duration::from_secs(60), ..probe_spec() };
    let mut bench = Bench::up(Pool { probe: Some(Arc::new(spec)), ..pool(&["a", "b"]) });
    bench.refuse("a", 1, 500);
    bench.pass(Duration::from_secs(10));
    assert!(!bench.status("a").ejected);
    assert!(logs(&bench.refuse("a", 501, 501)).is_empty(), "one failure is no row of 501");
}

#[test]
fn the_last_eligible_backend_is_not_ejected_and_that_is_said_once() {
    let always =
        EjectionSpec { failures: 5, time: Duration::from_secs(10), max_ejected_percent: 100 };
    let mut bench = Bench::new(Pool { ejection: Some(always), ..unprobed(&["a", "b"]) });
    bench.refuse("a", 1, 5);
    let effects = bench.refuse("b", 1, 100);
    assert_eq!(
        logs(&effects),
        ["b: not ejected though 5 connects failed in a row, last: connection refused: \
          it is the pool's last eligible backend"]
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
    assert!(logs(&effects)[0].contains("1 of 3 backends are ejected and max_ejected is 50%"));
    assert_eq!(bench.serving(), ["b", "c"]);
    bench.pass(Duration::from_secs(10));
    bench.refuse("b", 51, 51);
    assert_eq!(bench.serving(), ["a", "c"], "held back no longer");
}

#[test]
fn when_everybody_else_is_gone_the_ejected_one_comes_back() {
    let mut bench = Bench::new(unprobed(&["a", "b"]));
    bench.refuse("a", 1, 5);
    let effects = bench.operator("b", Intent::Draining);
    assert_eq!(bench.serving(), ["a"]);
    assert_eq!(publishes(&effects), 1);
    assert!(logs(&effects)[1].contains("no other backend of the pool is eligible"));
}

#[test]
fn a_reload_that_shrinks_the_pool_ends_the_surplus_of_ejections() {
    let mut bench = Bench::new(unprobed(&["a", "b", "c", "d"]));
    bench.refuse("a", 1, 5);
    bench.refuse("b", 1, 5);
    bench.configure(unprobed(&["a", "b", "c"]));
    assert!(!bench.status("a").ejected, "the one that would end first");
    assert!(bench.status("b").ejected);
    bench.configure(Pool { ejection: None, ..unprobed(&["a", "b", "c"]) });
    assert!(!bench.status("b").ejected);
}
