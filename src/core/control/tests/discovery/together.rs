//! A view in a pool with other sources, changed questions, restarts, and the cost of answers.

use super::registry::{discovered_tables, guards, many};
use super::*;
use crate::discovery::view::HeldReason;

/// A pool with backend `a` of the file, and `b` and `c` of a registry. Those in `failed` are
/// down.
fn with_the_file(failed: &[&str]) -> Bench {
    let mut bench = Bench::new(discovering_with(pool(&["a"]), guards()));
    bench.list(&["b", "c"]);
    bench.answer_for(Duration::from_secs(20), failed);
    bench
}

fn held(bench: &Bench) -> Option<HeldReason> {
    bench.sources()[0].view.held_answer.map(|held| held.reason)
}

#[test]
fn last_eligible_member_of_a_registry_leaves_if_the_file_serves() {
    let mut bench = with_the_file(&["c"]);
    assert_eq!(bench.serving(), ["a", "b"]);
    bench.list(&["c"]);
    assert_eq!(bench.names_in_status(), ["a", "c"]);
    assert_eq!(held(&bench), None);
}

#[test]
fn last_eligible_member_of_a_registry_stays_while_the_file_does_not_serve() {
    let failed = ["a", "c"];
    let mut bench = with_the_file(&failed);
    assert_eq!(bench.serving(), ["b"]);
    bench.list(&["c"]);
    assert_eq!(held(&bench), Some(HeldReason::LastEligible));
    bench.answer_for(Duration::from_secs(5), &failed);
    assert_eq!(bench.serving(), ["b"]);
    bench.answer_for(Duration::from_secs(20), &["c"]);
    assert_eq!(bench.serving(), ["a"], "the file serves again");
    assert_eq!(bench.names_in_status(), ["a", "c"]);
}

#[test]
fn wishes_drain_the_last_eligible_member_of_a_registry_only_while_the_file_serves() {
    let yes = Wish::Sessions;
    for (failed, serving) in [(&["c"][..], "a"), (&["a", "c"][..], "b")] {
        let mut bench = with_the_file(failed);
        bench.wish(&[("b", Wish::Draining, ""), ("c", yes, "")]);
        bench.answer_for(Duration::from_secs(3), failed);
        assert_eq!(bench.serving(), [serving]);
    }
}

#[test]
fn stale_view_leaves_backends_of_the_file_alone_and_keeps_one_member_that_is_up() {
    let stale_for = Some(Duration::from_secs(60));
    let stale = || ViewGuards { stale_for, ..guards() };
    let mut bench = Bench::up(discovering_with(pool(&["a", "b"]), stale()));
    bench.list(&["b", "c"]);
    bench.answer_for(Duration::from_secs(70), &[]);
    assert!(bench.sources()[0].view.stale);
    assert_eq!(bench.serving(), ["a", "b"], "the file lists b, too");
    let mut bench = Bench::up(discovering_with(pool(&[]), stale()));
    bench.list(&["b", "c"]);
    bench.answer_for(Duration::from_secs(70), &[]);
    assert_eq!(bench.serving(), ["b"]);
    bench.answer_for(Duration::from_secs(30), &["b"]);
    assert_eq!(bench.serving(), ["c"], "another one that is up takes over");
}

#[test]
fn held_removal_does_not_outlive_its_question() {
    let mut bench = Bench::new(discovering_with(unprobed(&[]), guards()));
    bench.list(&["b", "c", "d"]);
    bench.answer_for(Duration::from_secs(1), &[]);
    bench.list(&["b"]);
    assert_eq!(held(&bench), Some(HeldReason::MaxRemoved));
    let mut other = discovering_with(unprobed(&[]), guards());
    let spec = Arc::make_mut(other.discover.as_mut().unwrap());
    spec.question = SourceQuestion::File { path: "/others.json".into() };
    bench.configure(other);
    bench.answer_for(Duration::from_secs(60), &[]);
    assert_eq!(bench.serving(), ["b", "c", "d"], "the old answer is about another question");
    bench.list(&[]);
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving(), ["b", "c", "d"], "the first answer confirms nothing");
    bench.list(&["b", "c"]);
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving(), ["b", "c"]);
    bench.list(&["b"]);
    assert_eq!(bench.names_in_status(), ["b"], "half of the answers to this question");
}

#[test]
fn empty_answers_before_and_after_a_restart_do_not_confirm_each_other() {
    let pool = || discovering_with(unprobed(&[]), guards());
    let mut bench = Bench::new(pool());
    bench.list(&["b", "c"]);
    bench.answer_for(Duration::from_secs(1), &[]);
    bench.list(&[]);
    bench.now += Duration::from_secs(3600);
    let mut next = bench.restarted(pool());
    next.list(&[]);
    next.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(next.serving(), ["b", "c"], "the registry can have restarted, too");
    next.answer_for(Duration::from_secs(10), &[]);
    next.list(&[]);
    next.answer_for(Duration::from_secs(1), &[]);
    assert!(next.serving().is_empty());
}

#[test]
fn answers_and_tables_use_at_most_a_tenth_of_the_time() {
    let mut bench = Bench::registry(unprobed(&[]), 50);
    let before = discovered_tables(&bench);
    let tables = |bench: &Bench| discovered_tables(bench) - before;
    bench.controller.took(Duration::ZERO, bench.now);
    bench.controller.took(Duration::from_secs(60), bench.now);
    bench.told(None, whole_of(many(0, 49)));
    assert_eq!(tables(&bench), 1, "the events before were no paced work");
    bench.controller.took(Duration::from_millis(50), bench.now);
    bench.told(None, whole_of(many(0, 48)));
    bench.answer_for(Duration::from_millis(449), &[]);
    assert_eq!((tables(&bench), bench.names_in_status().len()), (1, 49));
    bench.answer_for(Duration::from_millis(1), &[]);
    assert_eq!((tables(&bench), bench.serving().len()), (2, 48));
    bench.controller.took(Duration::from_millis(1), bench.now);
    bench.told(None, whole_of(many(0, 47)));
    bench.answer_for(Duration::from_millis(99), &[]);
    assert_eq!(tables(&bench), 2, "at least 100 ms");
    bench.answer_for(Duration::from_millis(1), &[]);
    assert_eq!(tables(&bench), 3);
}
