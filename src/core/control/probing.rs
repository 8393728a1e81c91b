//! Schedule of the probes.
//!
//! Called by the controller for due probes and for missing results. A backend has at most
//! one probe in flight. The next probe is scheduled when the last one has ended or is
//! treated as lost. This module evaluates no result.

use super::backends::ProbeInFlight;
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use super::{ControlEffect, ProbeLane, ProbeToken};
use crate::health::Observation;
use crate::model::ProbeSpec;
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A result that is this much later than its timeout is treated as lost. Thousands of
/// probes can wait for a slot for that long.
pub(super) const PROBE_LOST_MARGIN: Duration = Duration::from_secs(5);

/// First probes are spread over the interval, but at most over this time, because backends
/// wait for them.
pub(super) const FIRST_PROBES_SPREAD_MAX: Duration = Duration::from_secs(1);

/// Longest time between two first probes, so that a small pool gets its results at once.
pub(super) const FIRST_PROBES_SPACING_MAX: Duration = Duration::from_millis(1);

/// Shortest time between two notices about probes that a local error prevented. Such errors
/// affect thousands of probes.
const LOCAL_ERROR_NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// Jitter: each wait is up to `1 / JITTER_PARTS` shorter or longer than configured, so that
/// probes of many backends and balancers do not synchronise.
const JITTER_PARTS: u32 = 10;

/// Which interval of [`ProbeSpec`] applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProbePace {
    /// `fast_interval`: during a row, and before the first result.
    Fast,
    /// `interval`.
    Settled,
    /// `down_interval`.
    Down,
}

/// State shared by the probes of all backends.
#[derive(Debug)]
pub(super) struct ProbeLog {
    rng: fastrand::Rng,
    last_token: u64,
    local_error_noticed: Option<Instant>,
}

// === impl ProbeLog ===

impl ProbeLog {
    /// `seed` is the seed of the jitter.
    pub(super) fn new(seed: u64) -> ProbeLog {
        let rng = fastrand::Rng::with_seed(seed);
        ProbeLog { rng, last_token: 0, local_error_noticed: None }
    }

    /// Returns the token of the next probe.
    pub(super) fn next_token(&mut self) -> ProbeToken {
        self.last_token += 1;
        ProbeToken(self.last_token)
    }

    /// Whether a notice about a local error is due.
    pub(super) fn local_error_is_due(&mut self, now: Instant) -> bool {
        let quiet = |at: Instant| now.saturating_duration_since(at) < LOCAL_ERROR_NOTICE_INTERVAL;
        let is_due = !self.local_error_noticed.is_some_and(quiet);
        if is_due {
            self.local_error_noticed = Some(now);
        }
        is_due
    }
}

// === impl ControlState ===

impl ControlState {
    /// Requests the due probe of a backend.
    pub(super) fn start_probe(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.probe.as_ref().filter(|_| pool.spec.of.is_none()) else {
            return;
        };
        debug_assert!(entry.in_flight.is_none(), "a backend's probes never overlap");
        match entry.confirmation {
            // A confirmation probe is running; a backend has one probe at a time.
            Some(confirmation) if confirmation.lost_at > now => {
                self.schedule
                    .set(TimerKind::Probe(id), after(now, spec.timeout).min(confirmation.lost_at));
                return;
            }
            _ => entry.confirmation = None,
        }
        let token = self.probes.next_token();
        let lost_at = after(now, spec.timeout) + PROBE_LOST_MARGIN;
        entry.in_flight = Some(ProbeInFlight { token, started: now, lost_at, stale: false });
        self.schedule.set(TimerKind::ProbeLost(id), lost_at);
        let urgent = entry.health.detector.as_ref().is_some_and(|detector| {
            detector.changing() || detector.observation() == Observation::Unknown
        });
        self.pending.effects.push(ControlEffect::Probe {
            lane: ProbeLane { pool: pool.id.0, urgent },
            backend: id,
            token,
            names: entry.state.names(),
            address: entry.state.address.clone(),
            spec: Arc::clone(spec),
        });
    }

    /// Treats a probe as lost and schedules another one.
    pub(super) fn probe_lost(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        if entry.in_flight.take().is_some() {
            self.schedule.set(TimerKind::Probe(id), now);
        }
    }

    /// Schedules the first probe of a new or restored backend, or of one with new probe
    /// settings. It is number `index` of `count` that a reload starts together.
    pub(super) fn start_probing(
        &mut self,
        id: BackendId,
        (index, count): (u32, u32),
        now: Instant,
    ) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = pool.spec.probe.as_ref().filter(|_| pool.spec.of.is_none()) else {
            return;
        };
        if let Some(probe) = &mut entry.in_flight {
            // A probe is still running; its end starts the schedule.
            probe.stale = true;
            self.schedule.set(TimerKind::ProbeLost(id), probe.lost_at.max(now));
            return;
        }
        let spread = spec.interval.min(FIRST_PROBES_SPREAD_MAX);
        let spacing = (spread / count.max(1)).min(FIRST_PROBES_SPACING_MAX);
        self.schedule.set(TimerKind::Probe(id), now + spacing * index);
    }

    /// Schedules the probe after one that ended.
    pub(super) fn schedule_next_probe(&mut self, id: BackendId, started: Instant, now: Instant) {
        let Some((spec, pace)) = self.probe_pace(id) else { return };
        let wait = match pace {
            ProbePace::Fast => spec.fast_interval,
            ProbePace::Settled => spec.interval,
            ProbePace::Down => spec.down_interval,
        };
        let jitter = wait / JITTER_PARTS;
        let wait =
            (wait - jitter).saturating_add(jitter.saturating_mul(2).mul_f64(self.probes.rng.f64()));
        self.schedule.set(TimerKind::Probe(id), after(started, wait).max(now));
    }

    /// Brings the next probe forward after a failed connect of a session.
    pub(super) fn bring_probe_forward(&mut self, id: BackendId, now: Instant) {
        if let Some((spec, ProbePace::Fast)) = self.probe_pace(id) {
            self.schedule.bring_forward(TimerKind::Probe(id), after(now, spec.fast_interval));
        }
    }

    /// Brings the next probe forward because sessions of another pool cannot connect.
    pub(super) fn hasten_probe(&mut self, id: BackendId, now: Instant) {
        if let Some((spec, _)) = self.probe_pace(id) {
            self.schedule.bring_forward(TimerKind::Probe(id), after(now, spec.fast_interval));
        }
    }

    /// Returns the probe settings, and which interval applies.
    fn probe_pace(&self, id: BackendId) -> Option<(Arc<ProbeSpec>, ProbePace)> {
        let entry = self.backends.get(id)?;
        let pool = self.pool(entry.pool)?;
        let spec = pool.spec.probe.as_ref()?;
        let detector = entry.health.detector.as_ref()?;
        let pace = match detector.observation() {
            _ if detector.changing() => ProbePace::Fast,
            Observation::Unknown => ProbePace::Fast,
            Observation::Down => ProbePace::Down,
            _ if self.seeks_role(pool) => ProbePace::Fast,
            Observation::Up | Observation::Suspect => ProbePace::Settled,
        };
        Some((Arc::clone(spec), pace))
    }
}
