//! Reloads and starts that leave nobody judged.

use super::*;

/// Pools, with the frontend led to the first of them.
fn configure(bench: &mut Bench, pools: Vec<PoolConfig>) -> Vec<ControlEffect> {
    bench.apply(ControlEvent::Configure(config(pools)))
}

fn undecided(bench: &Bench) -> bool {
    bench.controller.current_table().pools[0].undecided
}

#[test]
fn a_renamed_backend_keeps_the_verdict_on_its_address() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    bench.pass(Duration::from_millis(1));
    let [a, b] = bench.asked[..] else { panic!("{:?}", bench.asked) };
    bench.answer(a.0, a.1, None);
    bench.answer(b.0, b.1, Some("broken"));
    bench.configure(pool(&["x@1097", "y@1098"]));
    assert_eq!(bench.serving(), ["x"]);
    assert_eq!(bench.status("y").observation, Observation::Down);
    let mut probe = probe_spec();
    probe.timeout /= 2;
    bench.configure(PoolConfig { probe: Some(Arc::new(probe)), ..pool(&["z@1098"]) });
    assert_eq!(bench.status("z").observation, Observation::Unknown, "another probe knows nothing");
}

#[test]
fn a_renamed_backend_stays_ejected_until_its_time_is_over() {
    let mut bench = Bench::new(unprobed(&["a", "b", "c"]));
    bench.refuse("b", 1, 5);
    assert_eq!(bench.serving(), ["a", "c"]);
    bench.pass(Duration::from_secs(3));
    bench.configure(unprobed(&["x@1097", "y@1098", "z@1099"]));
    assert_eq!(bench.serving(), ["x", "z"]);
    assert_eq!(bench.status("y").observation, Observation::Unknown);
    bench.pass(Duration::from_secs(8));
    assert_eq!(bench.serving(), ["x", "y", "z"], "it is on trial");
    bench.run_trial("y", TrialPhase::Failed);
    assert_eq!(bench.serving(), ["x", "z"], "it is ejected again");
}

#[test]
fn another_rule_for_ejections_begins_with_all_renamed_backends_in_service() {
    let mut bench = Bench::new(unprobed(&["a", "b", "c"]));
    bench.refuse("b", 1, 5);
    let other = unprobed(&["x@1097", "y@1098", "z@1099"]);
    let spec = EjectionSpec { failures: 9, ..other.ejection.unwrap() };
    bench.configure(PoolConfig { ejection: Some(spec), ..other });
    assert_eq!(bench.serving(), ["x", "y", "z"]);
}

#[test]
fn two_names_swapped_and_a_renamed_pool_keep_the_verdicts() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    bench.configure(pool(&["a@1098", "b@1097"]));
    assert_eq!(bench.serving(), ["a", "b"]);
    configure(&mut bench, vec![PoolConfig { name: "new".into(), ..pool(&["a@1098", "b@1097"]) }]);
    assert_eq!(bench.serving(), ["a", "b"]);
}

#[test]
fn former_backends_serve_until_a_new_one_is_up() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let removed = bench.status("a").state;
    bench.asked.clear();
    bench.configure(pool(&["c", "d"]));
    assert_eq!(bench.serving(), ["a", "b"]);
    assert_eq!(bench.controller.status(bench.now).pools[0].none_eligible, Some("former"));
    bench.pass(Duration::from_millis(1_500));
    let (c, token) = bench.asked[0];
    assert!(bench.controller.is_known(removed.id), "it is not forgotten while it serves");
    let effects = bench.answer(c, token, Some("broken"));
    assert_eq!(publishes(&effects), 0);
    assert_eq!(bench.serving(), ["a", "b"], "d has no verdict yet");
    let (d, token) = bench.asked[1];
    bench.answer(d, token, None);
    assert_eq!(bench.serving(), ["d"]);
    bench.answer_all_for(Duration::from_secs(2), None);
    assert!(!bench.controller.is_known(removed.id));
}

