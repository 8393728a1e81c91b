//! Which members leave by an answer, and when.

use super::*;

#[test]
fn an_answer_that_only_removes_takes_effect_at_once() {
    let mut bench = Bench::with(guards(), 4);
    assert!(bench.tell([1, 2, 4]));
    assert_eq!(bench.addresses(), [1, 2, 4]);
}

#[test]
fn an_empty_answer_is_held_until_a_later_one_confirms_it() {
    let mut bench = Bench::with(guards(), 2);
    bench.tell([]);
    assert_eq!(bench.addresses(), [1, 2]);
    assert_eq!(bench.held(1), Some(HeldReason::Small));
    let held = bench.status().held_answer.unwrap();
    assert_eq!((held.removes, held.confirmable_in), (2, Some(secs(10))));
    bench.pass(secs(9));
    assert!(!bench.tell([]));
    assert_eq!(bench.addresses(), [1, 2]);
    bench.pass(secs(1));
    assert!(bench.tell([]));
    assert!(bench.addresses().is_empty());
    assert!(bench.view.has_answer());
    assert_eq!(bench.status().answers.held, 2);
}

#[test]
fn a_full_answer_ends_a_held_one() {
    let mut bench = Bench::with(guards(), 2);
    bench.tell([]);
    bench.pass(secs(9));
    bench.tell([1, 2]);
    assert_eq!((bench.held(1), bench.status().held_answer), (None, None));
    bench.pass(secs(9));
    bench.tell([]);
    assert_eq!(bench.addresses(), [1, 2], "the first of the two answers is 0 s old");
}

#[test]
fn with_keep_no_number_of_empty_answers_empties_the_view() {
    let mut bench = Bench::with(ViewGuards { empty: EmptyAnswer::Keep, ..guards() }, 3);
    for _ in 0..5 {
        bench.tell([]);
        bench.pass(secs(60));
    }
    assert_eq!(bench.addresses(), [1, 2, 3]);
    assert_eq!(bench.held(1), Some(HeldReason::Kept));
    assert_eq!(bench.status().held_answer.unwrap().confirmable_in, None);
    bench.tell([3]);
    assert_eq!(bench.addresses(), [1, 2, 3], "an empty answer confirms no smaller one");
    bench.pass(secs(10));
    bench.tell([3]);
    assert_eq!(bench.addresses(), [3]);
}

#[test]
fn with_accept_one_empty_answer_empties_the_view() {
    let guards = ViewGuards { empty: EmptyAnswer::Accept, min_backends: 0, ..guards() };
    let mut bench = Bench::with(guards, 3);
    assert!(bench.tell([]));
    assert!(bench.addresses().is_empty());
}

#[test]
fn a_set_below_the_minimum_is_held_and_its_newcomers_join_at_once() {
    let guards = ViewGuards { min_backends: 3, max_removed: 100, ..guards() };
    let mut bench = Bench::with(guards, 3);
    bench.tell([1, 7]);
    assert_eq!(bench.addresses(), [1, 2, 3, 7]);
    assert_eq!(bench.held(2), Some(HeldReason::Small));
    bench.up([7]);
    bench.pass(secs(10));
    bench.tell([1, 7]);
    assert_eq!(bench.addresses(), [1, 7]);
}

#[test]
fn an_answer_that_shrinks_the_view_by_more_than_the_share_is_held() {
    let mut bench = Bench::with(guards(), 10);
    bench.tell(1..=4);
    assert_eq!(bench.addresses().len(), 10);
    assert_eq!(bench.held(5), Some(HeldReason::MaxRemoved));
    let mut bench = Bench::with(guards(), 10);
    bench.tell(1..=5);
    assert_eq!(bench.addresses(), [1, 2, 3, 4, 5], "half of 10 is not more than 50 %");
}

#[test]
fn registry_that_is_filled_again_member_by_member_loses_none() {
    for (empty, first) in [(EmptyAnswer::Confirm, 1), (EmptyAnswer::Keep, 0)] {
        let mut bench = Bench::with(ViewGuards { empty, ..guards() }, 5);
        for last in [first, 3, 4] {
            bench.tell(1..=last);
            bench.pass(Duration::from_millis(100));
            assert_eq!(bench.addresses(), [1, 2, 3, 4, 5], "{last} of 5");
        }
        assert_eq!(bench.held(5), Some(HeldReason::Incomplete));
        bench.tell(1..=5);
        assert_eq!(bench.held(5), None);
        bench.tell(1..=4);
        assert_eq!(bench.addresses(), [1, 2, 3, 4], "the answer before was complete");
    }
}

