//! Passive ejection of one backend: failures in a row remove it from rotation for a
//! time, and a trial session returns it.
//!
//! The controller owns one state per backend, asks the pool's guard before it ejects,
//! and ends ejections when they are due. This code reads no clock and knows no other
//! backend.
//!
//! - **Duration.** The n-th ejection in a row lasts n times the configured `time`, at
//!   most [`EJECTION_MAX`]. n decreases by one for each `time` in rotation since the
//!   last ejection ended.
//! - **Next ejection.** It needs a complete new row of failures.
//! - **Trial.** After the ejection one trial session is allowed (the half-open circuit
//!   breaker of Nygard, "Release It!", 2007). No second session is, until the result
//!   is known:
//!   - a first byte, a FIN, or a connection that is idle at two successive checks: the
//!     trial has passed;
//!   - a failed connect or an early reset: the backend is ejected again, for longer;
//!   - any other end (the client left): no result. The next session is a new trial
//!     session.
//! - **Trial timeout.** If a client has sent data and got no answer for [`TRIAL_MAX`],
//!   the trial ends: failed if the pool sets `slow_first_byte`, else passed.

use crate::balance::trial::TrialPhase;
use crate::health::probe_detector::ConnectFailureRow;
use crate::model::EjectionSpec;
use std::time::{Duration, Instant};

/// Longest ejection: a backend that works again returns within five minutes, even
/// without probes.
pub const EJECTION_MAX: Duration = Duration::from_secs(300);

/// A trial without an answer for this long ends. One waiting client must not keep a
/// backend out of rotation.
pub const TRIAL_MAX: Duration = Duration::from_secs(10);

/// How often the controller checks a trial. Until the check, other sessions use other
/// backends.
pub const TRIAL_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// How a trial ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrialEnd {
    /// The backend is back in rotation; holds the reason for the log.
    Passed(&'static str),
    /// The backend must be ejected again; holds the reason for the log.
    Failed(&'static str),
}

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct EjectionState {
    phase: EjectionPhase,
    row: ConnectFailureRow,
    /// Ejections in a row, as of the last ejection.
    repeats: u32,
    /// The guard has prevented an ejection in the current row.
    held: bool,
    held_total: u64,
    ejections_total: u64,
}

/// An [`EjectionState`] in an upgrade's handover. Times are in milliseconds relative to
/// the moment of saving.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct SavedEjectionState {
    /// The current ejection: time since its start, and time left.
    pub ejected: Option<(u64, u64)>,
    /// Time since the last ejection ended.
    pub back_ms: Option<u64>,
    /// See [`EjectionState::repeats`].
    pub repeats: u32,
    /// See [`EjectionState::held_total`].
    pub held_total: u64,
    /// See [`EjectionState::ejections_total`].
    pub ejections_total: u64,
}

#[derive(Debug, Clone, Copy)]
enum EjectionPhase {
    InRotation { since: Option<Instant> },
    Ejected { since: Instant, until: Instant },
    Trial(TrialState),
}

#[derive(Debug, Clone, Copy)]
struct TrialState {
    since: Instant,
    /// When a check first found a client waiting for an answer.
    asked: Option<Instant>,
    /// At the last check the connection was established and idle.
    silent: bool,
}

// === impl EjectionState ===

impl EjectionState {
    /// Returns the state of a backend that was never ejected.
    pub fn new() -> EjectionState {
        EjectionState {
            phase: EjectionPhase::InRotation { since: None },
            row: ConnectFailureRow::new(),
            repeats: 0,
            held: false,
            held_total: 0,
            ejections_total: 0,
        }
    }

    /// Returns the ejection for the backend that replaces this one under another name.
    /// The totals stay with this backend.
    pub fn for_renamed_backend(&self) -> EjectionState {
        EjectionState { phase: self.phase, repeats: self.repeats, ..EjectionState::new() }
    }

    /// Returns the state for an upgrade's handover.
    pub fn save(&self, now: Instant) -> SavedEjectionState {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let ago = |then: Instant| millis(now.saturating_duration_since(then));
        let (ejected, back_ms) = match self.phase {
            EjectionPhase::InRotation { since } => (None, since.map(ago)),
            EjectionPhase::Ejected { since, until } => {
                (Some((ago(since), millis(until.saturating_duration_since(now)))), None)
            }
            // The new process starts its own trial.
            EjectionPhase::Trial(trial) => (Some((ago(trial.since), 0)), None),
        };
        SavedEjectionState {
            ejected,
            back_ms,
            repeats: self.repeats,
            held_total: self.held_total,
            ejections_total: self.ejections_total,
        }
    }

