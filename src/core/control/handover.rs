//! Handover of the controller's state in an upgrade: saving in the old process, restoring
//! in the new process.
//!
//! Called by `daemon` in both processes. It does no I/O. The types are serialised as JSON.
//! An older program can omit fields, and unknown fields of a newer program are ignored.
//! Frontends, pools and backends are identified by name, never by id.

mod counts;
mod turns;

use super::backends::BackendEntry;
use super::heartbeats::CarriedHeartbeats;
use super::pools::{PoolEntry, StartupGrace};
use super::schedule::TimerKind;
use super::slow_backends::watched;
use super::state::ControlState;
use super::{
    ControlEffect, Controller, HeartbeatIgnored, PublishReason, SavedAgent, SavedHeartbeats,
    SavedIntent, SavedRole, SavedTransition, SavedViews,
};
use crate::balance::RoundRobinPosition;
use crate::health::ejection::SavedEjectionState;
use crate::health::slow_detector::SavedSlowDetector;
use crate::health::{Intent, Observation};
use crate::table::PoolTable;
use crate::table::state::{BackendId, BackendState};
use counts::{carry_backend, carry_frontend, save_frontend};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use turns::saved_turns;

/// State of frontends, pools and backends. Times are in milliseconds before the moment of
/// saving.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Saved {
    /// Accepted configurations.
    pub generation: u64,
    /// Published tables.
    pub serial: u64,
    /// In file order.
    pub frontends: Vec<SavedFrontend>,
    /// In file order.
    pub pools: Vec<SavedPool>,
    /// Published tables by reason.
    pub published: BTreeMap<String, u64>,
    /// Heartbeats received.
    pub heartbeats: u64,
    /// Accepted heartbeats that match no backend, by reason.
    #[serde(rename = "misfits")]
    pub ignored: BTreeMap<String, u64>,
    /// Times that silence was excluded for all backends.
    pub excuses: u64,
    /// The views of member sources.
    #[serde(skip_serializing_if = "SavedViews::is_empty")]
    pub views: SavedViews,
    /// Operators' intents for removed backends.
    #[serde(rename = "left", skip_serializing_if = "is_default")]
    pub removed_intents: Vec<SavedIntent>,
}

/// A [`Saved`] in progress. It is built in slices.
#[derive(Debug)]
pub struct Saving {
    at: Instant,
    generation: u64,
    /// Transitions saved per backend.
    history: usize,
    /// The last one is incomplete.
    pools: Vec<SavedPool>,
    /// Members of the last pool that are still missing, in reverse order.
    remaining: Vec<BackendId>,
}

/// Transitions in one [`Saved`]. With more, only the newest of each backend are saved.
const HISTORY_MAX: usize = 200_000;

/// Counters of a frontend.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedFrontend {
    /// Identifies the frontend.
    pub name: String,
    /// See `FrontendCounters`.
    pub sessions: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Rejected sessions by reason.
    pub refused: BTreeMap<String, u64>,
    /// Sessions accepted without a check of the limits of their client sources.
    pub untracked: u64,
}

/// A pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedPool {
    /// Identifies the pool.
    pub name: String,
    /// The pool fails open; see `health`.
    pub open: bool,
    /// Position of the round robin of its lowest tier that serves.
    pub turn: Option<RoundRobinPosition>,
    /// The positions of all tiers, if sessions spill over several.
    #[serde(skip_serializing_if = "is_default")]
    pub tier_turns: BTreeMap<u8, RoundRobinPosition>,
    /// Time since at least one backend is eligible.
    pub in_service_ms: Option<u64>,
    /// The pool has heartbeats: the saved state includes them and registered backends.
    #[serde(skip_serializing_if = "is_default")]
    #[serde(rename = "hearts")]
    pub takes_heartbeats: bool,
    /// In file order, then registered backends by age.
    pub backends: Vec<SavedBackend>,
}

