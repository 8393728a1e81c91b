//! Data for `status` and metrics: a copy of the controller's state.
//!
//! Called by `daemon` for the admin API. It changes nothing.

use super::backends::BackendEntry;
use super::members::Origins;
use super::pools::PoolEntry;
use super::{Controller, HeartbeatIgnored, PublishReason, SourceStatus};
use crate::discovery::view::MemberWish;
use crate::health::agent::AgentState;
use crate::health::role::SeenRole;
use crate::health::{HeartbeatHealth, Intent, Observation, RequestedState, Transition};
use crate::model::{BindKey, NodeRole, WhenNoneEligible, Words};
use crate::suspicion::rejections::Rejection;
use crate::suspicion::{ChannelState, DetectorReading, Freeze};
use crate::table::state::{BackendId, BackendState, FrontendState};
use crate::traffic::{PoolRoster, TrafficRoster};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The state of frontends, pools and backends.
#[derive(Debug, Clone)]
pub struct ControlStatus {
    /// Accepted configurations.
    pub generation: u64,
    /// In file order.
    pub frontends: Vec<FrontendStatus>,
    /// In file order.
    pub pools: Vec<PoolStatus>,
    /// Removed backends that still have sessions.
    pub leaving: Vec<Arc<BackendState>>,
    /// Published tables, by reason.
    pub published: Vec<(PublishReason, u64)>,
    /// `None` if no pool has heartbeats.
    pub heartbeat: Option<HeartbeatChannelStatus>,
}

/// The heartbeats of all pools.
#[derive(Debug, Clone)]
pub struct HeartbeatChannelStatus {
    /// Heartbeats of known backends.
    pub taken_total: u64,
    /// Accepted heartbeats that match no backend, by reason.
    pub ignored: Vec<(HeartbeatIgnored, u64)>,
    /// Senders of these heartbeats, in no order.
    pub rejections: Vec<Rejection>,
    /// Times that silence was excluded, because the control loop was late or heartbeats
    /// were lost on this host.
    pub excuses_total: u64,
    /// No heartbeat arrives from any backend.
    pub silent: bool,
    /// Freeze of all pools.
    pub frozen: Option<FreezeStatus>,
}

/// A freeze: no silent backend is removed.
#[derive(Debug, Clone)]
pub struct FreezeStatus {
    /// The reason as text.
    pub reason: String,
    /// Age of the freeze.
    pub lasted: Duration,
}

/// A frontend in `status`.
#[derive(Debug, Clone)]
pub struct FrontendStatus {
    /// Counters and identity.
    pub state: Arc<FrontendState>,
    /// Bind addresses.
    pub binds: Vec<BindKey>,
    /// Pool name.
    pub pool: Arc<str>,
    /// Cap; 0: none.
    pub connections_max: u32,
}

/// A pool in `status`.
#[derive(Debug, Clone)]
pub struct PoolStatus {
    /// Pool name.
    pub name: Arc<str>,
    /// The pool that it follows.
    pub of: Option<Arc<str>>,
    /// Role that a backend needs.
    pub role: Option<NodeRole>,
    /// Policy name.
    pub balance: &'static str,
    /// In file order, then the others by age.
    pub backends: Vec<BackendStatus>,
    /// The tiers that serve, each with its share of the new sessions in per cent. Empty while no
    /// backend is eligible.
    pub tier_shares: Vec<(u8, u8)>,
    /// Rule in effect while no backend is eligible: `refuse` or `try-all`, or `wait` or
    /// `former` while settling. `None` if a backend is eligible.
    pub none_eligible: Option<&'static str>,
    /// No backend is eligible, and clients wait for the first result.
    pub undecided: bool,
    /// Freeze of the pool.
    pub frozen: Option<FreezeStatus>,
    /// Number of registered backends.
    pub registered: usize,
    /// Cap on registered backends; 0 if none may register.
    pub registered_max: u32,
    /// Whether the pool has heartbeats.
    pub heartbeats: bool,
    /// Whether the pool has probes.
    pub probes: bool,
    /// Its names and its `discover` table, in order of precedence.
    pub sources: Vec<SourceStatus>,
}

