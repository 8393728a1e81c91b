//! The access-log record of an ended session, and its JSON line.
//!
//! Built by workers, formatted by the writer thread. It does no I/O.

use serde::{Serialize, Serializer};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tidegate_core::model::{ClientAddr, PeerAddr};

/// One ended session. The line has the fields in this order. `None` and an empty `timer`
/// become `null`.
#[derive(Debug, Clone, Serialize)]
pub struct AccessLogRecord {
    /// When the session ended, RFC 3339 in UTC with microseconds.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// Number of the session, unique over all upgrades and below 2^53. Workers take numbers
    /// in blocks, so they do not follow the order of time.
    pub session: u64,
    /// Number of the worker that served it.
    pub worker: u32,
    /// Number of the configuration that routed the session.
    pub generation: u64,
    /// Frontend that accepted the session.
    pub frontend: Option<Arc<str>>,
    /// Address and port of the client: those of a PROXY header, else those of the socket. Of a
    /// client of a Unix socket: `unix:uid=USER,pid=PROCESS`.
    pub client: ClientAddr,
    /// The socket's peer in the same form, if a PROXY header announced another client.
    pub peer: Option<PeerAddr>,
    /// Whether a PROXY header said that the peer itself opened the connection (`LOCAL`),
    /// usually for a health check.
    pub probe: bool,
    /// Position of the route that the session took, from 1; `null` for the frontend's pool.
    pub route: Option<u8>,
    /// Pool of the route.
    pub pool: Option<Arc<str>>,
    /// Last backend tried.
    pub backend: Option<Arc<str>>,
    /// Address of that backend.
    pub backend_address: Option<Arc<str>>,
    /// What ended the session first.
    pub cause: &'static str,
    /// How far the session was.
    pub phase: &'static str,
    /// Two letters that the log tools of HAProxy know.
    #[serde(serialize_with = "letters")]
    pub code: [u8; 2],
    /// Timeout that fired, by its name in the configuration.
    #[serde(serialize_with = "null_if_empty")]
    pub timer: &'static str,
    /// Error number of the call that failed.
    pub errno: Option<i32>,
    /// Side that sent FIN or RST first: `client` or `backend`.
    pub closed_first: Option<&'static str>,
    /// Connect attempts made.
    pub attempts: u32,
    /// What decided the pick of `backend`: `turn`, `least`, `draw`, `hash`, `only`, `retry`,
    /// `trial`, `queue`, `fail-open` or `backup`; `null` if no backend was picked.
    pub why: Option<&'static str>,
    /// Backends of the pool that the pick passed over: not eligible, at their caps, or tried
    /// before.
    pub skipped: u32,
    /// Attempts that failed, in order: `{backend, failure, errno, seconds}`. `failure` is
    /// `refused`, `timeout`, `unreachable`, `early-reset` (after the connect, before any
    /// byte), `other`, or the local resource that was missing: `ports`, `descriptors`,
    /// `memory`, `route`.
    pub tries: Vec<TryRecord>,
    /// Bytes from the client that were sent to the backend.
    pub bytes_in: u64,
    /// Bytes from the backend that were sent to the client.
    pub bytes_out: u64,
    /// Bytes from either side that the kernel of the other side had not acknowledged at the
    /// end; 0 for `finished`.
    pub bytes_undelivered: u64,
    /// Duration of the connect that succeeded.
    #[serde(rename = "connect_seconds", serialize_with = "seconds_or_null")]
    pub connect: Option<Duration>,
    /// Time from the connection to the backend to the backend's first byte.
    #[serde(rename = "first_byte_seconds", serialize_with = "seconds_or_null")]
    pub first_byte: Option<Duration>,
    /// Time from accept to close.
    #[serde(rename = "duration_seconds", serialize_with = "seconds")]
    pub duration: Duration,
}

/// A connect attempt that failed.
#[derive(Debug, Clone, Serialize)]
pub struct TryRecord {
    /// Name of the backend.
    pub backend: Arc<str>,
    /// Name of the failure (`core::health::ConnectFailure`) or of the missing local resource.
    pub failure: &'static str,
    /// Error number of the call that failed.
    pub errno: i32,
    /// Time from the start of the attempt to its failure.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub took: Duration,
}

// === impl AccessLogRecord ===

impl AccessLogRecord {
    /// Appends the line, newline included.
    pub(super) fn append_to(&self, buffer: &mut Vec<u8>) {
        let start = buffer.len();
        match serde_json::to_writer(&mut *buffer, self) {
            Ok(()) => buffer.push(b'\n'),
            // No field can fail to serialise. If one did, no line is better than half a line.
            Err(_) => buffer.truncate(start),
        }
    }
}

/// Returns the field `time` of a line, `-` if the line has none.
pub(super) fn time_of(line: &[u8]) -> &str {
    let time =
        line.strip_prefix(b"{\"time\":\"").and_then(|rest| rest.split(|b| *b == b'"').next());
    time.and_then(|time| std::str::from_utf8(time).ok()).unwrap_or("-")
}

/// RFC 3339 in UTC with microseconds. Times outside 1970..=9999 are clamped, because a wrong
/// clock must not stop the log.
fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    const YEAR_9999_END: Duration = Duration::from_secs(253_402_300_799);
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().min(YEAR_9999_END);
    serializer.collect_str(&humantime::format_rfc3339_micros(UNIX_EPOCH + since))
}

fn letters<S: Serializer>(code: &[u8; 2], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(std::str::from_utf8(code).unwrap_or("??"))
}

fn null_if_empty<S: Serializer>(word: &str, serializer: S) -> Result<S::Ok, S::Error> {
    if word.is_empty() { serializer.serialize_none() } else { serializer.serialize_str(word) }
}

/// Whole microseconds, written as seconds.
fn seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_micros() as f64 / 1e6)
}

fn seconds_or_null<S: Serializer>(time: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => seconds(time, s),
        None => s.serialize_none(),
    }
}
