//! State machine of one backend over its heartbeats and confirmation probes.
//!
//! The controller owns one per backend of a pool with heartbeats, passes in every event
//! and performs the [`DetectorStep`]s that it returns. This code reads no clock, sends no
//! probe and knows no other backend. It requests a removal; `guards` allows or prevents
//! it.

mod reading;
mod saved;

pub use saved::SavedDetector;

use super::{
    ArrivalOrder, Arrivals, BeatInfo, ChannelState, ConfirmationTry, DetectorRequest,
    DetectorState, DetectorStep, DetectorTransition, RECOVERY_BEATS, SUSPECT_PROBE_INTERVAL,
    SUSPECT_WEIGHT_PERCENT, TryId, TryResult,
};
use crate::suspicion::answer_time::AnswerTime;
use crate::suspicion::confirmation::{Confirmation, ConfirmationProgress};
use crate::suspicion::flap_damping::FlapDamping;
use std::time::{Duration, Instant};

/// Tries of a confirmation probe that must fail, one after another.
const TRIES: u32 = 2;

/// Above this loss, two lost connects in a row are common. Then there are up to
/// `TRIES_MAX` tries if they fit into `CONFIRMED_WITHIN`.
const TRIES_MORE_ABOVE: f64 = 0.15;
const TRIES_MAX: u32 = 3;

/// Additional tries end within this many intervals after the last heartbeat.
const CONFIRMED_WITHIN: f64 = 14.5;

/// A prevented removal needs no new confirmation within this time after the suspicion.
const CONFIRMED_FOR: Duration = Duration::from_secs(1);

/// Lower bound of phi's deviation, as a share of the interval. Very regular heartbeats
/// would make phi jump.
const PHI_DEVIATION_MIN: f64 = 0.1;

/// See the module documentation.
#[derive(Debug, Clone)]
pub struct HeartbeatDetector {
    arrivals: Arrivals,
    answer_time: AnswerTime,
    phase: DetectorPhase,
    since: Instant,
    /// The current confirmation probe.
    round: Option<Confirmation>,
    /// The next round starts at this time or later.
    next_round: Option<Instant>,
    try_serial: u64,
    /// The backend was down before; it does not come up for the first time.
    was_down: bool,
    /// End of the hold-down.
    hold_until: Option<Instant>,
    flaps: FlapDamping,
    /// When a probe last succeeded.
    answered_at: Option<Instant>,
    suspicions_total: u64,
    downs_total: u64,
}

#[derive(Debug, Clone)]
enum DetectorPhase {
    Waiting,
    Up,
    Suspect(Suspicion),
    Down,
    /// Heartbeats in a row.
    Recovering {
        beats: u32,
    },
}

#[derive(Debug, Clone)]
struct Suspicion {
    cause: SuspicionCause,
    /// The evidence that caused the suspicion.
    evidence: String,
    confirmed: Option<Confirmed>,
    held: Option<String>,
}

/// Cause of a suspicion. It decides which evidence clears the suspicion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SuspicionCause {
    /// Heartbeats are overdue: a heartbeat clears it.
    Silent,
    /// The service refused a connect: a successful probe clears it.
    Service,
}

#[derive(Debug, Clone)]
struct Confirmed {
    evidence: String,
    proven: bool,
}

// === impl HeartbeatDetector ===

impl HeartbeatDetector {
    /// Returns a detector without a heartbeat. The pool expects one every `interval`.
    pub fn new(interval: Duration, now: Instant) -> HeartbeatDetector {
        HeartbeatDetector {
            arrivals: Arrivals::new(interval),
            answer_time: AnswerTime::default(),
            phase: DetectorPhase::Waiting,
            since: now,
            round: None,
            next_round: None,
            try_serial: 0,
            was_down: false,
            hold_until: None,
            flaps: FlapDamping::default(),
            answered_at: None,
            suspicions_total: 0,
            downs_total: 0,
        }
    }

