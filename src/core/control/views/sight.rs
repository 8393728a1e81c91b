//! What a view sees of its pool: which backends are up, eligible, or listed by other sources.
//!
//! `views` creates one for each answer and each step of a view. It changes nothing.

use crate::control::backends::{BackendEntry, BackendSet};
use crate::control::members::{MemberSource, Origins};
use crate::control::pools::{PoolId, PoolSet};
use crate::discovery::view::LocalSight;
use crate::health::Observation;
use crate::model::{BackendAddr, SourceKey};
use std::net::SocketAddr;

/// The backends of one pool, seen by their addresses.
pub(super) struct PoolSight<'a> {
    pub(super) pool: PoolId,
    /// The source that looks.
    pub(super) key: &'a SourceKey,
    pub(super) pools: &'a PoolSet,
    pub(super) backends: &'a BackendSet,
}

// === impl PoolSight ===

impl PoolSight<'_> {
    fn at(&self, address: SocketAddr) -> Option<&BackendEntry> {
        self.backends.get(self.pools.get(self.pool)?.member_at(address)?)
    }
}

impl LocalSight for PoolSight<'_> {
    fn is_up(&self, address: SocketAddr) -> bool {
        self.at(address).is_some_and(|entry| {
            entry.health.eligible_but_for_wish()
                && entry.health.observation() != Observation::Suspect
        })
    }

    fn is_eligible(&self, address: SocketAddr) -> bool {
        self.at(address).is_some_and(|entry| entry.health.eligible())
    }

    fn is_listed_elsewhere(&self, address: SocketAddr) -> bool {
        self.at(address).is_some_and(|entry| {
            let (source, is_own) = match &self.key.backend {
                Some(name) => (MemberSource::Names, entry.group.as_ref() == Some(name)),
                None => (MemberSource::Discovery, true),
            };
            !is_own || entry.origins.without(source) != Origins::default()
        })
    }

    fn has_eligible_outside(&self, lists: &dyn Fn(SocketAddr) -> bool) -> bool {
        let members = self.pools.get(self.pool).map_or(&[][..], |pool| pool.members());
        members.iter().filter_map(|id| self.backends.get(*id)).any(|entry| {
            entry.health.eligible()
                && !matches!(entry.state.address, BackendAddr::Tcp(address) if lists(address))
        })
    }
}
