//! When probes run.
//!
//! The controller calls it for due probes and for results that stay out. A
//! backend never has two probes in flight: the next one is scheduled when the
//! one before is over, or given up as lost. It never judges a result.

use super::backends::ProbeInFlight;
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use super::{ControlEffect, ProbeLane, ProbeToken};
use crate::health::Observation;
use crate::model::ProbeSpec;
use crate::table::state::BackendId;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A result this long after its deadline is not coming: the shell lost it.
/// Long enough for thousands of probes that wait for their turn to run.
pub(super) const PROBE_LOST_MARGIN: Duration = Duration::from_secs(5);

/// First probes are spread over the interval, but not over more than this:
/// backends wait for them.
pub(super) const FIRST_PROBES_SPREAD_MAX: Duration = Duration::from_secs(1);

/// First probes come no further apart than this: a small pool is known at once.
pub(super) const FIRST_PROBES_SPACING_MAX: Duration = Duration::from_millis(1);

/// Probes that could not be run because this host lacks something are mentioned this
/// often: they come by the thousand.
const LOCAL_ERROR_NOTICE_INTERVAL: Duration = Duration::from_secs(60);

/// Each wait is up to one such part shorter or longer than configured, so that
/// probes of many backends (and of many balancers) do not march in step.
const JITTER_PARTS: u32 = 10;

/// What all backends' probes have in common.
#[derive(Debug)]
pub(super) struct ProbeLog {
    rng: fastrand::Rng,
    last_token: u64,
    local_error_noticed: Option<Instant>,
}

// === impl ProbeLog ===

impl ProbeLog {
    /// `seed` drives the jitter.
    pub(super) fn new(seed: u64) -> ProbeLog {
        let rng = fastrand::Rng::with_seed(seed);
        ProbeLog { rng, last_token: 0, local_error_noticed: None }
    }

    /// Names the next probe.
    pub(super) fn next_token(&mut self) -> ProbeToken {
        self.last_token += 1;
        ProbeToken(self.last_token)
    }

    /// Whether a local error is to be mentioned now.
    pub(super) fn mentions_local_error(&mut self, now: Instant) -> bool {
        let quiet = |at: Instant| now.saturating_duration_since(at) < LOCAL_ERROR_NOTICE_INTERVAL;
        let mentions = !self.local_error_noticed.is_some_and(quiet);
        if mentions {
            self.local_error_noticed = Some(now);
        }
        mentions
    }
}

// === impl ControlState ===

impl ControlState {
    /// Asks for a probe of a backend whose time has come.
    pub(super) fn start_probe(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = &pool.spec.probe else { return };
        debug_assert!(entry.in_flight.is_none(), "a backend's probes never overlap");
        match entry.confirmation {
            // A suspicion is being confirmed; the shell runs one probe at a time.
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
            address: entry.state.address.clone(),
            spec: Arc::clone(spec),
        });
    }

    /// No result came: nothing is known, so probe again.
    pub(super) fn probe_lost(&mut self, id: BackendId, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        if entry.in_flight.take().is_some() {
            self.schedule.set(TimerKind::Probe(id), now);
        }
    }

    /// Schedules the probes of new, returned or newly specified backends: the
    /// `index`-th of `count` that a reload starts together.
    pub(super) fn start_probing(
        &mut self,
        id: BackendId,
        (index, count): (u32, u32),
        now: Instant,
    ) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let Some(spec) = &pool.spec.probe else { return };
        if let Some(probe) = &mut entry.in_flight {
            // It is still out there; its end will start the schedule.
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
        let Some((spec, fast)) = self.probe_pace(id) else { return };
        let wait = if fast { spec.fast_interval } else { spec.interval };
        let jitter = wait / JITTER_PARTS;
        let wait =
            (wait - jitter).saturating_add(jitter.saturating_mul(2).mul_f64(self.probes.rng.f64()));
        self.schedule.set(TimerKind::Probe(id), after(started, wait).max(now));
    }

    /// A session's connect failed: the next probe comes soon.
    pub(super) fn bring_probe_forward(&mut self, id: BackendId, now: Instant) {
        if let Some((spec, true)) = self.probe_pace(id) {
            self.schedule.bring_forward(TimerKind::Probe(id), after(now, spec.fast_interval));
        }
    }

    /// The backend's spec, and whether `fast_interval` applies: while a row is
    /// counted, and while there is no result to go by.
    fn probe_pace(&self, id: BackendId) -> Option<(Arc<ProbeSpec>, bool)> {
        let entry = self.backends.get(id)?;
        let spec = self.pool(entry.pool)?.spec.probe.as_ref()?;
        let detector = entry.health.detector.as_ref()?;
        let fast = detector.changing() || detector.observation() == Observation::Unknown;
        Some((Arc::clone(spec), fast))
    }
}
