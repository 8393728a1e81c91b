//! What the guards over many backends allow.

use super::*;
use guards::{CORRELATED_LOOK, down_max};

fn view(live: usize, fresh: usize) -> PathView {
    let heard = live - fresh;
    PathView { live, suspects: fresh, fresh, heard, members: live, ..PathView::default() }
}

#[test]
fn so_many_may_be_out_at_once() {
    let half: Vec<usize> = (0..=6).map(|members| down_max(50, members)).collect();
    assert_eq!(half, [0, 0, 1, 1, 2, 2, 3]);
    assert_eq!((down_max(10, 5), down_max(0, 5), down_max(100, 5)), (1, 0, 5));
}

#[test]
fn the_limit_holds_back_what_is_confirmed_but_not_what_is_proven() {
    let pool = PathView { live: 2, down: 2, members: 4, ..PathView::default() };
    let refused = may_remove(false, pool, 50, ChannelState::Alive, [None, None]).unwrap_err();
    assert_eq!(refused, "2 of 4 backends are down; max_ejected = 50%");
    assert_eq!(may_remove(true, pool, 50, ChannelState::Alive, [None, None]), Ok(()));
    let one_down = PathView { down: 1, ..pool };
    assert_eq!(may_remove(false, one_down, 50, ChannelState::Alive, [None, None]), Ok(()));
}

#[test]
fn a_pool_of_two_loses_one_and_a_pool_of_one_none() {
    let pool = |members, down| PathView { members, down, live: 1, ..PathView::default() };
    let permit = |pool| may_remove(false, pool, 50, ChannelState::Alive, [None, None]);
    assert!(permit(pool(2, 0)).is_ok());
    assert!(permit(pool(2, 1)).is_err() && permit(pool(1, 0)).is_err());
}

#[test]
fn the_channel_is_silent_before_any_backend_is_overdue() {
    let mut lab = Lab::up();
    let mut channel = ChannelGuard::default();
    assert_eq!(channel.state(4, INTERVAL, lab.now), ChannelState::Alive, "nobody was ever heard");
    assert!(!channel.beat(INTERVAL, lab.now));
    let due = lab.detector.due().unwrap();
    assert_eq!(channel.state(4, INTERVAL, due - ms(50)), ChannelState::Silent);
    assert_eq!(channel.state(1, INTERVAL, due), ChannelState::Alive, "one is no channel");
    lab.now = due;
    assert!(channel.beat(INTERVAL, lab.now), "heard again");
    assert_eq!(channel.state(4, INTERVAL, lab.now), ChannelState::Alive);
}

#[test]
fn without_any_heartbeats_other_backends_must_answer_probes() {
    let deaf = PathView { live: 4, members: 4, ..PathView::default() };
    let refused = may_remove(false, deaf, 50, ChannelState::Silent, [None, None]).unwrap_err();
    assert!(refused.contains("the fault may be on this host"), "{refused}");
    let answering = PathView { answering: 3, ..deaf };
    assert_eq!(may_remove(false, answering, 50, ChannelState::Silent, [None, None]), Ok(()));
}

#[test]
fn one_suspect_freezes_nothing_whatever_the_size() {
    let now = tidegate_net::clock::now();
    for live in 1..10 {
        assert_eq!(PathGuard::default().look(view(live, 1), now), None, "one of {live}");
    }
}

#[test]
fn half_that_fall_together_wait_until_the_others_show_that_the_path_works() {
    let now = tidegate_net::clock::now();
    let mut guard = PathGuard::default();
    assert!(matches!(guard.look(view(4, 2), now), Some(FreezeChange::Started(_))));
    let freezes = [guard.freeze(), None];
    let refused = may_remove(false, view(4, 2), 50, ChannelState::Alive, freezes).unwrap_err();
    assert_eq!(refused, "2 of 4 backends became suspect together");
    assert_eq!(guard.due(), Some(now + CORRELATED_LOOK));
    assert_eq!(guard.look(view(4, 2), now + ms(200)), None);
    let thawed = guard.look(view(4, 2), now + CORRELATED_LOOK).unwrap();
    assert!(matches!(thawed, FreezeChange::Ended(reason) if reason.contains("the path works")));
    assert_eq!((guard.freeze(), guard.due()), (None, None));
}

#[test]
fn silent_path_stays_frozen_until_a_sender_is_heard() {
    let mut now = tidegate_net::clock::now();
    let mut guard = PathGuard::default();
    guard.look(view(10, 10), now);
    for _ in 0..100 {
        now = guard.due().unwrap();
        assert_eq!(guard.look(view(10, 10), now), None);
    }
    let one_heard = PathView { heard: 1, suspects: 9, ..view(10, 10) };
    now = guard.due().unwrap();
    assert!(guard.look(one_heard, now).is_some(), "it was patient enough");
}

#[test]
fn freeze_ends_when_no_backend_is_suspect() {
    let now = tidegate_net::clock::now();
    let mut guard = PathGuard::default();
    guard.look(view(3, 3), now);
    assert!(matches!(guard.look(view(3, 0), now + ms(1)), Some(FreezeChange::Ended(_))));
}

#[test]
fn detectors_are_counted_by_how_they_stand() {
    let (mut silent, down, up) = (Lab::up(), Lab::down(), Lab::up());
    silent.fall_silent();
    let now = silent.now;
    let mut heard = up;
    while heard.now < now {
        heard.beat();
    }
    let all = [&silent.detector, &down.detector, &heard.detector];
    let view = PathView::of(all, None, now);
    assert_eq!((view.members, view.live, view.down), (3, 2, 1));
    assert_eq!((view.suspects, view.fresh), (1, 1));
    assert_eq!(view.heard, 1);
    let frozen = |since| PathView::of(all, Some(since), now).heard;
    assert_eq!((frozen(now - INTERVAL * 2), frozen(now)), (1, 0), "nothing since");
}

#[test]
fn a_loop_that_is_late_by_more_than_an_interval_stalled() {
    let due = tidegate_net::clock::now();
    assert!(!is_late(due, due + INTERVAL, INTERVAL));
    assert!(is_late(due, due + ms(101), INTERVAL));
}
