//! Scenarios with many backends and faults in the backends, in the path, or on this host.

use super::world::{Doing, Scenario, World};
use tidegate_core::suspicion::DetectorState;

fn between(from: u64, to: u64, affects: fn(usize) -> bool, what: Doing) -> Scenario {
    Scenario {
        doing: Box::new(move |backend, at| {
            if (from..to).contains(&at) && affects(backend) { what } else { Doing::Fine }
        }),
        ..Scenario::default()
    }
}

fn all_backends(_: usize) -> bool {
    true
}

#[test]
fn two_seconds_without_heartbeats_cause_no_transition() {
    let world = World::play(between(10_000, 12_000, all_backends, Doing::Mute));
    let changes: Vec<_> = world.log.iter().filter(|entry| entry.at > 1_000).collect();
    assert!(changes.is_empty(), "{changes:#?}");
}

#[test]
fn minute_without_heartbeats_removes_backends_that_fail_probes() {
    let scenario = Scenario {
        doing: Box::new(|backend, at| match at {
            10_000..70_000 if backend == 2 && at > 20_000 => Doing::Dead,
            10_000..70_000 => Doing::Mute,
            _ => Doing::Fine,
        }),
        millis: 60_000,
        ..Scenario::default()
    };
    let world = World::play(scenario);
    let down = world.reached(2, DetectorState::Down, 0).unwrap();
    let reason = &world.log.iter().find(|entry| entry.to == DetectorState::Down).unwrap().reason;
    assert!(reason.contains("2 confirmation probes failed"), "{reason}");
    assert!((20_200..23_000).contains(&down), "detected at {down} ms");
    assert_eq!((world.count(DetectorState::Down), world.count(DetectorState::Suspect)), (1, 1));
}

#[test]
fn two_seconds_without_a_path_remove_no_backend() {
    let world = World::play(between(10_000, 12_000, all_backends, Doing::Dead));
    assert_eq!(world.count(DetectorState::Down), 0, "{:#?}", world.log);
    assert!(!world.held.is_empty(), "a guard prevented the removals");
    for backend in 0..8_usize {
        assert_eq!(world.state(backend), DetectorState::Up);
        let back = world.reached(backend, DetectorState::Up, 12_000);
        assert!(back.is_none_or(|at| at < 13_500), "{back:?}");
    }
}

#[test]
fn path_failure_of_two_seconds_removes_no_backend() {
    let world = World::play(between(10_000, 12_000, |backend| backend < 4, Doing::Dead));
    assert_eq!(world.count(DetectorState::Down), 0, "{:#?}", world.log);
}

#[test]
fn local_stall_of_three_seconds_changes_no_observation() {
    let scenario = Scenario {
        stalled: Box::new(|at| (10_000..13_000).contains(&at)),
        loss: 0.05,
        ..Scenario::default()
    };
    let world = World::play(scenario);
    let changes: Vec<_> = world.log.iter().filter(|entry| entry.at > 1_000).collect();
    assert!(changes.is_empty(), "{changes:#?}");
}

#[test]
fn failure_during_a_local_stall_is_detected_after_it() {
    let scenario = Scenario {
        stalled: Box::new(|at| (10_000..13_000).contains(&at)),
        ..between(11_000, 60_000, |backend| backend == 0, Doing::Dead)
    };
    let down = World::play(scenario).reached(0, DetectorState::Down, 0).unwrap();
    assert!(down < 14_000, "{down}");
}

#[test]
fn simultaneous_failures_are_removed_after_other_backends_are_heard() {
    let world =
        World::play(between(10_000, 60_000, |backend| backend.is_multiple_of(2), Doing::Dead));
    for backend in 0..8_usize {
        let expected =
            if backend.is_multiple_of(2) { DetectorState::Down } else { DetectorState::Up };
        assert_eq!(world.state(backend), expected);
        let down = world.reached(backend, DetectorState::Down, 0);
        assert!(down.is_none_or(|at| (10_450..11_300).contains(&at)), "{down:?}");
    }
}

#[test]
fn gradual_loss_of_all_heartbeats_removes_no_backend() {
    // Half of each pool first, the other half before the first suspicion.
    let doing = |backend: usize, at: u64| match at {
        10_000..12_000 if backend.is_multiple_of(2) || at >= 10_200 => Doing::Dead,
        _ => Doing::Fine,
    };
    for seed in 0..100 {
        let scenario = Scenario { doing: Box::new(doing), seed, ..Scenario::default() };
        let world = World::play(scenario);
        assert_eq!(world.count(DetectorState::Down), 0, "seed {seed}: {:#?}", world.log);
    }
}

