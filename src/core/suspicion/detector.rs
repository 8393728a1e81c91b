//! One backend's state machine over its heartbeats and confirming probes.
//!
//! The controller owns one for each backend of a pool with heartbeats, gives it
//! whatever happens and performs the [`Step`]s it returns. It never reads a
//! clock, makes no probe itself, and knows nothing of other backends: taking
//! one out is asked for, and granted by `guards`.

mod saved;

pub use saved::SavedDetector;

use super::{
    Answer, Arrival, Arrivals, Ask, Beat, Change, Channel, DOUBT_INTERVAL, RECOVERY_BEATS, Reading,
    SUSPECT_WEIGHT_PERCENT, State, Step, Try, TryId, phi,
};
use crate::suspicion::answer_time::Reach;
use crate::suspicion::confirmation::{Progress, Round};
use crate::suspicion::flap_damping::Flaps;
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
    reach: Reach,
    standing: Standing,
    since: Instant,
    /// The probing under way.
    round: Option<Round>,
    /// When the next round may begin.
    next_round: Option<Instant>,
    try_serial: u64,
    /// It comes back after a failure, not for the first time.
    was_down: bool,
    /// It stays out until then, however well it does.
    hold_until: Option<Instant>,
    flaps: Flaps,
    /// When a probe was answered last.
    answered_at: Option<Instant>,
    suspicions_total: u64,
    downs_total: u64,
}

#[derive(Debug, Clone)]
enum Standing {
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
    cause: Cause,
    /// The evidence that began it.
    evidence: String,
    confirmed: Option<Confirmed>,
    held: Option<String>,
}