    /// Records a heartbeat. If the sender reports stopping, call
    /// [`HeartbeatDetector::stopping`] instead.
    ///
    /// A heartbeat of order [`ArrivalOrder::Old`] changes nothing.
    pub fn beat(&mut self, beat: &BeatInfo, now: Instant) -> (ArrivalOrder, DetectorStep) {
        let silence = self.silence(now);
        let ends_outage = match &self.phase {
            DetectorPhase::Down => true,
            DetectorPhase::Suspect(suspicion) => suspicion.confirmed.is_some(),
            DetectorPhase::Waiting | DetectorPhase::Up | DetectorPhase::Recovering { .. } => false,
        };
        let arrival = self.arrivals.beat(beat, ends_outage, now);
        if arrival == ArrivalOrder::Old {
            return (arrival, DetectorStep::default());
        }
        let step = match &mut self.phase {
            DetectorPhase::Up => {
                // The probe that a silent channel started is no longer needed.
                self.round = None;
                self.next_round = None;
                DetectorStep::default()
            }
            DetectorPhase::Suspect(suspicion) => match (suspicion.cause, &suspicion.confirmed) {
                (SuspicionCause::Service, _) => DetectorStep::default(),
                (SuspicionCause::Silent, None) => {
                    let silence = millis(silence.unwrap_or_default());
                    self.change(
                        DetectorState::Up,
                        format!("heartbeat received after {silence} of silence"),
                        now,
                    )
                }
                (SuspicionCause::Silent, Some(_)) => {
                    // A guard prevented the removal, and now a heartbeat has arrived. A
                    // probe must show that the service works.
                    suspicion.cause = SuspicionCause::Service;
                    suspicion.confirmed = None;
                    suspicion.held = None;
                    self.start_round(now)
                }
            },
            DetectorPhase::Waiting | DetectorPhase::Down => {
                let first = matches!(self.phase, DetectorPhase::Waiting);
                let reason = if first { "first heartbeat" } else { "heartbeats resumed" };
                let step = self.change(DetectorState::Recovering, reason.to_owned(), now);
                DetectorStep { request: self.try_recovery(now).request, ..step }
            }
            DetectorPhase::Recovering { beats } => {
                *beats = beats.saturating_add(1);
                self.try_recovery(now)
            }
        };
        (arrival, step)
    }

    /// Performs due work. Call it at [`HeartbeatDetector::due`]; calls at other times are
    /// harmless.
    pub fn check(&mut self, channel: ChannelState, now: Instant) -> DetectorStep {
        let overdue = self.overdue(now);
        if overdue && matches!(self.phase, DetectorPhase::Recovering { .. }) {
            self.round = None;
            self.next_round = None;
            let reason = format!("{} while recovering", self.overdue_reason(now));
            return self.change(DetectorState::Down, reason, now);
        }
        if let Some(round) = &mut self.round
            && let Some(again) = round.check(&mut self.try_serial, now)
        {
            return DetectorStep::probe(again);
        }
        match &self.phase {
            DetectorPhase::Waiting | DetectorPhase::Down => DetectorStep::default(),
            DetectorPhase::Up if !overdue => DetectorStep::default(),
            DetectorPhase::Up if channel == ChannelState::Silent => self.start_round_if_due(now),
            DetectorPhase::Up => {
                let evidence = self.overdue_reason(now);
                self.suspect(SuspicionCause::Silent, evidence, now)
            }
            DetectorPhase::Suspect(_) => self.start_round_if_due(now),
            DetectorPhase::Recovering { .. } => self.try_recovery(now),
        }
    }

    /// Returns when to call [`HeartbeatDetector::check`] next; later than the `now` of
    /// the last check. `None`: only a heartbeat changes the state.
    pub fn due(&self) -> Option<Instant> {
        if let Some(round) = &self.round {
            let silent = match self.phase {
                DetectorPhase::Recovering { .. } => self.arrivals.deadline(),
                _ => None,
            };
            return Some(silent.map_or(round.due(), |at| at.min(round.due())));
        }
        let deadline = self.arrivals.deadline();
        match &self.phase {
            DetectorPhase::Waiting | DetectorPhase::Down => None,
            DetectorPhase::Up => deadline.max(self.next_round),
            DetectorPhase::Suspect(_) => self.next_round,
            DetectorPhase::Recovering { beats } => {
                let ready = *beats >= self.beats_needed();
                let probe = self.next_round.max(self.hold_until).filter(|_| ready);
                probe.map_or(deadline, |at| deadline.map(|deadline| deadline.min(at)))
            }
        }
    }

