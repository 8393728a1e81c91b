//! Applies a new configuration.
//!
//! Called by the controller for each accepted configuration. A frontend is identified by
//! its name, a backend by pool, name and address. A frontend or backend that is still
//! configured keeps its state. This module changes no session: removed backends go to
//! `removal`.

use super::backends::BackendEntry;
use super::heartbeats::HeartbeatWatch;
use super::members::{
    IgnoredSet, ListedMember, MemberSource, MergedMembers, PoolMember, registered,
};
use super::pools::{PoolEntry, PoolId, StartupGrace};
use super::removal::BackendKey;
use super::roles::followed;
use super::schedule::{TimerKind, after};
use super::state::ControlState;
use super::{Controller, PublishReason};
use crate::health::agent::AgentState;
use crate::health::ejection::EjectionState;
use crate::health::probe_detector::ProbeDetector;
use crate::health::{BackendHealth, Observation};
use crate::model;
use crate::model::{BackendAddr, Config, EjectionSpec, OnRemoval, ProbeKind, ProbeSpec};
use crate::table::state::BackendId;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// The state before the reload.
struct PreviousConfig {
    /// By pool name.
    pools: HashMap<Arc<str>, PoolEntry>,
    backends: BTreeMap<BackendId, BackendEntry>,
    /// Configured and removed backends.
    known: HashMap<BackendKey, BackendId>,
    /// Probe detectors by address, with the probe settings.
    verdicts: HashMap<BackendAddr, Vec<(Arc<ProbeSpec>, ProbeDetector)>>,
    /// Ejections by address, with the ejection settings.
    ejections: HashMap<BackendAddr, Vec<(EjectionSpec, EjectionState)>>,
}

/// How a backend got into the new configuration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum JoinKind {
    /// It was configured before.
    Kept,
    /// It is new, or was removed before.
    Joined,
}

/// What a reload does with a backend's probes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ProbePlan {
    /// Schedule and row continue, or the pool has no probe.
    Continue,
    /// The schedule restarts.
    Start,
}

// === impl Controller ===

impl Controller {
    /// Applies a validated configuration whose listeners are bound.
    pub(super) fn configure(&mut self, config: &Config, now: Instant) {
        self.publisher.configured(config.process.connections_max);
        let (state, heartbeats) = (&mut self.state, &mut self.heartbeats);
        let former = state.former();
        state.frontends.configure(config, &mut state.allocator, &mut state.removed_names);
        let dropped = state.views.configure(config, now);
        state.configure_groups(config, now);
        let mut before = state.take_before();
        let mut starting = Vec::new();
        for spec in &config.pools {
            state.configure_pool(heartbeats, spec, &mut before, &mut starting, now);
        }
        state.link_followers();
        state.remove_rest(heartbeats, before, now);
        state.schedule_views(dropped, now);
        state.begin_settling(&former, now);
        state.start_all(&starting, now);
        self.slow.configure(state, now);
        state.pending.unsettled.extend(state.pools.iter().map(|pool| pool.id));
        state.pending.rebuild = Some(PublishReason::Configuration);
    }
}

// === impl ControlState ===

impl ControlState {
    /// Returns the probe detectors by address. A backend with a new name at the same
    /// address starts with the detector.
    fn verdicts(&self) -> HashMap<BackendAddr, Vec<(Arc<ProbeSpec>, ProbeDetector)>> {
        let mut verdicts: HashMap<_, Vec<_>> = HashMap::new();
        for pool in &self.pools {
            let Some(spec) = &pool.spec.probe else { continue };
            for entry in pool.members().iter().filter_map(|id| self.backends.get(*id)) {
                if let Some(detector) = &entry.health.detector
                    && detector.observation() != Observation::Unknown
                {
                    let found = (Arc::clone(spec), detector.clone());
                    verdicts.entry(entry.state.address.clone()).or_default().push(found);
                }
            }
        }
        verdicts
    }

    /// Returns the current ejections by address. A backend with a new name at the same
    /// address stays ejected.
    fn ejections(&self) -> HashMap<BackendAddr, Vec<(EjectionSpec, EjectionState)>> {
        let mut ejections: HashMap<_, Vec<_>> = HashMap::new();
        for (pool, id) in self.ejections.ejected() {
            let spec = self.pool(pool).and_then(|pool| pool.spec.ejection);
            let entry = self.backends.get(id).filter(|entry| entry.health.outlier.is_ejected());
            if let (Some(spec), Some(entry)) = (spec, entry) {
                let found = (spec, entry.health.outlier.clone());
                ejections.entry(entry.state.address.clone()).or_default().push(found);
            }
        }
        ejections
    }

