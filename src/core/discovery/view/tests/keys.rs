//! Unreadable announcements with a key hold only what the key announced before.

use super::*;

/// A trusted set of these members, with unreadable announcements of these keys.
fn set_without(numbers: impl IntoIterator<Item = u8>, unread: &[&str]) -> WholeSet {
    let mut unreadable = Unreadable::default();
    unread.iter().for_each(|key| unreadable.add(key));
    WholeSet { unreadable, ..set_of(numbers.into_iter().map(one)) }
}

/// Member `N` has the key `kN`.
fn keyed(set: WholeSet) -> WholeSet {
    let key = |member: &Announced| (member.address, member.name.replace('s', "k").into());
    WholeSet { keys: set.members.iter().map(key).collect(), ..set }
}

impl Bench {
    fn whole_set(&mut self, set: WholeSet) -> bool {
        self.take(&Told::Whole(set))
    }

    fn restore(&mut self) {
        let text = serde_json::to_string(&self.view.save(self.now)).unwrap();
        let saved: SavedView = serde_json::from_str(&text).unwrap();
        self.view = View::restore(guards(), &saved, self.now);
    }
}

#[test]
fn an_unreadable_key_holds_only_the_member_that_it_announced() {
    let mut bench = Bench::with(guards(), 6);
    bench.whole_set(set_without([1, 2, 3, 4], &["s6"]));
    assert_eq!(bench.addresses(), [1, 2, 3, 4, 6], "5 leaves at once");
    assert_eq!(bench.held(6), Some(HeldReason::Unreadable));
    let held = bench.status().held_answer.unwrap();
    assert_eq!((held.removes, held.confirmable_in), (1, Some(secs(10))));
    bench.pass(secs(9));
    bench.whole_set(set_without([1, 2, 3], &["s6"]));
    assert_eq!(bench.addresses(), [1, 2, 3, 6]);
    bench.pass(secs(1));
    bench.take(&Told::Alive);
    assert_eq!(bench.addresses(), [1, 2, 3], "a second answer confirms the removal");
}

#[test]
fn an_unreadable_key_without_a_member_holds_nothing() {
    let mut bench = Bench::with(guards(), 4);
    for numbers in [&[1, 2, 3][..], &[1, 2]] {
        bench.whole_set(set_without(numbers.iter().copied(), &["new"]));
        assert_eq!(bench.addresses(), numbers);
        bench.pass(secs(20));
    }
}

#[test]
fn an_unreadable_key_that_still_announces_its_member_holds_nothing() {
    let mut bench = Bench::with(guards(), 4);
    bench.whole_set(set_without([1, 2, 4], &["s4"]));
    assert_eq!(bench.addresses(), [1, 2, 4]);
}

#[test]
fn a_member_with_a_name_of_its_own_is_found_by_its_key() {
    let mut bench = Bench::new(guards());
    bench.up(1..=6);
    bench.whole_set(keyed(set_of((1..=6).map(one))));
    bench.restore();
    bench.whole_set(keyed(set_without([1, 2, 3, 4], &["k6"])));
    assert_eq!(bench.addresses(), [1, 2, 3, 4, 6]);
    bench.restore();
    bench.whole_set(keyed(set_without([1, 2, 3], &["k6"])));
    assert_eq!(bench.addresses(), [1, 2, 3, 6], "an absent member keeps its key");
    bench.pass(secs(10));
    bench.take(&Told::Alive);
    assert_eq!(bench.addresses(), [1, 2, 3]);
    assert!(bench.view.save(bench.now).members.iter().all(|member| member.key.is_some()));
}

#[test]
fn more_unreadable_keys_than_have_a_name_hold_all_absent_members() {
    let mut bench = Bench::with(guards(), 4);
    let unread: Vec<String> = (0..=crate::discovery::UNREADABLE_NAMED_MAX)
        .map(|number| format!("k{number:03}"))
        .collect();
    let unread: Vec<&str> = unread.iter().map(|key| &**key).collect();
    bench.whole_set(set_without([1, 2, 3], &unread));
    assert_eq!(bench.held(4), Some(HeldReason::Unreadable));
}

#[test]
fn a_view_that_was_saved_without_keys_holds_all_absent_members_until_it_has_them() {
    let mut bench = Bench::with(guards(), 5);
    let saved = SavedView { keyed: false, ..bench.view.save(bench.now) };
    bench.view = View::restore(guards(), &saved, bench.now);
    bench.whole_set(set_without([1, 2, 3, 4], &["other"]));
    assert_eq!(bench.held(5), Some(HeldReason::Unreadable), "it can have had this key");
    bench.tell(1..=5);
    bench.whole_set(set_without([1, 2, 3, 4], &["other"]));
    assert_eq!(bench.addresses(), [1, 2, 3, 4]);
}

#[test]
fn notice_and_status_have_the_keys() {
    let mut bench = Bench::with(guards(), 4);
    bench.notices();
    bench.whole_set(set_without(1..=4, &["s9"]));
    let unreadable = bench.status().unreadable;
    assert_eq!(unreadable.text(), "1 unreadable: \"s9\"");
    let counts = RefusedCounts { unreadable: 1, ..Default::default() };
    assert_eq!(bench.notices(), [NoticeKind::Refused { counts, unreadable }]);
    bench.pass(NOTICE_INTERVAL);
    bench.whole_set(set_without(1..=4, &["s8"]));
    assert_eq!(bench.notices().len(), 1, "the same number, another key");
}
