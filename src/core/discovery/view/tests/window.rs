//! Several answers within `confirm_after` remove at most as many members as one.

use super::*;

/// Tells the sets, 100 ms apart.
fn tell_each(bench: &mut Bench, sets: &[&[u8]]) {
    for set in sets {
        bench.pass(Duration::from_millis(100));
        bench.tell(set.iter().copied());
    }
}

#[test]
fn several_answers_remove_no_larger_share_than_one() {
    let mut bench = Bench::with(guards(), 4);
    tell_each(&mut bench, &[&[1, 2, 3], &[1, 2], &[1]]);
    assert_eq!(bench.addresses(), [1, 2], "half of 4, and not half of each answer");
    assert_eq!(bench.held(2), Some(HeldReason::MaxRemoved));
    let held = bench.status().held_answer.unwrap();
    assert_eq!((held.removes, held.confirmable_in), (1, Some(secs(10))));
}

#[test]
fn held_rest_of_several_answers_is_confirmed_by_a_repetition() {
    let mut bench = Bench::with(ViewGuards { max_removed: 25, ..guards() }, 8);
    tell_each(&mut bench, &[&[1, 2, 3, 4, 5, 6, 7], &[1, 2, 3, 4, 5, 6], &[1, 2, 3]]);
    assert_eq!(bench.addresses(), [1, 2, 3, 4, 5, 6]);
    bench.pass(Duration::from_millis(9_900));
    bench.take(&Told::Alive);
    assert_eq!(bench.addresses(), [1, 2, 3, 4, 5, 6]);
    bench.pass(Duration::from_millis(100));
    assert!(bench.take(&Told::Alive));
    assert_eq!(bench.addresses(), [1, 2, 3]);
    // The confirmed removal counts no longer.
    bench.tell([1, 2, 3, 4]);
    bench.tell([1, 2, 3]);
    assert_eq!(bench.addresses(), [1, 2, 3]);
}

#[test]
fn slow_removals_are_followed_one_by_one() {
    let mut bench = Bench::with(guards(), 4);
    for last in [3, 2, 1] {
        bench.tell(1..=last);
        assert_eq!(bench.addresses(), (1..=last).collect::<Vec<_>>());
        bench.pass(secs(10));
    }
}

#[test]
fn rolling_replacement_is_not_held() {
    let mut bench = Bench::with(ViewGuards { max_removed: 25, ..guards() }, 4);
    // One leaves, then one joins that is up.
    for step in 0..8 {
        bench.tell(step + 2..=step + 4);
        assert_eq!(bench.addresses(), (step + 2..=step + 4).collect::<Vec<_>>());
        bench.up([step + 5]);
        bench.tell(step + 2..=step + 5);
        bench.pass(Duration::from_millis(100));
    }
    assert_eq!(bench.addresses(), [9, 10, 11, 12]);
    assert_eq!(bench.status().answers.held, 0);
}

#[test]
fn short_surge_counts_as_part_of_the_view() {
    let mut bench = Bench::with(guards(), 4);
    bench.up(5..=8);
    tell_each(&mut bench, &[&[1, 2, 3, 4, 5, 6, 7, 8], &[5, 6, 7, 8], &[6, 7, 8]]);
    assert_eq!(bench.addresses(), [5, 6, 7, 8], "5 of 8 within 10 s");
    bench.pass(secs(10));
    bench.tell([6, 7, 8]);
    assert_eq!(bench.addresses(), [6, 7, 8]);
}

#[test]
fn members_that_join_with_a_held_answer_count() {
    let mut bench = Bench::with(guards(), 3);
    let set = WholeSet { unreadable: Unreadable::unnamed(1), ..set_of((2..=10).map(one)) };
    bench.take(&Told::Whole(set));
    assert_eq!(bench.held(1), Some(HeldReason::Unreadable));
    bench.tell([2, 3]);
    assert_eq!(bench.addresses().len(), 10, "7 of 9");
}

