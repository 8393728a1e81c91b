//! A simulated registry with accidents, and the number of tables that it causes.

use super::*;
use crate::control::explain::Explanation;
use crate::discovery::view::HeldReason;

const CONFIRM: Duration = Duration::from_secs(10);

/// The guards that the configuration has by default.
pub(super) fn guards() -> ViewGuards {
    ViewGuards {
        empty: EmptyAnswer::Confirm,
        max_removed: 50,
        confirm_after: CONFIRM,
        min_backends: 1,
        missing: 1,
        backends_max: 10_000,
        ..ViewGuards::of_name(&DnsConfig::default())
    }
}

/// Returns `count` announcements, the first of which is number `from`.
pub(super) fn many(from: usize, count: usize) -> Vec<Announced> {
    let one = |number: usize| {
        let [_, b, c, d] = u32::try_from(number).unwrap().to_be_bytes();
        Announced {
            name: format!("s{number}").into(),
            address: ([10, b, c, d], 80).into(),
            ..announced("x")
        }
    };
    (from..from + count).map(one).collect()
}

fn failed() -> Told {
    Told::Failed { why: SourceFailure::Connect, detail: "connection refused".to_owned() }
}

fn untrusted(told: Told) -> Told {
    match told {
        Told::Whole(set) => Told::Whole(WholeSet { trusted: false, ..set }),
        other => other,
    }
}

pub(super) fn discovered_tables(bench: &Bench) -> u64 {
    let status = bench.controller.status(bench.now);
    let published = status.published.into_iter();
    published.filter(|(reason, _)| *reason == PublishReason::Discovery).map(|(_, n)| n).sum()
}

impl Bench {
    /// Returns a bench whose registry lists `count` verified members.
    pub(super) fn registry(pool: PoolConfig, count: usize) -> Bench {
        let mut bench = Bench::new(discovering_with(pool, guards()));
        bench.told(None, whole_of(many(0, count)));
        bench.answer_for(Duration::from_secs(2), &[]);
        assert_eq!(bench.serving().len(), count);
        bench
    }

    fn explained(&self, name: &str) -> Explanation {
        self.controller.explain("web", name, self.now).unwrap()
    }
}

#[test]
fn accidents_of_a_registry_remove_no_member() {
    let mut bench = Bench::registry(unprobed(&[]), 10);
    let tables = discovered_tables(&bench);
    let accidents = [
        failed(),
        whole_of(vec![]),
        untrusted(whole_of(vec![])),
        untrusted(whole_of(many(3, 7))),
        whole_of(many(0, 2)),
        Told::Alive,
        failed(),
        whole_of(many(0, 10)),
    ];
    for round in 0..50 {
        for accident in &accidents {
            bench.told(None, accident.clone());
            bench.answer_for(Duration::from_millis(900), &[]);
            assert_eq!(bench.serving().len(), 10, "round {round}: {accident:?}");
        }
    }
    assert_eq!(discovered_tables(&bench), tables, "nothing changed, so no table");
}

#[test]
fn registry_that_is_away_for_a_day_removes_no_member_and_needs_no_restart() {
    let mut bench = Bench::registry(unprobed(&[]), 10);
    for _ in 0..24 * 60 {
        bench.told(None, failed());
        bench.answer_for(Duration::from_secs(60), &[]);
    }
    assert_eq!(bench.serving().len(), 10);
    let mut members = many(0, 10);
    members.extend(many(100, 1));
    bench.told(None, whole_of(members));
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving().len(), 11);
}

#[test]
fn emptiness_that_is_confirmed_empties_the_pool() {
    let mut bench = Bench::registry(unprobed(&[]), 10);
    bench.told(None, whole_of(vec![]));
    bench.answer_for(CONFIRM, &[]);
    assert_eq!(bench.serving().len(), 10);
    bench.told(None, whole_of(vec![]));
    bench.answer_for(Duration::from_secs(1), &[]);
    assert!(bench.serving().is_empty());
    bench.told(None, whole_of(many(0, 3)));
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving().len(), 3);
}