/// A backend in `status`.
#[derive(Debug, Clone)]
pub struct BackendStatus {
    /// Counters and identity.
    pub state: Arc<BackendState>,
    /// The member sources that list the backend.
    pub origins: Origins,
    /// Weight from the file, or requested by its heartbeats.
    pub weight: u32,
    /// Weight used for balancing; 0 while not eligible.
    pub effective_weight: f64,
    /// Its tier; above 0 it is a backup.
    pub tier: u8,
    /// Whether its tier gets new sessions, or no tier does.
    pub serves: bool,
    /// Cap; 0: none.
    pub connections_max: u32,
    /// The operator's intent.
    pub intent: Intent,
    /// Combined observation of probes, heartbeats and first bytes.
    pub observation: Observation,
    /// Whether the backend is ejected.
    pub ejected: bool,
    /// Whether the backend is on trial.
    pub on_trial: bool,
    /// Ejections so far.
    pub ejections_total: u64,
    /// Ejections that the pool's guard has prevented.
    pub ejections_held_total: u64,
    /// Whether new sessions can pick the backend.
    pub eligible: bool,
    /// Share reached by its slow start, in percent; 100 without one.
    pub ramp_percent: u32,
    /// Share of its weight that its health leaves, in percent.
    pub health_percent: u32,
    /// Share of its weight that its load leaves, in percent.
    pub load_percent: u32,
    /// When the operator's intent last changed.
    pub intent_since: Instant,
    /// Result of its heartbeats.
    pub heartbeat_health: HeartbeatHealth,
    /// State that its heartbeats request.
    pub requested: RequestedState,
    /// What its registries wish for it.
    pub wish: MemberWish,
    /// The member source with this wish, such as `consul`; `None` if no wish restricts it.
    pub wished_by: Option<Arc<str>>,
    /// No connect to it has succeeded yet; only in pools without probes.
    pub unverified: bool,
    /// The role that its probes have found.
    pub role: Option<SeenRole>,
    /// What its agent has said.
    pub agent: AgentState,
    /// Its pool needs a role that it does not have.
    pub lacks_role: bool,
    /// It is a primary, but not the one in force.
    pub outranked: bool,
    /// `None` if no heartbeat was received.
    pub heartbeats: Option<BackendHeartbeatStatus>,
    /// The newest transition, if any.
    pub last_transition: Option<Transition>,
}

/// The heartbeats of one backend.
#[derive(Debug, Clone)]
pub struct BackendHeartbeatStatus {
    /// Values of the detector.
    pub reading: DetectorReading,
    /// Key id of the last heartbeat.
    pub key_id: u32,
    /// Requested weight; the effective weight can be lower.
    pub weight: u16,
    /// Reported requests in flight.
    pub in_flight: u32,
    /// Last reported load, 0..=1000.
    pub load: u16,
    /// Smoothed load.
    pub load_mean: f64,
    /// Share of the weight that the load leaves, in percent.
    pub load_share: u32,
    /// Time since the first heartbeat.
    pub known_for: Duration,
    /// No heartbeat for `ttl`.
    pub expired: bool,
    /// Silence after which the heartbeats expire.
    pub ttl: Duration,
}

/// A [`ControlStatus`] in progress. It is built in slices.
#[derive(Debug)]
pub struct Gathering {
    status: ControlStatus,
    /// Remaining backends in reverse order, each with the position of its pool.
    remaining: Vec<(u32, BackendId)>,
}

// === impl Controller ===

impl Controller {
    /// Returns the complete status.
    pub fn status(&self, now: Instant) -> ControlStatus {
        let mut gathering = self.begin_status(now);
        while self.gather(&mut gathering, usize::MAX, now) {}
        gathering.finish()
    }