    fn take_before(&mut self) -> PreviousConfig {
        let (verdicts, ejections) = (self.verdicts(), self.ejections());
        let pools = self.pools.take();
        let backends = self.backends.take();
        let mut known = HashMap::new();
        // Removed backends first, so that a configured backend replaces a removed one of
        // the same identity.
        for entry in self.removed.iter().chain(backends.values()) {
            let state = &entry.state;
            let name = (Arc::clone(&state.pool), Arc::clone(&state.name));
            known.insert((name.0, name.1, state.address.clone()), state.id);
        }
        let pools = pools.into_iter().map(|pool| (Arc::clone(&pool.spec.name), pool)).collect();
        PreviousConfig { pools, backends, known, verdicts, ejections }
    }

    fn configure_pool(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        spec: &Arc<model::PoolConfig>,
        before: &mut PreviousConfig,
        starting: &mut Vec<BackendId>,
        now: Instant,
    ) {
        let old = before.pools.remove(&spec.name);
        let id = old.as_ref().map_or_else(|| self.pools.next_id(), |old| old.id);
        let old_probe = old.as_ref().and_then(|old| old.spec.probe.clone());
        let mut members = Vec::with_capacity(spec.backends.len());
        let (merged, ignored) = self.merge_members(spec, old.as_ref(), before);
        let count = u32::try_from(merged.len()).unwrap_or(u32::MAX);
        let old_heartbeat = old.as_ref().and_then(|old| old.spec.heartbeat.clone());
        for (index, member) in (0..).zip(merged) {
            let backend = member.spec.clone();
            let (mut entry, arrival) = self.find_or_create(spec, &backend, id, before, now);
            let was_needed = old_heartbeat.as_ref().is_some_and(|old| entry.needs_heartbeats(old));
            entry.set_member(member, now);
            entry.health.role.needed = spec.role;
            if arrival == JoinKind::Joined {
                self.take_intent(&mut entry, now);
            }
            if arrival == JoinKind::Joined
                && let Some(verdict) = before.verdict(&backend.address, spec.probe.as_deref())
            {
                entry.health.detector = Some(verdict);
            }
            if arrival == JoinKind::Joined
                && entry.health.outlier.counts_failures()
                && let Some(ejected) = before.ejection(&backend.address, spec.ejection)
                && let Some(until) = ejected.until().filter(|until| *until > now)
            {
                entry.health.outlier = ejected.for_renamed_backend();
                self.schedule.set(TimerKind::EjectionEnds(entry.state.id), until);
            }
            let known = entry.health.clone();
            if old.as_ref().is_none_or(|old| old.spec.ejection.is_none()) {
                // Without ejection settings, no row was measured.
                entry.health.outlier.restart_row();
            }
            let plan =
                respecify(&mut entry, old_probe.as_deref(), spec.probe.as_deref(), arrival, now);
            let unprepared = arrival == JoinKind::Kept && !was_needed;
            heartbeats.configure(self, &mut entry, spec, unprepared, now);
            self.configure_verification(&mut entry, spec, arrival, (index, count), now);
            let backend = entry.state.id;
            self.ejections.note(&entry);
            members.push(backend);
            self.backends.insert(entry);
            match plan {
                ProbePlan::Start => starting.push(backend),
                ProbePlan::Continue => {}
            }
            if spec.probe.is_none() {
                self.unprobed(backend, &known, now);
            }
        }
        let startup = self.startup(old.as_ref(), spec, &members, now);
        self.enter_startup(id, spec, &members, startup, now);
        let mut pool = PoolEntry::new(id, spec, startup, old);
        members.iter().filter_map(|id| self.backends.get(*id)).for_each(|entry| pool.add(entry));
        self.pools.push(pool);
        self.note_ignored(id, ignored);
        self.arm_grace(id, now);
    }

    /// Returns what all sources of a pool list, and the ignored members.
    fn merge_members(
        &self,
        spec: &model::PoolConfig,
        old: Option<&PoolEntry>,
        before: &PreviousConfig,
    ) -> (Vec<PoolMember>, IgnoredSet) {
        let listed = spec.backends.iter();
        let listed = listed.map(|member| ListedMember::of(MemberSource::File, member));
        let lets_register = spec.heartbeat.as_ref().is_some_and(|spec| spec.register);
        let registered = registered(lets_register, old, &before.backends);
        let viewed = self.views.listed(&spec.name);
        let followed = followed(spec, old, &before.backends);
        let members = listed.chain(registered).chain(viewed).chain(followed);
        MergedMembers::of(spec, members, |address| self.is_own(address)).into_owned()
    }