#[test]
fn rotating_subsets_of_a_name_cause_no_churn() {
    let mut bench = Bench::new(naming(unprobed(&[])));
    bench.resolve(&[4000, 4001, 4002, 4003]);
    bench.answer_for(Duration::from_secs(1), &[]);
    let before = bench.controller.current_table().serial;
    for round in 0..200 {
        let ports: Vec<u16> = (0..4).filter(|n| *n != round % 4).map(|n| 4000 + n).collect();
        bench.resolve(&ports);
        bench.answer_for(Duration::from_secs(1), &[]);
        assert_eq!(bench.serving().len(), 4, "round {round}");
    }
    assert_eq!(bench.controller.current_table().serial, before);
}

#[test]
fn half_a_pool_that_turns_critical_at_once_stays_if_probes_see_it_up() {
    let mut bench = Bench::registry(pool(&[]), 10);
    let critical = many(0, 10).into_iter().enumerate().map(|(number, one)| {
        let wish = if number < 6 { Wish::Critical } else { Wish::Sessions };
        Announced { wish, raw: "critical".into(), ..one }
    });
    let effects = bench.told(None, whole_of(critical.collect()));
    assert!(logs(&effects)[0].contains("critical at once"), "{:?}", logs(&effects));
    bench.answer_for(Duration::from_secs(30), &[]);
    assert_eq!(bench.serving().len(), 10);
    bench.answer_for(Duration::from_secs(30), &["s1", "s2"]);
    assert_eq!(bench.serving().len(), 8, "probes of this host decide");
}

#[test]
fn few_critical_members_are_drained() {
    let mut bench = Bench::registry(unprobed(&[]), 10);
    let mut members = many(0, 10);
    (members[3].wish, members[3].raw) = (Wish::Critical, "critical".into());
    bench.told(None, whole_of(members));
    bench.answer_for(Duration::from_secs(3), &[]);
    assert_eq!(bench.serving().len(), 9);
    let explained = bench.explained("s3");
    let said = &explained.announced[0];
    assert_eq!((&*said.raw, &*said.source.label), ("critical", "file"));
    assert!(said.listed_for >= Duration::from_secs(3));
}

#[test]
fn held_removal_is_explained_with_its_time() {
    let mut bench = Bench::registry(unprobed(&[]), 10);
    bench.told(None, whole_of(many(0, 2)));
    bench.answer_for(Duration::from_secs(2), &[]);
    let explained = bench.explained("s7");
    let held = explained.announced[0].held.expect("held");
    assert_eq!(held.reason, HeldReason::MaxRemoved);
    let left = held.until.expect("a time") - bench.now;
    assert_eq!(left, Duration::from_secs(8));
    let source = &bench.sources()[0];
    assert_eq!((source.view.held, source.view.members), (8, 10));
}

#[test]
fn leaving_members_finish_their_sessions() {
    let mut bench = Bench::registry(unprobed(&[]), 10);
    let state = bench.status("s9").state;
    assert!(state.in_flight.try_enter(0));
    bench.told(None, whole_of(many(0, 9)));
    bench.answer_for(Duration::from_secs(30), &[]);
    assert_eq!(bench.serving().len(), 9);
    let leaving = bench.controller.status(bench.now).leaving;
    assert_eq!(leaving.len(), 1, "its session runs on");
    bench.told(None, whole_of(many(0, 10)));
    bench.answer_for(Duration::from_secs(1), &[]);
    assert!(Arc::ptr_eq(&state, &bench.status("s9").state), "it returns with its state");
    state.in_flight.leave();
}

#[test]
fn thousand_changes_per_second_cause_at_most_ten_tables() {
    let mut bench = Bench::registry(unprobed(&[]), 50);
    let (before, began) = (discovered_tables(&bench), bench.now);
    for change in 0..10_000 {
        let count = 50 + change % 7;
        bench.told(None, whole_of(many(0, count)));
        bench.answer_for(Duration::from_millis(1), &[]);
    }
    let seconds = (bench.now - began).as_secs();
    let tables = discovered_tables(&bench) - before;
    assert!(tables <= seconds * 10 + 1, "{tables} tables in {seconds} s");
    assert!(tables > seconds * 5, "{tables} tables in {seconds} s");
    bench.told(None, whole_of(many(0, 40)));
    bench.answer_for(Duration::from_secs(1), &[]);
    assert_eq!(bench.serving().len(), 40, "the newest answer holds");
}

