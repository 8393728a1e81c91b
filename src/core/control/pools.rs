//! The configured pools, in file order, indexed by id and by name.
//!
//! Filled by `configure`, used by the whole controller. The cost of a look-up does not
//! depend on the number of pools, and neither does the cost of the summary values that
//! heartbeats need. Only this module changes the members and the settling of a pool. It
//! marks the pool as changed if the table becomes outdated. It knows no health.

use super::backends::BackendEntry;
use super::heartbeats::confirmation::confirming;
use super::members::{IgnoredSet, Origins};
use super::publish::detached_build::DetachedBuild;
use super::settling::PoolSettling;
use super::views::verification::{PoolVerification, verifying};
use crate::model;
use crate::model::{BackendAddr, OnDown, OnRecover, ProbeSpec, Tiers};
use crate::suspicion::PathGuard;
use crate::table::state::BackendId;
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// See the module documentation. The name and the id of a pool never change.
#[derive(Debug, Default)]
pub(super) struct PoolSet {
    list: Vec<PoolEntry>,
    by_id: HashMap<PoolId, usize>,
    by_name: HashMap<Arc<str>, usize>,
    /// Number of pools with heartbeats.
    listening: usize,
    /// Shortest heartbeat interval of all pools.
    fastest: Option<Duration>,
    /// The last id given to a pool.
    last_id: u32,
    /// Number of settling pools.
    settling: usize,
    /// Pools whose members or stand-ins have changed since the last table.
    changed: BTreeSet<PoolId>,
    /// Whether any pool follows another one.
    followed: bool,
    /// Whether any pool needs a role.
    role: bool,
    /// Whether sessions leave a backend of any pool that is down.
    leaves: bool,
    /// Whether sessions leave backups of any pool that no longer serve.
    recovers: bool,
}

pub(super) use crate::model::PoolId;

/// A configured pool.
#[derive(Debug)]
pub(super) struct PoolEntry {
    pub(super) id: PoolId,
    pub(super) spec: Arc<model::PoolConfig>,
    /// In file order, then the others by age.
    members: Vec<BackendId>,
    /// Members by name.
    names: HashMap<Arc<str>, BackendId>,
    /// Members by address; filled only if the pool has heartbeats or member sources.
    addresses: HashMap<SocketAddr, BackendId>,
    /// Number of registered members.
    registered: usize,
    /// Present while no backend is eligible and some have no result yet.
    settling: Option<PoolSettling>,
    /// Listed members that were ignored at the last merge.
    pub(super) ignored: IgnoredSet,
    pub(super) startup: StartupGrace,
    /// Whether the file configures a tier above 0 for the pool, or a member source can.
    pub(super) has_tiers: bool,
    pub(super) full_noticed: Option<Instant>,
    /// Guard against many simultaneous suspicions.
    pub(super) guard: PathGuard,
    /// The probe that confirms suspicions.
    pub(super) confirming: Arc<ProbeSpec>,
    /// The connect that verifies members of names and registries.
    pub(super) verifying: Arc<ProbeSpec>,
    pub(super) verification: PoolVerification,
    /// Since when at least one backend is eligible; `None`: none is.
    pub(super) in_service_since: Option<Instant>,
    /// The pools that follow this one (`of`).
    pub(super) followers: Vec<PoolId>,
    /// The pool needs a role that no eligible backend has.
    pub(super) seeks_role: bool,
    /// More than one backend is a primary; noticed once.
    pub(super) has_several_primaries: bool,
    /// Present if the pool is so large that another thread builds its table part.
    pub(super) detached: Option<DetachedBuild>,
}

/// Startup phase of a pool with probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartupGrace {
    /// No result yet; unknown backends wait.
    Waiting { since: Instant },
    /// No result within `startup_grace`; unknown backends are eligible.
    FailingOpen,
    /// The pool has had a result, or has no probe.
    Decided,
}

// === impl PoolSet ===

impl PoolSet {
    /// Adds a pool with a new name and id.
    pub(super) fn push(&mut self, pool: PoolEntry) {
        self.by_id.insert(pool.id, self.list.len());
        self.by_name.insert(Arc::clone(&pool.spec.name), self.list.len());
        if let Some(spec) = &pool.spec.heartbeat {
            self.listening += 1;
            self.fastest = Some(self.fastest.map_or(spec.interval, |so| so.min(spec.interval)));
        }
        self.settling += usize::from(pool.settling.is_some());
        self.role |= pool.spec.role.is_some();
        self.leaves |= pool.spec.on_down != OnDown::Keep;
        self.recovers |= pool.spec.on_recover != OnRecover::Keep;
        self.list.push(pool);
    }

