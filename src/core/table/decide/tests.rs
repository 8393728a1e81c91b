//! A rehearsal is the pick itself; a decision says what it was decided by.

use super::*;
use crate::balance::trial::TrialPhase;
use crate::model::{self, BackendAddr, BackendId, PeerAddr, PoolId, WhenNoneEligible};
use crate::table::build::{BackendInput, PoolInput, build_pool};
use crate::testing;
use proptest::prelude::*;
use std::time::Duration;

// === helpers ===

/// One backend of a drawn pool.
#[derive(Debug, Clone, Copy)]
struct Drawn {
    weight: u32,
    cap: u32,
    sessions: u32,
    slow_start: bool,
    eligible: bool,
    on_trial: bool,
    answer_millis: u64,
}

fn drawn() -> impl Strategy<Value = Drawn> {
    let numbers = (1_u32..9, 0_u32..4, 0_u32..4, 0_u64..50);
    let flags = (prop::bool::weighted(0.2), prop::bool::weighted(0.8), prop::bool::weighted(0.1));
    (numbers, flags).prop_map(|((weight, cap, sessions, answer_millis), flags)| Drawn {
        weight,
        cap,
        sessions: if cap > 0 { sessions.min(cap) } else { sessions },
        slow_start: flags.0,
        eligible: flags.1,
        on_trial: flags.2,
        answer_millis,
    })
}

fn pool(balance: Policy, backends: &[Drawn]) -> PoolTable {
    let input = PoolInput {
        id: PoolId(1),
        spec: Arc::new(model::PoolConfig { balance, ..testing::pool("web") }),
        backends: backends.iter().zip(0..).map(|(drawn, number)| input(drawn, number)).collect(),
        stand_ins: vec![],
        undecided: false,
    };
    let table = build_pool(&input, None);
    Arc::into_inner(table).expect("one owner")
}

fn input(drawn: &Drawn, number: u32) -> BackendInput {
    let address = BackendAddr::Tcp(([10, 0, 0, 1], 8_000 + number as u16).into());
    let name = format!("b{number}").into();
    let state = BackendState::new(BackendId(number + 100), "web".into(), name, address, 1);
    (0..drawn.sessions).for_each(|_| assert!(state.in_flight.try_enter(0)));
    if drawn.on_trial {
        state.in_flight.begin_trial();
    }
    state.latency.answered(Duration::from_millis(drawn.answer_millis), 0);
    if !drawn.eligible {
        state.set_left_out(Some((SkipReason::Down, tidegate_net::clock::now())));
    }
    BackendInput {
        state: Arc::new(state),
        effective_weight: drawn.weight,
        connections_max: drawn.cap,
        slow_start: drawn.slow_start,
        tier: 0,
        eligible: drawn.eligible,
        on_trial: false,
        undecided: false,
        in_service: true,
    }
}

fn key(client: u32, draw: u64) -> PickKey {
    PickKey { client: std::net::Ipv4Addr::from_bits(client).into(), draw, at: 1 }
}

fn picked_for(attempt: u8, waited: Option<Duration>) -> PickedFor {
    PickedFor {
        session: 7,
        client: ClientAddr::of_peer(PeerAddr::new(([10, 1, 2, 3], 40_000).into())),
        peer: None,
        frontend: FrontendId(1),
        route: RouteNumber::default(),
        serial: 5,
        attempt,
        waited,
        now: tidegate_net::clock::now(),
        wall_micros: 1,
    }
}

fn decide(pool: &PoolTable, session: &PickedFor, tried: &[usize]) -> Decision {
    let mut record = PickRecord::default();
    let reserved = pool.pick_recorded(key(1, 1), tried, &mut record).ok();
    pool.decision(session, reserved.as_ref().map(Picked::of), &record)
}

const PLAIN: Drawn = Drawn {
    weight: 1,
    cap: 0,
    sessions: 0,
    slow_start: false,
    eligible: true,
    on_trial: false,
    answer_millis: 0,
};

