//! Why one backend gets what it gets: everything known of it, in one value.
//!
//! Called by `daemon` for `tidegate explain` and the admin API. It derives, it
//! never changes anything.

use super::heartbeats::silence::max_down_percent;
use super::status::{
    BackendStatus, FreezeStatus, HeartbeatChannelStatus, backend_status, freezing,
};
use super::{Controller, OperatorError, Weight};
use crate::health::probe_detector::ProbeState;
use crate::health::recent::{RECENT, Recent};
use crate::health::{Observation, Transition};
use crate::model;
use crate::model::HeartbeatSpec;
use crate::suspicion::rejections::Rejection;
use crate::suspicion::{ChannelState, PathView};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One backend, explained.
#[derive(Debug, Clone)]
pub struct Explanation {
    /// When.
    pub now: Instant,
    /// As status shows it.
    pub backend: BackendStatus,
    /// Since when the operator wants what he wants.
    pub intent_for: Duration,
    /// How long its observation stands.
    pub observed_for: Duration,
    /// How long what its heartbeats ask for stands.
    pub requested_for: Duration,
    /// Its weight and what lowers it.
    pub weight: Weight,
    /// The cap in force; 0 means none.
    pub connections_max: u32,
    /// What probes say; `None` where its pool has none.
    pub probe: Option<ProbeView>,
    /// What heartbeats its pool expects.
    pub heartbeat_spec: Option<Arc<HeartbeatSpec>>,
    /// The last heartbeat in its name that was rejected.
    pub rejected: Option<Rejection>,
    /// Passive ejection.
    pub ejection: EjectionView,
    /// Of the slow start under way: how long it takes, and since when.
    pub ramp: Option<(Duration, Duration)>,
    /// Failures of its sessions lately.
    pub failures: FailuresView,
    /// What may keep it in though it is confirmed to be gone.
    pub guards: GuardStatus,
    /// Newest first; at most [`TRANSITIONS_MAX`](super::TRANSITIONS_MAX).
    pub history: Vec<Transition>,
}

/// Where the probes of a backend stand.
#[derive(Debug, Clone)]
pub struct ProbeView {
    /// How they are made.
    pub spec: Arc<model::ProbeSpec>,
    /// Their verdict.
    pub observation: Observation,
    /// For how long.
    pub lasted: Duration,
    /// The row being counted.
    pub state: ProbeState,
    /// Taken for well until its first result.
    pub fails_open: bool,
}

/// Passive ejection of a backend.
#[derive(Debug, Clone)]
pub struct EjectionView {
    /// `None`: off.
    pub spec: Option<model::EjectionSpec>,
    /// Time left of the present one.
    pub left: Option<Duration>,
    /// Ejections in a row, as of the last one.
    pub repeats: u32,
    /// For how long one session at a time tries it, if so.
    pub trial: Option<Duration>,
}

/// Failed connects and early resets of a backend.
#[derive(Debug, Clone)]
pub struct FailuresView {
    /// `None`: nothing failed.
    pub recent: Option<Recent>,
    /// For how long failures were looked for, at most a minute.
    pub watched: Duration,
    /// In a row by now.
    pub in_a_row: u32,
    /// Failed connects since the backend was configured.
    pub connects_total: u64,
}

/// The guards over a backend's pool.
#[derive(Debug, Clone)]
pub struct GuardStatus {
    /// Nobody at all is heard.
    pub channel_silent: bool,
    /// In its pool.
    pub pool_frozen: Option<FreezeStatus>,
    /// Over all pools.
    pub all_frozen: Option<FreezeStatus>,
    /// How its pool's backends stand with their heartbeats.
    pub view: PathView,
    /// Share of the pool that may be out at once, in percent.
    pub max_ejected_percent: u8,
}

// === impl Controller ===

impl Controller {
    /// Everything about one backend.
    ///
    /// # Errors
    /// No such pool or backend.
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
        let probe = pool.spec.probe.as_ref().zip(entry.health.detector.as_ref());
        Ok(Explanation {
            now,
            backend: backend_status(entry, pool, now),
            intent_for: since(entry.health.intent_since),
            observed_for: since(entry.observed_since),
            requested_for: since(entry.requested_since),
            weight: entry.weight(&pool.spec),
            connections_max: entry.cap(),
            probe: probe.map(|(spec, detector)| ProbeView {
                spec: Arc::clone(spec),
                observation: detector.observation(),
                lasted: since(detector.since()),
                state: detector.state(),
                fails_open: entry.health.fails_open,
            }),
            heartbeat_spec: pool.spec.heartbeat.clone(),
            rejected: self.heartbeats.rejections().of(&pool.spec.name, backend).cloned(),
            ejection: EjectionView {
                spec: pool.spec.ejection,
                left: outlier.until().map(|until| until.saturating_duration_since(now)),
                repeats: outlier.repeats(),
                trial: outlier.trial_duration(now),
            },
            failures: FailuresView {
                recent: entry.health.recent.view(now),
                watched: since(entry.health.since).min(RECENT),
                in_a_row: outlier.row(entry.state.failed_in_a_row()),
                connects_total: entry.state.counters.sum(|c| c.connect_failures.get()),
            },
            ramp: entry.ramp.map(|ramp| (ramp.over, since(ramp.since))),
            guards: GuardStatus {
                channel_silent: self.heartbeats.channel(now) == ChannelState::Silent,
                pool_frozen: freezing(pool.guard.freeze(), now),
                all_frozen: all.and_then(|all| all.frozen),
                view: self.heartbeats.path_view(&self.state, Some(pool.id), now),
                max_ejected_percent: max_down_percent(pool),
            },
            history: entry.history.newest_first().cloned().collect(),
        })
    }
}
