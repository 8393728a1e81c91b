//! Addresses of instances that are registered with a host name.
//!
//! The source resolves the names of each answer. A name that cannot be resolved keeps its
//! last address, because a failure of DNS must not remove an instance.

use crate::resolver::Resolver;
use crate::tasks::{self, TaskKind};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Most host names of one answer. Instances with further names count as unreadable.
const NAMES_MAX: usize = 256;

/// Time for all names of an answer.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);

/// The addresses of names.
pub(super) struct HostNames {
    resolver: Resolver,
    known: BTreeMap<Arc<str>, IpAddr>,
}

// === impl HostNames ===

impl HostNames {
    pub(super) fn new(resolver: Resolver) -> HostNames {
        HostNames { resolver, known: BTreeMap::new() }
    }

    /// The address of a name.
    pub(super) fn address(&self, name: &str) -> Option<IpAddr> {
        self.known.get(name).copied()
    }

    /// Resolves these names and forgets all others. Of several addresses the lowest counts,
    /// unless the name had another one of them before.
    pub(super) async fn resolve(&mut self, names: BTreeSet<Arc<str>>) {
        self.known.retain(|name, _| names.contains(name));
        let mut lookups = JoinSet::new();
        for name in names.into_iter().take(NAMES_MAX) {
            let resolver = self.resolver.clone();
            lookups.spawn(tasks::caught(TaskKind::Lookup, async move {
                let found = resolver.host(&name).await;
                (name, found.unwrap_or_default())
            }));
        }
        let all = async {
            while let Some(joined) = lookups.join_next().await {
                let Ok(Ok((name, found))) = joined else { continue };
                let kept = self.known.get(&name).filter(|known| found.contains(known)).copied();
                if let Some(address) = kept.or_else(|| found.into_iter().min()) {
                    self.known.insert(name, address);
                }
            }
        };
        let _ = tokio::time::timeout(RESOLVE_TIMEOUT, all).await;
    }
}