#[test]
fn removal_after_a_held_answer_is_confirmed_by_a_repetition() {
    let mut bench = Bench::with(guards(), 5);
    bench.tell([1]);
    bench.pass(secs(5));
    bench.tell(1..=4);
    assert_eq!(bench.held(5), Some(HeldReason::Incomplete));
    bench.pass(secs(5));
    bench.take(&Told::Alive);
    assert_eq!(bench.addresses(), [1, 2, 3, 4], "absent for 10 s");
}

#[test]
fn a_replacement_is_no_shrinkage() {
    let mut bench = Bench::with(guards(), 4);
    bench.up(11..=14);
    bench.tell(11..=14);
    assert_eq!(bench.addresses(), [11, 12, 13, 14]);
}

#[test]
fn what_both_answers_lack_is_confirmed() {
    let mut bench = Bench::with(guards(), 10);
    bench.tell([1, 2, 3, 4]);
    bench.pass(secs(10));
    // 5 is back, and 3 and 4 are absent for the first time: 2 of 5 that are left.
    bench.tell([1, 2, 5]);
    assert_eq!(bench.addresses(), [1, 2, 5]);
    let mut bench = Bench::with(guards(), 10);
    bench.tell([1, 2, 3, 4]);
    bench.pass(secs(10));
    bench.tell([1]);
    assert_eq!(bench.addresses(), [1, 2, 3, 4], "3 of 4 wait for their own confirmation");
}

#[test]
fn a_member_that_returns_for_one_answer_must_be_absent_again_for_as_long() {
    let mut bench = Bench::with(guards(), 10);
    bench.tell([1, 2, 3]);
    bench.pass(secs(5));
    bench.tell([1, 2, 3, 4]);
    bench.pass(secs(5));
    bench.tell([1]);
    assert_eq!(bench.addresses(), [1, 2, 3, 4], "4 counts from its second absence");
}

#[test]
fn an_untrusted_answer_adds_and_alters_but_neither_removes_nor_confirms() {
    let mut bench = Bench::with(guards(), 3);
    let heavy = Announced { weight: Some(9), ..one(1) };
    let set = WholeSet { trusted: false, ..set_of([heavy, one(7)]) };
    assert!(bench.take(&Told::Whole(set)));
    assert_eq!(bench.addresses(), [1, 2, 3, 7]);
    assert_eq!((bench.member(1).weight, bench.held(2)), (9, Some(HeldReason::Untrusted)));
    assert_eq!(bench.status().answers.refused, 1);
    bench.tell([]);
    bench.pass(secs(60));
    bench.tell_untrusted([]);
    assert_eq!(bench.addresses(), [1, 2, 3, 7]);
    bench.tell([]);
    assert!(bench.addresses().is_empty());
}

#[test]
fn an_untrusted_answer_does_not_interrupt_a_held_one() {
    let mut bench = Bench::with(guards(), 3);
    bench.tell([]);
    bench.pass(secs(5));
    bench.tell_untrusted([1, 2, 3]);
    bench.pass(secs(5));
    bench.tell([]);
    assert!(bench.addresses().is_empty());
}

#[test]
fn a_sign_of_life_repeats_the_last_set() {
    let mut bench = Bench::with(guards(), 3);
    bench.tell([]);
    bench.pass(secs(10));
    assert!(bench.take(&Told::Alive));
    assert!(bench.addresses().is_empty());
    let mut bench = Bench::with(guards(), 3);
    bench.tell_untrusted([]);
    bench.pass(secs(10));
    assert!(!bench.take(&Told::Alive), "as the set was not trusted");
}

#[test]
fn a_failure_neither_confirms_nor_interrupts() {
    let mut bench = Bench::with(ViewGuards { missing: 2, ..guards() }, 3);
    bench.tell([1, 2]);
    bench.fail();
    assert_eq!(bench.addresses(), [1, 2, 3]);
    bench.tell([1, 2]);
    assert_eq!(bench.addresses(), [1, 2]);
}

#[test]
fn a_member_leaves_after_the_set_number_of_trusted_answers_without_it() {
    let mut bench = Bench::with(ViewGuards { missing: 3, ..guards() }, 3);
    bench.tell([1, 2]);
    bench.tell_untrusted([1, 2]);
    bench.tell([1, 2]);
    assert_eq!(bench.held(3), Some(HeldReason::Missing));
    assert_eq!(bench.status().held_answer, None);
    bench.tell([1, 2, 3]);
    assert_eq!(bench.held(3), None);
    bench.tell([1, 2]);
    bench.tell([1, 2]);
    assert_eq!(bench.addresses(), [1, 2, 3]);
    bench.tell([1, 2]);
    assert_eq!(bench.addresses(), [1, 2]);
}

