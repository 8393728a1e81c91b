//! Registration in Consul: a service of one agent with a TTL check.
//!
//! [`keep`](super::keep) calls it. The check turns critical if no renewal arrives within the
//! TTL, and the agent removes the service when it was critical for [`DEREGISTER_AFTER`]. An agent
//! announces only its own services. So the service is registered at one agent at a time: at the
//! first, and at the next one when it fails. An agent that was left loses its registration as
//! soon as it answers again; until then its check is critical.

use super::{RegisteredState, Registrar, Registration, RenewalResult};
use crate::client::HttpFailure;
use crate::consul::ConsulClient;
use crate::resolver::Resolver;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use std::collections::BTreeMap;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::{RegistryConfig, ServerAddr};

/// Time in the critical state after which the agent removes the service. Consul recommends a
/// time that is much longer than any outage after which the service returns.
pub const DEREGISTER_AFTER: &str = "1h";

/// Registers one service at one of the agents.
#[derive(Debug)]
pub struct ConsulRegistrar {
    agents: Vec<RegistryAgent>,
    /// Position of the agent that has the service.
    current: usize,
    /// What the check says.
    state: RegisteredState,
}

#[derive(Debug)]
struct RegistryAgent {
    client: ConsulClient,
    /// A registration was sent, and no answer says that the agent does not have it.
    may_hold: bool,
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
    /// Registers at the first agent of this registry that answers.
    pub fn new(registry: &RegistryConfig, resolver: Resolver) -> ConsulRegistrar {
        let agent = |server: &ServerAddr| {
            let one = RegistryConfig { servers: vec![server.clone()], ..registry.clone() };
            let client = ConsulClient::new(&one, resolver.clone());
            RegistryAgent { client, may_hold: false }
        };
        let agents = registry.servers.iter().map(agent).collect();
        ConsulRegistrar { agents, current: 0, state: RegisteredState::Ready }
    }

    /// Reports the state to the current agent, which starts the TTL again.
    async fn report(&self, registration: &Registration) -> Result<(), HttpFailure> {
        let (verb, note) = match self.state {
            RegisteredState::Ready => ("pass", "the service answers"),
            RegisteredState::Critical => ("fail", "the service does not answer"),
        };
        let (id, note) = (encoded(&check_id(&registration.id)), encoded(note));
        self.put(format!("/v1/agent/check/{verb}/{id}?note={note}"), Vec::new()).await
    }

    /// Sends a request to the current agent.
    async fn put(&self, target: String, body: Vec<u8>) -> Result<(), HttpFailure> {
        let agent = self.agents.get(self.current);
        let agent = agent.ok_or_else(|| HttpFailure::local("the registry has no servers"))?;
        agent.client.put(target, body.into()).await.map(drop)
    }

    fn hold(&mut self, may_hold: bool) {
        if let Some(agent) = self.agents.get_mut(self.current) {
            agent.may_hold = may_hold;
        }
    }

    fn use_next_agent(&mut self) {
        self.current = (self.current + 1) % self.agents.len().max(1);
    }

    async fn register(&mut self, registration: &Registration) -> Result<(), HttpFailure> {
        let state = self.state;
        let body = serde_json::to_vec(&service(registration, state)).map_err(HttpFailure::local)?;
        let target = "/v1/agent/service/register?replace-existing-checks=true".to_owned();
        let sent = self.put(target, body).await;
        // Without a connection the agent has no registration.
        if sent.as_ref().map_or_else(|failure| failure.why != SourceFailure::Connect, |()| true) {
            self.hold(true);
        }
        sent?;
        // An agent that knows the check keeps its status.
        self.report(registration).await
    }

    /// Removes the service from one agent that was left. It repeats this at the next renewal if
    /// the agent does not answer.
    async fn clean_up(&mut self, registration: &Registration) -> Result<(), HttpFailure> {
        let current = self.current;
        let left = |(at, agent): &(usize, &mut RegistryAgent)| *at != current && agent.may_hold;
        let Some((_, agent)) = self.agents.iter_mut().enumerate().find(left) else { return Ok(()) };
        deregister(&agent.client, registration).await?;
        agent.may_hold = false;
        Ok(())
    }
}

async fn deregister(client: &ConsulClient, registration: &Registration) -> Result<(), HttpFailure> {
    let target = format!("/v1/agent/service/deregister/{}", encoded(&registration.id));
    match client.put(target, Vec::new().into()).await {
        Err(failure) if !is_unknown(&failure) => Err(failure),
        _ => Ok(()),
    }
}

impl Registrar for ConsulRegistrar {
    async fn announce(
        &mut self,
        registration: &Registration,
        state: RegisteredState,
    ) -> Result<(), HttpFailure> {
        self.state = state;
        let mut failed = HttpFailure::local("the registry has no servers");
        for _ in 0..self.agents.len() {
            match self.register(registration).await {
                Ok(()) => return Ok(()),
                Err(failure) => failed = failure,
            }
            self.use_next_agent();
        }
        Err(failed)
    }

    async fn renew(&mut self, registration: &Registration) -> Result<RenewalResult, HttpFailure> {
        match self.report(registration).await {
            Ok(()) => {
                // The service is announced, whatever the agents say that were left.
                let _ = self.clean_up(registration).await;
                Ok(RenewalResult::Renewed)
            }
            Err(failure) if is_unknown(&failure) => {
                self.hold(false);
                Ok(RenewalResult::Lost)
            }
            Err(failure) => {
                self.use_next_agent();
                Err(failure)
            }
        }
    }

    async fn remove(&mut self, registration: &Registration) -> Result<(), HttpFailure> {
        let mut removed = Ok(());
        for agent in self.agents.iter_mut().filter(|agent| agent.may_hold) {
            match deregister(&agent.client, registration).await {
                Ok(()) => agent.may_hold = false,
                Err(failure) => removed = Err(failure),
            }
        }
        removed
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