    /// Begins, continues or ends the verification of a backend after a reload.
    fn configure_verification(
        &mut self,
        entry: &mut BackendEntry,
        pool: &model::PoolConfig,
        arrival: JoinKind,
        order: (u32, u32),
        now: Instant,
    ) {
        let was_out = entry.health.unverified;
        if arrival == JoinKind::Joined {
            self.begin_verification(entry, pool, order, now);
        } else if pool.probe.is_some() || !entry.origins.is_discovered() {
            let fails_open = entry.health.fails_open && !was_out;
            self.end_verification(entry);
            entry.health.fails_open = fails_open;
        }
    }

    /// Cancels the probe timers of a backend whose pool has no probe, and records that a
    /// backend found down is now unknown.
    fn unprobed(&mut self, id: BackendId, known: &BackendHealth, now: Instant) {
        self.schedule.cancel(TimerKind::Probe(id));
        self.schedule.cancel(TimerKind::ProbeLost(id));
        if known.observation() == Observation::Down {
            let names = (Observation::Down.name(), Observation::Unknown.name());
            let lasted = now.saturating_duration_since(known.settled_since());
            self.record(id, names, "the pool no longer has probes".to_owned(), lasted, now);
        }
    }

    fn find_or_create(
        &mut self,
        pool: &model::PoolConfig,
        spec: &model::BackendConfig,
        pool_id: PoolId,
        before: &mut PreviousConfig,
        now: Instant,
    ) -> (BackendEntry, JoinKind) {
        let identity = (Arc::clone(&pool.name), Arc::clone(&spec.name), spec.address.clone());
        if let Some(id) = before.known.get(&identity) {
            let found = match before.backends.remove(id) {
                Some(entry) => Some((entry, JoinKind::Kept)),
                None => self.restore_backend(*id, now).map(|entry| (entry, JoinKind::Joined)),
            };
            if let Some((mut entry, arrival)) = found {
                entry.pool = pool_id;
                entry.spec = spec.clone();
                entry.state.start_from(&pool.source, self.allocator.workers);
                return (entry, arrival);
            }
        }
        (self.new_entry(pool, spec, pool_id, now), JoinKind::Joined)
    }

    /// Creates a new backend.
    pub(super) fn new_entry(
        &mut self,
        pool: &model::PoolConfig,
        spec: &model::BackendConfig,
        pool_id: PoolId,
        now: Instant,
    ) -> BackendEntry {
        let state = self.allocator.backend(Arc::clone(&pool.name), spec);
        state.start_from(&pool.source, self.allocator.workers);
        BackendEntry::new(state, pool_id, spec.clone(), now)
    }

    /// Starts the probing of a backend that joins a pool between reloads.
    pub(super) fn join_probing(
        &mut self,
        id: BackendId,
        pool: PoolId,
        order: (u32, u32),
        now: Instant,
    ) {
        let Some(pool) = self.pools.observe(pool) else { return };
        let Some(entry) = self.backends.touch_later(id) else { return };
        let plan = respecify(entry, None, pool.spec.probe.as_deref(), JoinKind::Joined, now);
        if plan == ProbePlan::Continue {
            return;
        }
        if pool.members().len() == 1 {
            // The first member: no backend could have had a result.
            pool.startup = StartupGrace::Waiting { since: now };
            let grace = TimerKind::GraceEnds(pool.id);
            self.schedule.set(grace, after(now, pool.spec.startup_grace));
        }
        entry.health.fails_open |= pool.startup == StartupGrace::FailingOpen;
        self.start_probing(id, order, now);
    }

    /// Returns the pool's startup phase after the reload.
    fn startup(
        &self,
        old: Option<&PoolEntry>,
        spec: &model::PoolConfig,
        members: &[BackendId],
        now: Instant,
    ) -> StartupGrace {
        let judged = |id: &BackendId| {
            self.backends
                .get(*id)
                .is_some_and(|entry| entry.health.combined_observation() != Observation::Unknown)
        };
        if spec.probe.is_none() || members.iter().any(judged) {
            return StartupGrace::Decided;
        }
        match old {
            Some(old) if old.spec.probe.is_some() && old.startup != StartupGrace::Decided => {
                old.startup
            }
            _ => StartupGrace::Waiting { since: now },
        }
    }

