//! The questions of one lookup, A and AAAA: the servers in turn, in rounds, until one of them
//! knows.
//!
//! The resolver runs it as a task of its own, so that the end of one caller does not end
//! the questions for the others.

use super::ResolveFailure;
use super::cache::RecordOutcome;
use super::counters::ResolverCounters;
use super::exchange::{self, ExchangeFailure, ExchangeResult};
use super::wire::{DnsReply, RecordQuestion, ReplyCode};
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

/// A question that no server has answered yet.
struct OpenQuestion<'a> {
    /// Position in the list of the caller.
    at: usize,
    question: &'a RecordQuestion,
    /// The last failure of each server.
    failures: Vec<(SocketAddr, ExchangeFailure)>,
    /// A server did not answer in this round.
    unanswered: bool,
    known: bool,
}

// === impl ServerUse ===

impl Default for ServerUse {
    fn default() -> ServerUse {
        ServerUse { exchanges: Semaphore::new(EXCHANGES_MAX), silent: Mutex::default() }
    }
}

impl ServerUse {
    /// Asks the servers until one knows each answer, and calls `done` once for each question,
    /// with its position. A second round asks without EDNS, in case that something on the way
    /// drops such datagrams; it asks only what a server did not answer, because a datagram can
    /// be lost.
    pub(super) async fn ask(
        &self,
        questions: &[RecordQuestion],
        plan: &ServerPlan,
        counters: &ResolverCounters,
        mut done: impl FnMut(usize, RecordOutcome),
    ) {
        let mut open: Vec<_> = questions.iter().enumerate().map(OpenQuestion::new).collect();
        for round in 0..plan.rounds {
            for server in self.in_order(&plan.servers) {
                if open.is_empty() {
                    return;
                }
                let with_edns = round == 0;
                self.ask_one(server, with_edns, &mut open, plan.timeout, counters, &mut done).await;
            }
            let failed = |asked: &mut OpenQuestion<'_>| !std::mem::take(&mut asked.unanswered);
            for asked in open.extract_if(.., failed) {
                done(asked.at, asked.failed(counters));
            }
        }
        for asked in open {
            done(asked.at, asked.failed(counters));
        }
    }

    /// Asks one server all open questions, and keeps those that it does not know.
    async fn ask_one(
        &self,
        server: SocketAddr,
        with_edns: bool,
        open: &mut Vec<OpenQuestion<'_>>,
        limit: Duration,
        counters: &ResolverCounters,
        done: &mut impl FnMut(usize, RecordOutcome),
    ) {
        let permit = self.exchanges.acquire().await;
        let asked: Vec<&RecordQuestion> = open.iter().map(|asked| asked.question).collect();
        let (mut answered, mut silent) = (false, false);
        let ended = |at: usize, reply: ExchangeResult| match reply.map(outcome) {
            Ok(known) => {
                answered = true;
                match known {
                    Ok(known) => {
                        open[at].known = true;
                        done(open[at].at, known);
                    }
                    Err(failure) => open[at].note(server, failure),
                }
            }
            Err(failure) => {
                silent |= [SourceFailure::Timeout, SourceFailure::Connect].contains(&failure.why);
                open[at].note(server, failure);
            }
        };
        exchange::ask(server, &asked, with_edns, limit, counters, ended).await;
        drop(permit);
        open.retain(|asked| !asked.known);
        self.note(server, silent && !answered);
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

// === impl OpenQuestion ===

impl<'a> OpenQuestion<'a> {
    fn new((at, question): (usize, &'a RecordQuestion)) -> OpenQuestion<'a> {
        OpenQuestion { at, question, failures: Vec::new(), unanswered: false, known: false }
    }

    fn note(&mut self, server: SocketAddr, failure: ExchangeFailure) {
        self.unanswered |= failure.why == SourceFailure::Timeout;
        self.failures.retain(|(failed, _)| *failed != server);
        self.failures.push((server, failure));
    }

    fn failed(&self, counters: &ResolverCounters) -> RecordOutcome {
        counters.add(&counters.failures);
        RecordOutcome::Failed(summary(self.question, &self.failures))
    }
}

fn outcome(reply: DnsReply) -> Result<RecordOutcome, ExchangeFailure> {
    let why = match reply.code {
        ReplyCode::NO_NAME => return Ok(RecordOutcome::NoName),
        ReplyCode::NO_ERROR => {
            let records = reply.records;
            return Ok(match records.is_empty() {
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
