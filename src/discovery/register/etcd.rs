//! Registration in etcd: a key with a lease.
//!
//! [`keep`](super::keep) calls it. The key ends with its lease, so a process that was killed
//! leaves nothing after the TTL. Each renewal also reads the key: an operator can have
//! deleted it, or a backup without it was restored.

use super::{RegisteredState, Registrar, Registration, RenewalResult};
use crate::client::HttpFailure;
use crate::etcd::codec::{
    Base64Bytes, LeaseAnswer, LeaseGrant, LeaseId, LeaseRenewed, PutAnswer, PutRequest,
    RangeAnswer, RangeRequest,
};
use crate::etcd::gateway::EtcdGateway;
use crate::resolver::Resolver;
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::RegistryConfig;

/// Puts one key of a prefix.
#[derive(Debug)]
pub struct EtcdRegistrar {
    gateway: EtcdGateway,
    /// The whole key.
    key: String,
    /// Above 0: the lease of the key.
    lease: i64,
}

/// The value of the key. The etcd source reads this form.
#[derive(Serialize)]
struct RegisteredValue<'a> {
    address: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<u16>,
    state: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: &'a BTreeMap<String, String>,
}

// === impl EtcdRegistrar ===

impl EtcdRegistrar {
    /// Registers as `PREFIX` + `ID`. The prefix ends with `/`.
    pub fn new(registry: &RegistryConfig, resolver: Resolver, prefix: &str, id: &str) -> Self {
        let gateway = EtcdGateway::new(registry, resolver);
        EtcdRegistrar { gateway, key: format!("{prefix}{id}"), lease: 0 }
    }

    fn key_bytes(&self) -> Base64Bytes {
        Base64Bytes(self.key.as_bytes().to_vec())
    }

    /// Puts the key with the lease. Returns false if the lease ended.
    async fn put(&self, value: Vec<u8>) -> Result<bool, HttpFailure> {
        let put =
            PutRequest { key: self.key_bytes(), value: Base64Bytes(value), lease: self.lease };
        match self.gateway.call::<_, PutAnswer>("/v3/kv/put", &put).await {
            Ok(_) => Ok(true),
            Err(failure) if failure.http.why == SourceFailure::NotFound => Ok(false),
            Err(failure) => Err(failure.http),
        }
    }

    async fn grant(&self, registration: &Registration) -> Result<i64, HttpFailure> {
        let question = LeaseGrant { ttl: registration.ttl.as_secs_f64().ceil() as i64 };
        let answer = self.gateway.call::<_, LeaseAnswer>("/v3/lease/grant", &question).await;
        match answer.map_err(|failure| failure.http)?.id {
            0 => Err(HttpFailure::protocol("the server granted a lease without a number")),
            id => Ok(id),
        }
    }

    /// Whether the key is in the store with the lease of this process.
    async fn is_stored(&self) -> Result<bool, HttpFailure> {
        let question =
            RangeRequest { key: self.key_bytes(), keys_only: true, ..RangeRequest::default() };
        match self.gateway.call::<_, RangeAnswer>("/v3/kv/range", &question).await {
            Ok(answer) => Ok(answer.kvs.first().is_some_and(|entry| entry.lease == self.lease)),
            // A user with write permission only.
            Err(failure) if failure.refused => Ok(true),
            Err(failure) => Err(failure.http),
        }
    }
}

impl Registrar for EtcdRegistrar {
    async fn announce(
        &mut self,
        registration: &Registration,
        state: RegisteredState,
    ) -> Result<(), HttpFailure> {
        let value = value_of(registration, state);
        if self.lease > 0 && self.put(value.clone()).await? {
            return Ok(());
        }
        self.lease = self.grant(registration).await?;
        match self.put(value).await? {
            true => Ok(()),
            false => Err(HttpFailure::protocol("the server does not know the lease it granted")),
        }
    }

    async fn renew(&mut self, _: &Registration) -> Result<RenewalResult, HttpFailure> {
        let question = LeaseId { id: self.lease };
        let answer = self.gateway.call::<_, LeaseRenewed>("/v3/lease/keepalive", &question).await;
        let renewed = answer.map_err(|failure| failure.http)?;
        if renewed.result.ttl == 0 {
            self.lease = 0;
            return Ok(RenewalResult::Lost);
        }
        Ok(if self.is_stored().await? { RenewalResult::Renewed } else { RenewalResult::Lost })
    }

    async fn remove(&mut self, _: &Registration) -> Result<(), HttpFailure> {
        if self.lease == 0 {
            return Ok(());
        }
        let question = LeaseId { id: self.lease };
        match self.gateway.call::<_, LeaseAnswer>("/v3/lease/revoke", &question).await {
            Err(failure) if failure.http.why != SourceFailure::NotFound => Err(failure.http),
            _ => {
                self.lease = 0;
                Ok(())
            }
        }
    }
}

/// Returns the JSON form that the sources of etcd and ZooKeeper read.
pub(super) fn value_of(registration: &Registration, state: RegisteredState) -> Vec<u8> {
    let value = RegisteredValue {
        address: registration.address,
        weight: registration.weight,
        state: state.name(),
        labels: &registration.labels,
    };
    serde_json::to_vec(&value).unwrap_or_default()
}
