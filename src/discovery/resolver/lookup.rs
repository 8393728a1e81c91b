//! One question about records: the servers in turn, in rounds, until one of them knows.
//!
//! The resolver runs it as a task of its own, so that the end of one caller does not end
//! the question for the others.

use super::cache::RecordOutcome;
use super::exchange::{self, ExchangeFailure};
use super::wire::{DnsReply, RecordQuestion, ReplyCode};
use super::{ResolveFailure, ResolverCounters};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidegate_core::discovery::SourceFailure;
use tidegate_net::clock;
use tokio::sync::Semaphore;

/// Exchanges at the same time, each with one descriptor. Further ones wait.
const EXCHANGES_MAX: usize = 64;
/// Time for which a server that did not answer comes after the others.
const SILENT_FOR: Duration = Duration::from_secs(10);

/// What is known about the servers.
#[derive(Debug)]
pub(super) struct ServerUse {
    exchanges: Semaphore,
    /// Servers that gave no answer, and when.
    silent: Mutex<HashMap<SocketAddr, Instant>>,
}

/// Which servers are asked, and how.
#[derive(Debug, Clone)]
pub(super) struct ServerPlan {
    pub(super) servers: Vec<SocketAddr>,
    pub(super) timeout: Duration,
    pub(super) rounds: u32,
}

// === impl ServerUse ===

impl Default for ServerUse {
    fn default() -> ServerUse {
        ServerUse { exchanges: Semaphore::new(EXCHANGES_MAX), silent: Mutex::default() }
    }
}

impl ServerUse {
    /// Asks the servers until one knows the answer. A second round asks without EDNS, in
    /// case that something on the way drops such datagrams; it takes place only if a server
    /// did not answer, because a datagram can be lost.
    pub(super) async fn ask(
        &self,
        question: &RecordQuestion,
        plan: &ServerPlan,
        counters: &ResolverCounters,
    ) -> RecordOutcome {
        let mut failures: Vec<(SocketAddr, ExchangeFailure)> = Vec::new();
        for round in 0..plan.rounds {
            let mut unanswered = false;
            for server in self.in_order(&plan.servers) {
                let permit = self.exchanges.acquire().await;
                let asked = exchange::ask(server, question, round == 0, plan.timeout, counters);
                let ended = asked.await;
                drop(permit);
                let failure = match ended.map(outcome) {
                    Ok(Ok(known)) => {
                        self.note(server, false);
                        return known;
                    }
                    Ok(Err(failure)) | Err(failure) => failure,
                };
                unanswered |= failure.why == SourceFailure::Timeout;
                let silent =
                    [SourceFailure::Timeout, SourceFailure::Connect].contains(&failure.why);
                self.note(server, silent);
                failures.retain(|(failed, _)| *failed != server);
                failures.push((server, failure));
            }
            if !unanswered {
                break;
            }
        }
        counters.add(&counters.failures);
        RecordOutcome::Failed(summary(question, &failures))
    }

    /// The configured order, servers that did not answer in the last seconds at the end.
    fn in_order(&self, servers: &[SocketAddr]) -> Vec<SocketAddr> {
        let now = clock::now();
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.retain(|_, since| now.saturating_duration_since(*since) < SILENT_FOR);
        let mut servers = servers.to_vec();
        servers.sort_by_key(|server| silent.contains_key(server));
        servers
    }

    fn note(&self, server: SocketAddr, is_silent: bool) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match is_silent {
            true => drop(silent.insert(server, clock::now())),
            false => drop(silent.remove(&server)),
        }
    }
}

fn outcome(reply: DnsReply) -> Result<RecordOutcome, ExchangeFailure> {
    let why = match reply.code {
        ReplyCode::NO_NAME => return Ok(RecordOutcome::NoName),
        ReplyCode::NO_ERROR => {
            let records = reply.records;
            let nothing = records.addresses.is_empty() && records.services.is_empty();
            return Ok(match nothing {
                true => RecordOutcome::Nothing,
                false => RecordOutcome::Records(Arc::new(records)),
            });
        }
        ReplyCode::REFUSED => SourceFailure::Auth,
        _ => SourceFailure::Protocol,
    };
    Err(ExchangeFailure { why, what: reply.code.to_string() })
}

fn summary(
    question: &RecordQuestion,
    failures: &[(SocketAddr, ExchangeFailure)],
) -> ResolveFailure {
    let why = failures.last().map_or(SourceFailure::Local, |(_, failure)| failure.why);
    let servers: Vec<String> =
        failures.iter().map(|(server, failure)| format!("{server}: {}", failure.what)).collect();
    let detail = format!("cannot resolve {question}: {}", servers.join(", "));
    ResolveFailure { why, detail }
}
