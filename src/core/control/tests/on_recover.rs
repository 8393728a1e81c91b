//! Sessions of backups that no longer serve (`on_recover`).

use super::*;
use crate::model::{Backups, OnRecover, Tiers};
use crate::outcome::Cause;

const SECOND: Duration = Duration::from_secs(1);
const TEN: OnRecover = OnRecover::CloseAfter(Duration::from_secs(10));

/// A pool without probes, whose backends `a`, `b`, ... have these tiers.
fn tiers(tiers: &[u8], on_recover: OnRecover) -> PoolConfig {
    let names = ["a", "b", "c", "d", "e"];
    let mut pool = PoolConfig { on_recover, ..unprobed(&names[..tiers.len()]) };
    pool.backends.iter_mut().zip(tiers).for_each(|(backend, tier)| backend.tier = *tier);
    pool
}

impl Bench {
    /// Opens a session of a backend, as a worker does.
    fn open_on(&mut self, name: &str) {
        assert!(self.status(name).state.in_flight.try_enter(0), "no session is admitted");
    }

    /// Drains all these backends.
    fn away(&mut self, names: &[&str]) {
        names.iter().for_each(|name| drop(self.operator(name, Intent::Draining)));
    }

    /// Returns when sessions were closed within a time: the backend, and the time in
    /// milliseconds.
    fn closes(&mut self, span: Duration) -> Vec<(String, u128)> {
        let (began, end) = (self.now, self.now + span);
        let mut closes = Vec::new();
        while let Some(due) = self.controller.next_due().filter(|due| *due <= end) {
            self.now = due;
            for effect in self.apply(ControlEvent::Tick) {
                let ControlEffect::ResetSessions(id, cause) = effect else { continue };
                assert_eq!(cause, Cause::BackupReleased);
                let (_, name) = self.controller.name_of(id).unwrap();
                closes.push((name.to_string(), (due - began).as_millis()));
            }
        }
        self.now = end;
        closes
    }
}

/// Returns a bench with a session of the backup `b`, whose primary `a` has just returned.
fn returned(on_recover: OnRecover) -> Bench {
    let mut bench = Bench::new(tiers(&[0, 1], on_recover));
    bench.away(&["a"]);
    assert_eq!(bench.serving(), ["b"]);
    bench.open_on("b");
    assert!(bench.closes(60 * SECOND).is_empty(), "the backup serves");
    bench.operator("a", Intent::Ready);
    assert_eq!(bench.serving(), ["a"]);
    bench
}

#[test]
fn sessions_of_a_backup_are_closed_after_the_time_and_not_before() {
    let mut bench = returned(TEN);
    assert!(bench.closes(9 * SECOND).is_empty());
    assert_eq!(bench.closes(2 * SECOND)[0], ("b".to_owned(), 1_000));
    assert!(returned(OnRecover::Keep).closes(600 * SECOND).is_empty());
}

#[test]
fn order_is_repeated_until_no_connect_can_be_older() {
    let mut bench = Bench::new(PoolConfig {
        connect_timeout: 3 * SECOND,
        ..tiers(&[0, 1], OnRecover::CloseAfter(SECOND))
    });
    bench.away(&["a"]);
    bench.open_on("b");
    bench.operator("a", Intent::Ready);
    let times: Vec<u128> = bench.closes(60 * SECOND).iter().map(|(_, at)| *at).collect();
    assert_eq!(times, [1_000, 2_000, 3_000, 4_000, 5_000]);
    bench.status("b").state.in_flight.leave();
    bench.away(&["a"]);
    bench.operator("a", Intent::Ready);
    assert!(bench.closes(60 * SECOND).is_empty(), "no session is left");
}

#[test]
fn return_that_is_taken_back_in_time_closes_nothing() {
    let mut bench = returned(TEN);
    for _ in 0..5 {
        assert!(bench.closes(9 * SECOND).is_empty());
        bench.away(&["a"]);
        assert!(bench.closes(60 * SECOND).is_empty());
        bench.operator("a", Intent::Ready);
    }
    assert!(bench.closes(9 * SECOND).is_empty(), "the time begins again");
    assert!(!bench.closes(2 * SECOND).is_empty());
    // The backup serves again after its sessions were closed, and is replaced again.
    bench.away(&["a"]);
    assert!(bench.closes(60 * SECOND).is_empty());
    bench.operator("a", Intent::Ready);
    assert_eq!(bench.closes(11 * SECOND)[0], ("b".to_owned(), 10_000));
}

#[test]
fn only_tiers_above_the_serving_one_lose_sessions() {
    let mut bench = Bench::new(tiers(&[0, 1, 2, 1], TEN));
    for name in ["b", "c", "d"] {
        bench.open_on(name);
    }
    bench.away(&["a"]);
    assert_eq!(bench.serving(), ["b", "d"]);
    // `d` is drained, and its tier serves: an operator decides about its sessions.
    bench.away(&["d"]);
    let closed = bench.closes(11 * SECOND);
    assert!(!closed.is_empty() && closed.iter().all(|(name, _)| name == "c"), "{closed:?}");
    bench.away(&["b"]);
    assert_eq!(bench.serving(), ["c"]);
    assert!(bench.closes(60 * SECOND).is_empty());
}

