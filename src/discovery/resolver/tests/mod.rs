//! The resolver against a scripted server, and its decoder against any bytes.

mod lies;
mod messages;
mod names;

use super::*;
use crate::testing::dns_liar::*;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

/// A resolver that asks only these servers, and whose files are in a directory of its own.
pub(crate) struct TestResolver {
    pub(crate) resolver: Resolver,
    pub(crate) dir: tempfile::TempDir,
}

impl TestResolver {
    pub(crate) fn new(servers: &[SocketAddr]) -> TestResolver {
        TestResolver::with(servers, "options timeout:1\n", "", |_| {})
    }

    pub(crate) fn with(
        servers: &[SocketAddr],
        resolv_conf: &str,
        hosts: &str,
        change: impl Fn(&mut DnsConfig),
    ) -> TestResolver {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let files = ResolverFiles {
            resolv_conf: file("resolv.conf", resolv_conf),
            hosts: file("hosts", hosts),
        };
        let mut config = DnsConfig { servers: Some(servers.to_vec()), ..DnsConfig::default() };
        change(&mut config);
        TestResolver { resolver: Resolver::with_files(config, files), dir }
    }

    /// The addresses as text, or the failure.
    async fn host(&self, name: &str) -> Result<Vec<String>, ResolveFailure> {
        let found = self.resolver.host(name).await?;
        Ok(found.iter().map(IpAddr::to_string).collect())
    }

    async fn failure(&self, name: &str) -> ResolveFailure {
        self.host(name).await.unwrap_err()
    }
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Waits until `is_so`, for at most 10 s.
pub(crate) async fn eventually(mut is_so: impl AsyncFnMut() -> bool) {
    let start = clock::now();
    while !is_so().await {
        assert!(clock::now() - start < Duration::from_secs(10), "10 s have passed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
