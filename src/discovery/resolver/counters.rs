//! Counters of the resolver, for the metrics.
//!
//! `exchange` and `lookup` count; the daemon reads. Each counter only grows.

use super::wire::{DnsReply, ReplyCode};
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_core::discovery::SourceFailure;

/// Counters of the resolver.
#[derive(Debug, Default)]
pub struct ResolverCounters {
    /// Lookups that asked a server: one for the questions about A and AAAA of a name.
    pub lookups: AtomicU64,
    /// Questions sent over UDP.
    pub questions: AtomicU64,
    /// Questions repeated over TCP.
    pub over_tcp: AtomicU64,
    /// Questions that no server answered.
    pub failures: AtomicU64,
    results: [AtomicU64; QuestionResult::ALL.len()],
}

/// What a server answered to a question; the label of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuestionResult {
    /// Records.
    Ok,
    /// The name exists without records of the type (NOERROR).
    NoData,
    /// The name does not exist (NXDOMAIN).
    NoName,
    /// The server failed (SERVFAIL).
    ServerFailure,
    /// The server refused the question (REFUSED).
    Refused,
    /// Another code.
    OtherCode,
    /// No answer in time.
    Timeout,
    /// No connection to the server.
    Unreachable,
    /// An error of this host.
    Local,
    /// A datagram that is cut; the question is repeated over TCP.
    Truncated,
    /// An answer that cannot be read.
    Malformed,
    /// An ignored answer with another id or to another question: it can be forged.
    Foreign,
}

// === impl ResolverCounters ===

impl ResolverCounters {
    /// Returns the number of answers with this result.
    pub fn results(&self, result: QuestionResult) -> u64 {
        self.results[result as usize].load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note(&self, result: QuestionResult) {
        self.add(&self.results[result as usize]);
    }
}

// === impl QuestionResult ===

impl QuestionResult {
    /// All results, in the order of the variants.
    pub const ALL: [QuestionResult; 12] = [
        QuestionResult::Ok,
        QuestionResult::NoData,
        QuestionResult::NoName,
        QuestionResult::ServerFailure,
        QuestionResult::Refused,
        QuestionResult::OtherCode,
        QuestionResult::Timeout,
        QuestionResult::Unreachable,
        QuestionResult::Local,
        QuestionResult::Truncated,
        QuestionResult::Malformed,
        QuestionResult::Foreign,
    ];

    /// Returns the label value in metrics.
    pub fn name(self) -> &'static str {
        match self {
            QuestionResult::Ok => "ok",
            QuestionResult::NoData => "nodata",
            QuestionResult::NoName => "nxdomain",
            QuestionResult::ServerFailure => "servfail",
            QuestionResult::Refused => "refused",
            QuestionResult::OtherCode => "other",
            QuestionResult::Timeout => "timeout",
            QuestionResult::Unreachable => "connect",
            QuestionResult::Local => "local",
            QuestionResult::Truncated => "truncated",
            QuestionResult::Malformed => "malformed",
            QuestionResult::Foreign => "foreign",
        }
    }

    pub(super) fn of_reply(reply: &DnsReply) -> QuestionResult {
        match reply.code {
            ReplyCode::NO_ERROR if reply.records.is_empty() => QuestionResult::NoData,
            ReplyCode::NO_ERROR => QuestionResult::Ok,
            ReplyCode::NO_NAME => QuestionResult::NoName,
            ReplyCode::SERVER_FAILURE => QuestionResult::ServerFailure,
            ReplyCode::REFUSED => QuestionResult::Refused,
            _ => QuestionResult::OtherCode,
        }
    }

    /// `None`: the bytes of the answer were counted before.
    pub(super) fn of_failure(why: SourceFailure) -> Option<QuestionResult> {
        match why {
            SourceFailure::Timeout => Some(QuestionResult::Timeout),
            SourceFailure::Connect => Some(QuestionResult::Unreachable),
            SourceFailure::Local => Some(QuestionResult::Local),
            _ => None,
        }
    }
}