#[test]
fn primary_on_trial_has_not_returned() {
    let mut pool = tiers(&[0, 1], TEN);
    pool.ejection.as_mut().unwrap().max_ejected_percent = 100;
    let mut bench = Bench::new(pool);
    bench.refuse("a", 1, 5);
    assert_eq!(bench.serving(), ["b"]);
    bench.open_on("b");
    assert!(bench.closes(30 * SECOND).is_empty());
    assert_eq!(bench.serving(), ["a", "b"], "one session at a time decides the trial");
    bench.run_trial("a", TrialPhase::Passed);
    assert_eq!(bench.serving(), ["a"]);
    let closed = bench.closes(11 * SECOND);
    assert_eq!(closed.first().map(|(name, _)| &**name), Some("b"));
}

#[test]
fn tier_that_lost_its_share_of_the_spill_is_released() {
    let pool = PoolConfig { tiers: Tiers::Spill, ..tiers(&[0, 0, 1], TEN) };
    let mut bench = Bench::new(pool);
    bench.open_on("c");
    bench.away(&["a"]);
    assert_eq!(bench.serving(), ["b", "c"], "70% and 30%");
    assert!(bench.closes(60 * SECOND).is_empty());
    bench.operator("a", Intent::Ready);
    assert_eq!(bench.serving(), ["a", "b"]);
    assert_eq!(bench.closes(11 * SECOND)[0].0, "c");
}

#[test]
fn backup_behind_the_one_that_serves_is_released_with_backups_one() {
    let pool = PoolConfig { backups: Backups::One, ..tiers(&[0, 1, 1], TEN) };
    let mut bench = Bench::new(pool.clone());
    bench.away(&["a", "b"]);
    assert_eq!(bench.serving(), ["c"]);
    bench.open_on("c");
    bench.operator("b", Intent::Ready);
    assert_eq!(bench.serving(), ["b"]);
    bench.open_on("b");
    let closed = bench.closes(11 * SECOND);
    assert!(!closed.is_empty() && closed.iter().all(|(name, _)| name == "c"), "{closed:?}");
    let mut bench = Bench::new(PoolConfig { backups: Backups::All, ..pool });
    bench.away(&["a", "b"]);
    bench.open_on("c");
    bench.operator("b", Intent::Ready);
    assert!(bench.closes(60 * SECOND).is_empty(), "its tier serves");
}

#[test]
fn pool_that_fails_open_releases_no_backup() {
    let rule = WhenNoneEligible::TryAll;
    let pool = PoolConfig { when_none_eligible: rule, ..tiers(&[0, 1], TEN) };
    let mut bench = Bench::up(PoolConfig { probe: Some(Arc::new(probe_spec())), ..pool });
    bench.open_on("b");
    bench.answer_all_for(5 * INTERVAL, Some("broken"));
    assert_eq!(bench.serving(), ["a", "b"], "fails open");
    let closed = |effects: &[ControlEffect]| {
        effects.iter().any(|effect| matches!(effect, ControlEffect::ResetSessions(..)))
    };
    assert!(!closed(&bench.answer_all_for(60 * SECOND, Some("broken"))));
    assert!(!closed(&bench.answer_all_for(5 * INTERVAL, None)));
    assert!(closed(&bench.answer_all_for(10 * SECOND, None)));
}

#[test]
fn reload_changes_the_time_and_the_tiers() {
    let mut bench = returned(TEN);
    assert!(bench.closes(5 * SECOND).is_empty());
    bench.configure(tiers(&[0, 1], OnRecover::Keep));
    assert!(bench.closes(60 * SECOND).is_empty());
    bench.configure(tiers(&[0, 1], TEN));
    assert!(bench.closes(9 * SECOND).is_empty(), "the time begins with the rule");
    bench.configure(tiers(&[0, 1], OnRecover::CloseAfter(20 * SECOND)));
    assert!(bench.closes(10 * SECOND).is_empty());
    assert!(!bench.closes(2 * SECOND).is_empty());
    let mut bench = returned(TEN);
    bench.configure(tiers(&[0, 0], TEN));
    assert!(bench.closes(60 * SECOND).is_empty(), "b serves now");
    let mut bench = returned(TEN);
    bench.configure(PoolConfig { on_recover: TEN, ..unprobed(&["a"]) });
    assert!(bench.closes(60 * SECOND).is_empty(), "on_removal decides about b");
}

#[test]
fn time_continues_over_an_upgrade() {
    let mut old = returned(TEN);
    assert!(old.closes(6 * SECOND).is_empty());
    let saved = old.controller.save(old.now);
    let mut next = Bench::new(tiers(&[0, 1], TEN));
    let effects = next.controller.adopt(&saved, next.now);
    next.note(effects);
    next.open_on("b");
    assert!(next.closes(3 * SECOND).is_empty());
    assert_eq!(next.closes(2 * SECOND)[0], ("b".to_owned(), 1_000));
    // The backup serves: nothing is due in the next process.
    let mut old = returned(TEN);
    old.away(&["a"]);
    let saved = old.controller.save(old.now);
    let mut next = Bench::new(tiers(&[0, 1], TEN));
    let effects = next.controller.adopt(&saved, next.now);
    next.note(effects);
    next.open_on("b");
    assert!(next.closes(60 * SECOND).is_empty());
}

#[test]
fn line_in_the_log_counts_the_closed_sessions() {
    let mut bench = returned(TEN);
    bench.open_on("b");
    let logged = logs(&bench.pass(20 * SECOND));
    let lines: Vec<&String> = logged.iter().filter(|line| line.contains("on_recover")).collect();
    assert_eq!(lines, ["b: sessions closed because of on_recover: open sessions: 2"]);
}