// === a rehearsal is the pick ===

proptest! {
    #[test]
    fn rehearsal_equals_the_pick_for_every_policy(
        backends in prop::collection::vec(drawn(), 1..90),
        policy in 0..Policy::ALL.len(),
        picks in prop::collection::vec((any::<u32>(), any::<u64>(), prop::collection::vec(0_usize..90, 0..3)), 1..12),
    ) {
        let pool = pool(Policy::ALL[policy], &backends);
        let mut held = Vec::new();
        for (client, draw, tried) in picks {
            let before: Vec<u32> = pool.serving.iter().map(|b| b.in_flight.get()).collect();
            let (rehearsed, notes) = pool.rehearse(key(client, draw), &tried);
            let after: Vec<u32> = pool.serving.iter().map(|b| b.in_flight.get()).collect();
            prop_assert_eq!(before, after, "a rehearsal takes no slot");
            let mut record = PickRecord::default();
            let reserved = pool.pick_recorded(key(client, draw), &tried, &mut record);
            let picked = reserved.as_ref().map(Picked::of).map_err(|error| *error);
            prop_assert_eq!(rehearsed, picked);
            prop_assert_eq!(notes.figures(), record.figures());
            prop_assert_eq!(notes.noted(), record.noted());
            prop_assert_eq!(notes.passed_over_total(), record.passed_over_total());
            if let Ok(picked) = picked {
                prop_assert!(!record.noted().iter().any(|(index, _)| *index == picked.index));
                prop_assert!(!tried.contains(&picked.index));
            }
            held.extend(reserved);
        }
    }

    /// A plain pick and a recorded one are the same pick.
    #[test]
    fn record_changes_no_pick(
        backends in prop::collection::vec(drawn(), 1..90),
        policy in 0..Policy::ALL.len(),
        draws in prop::collection::vec(any::<u64>(), 1..12),
    ) {
        let [plain, recorded] = [(); 2].map(|()| pool(Policy::ALL[policy], &backends));
        let (mut record, mut held) = (PickRecord::default(), Vec::new());
        for draw in draws {
            let a = plain.pick(key(1, draw), &[]);
            let b = recorded.pick_recorded(key(1, draw), &[], &mut record);
            prop_assert_eq!(a.as_ref().map(|r| r.index).ok(), b.as_ref().map(|r| r.index).ok());
            prop_assert_eq!(a.as_ref().err(), b.as_ref().err());
            held.extend(a);
            held.extend(b);
        }
    }

    /// Every member is chosen, a candidate that lost, or among the members passed over.
    #[test]
    fn skipped_members_are_named_or_counted(
        backends in prop::collection::vec(drawn(), 1..40),
        policy in 0..Policy::ALL.len(),
    ) {
        let pool = pool(Policy::ALL[policy], &backends);
        let decision = decide(&pool, &picked_for(1, None), &[]);
        let ineligible = backends.iter().filter(|b| !b.eligible).count();
        let total = decision.skipped.total() as usize;
        prop_assert!(total >= ineligible && total <= backends.len());
        prop_assert_eq!(decision.skipped.named().len(), total.min(SKIPPED_NAMED));
        prop_assert_eq!(decision.candidates as usize, backends.len() - ineligible);
        if decision.chosen.is_none() {
            prop_assert_eq!(total, backends.len());
            prop_assert_eq!(decision.why, Why::None);
        }
    }
}

