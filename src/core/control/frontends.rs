//! The configured frontends, in file order, indexed by name.
//!
//! Filled by `configure`, read by `status`, `handover` and `publish`. A frontend that stays
//! configured keeps its state.

use super::names::RemovedNames;
use super::state::StateAllocator;
use crate::model;
use crate::model::Config;
use crate::table::state::FrontendState;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct FrontendSet {
    list: Vec<FrontendEntry>,
    /// Positions in `list`.
    by_name: HashMap<Arc<str>, usize>,
    /// Addresses that the frontends are bound to.
    binds: HashSet<SocketAddr>,
}

/// A configured frontend.
#[derive(Debug)]
pub(super) struct FrontendEntry {
    pub(super) state: Arc<FrontendState>,
    pub(super) spec: model::FrontendConfig,
}

// === impl FrontendSet ===

impl FrontendSet {
    /// Applies the frontends of a configuration. `removed` keeps the names of the others.
    pub(super) fn configure(
        &mut self,
        config: &Config,
        allocator: &mut StateAllocator,
        removed: &mut RemovedNames,
    ) {
        let before = std::mem::take(self).list.into_iter();
        let mut known: HashMap<Arc<str>, Arc<FrontendState>> =
            before.map(|entry| (Arc::clone(&entry.spec.name), entry.state)).collect();
        for spec in &config.frontends {
            let known = known.remove(&spec.name);
            let state = known.unwrap_or_else(|| Arc::new(allocator.frontend(&spec.name)));
            self.by_name.insert(Arc::clone(&spec.name), self.list.len());
            self.binds.extend(spec.binds.iter().filter_map(|bind| bind.key.socket_addr()));
            self.list.push(FrontendEntry { state, spec: spec.clone() });
        }
        known.values().for_each(|state| removed.keep_frontend(state.id, &state.name));
    }

    pub(super) fn named(&self, name: &str) -> Option<&FrontendEntry> {
        self.list.get(*self.by_name.get(name)?)
    }

    /// Returns all frontends in file order.
    pub(super) fn iter(&self) -> std::slice::Iter<'_, FrontendEntry> {
        self.list.iter()
    }

    /// Whether a connection to this address would reach a listener of Tidegate.
    pub(super) fn listens_at(&self, address: SocketAddr) -> bool {
        let any = match address.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let wildcard = SocketAddr::new(any, address.port());
        self.binds.contains(&address)
            || (address.ip().is_loopback() && self.binds.contains(&wildcard))
    }
}