/// What began a suspicion decides what clears it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
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
            reach: Reach::default(),
            standing: Standing::Waiting,
            since: now,
            round: None,
            next_round: None,
            try_serial: 0,
            was_down: false,
            hold_until: None,
            flaps: Flaps::default(),
            answered_at: None,
            suspicions_total: 0,
            downs_total: 0,
        }
    }

    /// A heartbeat of a sender that serves (or means to) came. For one that
    /// stops, call [`HeartbeatDetector::stopping`] instead.
    ///
    /// `Arrival` says whether it counted: an old one says nothing about now.
    pub fn beat(&mut self, beat: &Beat, now: Instant) -> (Arrival, Step) {
        let silence = self.silence(now);
        let ends_outage = match &self.standing {
            Standing::Down => true,
            Standing::Suspect(suspicion) => suspicion.confirmed.is_some(),
            Standing::Waiting | Standing::Up | Standing::Recovering { .. } => false,
        };
        let arrival = self.arrivals.beat(beat, ends_outage, now);
        if arrival == Arrival::Old {
            return (arrival, Step::default());
        }
        let step = match &mut self.standing {
            Standing::Up => {
                // A probe that was to tell whether silence means anything.
                self.round = None;
                self.next_round = None;
                Step::default()
            }
            Standing::Suspect(suspicion) => match (suspicion.cause, &suspicion.confirmed) {
                (Cause::Service, _) => Step::default(),
                (Cause::Silent, None) => {
                    let silence = millis(silence.unwrap_or_default());
                    self.change(State::Up, format!("heartbeat after {silence} of silence"), now)
                }
                (Cause::Silent, Some(_)) => {
                    // Silent, not answering, held back, and now it is heard.
                    suspicion.cause = Cause::Service;
                    suspicion.confirmed = None;
                    suspicion.held = None;
                    self.start_round(now)
                }
            },
            Standing::Waiting | Standing::Down => {
                let first = matches!(self.standing, Standing::Waiting);
                let reason = if first { "first heartbeat" } else { "heartbeats again" };
                let step = self.change(State::Recovering, reason.to_owned(), now);
                Step { ask: self.try_recovery(now).ask, ..step }
            }
            Standing::Recovering { beats } => {
                *beats = beats.saturating_add(1);
                self.try_recovery(now)
            }
        };
        (arrival, step)
    }

    /// Does what has come due; to be called at [`HeartbeatDetector::due`].
    /// Calling it at any other time does no harm.
    pub fn check(&mut self, channel: Channel, now: Instant) -> Step {
        let overdue = self.overdue(now);
        if overdue && matches!(self.standing, Standing::Recovering { .. }) {
            self.round = None;
            self.next_round = None;
            let reason = format!("{} while it recovered", self.overdue_words(now));
            return self.change(State::Down, reason, now);
        }
        if let Some(round) = &mut self.round
            && let Some(again) = round.check(&mut self.try_serial, now)
        {
            return Step::probe(again);
        }
        match &self.standing {
            Standing::Waiting | Standing::Down => Step::default(),
            Standing::Up if !overdue => Step::default(),
            Standing::Up if channel == Channel::Silent => self.start_round_if_due(now),
            Standing::Up => {
                let evidence = self.overdue_words(now);
                self.suspect(Cause::Silent, evidence, now)
            }
            Standing::Suspect(_) => self.start_round_if_due(now),
            Standing::Recovering { .. } => self.try_recovery(now),
        }
    }

    /// When [`HeartbeatDetector::check`] is wanted next; later than the `now`
    /// of the last check. `None`: only a heartbeat changes anything.
    pub fn due(&self) -> Option<Instant> {
        if let Some(round) = &self.round {
            let silent = match self.standing {
                Standing::Recovering { .. } => self.arrivals.deadline(),
                _ => None,
            };
            return Some(silent.map_or(round.due(), |at| at.min(round.due())));
        }
        let deadline = self.arrivals.deadline();
        match &self.standing {
            Standing::Waiting | Standing::Down => None,
            Standing::Up => deadline.max(self.next_round),
            Standing::Suspect(_) => self.next_round,
            Standing::Recovering { beats } => {
                let ready = *beats >= self.beats_needed();
                let probe = self.next_round.max(self.hold_until).filter(|_| ready);
                probe.map_or(deadline, |at| deadline.map(|deadline| deadline.min(at)))
            }
        }
    }

    /// A try ended. What nobody waits for any more is ignored.
    pub fn probed(&mut self, id: TryId, answer: Answer, now: Instant) -> Step {
        let Some(round) = &mut self.round else { return Step::default() };
        let progress = round.answer(id, answer, &mut self.try_serial, now);
        match progress {
            Progress::Ignored | Progress::Wait => Step::default(),
            Progress::Again(next) => Step::probe(next),
            Progress::Answered(took) => {
                self.reach.answered(took);
                self.end_round(now);
                self.answered(now)
            }
            Progress::Failed(evidence) => {
                self.reach.failed();
                self.end_round(now);
                self.confirmed(Confirmed { evidence, proven: false }, now)
            }
            Progress::Refused => {
                self.end_round(now);
                let evidence = "a confirming probe was refused".to_owned();
                self.confirmed(Confirmed { evidence, proven: true }, now)
            }
        }
    }

    /// The pool's own probe, of the kind that confirms, was answered after so
    /// long: later tries get as much time. It clears no suspicion.
    pub fn reached(&mut self, took: Duration) {
        self.reach.answered(took);
    }

    /// A session's connect (or the pool's own probe) was refused. A crash shows
    /// here first; one probe decides, for a single reset may come from anywhere.
    pub fn refused(&mut self, now: Instant) -> Step {
        match &self.standing {
            Standing::Up => self.suspect(Cause::Service, "a connect was refused".to_owned(), now),
            Standing::Suspect(suspicion) if suspicion.confirmed.is_none() => {
                if self.round.is_some() { Step::default() } else { self.start_round(now) }
            }
            _ => Step::default(),
        }
    }

    /// The sender says that it stops: out at once, in good order, and without
    /// a hold-down for when it comes back.
    pub fn stopping(&mut self, now: Instant) -> Step {
        self.round = None;
        self.next_round = None;
        if matches!(self.standing, Standing::Down) {
            return Step::default();
        }
        self.was_down = true;
        self.hold_until = None;
        self.flaps.left(now);
        self.change(State::Down, "its sender says it is stopping".to_owned(), now)
    }

    /// The guards allow what [`Ask::Eject`] asked for: it is down.
    pub fn eject(&mut self, now: Instant) -> Step {
        let Standing::Suspect(suspicion) = &self.standing else { return Step::default() };
        let Some(confirmed) = &suspicion.confirmed else { return Step::default() };
        let reason = format!("{}; {}", suspicion.evidence, confirmed.evidence);
        self.was_down = true;
        self.downs_total += 1;
        self.hold_until = Some(self.flaps.down(now));
        self.round = None;
        self.next_round = None;
        self.change(State::Down, reason, now)
    }

    /// The guards do not: it stays suspect and is probed every
    /// [`DOUBT_INTERVAL`], each failure asking again. True if that is news.
    pub fn hold(&mut self, reason: String) -> bool {
        let Standing::Suspect(suspicion) = &mut self.standing else { return false };
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
    pub fn reconsider(&mut self, now: Instant) -> Step {
        let Standing::Suspect(Suspicion { confirmed: Some(confirmed), .. }) = &self.standing else {
            return Step::default();
        };
        let stale = now.saturating_duration_since(self.since) > CONFIRMED_FOR;
        match (confirmed.proven || !stale, &self.round) {
            (true, _) => Step { change: None, ask: Some(Ask::Eject { proven: confirmed.proven }) },
            (false, Some(_)) => Step::default(),
            (false, None) => self.start_round(now),
        }
    }

    /// We were deaf or late for so long by `now`, for whatever reason: that much
    /// silence does not count, gaps and delays until then teach nothing, and a
    /// probe of that time is made again.
    pub fn excuse(&mut self, lost: Duration, now: Instant) -> Step {
        self.arrivals.excuse(lost, now);
        match &mut self.round {
            Some(round) => {
                let again = round.repeat(lost, &mut self.try_serial, now);
                again.map_or_else(Step::default, Step::probe)
            }
            None => Step::default(),
        }
    }

    /// Its state.
    pub fn state(&self) -> State {
        match self.standing {
            Standing::Waiting => State::Waiting,
            Standing::Up => State::Up,
            Standing::Suspect(_) => State::Suspect,
            Standing::Down => State::Down,
            Standing::Recovering { .. } => State::Recovering,
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
            Standing::Up => Some(100),
            Standing::Suspect(_) => Some(SUSPECT_WEIGHT_PERCENT),
            Standing::Down => Some(0),
            Standing::Recovering { .. } if self.was_down => Some(0),
            Standing::Waiting | Standing::Recovering { .. } => None,
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

    /// Everything, for people.
    pub fn reading(&self, now: Instant) -> Reading {
        let arrivals = &self.arrivals;
        let silence = self.silence(now);
        let mean = arrivals.mean_interval();
        let deviation = arrivals.jitter().max(mean.mul_f64(PHI_DEVIATION_MIN));
        let held = match &self.standing {
            Standing::Suspect(suspicion) => suspicion.held.clone(),
            _ => None,
        };
        Reading {
            state: self.state(),
            since: self.since,
            incarnation: arrivals.newest().map(|(incarnation, _)| incarnation),
            sequence: arrivals.newest().map(|(_, sequence)| sequence),
            beats_total: arrivals.beats_total(),
            lost_total: arrivals.lost_total(),
            suspicions_total: self.suspicions_total,
            downs_total: self.downs_total,
            loss: arrivals.loss(),
            loss_after_loss: arrivals.loss_after_loss(),
            jitter: arrivals.jitter(),
            interval: arrivals.interval(),
            mean_interval: mean,
            missing_allowed: arrivals.missing_allowed(),
            timeout: arrivals.timeout(),
            try_timeout: self.reach.timeout(),
            silence,
            phi_normal: silence.map_or(0.0, |silence| phi::normal(silence, mean, deviation)),
            phi_exponential: silence.map_or(0.0, |silence| phi::exponential(silence, mean)),
            flaps: self.flaps.count(),
            hold_until: self.hold_until.filter(|until| *until > now),
            held,
        }
    }

    fn suspect(&mut self, cause: Cause, evidence: String, now: Instant) -> Step {
        self.suspicions_total += 1;
        let reason = evidence.clone();
        let step = self.change(State::Suspect, reason, now);
        self.standing =
            Standing::Suspect(Suspicion { cause, evidence, confirmed: None, held: None });
        // One that asks about the same silence already goes on.
        let ask = if self.round.is_none() { self.start_round(now).ask } else { None };
        Step { ask, ..step }
    }

    /// A round ended well.
    fn answered(&mut self, now: Instant) -> Step {
        self.answered_at = Some(now);
        let overdue = self.overdue(now);
        match &mut self.standing {
            Standing::Suspect(suspicion) if suspicion.cause == Cause::Service && !overdue => {
                self.change(State::Up, "a confirming probe was answered".to_owned(), now)
            }
            Standing::Suspect(suspicion) => {
                // Silent but answering, whatever it began with.
                suspicion.cause = Cause::Silent;
                suspicion.confirmed = None;
                suspicion.held = None;
                Step::default()
            }
            Standing::Recovering { beats } => {
                let reason = if self.was_down {
                    format!("{beats} heartbeats, and a probe was answered")
                } else {
                    "heartbeats, and a probe was answered".to_owned()
                };
                self.change(State::Up, reason, now)
            }
            Standing::Waiting | Standing::Up | Standing::Down => Step::default(),
        }
    }

    /// A round ended badly.
    fn confirmed(&mut self, confirmed: Confirmed, now: Instant) -> Step {
        let proven = confirmed.proven;
        match &mut self.standing {
            Standing::Up => {
                // The channel is silent, and so is the service.
                let evidence = self.overdue_words(now);
                let next_round = self.next_round;
                let step = self.suspect(Cause::Silent, evidence, now);
                self.round = None;
                self.next_round = next_round;
                if let Standing::Suspect(suspicion) = &mut self.standing {
                    suspicion.confirmed = Some(confirmed);
                }
                Step { ask: Some(Ask::Eject { proven }), ..step }
            }
            Standing::Suspect(suspicion) => {
                suspicion.confirmed = Some(confirmed);
                Step { change: None, ask: Some(Ask::Eject { proven }) }
            }
            Standing::Recovering { beats } => {
                *beats = 0;
                Step::default()
            }
            Standing::Waiting | Standing::Down => Step::default(),
        }
    }

    fn try_recovery(&mut self, now: Instant) -> Step {
        let Standing::Recovering { beats } = self.standing else { return Step::default() };
        let held = self.hold_until.is_some_and(|until| now < until);
        if self.round.is_some() || held || beats < self.beats_needed() {
            return Step::default();
        }
        self.start_round_if_due(now)
    }

    /// The first time, one is enough: there is nothing to distrust it for.
    fn beats_needed(&self) -> u32 {
        if self.was_down { RECOVERY_BEATS } else { 1 }
    }

    fn start_round_if_due(&mut self, now: Instant) -> Step {
        if self.round.is_some() || self.next_round.is_some_and(|at| now < at) {
            return Step::default();
        }
        self.start_round(now)
    }

    fn start_round(&mut self, now: Instant) -> Step {
        let (round, first) =
            Round::start((self.tries(), self.reach.timeout()), &mut self.try_serial, now);
        self.round = Some(round);
        self.next_round = None;
        Step::probe(first)
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

    fn change(&mut self, to: State, reason: String, now: Instant) -> Step {
        let from = self.state();
        let lasted = now.saturating_duration_since(self.since);
        let after_down = to == State::Up && from == State::Recovering && self.was_down;
        self.since = now;
        self.standing = match to {
            State::Waiting => Standing::Waiting,
            State::Up => Standing::Up,
            State::Suspect => Standing::Suspect(Suspicion {
                cause: Cause::Silent,
                evidence: String::new(),
                confirmed: None,
                held: None,
            }),
            State::Down => Standing::Down,
            State::Recovering => Standing::Recovering { beats: 1 },
        };
        if to == State::Up {
            self.round = None;
            self.next_round = None;
            self.hold_until = None;
            if from == State::Recovering {
                self.flaps.up(now);
            }
        }
        Step { change: Some(Change { from, to, reason, lasted, after_down }), ask: None }
    }

    fn silence(&self, now: Instant) -> Option<Duration> {
        self.arrivals.newest_at().map(|at| now.saturating_duration_since(at))
    }

    fn overdue_words(&self, now: Instant) -> String {
        format!(
            "no heartbeat for {}, {} may be missing at {:.1}% loss",
            millis(self.silence(now).unwrap_or_default()),
            self.arrivals.missing_allowed(),
            self.arrivals.loss() * 100.0
        )
    }
}

// === impl Step ===

impl Step {
    fn probe(next: Try) -> Step {
        Step { change: None, ask: Some(Ask::Probe(next)) }
    }
}

fn millis(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}
