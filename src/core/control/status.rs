//! What status and metrics show: a copy of everything the controller knows.
//!
//! Called by `daemon` for the admin API. It derives, it never changes anything.

use super::backends::BackendEntry;
use super::members::Origins;
use super::pools::PoolEntry;
use super::{Controller, HeartbeatIgnored, PublishReason};
use crate::health::{HeartbeatHealth, Intent, Observation, RequestedState, Transition};
use crate::model::{BindKey, WhenNoneEligible, Words};
use crate::suspicion::rejections::Rejection;
use crate::suspicion::{ChannelState, DetectorReading, Freeze};
use crate::table::state::{BackendId, BackendState, FrontendState};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The whole picture at one moment.
#[derive(Debug, Clone)]
pub struct ControlStatus {
    /// Accepted configurations.
    pub generation: u64,
    /// In file order.
    pub frontends: Vec<FrontendStatus>,
    /// In file order.
    pub pools: Vec<PoolStatus>,
    /// Backends no longer configured that still hold sessions.
    pub leaving: Vec<Arc<BackendState>>,
    /// Tables made so far, by reason.
    pub published: Vec<(PublishReason, u64)>,
    /// `None` where no pool takes heartbeats.
    pub heartbeat: Option<HeartbeatChannelStatus>,
}

/// Heartbeats as a whole.
#[derive(Debug, Clone)]
pub struct HeartbeatChannelStatus {
    /// Heartbeats of known backends.
    pub taken_total: u64,
    /// Authentic ones that changed nothing, by reason.
    pub ignored: Vec<(HeartbeatIgnored, u64)>,
    /// Their senders, in no order.
    pub rejections: Vec<Rejection>,
    /// Times nobody's silence counted, because we were late or deaf.
    pub excuses_total: u64,
    /// Nobody at all is heard.
    pub silent: bool,
    /// Why no silent backend of any pool is taken out, if so.
    pub frozen: Option<FreezeStatus>,
}

/// Why no silent backend is taken out.
#[derive(Debug, Clone)]
pub struct FreezeStatus {
    /// In words.
    pub reason: String,
    /// For how long by now.
    pub lasted: Duration,
}

/// A frontend as status shows it.
#[derive(Debug, Clone)]
pub struct FrontendStatus {
    /// Counters and identity.
    pub state: Arc<FrontendState>,
    /// Bind addresses.
    pub binds: Vec<BindKey>,
    /// Pool name.
    pub pool: Arc<str>,
    /// Cap; 0 means none.
    pub connections_max: u32,
}

/// A pool as status shows it.
#[derive(Debug, Clone)]
pub struct PoolStatus {
    /// Pool name.
    pub name: Arc<str>,
    /// Policy name.
    pub balance: &'static str,
    /// In file order, then registered ones by age.
    pub backends: Vec<BackendStatus>,
    /// What happens while nobody is eligible, if nobody is: `refuse` or
    /// `try-all`; `wait` or `former` while no backend has been judged yet.
    pub none_eligible: Option<&'static str>,
    /// Nobody serves, and clients wait for the first verdict.
    pub undecided: bool,
    /// Why no silent backend is taken out, if so.
    pub frozen: Option<FreezeStatus>,
    /// Members that registered.
    pub registered: usize,
    /// Most members that may register; 0 where none may.
    pub registered_max: u32,
    /// Whether it takes heartbeats.
    pub heartbeats: bool,
    /// Whether its backends are probed.
    pub probes: bool,
}

/// A backend as status shows it.
#[derive(Debug, Clone)]
pub struct BackendStatus {
    /// Counters and identity.
    pub state: Arc<BackendState>,
    /// The member sources that name it.
    pub origins: Origins,
    /// From the file, or as its heartbeats ask for.
    pub weight: u32,
    /// As balanced by, exactly; 0 while it is not eligible.
    pub effective_weight: f64,
    /// From the file.
    pub backup: bool,
    /// Cap; 0 means none.
    pub connections_max: u32,
    /// Operator's wish.
    pub intent: Intent,
    /// What probes and heartbeats make of it.
    pub observation: Observation,
    /// Passively ejected now.
    pub ejected: bool,
    /// One session at a time tries it.
    pub on_trial: bool,
    /// Ejections so far.
    pub ejections_total: u64,
    /// Ejections the pool's guard held back so far.
    pub ejections_held_total: u64,
    /// Derived.
    pub eligible: bool,
    /// Its slow start, in percent; 100 when it is over.
    pub ramp_percent: u32,
    /// What its heartbeats amount to.
    pub heartbeat_health: HeartbeatHealth,
    /// What its heartbeats ask for.
    pub requested: RequestedState,
    /// `None` where none were heard.
    pub heartbeats: Option<BackendHeartbeatStatus>,
    /// The newest change, if any.
    pub last_transition: Option<Transition>,
}