    /// Returns a number that changes whenever [`Controller::traffic_roster`] has changed.
    pub fn roster_version(&self) -> (u64, u64) {
        (self.publisher.generation(), self.state.backends.membership())
    }

    /// Returns all frontends, pools and backends in file order.
    pub fn traffic_roster(&self) -> TrafficRoster {
        let state = |id: &BackendId| Some(Arc::clone(&self.state.backends.get(*id)?.state));
        let pool = |pool: &PoolEntry| PoolRoster {
            name: Arc::clone(&pool.spec.name),
            backends: pool.members().iter().filter_map(state).collect(),
        };
        let frontends = self.state.frontends.iter().map(|frontend| Arc::clone(&frontend.state));
        TrafficRoster {
            frontends: frontends.collect(),
            pools: self.state.pools.iter().map(pool).collect(),
        }
    }

    /// Begins a status without backends. [`Controller::gather`] adds the current backends
    /// in their state at that time.
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
            pools: self.state.pools.iter().map(|pool| self.pool_status(pool, now)).collect(),
            leaving: removed.filter(|state| state.in_flight.get() > 0).map(Arc::clone).collect(),
            published: self.publisher.published().to_vec(),
            heartbeat: self.heartbeat_status(now),
        };
        Gathering { status, remaining }
    }

    /// Adds up to `most` backends. Returns false once all are added. Skips backends that
    /// were removed since [`Controller::begin_status`].
    pub fn gather(&self, gathering: &mut Gathering, most: usize, now: Instant) -> bool {
        let from = gathering.remaining.len().saturating_sub(most);
        for (place, id) in gathering.remaining.drain(from..).rev() {
            let Some(entry) = self.state.backends.get(id) else { continue };
            let Some(pool) = self.state.pool(entry.pool) else { continue };
            let status = &mut gathering.status.pools[place as usize];
            let backend = backend_status(entry, pool, &status.tier_shares, now);
            if backend.eligible {
                (status.none_eligible, status.undecided) = (None, false);
            }
            status.backends.push(backend);
        }
        !gathering.remaining.is_empty()
    }

    fn pool_status(&self, pool: &PoolEntry, now: Instant) -> PoolStatus {
        let sources = self.state.views.status(&pool.spec.name, now);
        PoolStatus { tier_shares: self.tier_shares(pool), ..pool_status(pool, sources, now) }
    }

    /// Returns the tiers that serve in the newest table.
    pub(super) fn tier_shares(&self, pool: &PoolEntry) -> Vec<(u8, u8)> {
        let table = self.state.pools.place(pool.id);
        let table = table.and_then(|place| self.publisher.table().pools.get(place));
        let table = table.filter(|table| table.id == pool.id);
        table.map_or_else(Vec::new, |table| table.tier_shares())
    }

    /// Returns the status of all heartbeats; `None` if no pool has heartbeats.
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
    /// Returns the status.
    pub fn finish(self) -> ControlStatus {
        self.status
    }
}

/// Returns the name of the rule in effect while no backend of the pool is eligible.
pub(super) fn none_eligible_rule(pool: &PoolEntry) -> &'static str {
    match (pool.settling(), pool.spec.when_none_eligible) {
        (Some(settling), _) if !settling.stand_ins.is_empty() => "former",
        (_, WhenNoneEligible::TryAll) => "try-all",
        (Some(_), WhenNoneEligible::Refuse | WhenNoneEligible::Wait) => "wait",
        (None, WhenNoneEligible::Wait) => "queue",
        (None, WhenNoneEligible::Refuse) => "refuse",
    }
}