#[test]
fn max_ejected_keeps_the_third_of_three_failed_backends_in_rotation() {
    let world = World::play(between(10_000, 60_000, |backend| backend < 3, Doing::Dead));
    let states: Vec<DetectorState> = (0..3).map(|backend| world.state(backend)).collect();
    assert_eq!(
        states.iter().filter(|state| **state == DetectorState::Down).count(),
        2,
        "{states:?}"
    );
    let held = states.iter().position(|state| *state == DetectorState::Suspect).unwrap();
    let reason = world.held(held).unwrap();
    assert_eq!(reason, "2 of 4 backends are down; max_ejected = 50%");
}

#[test]
fn refused_backends_are_removed_at_once_without_guards() {
    let world = World::play(between(10_000, 20_000, |backend| backend < 4, Doing::Crashed));
    for backend in 0..4 {
        let down = world.reached(backend, DetectorState::Down, 0).unwrap();
        assert!(down < 10_500, "{down}");
        let up = world.reached(backend, DetectorState::Up, 20_000).unwrap();
        assert!(up < 20_700, "{up}");
    }
}

#[test]
fn backend_with_a_failed_sender_stays_suspect_while_it_answers() {
    let world = World::play(between(10_000, 25_000, |backend| backend == 5, Doing::Mute));
    let story: Vec<DetectorState> =
        world.log.iter().filter(|e| e.backend == 5 && e.at > 1_000).map(|e| e.to).collect();
    assert_eq!(story, [DetectorState::Suspect, DetectorState::Up]);
}

#[test]
fn failure_in_a_pool_of_two_is_detected_within_the_bound_on_a_lossy_link() {
    for seed in 0..100 {
        let scenario = Scenario {
            pools: vec![2],
            loss: 0.1,
            seed,
            millis: 63_000,
            ..between(60_000, 90_000, |backend| backend == 0, Doing::Dead)
        };
        let world = World::play(scenario);
        let down = world.reached(0, DetectorState::Down, 60_000).unwrap_or(u64::MAX);
        assert!(down <= 61_500, "seed {seed}: {down}");
        assert_eq!(world.state(1), DetectorState::Up, "seed {seed}");
    }
}

#[test]
fn flapping_backend_returns_less_and_less_often() {
    // Down for 3 s of every 8 s, for 20 minutes.
    let scenario = Scenario {
        doing: Box::new(|backend, at| {
            if backend == 0 && at > 10_000 && at % 8_000 < 3_000 {
                Doing::Dead
            } else {
                Doing::Fine
            }
        }),
        millis: 1_200_000,
        ..Scenario::default()
    };
    let world = World::play(scenario);
    let downs = |from: u64, to: u64| {
        let down = |e: &&super::world::Entry| {
            e.from == DetectorState::Suspect
                && e.to == DetectorState::Down
                && (from..to).contains(&e.at)
        };
        world.log.iter().filter(down).count()
    };
    assert!(world.log.iter().all(|entry| entry.backend == 0 || entry.at < 1_000));
    let (first, last) = (downs(0, 60_000), downs(900_000, 1_200_000));
    assert!((3..=5).contains(&first), "{first} in the first minute");
    // Without damping there would be 37 returns in five minutes.
    assert!((2..=6).contains(&last), "{last} in the last five minutes");
}

#[test]
fn all_backends_are_up_again_after_any_faults() {
    for seed in 0..40 {
        let doing = move |backend: usize, at: u64| {
            if !(5_000..60_000).contains(&at) {
                return Doing::Fine;
            }
            // Each backend changes its fault every 3 s.
            let mut rng =
                fastrand::Rng::with_seed(seed * 1_000_003 + backend as u64 * 977 + at / 3_000);
            match rng.u8(0..10) {
                0 => Doing::Mute,
                1 | 2 => Doing::Dead,
                3 => Doing::Crashed,
                4 => Doing::ServiceGone,
                _ => Doing::Fine,
            }
        };
        let scenario = Scenario {
            pools: vec![1, 2, 3, 5],
            seed,
            loss: 0.02,
            doing: Box::new(doing),
            stalled: Box::new(move |at| at % 17_000 < seed * 10),
            millis: 130_000,
        };
        let world = World::play(scenario);
        for backend in 0..11 {
            assert_eq!(world.state(backend), DetectorState::Up, "seed {seed}, backend {backend}");
        }
    }
}