    /// Records the result of a try. Ignores a result that the current round does not wait
    /// for.
    pub fn probed(&mut self, id: TryId, answer: TryResult, now: Instant) -> DetectorStep {
        let Some(round) = &mut self.round else { return DetectorStep::default() };
        let progress = round.answer(id, answer, &mut self.try_serial, now);
        match progress {
            ConfirmationProgress::Ignored | ConfirmationProgress::Wait => DetectorStep::default(),
            ConfirmationProgress::Again(next) => DetectorStep::probe(next),
            ConfirmationProgress::Answered(took) => {
                self.answer_time.answered(took);
                self.end_round(now);
                self.answered(now)
            }
            ConfirmationProgress::Failed(evidence) => {
                self.answer_time.failed();
                self.end_round(now);
                self.confirmed(Confirmed { evidence, proven: false }, now)
            }
            ConfirmationProgress::Refused => {
                self.end_round(now);
                let evidence = "confirmation probe was refused".to_owned();
                self.confirmed(Confirmed { evidence, proven: true }, now)
            }
        }
    }

    /// Records how long the pool's own probe took, so that later tries get enough time.
    /// Clears no suspicion.
    pub fn note_connect_success(&mut self, took: Duration) {
        self.answer_time.answered(took);
    }

    /// Records that a session's connect or the pool's own probe was refused. A crash is
    /// visible here first. One probe decides, because a single reset can have other
    /// causes.
    pub fn note_connect_refused(&mut self, now: Instant) -> DetectorStep {
        match &self.phase {
            DetectorPhase::Up => {
                let evidence = "a session's connect was refused".to_owned();
                self.suspect(SuspicionCause::Service, evidence, now)
            }
            DetectorPhase::Suspect(suspicion) if suspicion.confirmed.is_none() => {
                if self.round.is_some() { DetectorStep::default() } else { self.start_round(now) }
            }
            _ => DetectorStep::default(),
        }
    }

    /// Records that the sender reported stopping: the backend is down at once. Its
    /// return needs no hold-down.
    pub fn stopping(&mut self, now: Instant) -> DetectorStep {
        self.round = None;
        self.next_round = None;
        if matches!(self.phase, DetectorPhase::Down) {
            return DetectorStep::default();
        }
        self.was_down = true;
        self.hold_until = None;
        self.flaps.stopped(now);
        self.change(DetectorState::Down, "the sender reported stopping".to_owned(), now)
    }

    /// Makes the backend down, after the guards allowed [`DetectorRequest::Eject`].
    pub fn eject(&mut self, now: Instant) -> DetectorStep {
        let DetectorPhase::Suspect(suspicion) = &self.phase else {
            return DetectorStep::default();
        };
        let Some(confirmed) = &suspicion.confirmed else { return DetectorStep::default() };
        let reason = format!("{}; {}", suspicion.evidence, confirmed.evidence);
        self.was_down = true;
        self.downs_total += 1;
        self.hold_until = Some(self.flaps.down(now));
        self.round = None;
        self.next_round = None;
        self.change(DetectorState::Down, reason, now)
    }

    /// Keeps the backend suspect, because a guard prevented the removal. It is probed
    /// every [`SUSPECT_PROBE_INTERVAL`], and each failure requests the removal again.
    /// Returns true if the reason is new.
    pub fn hold_in_rotation(&mut self, reason: String) -> bool {
        let DetectorPhase::Suspect(suspicion) = &mut self.phase else { return false };
        if suspicion.confirmed.is_none() {
            return false;
        }
        let news = suspicion.held.as_ref() != Some(&reason);
        suspicion.held = Some(reason);
        news
    }

    /// Requests a prevented removal again, because the guards may allow it now. If the
    /// confirmation is older than 1 s, a new probe comes first: the path may work
    /// again, and so may the backend.
    pub fn reconsider(&mut self, now: Instant) -> DetectorStep {
        let DetectorPhase::Suspect(Suspicion { confirmed: Some(confirmed), .. }) = &self.phase
        else {
            return DetectorStep::default();
        };
        let stale = now.saturating_duration_since(self.since) > CONFIRMED_FOR;
        match (confirmed.proven || !stale, &self.round) {
            (true, _) => DetectorStep {
                change: None,
                request: Some(DetectorRequest::Eject { proven: confirmed.proven }),
            },
            (false, Some(_)) => DetectorStep::default(),
            (false, None) => self.start_round(now),
        }
    }

