//! Runs the source that a question needs.
//!
//! [`thread`](crate::thread) calls it. A new kind of source gets one arm in [`run`], and one
//! variant of [`RegistryShare`] if its questions to one registry share more than connections.

use crate::consul::{self, ConsulClient};
use crate::etcd::{self, EtcdShare};
use crate::http::ListUrl;
use crate::kubernetes::{self, KubernetesAccess, ServiceQuestion, WatchTimes};
use crate::resolver::Resolver;
use crate::tell::Teller;
use crate::zookeeper::{self, ZkSession};
use crate::{dns, file, http};
use std::convert::Infallible;
use std::sync::Arc;
use tidegate_core::discovery::{SourceFailure, Told};
use tidegate_core::model::{RegistryConfig, RegistryKind, RegistryQuery, SourceQuestion};

/// What all questions to one registry share. It is created on the discovery thread, inside
/// its runtime, and is dropped with the registry's last question.
#[derive(Debug, Clone)]
pub enum RegistryShare {
    /// Connections.
    Consul(ConsulClient),
    /// One watch for all prefixes.
    Etcd(EtcdShare),
    /// Connections, and the address of the API server.
    Kubernetes(KubernetesAccess),
    /// A session.
    Zookeeper(ZkSession),
}

// === impl RegistryShare ===

impl RegistryShare {
    /// Sends nothing before the first question. Call it inside the runtime.
    pub fn new(registry: &Arc<RegistryConfig>, resolver: &Resolver) -> RegistryShare {
        match registry.kind {
            RegistryKind::Consul => {
                RegistryShare::Consul(ConsulClient::new(registry, resolver.clone()))
            }
            RegistryKind::Etcd => RegistryShare::Etcd(EtcdShare::start(registry, resolver.clone())),
            RegistryKind::Kubernetes => {
                let access = KubernetesAccess::new(Arc::clone(registry), resolver.clone());
                RegistryShare::Kubernetes(access)
            }
            RegistryKind::Zookeeper => {
                let session = ZkSession::open(Arc::clone(registry), resolver.clone());
                RegistryShare::Zookeeper(session)
            }
        }
    }
}

/// Answers a question until the future is dropped. `share` is that of the question's
/// registry, if it has one.
pub async fn run(
    question: SourceQuestion,
    share: Option<RegistryShare>,
    resolver: Resolver,
    teller: Teller,
) -> Infallible {
    match question {
        SourceQuestion::File { path } => file::run(path, teller).await,
        SourceQuestion::Http { url, interval, ca_file, token_file } => {
            let question = ListUrl { url, interval, ca_file, token_file };
            http::run(question, resolver, teller).await
        }
        SourceQuestion::Dns(question) => {
            dns::run(question, resolver, teller).await;
            std::future::pending().await
        }
        SourceQuestion::Registry { registry, query } => match (query, share) {
            (query @ RegistryQuery::Consul { .. }, Some(RegistryShare::Consul(client))) => {
                consul::run(query, client, teller).await
            }
            (RegistryQuery::Etcd { prefix }, Some(RegistryShare::Etcd(share))) => {
                etcd::run(prefix, share, teller).await
            }
            (
                RegistryQuery::Kubernetes { service, namespace, port },
                Some(RegistryShare::Kubernetes(access)),
            ) => {
                let question = ServiceQuestion { service, namespace, port };
                kubernetes::run(question, access, WatchTimes::default(), teller).await
            }
            (
                RegistryQuery::Zookeeper { path, format },
                Some(RegistryShare::Zookeeper(session)),
            ) => zookeeper::run(session, path, format, teller).await,
            _ => misdirected(registry.kind, &teller).await,
        },
    }
}

/// A question and a registry of different kinds; the configuration prevents it.
async fn misdirected(kind: RegistryKind, teller: &Teller) -> Infallible {
    let detail = format!("the question is not for a registry of kind {kind:?}");
    teller.tell(Told::Failed { why: SourceFailure::Protocol, detail });
    std::future::pending().await
}
