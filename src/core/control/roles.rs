//! Roles of backends, and pools that use the backends of another pool (`of`).
//!
//! Called by the controller for probe results and at the end of each event. `health::role`
//! says which primary is in force.
//!
//! - A pool with `of` **follows** another pool: it has the same members, and each takes the
//!   results of probes and heartbeats from the member of the same name. No probe runs for
//!   it. Its weights, sessions, ejections and drains are its own.
//! - The members follow within the event that changed the other pool. So both pools change
//!   in one table, and a demoted primary leaves one when it joins the other.

use super::backends::BackendEntry;
use super::heartbeats::HeartbeatWatch;
use super::members::{ListedMember, MemberSource, Origins};
use super::pools::{PoolEntry, PoolId, StartupGrace};
use super::schedule::TimerKind;
use super::state::ControlState;
use super::{ControlEffect, Notice, NoticeFields, NoticeLevel};
use crate::discovery::view::MemberWish;
use crate::health::probe_detector::ProbeDetector;
use crate::health::role::{SeenRole, in_force};
use crate::health::{HeartbeatHealth, LastProbe, LastProbes, Observation, RequestedState};
use crate::model::{NodeRole, PoolConfig, Words};
use crate::table::state::BackendId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

/// Most names of primaries in a notice.
const NAMED_MAX: usize = 5;

/// A role in a handover.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedRole {
    /// Name of the role.
    pub role: String,
    /// Age of the role.
    pub ms: u64,
    /// Another role was seen before.
    pub changed: bool,
}

/// What a member takes from the member that it follows.
#[derive(Debug, Clone, PartialEq)]
struct FollowedFacts {
    detector: Option<ProbeDetector>,
    last_probe: Option<Box<LastProbe>>,
    probes: LastProbes,
    heartbeat_health: HeartbeatHealth,
    requested: (RequestedState, Instant),
    wish: (MemberWish, Instant),
    wished_by: Option<Arc<str>>,
    unverified: bool,
    fails_open: bool,
}

// === impl SavedRole ===

impl SavedRole {
    pub(super) fn of(seen: SeenRole, now: Instant) -> SavedRole {
        SavedRole {
            role: seen.role.word().to_owned(),
            ms: super::handover::millis(now.saturating_duration_since(seen.since)),
            changed: seen.changed,
        }
    }

    /// Returns the role; `None` if a newer program has saved a role that this one lacks.
    pub(super) fn seen(&self, now: Instant) -> Option<SeenRole> {
        let role = NodeRole::all().find(|role| role.word() == self.role)?;
        Some(SeenRole { role, since: super::handover::ago(now, self.ms), changed: self.changed })
    }
}

// === impl FollowedFacts ===

impl FollowedFacts {
    fn of(entry: &BackendEntry) -> FollowedFacts {
        let health = &entry.health;
        FollowedFacts {
            detector: health.detector.clone(),
            last_probe: entry.last_probe.clone(),
            probes: entry.probes.clone(),
            heartbeat_health: health.heartbeat_health,
            requested: (health.requested, entry.requested_since),
            wish: (health.wish, entry.wish_since),
            wished_by: entry.wished_by.clone(),
            unverified: health.unverified,
            fails_open: health.fails_open,
        }
    }

    fn apply(self, entry: &mut BackendEntry) {
        entry.health.detector = self.detector;
        entry.last_probe = self.last_probe;
        entry.probes = self.probes;
        entry.health.heartbeat_health = self.heartbeat_health;
        (entry.health.requested, entry.requested_since) = self.requested;
        (entry.health.wish, entry.wish_since) = self.wish;
        entry.wished_by = self.wished_by;
        entry.health.unverified = self.unverified;
        entry.health.fails_open = self.fails_open;
    }
}

// === impl ControlState ===

impl ControlState {
    /// Finds the pools that follow each pool, after a reload.
    pub(super) fn link_followers(&mut self) {
        let pools = self.pools.iter();
        let pairs: Vec<(PoolId, PoolId)> = pools
            .filter_map(|pool| Some((self.pools.named(pool.spec.of.as_deref()?)?.id, pool.id)))
            .collect();
        self.pools.link(&pairs);
        self.pending.refit.extend(pairs.into_iter().map(|(base, _)| base));
    }

