//! The Consul source: the instances of a service, by blocking queries.
//!
//! The discovery thread runs [`run`] once per question and shares one [`ConsulClient`]
//! per registry. [`codec`] reads the documents. The source follows the page "Blocking
//! Queries" of the Consul HTTP API: an index that goes back, is 0 or follows an error starts
//! the watch again, and the content decides whether an answer is new. The source asks the
//! leader, never with `stale`, because a server that lags would take back what another
//! server said. It removes nothing: the views decide.

mod client;
pub mod codec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod names;

pub use client::ConsulClient;

use crate::client::HttpFailure;
use crate::parse::off_runtime;
use crate::tell::Teller;
use codec::{AnswerMeta, HealthAnswer, InstanceHost, health_path, read_health, read_meta};
use names::HostNames;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tidegate_core::discovery::{Announced, SourceFailure, Told, WholeSet};
use tidegate_core::model::RegistryQuery;
use tidegate_net::clock;

/// Longest pause after a failure, so that a server that is back is asked within 5 s.
const RETRY_MAX: Duration = Duration::from_secs(4);

/// Shortest pause after a failure.
const RETRY_MIN: Duration = Duration::from_millis(200);

/// After an answer that lost instances or is not trusted, the waits are short for this
/// time, so that a confirmation does not take a whole wait.
const WATCHFUL: Duration = Duration::from_secs(60);

/// The times of a watch.
#[derive(Debug, Clone, Copy)]
pub struct ConsulPace {
    /// Longest time that a query waits for a change; up to a sixth is taken off at random.
    pub wait: Duration,
    /// The same after an answer that lost instances or is not trusted.
    pub watchful_wait: Duration,
    /// Shortest time between the queries before and after an answer that changed nothing.
    pub unchanged: Duration,
    /// The same for an answer that changed something.
    pub changed: Duration,
}

/// State of one question.
struct ConsulWatch {
    query: RegistryQuery,
    client: ConsulClient,
    pace: ConsulPace,
    teller: Teller,
    /// The index to wait for; 0: list at once.
    index: u64,
    /// What was told last, unless a failure followed.
    told: Option<ToldInstances>,
    names: HostNames,
    watchful_until: Option<Instant>,
    /// Failures since the last answer.
    failures: u32,
    listed: bool,
}

/// What a view compares.
#[derive(PartialEq)]
struct ToldInstances {
    members: Arc<[Announced]>,
    trusted: bool,
    unreadable: u32,
}

/// What an answer did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AnswerEffect {
    Changed,
    Unchanged,
}

/// Asks forever and tells the answers.
pub async fn run(query: RegistryQuery, client: ConsulClient, teller: Teller) -> Infallible {
    run_at(query, client, ConsulPace::default(), teller).await
}

/// As [`run`], at another pace.
pub async fn run_at(
    query: RegistryQuery,
    client: ConsulClient,
    pace: ConsulPace,
    teller: Teller,
) -> Infallible {
    let names = HostNames::new(client.resolver());
    let mut watch = ConsulWatch {
        query,
        client,
        pace,
        teller,
        index: 0,
        told: None,
        names,
        watchful_until: None,
        failures: 0,
        listed: false,
    };
    loop {
        let asked_at = clock::now();
        let pause = match Box::pin(watch.ask()).await {
            Ok(effect) => {
                watch.failures = 0;
                watch.gap(effect).saturating_sub(clock::now().duration_since(asked_at))
            }
            Err(failure) => watch.failed(failure),
        };
        tokio::time::sleep(pause).await;
    }
}

/// Returns the pause after the given number of failures in a row: full jitter, doubling.
fn retry_pause(failures: u32) -> Duration {
    let most = RETRY_MIN.saturating_mul(1 << failures.min(16)).min(RETRY_MAX);
    RETRY_MIN.max(most.mul_f64(fastrand::f64()))
}

// === impl ConsulWatch ===

impl ConsulWatch {
    /// Sends one query and tells its answer.
    async fn ask(&mut self) -> Result<AnswerEffect, HttpFailure> {
        let wait = self.wait();
        let path = health_path(&self.query, self.index, wait)
            .ok_or_else(|| HttpFailure::local("the question is none for Consul"))?;
        // The server adds up to a sixteenth.
        let response = self.client.get(path, wait + wait / 16).await?;
        let meta = read_meta(|name| response.headers.get(name)?.to_str().ok());
        if meta.index < self.index {
            self.restart();
            return Ok(AnswerEffect::Changed);
        }
        let answer = parse(response.body).await?;
        self.check(&meta, &answer)?;
        if self.index == 0 && std::mem::replace(&mut self.listed, true) {
            self.teller.counters().relists.fetch_add(1, Ordering::Relaxed);
        }
        // Waiting for an index of 0 does not wait. Consul calls such an index a bug and
        // recommends 1.
        self.index = meta.index.max(1);
        let (members, unreadable, resolved) = self.members(answer).await;
        let trusted = resolved && self.trusts(&meta, members.is_empty());
        Ok(self.tell(ToldInstances { members, trusted, unreadable }, meta.index))
    }

