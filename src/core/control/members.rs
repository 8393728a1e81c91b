//! The members of a pool: merges the lists of all member sources.
//!
//! Called by `configure` for the file, by `heartbeats` for senders that register, and by
//! the controller for [`ControlEvent::Members`]. This module queries no source.
//!
//! - A backend has a set of origins and leaves with the last of them.
//! - If two sources disagree about a name or an address, the file takes precedence, then
//!   heartbeats, then the source with the lower number.
//! - Heartbeats of a backend that the file lists report its health only. When the file
//!   lists a registered backend, heartbeats are no longer an origin of it.
//! - Heartbeats add and remove members one by one, because a set per datagram would cost a
//!   scan of the pool. The other sources send complete sets.
//!
//! [`ControlEvent::Members`]: super::ControlEvent::Members

use super::backends::BackendEntry;
use super::heartbeats::HeartbeatWatch;
use super::pools::{PoolEntry, PoolId};
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::health::HeartbeatHealth;
use crate::model::{BackendAddr, BackendConfig};
use crate::table::state::BackendId;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use crate::discovery::MEMBERS_MAX;

/// A source of a pool's members, in order of precedence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemberSource {
    /// The configuration file.
    File,
    /// Signed heartbeats.
    Heartbeats,
    /// Any other source, such as DNS or a registry; the number is below
    /// [`MemberSource::NUMBERED_MAX`].
    Numbered(u8),
}

/// The sources that list a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Origins(u64);

/// Why a member set, or one of its members, was ignored; the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MembersIgnored {
    /// No pool has this name.
    UnknownPool,
    /// The source is the file or heartbeats, which send no sets, or the number is too large.
    UnknownSource,
    /// The source has sent a newer set.
    OlderRevision,
    /// More than [`MEMBERS_MAX`] members, or more than `hash_slots` of the pool.
    TooMany,
    /// Another source uses the member's name or address, or a frontend is bound to the
    /// address.
    Conflict,
}

/// The newest set of each numbered source of one pool.
#[derive(Debug, Default)]
pub(super) struct MemberSets(BTreeMap<MemberSource, MemberSet>);

#[derive(Debug)]
struct MemberSet {
    revision: u64,
    members: Vec<BackendConfig>,
}

/// The members of a pool, merged from all its sources.
#[derive(Debug, Default)]
pub(super) struct MergedMembers {
    /// By precedence of the source, then in its order.
    pub(super) list: Vec<(BackendConfig, Origins)>,
    /// Members excluded by a source of higher precedence.
    conflicts: u64,
    /// Positions in `list`.
    by_name: HashMap<Arc<str>, usize>,
    by_address: HashMap<BackendAddr, usize>,
}

// === impl MemberSource ===

impl MemberSource {
    /// Upper bound of the number of numbered sources.
    pub const NUMBERED_MAX: u8 = 62;

    fn bit(self) -> u64 {
        1 << match self {
            MemberSource::File => 0,
            MemberSource::Heartbeats => 1,
            MemberSource::Numbered(number) => 2 + number.min(MemberSource::NUMBERED_MAX - 1),
        }
    }
}

// === impl Origins ===

impl Origins {
    /// Returns a set with this source only.
    pub fn of(source: MemberSource) -> Origins {
        Origins(source.bit())
    }

    /// Whether the set contains the source.
    pub fn contains(self, source: MemberSource) -> bool {
        self.0 & source.bit() != 0
    }

    /// Whether heartbeats registered the backend.
    pub fn is_registered(self) -> bool {
        self.contains(MemberSource::Heartbeats)
    }

    pub(super) fn with(self, source: MemberSource) -> Origins {
        Origins(self.0 | source.bit())
    }

    pub(super) fn without(self, source: MemberSource) -> Origins {
        Origins(self.0 & !source.bit())
    }
}

// === impl MembersIgnored ===

impl MembersIgnored {
    /// All reasons.
    pub const ALL: [MembersIgnored; 5] = [
        MembersIgnored::UnknownPool,
        MembersIgnored::UnknownSource,
        MembersIgnored::OlderRevision,
        MembersIgnored::TooMany,
        MembersIgnored::Conflict,
    ];

    /// Returns the label value in metrics.
    pub fn name(self) -> &'static str {
        match self {
            MembersIgnored::UnknownPool => "unknown-pool",
            MembersIgnored::UnknownSource => "unknown-source",
            MembersIgnored::OlderRevision => "older-revision",
            MembersIgnored::TooMany => "too-many",
            MembersIgnored::Conflict => "conflict",
        }
    }
}

// === impl MemberSets ===

impl MemberSets {
    /// Returns the members of all sets.
    pub(super) fn iter(&self) -> impl Iterator<Item = (MemberSource, &BackendConfig)> {
        let sets = self.0.iter();
        sets.flat_map(|(source, set)| set.members.iter().map(move |member| (*source, member)))
    }

