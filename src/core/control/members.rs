//! The members of a pool: merges the lists of all member sources.
//!
//! Called by `configure` for the file, by `heartbeats` for senders that register, and by
//! `views` for names and registries. This module queries no source.
//!
//! - A backend has a set of origins and leaves with the last of them.
//! - If two sources disagree about a name or an address, the file takes precedence, then
//!   heartbeats, then names in file order, then the pool's `discover` table.
//! - Heartbeats of a backend that the file lists report its health only. When the file
//!   lists a registered backend, heartbeats are no longer an origin of it.
//! - Heartbeats add and remove members one by one, because a set per datagram would cost a
//!   scan of the pool. The other sources list complete sets.
//! - The most restrictive wish of all sources that list a backend holds.

use super::backends::BackendEntry;
use super::heartbeats::HeartbeatWatch;
use super::pools::{PoolEntry, PoolId};
use super::schedule::TimerKind;
use super::state::ControlState;
use crate::discovery::view::MemberWish;
use crate::health::HeartbeatHealth;
use crate::model::{BackendAddr, BackendConfig, PoolConfig};
use crate::table::state::BackendId;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A source of a pool's members, in order of precedence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemberSource {
    /// The configuration file.
    File,
    /// Signed heartbeats.
    Heartbeats,
    /// A backend of the file whose address is a name.
    Names,
    /// The pool's `discover` table.
    Discovery,
}

/// The sources that list a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Origins(u8);

/// Why what a source told, or one of its members, was ignored; the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MembersIgnored {
    /// No pool has this name.
    UnknownPool,
    /// The pool has no such source.
    UnknownSource,
    /// More members than `hash_slots` of the pool.
    TooMany,
    /// Another source uses the member's name or address, or a frontend is bound to the
    /// address.
    Conflict,
}

/// A member as one source lists it.
#[derive(Debug, Clone, Copy)]
pub(super) struct ListedMember<'a> {
    pub(super) source: MemberSource,
    pub(super) spec: &'a BackendConfig,
    /// What the source wishes for it.
    pub(super) wish: MemberWish,
    /// The source and its words for the wish.
    pub(super) said: Option<(&'a Arc<str>, &'a Arc<str>)>,
    /// The backend of the file whose name has its address.
    pub(super) group: Option<&'a Arc<str>>,
}

/// A member as all sources list it.
#[derive(Debug, Clone)]
pub(super) struct PoolMember {
    pub(super) spec: BackendConfig,
    pub(super) origins: Origins,
    pub(super) wish: MemberWish,
    /// Which source has this wish, with its words.
    pub(super) said: String,
    /// The source whose wish restricts it.
    pub(super) wished_by: Option<Arc<str>>,
    pub(super) group: Option<Arc<str>>,
}

/// Members that were ignored at the last merge, so that each counts once.
pub(super) type IgnoredSet = HashSet<(MembersIgnored, MemberSource, Arc<str>)>;

/// The members of a pool, merged from all its sources.
#[derive(Debug, Default)]
pub(super) struct MergedMembers<'a> {
    /// By precedence of the source, then in its order.
    pub(super) list: Vec<(ListedMember<'a>, Origins)>,
    ignored: IgnoredSet,
    /// Positions in `list`.
    by_name: HashMap<&'a str, usize>,
    by_address: HashMap<&'a BackendAddr, usize>,
}

/// How the members of a pool differ from what its sources list.
#[derive(Debug, Default)]
struct MemberChanges {
    join: Vec<PoolMember>,
    alter: Vec<(BackendId, PoolMember)>,
    leave: Vec<BackendId>,
    ignored: IgnoredSet,
}

// === impl MemberSource ===