/// A backend.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedBackend {
    /// Identifies the backend, together with pool and address.
    pub name: String,
    /// Address as spelled in the file.
    pub address: String,
    /// Name of the intent.
    #[serde(skip_serializing_if = "is_default")]
    pub intent: String,
    /// Age of the intent.
    #[serde(skip_serializing_if = "is_default")]
    pub intent_ms: u64,
    /// New sessions can pick the backend.
    #[serde(skip_serializing_if = "is_default")]
    pub eligible: bool,
    /// Name of the probes' observation.
    #[serde(skip_serializing_if = "is_default")]
    pub observation: String,
    /// Age of the observation.
    #[serde(skip_serializing_if = "is_default")]
    pub observation_ms: u64,
    /// The role that its probes have found.
    #[serde(skip_serializing_if = "is_default")]
    pub role: Option<SavedRole>,
    /// What its agent has said.
    #[serde(skip_serializing_if = "is_default")]
    pub agent: Option<SavedAgent>,
    /// Eligible while unknown.
    #[serde(skip_serializing_if = "is_default")]
    pub fails_open: bool,
    /// No connect to it has succeeded yet.
    #[serde(skip_serializing_if = "is_default")]
    pub unverified: bool,
    /// Ejection state.
    #[serde(skip_serializing_if = "is_default")]
    pub outlier: SavedEjectionState,
    /// State of the detector over first bytes.
    #[serde(skip_serializing_if = "is_default")]
    pub watch: SavedSlowDetector,
    /// Time since its slow start began.
    #[serde(skip_serializing_if = "is_default")]
    pub ramp_ms: Option<u64>,
    /// See `BackendCounters`.
    #[serde(skip_serializing_if = "is_default")]
    pub sessions: u64,
    /// Failed connects.
    #[serde(skip_serializing_if = "is_default")]
    pub connect_failures: u64,
    /// Bytes from clients.
    #[serde(skip_serializing_if = "is_default")]
    pub bytes_in: u64,
    /// Bytes to clients.
    #[serde(skip_serializing_if = "is_default")]
    pub bytes_out: u64,
    /// Heartbeats registered the backend.
    #[serde(skip_serializing_if = "is_default")]
    pub registered: bool,
    /// State of its heartbeats.
    #[serde(rename = "heart", skip_serializing_if = "is_default")]
    pub heartbeats: Option<SavedHeartbeats>,
    /// Age of the requested state.
    #[serde(rename = "calling_ms", skip_serializing_if = "is_default")]
    pub requested_ms: u64,
    /// Age of the combined observation.
    #[serde(skip_serializing_if = "is_default")]
    pub observed_ms: Option<u64>,
    /// Time since a lower tier has replaced it, in a pool with `on_recover`.
    #[serde(skip_serializing_if = "is_default")]
    pub released_ms: Option<u64>,
    /// Oldest first.
    #[serde(skip_serializing_if = "is_default")]
    pub history: Vec<SavedTransition>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

// === impl Saved ===

impl Saved {
    /// Removes all counts, for a process that counts from zero. Events after the moment of
    /// saving are lost, and an incomplete count is worse than none.
    pub fn without_counts(mut self) -> Saved {
        self.frontends.clear();
        (self.published, self.ignored) = (BTreeMap::new(), BTreeMap::new());
        (self.heartbeats, self.excuses) = (0, 0);
        for backend in self.pools.iter_mut().flat_map(|pool| &mut pool.backends) {
            (backend.sessions, backend.connect_failures) = (0, 0);
            (backend.bytes_in, backend.bytes_out) = (0, 0);
        }
        self
    }

    /// Replaces the operators' intents by those of `newer`. Backends not listed there
    /// become ready.
    pub fn set_intents(&mut self, newer: &Saved) {
        self.removed_intents.clone_from(&newer.removed_intents);
        let mut wanted: HashMap<[&str; 3], (&SavedPool, &SavedBackend)> = every_backend(newer)
            .map(|(pool, one)| ([&*pool.name, &*one.name, &*one.address], (pool, one)))
            .collect();
        for pool in &mut self.pools {
            for backend in &mut pool.backends {
                match wanted.remove(&[&*pool.name, &*backend.name, &*backend.address]) {
                    Some((_, newer)) => {
                        backend.intent.clone_from(&newer.intent);
                        backend.intent_ms = newer.intent_ms;
                    }
                    None => backend.intent = Intent::Ready.name().to_owned(),
                }
            }
        }
        // Backends with an intent but no other state.
        let unknown: Vec<SavedPool> = wanted
            .into_values()
            .map(|(pool, one)| SavedPool {
                name: pool.name.clone(),
                backends: vec![one.clone()],
                ..SavedPool::default()
            })
            .collect();
        self.pools.extend(unknown);
    }
}

// === impl Controller ===