    /// Restores a state that the old process handed over at `now`. Restarts the row.
    pub fn restore(&mut self, saved: &SavedEjectionState, now: Instant) {
        let before = |ms: u64| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
        self.restart_row();
        self.phase = match saved.ejected {
            Some((ago, left)) => EjectionPhase::Ejected {
                since: before(ago),
                until: now + Duration::from_millis(left).min(EJECTION_MAX),
            },
            None => EjectionPhase::InRotation { since: saved.back_ms.map(before) },
        };
        self.repeats = saved.repeats;
        self.held_total = saved.held_total;
        self.ejections_total = saved.ejections_total;
    }

    /// Records a session's failure. `in_a_row` is the count that all workers share.
    /// Returns the length of the row once it is long enough to eject.
    ///
    /// Failures during an ejection belong to sessions picked before it and do not
    /// count. During a trial only the trial session counts.
    pub fn failed(&mut self, in_a_row: u32, spec: &EjectionSpec) -> Option<u32> {
        if !self.counts_failures() {
            return None;
        }
        let row = self.row.measure(in_a_row);
        if row < spec.failures {
            self.held = false;
            return None;
        }
        Some(row)
    }

    /// Starts an ejection and returns when it ends.
    pub fn eject(&mut self, spec: &EjectionSpec, now: Instant) -> Instant {
        if let EjectionPhase::InRotation { since: Some(since) } = self.phase {
            let faded =
                now.saturating_duration_since(since).as_nanos() / spec.time.as_nanos().max(1);
            self.repeats = self.repeats.saturating_sub(u32::try_from(faded).unwrap_or(u32::MAX));
        }
        // A larger n would not lengthen the ejection, only the time until it fades.
        let repeats_max = EJECTION_MAX.as_nanos().div_ceil(spec.time.as_nanos().max(1)).max(1);
        self.repeats =
            self.repeats.saturating_add(1).min(u32::try_from(repeats_max).unwrap_or(u32::MAX));
        let until = now + spec.time.saturating_mul(self.repeats).min(EJECTION_MAX);
        self.phase = EjectionPhase::Ejected { since: now, until };
        self.held = false;
        self.ejections_total += 1;
        until
    }

    /// Records that the guard prevented an ejection. Returns true the first time in
    /// this row of failures.
    pub fn hold_back(&mut self) -> bool {
        let first = !self.held;
        self.held = true;
        self.held_total += u64::from(first);
        first
    }

    /// Whether the guard has prevented an ejection in the current row of failures.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Ends the ejection, if any, and returns how long it lasted.
    pub fn end(&mut self, now: Instant) -> Option<Duration> {
        let EjectionPhase::Ejected { since, .. } = self.phase else { return None };
        self.phase = EjectionPhase::InRotation { since: Some(now) };
        self.restart_row();
        Some(now.saturating_duration_since(since))
    }

    /// Ends the ejection, if any, with a trial, and returns how long the ejection
    /// lasted.
    pub fn begin_trial(&mut self, now: Instant) -> Option<Duration> {
        let EjectionPhase::Ejected { since, .. } = self.phase else { return None };
        self.phase = EjectionPhase::Trial(TrialState { since: now, asked: None, silent: false });
        self.restart_row();
        Some(now.saturating_duration_since(since))
    }

    /// Checks the progress of the trial. `answer_expected`: a client that has sent data
    /// must get an answer within [`TRIAL_MAX`].
    pub fn check_trial(
        &mut self,
        phase: TrialPhase,
        answer_expected: bool,
        now: Instant,
    ) -> Option<TrialEnd> {
        let EjectionPhase::Trial(trial) = &mut self.phase else { return None };
        let was_silent = std::mem::replace(&mut trial.silent, phase == TrialPhase::Connected);
        match phase {
            TrialPhase::Passed => Some(TrialEnd::Passed("trial session succeeded")),
            TrialPhase::Failed => Some(TrialEnd::Failed("trial session failed")),
            TrialPhase::Connected if was_silent => {
                Some(TrialEnd::Passed("trial session is established"))
            }
            TrialPhase::ClientSpoke => {
                let asked = *trial.asked.get_or_insert(now);
                let over = now.saturating_duration_since(asked) >= TRIAL_MAX;
                over.then_some(match answer_expected {
                    true => TrialEnd::Failed("trial session got no answer"),
                    false => TrialEnd::Passed("trial session is established and idle"),
                })
            }
            _ => None,
        }
    }