impl MemberSource {
    fn bit(self) -> u8 {
        1 << self as u8
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

    /// Whether names or registries list the backend, and nothing else does.
    pub fn is_discovered(self) -> bool {
        self != Origins::default()
            && !self.contains(MemberSource::File)
            && !self.contains(MemberSource::Heartbeats)
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
    pub const ALL: [MembersIgnored; 4] = [
        MembersIgnored::UnknownPool,
        MembersIgnored::UnknownSource,
        MembersIgnored::TooMany,
        MembersIgnored::Conflict,
    ];

    /// Returns the label value in metrics.
    pub fn name(self) -> &'static str {
        match self {
            MembersIgnored::UnknownPool => "unknown-pool",
            MembersIgnored::UnknownSource => "unknown-source",
            MembersIgnored::TooMany => "too-many",
            MembersIgnored::Conflict => "conflict",
        }
    }
}

// === impl ListedMember ===

impl<'a> ListedMember<'a> {
    /// Returns a member without a wish.
    pub(super) fn of(source: MemberSource, spec: &'a BackendConfig) -> ListedMember<'a> {
        let wish = MemberWish::Sessions;
        ListedMember { source, spec, wish, said: None, group: None }
    }

    /// Returns a member of a pool as a pool that follows it lists it. Its wish comes with its
    /// health.
    pub(super) fn followed(entry: &'a BackendEntry) -> (ListedMember<'a>, Origins) {
        let listed = ListedMember {
            wish: entry.health.wish,
            group: entry.group.as_ref(),
            ..ListedMember::of(MemberSource::File, &entry.spec)
        };
        (listed, entry.origins)
    }

    fn owned(&self, origins: Origins) -> PoolMember {
        let said = |(label, raw): (&Arc<str>, &Arc<str>)| match raw.is_empty() {
            true => label.to_string(),
            false => format!("{label}: {raw}"),
        };
        PoolMember {
            spec: self.spec.clone(),
            origins,
            wish: self.wish,
            said: self.said.map_or_else(String::new, said),
            wished_by: self.wished_by().cloned(),
            group: self.group.cloned(),
        }
    }

    /// Returns the source whose wish restricts the member.
    fn wished_by(&self) -> Option<&'a Arc<str>> {
        let restricts = self.wish != MemberWish::Sessions;
        self.said.filter(|_| restricts).map(|(label, _)| label)
    }

    /// Whether the backend is as listed.
    fn is_same(&self, origins: Origins, entry: &BackendEntry) -> bool {
        entry.origins == origins
            && entry.spec == *self.spec
            && entry.health.wish == self.wish
            && entry.wished_by.as_ref() == self.wished_by()
            && entry.group.as_ref() == self.group
    }
}

// === impl PoolMember ===

impl PoolMember {
    /// Returns a member that heartbeats register.
    pub(super) fn registered(spec: BackendConfig) -> PoolMember {
        PoolMember {
            spec,
            origins: Origins::of(MemberSource::Heartbeats),
            wish: MemberWish::Sessions,
            said: String::new(),
            wished_by: None,
            group: None,
        }
    }
}

/// How much a wish restricts a backend.
fn strictness(wish: MemberWish) -> u8 {
    match wish {
        MemberWish::Sessions => 0,
        MemberWish::Suspect => 1,
        MemberWish::Starting => 2,
        MemberWish::Draining => 3,
    }
}

/// Returns the name of a wish in transitions.
pub(super) fn wish_name(wish: MemberWish) -> &'static str {
    match wish {
        MemberWish::Sessions => "ready",
        MemberWish::Suspect => "suspect",
        MemberWish::Starting => "starting",
        MemberWish::Draining => "draining",
    }
}

// === impl MergedMembers ===