    /// Excludes the time `lost` before `now`, in which this process was late or its socket
    /// dropped datagrams. It does not count as silence, its gaps and delays are not
    /// learned, and a try of that time is repeated.
    pub fn ignore_silence_until(&mut self, lost: Duration, now: Instant) -> DetectorStep {
        self.arrivals.skip_gap(lost, now);
        match &mut self.round {
            Some(round) => {
                let again = round.repeat(lost, &mut self.try_serial, now);
                again.map_or_else(DetectorStep::default, DetectorStep::probe)
            }
            None => DetectorStep::default(),
        }
    }

    /// Returns the state.
    pub fn state(&self) -> DetectorState {
        match self.phase {
            DetectorPhase::Waiting => DetectorState::Waiting,
            DetectorPhase::Up => DetectorState::Up,
            DetectorPhase::Suspect(_) => DetectorState::Suspect,
            DetectorPhase::Down => DetectorState::Down,
            DetectorPhase::Recovering { .. } => DetectorState::Recovering,
        }
    }

    /// Returns when the state last changed.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Whether the backend was down before, after a failure or a stop.
    pub fn was_down(&self) -> bool {
        self.was_down
    }

    /// Returns the share of its weight, in percent; `None` if the backend has never been
    /// up.
    pub fn weight_percent(&self) -> Option<u32> {
        match self.phase {
            DetectorPhase::Up => Some(100),
            DetectorPhase::Suspect(_) => Some(SUSPECT_WEIGHT_PERCENT),
            DetectorPhase::Down => Some(0),
            DetectorPhase::Recovering { .. } if self.was_down => Some(0),
            DetectorPhase::Waiting | DetectorPhase::Recovering { .. } => None,
        }
    }

    /// Returns the declared interval.
    pub fn interval(&self) -> Duration {
        self.arrivals.interval()
    }