#[test]
fn stated_shares_hold_within_four_sigma_over_20_000_picks() {
    const PICKS: u32 = 20_000;
    let pools: [&[Drawn]; 3] = [
        &[Drawn { weight: 5, ..PLAIN }, PLAIN, Drawn { weight: 2, sessions: 3, ..PLAIN }],
        &[Drawn { slow_start: true, ..PLAIN }, Drawn { weight: 3, sessions: 1, ..PLAIN }, PLAIN],
        &[Drawn { cap: 1, sessions: 1, ..PLAIN }, PLAIN, Drawn { answer_millis: 9, ..PLAIN }],
    ];
    let drawing = [Policy::Random, Policy::TwoChoices, Policy::PeakEwma, Policy::LeastConnections];
    for (number, backends) in pools.into_iter().enumerate() {
        for policy in drawing {
            let pool = pool(policy, backends);
            let forecast = pool.forecast(key(1, 0).client, 1, 99);
            let mut hits = vec![0_u32; backends.len()];
            for draw in 0..PICKS {
                let other_draws = (1 << 40) + u64::from(draw);
                hits[pool.pick(key(1, other_draws), &[]).unwrap().index] += 1;
            }
            for (index, hits) in hits.into_iter().enumerate() {
                let stated = forecast.shares.iter().find(|(place, _)| *place == index);
                let share =
                    f64::from(stated.map_or(0, |(_, count)| *count)) / f64::from(forecast.draws);
                let expected = share * f64::from(PICKS);
                let sigma = (expected * (1.0 - share)).sqrt().max(1.0);
                let off = (f64::from(hits) - expected).abs();
                assert!(off <= 4.0 * sigma, "{policy:?}, pool {number}: {hits} for {expected}");
            }
        }
    }
}

#[test]
fn forecast_of_turn_and_hash_is_certain_and_holds() {
    let backends = [Drawn { weight: 3, ..PLAIN }, PLAIN, PLAIN];
    for policy in [Policy::WeightedRoundRobin, Policy::SourceHash] {
        let pool = pool(policy, &backends);
        for client in 0..50 {
            let key = key(client, 1);
            let forecast = pool.forecast(key.client, 1, 1);
            assert_eq!((forecast.draws, forecast.shares), (0, vec![]));
            let picked = pool.pick(key, &[]).unwrap();
            assert_eq!(forecast.picked.unwrap().index, picked.index, "{policy:?} {client}");
        }
    }
}

// === what decided ===

#[test]
fn first_rule_that_holds_is_what_decided() {
    let two = [PLAIN, PLAIN];
    let of = |policy: Policy| decide(&pool(policy, &two), &picked_for(1, None), &[]).why;
    assert_eq!(
        Policy::ALL.map(of),
        [Why::Turn, Why::Least, Why::Draw, Why::Least, Why::Least, Why::Hash,]
    );
    let random = pool(Policy::Random, &two);
    let waited = Some(Duration::from_millis(3));
    assert_eq!(decide(&random, &picked_for(2, waited), &[0]).why, Why::Retry);
    let queued = decide(&random, &picked_for(1, waited), &[]);
    assert_eq!((queued.why, queued.waited_micros), (Why::Queue, 3_000));
    let alone = pool(Policy::Random, &[PLAIN, Drawn { eligible: false, ..PLAIN }]);
    assert_eq!(decide(&alone, &picked_for(1, None), &[]).why, Why::Only);
    let trial = pool(Policy::Random, &[Drawn { on_trial: true, ..PLAIN }]);
    assert_eq!(decide(&trial, &picked_for(2, waited), &[]).why, Why::Trial);
}

#[test]
fn pool_that_fails_open_and_backups_are_named_as_such() {
    let mut input_ = PoolInput {
        id: PoolId(1),
        spec: Arc::new(model::PoolConfig {
            when_none_eligible: WhenNoneEligible::TryAll,
            ..testing::pool("web")
        }),
        backends: vec![input(&Drawn { eligible: false, ..PLAIN }, 0), input(&PLAIN, 1)],
        stand_ins: vec![],
        undecided: false,
    };
    input_.backends[1].tier = 1;
    let backups = build_pool(&input_, None);
    let decision = decide(&backups, &picked_for(1, None), &[]);
    assert_eq!((decision.why, decision.chosen), (Why::Backup, Some(BackendId(101))));
    assert_eq!(decision.skipped.named()[0].reason, SkipReason::Down);
    input_.backends[1].eligible = false;
    let open = build_pool(&input_, None);
    let decision = decide(&open, &picked_for(1, None), &[]);
    assert_eq!((decision.why, decision.skipped.total()), (Why::FailOpen, 0));
}

