//! Sessions of backends that are down or have lost their role.

use super::*;
use crate::health::ProbeAnswer;
use crate::model::{NodeRole, OnDown, ProbeLogin};
use crate::outcome::Cause;

const SECOND: Duration = Duration::from_secs(1);
const REPLICA: NodeRole = NodeRole::Replica;
const PRIMARY: NodeRole = NodeRole::Primary;

fn leaving(on_down: OnDown) -> PoolConfig {
    PoolConfig { on_down, ..pool(&["a", "b"]) }
}

/// A pool whose backends need to be primaries.
fn primaries(on_down: OnDown) -> PoolConfig {
    let kind = ProbeKind::Redis(ProbeLogin::default());
    let probe = Some(Arc::new(ProbeSpec { kind, ..probe_spec() }));
    PoolConfig { probe, role: Some(PRIMARY), ..leaving(on_down) }
}

impl Bench {
    /// Opens a session of the backend `a`.
    fn open(&mut self) {
        assert!(self.status("a").state.in_flight.try_enter(0), "no session is admitted");
    }

    fn close(&mut self) {
        self.status("a").state.in_flight.leave();
    }

    /// Answers the probes of `a` by `outcome` and those of `b` by success for a time. Returns
    /// when the sessions of `a` were reset, in milliseconds from the first event.
    fn see(&mut self, span: Duration, outcome: &ProbeOutcome) -> Vec<u128> {
        let (a, began, end) = (self.id("a"), self.now, self.now + span);
        let mut cuts = Vec::new();
        loop {
            for (backend, token) in std::mem::take(&mut self.asked) {
                let outcome = match backend == a {
                    true => outcome.clone(),
                    false => ProbeOutcome::success(Duration::ZERO),
                };
                let effects = self.apply(ControlEvent::Probed { backend, token, outcome });
                self.note_cuts(&effects, began, &mut cuts);
            }
            let Some(due) = self.controller.next_due().filter(|due| *due <= end) else { break };
            self.now = due;
            let effects = self.apply(ControlEvent::Tick);
            self.note_cuts(&effects, began, &mut cuts);
        }
        self.now = end;
        cuts
    }

    fn note_cuts(&self, effects: &[ControlEffect], began: Instant, cuts: &mut Vec<u128>) {
        let a = self.id("a");
        for effect in effects {
            if let ControlEffect::ResetSessions(id, cause) = effect {
                assert_eq!((*id, *cause), (a, Cause::BackendDown));
                cuts.push((self.now - began).as_millis());
            }
        }
    }
}

fn failure() -> ProbeOutcome {
    ProbeOutcome::failure("broken")
}

fn success() -> ProbeOutcome {
    ProbeOutcome::success(Duration::ZERO)
}

fn role(role: NodeRole) -> ProbeOutcome {
    ProbeOutcome::Success { took: Duration::ZERO, answer: ProbeAnswer::Role(role) }
}

/// Returns a bench with one session of `a`, which has been down for up to a second.
fn down(pool: PoolConfig) -> (Bench, Vec<u128>) {
    let mut bench = Bench::up(pool);
    bench.open();
    bench.see(2 * INTERVAL, &success());
    let mut cuts = Vec::new();
    while bench.status("a").observation != Observation::Down {
        cuts.extend(bench.see(FAST / 2, &failure()));
    }
    (bench, cuts)
}

#[test]
fn rule_decides_when_the_sessions_of_a_backend_that_is_down_are_reset() {
    let table = [
        (OnDown::Keep, 0, false),
        (OnDown::Reset, 1, true),
        (OnDown::CloseAfter(5 * SECOND), 0, true),
    ];
    for (rule, at_once, later) in table {
        let (mut bench, cuts) = down(leaving(rule));
        assert_eq!(cuts.len(), at_once, "{rule:?}");
        let (early, late) = (bench.see(4 * SECOND, &failure()), bench.see(2 * SECOND, &failure()));
        assert_eq!(early.is_empty(), at_once == 0, "{rule:?}: {early:?}");
        assert_eq!(!late.is_empty(), later, "{rule:?}: {late:?}");
        assert!(bench.serving() == ["b"]);
    }
}

#[test]
fn reset_is_repeated_until_no_connect_can_be_older() {
    let connect_timeout = 3 * SECOND;
    let pool = PoolConfig { connect_timeout, ..leaving(OnDown::Reset) };
    let (mut bench, first) = down(pool);
    assert_eq!(first.len(), 1);
    let cuts = bench.see(60 * SECOND, &failure());
    assert_eq!(cuts.len(), 4, "once a second for connect_timeout and a second: {cuts:?}");
    let (mut bench, _) = down(leaving(OnDown::Reset));
    bench.close();
    assert!(bench.see(60 * SECOND, &failure()).is_empty(), "no session is left");
}

