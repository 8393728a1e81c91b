//! Removals that the guards over many backends allow.

use super::*;
use guards::{CORRELATED_LOOK, down_max};

fn view(live: usize, fresh: usize) -> PathView {
    let heard = live - fresh;
    PathView { live, suspects: fresh, fresh, heard, members: live, ..PathView::default() }
}

#[test]
fn share_of_a_pool_that_may_be_down() {
    let half: Vec<usize> = (0..=6).map(|members| down_max(50, members)).collect();
    assert_eq!(half, [0, 0, 1, 1, 2, 2, 3]);
    assert_eq!((down_max(10, 5), down_max(0, 5), down_max(100, 5)), (1, 0, 5));
}

#[test]
fn max_ejected_holds_confirmed_but_not_refused_backends() {
    let pool = PathView { live: 2, down: 2, members: 4, ..PathView::default() };
    let refused = may_remove(false, pool, 50, ChannelState::Alive, [None, None]).unwrap_err();
    assert_eq!(refused, "2 of 4 backends are down; max_ejected = 50%");
    assert_eq!(may_remove(true, pool, 50, ChannelState::Alive, [None, None]), Ok(()));
    let one_down = PathView { down: 1, ..pool };
    assert_eq!(may_remove(false, one_down, 50, ChannelState::Alive, [None, None]), Ok(()));
}

#[test]
fn pool_of_two_loses_one_backend_and_pool_of_one_none() {
    let pool = |members, down| PathView { members, down, live: 1, ..PathView::default() };
    let permit = |pool| may_remove(false, pool, 50, ChannelState::Alive, [None, None]);
    assert!(permit(pool(2, 0)).is_ok());
    assert!(permit(pool(2, 1)).is_err() && permit(pool(1, 0)).is_err());
}

#[test]
fn channel_is_silent_before_any_backend_is_overdue() {
    let mut lab = Lab::up();
    let mut channel = ChannelGuard::default();
    assert_eq!(channel.state(4, INTERVAL, lab.now), ChannelState::Alive, "no heartbeat yet");
    assert!(!channel.beat(INTERVAL, lab.now));
    let due = lab.detector.due().unwrap();
    assert_eq!(channel.state(4, INTERVAL, due - ms(50)), ChannelState::Silent);
    assert_eq!(channel.state(1, INTERVAL, due), ChannelState::Alive, "a single backend");
    lab.now = due;
    assert!(channel.beat(INTERVAL, lab.now), "the silence ends");
    assert_eq!(channel.state(4, INTERVAL, lab.now), ChannelState::Alive);
}

#[test]
fn removal_during_a_silent_channel_needs_backends_that_answer_probes() {
    let silent = PathView { live: 4, members: 4, ..PathView::default() };
    let refused = may_remove(false, silent, 50, ChannelState::Silent, [None, None]).unwrap_err();
    assert!(refused.contains("the fault may be on this host"), "{refused}");
    let answering = PathView { answering: 3, ..silent };
    assert_eq!(may_remove(false, answering, 50, ChannelState::Silent, [None, None]), Ok(()));
}

#[test]
fn one_suspect_never_starts_a_freeze() {
    let now = tidegate_net::clock::now();
    for live in 1..10 {
        assert_eq!(PathGuard::default().look(view(live, 1), now), None, "one of {live}");
    }
}

#[test]
fn simultaneous_suspicions_are_frozen_until_other_backends_are_heard() {
    let now = tidegate_net::clock::now();
    let mut guard = PathGuard::default();
    assert!(matches!(guard.look(view(4, 2), now), Some(FreezeChange::Started(_))));
    let freezes = [guard.freeze(), None];
    let refused = may_remove(false, view(4, 2), 50, ChannelState::Alive, freezes).unwrap_err();
    assert_eq!(refused, "2 of 4 backends became suspect together");
    assert_eq!(guard.due(), Some(now + CORRELATED_LOOK));
    assert_eq!(guard.look(view(4, 2), now + ms(200)), None);
    let ended = guard.look(view(4, 2), now + CORRELATED_LOOK).unwrap();
    assert!(matches!(ended, FreezeChange::Ended(reason) if reason.contains("the path works")));
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
    assert!(guard.look(one_heard, now).is_some(), "one heard backend ends a long freeze");
}

#[test]
fn freeze_ends_when_no_backend_is_suspect() {
    let now = tidegate_net::clock::now();
    let mut guard = PathGuard::default();
    guard.look(view(3, 3), now);
    assert!(matches!(guard.look(view(3, 0), now + ms(1)), Some(FreezeChange::Ended(_))));
}

#[test]
fn path_view_counts_detectors_by_state() {
    let (mut silent, down, up) = (Lab::up(), Lab::down(), Lab::up());
    silent.stop_heartbeats();
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
    assert_eq!((frozen(now - INTERVAL * 2), frozen(now)), (1, 0), "no heartbeat since the freeze");
}

#[test]
fn loop_is_late_beyond_one_interval() {
    let due = tidegate_net::clock::now();
    assert!(!is_late(due, due + INTERVAL, INTERVAL));
    assert!(is_late(due, due + ms(101), INTERVAL));
}
