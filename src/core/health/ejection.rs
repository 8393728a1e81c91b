//! Passive ejection of one backend: rows of failures put it out for a while,
//! and a trial brings it back.
//!
//! The controller owns one for each backend, asks its pool's guard before it
//! ejects, and ends ejections when their time has come. It never reads a clock
//! and knows nothing of the other backends.
//!
//! The n-th ejection in a row lasts n times the configured `time`, at most
//! [`EJECTION_MAX`]. After an ejection a whole new row of failures is needed
//! for the next. *In a row* fades: n drops by one for each `time` spent in
//! service since the last ejection ended.
//!
//! When its time is over, one session tries the backend (Nygard's half-open
//! circuit breaker, "Release It!", 2007) and no second one gets in before that
//! one says how it was:
//!
//! - a first byte, an end in order, or a connection on which nobody speaks from
//!   one look to the next: it passes, and everybody may come;
//! - a failed connect or an early reset: it is ejected again, for longer;
//! - anything else (its client went away) says nothing, and the next one tries.
//!
//! A trial whose clients speak and get no answer for [`TRIAL_MAX`] is at an end,
//! too: it has failed where a first byte is expected (`slow_first_byte`), and
//! passed where some may take their time.

use crate::balance::trial::TrialPhase;
use crate::health::probe_detector::ConnectFailureRow;
use crate::model::EjectionSpec;
use std::time::{Duration, Instant};

/// No ejection lasts longer: a backend that came back is found out within
/// five minutes even where there are no probes.
pub const EJECTION_MAX: Duration = Duration::from_secs(300);

/// Unanswered for this long, a trial is decided without an answer: a backend
/// must not stay out because one client waits for something.
pub const TRIAL_MAX: Duration = Duration::from_secs(10);

/// How often the controller looks at a trial: whoever comes meanwhile goes
/// elsewhere.
pub const TRIAL_LOOK: Duration = Duration::from_millis(100);

/// How a trial ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrialEnd {
    /// Everybody may come; why, in words.
    Passed(&'static str),
    /// It is to be ejected again; why, in words.
    Failed(&'static str),
}

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct EjectionState {
    standing: EjectionPhase,
    row: ConnectFailureRow,
    /// Ejections in a row, as of the last one.
    repeats: u32,
    /// The guard has held back an ejection in the present row.
    held: bool,
    held_total: u64,
    ejections_total: u64,
}

/// What one process tells the next of an [`EjectionState`]. Times are counted from the
/// moment of the telling, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct SavedEjectionState {
    /// The present ejection began so long ago and lasts so much longer.
    pub ejected: Option<(u64, u64)>,
    /// The last ejection ended so long ago.
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
    /// When a client was first seen to wait for an answer.
    asked: Option<Instant>,
    /// At the last look the connection stood and nobody had spoken.
    silent: bool,
}

// === impl EjectionState ===

impl EjectionState {
    /// Never ejected yet.
    pub fn new() -> EjectionState {
        EjectionState {
            standing: EjectionPhase::InRotation { since: None },
            row: ConnectFailureRow::new(),
            repeats: 0,
            held: false,
            held_total: 0,
            ejections_total: 0,
        }
    }

    /// The same ejection of a backend that has taken this one's place. What was counted
    /// stays with this one.
    pub fn of_another_name(&self) -> EjectionState {
        EjectionState { standing: self.standing, repeats: self.repeats, ..EjectionState::new() }
    }

