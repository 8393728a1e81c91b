//! The decisions of a session: one for each pick, in the rings of its worker.
//!
//! Called by the stages of `session`. It never picks by itself, except for a rehearsal at the
//! end of a fruitless wait.
//!
//! - The first decision of a session is in the ring of first picks.
//! - A first pick that failed is copied into the ring of failures, and so is a first decision
//!   without a backend. Later decisions are in that ring only.
//! - A pick inside a wait leaves no decision. The end of the wait leaves one.

use super::Session;
use super::connect::BackendSlot;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tidegate_core::balance::PickRecord;
use tidegate_core::decision::ring::{DecisionRing, RingPlace};
use tidegate_core::decision::rings::{FAILED_MAX, FIRST_MAX, WorkerDecisions};
use tidegate_core::decision::{AttemptFailureKind, Decision, Figures, Outcome, SkippedList, Why};
use tidegate_core::health::ConnectFailure;
use tidegate_core::outcome::{Phase, SessionEnd};
use tidegate_core::table::decide::{Picked, PickedFor};
use tidegate_net::clock;

/// Where the last decision of a session is, and what the access log says about it. 6 bytes,
/// to keep idle sessions small.
#[derive(Debug, Clone, Copy)]
pub(super) struct LastDecision {
    place: DecisionPlace,
    /// Members of the pool that the pick of `backend` passed over.
    skipped: u16,
    /// What decided the pick of `backend`; `Why::None` if the session never had a backend.
    why: Why,
}

/// A place in one of the two rings of a worker: the ring in the highest bit, and the place in
/// the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DecisionPlace(u16);

const _: () = assert!(FIRST_MAX <= DecisionPlace::FAILED as usize);
const _: () = assert!(FAILED_MAX < DecisionPlace::FAILED as usize);

// === impl DecisionPlace ===

impl DecisionPlace {
    const NONE: DecisionPlace = DecisionPlace(u16::MAX);
    const FAILED: u16 = 1 << 15;

    fn first(place: RingPlace) -> DecisionPlace {
        DecisionPlace(place.number() as u16)
    }

    fn failed(place: RingPlace) -> DecisionPlace {
        DecisionPlace(place.number() as u16 | DecisionPlace::FAILED)
    }

    fn is_first(self) -> bool {
        self.0 & DecisionPlace::FAILED == 0
    }

    fn of(self, rings: &WorkerDecisions) -> (&DecisionRing, RingPlace) {
        let ring = if self.is_first() { &rings.first } else { &rings.failed };
        (ring, RingPlace::new(u32::from(self.0 & !DecisionPlace::FAILED)))
    }
}

// === impl LastDecision ===

impl LastDecision {
    pub(super) const NONE: LastDecision =
        LastDecision { place: DecisionPlace::NONE, skipped: 0, why: Why::None };

    /// Name of what decided the pick of the session's backend, for the access log.
    pub(super) fn why(self) -> Option<&'static str> {
        (self.why != Why::None).then(|| self.why.name())
    }

    pub(super) fn skipped(self) -> u32 {
        self.skipped.into()
    }
}

// === impl Session ===

impl Session {
    /// Keeps the decision of a pick; `None` if it found no backend. The worker's record must
    /// still hold its notes, so no other task can have run since the pick. `now` is the time of
    /// the pick.
    pub(super) fn keep_decision(
        &mut self,
        picked: Option<Picked>,
        waited: Option<Duration>,
        now: Instant,
    ) {
        let session = self.picked_for(waited, now);
        let decision = self.pool().decision(&session, picked, &self.ctx().pick_record.borrow());
        self.push_decision(&decision);
    }

    /// Keeps the decision of a wait that has ended without a backend. The members passed over
    /// are those of a rehearsal.
    #[cold]
    pub(super) fn keep_fruitless_wait(&mut self, since: Instant) {
        let now = clock::now();
        let session = self.picked_for(Some(now - since), now);
        let decision = match self.route.pool_of(self.taken) {
            Some(pool) => {
                let key = self.ctx().pick_key(self.client, now);
                pool.decision(&session, None, &pool.rehearse(key, self.tried()).1)
            }
            None => Decision::without_pool(&session),
        };
        self.push_decision(&decision);
    }

    /// Keeps the decision of a session that ends before any pick.
    #[cold]
    fn keep_without_pick(&mut self) {
        let decision = Decision::without_pool(&self.picked_for(None, clock::now()));
        self.push_decision(&decision);
    }

    fn picked_for(&self, waited: Option<Duration>, now: Instant) -> PickedFor {
        PickedFor {
            session: self.number,
            client: self.client,
            peer: self.peer(),
            frontend: self.route.state.id,
            route: self.taken,
            serial: self.table.serial,
            attempt: self.attempts.saturating_add(1),
            waited,
            now,
            wall_micros: wall_micros(clock::wall()),
        }
    }

