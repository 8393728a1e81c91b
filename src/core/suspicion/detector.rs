//! One backend's state machine over its heartbeats and confirming probes.
//!
//! The controller owns one for each backend of a pool with heartbeats, gives it
//! whatever happens and performs the [`DetectorStep`]s it returns. It never reads a
//! clock, makes no probe itself, and knows nothing of other backends: taking
//! one out is asked for, and granted by `guards`.

mod reading;
mod saved;

pub use saved::SavedDetector;

use super::{
    ArrivalOrder, Arrivals, BeatInfo, ChannelState, ConfirmationTry, DOUBT_INTERVAL,
    DetectorRequest, DetectorState, DetectorStep, DetectorTransition, RECOVERY_BEATS,
    SUSPECT_WEIGHT_PERCENT, TryId, TryResult,
};
use crate::suspicion::answer_time::AnswerTime;
use crate::suspicion::confirmation::{Confirmation, ConfirmationProgress};
use crate::suspicion::flap_damping::FlapDamping;
use std::time::{Duration, Instant};

/// Tries of a confirming probe that have to fail, one after another.
const TRIES: u32 = 2;

/// Above that loss two lost connects in a row are nothing special: then more
/// tries are made, as far as they fit.
const TRIES_MORE_ABOVE: f64 = 0.15;
const TRIES_MAX: u32 = 3;

/// Further tries end within so many intervals of the last heartbeat.
const CONFIRMED_WITHIN: f64 = 14.5;

/// What a guard has held back is not confirmed anew so soon after the suspicion.
const CONFIRMED_FOR: Duration = Duration::from_secs(1);

/// Phi's deviation is at least that share of the interval: one that is too
/// regular makes phi leap.
const PHI_DEVIATION_MIN: f64 = 0.1;

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct HeartbeatDetector {
    arrivals: Arrivals,
    reach: AnswerTime,
    standing: DetectorPhase,
    since: Instant,
    /// The probing under way.
    round: Option<Confirmation>,
    /// When the next round may begin.
    next_round: Option<Instant>,
    try_serial: u64,
    /// It comes back after a failure, not for the first time.
    was_down: bool,
    /// It stays out until then, however well it does.
    hold_until: Option<Instant>,
    flaps: FlapDamping,
    /// When a probe was answered last.
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
    /// The evidence that began it.
    evidence: String,
    confirmed: Option<Confirmed>,
    held: Option<String>,
}

/// What began a suspicion decides what clears it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SuspicionCause {
    /// No heartbeats: a heartbeat clears it.
    Silent,
    /// The service did not answer: a probe that is answered clears it.
    Service,
}

#[derive(Debug, Clone)]
struct Confirmed {
    evidence: String,
    proven: bool,
}

// === impl HeartbeatDetector ===

