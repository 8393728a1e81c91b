//! Which members get new sessions.

use super::*;
use MemberWish::{Draining, Sessions, Starting, Suspect};

fn critical(numbers: impl IntoIterator<Item = u8>) -> impl Iterator<Item = Announced> {
    numbers.into_iter().map(|number| with_wish(number, Wish::Critical))
}

fn healthy(numbers: impl IntoIterator<Item = u8>) -> impl Iterator<Item = Announced> {
    numbers.into_iter().map(one)
}

impl Bench {
    fn wishes(&self) -> Vec<MemberWish> {
        self.view.members().map(|member| member.wish).collect()
    }
}

#[test]
fn wishes_of_the_source_take_effect_at_once() {
    let mut bench = Bench::with(guards(), 4);
    let wishes = [Wish::Sessions, Wish::Starting, Wish::Draining, Wish::Sessions];
    assert!(bench.whole((1..).zip(wishes).map(|(number, wish)| with_wish(number, wish))));
    assert_eq!(bench.wishes(), [Sessions, Starting, Draining, Sessions]);
}

#[test]
fn a_critical_member_drains_or_is_suspect_or_leaves_by_the_rule() {
    for (rule, wish) in [(CriticalRule::Drain, Draining), (CriticalRule::Suspect, Suspect)] {
        let mut bench = Bench::with(ViewGuards { critical: rule, ..guards() }, 3);
        bench.whole(healthy([1, 2]).chain(critical([3])));
        assert_eq!(bench.wishes(), [Sessions, Sessions, wish]);
    }
    let mut bench = Bench::with(ViewGuards { critical: CriticalRule::Remove, ..guards() }, 3);
    bench.whole(healthy([1, 2]).chain(critical([3, 4])));
    assert_eq!(bench.addresses(), [1, 2]);
    bench.whole(healthy([1, 2, 3]));
    assert_eq!(bench.addresses(), [1, 2, 3]);
}

#[test]
fn removal_of_critical_members_is_subject_to_the_guards() {
    let guards = ViewGuards { critical: CriticalRule::Remove, min_backends: 3, ..guards() };
    let mut bench = Bench::with(guards, 3);
    bench.whole(healthy([1, 2]).chain(critical([3])));
    assert_eq!(bench.held(3), Some(HeldReason::Small));
    assert_eq!(bench.wish(3), Draining);
}

#[test]
fn a_burst_of_critical_members_drains_none() {
    let mut bench = Bench::with(guards(), 4);
    bench.whole(healthy([2, 3, 4]).chain(critical([1])));
    assert_eq!(bench.wishes(), [Draining, Sessions, Sessions, Sessions]);
    bench.pass(secs(2));
    bench.whole(healthy([4]).chain(critical([1, 2])).chain([with_wish(3, Wish::Draining)]));
    assert_eq!(bench.wishes(), [Sessions; 4]);
    assert!(bench.status().burst);
    assert!(bench.notices().contains(&NoticeKind::Burst { critical: 3, of: 4 }));
    bench.pass(secs(3600));
    assert_eq!(bench.wishes(), [Sessions; 4]);
    bench.whole(healthy([3, 4]).chain(critical([1, 2])));
    assert_eq!(bench.wishes(), [Draining, Draining, Sessions, Sessions]);
    assert!(!bench.status().burst);
}

#[test]
fn members_that_turn_critical_one_after_another_drain() {
    let mut bench = Bench::with(guards(), 4);
    for last in 1..=3 {
        bench.whole(critical(1..=last).chain(healthy(last + 1..=4)));
        bench.down([last]);
        bench.pass(secs(3));
    }
    assert_eq!(bench.wishes(), [Draining, Draining, Draining, Sessions]);
}

#[test]
fn a_wish_does_not_drain_the_last_eligible_member() {
    let mut bench = Bench::with(guards(), 2);
    bench.down([2]);
    bench.whole(critical([1]).chain(healthy([2])));
    assert_eq!(bench.wishes(), [Sessions, Sessions]);
    assert!(bench.notices().contains(&NoticeKind::LastEligible { address: at(1) }));
    bench.up([2]);
    assert!(bench.pass(secs(1)));
    assert_eq!(bench.wishes(), [Draining, Sessions]);
    assert_eq!(bench.view.next_due(), None);
}

#[test]
fn a_first_answer_with_critical_members_only_drains_none() {
    for rule in [CriticalRule::Drain, CriticalRule::Remove] {
        let mut bench = Bench::new(ViewGuards { critical: rule, ..guards() });
        bench.whole(critical(1..=3));
        assert_eq!(bench.wishes(), [Sessions; 3]);
        bench.pass(secs(1));
        bench.whole(critical([1]).chain(healthy([2, 3])));
        let left = if rule == CriticalRule::Drain { 3 } else { 2 };
        assert_eq!(bench.wishes().len(), left);
    }
    let mut bench = Bench::new(guards());
    bench.whole(critical(1..=3).chain(healthy([4])));
    assert_eq!(bench.wishes(), [Draining, Draining, Draining, Sessions]);
}

#[test]
fn members_that_arrive_critical_have_not_turned() {
    let mut bench = Bench::new(guards());
    bench.whole(critical([1]));
    assert_eq!((bench.wishes(), bench.status().burst), (vec![Draining], false));
    assert!(bench.notices().iter().all(|kind| !matches!(kind, NoticeKind::Burst { .. })));
    let mut bench = Bench::new(guards());
    bench.tell([]);
    bench.whole(critical([1, 2]));
    assert!(!bench.status().burst, "the source had no members before");
    let mut bench = Bench::with(guards(), 1);
    bench.whole(healthy([1]).chain((2..=4).map(|number| with_wish(number, Wish::Starting))));
    bench.whole(healthy([1]).chain(critical(2..=4)));
    assert!(!bench.status().burst, "members that start serve no sessions");
}

#[test]
fn an_untrusted_answer_changes_wishes() {
    let mut bench = Bench::with(guards(), 3);
    let set = set_of(healthy([1, 2]).chain(critical([3])));
    bench.take(&Told::Whole(WholeSet { trusted: false, ..set }));
    assert_eq!(bench.wishes(), [Sessions, Sessions, Draining]);
}

#[test]
fn a_stale_view_drains_except_for_one_eligible_member() {
    let guards = ViewGuards { stale_for: Some(secs(60)), ..guards() };
    let mut bench = Bench::with(guards, 3);
    assert_eq!(bench.view.next_due(), Some(bench.now + secs(60)));
    bench.down([1]);
    bench.pass(secs(30));
    bench.take(&Told::Alive);
    assert!(!bench.pass(secs(59)));
    bench.fail();
    assert!(bench.pass(secs(1)));
    assert_eq!(bench.wishes(), [Draining, Sessions, Draining]);
    assert!(bench.status().stale);
    bench.down([2]);
    assert!(bench.pass(secs(1)));
    assert_eq!(bench.wishes(), [Draining, Draining, Sessions]);
    assert!(bench.tell([1, 2, 3]));
    assert_eq!(bench.wishes(), [Sessions; 3]);
    assert!(!bench.status().stale);
}