#[test]
fn figures_are_the_loads_before_the_pick() {
    let backends = [Drawn { sessions: 4, ..PLAIN }, Drawn { sessions: 3, weight: 2, ..PLAIN }];
    let decision = decide(&pool(Policy::LeastConnections, &backends), &picked_for(1, None), &[]);
    assert_eq!(decision.chosen, Some(BackendId(101)));
    let Figures::Loads { chosen, other: Some((other, load)) } = decision.figures else {
        panic!("{:?}", decision.figures)
    };
    assert_eq!((chosen.sessions, chosen.weight), (3, 2));
    assert_eq!((other, load.sessions, load.weight), (BackendId(100), 4, 1));
}

#[test]
fn tried_capped_and_trial_members_are_passed_over_with_their_reasons() {
    let backends =
        [PLAIN, Drawn { cap: 1, sessions: 1, ..PLAIN }, Drawn { on_trial: true, ..PLAIN }, PLAIN];
    let pool = pool(Policy::LeastConnections, &backends);
    assert!(pool.serving[2].in_flight.try_enter(0));
    assert_eq!(pool.serving[2].in_flight.trial(), TrialPhase::Entered);
    let decision = decide(&pool, &picked_for(2, None), &[0]);
    assert_eq!(decision.chosen, Some(BackendId(103)));
    let reasons: Vec<_> =
        decision.skipped.named().iter().map(|s| (s.backend.0, s.reason)).collect();
    assert_eq!(
        reasons,
        [(100, SkipReason::Tried), (101, SkipReason::AtCap), (102, SkipReason::TrialOpen),]
    );
}

#[test]
fn skipped_member_shows_its_reason_of_this_moment() {
    let pool = pool(Policy::Random, &[PLAIN, Drawn { eligible: false, ..PLAIN }]);
    let member = &pool.left_out.named()[0];
    let session = picked_for(1, None);
    let until = session.now + Duration::from_secs(9);
    member.set_left_out(Some((SkipReason::Ejected, until)));
    let skipped = decide(&pool, &session, &[]).skipped;
    assert_eq!((skipped.named()[0].reason, skipped.named()[0].seconds), (SkipReason::Ejected, 9));
}

#[test]
fn pick_without_candidates_keeps_no_notes_of_the_pick_before() {
    let mut record = PickRecord::default();
    let full = pool(Policy::Random, &[Drawn { cap: 1, sessions: 1, ..PLAIN }; 3]);
    assert!(full.pick_recorded(key(1, 1), &[], &mut record).is_err());
    assert_eq!(record.passed_over_total(), 3);
    let empty = pool(Policy::Random, &[Drawn { eligible: false, ..PLAIN }]);
    assert!(empty.pick_recorded(key(1, 1), &[], &mut record).is_err());
    let skipped = empty.decision(&picked_for(1, None), None, &record).skipped;
    assert_eq!((skipped.total(), skipped.named().len()), (1, 1));
}

#[test]
fn ineligible_backup_is_passed_over_if_no_primary_is_eligible() {
    let down = Drawn { eligible: false, ..PLAIN };
    let mut input = PoolInput {
        id: PoolId(1),
        spec: Arc::new(testing::pool("web")),
        backends: vec![input(&down, 0), input(&down, 1)],
        stand_ins: vec![],
        undecided: false,
    };
    input.backends[1].tier = 1;
    let decision = decide(&build_pool(&input, None), &picked_for(1, None), &[]);
    let named: Vec<_> = decision.skipped.named().iter().map(|one| one.backend.0).collect();
    assert_eq!((named, decision.skipped.total()), (vec![100, 101], 2));
    input.backends[0].eligible = true;
    let decision = decide(&build_pool(&input, None), &picked_for(1, None), &[]);
    assert_eq!(decision.skipped.total(), 0, "a primary serves, so the backup is not needed");
}