    /// Ends the trial, if any: the backend is back in rotation. Returns how long the
    /// trial lasted.
    pub fn end_trial(&mut self, now: Instant) -> Option<Duration> {
        let lasted = self.trial_duration(now)?;
        self.phase = EjectionPhase::InRotation { since: Some(now) };
        Some(lasted)
    }

    /// Returns how long the trial has lasted, if one is running.
    pub fn trial_duration(&self, now: Instant) -> Option<Duration> {
        match self.phase {
            EjectionPhase::Trial(trial) => Some(now.saturating_duration_since(trial.since)),
            _ => None,
        }
    }

    /// Whether a trial is running.
    pub fn is_on_trial(&self) -> bool {
        matches!(self.phase, EjectionPhase::Trial(_))
    }

    /// Whether failures count. They do not during an ejection or a trial.
    pub fn counts_failures(&self) -> bool {
        matches!(self.phase, EjectionPhase::InRotation { .. })
    }

    /// Restarts the row because other evidence has cleared the backend.
    pub fn restart_row(&mut self) {
        self.row.restart();
        self.held = false;
    }

    /// Whether the backend is ejected.
    pub fn is_ejected(&self) -> bool {
        matches!(self.phase, EjectionPhase::Ejected { .. })
    }

    /// Returns when the current ejection ends.
    pub fn until(&self) -> Option<Instant> {
        match self.phase {
            EjectionPhase::Ejected { until, .. } => Some(until),
            _ => None,
        }
    }

    /// Returns when the last ejection ended. `None` while ejected, or if never ejected.
    pub fn back_since(&self) -> Option<Instant> {
        match self.phase {
            EjectionPhase::InRotation { since } => since,
            EjectionPhase::Trial(trial) => Some(trial.since),
            EjectionPhase::Ejected { .. } => None,
        }
    }

    /// Returns the failures in a row that count towards an ejection, given the count
    /// that all workers share.
    pub fn row(&self, in_a_row: u32) -> u32 {
        if self.counts_failures() { self.row.length(in_a_row) } else { 0 }
    }

    /// Returns the ejections in a row, as of the last ejection.
    pub fn repeats(&self) -> u32 {
        self.repeats
    }

    /// Returns the number of ejections since the backend was configured.
    pub fn ejections_total(&self) -> u64 {
        self.ejections_total
    }

    /// Returns the number of rows of failures after which the guard prevented an
    /// ejection.
    pub fn held_total(&self) -> u64 {
        self.held_total
    }
}