#[test]
fn backend_that_recovers_in_time_keeps_its_sessions() {
    let (mut bench, cuts) = down(leaving(OnDown::CloseAfter(10 * SECOND)));
    assert!(cuts.is_empty());
    assert!(bench.see(5 * SECOND, &success()).is_empty());
    assert_eq!(bench.status("a").observation, Observation::Up);
    assert!(bench.see(60 * SECOND, &success()).is_empty());
}

#[test]
fn time_restarts_if_the_backend_recovers_and_fails_again() {
    let (mut bench, _) = down(leaving(OnDown::CloseAfter(10 * SECOND)));
    bench.see(5 * SECOND, &success());
    while bench.status("a").observation != Observation::Down {
        assert!(bench.see(FAST / 2, &failure()).is_empty());
    }
    assert!(bench.see(9 * SECOND, &failure()).is_empty());
    assert!(!bench.see(2 * SECOND, &failure()).is_empty());
}

#[test]
fn ejected_and_drained_backends_keep_their_sessions() {
    let mut bench = Bench::up(leaving(OnDown::Reset));
    bench.open();
    bench.refuse("a", 1, 5);
    assert_eq!(bench.serving(), ["b"], "ejected");
    assert!(bench.see(SECOND, &success()).is_empty());
    let mut bench = Bench::up(leaving(OnDown::Reset));
    bench.open();
    bench.operator("a", Intent::Draining);
    assert!(bench.see(SECOND, &success()).is_empty());
}

#[test]
fn primary_that_becomes_a_replica_loses_its_sessions() {
    let mut bench = Bench::new(primaries(OnDown::Reset));
    bench.see(SECOND, &role(PRIMARY));
    bench.open();
    assert!(bench.see(10 * SECOND, &role(PRIMARY)).is_empty());
    let cuts = bench.see(INTERVAL, &role(REPLICA));
    assert!(!cuts.is_empty(), "by the first answer with another role");
    let mut bench = Bench::new(primaries(OnDown::CloseAfter(5 * SECOND)));
    bench.see(SECOND, &role(PRIMARY));
    bench.open();
    assert!(bench.see(4 * SECOND, &role(REPLICA)).is_empty());
    assert!(bench.see(20 * SECOND, &role(PRIMARY)).is_empty(), "it is a primary again");
}

#[test]
fn outranked_primary_loses_its_sessions() {
    let mut bench = Bench::new(primaries(OnDown::Reset));
    let a = bench.id("a");
    bench.open();
    let mut cut = false;
    for round in 0..20 {
        for (backend, token) in std::mem::take(&mut bench.asked) {
            // The probe of `b` reports it later, and the newest primary is in force.
            let of_b = if round < 10 { REPLICA } else { PRIMARY };
            let outcome = if backend == a { role(PRIMARY) } else { role(of_b) };
            let effects = bench.apply(ControlEvent::Probed { backend, token, outcome });
            assert!(round >= 10 || resets(&effects).is_empty());
            cut |= resets(&effects) == [a];
        }
        bench.pass(SECOND);
    }
    assert!(cut, "b is in force");
    assert_eq!(bench.serving(), ["b"]);
}

#[test]
fn reload_to_reset_resets_the_sessions_of_a_backend_that_is_down() {
    let (mut bench, cuts) = down(leaving(OnDown::Keep));
    assert!(cuts.is_empty() && bench.see(20 * SECOND, &failure()).is_empty());
    let a = bench.id("a");
    assert_eq!(resets(&bench.configure(leaving(OnDown::CloseAfter(5 * SECOND)))), [a]);
    let (mut bench, _) = down(leaving(OnDown::CloseAfter(5 * SECOND)));
    assert!(resets(&bench.configure(leaving(OnDown::Keep))).is_empty());
    assert!(bench.see(20 * SECOND, &failure()).is_empty(), "the time was stopped");
}

#[test]
fn removal_ends_the_time_of_on_down() {
    let (mut bench, _) = down(leaving(OnDown::CloseAfter(5 * SECOND)));
    let pool = PoolConfig { on_down: OnDown::CloseAfter(5 * SECOND), ..pool(&["b"]) };
    bench.configure(pool);
    assert!(resets(&bench.pass(20 * SECOND)).is_empty(), "on_removal is keep");
}

#[test]
fn sessions_that_try_all_gives_to_a_backend_that_is_down_stay() {
    let pool =
        PoolConfig { when_none_eligible: WhenNoneEligible::TryAll, ..leaving(OnDown::Reset) };
    let (mut bench, cuts) = down(pool);
    assert_eq!(cuts.len(), 1);
    assert!(bench.see(60 * SECOND, &failure()).is_empty());
}

#[test]
fn line_in_the_log_counts_the_sessions() {
    let mut bench = Bench::up(leaving(OnDown::Reset));
    (0..3).for_each(|_| bench.open());
    bench.answer_all_for(INTERVAL, None);
    let logged = logs(&bench.answer_all_for(3 * INTERVAL, Some("broken")));
    let lines = logged.iter().filter(|line| line.contains("because of on_down"));
    let lines: Vec<&String> = lines.collect();
    assert_eq!(lines, ["a: sessions reset because of on_down: open sessions: 3"]);
}