    fn push_decision(&mut self, decision: &Decision) {
        let rings = self.ctx().decisions();
        let place = match self.last.place == DecisionPlace::NONE {
            true => DecisionPlace::first(rings.first.push(decision)),
            false => DecisionPlace::failed(rings.failed.push(decision)),
        };
        self.last.place = place;
        // The access log describes the pick of the backend that it names.
        if decision.chosen.is_some() || self.backend.is_none() {
            self.last.why = decision.why;
            self.last.skipped = u16::try_from(decision.skipped.total()).unwrap_or(u16::MAX);
        }
    }

    fn set_outcome(&self, outcome: &Outcome) {
        let (ring, place) = self.last.place.of(self.ctx().decisions());
        // If newer decisions have replaced it, there is nothing to complete.
        ring.set_outcome(place, self.number, outcome);
    }

    /// The last decision, if newer decisions have not replaced it.
    fn last_decision(&self) -> Option<Decision> {
        let (ring, place) = self.last.place.of(self.ctx().decisions());
        ring.get(place, self.number)
    }

    /// Completes the last decision once the connection is established.
    pub(super) fn decision_connected(&self) {
        let connect_micros = self.connect_micros.map(u32::from);
        self.set_outcome(&Outcome { connect_micros, ..Outcome::default() });
    }

    /// Completes the last decision with the failure of its connect attempt.
    #[cold]
    pub(super) fn decision_failed(
        &mut self,
        slot: &BackendSlot,
        failure: AttemptFailureKind,
        errno: i32,
    ) {
        // An early reset comes after the connect.
        let known = self.last_decision();
        let outcome = known.as_ref().map_or_else(Outcome::default, |known| known.outcome);
        let took = (clock::now() - slot.since).as_micros();
        let failed_micros = u32::try_from(took).unwrap_or(u32::MAX);
        let outcome = Outcome { failure: Some((failure, errno)), failed_micros, ..outcome };
        self.set_outcome(&outcome);
        if self.last.place.is_first() {
            let copy = known.unwrap_or_else(|| self.replaced_decision(slot));
            let place = self.ctx().decisions().failed.push(&Decision { outcome, ..copy });
            self.last.place = DecisionPlace::failed(place);
        }
    }

    /// What the session still knows of its first decision, if newer ones have replaced it.
    fn replaced_decision(&self, slot: &BackendSlot) -> Decision {
        let (pool, now) = (self.pool(), clock::now());
        let begun = clock::wall().checked_sub(now - slot.since).unwrap_or(UNIX_EPOCH);
        let mut skipped = SkippedList::EMPTY;
        skipped.count_more(self.last.skipped.into());
        Decision {
            at_micros: wall_micros(begun),
            attempt: self.attempts,
            why: self.last.why,
            chosen: Some(slot.backend().id),
            tier: 0,
            spilled: false,
            figures: Figures::None,
            skipped,
            ..pool.decision(&self.picked_for(None, now), None, &PickRecord::default())
        }
    }

    /// Completes the last decision with the end of the session. Every session has a decision
    /// after that.
    pub(super) fn decision_ended(&mut self, ending: SessionEnd, now: Instant) {
        if self.last.place == DecisionPlace::NONE {
            match self.waits {
                Some(Phase::Queue) => self.keep_fruitless_wait(self.started),
                _ => self.keep_without_pick(),
            }
        }
        let lasted = (now - self.started).as_millis();
        let end = Outcome {
            connect_micros: self.connect_micros.map(u32::from),
            failure: None,
            failed_micros: 0,
            end: Some((ending.cause, ending.phase)),
            lasted_millis: u32::try_from(lasted).unwrap_or(u32::MAX),
        };
        match self.backend.is_some() && !self.has_failed_attempts() {
            true => self.set_outcome(&end),
            false => self.end_rare(end),
        }
    }

    /// The end of a session without a backend or with failed attempts.
    #[cold]
    fn end_rare(&mut self, end: Outcome) {
        let Some(known) = self.last_decision() else { return };
        let outcome = Outcome { end: end.end, lasted_millis: end.lasted_millis, ..known.outcome };
        self.set_outcome(&outcome);
        // Clients that admission rejects are too many to be kept.
        if self.backend.is_none() && self.last.place.is_first() && known.pool.is_some() {
            self.ctx().decisions().failed.push(&Decision { outcome, ..known });
        }
    }
}

/// The kind of a failure that the backend or its path caused.
pub(super) fn failure_kind(failure: ConnectFailure) -> AttemptFailureKind {
    match failure {
        ConnectFailure::Refused => AttemptFailureKind::Refused,
        ConnectFailure::Timeout => AttemptFailureKind::Timeout,
        ConnectFailure::Unreachable => AttemptFailureKind::Unreachable,
        ConnectFailure::EarlyReset => AttemptFailureKind::EarlyReset,
        ConnectFailure::Other(_) => AttemptFailureKind::Other,
    }
}

fn wall_micros(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