    /// Sets which pools follow which: each pair is a pool and a follower of it.
    pub(super) fn link(&mut self, pairs: &[(PoolId, PoolId)]) {
        self.followed = !pairs.is_empty();
        for (base, follower) in pairs {
            if let Some(pool) = self.observe(*base) {
                pool.followers.push(*follower);
            }
        }
    }

    /// Whether any pool follows another one.
    pub(super) fn any_followed(&self) -> bool {
        self.followed
    }

    /// Whether any pool needs a role.
    pub(super) fn any_role(&self) -> bool {
        self.role
    }

    /// Whether sessions leave a backend of any pool that is down.
    pub(super) fn any_leaves(&self) -> bool {
        self.leaves
    }

    /// Whether sessions leave backups of any pool that no longer serve.
    pub(super) fn any_recovers(&self) -> bool {
        self.recovers
    }

    pub(super) fn get(&self, id: PoolId) -> Option<&PoolEntry> {
        self.list.get(*self.by_id.get(&id)?)
    }

    /// Returns the pool for a change that does not affect the table.
    pub(super) fn observe(&mut self, id: PoolId) -> Option<&mut PoolEntry> {
        self.list.get_mut(*self.by_id.get(&id)?)
    }

    /// Returns the pool's position in file order.
    pub(super) fn place(&self, id: PoolId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// Returns the pool at this position in file order.
    pub(super) fn at(&self, place: usize) -> Option<&PoolEntry> {
        self.list.get(place)
    }

    pub(super) fn named(&self, name: &str) -> Option<&PoolEntry> {
        self.list.get(*self.by_name.get(name)?)
    }

    /// Returns all pools in file order.
    pub(super) fn iter(&self) -> std::slice::Iter<'_, PoolEntry> {
        self.list.iter()
    }

    /// Returns the number of pools with heartbeats.
    pub(super) fn listening(&self) -> usize {
        self.listening
    }

    /// Returns the shortest heartbeat interval of all pools.
    pub(super) fn fastest(&self) -> Option<Duration> {
        self.fastest
    }

    /// Removes and returns all pools.
    pub(super) fn take(&mut self) -> Vec<PoolEntry> {
        let last_id = self.last_id;
        std::mem::replace(self, PoolSet { last_id, ..PoolSet::default() }).list
    }

    /// Returns an unused id.
    pub(super) fn next_id(&mut self) -> PoolId {
        self.last_id += 1;
        PoolId(self.last_id)
    }

    /// Adds a backend to its pool. The table becomes outdated only when the backend is
    /// eligible, or if shares of tiers depend on the number of members.
    pub(super) fn add_member(&mut self, entry: &BackendEntry) {
        let Some(pool) = self.observe(entry.pool) else { return };
        pool.add(entry);
        if pool.spec.tiers == Tiers::Spill {
            self.changed.insert(entry.pool);
        }
    }

    /// Updates the number of registered members after a member's origins have changed.
    pub(super) fn count_registered(&mut self, pool: PoolId, before: Origins, now: Origins) {
        if let Some(pool) = self.observe(pool) {
            pool.registered -= usize::from(before.is_registered());
            pool.registered += usize::from(now.is_registered());
        }
    }

    /// Marks the pool as changed: the next table lists its current members.
    pub(super) fn note_change(&mut self, pool: PoolId) {
        self.changed.insert(pool);
    }

    /// Removes a backend from its pool. A table that lists the backend becomes outdated.
    pub(super) fn remove_member(&mut self, entry: &BackendEntry) {
        let Some(pool) = self.observe(entry.pool) else { return };
        let id = entry.state.id;
        pool.members.retain(|member| *member != id);
        pool.registered -= usize::from(entry.origins.is_registered());
        if pool.names.get(&entry.spec.name) == Some(&id) {
            pool.names.remove(&entry.spec.name);
        }
        if let BackendAddr::Tcp(address) = entry.state.address
            && pool.addresses.get(&address) == Some(&id)
        {
            pool.addresses.remove(&address);
        }
        let counts = pool.spec.tiers == Tiers::Spill;
        if counts || entry.published != Default::default() {
            self.changed.insert(entry.pool);
        }
    }

    /// Whether any pool is settling.
    pub(super) fn any_settling(&self) -> bool {
        self.settling > 0
    }

    /// Begins or ends the pool's settling, during a reload.
    pub(super) fn set_settling(&mut self, id: PoolId, settling: Option<PoolSettling>) {
        let Some(place) = self.place(id) else { return };
        let pool = &mut self.list[place];
        self.settling -= usize::from(pool.settling.is_some());
        self.settling += usize::from(settling.is_some());
        pool.settling = settling;
    }