#[test]
fn window_continues_in_the_next_process() {
    let mut bench = Bench::with(guards(), 4);
    tell_each(&mut bench, &[&[1, 2, 3], &[1, 2]]);
    let mut saved = bench.view.save(bench.now);
    saved.add_age(secs(5));
    bench.pass(secs(5));
    bench.view = View::restore(guards(), &saved, bench.now);
    bench.tell([1]);
    assert_eq!(bench.addresses(), [1, 2]);
    let mut bench = Bench::with(guards(), 4);
    tell_each(&mut bench, &[&[1, 2, 3], &[1, 2]]);
    bench.pass(secs(5));
    bench.view = View::restore(guards(), &saved, bench.now);
    bench.pass(secs(5));
    bench.tell([1]);
    assert_eq!(bench.addresses(), [1], "half of the view of 10 s ago");
}

#[test]
fn change_of_the_guards_is_no_later_reading() {
    let mut bench = Bench::with(guards(), 4);
    tell_each(&mut bench, &[&[1, 2, 3], &[1, 2], &[1]]);
    bench.pass(secs(60));
    bench.view.set_guards(ViewGuards { overlap: secs(5), ..guards() });
    bench.pass(secs(60));
    assert_eq!(bench.addresses(), [1, 2]);
}

#[test]
fn without_a_limit_no_earlier_size_counts() {
    let mut bench = Bench::with(ViewGuards { max_removed: 100, ..guards() }, 4);
    bench.tell([1]);
    bench.view.set_guards(guards());
    bench.tell([1, 2]);
    bench.tell([1]);
    assert_eq!(bench.addresses(), [1]);
}

#[test]
fn forgotten_answers_neither_remove_nor_confirm() {
    let mut bench = Bench::with(guards(), 4);
    bench.tell([1]);
    bench.pass(secs(60));
    bench.view.forget_answers();
    bench.view.set_guards(ViewGuards { max_removed: 100, ..guards() });
    bench.pass(secs(60));
    bench.take(&Told::Alive);
    assert_eq!(bench.addresses(), [1, 2, 3, 4], "no answer since");
    assert_eq!(bench.status().held_answer, None);
    bench.view.set_guards(guards());
    bench.tell([]);
    assert_eq!(bench.addresses(), [1, 2, 3, 4], "the first answer since");
    bench.pass(secs(10));
    bench.tell([]);
    assert!(bench.addresses().is_empty());
}

#[test]
fn two_sets_that_alternate_remove_no_member_of_both_and_hold_back_the_smaller_one() {
    let mut bench = Bench::with(guards(), 4);
    for _ in 0..100 {
        bench.tell([1]);
        bench.pass(secs(3));
        bench.tell([1, 2, 3, 4]);
        bench.pass(secs(3));
        assert_eq!(bench.addresses(), [1, 2, 3, 4]);
    }
}

#[test]
fn answer_without_members_lasts_for_the_hold_time_if_the_source_has_one() {
    for (empty, confirmed) in
        [(EmptyAnswer::Keep, false), (EmptyAnswer::Confirm, true), (EmptyAnswer::Accept, true)]
    {
        let guards = ViewGuards { empty, hold_empty: secs(30), min_backends: 2, ..guards() };
        let mut bench = Bench::with(guards, 3);
        bench.tell([]);
        bench.pass(secs(29));
        bench.tell([]);
        assert_eq!(bench.addresses().len(), 3, "{empty:?}");
        bench.pass(secs(1));
        bench.tell([]);
        assert_eq!(bench.addresses().is_empty(), confirmed, "{empty:?}");
    }
    let guards = ViewGuards { hold_empty: secs(30), min_backends: 2, ..guards() };
    let mut bench = Bench::with(guards, 3);
    bench.tell([1]);
    bench.pass(secs(10));
    bench.tell([1]);
    assert_eq!(bench.addresses(), [1], "the name exists, so confirm_after applies");
}
