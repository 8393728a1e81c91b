//! Starts and reloads after which no backend has a result.

use super::*;

/// Applies pools; the frontend is routed to the first.
fn configure(bench: &mut Bench, pools: Vec<PoolConfig>) -> Vec<ControlEffect> {
    bench.apply(ControlEvent::Configure(config(pools)))
}

fn undecided(bench: &Bench) -> bool {
    bench.controller.current_table().pools[0].undecided
}

#[test]
fn renamed_backend_keeps_the_result_of_its_address() {
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
    assert_eq!(bench.status("z").observation, Observation::Unknown, "no result of the other probe");
}

#[test]
fn renamed_backend_stays_ejected_until_the_ejection_ends() {
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
fn changed_ejection_settings_end_the_ejection_of_renamed_backends() {
    let mut bench = Bench::new(unprobed(&["a", "b", "c"]));
    bench.refuse("b", 1, 5);
    let other = unprobed(&["x@1097", "y@1098", "z@1099"]);
    let spec = EjectionSpec { failures: 9, ..other.ejection.unwrap() };
    bench.configure(PoolConfig { ejection: Some(spec), ..other });
    assert_eq!(bench.serving(), ["x", "y", "z"]);
}

#[test]
fn swapped_names_and_a_renamed_pool_keep_the_results() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    bench.configure(pool(&["a@1098", "b@1097"]));
    assert_eq!(bench.serving(), ["a", "b"]);
    configure(&mut bench, vec![PoolConfig { name: "new".into(), ..pool(&["a@1098", "b@1097"]) }]);
    assert_eq!(bench.serving(), ["a", "b"]);
}

#[test]
fn former_backends_stay_in_rotation_until_a_new_backend_is_up() {
    let mut bench = Bench::up(pool(&["a", "b"]));
    let removed = bench.status("a").state;
    bench.asked.clear();
    bench.configure(pool(&["c", "d"]));
    assert_eq!(bench.serving(), ["a", "b"]);
    assert_eq!(bench.controller.status(bench.now).pools[0].none_eligible, Some("former"));
    bench.pass(Duration::from_millis(1_500));
    let (c, token) = bench.asked[0];
    assert!(bench.controller.is_known(removed.id), "kept while it is a stand-in");
    let effects = bench.answer(c, token, Some("broken"));
    assert_eq!(publishes(&effects), 0);
    assert_eq!(bench.serving(), ["a", "b"], "d has no result yet");
    let (d, token) = bench.asked[1];
    bench.answer(d, token, None);
    assert_eq!(bench.serving(), ["d"]);
    bench.answer_all_for(Duration::from_secs(2), None);
    assert!(!bench.controller.is_known(removed.id));
}

#[test]
fn former_backends_leave_rotation_when_all_new_backends_are_down() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.configure(pool(&["c", "d"]));
    bench.answer_all_for(Duration::from_millis(1), Some("broken"));
    assert!(bench.serving().is_empty() && !undecided(&bench));
    assert_eq!(bench.controller.status(bench.now).pools[0].none_eligible, Some("refuse"));
}

#[test]
fn repeated_reloads_do_not_extend_the_grace_of_former_backends() {
    let mut bench = Bench::up(pool(&["a"]));
    bench.configure(pool(&["c", "d"]));
    bench.pass(GRACE / 2);
    bench.configure(pool(&["e"]));
    assert_eq!(bench.serving(), ["a"], "c and d were never eligible");
    bench.pass(GRACE / 2 - Duration::from_nanos(1));
    assert_eq!(bench.serving(), ["a"]);
    let effects = bench.pass(Duration::from_nanos(1));
    assert_eq!(publishes(&effects), 1);
    assert_eq!(bench.serving(), ["e"], "it fails open");
}

#[test]
fn renamed_pool_with_new_addresses_keeps_the_former_backends_of_its_frontend() {
    let mut bench = Bench::up(pool(&["a"]));
    configure(&mut bench, vec![PoolConfig { name: "new".into(), ..pool(&["c"]) }]);
    assert_eq!(bench.serving(), ["a"]);
}

#[test]
fn down_and_drained_backends_are_no_stand_ins() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    bench.answer_all_for(Duration::from_millis(1), None);
    bench.operator("a", Intent::Draining);
    bench.configure(pool(&["c"]));
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn failed_connect_removes_a_stand_in() {
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
fn removal_grace_removes_a_stand_in() {
    let rule = OnRemoval::CloseAfter(Duration::from_secs(1));
    let mut bench = Bench::up(PoolConfig { on_removal: rule, ..pool(&["a"]) });
    bench.configure(PoolConfig { on_removal: rule, ..pool(&["c"]) });
    assert_eq!(bench.serving(), ["a"]);
    bench.pass(Duration::from_secs(1));
    assert!(bench.serving().is_empty() && undecided(&bench));
}

#[test]
fn clients_wait_for_the_first_result_after_a_start() {
    let mut bench = Bench::new(pool(&["a", "b"]));
    assert!(undecided(&bench));
    assert_eq!(bench.controller.undecided_pools(), 1);
    assert_eq!(bench.controller.status(bench.now).pools[0].none_eligible, Some("wait"));
    bench.pass(Duration::from_millis(1));
    let asked = std::mem::take(&mut bench.asked);
    bench.answer(asked[0].0, asked[0].1, Some("broken"));
    assert!(undecided(&bench), "b has no result yet");
    bench.answer(asked[1].0, asked[1].1, Some("broken"));
    assert_eq!(bench.controller.undecided_pools(), 0, "clients are rejected from now on");
}

#[test]
fn grace_ends_the_wait_if_only_a_failure_is_known() {
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
fn pool_with_only_drained_backends_waits_for_no_result() {
    let mut bench = Bench::new(pool(&["a"]));
    assert!(undecided(&bench));
    bench.operator("a", Intent::Draining);
    assert!(!undecided(&bench) && bench.serving().is_empty());
}