    /// Schedules the end of the grace. In a pool that fails open, new members fail open too.
    fn enter_startup(
        &mut self,
        id: PoolId,
        spec: &model::PoolConfig,
        members: &[BackendId],
        startup: StartupGrace,
        now: Instant,
    ) {
        self.schedule.cancel(TimerKind::GraceEnds(id));
        match startup {
            StartupGrace::Waiting { .. } if members.is_empty() => {}
            StartupGrace::Waiting { since } => {
                self.schedule
                    .set(TimerKind::GraceEnds(id), after(since, spec.startup_grace).max(now));
            }
            StartupGrace::FailingOpen => {
                for member in members {
                    if let Some(entry) = self.backends.touch(*member) {
                        entry.health.fails_open = true;
                    }
                }
            }
            StartupGrace::Decided => {}
        }
    }

    /// Removes the pools and backends that the new configuration does not list.
    fn remove_rest(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        before: PreviousConfig,
        now: Instant,
    ) {
        let mut on_removal: HashMap<PoolId, OnRemoval> =
            self.pools.iter().map(|pool| (pool.id, pool.spec.on_removal)).collect();
        for pool in before.pools.values() {
            self.schedule.cancel(TimerKind::GraceEnds(pool.id));
            self.schedule.cancel(TimerKind::SettlingEnds(pool.id));
            if let Some(detached) = &pool.detached {
                detached.reopen();
            }
            // The pool was removed with its backends; its last `on_removal` applies.
            on_removal.insert(pool.id, pool.spec.on_removal);
            self.removed_names.keep_pool(pool.id, &pool.spec.name);
        }
        for mut entry in before.backends.into_values() {
            let rule = on_removal.get(&entry.pool).copied().unwrap_or(OnRemoval::Keep);
            heartbeats.drop_sender(&mut entry);
            self.remove_backend(entry, "removed from the configuration", rule, now);
        }
    }

    fn start_all(&mut self, starting: &[BackendId], now: Instant) {
        let count = u32::try_from(starting.len()).unwrap_or(u32::MAX);
        for (index, id) in (0..count).zip(starting) {
            self.start_probing(*id, (index, count), now);
        }
    }
}

// === impl PreviousConfig ===

impl PreviousConfig {
    /// Returns the newest detector at this address with the same probe settings.
    fn verdict(&self, address: &BackendAddr, spec: Option<&ProbeSpec>) -> Option<ProbeDetector> {
        let found = self.verdicts.get(address)?.iter();
        let same = found.filter(|(probe, _)| Some(&**probe) == spec);
        same.map(|(_, detector)| detector).max_by_key(|detector| detector.since()).cloned()
    }

    /// Returns the longest ejection at this address with the same ejection settings.
    fn ejection(
        &self,
        address: &BackendAddr,
        spec: Option<EjectionSpec>,
    ) -> Option<&EjectionState> {
        let found = self.ejections.get(address)?.iter();
        let same = found.filter(|(rule, _)| Some(*rule) == spec);
        same.map(|(_, outlier)| outlier).max_by_key(|outlier| outlier.until())
    }
}

/// Applies the pool's probe settings to the backend's detector. Changed settings keep the
/// observation and restart the row.
fn respecify(
    entry: &mut BackendEntry,
    old: Option<&ProbeSpec>,
    new: Option<&ProbeSpec>,
    arrival: JoinKind,
    now: Instant,
) -> ProbePlan {
    let Some(new) = new else {
        entry.health.detector = None;
        entry.health.fails_open &= entry.health.unverified;
        if let Some(probe) = &mut entry.in_flight {
            probe.stale = true;
        }
        return ProbePlan::Continue;
    };
    match &mut entry.health.detector {
        Some(_) if arrival == JoinKind::Kept && old == Some(new) => return ProbePlan::Continue,
        Some(detector) => {
            detector.retune(new.rise, new.fall);
            if !new.kind.finds_roles() {
                detector.set_role(None);
            }
            if !matches!(new.kind, ProbeKind::Agent { .. }) {
                detector.set_agent(AgentState::default(), now);
            }
        }
        None => {
            entry.health.detector = Some(ProbeDetector::new(new.rise, new.fall, now));
            // A kept backend was in rotation without a probe.
            entry.health.fails_open = arrival == JoinKind::Kept;
        }
    }
    ProbePlan::Start
}