    /// Ends the pool's settling. Returns true if the table becomes outdated.
    pub(super) fn end_settling(&mut self, id: PoolId) -> bool {
        let ends = self.get(id).is_some_and(|pool| pool.settling.is_some());
        if ends {
            self.set_settling(id, None);
            self.changed.insert(id);
        }
        ends
    }

    /// Removes a former backend from the stand-ins. Returns true if a table becomes
    /// outdated.
    pub(super) fn remove_stand_in(&mut self, id: BackendId) -> bool {
        let mut any = false;
        for pool in &mut self.list {
            let Some(settling) = &mut pool.settling else { continue };
            let before = settling.stand_ins.len();
            settling.stand_ins.retain(|one| *one != id);
            if settling.stand_ins.len() != before {
                self.changed.insert(pool.id);
                any = true;
            }
        }
        any
    }

    /// Returns the pools whose members differ from the table.
    pub(super) fn changed(&self) -> &BTreeSet<PoolId> {
        &self.changed
    }

    /// Clears the changed pools, because a table of them was built or is being built.
    pub(super) fn clear_changed(&mut self) {
        self.changed.clear();
    }
}

impl<'a> IntoIterator for &'a PoolSet {
    type Item = &'a PoolEntry;
    type IntoIter = std::slice::Iter<'a, PoolEntry>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.iter()
    }
}

// === impl PoolEntry ===

impl PoolEntry {
    /// Returns a pool without members that keeps the state of `old`.
    pub(super) fn new(
        id: PoolId,
        spec: &Arc<model::PoolConfig>,
        startup: StartupGrace,
        old: Option<PoolEntry>,
    ) -> PoolEntry {
        let mut pool = PoolEntry {
            id,
            spec: Arc::clone(spec),
            members: Vec::with_capacity(spec.backends.len()),
            names: HashMap::new(),
            addresses: HashMap::new(),
            registered: 0,
            settling: None,
            ignored: IgnoredSet::default(),
            startup,
            has_tiers: has_sources(spec) || spec.backends.iter().any(|backend| backend.tier > 0),
            full_noticed: None,
            guard: PathGuard::default(),
            confirming: confirming(spec),
            verifying: verifying(spec),
            verification: PoolVerification::default(),
            in_service_since: None,
            followers: Vec::new(),
            seeks_role: false,
            has_several_primaries: false,
            detached: None,
        };
        if let Some(old) = old {
            pool.detached = old.detached;
            pool.has_several_primaries = old.has_several_primaries && spec.role.is_some();
            pool.in_service_since = old.in_service_since;
            pool.settling = old.settling;
            pool.ignored = old.ignored;
            pool.verification = old.verification;
            if spec.heartbeat.is_some() {
                pool.guard = old.guard;
                pool.full_noticed = old.full_noticed;
            }
        }
        pool
    }

    /// Adds a member.
    pub(super) fn add(&mut self, entry: &BackendEntry) {
        self.members.push(entry.state.id);
        self.names.insert(Arc::clone(&entry.spec.name), entry.state.id);
        self.registered += usize::from(entry.origins.is_registered());
        if let BackendAddr::Tcp(address) = entry.state.address
            && (self.spec.heartbeat.is_some() || has_sources(&self.spec))
        {
            self.addresses.insert(address, entry.state.id);
        }
    }

    /// Returns the members in file order, then the others by age.
    pub(super) fn members(&self) -> &[BackendId] {
        &self.members
    }

    /// Returns the member with this name.
    pub(super) fn member_named(&self, name: &str) -> Option<BackendId> {
        self.names.get(name).copied()
    }

    /// Returns the member at this address. `None` if the pool has neither heartbeats nor
    /// member sources.
    pub(super) fn member_at(&self, address: SocketAddr) -> Option<BackendId> {
        self.addresses.get(&address).copied()
    }

    /// Returns the number of registered members.
    pub(super) fn registered(&self) -> usize {
        self.registered
    }

    /// Returns the settling for a change of its end.
    pub(super) fn settling_mut(&mut self) -> Option<&mut PoolSettling> {
        self.settling.as_mut()
    }

    /// Returns the settling, while no backend is eligible and some have no result yet.
    pub(super) fn settling(&self) -> Option<&PoolSettling> {
        self.settling.as_ref()
    }
}

/// Whether names or a `discover` table bring members.
fn has_sources(pool: &model::PoolConfig) -> bool {
    pool.discover.is_some() || !pool.named.is_empty()
}
