//! Data for `tidegate explain`: the complete state of one backend.
//!
//! Called by `daemon` for the CLI and the admin API. It changes nothing.

use super::backends::BackendEntry;
use super::heartbeats::silence::max_down_percent;
use super::pools::PoolEntry;
use super::status::{
    BackendStatus, FreezeStatus, HeartbeatChannelStatus, backend_status, freezing,
    none_eligible_rule,
};
use super::{AnnouncedBy, Controller, OperatorError, Weight};
use crate::balance::trial::TrialPhase;
use crate::health::probe_detector::ProbeState;
use crate::health::recent::{RECENT, Recent};
use crate::health::{ConnectFailure, LastProbe, LastProbes, Observation, Transition};
use crate::model;
use crate::model::{HeartbeatSpec, PoolId};
use crate::suspicion::rejections::Rejection;
use crate::suspicion::{ChannelState, PathView};
use crate::table::tiers::TierRules;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One backend, explained.
#[derive(Debug, Clone)]
pub struct Explanation {
    /// Time of the explanation.
    pub now: Instant,
    /// Its pool.
    pub pool: PoolId,
    /// The backend as in `status`.
    pub backend: BackendStatus,
    /// Age of the operator's intent.
    pub intent_for: Duration,
    /// Age of the observation.
    pub observed_for: Duration,
    /// Age of the state that its heartbeats request.
    pub requested_for: Duration,
    /// Age of the wish of its registries.
    pub wish_for: Duration,
    /// What the names and registries that list it say, in order of precedence.
    pub announced: Vec<AnnouncedBy>,
    /// Weight and the factors that reduce it.
    pub weight: Weight,
    /// The effective cap; 0: none.
    pub connections_max: u32,
    /// State of its probes; `None` if the pool has none.
    pub probe: Option<ProbeView>,
    /// The newest probe that has ended in this process.
    pub last_probe: Option<LastProbe>,
    /// The last probes that have ended in this process.
    pub probes: LastProbes,
    /// Which backups of the pool serve at once.
    pub rules: TierRules,
    /// The tiers that serve, each with its share of the new sessions in per cent.
    pub tier_shares: Vec<(u8, u8)>,
    /// Time until its sessions are closed, because a lower tier has replaced it (`on_recover`).
    pub closes_in: Option<Duration>,
    /// Rule in effect while no backend of the pool is eligible, as in
    /// [`PoolStatus`](super::PoolStatus); `None` if one is eligible.
    pub none_eligible: Option<&'static str>,
    /// It gets new sessions although it is not eligible, because `try-all` is in effect.
    pub last_resort: bool,
    /// Heartbeat settings of the pool.
    pub heartbeat_spec: Option<Arc<HeartbeatSpec>>,
    /// The last rejected heartbeat with the name of the backend.
    pub rejected: Option<Rejection>,
    /// Passive ejection.
    pub ejection: EjectionView,
    /// The running slow start: its duration, and the time since it began.
    pub ramp: Option<(Duration, Duration)>,
    /// Recent failures of its sessions.
    pub failures: FailuresView,
    /// Guards that can prevent its removal.
    pub guards: GuardStatus,
    /// Newest first; at most [`TRANSITIONS_MAX`](super::TRANSITIONS_MAX).
    pub history: Vec<Transition>,
}

/// State of a backend's probes.
#[derive(Debug, Clone)]
pub struct ProbeView {
    /// Settings of the probes.
    pub spec: Arc<model::ProbeSpec>,
    /// Their observation.
    pub observation: Observation,
    /// Age of the observation.
    pub lasted: Duration,
    /// The current row.
    pub state: ProbeState,
    /// Eligible until its first result.
    pub fails_open: bool,
}

/// Passive ejection of a backend.
#[derive(Debug, Clone)]
pub struct EjectionView {
    /// `None`: off.
    pub spec: Option<model::EjectionSpec>,
    /// Rest of the current ejection.
    pub left: Option<Duration>,
    /// Ejections in a row, as of the last ejection.
    pub repeats: u32,
    /// Age of the running trial.
    pub trial: Option<Duration>,
    /// Phase of the running trial.
    pub trial_phase: TrialPhase,
}

/// Failed connects and early resets of a backend.
#[derive(Debug, Clone)]
pub struct FailuresView {
    /// `None`: no failures.
    pub recent: Option<Recent>,
    /// The period that `recent` covers, at most a minute.
    pub watched: Duration,
    /// Failures in a row.
    pub in_a_row: u32,
    /// Failed connects since the backend was configured.
    pub connects_total: u64,
}

/// The guards over a backend's pool.
#[derive(Debug, Clone)]
pub struct GuardStatus {
    /// No heartbeat arrives from any backend.
    pub channel_silent: bool,
    /// Freeze of its pool.
    pub pool_frozen: Option<FreezeStatus>,
    /// Freeze of all pools.
    pub all_frozen: Option<FreezeStatus>,
    /// The pool's backends, counted by the state of their heartbeats.
    pub view: PathView,
    /// Share of the pool that may be down at a time, in percent.
    pub max_ejected_percent: u8,
    /// The removal of the backend that a guard prevents.
    pub prevented: Option<PreventedRemoval>,
}

/// A removal that a guard prevents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreventedRemoval {
    /// The evidence against the backend, as a clause.
    pub evidence: String,
    /// The reason of the guard, as a clause.
    pub reason: String,
}

