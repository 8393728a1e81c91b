//! What is known of an ended session, and its JSON line.
//!
//! Built by workers, formatted by the writer thread. It knows words and
//! numbers, not the proxy's types, and does no I/O.

use serde::{Serialize, Serializer};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One ended session. The fields stand in the order of the line; a `None` (and
/// an empty `timer`) is `null` there.
#[derive(Debug, Clone, Serialize)]
pub struct AccessLogRecord {
    /// When the session ended.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// Unique in the process and those it was upgraded from; below 2^53, as JSON readers
    /// keep no more.
    pub session: u64,
    /// Number of the worker that served it.
    pub worker: u32,
    /// Of the configuration it was routed by.
    pub generation: u64,
    /// Frontend it came in through.
    pub frontend: Option<Arc<str>>,
    /// Peer's address.
    pub client: LoggedClient,
    /// Pool it was routed to.
    pub pool: Option<Arc<str>>,
    /// Backend tried last.
    pub backend: Option<Arc<str>>,
    /// Where that backend listens.
    pub backend_address: Option<Arc<str>>,
    /// What ended it (`core::outcome::Cause`).
    pub cause: &'static str,
    /// How far it had come (`core::outcome::Phase`).
    pub phase: &'static str,
    /// The two ASCII letters log tools know (`core::outcome::code`).
    #[serde(serialize_with = "letters")]
    pub code: [u8; 2],
    /// The timer that fired; empty for none.
    #[serde(serialize_with = "null_if_empty")]
    pub timer: &'static str,
    /// Of the call that failed.
    pub errno: Option<i32>,
    /// Side that sent FIN or RST first (`core::outcome::Side`).
    pub closed_first: Option<&'static str>,
    /// Connect attempts made.
    pub attempts: u32,
    /// Those that failed, in order.
    pub tries: Vec<TryRecord>,
    /// Sent on to the backend.
    pub bytes_in: u64,
    /// Sent on to the client.
    pub bytes_out: u64,
    /// Come from either side, and not taken by the other's kernel.
    pub bytes_undelivered: u64,
    /// How long the connect that succeeded took.
    #[serde(rename = "connect_seconds", serialize_with = "seconds_or_null")]
    pub connect: Option<Duration>,
    /// From the upstream connection to the backend's first byte.
    #[serde(rename = "first_byte_seconds", serialize_with = "seconds_or_null")]
    pub first_byte: Option<Duration>,
    /// From accept to close.
    #[serde(rename = "duration_seconds", serialize_with = "seconds")]
    pub duration: Duration,
}

/// A connect attempt that failed.
#[derive(Debug, Clone, Serialize)]
pub struct TryRecord {
    /// Name of the backend.
    pub backend: Arc<str>,
    /// How (`core::health::ConnectFailure`), or which resource of this host was missing.
    pub failure: &'static str,
    /// Of the call that failed.
    pub errno: i32,
    /// How long it took.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub took: Duration,
}

/// A client's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoggedClient {
    /// Over IP.
    Socket(SocketAddr),
    /// Over a Unix socket, whose clients have no address.
    Unix,
}

// === impl AccessLogRecord ===

impl AccessLogRecord {
    /// Appends the line, newline included.
    pub(super) fn append_to(&self, buffer: &mut Vec<u8>) {
        let start = buffer.len();
        match serde_json::to_writer(&mut *buffer, self) {
            Ok(()) => buffer.push(b'\n'),
            // Nothing above can fail to serialise; a half line would be worse.
            Err(_) => buffer.truncate(start),
        }
    }
}

// === impl LoggedClient ===

impl fmt::Display for LoggedClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoggedClient::Socket(address) => address.fmt(f),
            LoggedClient::Unix => f.write_str("unix"),
        }
    }
}

impl Serialize for LoggedClient {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// RFC 3339 in UTC with microseconds; times outside 1970..=9999 are moved to
/// the nearest end, since a stopped clock must not stop the log.
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
