//! Registration in ZooKeeper: an ephemeral child node.
//!
//! [`keep`](super::keep) calls it. The node ends with the session of this process, so a
//! process that was killed leaves nothing after the TTL. The session sends its own pings.
//! Each renewal reads the node: an operator can have deleted it, or the session can have
//! expired.

use super::etcd::value_of;
use super::{RegisteredState, Registrar, Registration, RenewalResult};
use crate::client::HttpFailure;
use crate::resolver::Resolver;
use crate::zookeeper::ZkSession;
use crate::zookeeper::session::{ZkAnswer, ZkProblem};
use crate::zookeeper::wire::{ZkReply, ZkRequest};
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::model::RegistryConfig;

/// Creates one child of a node.
#[derive(Debug)]
pub struct ZookeeperRegistrar {
    session: ZkSession,
    /// The whole path.
    path: String,
    /// Whether only the registry's user may change the node.
    owned: bool,
    /// The session that created the node; 0: none did.
    owner: i64,
}

// === impl ZookeeperRegistrar ===

impl ZookeeperRegistrar {
    /// Registers as `PATH/ID`. The servers delete the node when they have not heard this
    /// process for `ttl`; they bound it to 2..20 of their ticks. Needs a runtime.
    pub fn new(
        registry: Arc<RegistryConfig>,
        resolver: Resolver,
        path: &str,
        id: &str,
        ttl: Duration,
    ) -> ZookeeperRegistrar {
        let (owned, path) =
            (registry.user.is_some(), format!("{}/{id}", path.trim_end_matches('/')));
        let session = ZkSession::with_timeout(registry, resolver, ttl);
        ZookeeperRegistrar { session, path, owned, owner: 0 }
    }

    /// Creates the node, and the nodes above it if they do not exist.
    async fn create(&self, data: Vec<u8>) -> Result<ZkAnswer, ZkProblem> {
        let (path, owned) = (self.path.clone(), self.owned);
        let create = ZkRequest::Create { path, data, ephemeral: true, owned };
        let created = self.session.call(create.clone()).await;
        if !matches!(created, Err(ZkProblem::NoNode)) {
            return created;
        }
        for (end, _) in self.path.match_indices('/').skip(1) {
            let path = self.path[..end].to_owned();
            let above =
                ZkRequest::Create { path, data: Vec::new(), ephemeral: false, owned: false };
            match self.session.call(above).await {
                Ok(_) | Err(ZkProblem::NodeExists) => {}
                Err(problem) => return Err(problem),
            }
        }
        self.session.call(create).await
    }

    /// Returns the session that owns the node, and the session of this process.
    async fn owner(&self) -> Result<(i64, i64), ZkProblem> {
        let answer = self.session.call(ZkRequest::Exists { path: self.path.clone(), watch: false });
        match answer.await? {
            ZkAnswer { session, reply: ZkReply::Exists(stat), .. } => Ok((stat.owner, session)),
            _ => Err(ZkProblem::Failed(HttpFailure::protocol("the answer is not a state"))),
        }
    }

    async fn delete(&self) -> Result<(), HttpFailure> {
        match self.session.call(ZkRequest::Delete { path: self.path.clone() }).await {
            Ok(_) | Err(ZkProblem::NoNode) => Ok(()),
            Err(problem) => Err(self.failure(problem)),
        }
    }

    fn failure(&self, problem: ZkProblem) -> HttpFailure {
        let path = &self.path;
        match problem {
            ZkProblem::Failed(failure) => failure,
            ZkProblem::NoNode => HttpFailure::protocol(format_args!("node {path} vanished")),
            ZkProblem::NodeExists => {
                HttpFailure::protocol(format_args!("another process creates node {path}"))
            }
        }
    }
}

impl Registrar for ZookeeperRegistrar {
    async fn announce(
        &mut self,
        registration: &Registration,
        state: RegisteredState,
    ) -> Result<(), HttpFailure> {
        let data = value_of(registration, state);
        match self.owner().await {
            Ok((owner, session)) if owner == session => {
                let change = ZkRequest::SetData { path: self.path.clone(), data };
                let changed = self.session.call(change).await;
                self.owner = changed.map_err(|problem| self.failure(problem))?.session;
                return Ok(());
            }
            // A former process of this id; its session can last for its TTL.
            Ok(_) => self.delete().await?,
            Err(ZkProblem::NoNode) => {}
            Err(problem) => return Err(self.failure(problem)),
        }
        let created = self.create(data).await;
        self.owner = created.map_err(|problem| self.failure(problem))?.session;
        Ok(())
    }

    async fn renew(&mut self, _: &Registration) -> Result<RenewalResult, HttpFailure> {
        match self.owner().await {
            Ok((owner, _)) if owner == self.owner => Ok(RenewalResult::Renewed),
            Ok(_) | Err(ZkProblem::NoNode) => Ok(RenewalResult::Lost),
            Err(problem) => Err(self.failure(problem)),
        }
    }

    async fn remove(&mut self, _: &Registration) -> Result<(), HttpFailure> {
        if self.owner == 0 {
            return Ok(());
        }
        // Another process of this id can have replaced the node.
        match self.owner().await {
            Ok((owner, _)) if owner == self.owner => self.delete().await?,
            Ok(_) | Err(ZkProblem::NoNode) => {}
            Err(problem) => return Err(self.failure(problem)),
        }
        self.owner = 0;
        Ok(())
    }
}
