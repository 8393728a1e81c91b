//! Registration in Consul: a service of the local agent with a TTL check.
//!
//! [`keep`](super::keep) calls it. The check turns critical if no renewal arrives within the
//! TTL, and the agent removes the service when it was critical for [`DEREGISTER_AFTER`]. The
//! registry must be the agent of this host, because an agent announces only its own services.

use super::{RegisteredState, Registrar, Registration, RenewalResult};
use crate::client::HttpFailure;
use crate::consul::ConsulClient;
use crate::resolver::Resolver;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use std::collections::BTreeMap;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::RegistryConfig;

/// Time in the critical state after which the agent removes the service. Consul recommends a
/// time that is much longer than any outage after which the service returns.
pub const DEREGISTER_AFTER: &str = "1h";

/// Registers one service at an agent.
#[derive(Debug)]
pub struct ConsulRegistrar {
    client: ConsulClient,
    /// What the check says.
    state: RegisteredState,
}

/// Body of `PUT /v1/agent/service/register`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ConsulService<'a> {
    #[serde(rename = "ID")]
    id: &'a str,
    name: &'a str,
    address: String,
    port: u16,
    meta: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<ConsulWeights>,
    check: ConsulTtlCheck,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ConsulWeights {
    passing: u16,
    warning: u16,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ConsulTtlCheck {
    #[serde(rename = "CheckID")]
    id: String,
    name: &'static str,
    #[serde(rename = "TTL")]
    ttl: String,
    status: &'static str,
    deregister_critical_service_after: &'static str,
}

// === impl ConsulRegistrar ===

impl ConsulRegistrar {
    /// Registers at the agent of this registry.
    pub fn new(registry: &RegistryConfig, resolver: Resolver) -> ConsulRegistrar {
        let client = ConsulClient::new(registry, resolver);
        ConsulRegistrar { client, state: RegisteredState::Ready }
    }

    /// Reports the state, which starts the TTL again.
    async fn report(&self, registration: &Registration) -> Result<(), HttpFailure> {
        let (verb, note) = match self.state {
            RegisteredState::Ready => ("pass", "the service answers"),
            RegisteredState::Critical => ("fail", "the service does not answer"),
        };
        let (id, note) = (encoded(&check_id(&registration.id)), encoded(note));
        self.put(format!("/v1/agent/check/{verb}/{id}?note={note}"), Vec::new()).await
    }

    async fn put(&self, target: String, body: Vec<u8>) -> Result<(), HttpFailure> {
        self.client.put(target, body.into()).await.map(drop)
    }
}

impl Registrar for ConsulRegistrar {
    async fn announce(
        &mut self,
        registration: &Registration,
        state: RegisteredState,
    ) -> Result<(), HttpFailure> {
        self.state = state;
        let body = serde_json::to_vec(&service(registration, state)).map_err(HttpFailure::local)?;
        let target = "/v1/agent/service/register?replace-existing-checks=true".to_owned();
        self.put(target, body).await?;
        // An agent that knows the check keeps its status.
        self.report(registration).await
    }

    async fn renew(&mut self, registration: &Registration) -> Result<RenewalResult, HttpFailure> {
        match self.report(registration).await {
            Ok(()) => Ok(RenewalResult::Renewed),
            Err(failure) if is_unknown(&failure) => Ok(RenewalResult::Lost),
            Err(failure) => Err(failure),
        }
    }

    async fn remove(&mut self, registration: &Registration) -> Result<(), HttpFailure> {
        let target = format!("/v1/agent/service/deregister/{}", encoded(&registration.id));
        match self.put(target, Vec::new()).await {
            Err(failure) if !is_unknown(&failure) => Err(failure),
            _ => Ok(()),
        }
    }
}

/// Whether the agent does not have the service or its check. Before version 1.9, agents
/// reported this with status 500.
fn is_unknown(failure: &HttpFailure) -> bool {
    let texts = ["does not have associated TTL", "Unknown service", "Unknown check"];
    failure.why == SourceFailure::NotFound
        || failure.why == SourceFailure::Protocol
            && texts.iter().any(|text| failure.detail.contains(text))
}

fn service(registration: &Registration, state: RegisteredState) -> ConsulService<'_> {
    ConsulService {
        id: &registration.id,
        name: &registration.service,
        address: registration.address.ip().to_string(),
        port: registration.address.port(),
        meta: &registration.labels,
        weights: registration.weight.map(|passing| ConsulWeights { passing, warning: 1 }),
        check: ConsulTtlCheck {
            id: check_id(&registration.id),
            name: "reported by tidegate register",
            ttl: format!("{}ms", registration.ttl.as_millis()),
            status: match state {
                RegisteredState::Ready => "passing",
                RegisteredState::Critical => "critical",
            },
            deregister_critical_service_after: DEREGISTER_AFTER,
        },
    }
}

fn check_id(id: &str) -> String {
    format!("tidegate:{id}")
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests;