/// Returns the status of a pool without its backends, as if none were eligible.
fn pool_status(pool: &PoolEntry, sources: Vec<SourceStatus>, now: Instant) -> PoolStatus {
    let rule = none_eligible_rule(pool);
    let heartbeat = pool.spec.heartbeat.as_ref();
    let may_register = heartbeat.filter(|spec| spec.register);
    PoolStatus {
        name: Arc::clone(&pool.spec.name),
        of: pool.spec.of.clone(),
        role: pool.spec.role,
        balance: pool.spec.balance.word(),
        backends: Vec::with_capacity(pool.members().len()),
        tier_shares: Vec::new(),
        none_eligible: Some(rule),
        undecided: rule == "wait",
        frozen: freezing(pool.guard.freeze(), now),
        registered: pool.registered(),
        registered_max: may_register.map_or(0, |spec| spec.backends_max),
        heartbeats: heartbeat.is_some(),
        probes: pool.spec.probe.is_some(),
        sources,
    }
}

/// `tier_shares` are those of the pool.
pub(super) fn backend_status(
    entry: &BackendEntry,
    pool: &PoolEntry,
    tier_shares: &[(u8, u8)],
    now: Instant,
) -> BackendStatus {
    let weight = entry.weight(&pool.spec);
    BackendStatus {
        state: Arc::clone(&entry.state),
        origins: entry.origins,
        weight: u32::from(entry.base_weight(&pool.spec)),
        effective_weight: weight.in_force(),
        tier: entry.spec.tier,
        serves: tier_shares.is_empty()
            || tier_shares.iter().any(|(tier, _)| *tier == entry.spec.tier),
        connections_max: entry.spec.connections_max,
        intent: entry.health.intent,
        observation: entry.health.observation(),
        ejected: entry.health.outlier.is_ejected(),
        on_trial: entry.health.outlier.is_on_trial(),
        ejections_total: entry.health.outlier.ejections_total(),
        ejections_held_total: entry.health.outlier.held_total(),
        eligible: entry.health.eligible(),
        ramp_percent: entry.ramp_share,
        health_percent: weight.health,
        load_percent: weight.load,
        intent_since: entry.health.intent_since,
        heartbeat_health: entry.health.heartbeat_health,
        requested: entry.health.requested,
        wish: entry.health.wish,
        wished_by: entry.wished_by.clone(),
        unverified: entry.health.unverified,
        role: entry.health.seen_role(),
        agent: entry.health.agent(),
        lacks_role: !entry.health.has_role(),
        outranked: entry.health.role.outranked,
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
    /// Returns an eligible backend of weight 2 without results.
    pub fn plain(state: BackendState, now: Instant) -> BackendStatus {
        BackendStatus {
            state: Arc::new(state),
            origins: Origins::of(crate::control::MemberSource::File),
            weight: 2,
            effective_weight: 2.0,
            tier: 0,
            serves: true,
            connections_max: 0,
            intent: Intent::Ready,
            observation: Observation::Unknown,
            ejected: false,
            on_trial: false,
            ejections_total: 0,
            ejections_held_total: 0,
            eligible: true,
            ramp_percent: 100,
            health_percent: 100,
            load_percent: 100,
            intent_since: now,
            heartbeat_health: HeartbeatHealth::Absent,
            requested: RequestedState::Ready,
            wish: MemberWish::Sessions,
            wished_by: None,
            unverified: false,
            role: None,
            agent: AgentState::default(),
            lacks_role: false,
            outranked: false,
            heartbeats: None,
            last_transition: None,
        }
    }
}

#[cfg(any(test, feature = "testing"))]
impl PoolStatus {
    /// Returns a pool without probes and heartbeats.
    pub fn plain(name: &str, backends: Vec<BackendStatus>) -> PoolStatus {
        PoolStatus {
            name: name.into(),
            of: None,
            role: None,
            balance: "random",
            backends,
            tier_shares: Vec::new(),
            none_eligible: None,
            undecided: false,
            frozen: None,
            registered: 0,
            registered_max: 0,
            heartbeats: false,
            probes: false,
            sources: Vec::new(),
        }
    }
}