impl<'a> MergedMembers<'a> {
    /// Merges `members`, which must be sorted by precedence of their source. `reserved` are
    /// the names that no source may use; `is_own` tells the addresses of frontends.
    pub(super) fn of(
        pool: &PoolConfig,
        members: impl Iterator<Item = ListedMember<'a>>,
        is_own: impl Fn(&BackendAddr) -> bool,
    ) -> MergedMembers<'a> {
        let mut merged = MergedMembers::default();
        let reserved: HashSet<&str> = pool.named.iter().map(|named| &*named.name).collect();
        for member in members {
            let view = matches!(member.source, MemberSource::Names | MemberSource::Discovery);
            if view && (reserved.contains(&*member.spec.name) || is_own(&member.spec.address)) {
                merged.ignore(MembersIgnored::Conflict, &member);
            } else {
                merged.add(member, if view { pool.hash_slots as usize } else { usize::MAX });
            }
        }
        merged
    }

    /// Returns the members of a pool that follows another one, which has merged them.
    fn followed(members: impl Iterator<Item = (ListedMember<'a>, Origins)>) -> MergedMembers<'a> {
        let mut merged = MergedMembers::default();
        for (member, origins) in members {
            merged.by_name.insert(&member.spec.name, merged.list.len());
            merged.by_address.insert(&member.spec.address, merged.list.len());
            merged.list.push((member, origins));
        }
        merged
    }

    fn add(&mut self, member: ListedMember<'a>, max: usize) {
        let named = self.by_name.get(&*member.spec.name).copied();
        let placed = self.by_address.get(&member.spec.address).copied();
        match (named, placed) {
            (None, None) if self.list.len() >= max => {
                self.ignore(MembersIgnored::TooMany, &member);
            }
            (None, None) => {
                self.by_name.insert(&member.spec.name, self.list.len());
                self.by_address.insert(&member.spec.address, self.list.len());
                self.list.push((member, Origins::of(member.source)));
            }
            // The file lists the backend, so heartbeats are no origin of it.
            _ if member.source == MemberSource::Heartbeats => {}
            (Some(named), Some(placed)) if named == placed => {
                let (merged, origins) = &mut self.list[named];
                *origins = origins.with(member.source);
                merged.group = merged.group.or(member.group);
                if strictness(member.wish) > strictness(merged.wish) {
                    (merged.wish, merged.said) = (member.wish, member.said);
                }
            }
            _ => self.ignore(MembersIgnored::Conflict, &member),
        }
    }

    fn ignore(&mut self, why: MembersIgnored, member: &ListedMember<'_>) {
        self.ignored.insert((why, member.source, Arc::clone(&member.spec.name)));
    }

    /// Returns the member with the same name and address.
    fn find(&self, member: &BackendConfig) -> Option<&(ListedMember<'a>, Origins)> {
        let found = self.list.get(*self.by_name.get(&*member.name)?)?;
        (found.0.spec.address == member.address).then_some(found)
    }

    /// Returns the members and the ignored ones.
    pub(super) fn into_owned(self) -> (Vec<PoolMember>, IgnoredSet) {
        let owned = self.list.iter().map(|(member, origins)| member.owned(*origins));
        (owned.collect(), self.ignored)
    }
}

// === impl ControlState ===

impl ControlState {
    /// Compares the members of a pool with what its sources list.
    fn member_changes(&self, pool: &PoolEntry) -> MemberChanges {
        let present = || pool.members().iter().filter_map(|id| self.backends.get(*id));
        let registered = present().filter(|entry| entry.origins.is_registered());
        let registered =
            registered.map(|entry| ListedMember::of(MemberSource::Heartbeats, &entry.spec));
        let listed = pool.spec.backends.iter();
        let listed = listed.map(|member| ListedMember::of(MemberSource::File, member));
        let viewed = self.views.listed(&pool.spec.name);
        let is_own = |address: &BackendAddr| self.is_own(address);
        let merged = match pool.spec.of {
            Some(_) => MergedMembers::followed(self.followed_members(&pool.spec)),
            None => MergedMembers::of(&pool.spec, listed.chain(registered).chain(viewed), is_own),
        };
        let mut changes = MemberChanges::default();
        for entry in present() {
            let id = entry.state.id;
            match merged.find(&entry.spec) {
                Some((member, origins)) if member.is_same(*origins, entry) => {}
                Some((member, origins)) => changes.alter.push((id, member.owned(*origins))),
                None => changes.leave.push(id),
            }
        }
        let known = |member: &BackendConfig| {
            let known = pool.member_named(&member.name).and_then(|id| self.backends.get(id));
            known.is_some_and(|entry| entry.spec.address == member.address)
        };
        let new = merged.list.iter().filter(|(member, _)| !known(member.spec));
        changes.join = new.map(|(member, origins)| member.owned(*origins)).collect();
        changes.ignored = merged.ignored;
        changes
    }

    /// Whether a frontend is bound to the address.
    pub(super) fn is_own(&self, address: &BackendAddr) -> bool {
        match address {
            BackendAddr::Tcp(address) => self.frontends.listens_at(*address),
            // The configuration is checked for loops of these.
            BackendAddr::ClientPort(..) | BackendAddr::Unix(_) => false,
        }
    }

    /// Adds, changes and removes members until the pool matches its sources. Returns
    /// whether anything changed.
    pub(super) fn fit_members(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        id: PoolId,
        now: Instant,
    ) -> bool {
        let Some(pool) = self.pool(id) else { return false };
        let MemberChanges { join, alter, leave, ignored } = self.member_changes(pool);
        self.note_ignored(id, ignored);
        let any = !(join.is_empty() && alter.is_empty() && leave.is_empty());
        for (member, spec) in alter {
            self.alter_member(member, spec, now);
        }
        // A member that only has another name is no newcomer.
        let mut former = self.former_members(&leave);
        for member in &leave {
            let reason = self.backends.get(*member).map(|entry| self.views.left(entry));
            self.leave_quietly(heartbeats, *member, &reason.unwrap_or_default(), now);
        }
        if !leave.is_empty() {
            self.settle_pool_ramps(id, now);
        }
        let count = u32::try_from(join.len()).unwrap_or(u32::MAX);
        for (index, member) in (0..).zip(join) {
            let member = self.join(id, member, (index, count), now);
            self.succeed_former(member, &mut former, now);
            let Some(entry) = self.backends.get(member) else { continue };
            let (reason, to) = (self.views.joined(entry), entry.health.observation().name());
            self.record_lazily(member, ("new", to), reason, Duration::ZERO, now);
        }
        any
    }

    /// Counts the ignored members that were not ignored at the last merge.
    pub(super) fn note_ignored(&mut self, id: PoolId, ignored: IgnoredSet) {
        let Some(pool) = self.pools.observe(id) else { return };
        for one in ignored.difference(&pool.ignored) {
            self.ignored_members[one.0 as usize] += 1;
        }
        pool.ignored = ignored;
    }

    /// Sets the origins of a member, its settings from the first origin, and its wish.
    fn alter_member(&mut self, id: BackendId, member: PoolMember, now: Instant) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let before = std::mem::replace(&mut entry.origins, member.origins);
        entry.spec = member.spec;
        entry.group = member.group;
        entry.wished_by = member.wished_by;
        let pool = entry.pool;
        self.pending.refit.insert(pool);
        self.pools.count_registered(pool, before, member.origins);
        self.set_wish(id, member.wish, &member.said, now);
    }

    /// Sets what the registries wish for a backend, and records a change.
    fn set_wish(&mut self, id: BackendId, wish: MemberWish, said: &str, now: Instant) {
        let Some(entry) = self.backends.touch_later(id) else { return };
        let before = std::mem::replace(&mut entry.health.wish, wish);
        if before == wish {
            return;
        }
        let lasted = now.saturating_duration_since(entry.wish_since);
        entry.wish_since = now;
        let sessions = entry.state.in_flight.get();
        let reason = match wish {
            MemberWish::Sessions => "its member sources wish for sessions again".to_owned(),
            MemberWish::Suspect => format!("wish of a member source: {said}"),
            _ => format!("wish of a member source: {said}; open sessions: {sessions}"),
        };
        self.record_lazily(id, (wish_name(before), wish_name(wish)), reason, lasted, now);
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
        member: PoolMember,
        (index, count): (u32, u32),
        now: Instant,
    ) -> BackendId {
        let Some(pool) = self.pool(pool_id) else {
            unreachable!("the caller has looked up the pool")
        };
        let pool_spec = Arc::clone(&pool.spec);
        let returned = self
            .removed_as(&pool_spec.name, &member.spec)
            .and_then(|id| self.restore_backend(id, now));
        let mut entry = match returned {
            Some(entry) => entry,
            None => self.new_entry(&pool_spec, &member.spec, pool_id, now),
        };
        entry.state.start_from(&pool_spec.source, self.allocator.workers);
        entry.pool = pool_id;
        entry.set_member(member, now);
        entry.health.role.needed = pool_spec.role;
        entry.heartbeats_from = None;
        let heartbeat = pool_spec.heartbeat.as_ref();
        entry.health.heartbeat_health =
            heartbeat.map_or(HeartbeatHealth::Absent, |spec| entry.heartbeat_health(spec, now));
        self.take_intent(&mut entry, now);
        self.begin_verification(&mut entry, &pool_spec, (index, count), now);
        let id = entry.state.id;
        self.ejections.note(&entry);
        self.pending.refit.insert(pool_id);
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
        if let Some(pool) = self.leave_quietly(heartbeats, id, reason, now) {
            self.settle_pool_ramps(pool, now);
        }
    }

    /// As [`ControlState::leave`]; the caller settles the pool's slow starts once for many.
    fn leave_quietly(
        &mut self,
        heartbeats: &mut HeartbeatWatch,
        id: BackendId,
        reason: &str,
        now: Instant,
    ) -> Option<PoolId> {
        let mut entry = self.backends.remove(id)?;
        self.pools.remove_member(&entry);
        let pool = self.pools.get(entry.pool)?;
        let (rule, pool) = (pool.spec.on_removal, pool.id);
        self.pending.unsettled.insert(pool);
        self.pending.refit.insert(pool);
        heartbeats.drop_sender(&mut entry);
        self.remove_backend(entry, reason, rule, now);
        Some(pool)
    }
}

// === impl BackendEntry ===

impl BackendEntry {
    /// Sets what the member sources say of a backend that joins.
    pub(super) fn set_member(&mut self, member: PoolMember, now: Instant) {
        self.spec = member.spec;
        self.origins = member.origins;
        self.group = member.group;
        self.wished_by = member.wished_by;
        if self.health.wish != member.wish {
            (self.health.wish, self.wish_since) = (member.wish, now);
        }
    }
}

/// Returns the pool's registered members; none if `lets_register` is false.
pub(super) fn registered<'a>(
    lets_register: bool,
    old: Option<&'a PoolEntry>,
    known: &'a BTreeMap<BackendId, BackendEntry>,
) -> impl Iterator<Item = ListedMember<'a>> {
    let members = old.into_iter().filter(move |_| lets_register).flat_map(PoolEntry::members);
    let entries = members.filter_map(|id| known.get(id));
    let registered = entries.filter(|entry| entry.origins.is_registered());
    registered.map(|entry| ListedMember::of(MemberSource::Heartbeats, &entry.spec))
}