impl Controller {
    /// Returns the complete state for a handover.
    pub fn save(&self, now: Instant) -> Saved {
        let mut saving = self.begin_save(now);
        self.save_on(&mut saving, usize::MAX);
        Saved {
            frontends: self
                .state
                .frontends
                .iter()
                .map(|entry| save_frontend(&entry.state))
                .collect(),
            published: self
                .publisher
                .published()
                .map(|(reason, n)| (reason.name().to_owned(), n))
                .into(),
            heartbeats: self.heartbeats.taken(),
            ignored: self.heartbeats.ignored().map(|(why, n)| (why.name().to_owned(), n)).into(),
            excuses: self.heartbeats.excuses(),
            ..self.end_save(saving)
        }
    }

    /// Begins to save in slices, without the counts of controller and frontends.
    /// [`Controller::save_on`] adds backends in their state at that time.
    pub fn begin_save(&self, now: Instant) -> Saving {
        Saving {
            at: now,
            generation: self.publisher.generation(),
            history: (HISTORY_MAX / self.state.backends.len().max(1)).max(1),
            pools: Vec::new(),
            remaining: Vec::new(),
        }
    }

    /// Adds up to `most` backends and pools. Returns false once all are added. Skips
    /// backends that were removed since [`Controller::begin_save`]. After a reload, begin
    /// again: [`Controller::can_continue`].
    pub fn save_on(&self, saving: &mut Saving, most: usize) -> bool {
        for _ in 0..most {
            let Some(id) = saving.remaining.pop() else {
                let place = saving.pools.len();
                let Some(pool) = self.state.pools.at(place) else { return false };
                let table = self.publisher.table().pools.get(place);
                let mut saved = Controller::save_pool(pool, table, saving.at);
                saved.backends.extend(self.state.save_groups(&pool.spec.name, saving.at));
                saving.pools.push(saved);
                saving.remaining.extend(pool.members().iter().rev());
                continue;
            };
            if let (Some(pool), Some(entry)) =
                (saving.pools.last_mut(), self.state.backends.get(id))
            {
                pool.backends.push(save_backend(entry, saving.history, saving.at));
            }
        }
        true
    }

    /// Returns a pool without its backends.
    fn save_pool(pool: &PoolEntry, table: Option<&Arc<PoolTable>>, now: Instant) -> SavedPool {
        let table = table.filter(|table| table.spec.name == pool.spec.name);
        let age = |since: Instant| millis(now.saturating_duration_since(since));
        let (turn, tier_turns) = saved_turns(table.map(|table| &**table));
        SavedPool {
            name: pool.spec.name.to_string(),
            open: pool.startup == StartupGrace::FailingOpen || pool.verification.fails_open,
            turn,
            tier_turns,
            in_service_ms: pool.in_service_since.map(age),
            takes_heartbeats: pool.spec.heartbeat.is_some(),
            backends: Vec::with_capacity(pool.members().len()),
        }
    }

    /// Whether the configuration has not changed since [`Controller::begin_save`].
    pub fn can_continue(&self, saving: &Saving) -> bool {
        saving.generation == self.publisher.generation()
    }

    /// Returns the saved state.
    pub fn end_save(&self, saving: Saving) -> Saved {
        Saved {
            generation: saving.generation,
            serial: self.publisher.serial(),
            pools: saving.pools,
            views: self.saved_views(saving.at),
            removed_intents: self.state.removed.intents.save(saving.at),
            ..Saved::default()
        }
    }

    /// Continues the numbers of configurations and tables of another process. Call it
    /// before the first configuration. Caps the numbers, so that they can still increase.
    pub fn add_carried_counts(&mut self, generation: u64, serial: u64) {
        const COUNT_MAX: u64 = u64::MAX / 2;
        self.publisher.count_on_from(generation.min(COUNT_MAX), serial.min(COUNT_MAX));
    }

    /// Restores the state of another process: operators' intents, health, round-robin
    /// positions and counts. Ignores backends that are not configured here, except for
    /// their intents. Can be called again with a newer state.
    pub fn adopt(&mut self, saved: &Saved, now: Instant) -> Vec<ControlEffect> {
        self.run_due(now);
        self.take_over_views(&saved.views, now);
        for pool in &saved.pools {
            self.adopt_pool(pool, now);
        }
        // Last, because they can be newer than the rest.
        for left in &saved.removed_intents {
            self.state.adopt_intent(left, now);
        }
        // A new process needs all backends in its table before it accepts sessions.
        self.state.pending.at_once = true;
        let effects = self.finish(now);
        self.resume_turns(saved);
        self.adopt_counts(saved);
        effects
    }

