//! Members that stay for newcomers.

use super::*;

#[test]
fn a_replaced_member_stays_until_its_newcomer_is_up() {
    let mut bench = Bench::with(guards(), 2);
    bench.tell([2, 3]);
    assert_eq!(bench.addresses(), [1, 2, 3]);
    let held = bench.member(1).held.unwrap();
    assert_eq!((held.reason, held.until), (HeldReason::Overlap, Some(bench.now + secs(10))));
    assert!(!bench.pass(secs(3)));
    bench.up([3]);
    assert!(bench.pass(secs(1)));
    assert_eq!(bench.addresses(), [2, 3]);
    assert_eq!(bench.view.next_due(), None);
}

#[test]
fn a_replaced_member_leaves_after_the_overlap() {
    let mut bench = Bench::with(guards(), 2);
    bench.tell([2, 3]);
    assert!(!bench.pass(Duration::from_millis(9_999)));
    assert!(bench.pass(Duration::from_millis(1)));
    assert_eq!(bench.addresses(), [2, 3]);
}

#[test]
fn each_newcomer_that_is_not_up_keeps_one_member() {
    let mut bench = Bench::with(guards(), 4);
    bench.tell([4, 5, 6]);
    assert_eq!(bench.addresses(), [1, 2, 4, 5, 6], "of 3 members that leave, 2 are replaced");
    bench.up([6]);
    bench.pass(secs(1));
    assert_eq!(bench.addresses(), [1, 4, 5, 6]);
}

#[test]
fn members_that_are_up_stay_rather_than_others() {
    let mut bench = Bench::with(guards(), 4);
    bench.down([1, 2]);
    bench.tell([4, 5]);
    assert_eq!(bench.addresses(), [3, 4, 5]);
}

#[test]
fn a_newcomer_that_is_up_already_keeps_no_member() {
    let mut bench = Bench::with(guards(), 2);
    bench.up([3]);
    bench.tell([2, 3]);
    assert_eq!(bench.addresses(), [2, 3]);
}

#[test]
fn a_newcomer_that_is_critical_or_starts_is_not_up_and_one_that_drains_keeps_no_member() {
    for wish in [Wish::Critical, Wish::Starting] {
        let mut bench = Bench::with(guards(), 2);
        bench.up([3]);
        bench.whole([one(2), with_wish(3, wish)]);
        assert_eq!(bench.addresses(), [1, 2, 3]);
        bench.tell([2, 3]);
        assert_eq!(bench.addresses(), [2, 3]);
    }
    let mut bench = Bench::with(guards(), 2);
    bench.whole([one(2), with_wish(3, Wish::Draining)]);
    assert_eq!(bench.addresses(), [2, 3]);
}

#[test]
fn a_member_that_returns_during_the_overlap_stays() {
    let mut bench = Bench::with(guards(), 2);
    bench.tell([2, 3]);
    bench.pass(secs(3));
    bench.tell([1, 2, 3]);
    assert_eq!(bench.held(1), None);
    bench.pass(secs(60));
    assert_eq!(bench.addresses(), [1, 2, 3]);
}

#[test]
fn newcomers_of_a_held_answer_have_had_their_overlap_when_it_is_confirmed() {
    let mut bench = Bench::with(guards(), 10);
    bench.tell([1, 11]);
    bench.pass(secs(10));
    bench.tell([1, 11]);
    assert_eq!(bench.addresses(), [1, 11]);
}

#[test]
fn with_missing_the_newcomer_of_the_first_answer_counts() {
    let mut bench = Bench::with(ViewGuards { missing: 2, ..guards() }, 2);
    bench.tell([2, 3]);
    bench.pass(secs(1));
    bench.tell([2, 3]);
    assert_eq!(bench.held(1), Some(HeldReason::Overlap));
    bench.up([3]);
    bench.pass(secs(1));
    assert_eq!(bench.addresses(), [2, 3]);
}

#[test]
fn a_set_that_never_comes_up_does_not_replace_the_last_eligible_member_by_one_answer() {
    let mut bench = Bench::with(guards(), 3);
    bench.tell([11, 12, 13]);
    bench.pass(secs(60));
    assert_eq!(bench.addresses(), [1, 11, 12, 13]);
    assert_eq!(bench.held(1), Some(HeldReason::LastEligible));
    bench.up([12]);
    bench.pass(secs(2));
    assert_eq!(bench.addresses(), [11, 12, 13]);
}

#[test]
fn a_name_at_a_new_address_gets_a_suffix_while_the_old_member_stays() {
    let mut bench = Bench::with(guards(), 2);
    let moved = Announced { address: at(9), ..one(1) };
    bench.whole([moved.clone(), one(2)]);
    assert_eq!(bench.names(), ["s1", "s2", "s1@10.0.0.9:80"]);
    bench.up([9]);
    bench.pass(secs(1));
    bench.whole([moved, one(2)]);
    assert_eq!(bench.names(), ["s2", "s1@10.0.0.9:80"], "a new name would be a new backend");
    bench.up([5]);
    bench.whole([Announced { address: at(5), ..one(1) }, one(2)]);
    assert_eq!(bench.names(), ["s2", "s1"]);
}