    /// For another process to go on with.
    pub fn save(&self, now: Instant) -> SavedEjectionState {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let ago = |then: Instant| millis(now.saturating_duration_since(then));
        let (ejected, back_ms) = match self.standing {
            EjectionPhase::InRotation { since } => (None, since.map(ago)),
            EjectionPhase::Ejected { since, until } => {
                (Some((ago(since), millis(until.saturating_duration_since(now)))), None)
            }
            // The next process makes a trial of its own.
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

    /// Goes on with what another process has said at `now`; the row starts anew.
    pub fn restore(&mut self, saved: &SavedEjectionState, now: Instant) {
        let before = |ms: u64| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
        self.restart_row();
        self.standing = match saved.ejected {
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

    /// Takes a session's failure (`in_a_row` is the count all workers share).
    /// Gives the length of the row once it is long enough to eject.
    ///
    /// What arrives during an ejection are stragglers that were chosen before
    /// it: they count for nothing. A trial is decided by its own session.
    pub fn failed(&mut self, in_a_row: u32, spec: &EjectionSpec) -> Option<u32> {
        if !self.takes_failures() {
            return None;
        }
        let row = self.row.measure(in_a_row);
        if row < spec.failures {
            self.held = false;
            return None;
        }
        Some(row)
    }

    /// Starts an ejection and gives its end.
    pub fn eject(&mut self, spec: &EjectionSpec, now: Instant) -> Instant {
        if let EjectionPhase::InRotation { since: Some(since) } = self.standing {
            let faded =
                now.saturating_duration_since(since).as_nanos() / spec.time.as_nanos().max(1);
            self.repeats = self.repeats.saturating_sub(u32::try_from(faded).unwrap_or(u32::MAX));
        }
        // Beyond the cap a larger n would only take longer to fade.
        let repeats_max = EJECTION_MAX.as_nanos().div_ceil(spec.time.as_nanos().max(1)).max(1);
        self.repeats =
            self.repeats.saturating_add(1).min(u32::try_from(repeats_max).unwrap_or(u32::MAX));
        let until = now + spec.time.saturating_mul(self.repeats).min(EJECTION_MAX);
        self.standing = EjectionPhase::Ejected { since: now, until };
        self.held = false;
        self.ejections_total += 1;
        until
    }

    /// Notes that the guard held an ejection back; true for the first time in
    /// this row of failures.
    pub fn hold_back(&mut self) -> bool {
        let first = !self.held;
        self.held = true;
        self.held_total += u64::from(first);
        first
    }

    /// Ends the ejection, if there is one, and gives how long it lasted.
    pub fn end(&mut self, now: Instant) -> Option<Duration> {
        let EjectionPhase::Ejected { since, .. } = self.standing else { return None };
        self.standing = EjectionPhase::InRotation { since: Some(now) };
        self.restart_row();
        Some(now.saturating_duration_since(since))
    }

    /// Ends the ejection, if there is one, with a trial, and gives how long it
    /// lasted.
    pub fn begin_trial(&mut self, now: Instant) -> Option<Duration> {
        let EjectionPhase::Ejected { since, .. } = self.standing else { return None };
        self.standing = EjectionPhase::Trial(TrialState { since: now, asked: None, silent: false });
        self.restart_row();
        Some(now.saturating_duration_since(since))
    }

    /// Looks how far the trial has come. `answer_expected` says whether a client
    /// that has spoken is due an answer within [`TRIAL_MAX`].
    pub fn look_at_trial(
        &mut self,
        phase: TrialPhase,
        answer_expected: bool,
        now: Instant,
    ) -> Option<TrialEnd> {
        let EjectionPhase::Trial(trial) = &mut self.standing else { return None };
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

    /// Ends the trial, if there is one: it is back in service. Gives how long
    /// the trial lasted.
    pub fn end_trial(&mut self, now: Instant) -> Option<Duration> {
        let lasted = self.trial_lasts(now)?;
        self.standing = EjectionPhase::InRotation { since: Some(now) };
        Some(lasted)
    }

    /// For how long the trial has lasted, if there is one.
    pub fn trial_lasts(&self, now: Instant) -> Option<Duration> {
        match self.standing {
            EjectionPhase::Trial(trial) => Some(now.saturating_duration_since(trial.since)),
            _ => None,
        }
    }

    /// Whether one session is to try it.
    pub fn is_on_trial(&self) -> bool {
        matches!(self.standing, EjectionPhase::Trial(_))
    }

    /// Whether failures count: not during an ejection or a trial.
    pub fn takes_failures(&self) -> bool {
        matches!(self.standing, EjectionPhase::InRotation { .. })
    }

    /// Other evidence has cleared the backend: a whole row is needed again.
    pub fn restart_row(&mut self) {
        self.row.restart();
        self.held = false;
    }

    /// Whether it is ejected now.
    pub fn is_ejected(&self) -> bool {
        matches!(self.standing, EjectionPhase::Ejected { .. })
    }

    /// When the present ejection ends.
    pub fn until(&self) -> Option<Instant> {
        match self.standing {
            EjectionPhase::Ejected { until, .. } => Some(until),
            _ => None,
        }
    }

    /// When the last ejection ended, if that is the latest change.
    pub fn back_since(&self) -> Option<Instant> {
        match self.standing {
            EjectionPhase::InRotation { since } => since,
            EjectionPhase::Trial(trial) => Some(trial.since),
            EjectionPhase::Ejected { .. } => None,
        }
    }

    /// Failures in a row that count towards an ejection, given the count that all
    /// workers share.
    pub fn row(&self, in_a_row: u32) -> u32 {
        if self.takes_failures() { self.row.length(in_a_row) } else { 0 }
    }

    /// Ejections in a row, as of the last one.
    pub fn repeats(&self) -> u32 {
        self.repeats
    }

    /// Ejections since the backend was configured.
    pub fn ejections_total(&self) -> u64 {
        self.ejections_total
    }

    /// Rows of failures after which the guard held an ejection back.
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

    /// Ejects at `now` and ends it on time; gives how long it lasted.
    fn eject_and_return(outlier: &mut EjectionState, now: &mut Instant) -> Duration {
        let until = outlier.eject(&SPEC, *now);
        let length = until - *now;
        *now = until;
        outlier.end(*now);
        length
    }

    #[test]
    fn the_row_of_failures_ejects_and_not_one_less() {
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
    fn the_multiplier_drops_by_one_for_each_time_in_service() {
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
    fn at_the_cap_the_multiplier_fades_within_the_cap() {
        let (mut outlier, mut now) = (EjectionState::new(), tidegate_net::clock::now());
        for _ in 0..1000 {
            eject_and_return(&mut outlier, &mut now);
        }
        now += EJECTION_MAX;
        assert_eq!(eject_and_return(&mut outlier, &mut now), seconds(10));
    }

    #[test]
    fn after_an_ejection_a_whole_row_is_needed_again() {
        let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
        outlier.failed(5, &SPEC);
        outlier.eject(&SPEC, now);
        assert_eq!(outlier.failed(500, &SPEC), None, "a straggler");
        assert_eq!(outlier.end(now + seconds(10)), Some(seconds(10)));
        for k in 801..805 {
            assert_eq!(outlier.failed(k, &SPEC), None);
        }
        assert_eq!(outlier.failed(805, &SPEC), Some(5));
    }

    #[test]
    fn failed_trial_makes_the_next_ejection_longer_and_nothing_fades_meanwhile() {
        let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
        outlier.eject(&SPEC, now);
        assert_eq!(outlier.begin_trial(now + seconds(10)), Some(seconds(10)));
        assert!(outlier.is_on_trial() && !outlier.is_ejected());
        assert_eq!(outlier.failed(500, &SPEC), None, "a straggler");
        let later = now + seconds(1000);
        let end = outlier.look_at_trial(TrialPhase::Failed, true, later);
        assert!(matches!(end, Some(TrialEnd::Failed(_))));
        assert_eq!(outlier.eject(&SPEC, later) - later, seconds(20));
    }

    #[test]
    fn trial_passes_by_an_answer_or_by_lasting_silence_and_not_by_a_question() {
        let look = |phases: &[TrialPhase]| {
            let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
            outlier.eject(&SPEC, now);
            outlier.begin_trial(now);
            phases.iter().fold(None, |_, phase| outlier.look_at_trial(*phase, true, now))
        };
        use TrialPhase::{Claimed, ClientSpoke, Connected, Open, Passed};
        assert_eq!(look(&[Open, Claimed, Connected, ClientSpoke, Open]), None);
        assert_eq!(look(&[Connected, Open, Connected]), None, "two sessions");
        assert!(matches!(look(&[Connected, Connected]), Some(TrialEnd::Passed(_))));
        assert!(matches!(look(&[ClientSpoke, Passed]), Some(TrialEnd::Passed(_))));
    }

    #[test]
    fn unanswered_trial_ends_as_the_pool_expects_it() {
        for (answer_expected, passes) in [(true, false), (false, true)] {
            let (mut outlier, now) = (EjectionState::new(), tidegate_net::clock::now());
            outlier.eject(&SPEC, now);
            outlier.begin_trial(now);
            let mut look = |after| {
                outlier.look_at_trial(TrialPhase::ClientSpoke, answer_expected, now + after)
            };
            assert_eq!(look(seconds(1)), None);
            assert_eq!(look(TRIAL_MAX), None, "a second too early");
            let end = look(TRIAL_MAX + seconds(1)).unwrap();
            assert_eq!(matches!(end, TrialEnd::Passed(_)), passes);
        }
    }

    #[test]
    fn what_another_process_goes_on_with_is_the_same() {
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
    fn a_held_back_ejection_is_news_once_a_row() {
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