    /// Restores the counts only, after sessions of the other process have ended.
    pub fn adopt_counts(&mut self, saved: &Saved) {
        let of = |counts: &BTreeMap<String, u64>, name| counts.get(name).copied().unwrap_or(0);
        self.publisher.carry(PublishReason::ALL.map(|reason| of(&saved.published, reason.name())));
        self.heartbeats.carry(CarriedHeartbeats {
            taken: saved.heartbeats,
            ignored: HeartbeatIgnored::ALL.map(|why| of(&saved.ignored, why.name())),
            excuses: saved.excuses,
        });
        for frontend in &saved.frontends {
            if let Some(entry) = self.state.frontends.named(&frontend.name) {
                carry_frontend(&entry.state, frontend);
            }
        }
        for (pool, backend) in every_backend(saved) {
            if let Some(id) = self.state.find_saved(&pool.name, &backend.name, &backend.address)
                && let Some(entry) = self.state.backends.get(id)
            {
                carry_backend(&entry.state, backend);
            }
        }
    }

    /// Returns the state of the configured backend that another process knows by these
    /// names.
    pub fn saved_state(&self, pool: &str, name: &str, address: &str) -> Option<&BackendState> {
        let id = self.state.find_saved(pool, name, address)?;
        self.state.backends.get(id).map(|entry| &*entry.state)
    }

    /// Whether every backend that is eligible in another process is eligible here. Ignores
    /// backends that are not configured here and cannot register.
    pub fn serves_as(&self, saved: &Saved) -> bool {
        let expected = every_backend(saved).filter(|(_, backend)| backend.eligible);
        expected.into_iter().all(|(pool, backend)| {
            let Some(entry) = self.state.pools.named(&pool.name) else {
                return true;
            };
            match self.state.find_saved(&pool.name, &backend.name, &backend.address) {
                Some(id) => self.state.backends.get(id).is_none_or(|entry| entry.health.eligible()),
                // The file lacks the backend. It is missing only if it can register.
                None => !entry.spec.heartbeat.as_ref().is_some_and(|spec| spec.register),
            }
        })
    }

    fn adopt_pool(&mut self, saved: &SavedPool, now: Instant) {
        let Some(pool) = self.state.pools.named(&saved.name).map(|pool| pool.id) else {
            for backend in saved.backends.iter().filter(|one| one.intent != Intent::Ready.name()) {
                self.state.keep_intent(saved, backend, now);
            }
            return;
        };
        let is_watched = self.state.pool(pool).and_then(watched).is_some();
        if let Some(ms) = saved.in_service_ms
            && let Some(pool) = self.state.pools.observe(pool)
        {
            pool.in_service_since = Some(ago(now, ms));
        }
        self.heartbeats.drop_unregistered(&mut self.state, saved, now);
        for backend in &saved.backends {
            let intent = Intent::named(&backend.intent);
            if self.state.adopt_saved_group(&saved.name, backend, intent, now) {
                continue;
            }
            let id = self.state.find_saved(&saved.name, &backend.name, &backend.address);
            let Some(id) = id.or_else(|| self.state.adopt_registered(saved, backend, now)) else {
                self.state.keep_intent(saved, backend, now);
                continue;
            };
            self.heartbeats.adopt_heartbeats(&mut self.state, id, backend, now);
            let has_agent = self.state.has_agent(id);
            let Some(entry) = self.state.backends.touch(id) else { continue };
            if let Some(intent) = Intent::named(&backend.intent) {
                entry.health.intent = intent;
                entry.health.intent_since = ago(now, backend.intent_ms);
            }
            adopt_health(entry, backend, has_agent, now);
            self.state.schedule.end_verified(entry);
            let (pool, name) = (&entry.state.pool, &entry.state.name);
            entry.history.adopt(&backend.history, (pool, name), now);
            if let Some(ms) = backend.observed_ms {
                entry.observed_since = ago(now, ms);
            }
            entry.adopt_released(backend.released_ms.map(|ms| ago(now, ms)));
            if is_watched {
                entry.health.slow.restore(&backend.watch, now);
                if entry.health.slow.is_suspect() {
                    self.state.ejections.note(entry);
                }
            }
            match entry.health.outlier.until() {
                Some(until) => {
                    self.state.ejections.note(entry);
                    self.state.schedule.set(TimerKind::EjectionEnds(id), until);
                }
                None => self.state.schedule.cancel(TimerKind::EjectionEnds(id)),
            }
            self.state.pending.unsettled.insert(entry.pool);
            if backend.eligible {
                self.state.adopt_ramp(id, backend.ramp_ms.map(Duration::from_millis), now);
            }
        }
        self.adopt_startup(saved);
    }