impl HeartbeatDetector {
    /// Has heard nothing yet; the pool expects a heartbeat every `interval`.
    pub fn new(interval: Duration, now: Instant) -> HeartbeatDetector {
        HeartbeatDetector {
            arrivals: Arrivals::new(interval),
            reach: AnswerTime::default(),
            standing: DetectorPhase::Waiting,
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

    /// A heartbeat of a sender that serves (or means to) came. For one that
    /// stops, call [`HeartbeatDetector::stopping`] instead.
    ///
    /// `ArrivalOrder` says whether it counted: an old one says nothing about now.
    pub fn beat(&mut self, beat: &BeatInfo, now: Instant) -> (ArrivalOrder, DetectorStep) {
        let silence = self.silence(now);
        let ends_outage = match &self.standing {
            DetectorPhase::Down => true,
            DetectorPhase::Suspect(suspicion) => suspicion.confirmed.is_some(),
            DetectorPhase::Waiting | DetectorPhase::Up | DetectorPhase::Recovering { .. } => false,
        };
        let arrival = self.arrivals.beat(beat, ends_outage, now);
        if arrival == ArrivalOrder::Old {
            return (arrival, DetectorStep::default());
        }
        let step = match &mut self.standing {
            DetectorPhase::Up => {
                // A probe that was to tell whether silence means anything.
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
                    // Silent, not answering, held back, and now it is heard.
                    suspicion.cause = SuspicionCause::Service;
                    suspicion.confirmed = None;
                    suspicion.held = None;
                    self.start_round(now)
                }
            },
            DetectorPhase::Waiting | DetectorPhase::Down => {
                let first = matches!(self.standing, DetectorPhase::Waiting);
                let reason = if first { "first heartbeat" } else { "heartbeats resumed" };
                let step = self.change(DetectorState::Recovering, reason.to_owned(), now);
                DetectorStep { ask: self.try_recovery(now).ask, ..step }
            }
            DetectorPhase::Recovering { beats } => {
                *beats = beats.saturating_add(1);
                self.try_recovery(now)
            }
        };
        (arrival, step)
    }

    /// Does what has come due; to be called at [`HeartbeatDetector::due`].
    /// Calling it at any other time does no harm.
    pub fn check(&mut self, channel: ChannelState, now: Instant) -> DetectorStep {
        let overdue = self.overdue(now);
        if overdue && matches!(self.standing, DetectorPhase::Recovering { .. }) {
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
        match &self.standing {
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

    /// When [`HeartbeatDetector::check`] is wanted next; later than the `now`
    /// of the last check. `None`: only a heartbeat changes anything.
    pub fn due(&self) -> Option<Instant> {
        if let Some(round) = &self.round {
            let silent = match self.standing {
                DetectorPhase::Recovering { .. } => self.arrivals.deadline(),
                _ => None,
            };
            return Some(silent.map_or(round.due(), |at| at.min(round.due())));
        }
        let deadline = self.arrivals.deadline();
        match &self.standing {
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

    /// A try ended. What nobody waits for any more is ignored.
    pub fn probed(&mut self, id: TryId, answer: TryResult, now: Instant) -> DetectorStep {
        let Some(round) = &mut self.round else { return DetectorStep::default() };
        let progress = round.answer(id, answer, &mut self.try_serial, now);
        match progress {
            ConfirmationProgress::Ignored | ConfirmationProgress::Wait => DetectorStep::default(),
            ConfirmationProgress::Again(next) => DetectorStep::probe(next),
            ConfirmationProgress::Answered(took) => {
                self.reach.answered(took);
                self.end_round(now);
                self.answered(now)
            }
            ConfirmationProgress::Failed(evidence) => {
                self.reach.failed();
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

    /// The pool's own probe, of the kind that confirms, was answered after so
    /// long: later tries get as much time. It clears no suspicion.
    pub fn note_connect_success(&mut self, took: Duration) {
        self.reach.answered(took);
    }

    /// A session's connect (or the pool's own probe) was refused. A crash shows
    /// here first; one probe decides, for a single reset may come from anywhere.
    pub fn note_connect_refused(&mut self, now: Instant) -> DetectorStep {
        match &self.standing {
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

    /// The sender says that it stops: out at once, in good order, and without
    /// a hold-down for when it comes back.
    pub fn stopping(&mut self, now: Instant) -> DetectorStep {
        self.round = None;
        self.next_round = None;
        if matches!(self.standing, DetectorPhase::Down) {
            return DetectorStep::default();
        }
        self.was_down = true;
        self.hold_until = None;
        self.flaps.time_left(now);
        self.change(DetectorState::Down, "the sender reported stopping".to_owned(), now)
    }

    /// The guards allow what [`DetectorRequest::Eject`] asked for: it is down.
    pub fn eject(&mut self, now: Instant) -> DetectorStep {
        let DetectorPhase::Suspect(suspicion) = &self.standing else {
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

    /// The guards do not: it stays suspect and is probed every
    /// [`DOUBT_INTERVAL`], each failure asking again. True if that is news.
    pub fn hold_in_rotation(&mut self, reason: String) -> bool {
        let DetectorPhase::Suspect(suspicion) = &mut self.standing else { return false };
        if suspicion.confirmed.is_none() {
            return false;
        }
        let news = suspicion.held.as_ref() != Some(&reason);
        suspicion.held = Some(reason);
        news
    }

    /// The guards may have changed their mind: asks again for what was held
    /// back. Who has been suspect for a while is asked anew first: the path may be
    /// back, and so may the backend.
    pub fn reconsider(&mut self, now: Instant) -> DetectorStep {
        let DetectorPhase::Suspect(Suspicion { confirmed: Some(confirmed), .. }) = &self.standing
        else {
            return DetectorStep::default();
        };
        let stale = now.saturating_duration_since(self.since) > CONFIRMED_FOR;
        match (confirmed.proven || !stale, &self.round) {
            (true, _) => DetectorStep {
                change: None,
                ask: Some(DetectorRequest::Eject { proven: confirmed.proven }),
            },
            (false, Some(_)) => DetectorStep::default(),
            (false, None) => self.start_round(now),
        }
    }

    /// We were deaf or late for so long by `now`, for whatever reason: that much
    /// silence does not count, gaps and delays until then teach nothing, and a
    /// probe of that time is made again.
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

    /// Its state.
    pub fn state(&self) -> DetectorState {
        match self.standing {
            DetectorPhase::Waiting => DetectorState::Waiting,
            DetectorPhase::Up => DetectorState::Up,
            DetectorPhase::Suspect(_) => DetectorState::Suspect,
            DetectorPhase::Down => DetectorState::Down,
            DetectorPhase::Recovering { .. } => DetectorState::Recovering,
        }
    }

    /// Since when.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Whether it recovers from a failure or stop, not from never having been
    /// heard.
    pub fn was_down(&self) -> bool {
        self.was_down
    }

    /// What is left of its weight, in percent; `None`: no opinion, for it has
    /// never been up.
    pub fn weight_percent(&self) -> Option<u32> {
        match self.standing {
            DetectorPhase::Up => Some(100),
            DetectorPhase::Suspect(_) => Some(SUSPECT_WEIGHT_PERCENT),
            DetectorPhase::Down => Some(0),
            DetectorPhase::Recovering { .. } if self.was_down => Some(0),
            DetectorPhase::Waiting | DetectorPhase::Recovering { .. } => None,
        }
    }

    /// The interval as declared.
    pub fn interval(&self) -> Duration {
        self.arrivals.interval()
    }

    /// Whether more heartbeats are missing than may be.
    pub fn overdue(&self, now: Instant) -> bool {
        self.arrivals.deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Whether a probe was answered of late: its path works, and so does it.
    pub fn answers(&self, now: Instant) -> bool {
        let late = DOUBT_INTERVAL + DOUBT_INTERVAL / 2;
        self.answered_at.is_some_and(|at| now.saturating_duration_since(at) < late)
    }

    /// Whether it was heard an interval or more after `since`, or answered a
    /// probe after it: nothing that was under way by then.
    pub fn heard_since(&self, since: Instant) -> bool {
        let beaten = self.arrivals.newest_at().is_some_and(|at| at >= since + self.interval());
        beaten || self.answered_at.is_some_and(|at| at > since)
    }

    fn suspect(&mut self, cause: SuspicionCause, evidence: String, now: Instant) -> DetectorStep {
        self.suspicions_total += 1;
        let reason = evidence.clone();
        let step = self.change(DetectorState::Suspect, reason, now);
        self.standing =
            DetectorPhase::Suspect(Suspicion { cause, evidence, confirmed: None, held: None });
        // One that asks about the same silence already goes on.
        let ask = if self.round.is_none() { self.start_round(now).ask } else { None };
        DetectorStep { ask, ..step }
    }

    /// A round ended well.
    fn answered(&mut self, now: Instant) -> DetectorStep {
        self.answered_at = Some(now);
        let overdue = self.overdue(now);
        match &mut self.standing {
            DetectorPhase::Suspect(suspicion)
                if suspicion.cause == SuspicionCause::Service && !overdue =>
            {
                self.change(DetectorState::Up, "confirmation probe succeeded".to_owned(), now)
            }
            DetectorPhase::Suspect(suspicion) => {
                // Silent but answering, whatever it began with.
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

    /// A round ended badly.
    fn confirmed(&mut self, confirmed: Confirmed, now: Instant) -> DetectorStep {
        let proven = confirmed.proven;
        match &mut self.standing {
            DetectorPhase::Up => {
                // The channel is silent, and so is the service.
                let evidence = self.overdue_reason(now);
                let next_round = self.next_round;
                let step = self.suspect(SuspicionCause::Silent, evidence, now);
                self.round = None;
                self.next_round = next_round;
                if let DetectorPhase::Suspect(suspicion) = &mut self.standing {
                    suspicion.confirmed = Some(confirmed);
                }
                DetectorStep { ask: Some(DetectorRequest::Eject { proven }), ..step }
            }
            DetectorPhase::Suspect(suspicion) => {
                suspicion.confirmed = Some(confirmed);
                DetectorStep { change: None, ask: Some(DetectorRequest::Eject { proven }) }
            }
            DetectorPhase::Recovering { beats } => {
                *beats = 0;
                DetectorStep::default()
            }
            DetectorPhase::Waiting | DetectorPhase::Down => DetectorStep::default(),
        }
    }

    fn try_recovery(&mut self, now: Instant) -> DetectorStep {
        let DetectorPhase::Recovering { beats } = self.standing else {
            return DetectorStep::default();
        };
        let held = self.hold_until.is_some_and(|until| now < until);
        if self.round.is_some() || held || beats < self.beats_needed() {
            return DetectorStep::default();
        }
        self.start_round_if_due(now)
    }

    /// The first time, one is enough: there is nothing to distrust it for.
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
        let (round, first) =
            Confirmation::start((self.tries(), self.reach.timeout()), &mut self.try_serial, now);
        self.round = Some(round);
        self.next_round = None;
        DetectorStep::probe(first)
    }

    fn end_round(&mut self, now: Instant) {
        self.round = None;
        self.next_round = Some(now + DOUBT_INTERVAL);
    }

    fn tries(&self) -> u32 {
        if self.arrivals.loss() <= TRIES_MORE_ABOVE {
            return TRIES;
        }
        let within = self.arrivals.interval().mul_f64(CONFIRMED_WITHIN);
        let left = within.saturating_sub(self.arrivals.timeout());
        let fit = left.as_nanos() / self.reach.timeout().as_nanos();
        u32::try_from(fit).unwrap_or(TRIES_MAX).clamp(TRIES, TRIES_MAX)
    }

    fn change(&mut self, to: DetectorState, reason: String, now: Instant) -> DetectorStep {
        let from = self.state();
        let lasted = now.saturating_duration_since(self.since);
        let after_down =
            to == DetectorState::Up && from == DetectorState::Recovering && self.was_down;
        self.since = now;
        self.standing = match to {
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
            ask: None,
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
        DetectorStep { change: None, ask: Some(DetectorRequest::Probe(next)) }
    }
}

fn millis(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}
