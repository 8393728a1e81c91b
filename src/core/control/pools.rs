//! The configured pools, in file order, found by number and by name.
//!
//! Filled by `configure`, used by the whole controller. Every look-up costs the same
//! however many pools there are, and so does what heartbeats ask of all of them: that is
//! kept up to date as pools are added. A pool's members and its settling change here
//! alone, and the pool is noted where its table is wrong by that. It knows nothing of
//! health.

use super::backends::BackendEntry;
use super::heartbeats::confirmation::confirming;
use super::members::{MemberSets, Origins};
use super::publish::detached_build::DetachedBuild;
use super::settling::PoolSettling;
use crate::model;
use crate::model::{BackendAddr, ProbeSpec};
use crate::suspicion::PathGuard;
use crate::table::state::BackendId;
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// See the module's documentation. A pool's name and number never change.
#[derive(Debug, Default)]
pub(super) struct PoolSet {
    list: Vec<PoolEntry>,
    by_id: HashMap<PoolId, usize>,
    by_name: HashMap<Arc<str>, usize>,
    /// Pools that take heartbeats.
    listening: usize,
    /// The shortest interval among them.
    fastest: Option<Duration>,
    /// The last number given to a pool.
    last_id: u32,
    /// How many of them are settling.
    settling: usize,
    /// Members came or went, or may stand in no more, since the last table.
    changed: BTreeSet<PoolId>,
}

/// Names a pool for as long as its name stays configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PoolId(pub(super) u32);

impl PoolId {
    /// No pool has this number.
    pub(super) const NONE: PoolId = PoolId(0);
}

/// A configured pool.
#[derive(Debug)]
pub(super) struct PoolEntry {
    pub(super) id: PoolId,
    pub(super) spec: Arc<model::PoolConfig>,
    /// In file order, then registered ones by age.
    members: Vec<BackendId>,
    /// Members by name.
    names: HashMap<Arc<str>, BackendId>,
    /// Members by address; kept where heartbeats are taken.
    addresses: HashMap<SocketAddr, BackendId>,
    /// Members that are registered.
    registered: usize,
    /// While none of its backends serves and some have no verdict yet.
    settling: Option<PoolSettling>,
    /// What numbered sources say of its members.
    pub(super) sets: MemberSets,
    pub(super) startup: StartupGrace,
    /// Whether the file has backups for it.
    pub(super) has_backups: bool,
    pub(super) full_noticed: Option<Instant>,
    /// Whether many fell silent together.
    pub(super) guard: PathGuard,
    /// How a suspicion is confirmed.
    pub(super) confirming: Arc<ProbeSpec>,
    /// Since when some backend serves; `None`: none does.
    pub(super) in_service_since: Option<Instant>,
    /// Where it is so large that its part of a table is made on another thread.
    pub(super) detached: Option<DetachedBuild>,
}

/// How far a pool with probes is in getting to know its backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartupGrace {
    /// No result yet; unknown backends wait.
    Waiting { since: Instant },
    /// No result came within `startup_grace`: unknown backends serve.
    FailingOpen,
    /// There was a result (or there is no probe).
    Decided,
}

// === impl PoolSet ===

impl PoolSet {
    /// Adds a pool whose name and number are new.
    pub(super) fn push(&mut self, pool: PoolEntry) {
        self.by_id.insert(pool.id, self.list.len());
        self.by_name.insert(Arc::clone(&pool.spec.name), self.list.len());
        if let Some(spec) = &pool.spec.heartbeat {
            self.listening += 1;
            self.fastest = Some(self.fastest.map_or(spec.interval, |so| so.min(spec.interval)));
        }
        self.settling += usize::from(pool.settling.is_some());
        self.list.push(pool);
    }

    pub(super) fn get(&self, id: PoolId) -> Option<&PoolEntry> {
        self.list.get(*self.by_id.get(&id)?)
    }

    /// The pool, for what no table is made of: its table is not noted as wrong.
    pub(super) fn observe(&mut self, id: PoolId) -> Option<&mut PoolEntry> {
        self.list.get_mut(*self.by_id.get(&id)?)
    }