    /// Ends the startup phase of a pool whose saved state has results, or fails open.
    fn adopt_startup(&mut self, saved: &SavedPool) {
        let Some(id) = self.state.pools.named(&saved.name).map(|pool| pool.id) else { return };
        let Some(pool) = self.state.pools.observe(id) else { return };
        let judged = |id: &BackendId| {
            let entry = self.state.backends.get(*id);
            entry.is_some_and(|entry| entry.health.observation() != Observation::Unknown)
        };
        pool.verification.fails_open |= pool.spec.probe.is_none() && saved.open;
        if pool.spec.probe.is_none() || pool.startup == StartupGrace::Decided {
            return;
        }
        if pool.members().iter().any(judged) {
            pool.startup = StartupGrace::Decided;
        } else if saved.open {
            pool.startup = StartupGrace::FailingOpen;
        } else {
            return;
        }
        self.state.schedule.cancel(TimerKind::GraceEnds(id));
    }

    /// Returns the configured backend that another process knows by these names.
    pub fn find_saved(&self, pool: &str, name: &str, address: &str) -> Option<BackendId> {
        self.state.find_saved(pool, name, address)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Returns the configured backend that another process knows by these names.
    pub(super) fn find_saved(&self, pool: &str, name: &str, address: &str) -> Option<BackendId> {
        let id = self.find_backend(pool, name).ok()?;
        let entry = self.backends.get(id)?;
        (*entry.state.address_text == *address).then_some(id)
    }
}

fn adopt_health(entry: &mut BackendEntry, saved: &SavedBackend, has_agent: bool, now: Instant) {
    if let Some(detector) = &mut entry.health.detector {
        match Observation::named(&saved.observation) {
            None | Some(Observation::Unknown) => {
                // A result of this process is newer.
                if detector.observation() == Observation::Unknown {
                    entry.health.fails_open = saved.fails_open;
                }
            }
            Some(verdict) => {
                detector.restore(verdict, ago(now, saved.observation_ms));
                detector.set_role(saved.role.as_ref().and_then(|role| role.seen(now)));
                if let Some(agent) = saved.agent.as_ref().filter(|_| has_agent) {
                    agent.restore(detector, now);
                }
                entry.health.fails_open = false;
            }
        }
    }
    entry.adopt_verification(saved);
    entry.health.outlier.restore(&saved.outlier, now);
}

fn save_backend(entry: &BackendEntry, history: usize, now: Instant) -> SavedBackend {
    let (state, health) = (&entry.state, &entry.health);
    let age = |since: Instant| millis(now.saturating_duration_since(since));
    let sum = |read: fn(&crate::table::state::BackendCounters) -> u64| state.counters.sum(read);
    SavedBackend {
        name: state.name.to_string(),
        address: state.address_text.to_string(),
        intent: health.intent.name().to_owned(),
        intent_ms: age(health.intent_since),
        eligible: health.eligible(),
        observation: health.probed().unwrap_or(Observation::Unknown).name().to_owned(),
        observation_ms: health.detector.as_ref().map_or(0, |detector| age(detector.since())),
        role: health.seen_role().map(|role| SavedRole::of(role, now)),
        agent: health.detector.as_ref().and_then(|detector| SavedAgent::of(detector, now)),
        fails_open: health.fails_open,
        unverified: health.unverified,
        outlier: health.outlier.save(now),
        watch: health.slow.save(now),
        ramp_ms: entry.ramp.map(|ramp| age(ramp.since)),
        sessions: sum(|c| c.sessions.get()),
        connect_failures: sum(|c| c.connect_failures.get()),
        bytes_in: sum(|c| c.bytes_in.get()),
        bytes_out: sum(|c| c.bytes_out.get()),
        registered: entry.origins.is_registered(),
        heartbeats: entry.heartbeats.as_ref().map(|heartbeats| heartbeats.save(now)),
        requested_ms: age(entry.requested_since),
        observed_ms: Some(age(entry.observed_since)),
        released_ms: entry.released_since().map(age),
        history: entry.history.save(history, now),
    }
}

pub(super) fn every_backend(saved: &Saved) -> impl Iterator<Item = (&SavedPool, &SavedBackend)> {
    saved.pools.iter().flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)))
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn ago(now: Instant, ms: u64) -> Instant {
    // `checked_sub` fails if the host has been up for less than `ms`.
    now.checked_sub(Duration::from_millis(ms)).unwrap_or(now)
}