/// What one backend's heartbeats have said.
#[derive(Debug, Clone)]
pub struct BackendHeartbeatStatus {
    /// What their rhythm means.
    pub reading: DetectorReading,
    /// The key they are signed with.
    pub key_id: u32,
    /// As asked for; what it gets may be less.
    pub weight: u16,
    /// As said.
    pub in_flight: u32,
    /// As last said, 0..=1000.
    pub load: u16,
    /// Smoothed.
    pub load_mean: f64,
    /// What the load leaves of the weight, in percent.
    pub load_share: u32,
    /// Since the first of them.
    pub known_for: Duration,
    /// Silent for `ttl`.
    pub expired: bool,
    /// Silence that would expire them.
    pub ttl: Duration,
}

/// A picture that is being made, some backends at a time.
#[derive(Debug)]
pub struct Gathering {
    status: ControlStatus,
    /// Still to come: each with the place of its pool, the last first.
    remaining: Vec<(u32, BackendId)>,
}

// === impl Controller ===

impl Controller {
    /// What status and metrics show.
    pub fn status(&self, now: Instant) -> ControlStatus {
        let mut gathering = self.begin_status(now);
        while self.gather(&mut gathering, usize::MAX, now) {}
        gathering.finish()
    }

    /// Everything but the backends, who come by [`Controller::gather`]: those of
    /// now, as they are by then.
    pub fn begin_status(&self, now: Instant) -> Gathering {
        let removed = self.state.removed.iter().map(|entry| &entry.state);
        let places = (0..).zip(&self.state.pools);
        let members =
            places.flat_map(|(place, pool)| pool.members().iter().map(move |id| (place, *id)));
        let mut remaining: Vec<(u32, BackendId)> = members.collect();
        remaining.reverse();
        let status = ControlStatus {
            generation: self.publisher.generation(),
            frontends: self
                .state
                .frontends
                .iter()
                .map(|frontend| FrontendStatus {
                    state: Arc::clone(&frontend.state),
                    binds: frontend.spec.binds.iter().map(|bind| bind.key.clone()).collect(),
                    pool: Arc::clone(&frontend.spec.pool),
                    connections_max: frontend.spec.connections_max,
                })
                .collect(),
            pools: self.state.pools.iter().map(|pool| pool_status(pool, now)).collect(),
            leaving: removed.filter(|state| state.in_flight.get() > 0).map(Arc::clone).collect(),
            published: self.publisher.published().to_vec(),
            heartbeat: self.heartbeat_status(now),
        };
        Gathering { status, remaining }
    }

    /// Adds up to `most` backends; false once there are no more. One that has left
    /// meanwhile is left out.
    pub fn gather(&self, gathering: &mut Gathering, most: usize, now: Instant) -> bool {
        let from = gathering.remaining.len().saturating_sub(most);
        for (place, id) in gathering.remaining.drain(from..).rev() {
            let Some(entry) = self.state.backends.get(id) else { continue };
            let Some(pool) = self.state.pool(entry.pool) else { continue };
            let status = &mut gathering.status.pools[place as usize];
            let backend = backend_status(entry, pool, now);
            if backend.eligible {
                (status.none_eligible, status.undecided) = (None, false);
            }
            status.backends.push(backend);
        }
        !gathering.remaining.is_empty()
    }

    /// Heartbeats as a whole.
    pub(super) fn heartbeat_status(&self, now: Instant) -> Option<HeartbeatChannelStatus> {
        (self.state.pools.listening() > 0).then(|| HeartbeatChannelStatus {
            taken_total: self.heartbeats.taken(),
            ignored: self.heartbeats.ignored().to_vec(),
            rejections: self.heartbeats.rejections().all().cloned().collect(),
            excuses_total: self.heartbeats.excuses(),
            silent: self.heartbeats.channel(now) == ChannelState::Silent,
            frozen: freezing(self.heartbeats.guard_over_all().freeze(), now),
        })
    }
}

// === impl Gathering ===

impl Gathering {
    /// The picture.
    pub fn finish(self) -> ControlStatus {
        self.status
    }
}