#[test]
fn former_backends_serve_no_more_once_all_new_ones_are_down() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.configure(pool(&["c", "d"]));
    bench.answer_all_for(Duration::from_millis(1), Some("broken"));
    assert!(bench.serving().is_empty() && !undecided(&bench));
    assert_eq!(bench.controller.status(bench.now).pools[0].none_eligible, Some("refuse"));
}

#[test]
fn former_backends_serve_no_longer_than_the_grace_however_often_it_is_reloaded() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.configure(pool(&["c", "d"]));
    bench.pass(GRACE / 2);
    bench.configure(pool(&["e"]));
    assert_eq!(bench.serving(), ["a"], "neither c nor d ever served");
    bench.pass(GRACE / 2 - Duration::from_nanos(1));
    assert_eq!(bench.serving(), ["a"]);
    let effects = bench.pass(Duration::from_nanos(1));
    assert_eq!(publishes(&effects), 1);
    assert_eq!(bench.serving(), ["e"], "it fails open");
}

#[test]
fn a_renamed_pool_with_new_addresses_goes_by_what_its_frontend_had() {
    let mut bench = Bench::up(pool(&["a"]));
    configure(&mut bench, vec![PoolConfig { name: "new".into(), ..pool(&["c"]) }]);
    assert_eq!(bench.serving(), ["a"]);
}

#[test]
fn backends_that_were_down_or_drained_do_not_stand_in() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    bench.answer_all_for(Duration::from_millis(1), None);
    bench.operator("a", Intent::Draining);
    bench.configure(pool(&["c"]));
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn a_former_backend_that_fails_stands_in_no_more() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let [a, b] = ["a", "b"].map(|name| bench.id(name));
    bench.configure(pool(&["c"]));
    let (failure, begun) = (ConnectFailure::Refused, bench.now);
    let failed = |backend| ControlEvent::ConnectFailed { backend, failure, in_a_row: 1, begun };
    bench.apply(failed(a));
    assert_eq!(bench.serving(), ["b"]);
    bench.apply(failed(b));
    assert!(bench.serving().is_empty() && undecided(&bench), "clients wait");
}

#[test]
fn a_former_backend_serves_no_longer_than_its_sessions_may_last() {
    let rule = OnRemoval::CloseAfter(Duration::from_secs(1));
    let mut bench = Bench::up(PoolConfig { on_removal: rule, ..pool(&["a"]) });
    bench.configure(PoolConfig { on_removal: rule, ..pool(&["c"]) });
    assert_eq!(bench.serving(), ["a"]);
    bench.pass(Duration::from_secs(1));
    assert!(bench.serving().is_empty() && undecided(&bench));
}

#[test]
fn at_the_start_clients_wait_for_the_first_verdict() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    assert!(undecided(&bench));
    assert_eq!(bench.controller.undecided_pools(), 1);
    assert_eq!(bench.controller.status(bench.now).pools[0].none_eligible, Some("wait"));
    bench.pass(Duration::from_millis(1));
    let asked = std::mem::take(&mut bench.asked);
    bench.answer(asked[0].0, asked[0].1, Some("broken"));
    assert!(undecided(&bench), "b may be well");
    bench.answer(asked[1].0, asked[1].1, Some("broken"));
    assert_eq!(bench.controller.undecided_pools(), 0, "they are refused from now on");
}

#[test]
fn the_grace_ends_the_wait_where_one_verdict_is_bad_and_the_rest_stay_out() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    bench.pass(Duration::from_millis(1));
    let (a, token) = bench.asked[0];
    bench.answer(a, token, Some("broken"));
    bench.pass(GRACE - Duration::from_millis(2));
    assert!(undecided(&bench));
    bench.pass(Duration::from_millis(2));
    assert!(!undecided(&bench) && bench.serving().is_empty());
}

#[test]
fn a_pool_whose_backends_an_operator_took_out_waits_for_no_verdict() {
    let mut bench = Bench::new(pool(&["a"]));
    assert!(undecided(&bench));
    bench.operator("a", Intent::Draining);
    assert!(!undecided(&bench) && bench.serving().is_empty());
}