impl Default for EjectionState {
    fn default() -> Self {
        EjectionState::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: EjectionSpec = EjectionSpec {
        failures: 5,
        time: Duration::from_secs(10),
        max_ejected_percent: 50,
        early_resets: true,
        slow_first_byte: None,
    };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Ejects at `now`, ends the ejection when due, and returns its duration.
    fn eject_and_return(outlier: &mut EjectionState, now: &mut Instant) -> Duration {
        let until = outlier.eject(&SPEC, *now);
        let length = until - *now;
        *now = until;
        outlier.end(*now);
        length
    }

    #[test]
    fn ejection_needs_the_configured_failures_in_a_row() {
        let mut outlier = EjectionState::new();
        assert!((1..=4).all(|k| outlier.failed(k, &SPEC).is_none()));
        assert_eq!(outlier.failed(5, &SPEC), Some(5));
    }

    #[test]
    fn success_resets_the_row_of_failures() {
        let mut outlier = EjectionState::new();
        for k in [1, 2, 3, 4, 1, 2, 3, 4] {
            assert_eq!(outlier.failed(k, &SPEC), None);
        }
    }

    #[test]
    fn each_ejection_in_a_row_is_longer_up_to_five_minutes() {
        let (mut outlier, mut now) = (EjectionState::new(), tidegate_net::clock::now());
        let lengths: Vec<u64> =
            (0..40).map(|_| eject_and_return(&mut outlier, &mut now).as_secs()).collect();
        assert_eq!(&lengths[..4], [10, 20, 30, 40]);
        assert_eq!(&lengths[28..32], [290, 300, 300, 300]);
        assert_eq!(lengths[39], 300);
    }

    #[test]
    fn multiplier_drops_by_one_for_each_time_in_rotation() {
        let (mut outlier, mut now) = (EjectionState::new(), tidegate_net::clock::now());
        for _ in 0..3 {
            eject_and_return(&mut outlier, &mut now);
        }
        now += seconds(20);
        assert_eq!(eject_and_return(&mut outlier, &mut now), seconds(20), "3 - 2 + 1");
        now += seconds(1000);
        assert_eq!(eject_and_return(&mut outlier, &mut now), seconds(10), "all forgotten");
    }

    #[test]
    fn multiplier_at_the_cap_fades_within_five_minutes() {
        let (mut outlier, mut now) = (EjectionState::new(), tidegate_net::clock::now());
        for _ in 0..1000 {
            eject_and_return(&mut outlier, &mut now);
        }
        now += EJECTION_MAX;
        assert_eq!(eject_and_return(&mut outlier, &mut now), seconds(10));
    }

    #[test]
    fn next_ejection_needs_a_complete_new_row_of_failures() {
        let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
        outlier.failed(5, &SPEC);
        outlier.eject(&SPEC, now);
        assert_eq!(outlier.failed(500, &SPEC), None, "picked before the ejection");
        assert_eq!(outlier.end(now + seconds(10)), Some(seconds(10)));
        for k in 801..805 {
            assert_eq!(outlier.failed(k, &SPEC), None);
        }
        assert_eq!(outlier.failed(805, &SPEC), Some(5));
    }

    #[test]
    fn failed_trial_makes_the_next_ejection_longer_and_does_not_fade() {
        let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
        outlier.eject(&SPEC, now);
        assert_eq!(outlier.begin_trial(now + seconds(10)), Some(seconds(10)));
        assert!(outlier.is_on_trial() && !outlier.is_ejected());
        assert_eq!(outlier.failed(500, &SPEC), None, "picked before the ejection");
        let later = now + seconds(1000);
        let end = outlier.check_trial(TrialPhase::Failed, true, later);
        assert!(matches!(end, Some(TrialEnd::Failed(_))));
        assert_eq!(outlier.eject(&SPEC, later) - later, seconds(20));
    }

    #[test]
    fn trial_passes_after_an_answer_or_two_idle_checks_but_not_after_client_data() {
        let look = |phases: &[TrialPhase]| {
            let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
            outlier.eject(&SPEC, now);
            outlier.begin_trial(now);
            phases.iter().fold(None, |_, phase| outlier.check_trial(*phase, true, now))
        };
        use TrialPhase::{Claimed, ClientSpoke, Connected, Open, Passed};
        assert_eq!(look(&[Open, Claimed, Connected, ClientSpoke, Open]), None);
        assert_eq!(look(&[Connected, Open, Connected]), None, "two sessions");
        assert!(matches!(look(&[Connected, Connected]), Some(TrialEnd::Passed(_))));
        assert!(matches!(look(&[ClientSpoke, Passed]), Some(TrialEnd::Passed(_))));
    }

    #[test]
    fn unanswered_trial_fails_only_if_the_pool_expects_an_answer() {
        for (answer_expected, passes) in [(true, false), (false, true)] {
            let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
            outlier.eject(&SPEC, now);
            outlier.begin_trial(now);
            let mut look =
                |after| outlier.check_trial(TrialPhase::ClientSpoke, answer_expected, now + after);
            assert_eq!(look(seconds(1)), None);
            assert_eq!(look(TRIAL_MAX), None, "1 s too early");
            let end = look(TRIAL_MAX + seconds(1)).unwrap();
            assert_eq!(matches!(end, TrialEnd::Passed(_)), passes);
        }
    }

    #[test]
    fn upgrade_hands_over_the_ejection() {
        let (mut outlier, mut now) = (EjectionState::new(), tidegate_net::clock::now());
        eject_and_return(&mut outlier, &mut now);
        let mut other = EjectionState::new();
        other.restore(&outlier.save(now), now);
        assert_eq!(other.back_since(), outlier.back_since());
        let until = outlier.eject(&SPEC, now);
        other.restore(&outlier.save(now + seconds(5)), now + seconds(5));
        assert_eq!((other.until(), other.repeats(), other.ejections_total()), (Some(until), 2, 2));
        assert_eq!(other.end(until), Some(seconds(20)));
    }

    #[test]
    fn prevented_ejection_is_reported_once_per_row() {
        let mut outlier = EjectionState::new();
        assert!(outlier.failed(5, &SPEC).is_some());
        assert!(outlier.hold_back());
        assert!(outlier.failed(6, &SPEC).is_some());
        assert!(!outlier.hold_back());
        outlier.failed(1, &SPEC);
        assert!(outlier.failed(5, &SPEC).is_some());
        assert!(outlier.hold_back());
        assert_eq!(outlier.held_total(), 2);
    }
}