    /// Its place in file order.
    pub(super) fn place(&self, id: PoolId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// The pool at that place in file order.
    pub(super) fn at(&self, place: usize) -> Option<&PoolEntry> {
        self.list.get(place)
    }

    pub(super) fn named(&self, name: &str) -> Option<&PoolEntry> {
        self.list.get(*self.by_name.get(name)?)
    }

    /// In file order.
    pub(super) fn iter(&self) -> std::slice::Iter<'_, PoolEntry> {
        self.list.iter()
    }

    /// How many of them take heartbeats.
    pub(super) fn listening(&self) -> usize {
        self.listening
    }

    /// The shortest interval at which one of them expects heartbeats.
    pub(super) fn fastest(&self) -> Option<Duration> {
        self.fastest
    }

    /// Takes all of them out.
    pub(super) fn take(&mut self) -> Vec<PoolEntry> {
        let last_id = self.last_id;
        std::mem::replace(self, PoolSet { last_id, ..PoolSet::default() }).list
    }

    /// A number that no pool has had.
    pub(super) fn next_id(&mut self) -> PoolId {
        self.last_id += 1;
        PoolId(self.last_id)
    }

    /// A backend joins its pool. Its table is wrong once the backend may take sessions.
    pub(super) fn add_member(&mut self, entry: &BackendEntry) {
        if let Some(pool) = self.observe(entry.pool) {
            pool.add(entry);
        }
    }

    /// The origins of a member have changed.
    pub(super) fn count_registered(&mut self, pool: PoolId, before: Origins, now: Origins) {
        if let Some(pool) = self.observe(pool) {
            pool.registered -= usize::from(before.is_registered());
            pool.registered += usize::from(now.is_registered());
        }
    }

    /// The next table of the pool has to be made of its members of now.
    pub(super) fn note_change(&mut self, pool: PoolId) {
        self.changed.insert(pool);
    }

    /// A backend leaves its pool; a table that knows it is wrong.
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
        if entry.published != Default::default() {
            self.changed.insert(entry.pool);
        }
    }

    /// Whether any pool is settling.
    pub(super) fn any_settling(&self) -> bool {
        self.settling > 0
    }

    /// Begins or ends the pool's settling, as part of a reload.
    pub(super) fn set_settling(&mut self, id: PoolId, settling: Option<PoolSettling>) {
        let Some(place) = self.place(id) else { return };
        let pool = &mut self.list[place];
        self.settling -= usize::from(pool.settling.is_some());
        self.settling += usize::from(settling.is_some());
        pool.settling = settling;
    }

    /// Ends the pool's settling; true if its table is wrong by that.
    pub(super) fn end_settling(&mut self, id: PoolId) -> bool {
        let ends = self.get(id).is_some_and(|pool| pool.settling.is_some());
        if ends {
            self.set_settling(id, None);
            self.changed.insert(id);
        }
        ends
    }

    /// A former backend stands in no more; true if some pool's table is wrong by that.
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

    /// Pools whose tables are wrong by their members.
    pub(super) fn changed(&self) -> &BTreeSet<PoolId> {
        &self.changed
    }

    /// A table was made of all that changed, or is being made.
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
    /// A pool without members that goes on with what is known of `old`.
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
            sets: MemberSets::default(),
            startup,
            has_backups: spec.backends.iter().any(|backend| backend.backup),
            full_noticed: None,
            guard: PathGuard::default(),
            confirming: confirming(spec),
            in_service_since: None,
            detached: None,
        };
        if let Some(old) = old {
            pool.detached = old.detached;
            pool.in_service_since = old.in_service_since;
            pool.settling = old.settling;
            pool.sets = old.sets;
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
            && self.spec.heartbeat.is_some()
        {
            self.addresses.insert(address, entry.state.id);
        }
    }

    /// In file order, then registered ones by age.
    pub(super) fn members(&self) -> &[BackendId] {
        &self.members
    }

    /// The member of that name.
    pub(super) fn member_named(&self, name: &str) -> Option<BackendId> {
        self.names.get(name).copied()
    }

    /// The member at that address, where heartbeats are taken.
    pub(super) fn member_at(&self, address: SocketAddr) -> Option<BackendId> {
        self.addresses.get(&address).copied()
    }

    /// How many members are registered.
    pub(super) fn registered(&self) -> usize {
        self.registered
    }

    /// While none of its backends serves and some have no verdict yet.
    pub(super) fn settling(&self) -> Option<&PoolSettling> {
        self.settling.as_ref()
    }
}
