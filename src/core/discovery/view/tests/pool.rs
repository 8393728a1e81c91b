//! The last eligible backend of the pool, which can be of another source.

use super::*;
use MemberWish::{Draining, Sessions};

/// A view with members 1 and 2, of which 2 is down, in a pool with backend 99 of the file.
fn in_a_pool(serves: bool) -> Bench {
    let mut bench = Bench::with(guards(), 2);
    bench.down([2]);
    bench.sight.shared.insert(at(99));
    if serves {
        bench.up([99]);
    }
    bench
}

#[test]
fn last_eligible_member_of_a_view_leaves_at_once_if_another_source_serves() {
    let mut bench = in_a_pool(true);
    bench.tell([2]);
    assert_eq!(bench.addresses(), [2]);
    let mut bench = in_a_pool(false);
    bench.tell([2]);
    assert_eq!(bench.held(1), Some(HeldReason::LastEligible));
    bench.pass(secs(20));
    assert_eq!(bench.addresses(), [1, 2]);
    bench.up([99]);
    bench.pass(secs(1));
    assert_eq!(bench.addresses(), [2]);
}

#[test]
fn member_that_another_source_lists_too_is_not_lost() {
    let mut bench = in_a_pool(false);
    bench.sight.shared.insert(at(1));
    bench.tell([2]);
    assert_eq!(bench.addresses(), [2]);
}

#[test]
fn wish_drains_the_last_eligible_member_of_a_view_if_another_source_serves() {
    for (serves, wish) in [(true, Draining), (false, Sessions)] {
        let mut bench = in_a_pool(serves);
        bench.whole([with_wish(1, Wish::Draining), one(2)]);
        assert_eq!(bench.wish(1), wish);
    }
}

#[test]
fn stale_view_keeps_no_member_if_another_source_serves() {
    let guards = ViewGuards { stale_for: Some(secs(60)), ..guards() };
    let mut bench = Bench::with(guards, 3);
    bench.sight.shared.extend([at(99), at(3)]);
    bench.up([99]);
    bench.pass(secs(60));
    let wishes = |bench: &Bench| bench.view.members().map(|one| one.wish).collect::<Vec<_>>();
    assert_eq!(wishes(&bench), [Draining, Draining, Sessions], "another source lists 3, too");
    bench.down([99, 3]);
    bench.pass(secs(1));
    assert_eq!(wishes(&bench), [Sessions, Draining, Sessions]);
    bench.down([1]);
    bench.pass(secs(1));
    assert_eq!(wishes(&bench), [Draining, Sessions, Sessions]);
}