    fn is_older(&self, source: MemberSource, revision: u64) -> bool {
        self.0.get(&source).is_some_and(|set| revision < set.revision)
    }

    fn replace(&mut self, source: MemberSource, revision: u64, members: Vec<BackendConfig>) {
        self.0.insert(source, MemberSet { revision, members });
    }
}

// === impl MergedMembers ===

impl MergedMembers {
    /// Merges `members`, which must be sorted by precedence of their source.
    pub(super) fn of<'a>(
        members: impl Iterator<Item = (MemberSource, &'a BackendConfig)>,
    ) -> MergedMembers {
        let mut merged = MergedMembers::default();
        members.for_each(|(source, member)| merged.add(source, member));
        merged
    }

    fn add(&mut self, source: MemberSource, member: &BackendConfig) {
        let named = self.by_name.get(&member.name).copied();
        let placed = self.by_address.get(&member.address).copied();
        match (named, placed) {
            (None, None) => {
                self.by_name.insert(Arc::clone(&member.name), self.list.len());
                self.by_address.insert(member.address.clone(), self.list.len());
                self.list.push((member.clone(), Origins::of(source)));
            }
            // The file lists the backend, so heartbeats are no origin of it.
            _ if source == MemberSource::Heartbeats => {}
            (Some(named), Some(placed)) if named == placed => {
                let origins = &mut self.list[named].1;
                *origins = origins.with(source);
            }
            _ => self.conflicts += 1,
        }
    }

    /// Returns the member with the same name and address.
    fn find(&self, member: &BackendConfig) -> Option<&(BackendConfig, Origins)> {
        let found = self.list.get(*self.by_name.get(&member.name)?)?;
        (found.0.address == member.address).then_some(found)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Applies a member set of a numbered source.
    pub(super) fn take_members(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        source: MemberSource,
        (pool, revision): (&str, u64),
        set: Vec<BackendConfig>,
        now: Instant,
    ) {
        if let Err(why) = self.try_members(heartbeats, source, (pool, revision), set, now) {
            self.ignored_members[why as usize] += 1;
        }
    }

    fn try_members(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        source: MemberSource,
        (pool, revision): (&str, u64),
        mut set: Vec<BackendConfig>,
        now: Instant,
    ) -> Result<(), MembersIgnored> {
        if !matches!(source, MemberSource::Numbered(..MemberSource::NUMBERED_MAX)) {
            return Err(MembersIgnored::UnknownSource);
        }
        let pool = self.pools.named(pool).ok_or(MembersIgnored::UnknownPool)?;
        if pool.sets.is_older(source, revision) {
            return Err(MembersIgnored::OlderRevision);
        }
        let members = pool.members().iter().filter_map(|id| self.backends.get(*id));
        let others = members.filter(|entry| entry.origins != Origins::of(source)).count();
        if set.len() > MEMBERS_MAX || set.len() + others > pool.spec.hash_slots as usize {
            return Err(MembersIgnored::TooMany);
        }
        let (id, all) = (pool.id, set.len());
        set.retain(|member| match &member.address {
            BackendAddr::Tcp(address) => !self.frontends.listens_at(*address),
            BackendAddr::Unix(_) => true,
        });
        self.ignored_members[MembersIgnored::Conflict as usize] += (all - set.len()) as u64;
        if let Some(pool) = self.pools.observe(id) {
            pool.sets.replace(source, revision, set);
        }
        self.fit_members(heartbeats, id, now);
        Ok(())
    }

    /// Adds and removes members until the pool matches its sources.
    fn fit_members(&mut self, heartbeats: &mut HeartbeatWatch, id: PoolId, now: Instant) {
        let Some(pool) = self.pool(id) else { return };
        let present = || pool.members().iter().filter_map(|id| self.backends.get(*id));
        let registered = present().filter(|entry| entry.origins.is_registered());
        let registered = registered.map(|entry| (MemberSource::Heartbeats, &entry.spec));
        let listed = pool.spec.backends.iter().map(|member| (MemberSource::File, member));
        let merged = MergedMembers::of(listed.chain(registered).chain(pool.sets.iter()));
        let members = pool.members().to_vec();
        let is_new = |member: &BackendConfig| {
            let known = pool.member_named(&member.name).and_then(|id| self.backends.get(id));
            known.is_none_or(|entry| entry.spec.address != member.address)
        };
        let new: Vec<(BackendConfig, Origins)> =
            merged.list.iter().filter(|(member, _)| is_new(member)).cloned().collect();
        self.ignored_members[MembersIgnored::Conflict as usize] += merged.conflicts;
        for member in members {
            let Some(entry) = self.backends.get(member) else { continue };
            match merged.find(&entry.spec) {
                Some((spec, origins)) => self.set_origins(member, spec, *origins),
                None => self.leave(heartbeats, member, "removed from every member source", now),
            }
        }
        let count = u32::try_from(new.len()).unwrap_or(u32::MAX);
        for (index, (spec, origins)) in (0..).zip(new) {
            let member = self.join(id, spec, origins, (index, count), now);
            let reason = "added by a member source".to_owned();
            self.record_lazily(member, ("new", "unknown"), reason, Duration::ZERO, now);
        }
    }

    /// Sets the origins of a member, and its settings from the first origin.
    fn set_origins(&mut self, id: BackendId, spec: &BackendConfig, origins: Origins) {
        let is_same = |entry: &BackendEntry| entry.origins == origins && entry.spec == *spec;
        if self.backends.get(id).is_some_and(is_same) {
            return;
        }
        let Some(entry) = self.backends.touch_later(id) else { return };
        let before = std::mem::replace(&mut entry.origins, origins);
        entry.spec = spec.clone();
        self.pools.count_registered(entry.pool, before, origins);
    }

    /// Removes heartbeats from the origins of a backend. The backend leaves unless another
    /// source lists it.
    pub(super) fn withdraw_registration(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        id: BackendId,
        reason: &str,
        now: Instant,
    ) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let origins = entry.origins.without(MemberSource::Heartbeats);
        if origins == Origins::default() {
            self.leave(heartbeats, id, reason, now);
            return;
        }
        let before = std::mem::replace(&mut entry.origins, origins);
        heartbeats.drop_sender(entry);
        let pool = entry.pool;
        self.pools.count_registered(pool, before, origins);
        for timer in [TimerKind::Heartbeat(id), TimerKind::HeartbeatTtl(id), TimerKind::Forget(id)]
        {
            self.schedule.cancel(timer);
        }
        self.clear_sender_state(id, now);
        if let Some(spec) = self.pool(pool).and_then(|pool| pool.spec.heartbeat.clone())
            && let Some(entry) = self.backends.touch_later(id)
        {
            entry.health.heartbeat_health = entry.heartbeat_health(&spec, now);
        }
        self.fit_members(heartbeats, pool, now);
    }