#[test]
fn failure_is_published_at_once_during_many_changes() {
    let mut bench = Bench::registry(pool(&[]), 20);
    bench.answer_for(Duration::from_secs(5), &[]);
    for change in 0..50 {
        bench.told(None, whole_of(many(0, 20 + change % 2)));
    }
    let state = bench.status("s1").state;
    let id = state.id;
    let (failure, begun) = (ConnectFailure::Refused, bench.now);
    let failed = |in_a_row| ControlEvent::ConnectFailed { backend: id, failure, in_a_row, begun };
    let effects: Vec<_> = (1..=5).flat_map(|row| bench.apply(failed(row))).collect();
    assert_eq!(publishes(&effects), 1, "{:?}", logs(&effects));
    assert!(!bench.serving().contains(&"s1".to_owned()));
}

#[test]
fn changes_of_a_registry_disturb_neither_probes_nor_heartbeats() {
    let mut bench = Bench::registry(pool(&[]), 20);
    let mut asked = 0;
    for change in 0..1_000 {
        bench.told(None, whole_of(many(0, 20 + change % 3)));
        asked += probes(&bench.answer_for(Duration::from_millis(10), &[]));
    }
    // 20 members every 2 s for 10 s, and the newcomers' first probes.
    assert!((90..400).contains(&asked), "{asked} probes");
    let status = bench.controller.status(bench.now);
    assert!(status.pools[0].backends.iter().take(20).all(|one| one.eligible));
}

#[test]
fn one_change_of_ten_thousand_members_is_one_table() {
    let mut bench = Bench::new(discovering_with(unprobed(&[]), guards()));
    bench.told(None, whole_of(many(0, 9_999)));
    bench.answer_for(Duration::from_secs(5), &[]);
    assert_eq!(bench.serving().len(), 9_999);
    let (before, sets) = (discovered_tables(&bench), whole_of(many(0, 10_000)));
    let began = tidegate_net::clock::now();
    bench.told(None, sets);
    bench.answer_for(Duration::from_secs(5), &[]);
    println!("one change of 10,000: {:?}", began.elapsed());
    assert_eq!(discovered_tables(&bench) - before, 1);
    assert_eq!(bench.serving().len(), 10_000);
    bench.told(None, whole_of(many(0, 10_000)));
    bench.answer_for(Duration::from_secs(5), &[]);
    assert_eq!(discovered_tables(&bench) - before, 1, "nothing changed");
}

/// An accident of a registry with `stable` members and others.
fn accident(rng: &mut fastrand::Rng, stable: usize) -> Told {
    match rng.u8(..6) {
        0 | 1 => failed(),
        2 => whole_of(vec![]),
        3 => untrusted(whole_of(many(0, rng.usize(..stable)))),
        4 => untrusted(whole_of(vec![])),
        _ => whole_of(many(rng.usize(..stable), stable / 3)),
    }
}

#[test]
fn no_stable_member_leaves_a_registry_that_flaps_drops_and_empties() {
    const STABLE: usize = 20;
    for (seed, probed) in [(1, false), (2, true), (3, false), (4, true)] {
        let mut rng = fastrand::Rng::with_seed(seed);
        let of = |probed: bool| if probed { pool(&[]) } else { unprobed(&[]) };
        let mut bench = Bench::registry(of(probed), STABLE);
        for round in 0..150 {
            for _ in 0..rng.usize(..8) {
                bench.told(None, accident(&mut rng, STABLE));
                bench.answer_for(Duration::from_millis(rng.u64(1..1_000)), &[]);
            }
            // Others come and go, fewer than `max_removed`.
            let mut members = many(0, STABLE);
            members.extend(many(100 + rng.usize(..5), rng.usize(..5)));
            rng.shuffle(&mut members);
            bench.told(None, whole_of(members));
            bench.answer_for(Duration::from_millis(rng.u64(1..3_000)), &[]);
            if rng.u8(..10) == 0 {
                bench = bench.upgraded(discovering_with(of(probed), guards()));
            }
            let serving = bench.serving();
            let gone: Vec<_> = (0..STABLE)
                .map(|n| format!("s{n}"))
                .filter(|name| !serving.contains(name))
                .collect();
            assert!(gone.is_empty(), "seed {seed}, round {round}: {gone:?}");
        }
    }
}
