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

use crate::backoff::{CHANGED_MIN, Pause, UNCHANGED_MIN};
use crate::client::HttpFailure;
use crate::parse::off_runtime;
use crate::tell::Teller;
use codec::{AnswerMeta, HealthAnswer, InstanceHost, health_path, read_health, read_meta};
use names::HostNames;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tidegate_core::discovery::{Announced, SourceFailure, Told, Unreadable, WholeSet};
use tidegate_core::model::RegistryQuery;
use tidegate_net::clock;

/// After a failure, and after an answer that lost instances or is not trusted, the waits are
/// short for this time. A confirmation then does not take a whole wait, and neither does the
/// notice of a restore of the servers.
const WATCHFUL: Duration = Duration::from_secs(60);

/// A query that follows an answer within this time leaves no gap in which a restore of the
/// servers can remain unnoticed.
const GAP_MAX: Duration = Duration::from_millis(20);

/// The times of a watch.
#[derive(Debug, Clone, Copy)]
pub struct ConsulPace {
    /// Longest time that a query waits for a change; up to a sixth is taken off at random.
    pub wait: Duration,
    /// The same for a minute after a failure, and after an answer that lost instances or is
    /// not trusted.
    pub watchful_wait: Duration,
    /// The same for a query that does not follow an answer at once. If the servers were
    /// restored in between, its index can be above theirs, and Consul then waits to the end.
    /// Longer than `unchanged`, so that the next query follows at once.
    pub first_wait: Duration,
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
    /// When the last answer arrived.
    answered: Option<Instant>,
    listed: bool,
}

/// What a view compares.
#[derive(PartialEq)]
struct ToldInstances {
    members: Arc<[Announced]>,
    trusted: bool,
    unreadable: Unreadable,
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
        answered: None,
        listed: false,
    };
    let mut pause = Pause::paced(pace.changed, pace.unchanged);
    loop {
        pause.begin();
        match Box::pin(watch.ask()).await {
            Ok(AnswerEffect::Changed) => pause.changed().await,
            Ok(AnswerEffect::Unchanged) => pause.unchanged().await,
            Err(failure) => {
                watch.failed(failure);
                pause.failed().await;
            }
        }
    }
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
        self.answered = Some(clock::now());
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
        let empty = answer.instances.is_empty() && answer.unreadable.count() == 0;
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

    /// The members, the entries that are none, and whether each host name has an address.
    async fn members(&mut self, answer: HealthAnswer) -> (Arc<[Announced]>, Unreadable, bool) {
        let names = answer.instances.iter().filter_map(|instance| match &instance.host {
            InstanceHost::Name(name) => Some(Arc::clone(name)),
            InstanceHost::Ip(_) => None,
        });
        self.names.resolve(names.collect()).await;
        let address = |host: &InstanceHost| match host {
            InstanceHost::Ip(ip) => Some(*ip),
            InstanceHost::Name(name) => self.names.address(name),
        };
        let (mut members, mut unreadable) = (Vec::new(), answer.unreadable);
        for instance in &answer.instances {
            match address(&instance.host) {
                Some(ip) => members.push(instance.announced(ip)),
                None => unreadable.add(&instance.name),
            }
        }
        let resolved = members.len() == answer.instances.len();
        (members.into(), unreadable, resolved)
    }

    fn tell(&mut self, now: ToldInstances, index: u64) -> AnswerEffect {
        let lost = self.told.as_ref().is_some_and(|told| told.members.len() > now.members.len());
        if lost || !now.trusted {
            self.be_watchful();
        }
        if self.told.as_ref() == Some(&now) {
            self.teller.tell(Told::Alive);
            return AnswerEffect::Unchanged;
        }
        self.teller.tell(Told::Whole(WholeSet {
            members: Arc::clone(&now.members),
            version: format!("index {index}"),
            trusted: now.trusted,
            unreadable: now.unreadable.clone(),
            keys: [].into(),
        }));
        self.told = Some(now);
        AnswerEffect::Changed
    }

    /// Tells a failure.
    fn failed(&mut self, failure: HttpFailure) {
        if self.index != 0 {
            self.restart();
        }
        self.told = None;
        self.be_watchful();
        self.teller.tell(failure.told());
    }

    /// Lists at the next query.
    fn restart(&mut self) {
        self.index = 0;
        self.teller.counters().watch_restarts.fetch_add(1, Ordering::Relaxed);
    }

    fn be_watchful(&mut self) {
        self.watchful_until = Some(clock::now() + WATCHFUL);
    }

    /// How long the server may wait for a change.
    fn wait(&self) -> Duration {
        let ConsulPace { wait, watchful_wait, first_wait, .. } = self.pace;
        let now = clock::now();
        let follows = |at: Instant| now.saturating_duration_since(at) <= GAP_MAX;
        let most = if self.index == 0 {
            return Duration::ZERO;
        } else if !self.answered.is_some_and(follows) {
            first_wait.min(wait)
        } else if self.watchful_until.is_some_and(|until| now < until) {
            watchful_wait.min(wait)
        } else {
            wait
        };
        most - most.mul_f64(fastrand::f64() / 6.0)
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
            first_wait: Duration::from_secs(2),
            unchanged: UNCHANGED_MIN,
            changed: CHANGED_MIN,
        }
    }
}

#[cfg(test)]
mod tests;