    /// Adds a member to the pool, or restores a removed one. It is number `index` of
    /// `count` that join together.
    pub(super) fn join(
        &mut self,
        pool_id: PoolId,
        spec: BackendConfig,
        origins: Origins,
        (index, count): (u32, u32),
        now: Instant,
    ) -> BackendId {
        let Some(pool) = self.pool(pool_id) else {
            unreachable!("the caller has looked up the pool")
        };
        let pool_spec = Arc::clone(&pool.spec);
        let returned =
            self.removed_as(&pool_spec.name, &spec).and_then(|id| self.restore_backend(id, now));
        let mut entry = match returned {
            Some(entry) => entry,
            None => self.new_entry(&pool_spec, &spec, pool_id, now),
        };
        entry.state.start_from(&pool_spec.source, self.allocator.workers);
        entry.pool = pool_id;
        entry.spec = spec;
        entry.origins = origins;
        entry.heartbeats_from = None;
        let heartbeat = pool_spec.heartbeat.as_ref();
        entry.health.heartbeat_health =
            heartbeat.map_or(HeartbeatHealth::Absent, |spec| entry.heartbeat_health(spec, now));
        self.take_intent(&mut entry, now);
        let id = entry.state.id;
        self.ejections.note(&entry);
        self.pools.add_member(&entry);
        self.backends.insert(entry);
        self.join_probing(id, pool_id, (index, count), now);
        id
    }

    /// Removes a member from its pool.
    pub(super) fn leave(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        id: BackendId,
        reason: &str,
        now: Instant,
    ) {
        let Some(mut entry) = self.backends.remove(id) else { return };
        self.pools.remove_member(&entry);
        let Some(pool) = self.pools.get(entry.pool) else { return };
        let (rule, pool) = (pool.spec.on_removal, pool.id);
        self.pending.unsettled.insert(pool);
        heartbeats.drop_sender(&mut entry);
        self.remove_backend(entry, reason, rule, now);
        self.settle_pool_ramps(pool, now);
    }
}

/// Returns the pool's registered members; none if `lets_register` is false.
pub(super) fn registered<'a>(
    lets_register: bool,
    old: Option<&'a PoolEntry>,
    known: &'a BTreeMap<BackendId, BackendEntry>,
) -> impl Iterator<Item = (MemberSource, &'a BackendConfig)> {
    let members = old.into_iter().filter(move |_| lets_register).flat_map(PoolEntry::members);
    let entries = members.filter_map(|id| known.get(id));
    let registered = entries.filter(|entry| entry.origins.is_registered());
    registered.map(|entry| (MemberSource::Heartbeats, &entry.spec))
}