    /// Returns the members of the pool that `pool` follows, as it lists them.
    pub(super) fn followed_members<'a>(
        &'a self,
        pool: &PoolConfig,
    ) -> impl Iterator<Item = (ListedMember<'a>, Origins)> {
        let base = pool.of.as_deref().and_then(|name| self.pools.named(name));
        let ids = base.into_iter().flat_map(PoolEntry::members);
        ids.filter_map(|id| self.backends.get(*id)).map(ListedMember::followed)
    }

    /// Returns the member whose probes decide for this one: itself, if its pool follows no
    /// other.
    pub(super) fn probed_member(&self, id: BackendId) -> Option<BackendId> {
        let entry = self.backends.get(id)?;
        match &self.pool(entry.pool)?.spec.of {
            Some(base) => self.pools.named(base)?.member_named(&entry.spec.name),
            None => Some(id),
        }
    }

    /// Records the role in the answer of a probe; `None`: the answer has none.
    pub(super) fn see_role(&mut self, id: BackendId, role: Option<NodeRole>, now: Instant) {
        let Some(entry) = self.backends.observe(id) else { return };
        let Some(detector) = &mut entry.health.detector else { return };
        let Some(role) = role else {
            if detector.role().is_some() {
                detector.set_role(None);
                self.backends.touch(id);
            }
            return;
        };
        if detector.role().is_some_and(|seen| seen.role == role) {
            return;
        }
        let before = detector.see_role(role, now);
        self.backends.touch(id);
        if let Some(before) = before {
            self.record_role(id, before, role, now);
        }
    }

    fn record_role(&mut self, id: BackendId, before: SeenRole, role: NodeRole, now: Instant) {
        let lasted = now.saturating_duration_since(before.since);
        let reason = "a probe found another role".to_owned();
        self.record(id, (before.role.word(), role.word()), reason, lasted, now);
    }

    /// Gives the pools that follow others the same members.
    pub(super) fn follow_members(&mut self, heartbeats: &mut HeartbeatWatch, now: Instant) {
        while let Some(base) = self.pending.refit.pop_first() {
            let followers = self.pool(base).map(|pool| pool.followers.clone()).unwrap_or_default();
            for follower in followers {
                if self.fit_members(heartbeats, follower, now) {
                    self.pools.note_change(follower);
                }
            }
        }
    }

    /// Gives the members of following pools what changed in this event.
    pub(super) fn follow_health(&mut self, now: Instant) {
        if !self.pools.any_followed() {
            return;
        }
        for id in self.changed_backends() {
            let Some(entry) = self.backends.get(id) else { continue };
            let Some(pool) = self.pool(entry.pool) else { continue };
            let name = Arc::clone(&entry.spec.name);
            // A following pool can list a member that the other pool already has.
            let bases = pool.spec.of.as_deref().and_then(|base| self.pools.named(base));
            let base = bases.map_or(pool, |base| base);
            let Some(base_id) = base.member_named(&name) else { continue };
            for follower in base.followers.clone() {
                let member = self.pool(follower).and_then(|pool| pool.member_named(&name));
                if let Some(member) = member {
                    self.follow(member, base_id, now);
                }
            }
        }
    }

    /// Returns the backends that changed in this event, or whose change waits for a table.
    pub(super) fn changed_backends(&self) -> BTreeSet<BackendId> {
        self.backends.touched().union(self.backends.waiting()).copied().collect()
    }

    fn follow(&mut self, id: BackendId, base: BackendId, now: Instant) {
        let (Some(base), Some(entry)) = (self.backends.get(base), self.backends.get(id)) else {
            return;
        };
        let facts = FollowedFacts::of(base);
        if facts == FollowedFacts::of(entry) {
            return;
        }
        let newest = base.history.last().filter(|change| change.at == now);
        let reason = newest.map_or_else(
            || format!("as in pool {}", base.state.pool),
            |change| change.reason.clone(),
        );
        let (before, role) = (entry.health.observation(), entry.health.seen_role());
        let Some(entry) = self.backends.touch(id) else { return };
        facts.apply(entry);
        let (after, seen) = (entry.health.observation(), entry.health.seen_role());
        let pool = entry.pool;
        if after == Observation::Up && before != after {
            entry.health.outlier.restart_row();
        }
        if before != after {
            let lasted = now.saturating_duration_since(entry.observed_since);
            entry.observed_since = now;
            self.record(id, (before.name(), after.name()), reason, lasted, now);
        }
        if let (Some(role), Some(seen)) = (role, seen)
            && role.role != seen.role
        {
            self.record_role(id, role, seen.role, now);
        }
        if after != Observation::Unknown
            && let Some(pool) = self.pools.observe(pool)
            && pool.startup != StartupGrace::Decided
        {
            pool.startup = StartupGrace::Decided;
            self.schedule.cancel(TimerKind::GraceEnds(pool.id));
        }
    }

    /// Finds the primary in force in each pool with a role that has changed.
    pub(super) fn settle_roles(&mut self, now: Instant) {
        if !self.pools.any_role() {
            return;
        }
        let changed = self.changed_backends();
        let pools: BTreeSet<PoolId> =
            changed.iter().filter_map(|id| Some(self.backends.get(*id)?.pool)).collect();
        for pool in pools {
            let needed = self.pool(pool).and_then(|pool| pool.spec.role);
            if needed == Some(NodeRole::Primary) {
                self.rank_primaries(pool);
            }
            if needed.is_some() {
                self.seek_role(pool, now);
            }
        }
    }

    /// Sets which primaries of a pool are not in force.
    fn rank_primaries(&mut self, id: PoolId) {
        let Some(pool) = self.pool(id) else { return };
        let (mut primaries, mut seen) = (Vec::new(), Vec::new());
        for entry in pool.members().iter().filter_map(|id| self.backends.get(*id)) {
            let is_alive = matches!(
                entry.health.combined_observation(),
                Observation::Up | Observation::Suspect
            );
            let role = entry.health.seen_role().filter(|seen| seen.role == NodeRole::Primary);
            if let Some(role) = role.filter(|_| is_alive) {
                primaries.push(entry.state.id);
                seen.push(role);
            }
        }
        let winner = in_force(&seen, pool.spec.startup_grace).map(|place| primaries[place]);
        for member in pool.members().to_vec() {
            let outranked = primaries.contains(&member) && winner != Some(member);
            let before = self.backends.get(member).map(|entry| entry.health.role.outranked);
            if before.is_some_and(|before| before != outranked)
                && let Some(entry) = self.backends.touch(member)
            {
                entry.health.role.outranked = outranked;
            }
        }
        self.notice_primaries(id, &primaries, winner);
    }

    /// Logs that a pool has several primaries, and that it has one again.
    fn notice_primaries(&mut self, id: PoolId, primaries: &[BackendId], winner: Option<BackendId>) {
        let several = primaries.len() > 1;
        let Some(pool) = self.pools.observe(id) else { return };
        if std::mem::replace(&mut pool.has_several_primaries, several) == several {
            return;
        }
        let name = Arc::clone(&pool.spec.name);
        let names =
            |id: &BackendId| self.backends.get(*id).map(|entry| entry.spec.name.to_string());
        let mut listed: Vec<String> = primaries.iter().filter_map(names).take(NAMED_MAX).collect();
        if primaries.len() > NAMED_MAX {
            listed.push("others".to_owned());
        }
        let in_force = winner.as_ref().and_then(names).unwrap_or_else(|| "none".to_owned());
        let mut fields =
            NoticeFields { evidence: Some(listed.join(", ")), ..NoticeFields::default() };
        let (level, message) = match several {
            true => {
                fields.reason = Some(format!("in force: {in_force}"));
                fields.help = "stop the others or make them replicas";
                (NoticeLevel::Warn, "several backends are primaries; at most one gets sessions")
            }
            false => (NoticeLevel::Info, "at most one backend is a primary again"),
        };
        let notice = Notice { level, pool: name, backend: None, message, fields };
        self.pending.effects.push(ControlEffect::Notice(Box::new(notice)));
    }

    /// While no backend of the pool is eligible, probes look for its role at
    /// `fast_interval`.
    fn seek_role(&mut self, id: PoolId, now: Instant) {
        let Some(pool) = self.pool(id) else { return };
        let members = || pool.members().iter().filter_map(|id| self.backends.get(*id));
        let seeks = !members().any(|entry| entry.health.eligible());
        if pool.seeks_role == seeks {
            return;
        }
        let base = pool.spec.of.as_deref().and_then(|base| self.pools.named(base));
        let base = base.unwrap_or(pool).id;
        if let Some(pool) = self.pools.observe(id) {
            pool.seeks_role = seeks;
        }
        let members = self.pool(base).map(|pool| pool.members().to_vec()).unwrap_or_default();
        for member in members.into_iter().filter(|_| seeks) {
            self.bring_probe_forward(member, now);
        }
    }

    /// Whether the pool, or one that follows it, has no backend with the role it needs.
    pub(super) fn seeks_role(&self, pool: &PoolEntry) -> bool {
        let follower = |id: &PoolId| self.pool(*id).is_some_and(|pool| pool.seeks_role);
        pool.seeks_role || pool.followers.iter().any(follower)
    }
}

/// Returns the members of a pool with `of` that the file does not list, as they were before.
/// [`ControlState::follow_members`] removes those that left.
pub(super) fn followed<'a>(
    pool: &PoolConfig,
    old: Option<&'a PoolEntry>,
    known: &'a BTreeMap<BackendId, BackendEntry>,
) -> impl Iterator<Item = ListedMember<'a>> {
    let follows = pool.of.is_some();
    let members = old.into_iter().filter(move |_| follows).flat_map(PoolEntry::members);
    let entries = members.filter_map(|id| known.get(id));
    let joined = entries.filter(|entry| !entry.origins.contains(MemberSource::File));
    joined.map(|entry| ListedMember::of(MemberSource::Discovery, &entry.spec))
}