// === impl Controller ===

impl Controller {
    /// Returns the complete state of one backend.
    ///
    /// # Errors
    /// The pool or the backend does not exist.
    pub fn explain(
        &self,
        pool: &str,
        backend: &str,
        now: Instant,
    ) -> Result<Explanation, OperatorError> {
        let id = self.state.find_backend(pool, backend)?;
        let entry = self.state.backends.get(id).ok_or(OperatorError::UnknownBackend)?;
        let pool = self.state.pool(entry.pool).ok_or(OperatorError::UnknownPool)?;
        let since = |at: Instant| now.saturating_duration_since(at);
        let all: Option<HeartbeatChannelStatus> = self.heartbeat_status(now);
        let outlier = &entry.health.outlier;
        let in_a_row = match pool.spec.ejection {
            Some(_) => outlier.row(entry.state.failed_in_a_row()),
            // Without ejection, the controller measures no row.
            None => entry.state.failed_in_a_row(),
        };
        let probe = pool.spec.probe.as_ref().zip(entry.health.detector.as_ref());
        let tier_shares = self.tier_shares(pool);
        Ok(Explanation {
            now,
            pool: pool.id,
            backend: backend_status(entry, pool, &tier_shares, now),
            intent_for: since(entry.health.intent_since),
            observed_for: since(entry.observed_since),
            requested_for: since(entry.requested_since),
            wish_for: since(entry.wish_since),
            announced: self.state.views.announced(entry, now),
            weight: entry.weight(&pool.spec),
            connections_max: entry.cap(),
            probe: probe.map(|(spec, detector)| ProbeView {
                spec: Arc::clone(spec),
                observation: detector.observation(),
                lasted: since(detector.since()),
                state: detector.state(),
                fails_open: entry.health.fails_open,
            }),
            last_probe: entry.last_probe.as_deref().cloned(),
            probes: entry.probes.clone(),
            rules: TierRules::of(&pool.spec),
            tier_shares,
            closes_in: entry.released_for(pool.spec.on_recover, now),
            none_eligible: self.none_eligible(entry, pool),
            last_resort: entry.published.is_last_resort(),
            heartbeat_spec: pool.spec.heartbeat.clone(),
            rejected: self.heartbeats.rejections().of(&pool.spec.name, backend).cloned(),
            ejection: EjectionView {
                spec: pool.spec.ejection,
                left: outlier.until().map(|until| until.saturating_duration_since(now)),
                repeats: outlier.repeats(),
                trial: outlier.trial_duration(now),
                trial_phase: entry.state.in_flight.trial(),
            },
            failures: FailuresView {
                recent: entry.health.recent.view(now),
                watched: since(entry.health.since).min(RECENT),
                in_a_row,
                connects_total: entry.state.counters.sum(|c| c.connect_failures.get()),
            },
            ramp: entry.ramp.map(|ramp| (ramp.over, since(ramp.since))),
            guards: GuardStatus {
                channel_silent: self.heartbeats.channel(now) == ChannelState::Silent,
                pool_frozen: freezing(pool.guard.freeze(), now),
                all_frozen: all.and_then(|all| all.frozen),
                view: self.heartbeats.path_view(&self.state, Some(pool.id), now),
                max_ejected_percent: max_down_percent(pool),
                prevented: self.prevented_removal(entry, pool, now),
            },
            history: entry.history.newest_first().cloned().collect(),
        })
    }

    /// Returns the rule in effect if no backend of the pool is eligible.
    fn none_eligible(&self, entry: &BackendEntry, pool: &PoolEntry) -> Option<&'static str> {
        let mut members = pool.members().iter().filter_map(|id| self.state.backends.get(*id));
        let any = entry.health.eligible() || members.any(|other| other.health.eligible());
        (!any).then(|| none_eligible_rule(pool))
    }

    /// Returns the removal that a guard prevents.
    fn prevented_removal(
        &self,
        entry: &BackendEntry,
        pool: &PoolEntry,
        now: Instant,
    ) -> Option<PreventedRemoval> {
        if !entry.health.eligible() {
            return None;
        }
        let detector = entry.heartbeats.as_deref().map(|heartbeats| &heartbeats.detector);
        if let Some((evidence, reason)) = detector.and_then(|detector| detector.held_removal()) {
            let evidence = format!("probes fail ({evidence})");
            return Some(PreventedRemoval { evidence, reason });
        }
        let spec = pool.spec.ejection?;
        let row = entry.health.outlier.row(entry.state.failed_in_a_row());
        if row < spec.failures || !entry.health.outlier.is_held() {
            return None;
        }
        let reason = self.state.guard_view(pool).reason(spec.max_ejected_percent);
        let last = entry.health.recent.view(now).map(|recent| recent.last);
        let evidence = match last {
            Some(ConnectFailure::EarlyReset) | None if row == 1 => "1 session failed".to_owned(),
            Some(ConnectFailure::EarlyReset) | None => format!("{row} sessions failed in a row"),
            Some(last) if row == 1 => format!("1 connect failed: {last}"),
            Some(last) => format!("{row} connects failed in a row, last: {last}"),
        };
        Some(PreventedRemoval {
            evidence,
            reason: reason.unwrap_or_else(|| "its next failure ejects it".to_owned()),
        })
    }
}