    /// Refuses answers that say nothing.
    fn check(&self, meta: &AnswerMeta, answer: &HealthAnswer) -> Result<(), HttpFailure> {
        let empty = answer.instances.is_empty() && answer.unreadable == 0;
        let (why, detail) = match (empty, meta.filtered, meta.known_leader) {
            (true, true, _) => (
                SourceFailure::Auth,
                "the token may not read the service; its policy needs service:read and node:read",
            ),
            (true, false, false) => {
                (SourceFailure::Stale, "an empty answer of a server without a known leader")
            }
            _ => return Ok(()),
        };
        Err(HttpFailure::new(why, detail))
    }

    fn trusts(&self, meta: &AnswerMeta, empty: bool) -> bool {
        let RegistryQuery::Consul { max_stale, .. } = &self.query else { return false };
        meta.is_trusted(*max_stale, empty, self.client.is_anonymous())
    }

    /// The members, the number of entries that are none, and whether each host name has an
    /// address.
    async fn members(&mut self, answer: HealthAnswer) -> (Arc<[Announced]>, u32, bool) {
        let names = answer.instances.iter().filter_map(|instance| match &instance.host {
            InstanceHost::Name(name) => Some(Arc::clone(name)),
            InstanceHost::Ip(_) => None,
        });
        self.names.resolve(names.collect()).await;
        let address = |host: &InstanceHost| match host {
            InstanceHost::Ip(ip) => Some(*ip),
            InstanceHost::Name(name) => self.names.address(name),
        };
        let of = |instance: &codec::ConsulInstance| {
            address(&instance.host).map(|ip| instance.announced(ip))
        };
        let members: Arc<[Announced]> = answer.instances.iter().filter_map(of).collect();
        let unresolved = answer.instances.len() - members.len();
        let unreadable = u32::try_from(unresolved).unwrap_or(u32::MAX);
        (members, answer.unreadable.saturating_add(unreadable), unresolved == 0)
    }

    fn tell(&mut self, now: ToldInstances, index: u64) -> AnswerEffect {
        let lost = self.told.as_ref().is_some_and(|told| told.members.len() > now.members.len());
        if lost || !now.trusted {
            self.watchful_until = Some(clock::now() + WATCHFUL);
        }
        if self.told.as_ref() == Some(&now) {
            self.teller.tell(Told::Alive);
            return AnswerEffect::Unchanged;
        }
        self.teller.tell(Told::Whole(WholeSet {
            members: Arc::clone(&now.members),
            version: format!("index {index}"),
            trusted: now.trusted,
            unreadable: now.unreadable,
        }));
        self.told = Some(now);
        AnswerEffect::Changed
    }

    /// Tells a failure and returns the pause after it.
    fn failed(&mut self, failure: HttpFailure) -> Duration {
        if self.index != 0 {
            self.restart();
        }
        self.told = None;
        self.teller.tell(failure.told());
        self.failures = self.failures.saturating_add(1);
        retry_pause(self.failures)
    }

    /// Lists at the next query.
    fn restart(&mut self) {
        self.index = 0;
        self.teller.counters().watch_restarts.fetch_add(1, Ordering::Relaxed);
    }

    /// How long the server may wait for a change.
    fn wait(&self) -> Duration {
        let watchful = self.watchful_until.is_some_and(|until| clock::now() < until);
        let most = match (self.index, watchful) {
            (0, _) => return Duration::ZERO,
            (_, true) => self.pace.watchful_wait.min(self.pace.wait),
            (_, false) => self.pace.wait,
        };
        most - most.mul_f64(fastrand::f64() / 6.0)
    }

    fn gap(&self, effect: AnswerEffect) -> Duration {
        match effect {
            AnswerEffect::Changed => self.pace.changed,
            AnswerEffect::Unchanged => self.pace.unchanged,
        }
    }
}

/// Parses a body, a large one on another thread.
async fn parse(body: bytes::Bytes) -> Result<HealthAnswer, HttpFailure> {
    let parsed = off_runtime(body.len(), move || read_health(&body)).await?;
    parsed.map_err(|error| HttpFailure::protocol(format_args!("cannot read the answer: {error}")))
}

// === impl ConsulPace ===

impl Default for ConsulPace {
    fn default() -> ConsulPace {
        ConsulPace {
            wait: Duration::from_secs(30),
            watchful_wait: Duration::from_secs(5),
            unchanged: Duration::from_secs(1),
            changed: Duration::from_millis(100),
        }
    }
}

#[cfg(test)]
mod tests;