#[test]
fn a_rotating_part_of_the_addresses_changes_nothing() {
    let mut bench = Bench::with(ViewGuards { missing: 2, ..guards() }, 4);
    for turn in 0..20 {
        bench.tell([1 + turn % 4, 1 + (turn + 1) % 4, 1 + (turn + 2) % 4]);
        assert_eq!(bench.addresses(), [1, 2, 3, 4]);
        bench.pass(secs(30));
    }
}

#[test]
fn an_unreadable_announcement_can_be_any_absent_member() {
    let mut bench = Bench::with(guards(), 3);
    let set = WholeSet { unreadable: Unreadable::unnamed(1), ..set_of([1, 2].map(one)) };
    bench.take(&Told::Whole(set.clone()));
    assert_eq!(bench.held(3), Some(HeldReason::Unreadable));
    assert_eq!(bench.status().refused.unreadable, 1);
    bench.pass(secs(10));
    bench.take(&Told::Whole(set));
    assert_eq!(bench.addresses(), [1, 2]);
}

#[test]
fn a_small_first_answer_is_no_view_until_it_is_confirmed() {
    let mut bench = Bench::new(guards());
    bench.tell([]);
    assert!(!bench.view.has_answer());
    assert_eq!(bench.status().held_answer.unwrap().confirmable_in, Some(secs(10)));
    bench.pass(secs(10));
    bench.tell([]);
    assert!(bench.view.has_answer());
    let mut bench = Bench::new(guards());
    bench.tell_untrusted([]);
    assert!(!bench.view.has_answer());
    bench.tell_untrusted([1]);
    assert!(bench.view.has_answer());
}

#[test]
fn the_last_eligible_member_leaves_only_after_a_second_answer() {
    let mut bench = Bench::with(guards(), 2);
    bench.down([2]);
    bench.tell([2]);
    assert_eq!(bench.addresses(), [1, 2]);
    assert_eq!(bench.held(1), Some(HeldReason::LastEligible));
    bench.pass(secs(100));
    assert_eq!(bench.addresses(), [1, 2]);
    bench.tell([2]);
    assert_eq!(bench.addresses(), [2]);
}

#[test]
fn the_last_eligible_member_leaves_when_another_one_is_eligible() {
    let mut bench = Bench::with(guards(), 2);
    bench.down([2]);
    bench.tell([2]);
    bench.up([2]);
    assert!(bench.pass(secs(11)));
    assert_eq!(bench.addresses(), [2]);
    assert_eq!(bench.view.next_due(), None);
}

#[test]
fn a_member_with_another_name_replaces_the_one_at_its_address() {
    let mut bench = Bench::with(guards(), 2);
    bench.pass(secs(5));
    let renamed = || [Announced { name: "new".into(), ..one(1) }, one(2)];
    bench.take(&Told::Whole(WholeSet { trusted: false, ..set_of(renamed()) }));
    assert_eq!(bench.names(), ["s1", "s2"], "an untrusted answer removes no name");
    bench.whole(renamed());
    assert_eq!(bench.names(), ["new", "s2"]);
    assert_eq!(bench.member(1).since, bench.now);
}

#[test]
fn swapped_names_are_swapped() {
    let mut bench = Bench::with(guards(), 2);
    let named = |number, name: &str| Announced { name: name.into(), ..one(number) };
    bench.whole([named(1, "s2"), named(2, "s1")]);
    assert_eq!(bench.names(), ["s2", "s1"]);
}

#[test]
fn narrower_ranges_remove_by_the_guards_without_a_new_answer() {
    let mut bench = Bench::with(guards(), 4);
    let narrow = |net: &str| ViewGuards { addresses: vec![net.parse().unwrap()], ..guards() };
    bench.view.set_guards(narrow("10.0.0.0/30"));
    assert!(bench.pass(secs(0)));
    assert_eq!(bench.addresses(), [1, 2, 3]);
    bench.view.set_guards(narrow("10.0.0.1/32"));
    bench.pass(secs(0));
    assert_eq!(bench.addresses(), [1, 2, 3], "2 of 3 are more than 50 %");
    bench.pass(secs(10));
    bench.take(&Told::Alive);
    assert_eq!(bench.addresses(), [1]);
    bench.view.set_guards(guards());
    assert!(bench.pass(secs(0)));
    assert_eq!(bench.addresses(), [1, 2, 3, 4], "the last answer has them all");
}

#[test]
fn a_change_of_the_guards_confirms_nothing() {
    let mut bench = Bench::with(guards(), 3);
    bench.tell([]);
    bench.pass(secs(60));
    bench.view.set_guards(ViewGuards { overlap: secs(5), ..guards() });
    bench.pass(secs(60));
    assert_eq!(bench.addresses(), [1, 2, 3]);
    bench.view.set_guards(ViewGuards { empty: EmptyAnswer::Accept, ..guards() });
    bench.pass(secs(0));
    assert!(bench.addresses().is_empty(), "the operator accepts what the answer says");
}
