//! Which servers are asked: questions that are due together go to the first server over one
//! socket; a question without a usable answer then goes alone through the servers in turn, in
//! rounds, until one of them knows.
//!
//! The resolver runs it in tasks of its own, so that the end of one caller does not end
//! the questions for the others.

use super::ResolveFailure;
use super::cache::RecordOutcome;
use super::counters::ResolverCounters;
use super::exchange::{self, ExchangeFailure, ExchangeResult, UdpEnd};
use super::wire::{DnsReply, RecordQuestion, ReplyCode};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidegate_core::discovery::SourceFailure;
use tidegate_net::clock;
use tokio::sync::Semaphore;

/// Most questions over one socket.
pub(super) const TOGETHER_MAX: usize = 32;
/// Questions that wait for servers at the same time, each with at most one descriptor.
/// Further ones wait. More would overflow the queues of small servers.
const WAITING_MAX: usize = 128;
/// Time for which a server that did not answer comes after the others.
const SILENT_FOR: Duration = Duration::from_secs(10);

/// What is known about the servers.
#[derive(Debug)]
pub(super) struct ServerUse {
    permits: Semaphore,
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

/// What the server said that was asked first, together with other questions.
pub(super) struct FirstEnd {
    server: SocketAddr,
    end: UdpEnd,
}

/// How a question ended that was asked together with others.
pub(super) enum TogetherEnd {
    Known(RecordOutcome),
    /// It must be asked alone.
    Alone(Option<FirstEnd>),
}

// === impl ServerUse ===

impl Default for ServerUse {
    fn default() -> ServerUse {
        ServerUse { permits: Semaphore::new(WAITING_MAX), silent: Mutex::default() }
    }
}

impl ServerUse {
    /// Asks the first server at most [`TOGETHER_MAX`] questions over one socket. It calls
    /// `ended` once for each question, with its position.
    pub(super) async fn ask_together(
        &self,
        questions: &[&RecordQuestion],
        plan: &ServerPlan,
        counters: &ResolverCounters,
        mut ended: impl FnMut(usize, TogetherEnd),
    ) {
        let Some(&server) = self.in_order(&plan.servers).first() else {
            return (0..questions.len()).for_each(|at| ended(at, TogetherEnd::Alone(None)));
        };
        let count = u32::try_from(questions.len()).unwrap_or(u32::MAX);
        let permits = self.permits.acquire_many(count).await;
        let (mut answered, mut silent) = (false, false);
        let sort = |at: usize, end: UdpEnd| {
            match &end {
                UdpEnd::Ended(Err(failure)) => silent |= is_silence(failure),
                UdpEnd::Ended(Ok(_)) | UdpEnd::Incomplete => answered = true,
            }
            let again = |end| TogetherEnd::Alone(Some(FirstEnd { server, end }));
            ended(
                at,
                match end {
                    UdpEnd::Ended(result) => match result.and_then(outcome) {
                        Ok(known) => TogetherEnd::Known(known),
                        Err(failure) => again(UdpEnd::Ended(Err(failure))),
                    },
                    UdpEnd::Incomplete => again(end),
                },
            );
        };
        exchange::over_udp(server, questions, true, plan.timeout, counters, sort).await;
        drop(permits);
        self.note(server, silent && !answered);
    }

    /// Asks the servers until one knows the answer; `first` is what one of them said already.
    /// A second round asks without EDNS, in case that something on the way drops such
    /// datagrams; it follows only if a server did not answer, because a datagram can be lost.
    pub(super) async fn ask(
        &self,
        question: &RecordQuestion,
        plan: &ServerPlan,
        mut first: Option<FirstEnd>,
        counters: &ResolverCounters,
    ) -> RecordOutcome {
        let mut failures: Vec<(SocketAddr, ExchangeFailure)> = Vec::new();
        for round in 0..plan.rounds {
            let mut servers = self.in_order(&plan.servers);
            if let Some(first) = &first {
                servers.retain(|server| *server != first.server);
                servers.insert(0, first.server);
            }
            let mut unanswered = false;
            for server in servers {
                let said = first.take().map(|first| first.end);
                let reply = self.ask_one(server, question, round == 0, plan, said, counters).await;
                match reply.and_then(outcome) {
                    Ok(known) => return known,
                    Err(failure) => {
                        unanswered |= failure.why == SourceFailure::Timeout;
                        failures.retain(|(failed, _)| *failed != server);
                        failures.push((server, failure));
                    }
                }
            }
            if !unanswered {
                break;
            }
        }
        counters.add(&counters.failures);
        RecordOutcome::Failed(summary(question, &failures))
    }

    /// Asks one server over UDP, unless `said` is its answer, and over TCP if it must.
    async fn ask_one(
        &self,
        server: SocketAddr,
        question: &RecordQuestion,
        edns: bool,
        plan: &ServerPlan,
        said: Option<UdpEnd>,
        counters: &ResolverCounters,
    ) -> ExchangeResult {
        if let Some(UdpEnd::Ended(result)) = said {
            return result;
        }
        let permit = self.permits.acquire().await;
        let mut end = UdpEnd::Incomplete;
        if said.is_none() {
            let take = |_, one| end = one;
            exchange::over_udp(server, &[question], edns, plan.timeout, counters, take).await;
        }
        let reply = match end {
            UdpEnd::Ended(result) => result,
            UdpEnd::Incomplete => {
                exchange::over_tcp(server, question, plan.timeout, counters).await
            }
        };
        drop(permit);
        self.note(server, reply.as_ref().is_err_and(is_silence));
        reply
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

fn is_silence(failure: &ExchangeFailure) -> bool {
    matches!(failure.why, SourceFailure::Timeout | SourceFailure::Connect)
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