    /// Whether more heartbeats are missing than allowed.
    pub fn overdue(&self, now: Instant) -> bool {
        self.arrivals.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Whether a probe succeeded within the last 1.5 s.
    pub fn answers(&self, now: Instant) -> bool {
        let late = SUSPECT_PROBE_INTERVAL + SUSPECT_PROBE_INTERVAL / 2;
        self.answered_at.is_some_and(|at| now.saturating_duration_since(at) < late)
    }

    /// Whether a heartbeat arrived at least one interval after `since`, or a probe
    /// succeeded after it. The interval excludes datagrams that were already in flight.
    pub fn heard_since(&self, since: Instant) -> bool {
        let beaten = self.arrivals.newest_at().is_some_and(|at| at >= since + self.interval());
        beaten || self.answered_at.is_some_and(|at| at > since)
    }

    fn suspect(&mut self, cause: SuspicionCause, evidence: String, now: Instant) -> DetectorStep {
        self.suspicions_total += 1;
        let reason = evidence.clone();
        let step = self.change(DetectorState::Suspect, reason, now);
        self.phase =
            DetectorPhase::Suspect(Suspicion { cause, evidence, confirmed: None, held: None });
        // A round that tests the same silence continues.
        let request = if self.round.is_none() { self.start_round(now).request } else { None };
        DetectorStep { request, ..step }
    }

    /// Applies a successful round.
    fn answered(&mut self, now: Instant) -> DetectorStep {
        self.answered_at = Some(now);
        let overdue = self.overdue(now);
        match &mut self.phase {
            DetectorPhase::Suspect(suspicion)
                if suspicion.cause == SuspicionCause::Service && !overdue =>
            {
                self.change(DetectorState::Up, "confirmation probe succeeded".to_owned(), now)
            }
            DetectorPhase::Suspect(suspicion) => {
                // Silent but answering, whatever the cause was before.
                suspicion.cause = SuspicionCause::Silent;
                suspicion.confirmed = None;
                suspicion.held = None;
                DetectorStep::default()
            }
            DetectorPhase::Recovering { beats } => {
                let reason = if self.was_down {
                    format!("{beats} heartbeats received and the confirmation probe succeeded")
                } else {
                    "heartbeats received and the confirmation probe succeeded".to_owned()
                };
                self.change(DetectorState::Up, reason, now)
            }
            DetectorPhase::Waiting | DetectorPhase::Up | DetectorPhase::Down => {
                DetectorStep::default()
            }
        }
    }

    /// Applies a failed or refused round.
    fn confirmed(&mut self, confirmed: Confirmed, now: Instant) -> DetectorStep {
        let proven = confirmed.proven;
        match &mut self.phase {
            DetectorPhase::Up => {
                // The channel is silent, and the service does not answer.
                let evidence = self.overdue_reason(now);
                let next_round = self.next_round;
                let step = self.suspect(SuspicionCause::Silent, evidence, now);
                self.round = None;
                self.next_round = next_round;
                if let DetectorPhase::Suspect(suspicion) = &mut self.phase {
                    suspicion.confirmed = Some(confirmed);
                }
                DetectorStep { request: Some(DetectorRequest::Eject { proven }), ..step }
            }
            DetectorPhase::Suspect(suspicion) => {
                suspicion.confirmed = Some(confirmed);
                DetectorStep { change: None, request: Some(DetectorRequest::Eject { proven }) }
            }
            DetectorPhase::Recovering { beats } => {
                *beats = 0;
                DetectorStep::default()
            }
            DetectorPhase::Waiting | DetectorPhase::Down => DetectorStep::default(),
        }
    }

    fn try_recovery(&mut self, now: Instant) -> DetectorStep {
        let DetectorPhase::Recovering { beats } = self.phase else {
            return DetectorStep::default();
        };
        let held = self.hold_until.is_some_and(|until| now < until);
        if self.round.is_some() || held || beats < self.beats_needed() {
            return DetectorStep::default();
        }
        self.start_round_if_due(now)
    }

    /// Returns the heartbeats needed before the recovery probe: one for a backend that
    /// was never down.
    fn beats_needed(&self) -> u32 {
        if self.was_down { RECOVERY_BEATS } else { 1 }
    }

    fn start_round_if_due(&mut self, now: Instant) -> DetectorStep {
        if self.round.is_some() || self.next_round.is_some_and(|at| now < at) {
            return DetectorStep::default();
        }
        self.start_round(now)
    }

    fn start_round(&mut self, now: Instant) -> DetectorStep {
        let (round, first) = Confirmation::start(
            (self.tries(), self.answer_time.timeout()),
            &mut self.try_serial,
            now,
        );
        self.round = Some(round);
        self.next_round = None;
        DetectorStep::probe(first)
    }

    fn end_round(&mut self, now: Instant) {
        self.round = None;
        self.next_round = Some(now + SUSPECT_PROBE_INTERVAL);
    }

    fn tries(&self) -> u32 {
        if self.arrivals.loss() <= TRIES_MORE_ABOVE {
            return TRIES;
        }
        let within = self.arrivals.interval().mul_f64(CONFIRMED_WITHIN);
        let left = within.saturating_sub(self.arrivals.timeout());
        let fit = left.as_nanos() / self.answer_time.timeout().as_nanos();
        u32::try_from(fit).unwrap_or(TRIES_MAX).clamp(TRIES, TRIES_MAX)
    }

    fn change(&mut self, to: DetectorState, reason: String, now: Instant) -> DetectorStep {
        let from = self.state();
        let lasted = now.saturating_duration_since(self.since);
        let after_down =
            to == DetectorState::Up && from == DetectorState::Recovering && self.was_down;
        self.since = now;
        self.phase = match to {
            DetectorState::Waiting => DetectorPhase::Waiting,
            DetectorState::Up => DetectorPhase::Up,
            DetectorState::Suspect => DetectorPhase::Suspect(Suspicion {
                cause: SuspicionCause::Silent,
                evidence: String::new(),
                confirmed: None,
                held: None,
            }),
            DetectorState::Down => DetectorPhase::Down,
            DetectorState::Recovering => DetectorPhase::Recovering { beats: 1 },
        };
        if to == DetectorState::Up {
            self.round = None;
            self.next_round = None;
            self.hold_until = None;
            if from == DetectorState::Recovering {
                self.flaps.up(now);
            }
        }
        DetectorStep {
            change: Some(DetectorTransition { from, to, reason, lasted, after_down }),
            request: None,
        }
    }

    fn silence(&self, now: Instant) -> Option<Duration> {
        self.arrivals.newest_at().map(|at| now.saturating_duration_since(at))
    }

    fn overdue_reason(&self, now: Instant) -> String {
        format!(
            "no heartbeat for {} ({} may be missing at {:.1}% loss)",
            millis(self.silence(now).unwrap_or_default()),
            self.arrivals.missing_allowed(),
            self.arrivals.loss() * 100.0
        )
    }
}

// === impl DetectorStep ===

impl DetectorStep {
    fn probe(next: ConfirmationTry) -> DetectorStep {
        DetectorStep { change: None, request: Some(DetectorRequest::Probe(next)) }
    }
}

fn millis(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}