/// A pool without its backends, of whom none is eligible therefore.
fn pool_status(pool: &PoolEntry, now: Instant) -> PoolStatus {
    let rule = match (pool.settling(), pool.spec.when_none_eligible) {
        (Some(settling), _) if !settling.stand_ins.is_empty() => "former",
        (_, WhenNoneEligible::TryAll) => "try-all",
        (Some(_), WhenNoneEligible::Refuse) => "wait",
        (None, WhenNoneEligible::Refuse) => "refuse",
    };
    let heartbeat = pool.spec.heartbeat.as_ref();
    let may_register = heartbeat.filter(|spec| spec.register);
    PoolStatus {
        name: Arc::clone(&pool.spec.name),
        balance: pool.spec.balance.word(),
        backends: Vec::with_capacity(pool.members().len()),
        none_eligible: Some(rule),
        undecided: rule == "wait",
        frozen: freezing(pool.guard.freeze(), now),
        registered: pool.registered(),
        registered_max: may_register.map_or(0, |spec| spec.backends_max),
        heartbeats: heartbeat.is_some(),
        probes: pool.spec.probe.is_some(),
    }
}

pub(super) fn backend_status(
    entry: &BackendEntry,
    pool: &PoolEntry,
    now: Instant,
) -> BackendStatus {
    BackendStatus {
        state: Arc::clone(&entry.state),
        origins: entry.origins,
        weight: u32::from(entry.base_weight(&pool.spec)),
        effective_weight: entry.weight(&pool.spec).in_force(),
        backup: entry.spec.backup,
        connections_max: entry.spec.connections_max,
        intent: entry.health.intent,
        observation: entry.health.observation(),
        ejected: entry.health.outlier.is_ejected(),
        on_trial: entry.health.outlier.is_on_trial(),
        ejections_total: entry.health.outlier.ejections_total(),
        ejections_held_total: entry.health.outlier.held_total(),
        eligible: entry.health.eligible(),
        ramp_percent: entry.ramp_share,
        heartbeat_health: entry.health.heartbeat_health,
        requested: entry.health.requested,
        heartbeats: backend_heartbeat_status(entry, pool, now),
        last_transition: entry.history.last().cloned(),
    }
}

fn backend_heartbeat_status(
    entry: &BackendEntry,
    pool: &PoolEntry,
    now: Instant,
) -> Option<BackendHeartbeatStatus> {
    let heartbeats = entry.heartbeats.as_deref()?;
    let (ttl, _) = entry.expiry(pool.spec.heartbeat.as_ref()?)?;
    Some(BackendHeartbeatStatus {
        reading: heartbeats.detector.reading(now),
        key_id: heartbeats.key_id,
        weight: heartbeats.weight,
        in_flight: heartbeats.in_flight,
        load: heartbeats.load.said,
        load_mean: heartbeats.load.mean(),
        load_share: heartbeats.load.share(),
        known_for: now.saturating_duration_since(heartbeats.first_at),
        expired: heartbeats.expired,
        ttl,
    })
}

pub(super) fn freezing(freeze: Option<&Freeze>, now: Instant) -> Option<FreezeStatus> {
    freeze.map(|freeze| FreezeStatus {
        reason: freeze.reason.clone(),
        lasted: now.saturating_duration_since(freeze.since),
    })
}

#[cfg(any(test, feature = "testing"))]
impl BackendStatus {
    /// A backend of weight 2 about which there is nothing to say.
    pub fn plain(state: BackendState) -> BackendStatus {
        BackendStatus {
            state: Arc::new(state),
            origins: Origins::of(crate::control::MemberSource::File),
            weight: 2,
            effective_weight: 2.0,
            backup: false,
            connections_max: 0,
            intent: Intent::Ready,
            observation: Observation::Unknown,
            ejected: false,
            on_trial: false,
            ejections_total: 0,
            ejections_held_total: 0,
            eligible: true,
            ramp_percent: 100,
            heartbeat_health: HeartbeatHealth::Absent,
            requested: RequestedState::Ready,
            heartbeats: None,
            last_transition: None,
        }
    }
}

#[cfg(any(test, feature = "testing"))]
impl PoolStatus {
    /// A pool about which there is nothing to say.
    pub fn plain(name: &str, backends: Vec<BackendStatus>) -> PoolStatus {
        PoolStatus {
            name: name.into(),
            balance: "random",
            backends,
            none_eligible: None,
            undecided: false,
            frozen: None,
            registered: 0,
            registered_max: 0,
            heartbeats: false,
            probes: false,
        }
    }
}
