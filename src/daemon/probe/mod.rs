//! Running one active check: connect, ask, judge.
//!
//! `daemon` runs these on the control thread through [`runner::ProbeRunner`]; the
//! workers never do. The only file of `health` (with the runner) that does I/O;
//! it keeps nothing and judges single probes, never backends.
//!
//! # How a probe ends its connection
//!
//! A `tcp` probe exchanges no bytes, so it ends with a reset, as HAProxy's do:
//! neither side keeps a TIME_WAIT entry, whatever the number of backends. With
//! `TCP_QUICKACK` off (tcp(7)) the kernel moreover holds back the last
//! acknowledgement of the handshake, and the reset then takes its place: the
//! backend's kernel has answered, but its process is not even woken and has
//! nothing to log. The other kinds have been answered by then and close
//! normally. What of an answer comes after its first packets is not read, and
//! the kernel resets a connection closed on unread data (RFC 2525, section
//! 2.17): a health page had better be short, or asked for with `HEAD`.

mod answer;
pub mod runner;
mod sources;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tidegate_core::health::ProbeOutcome;
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::{BackendAddr, Expect, ProbeKind, ProbeSpec};
use tidegate_dataplane::local_errors;
use tidegate_net::clock;
use tidegate_net::stream;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::time::MissedTickBehavior;

/// Bytes of an answer that a failure reason quotes.
const QUOTE_BYTES_MAX: usize = 48;

/// Longest failure reason, in bytes: it goes into every log line and status.
pub const REASON_BYTES_MAX: usize = 256;

/// A timeout is waited for in so many parts, of which a stall takes one.
const TIMEOUT_PARTS: u32 = 8;

/// How far a probe has come, for the reason when its time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProbeStage {
    Connecting,
    Sending,
    Answer,
    StatusLine,
}

/// Why a probe failed.
#[derive(Debug)]
enum ProbeError {
    /// The backend or the path is to blame.
    Backend(String),
    /// We are.
    Local(String, LocalErrorKind),
}

/// Runs one probe. It takes no longer than the spec's timeout, not counting
/// what this process itself stood still.
pub async fn run(address: &BackendAddr, spec: &ProbeSpec) -> ProbeOutcome {
    run_with_stage(address, spec, 0).await.0
}

/// The same from the source whose turn it is, and what we were short of where
/// that was our own trouble.
async fn run_with_stage(
    address: &BackendAddr,
    spec: &ProbeSpec,
    turn: usize,
) -> (ProbeOutcome, Option<LocalErrorKind>) {
    let started = clock::now();
    let mut stage = ProbeStage::Connecting;
    let verdict = tokio::select! {
        // What has come counts, however late we look.
        biased;
        verdict = attempt(address, (spec, turn), &mut stage) => Some(verdict),
        () = awake_for(spec.timeout) => None,
    };
    let verdict = verdict.unwrap_or_else(|| Err(stage.overdue(spec.timeout)));
    match verdict {
        Ok(()) => (ProbeOutcome::Success { took: started.elapsed() }, None),
        Err(ProbeError::Backend(reason)) => {
            (ProbeOutcome::Failure { reason: bounded(reason) }, None)
        }
        Err(ProbeError::Local(reason, kind)) => {
            (ProbeOutcome::Local { reason: bounded(reason) }, Some(kind))
        }
    }
}

/// Waits while this process runs for so long: of a stall (a stopped process, a
/// starved or suspended machine) no more than one part counts. The backend's
/// answer could not be read in that time, so its lack proves nothing.
async fn awake_for(limit: Duration) {
    let part = (limit / TIMEOUT_PARTS).max(Duration::from_nanos(1));
    let mut parts = tokio::time::interval(part);
    // After a late tick the next is a whole part away; others keep to the clock.
    parts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick is at once.
    for _ in 0..=TIMEOUT_PARTS {
        parts.tick().await;
    }
}

async fn attempt(
    address: &BackendAddr,
    (spec, turn): (&ProbeSpec, usize),
    stage: &mut ProbeStage,
) -> Result<(), ProbeError> {
    let kind = &spec.kind;
    match address {
        BackendAddr::Tcp(to) => {
            let stream = sources::connect((&spec.source, turn), *to, kind).await?;
            converse(stream, kind, address, stage).await
        }
        BackendAddr::Unix(path) => {
            let stream =
                UnixStream::connect(stream::unix_name(path)).await.map_err(connect_fault)?;
            converse(stream, kind, address, stage).await
        }
    }
}

async fn connect_tcp(
    source: Option<IpAddr>,
    to: SocketAddr,
    kind: &ProbeKind,
) -> Result<TcpStream, ProbeError> {
    let socket = match to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }
    .map_err(connect_fault)?;
    socket.set_nodelay(true).map_err(connect_fault)?;
    if let Some(source) = source {
        stream::start_at(&socket, source).map_err(connect_fault)?;
    }
    if *kind == ProbeKind::Tcp {
        let raw = socket2::SockRef::from(&socket);
        raw.set_linger(Some(Duration::ZERO)).map_err(connect_fault)?;
        // A refinement; where it is refused the probe works all the same.
        let _ = raw.set_tcp_quickack(false);
    }
    let stream = with_stage(socket.connect(to)).await.map_err(|(error, at_once)| match at_once
        .then(|| local_errors::local_error_now(&error))
        .flatten()
    {
        Some(kind) => ProbeError::Local(local_error_text(kind, &error), kind),
        None => connect_fault(error),
    })?;
    // Nobody listens, but the port the kernel lent us is the very one we
    // called: TCP's simultaneous open then connects us to ourselves.
    if stream.local_addr().is_ok_and(|from| from == to) {
        return Err(ProbeError::Backend("connection refused".to_owned()));
    }
    Ok(stream)
}

/// Waits for a connect and says of its error whether connect(2) gave it at
/// once, before any packet could have left this host: only then does it speak
/// of our own routes and interfaces.
async fn with_stage<T>(
    connect: impl Future<Output = io::Result<T>>,
) -> Result<T, (io::Error, bool)> {
    let mut connect = std::pin::pin!(connect);
    let mut at_once = true;
    std::future::poll_fn(|task| {
        let polled = connect.as_mut().poll(task);
        let first = std::mem::replace(&mut at_once, false);
        polled.map_err(|error| (error, first))
    })
    .await
}

async fn converse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    kind: &ProbeKind,
    address: &BackendAddr,
    stage: &mut ProbeStage,
) -> Result<(), ProbeError> {
    match kind {
        ProbeKind::Tcp => Ok(()),
        ProbeKind::SendExpect { send, expect } => {
            *stage = ProbeStage::Sending;
            stream.write_all(send.as_bytes()).await.map_err(talk_fault)?;
            *stage = ProbeStage::Answer;
            match expect {
                Expect::Starts(with) => answer::starts_with(&mut stream, with.as_bytes()).await,
                Expect::Contains(what) => answer::contains(&mut stream, what.as_bytes()).await,
            }
        }
        ProbeKind::Http { path, host, method, status } => {
            *stage = ProbeStage::Sending;
            let host = host.clone().unwrap_or_else(|| default_host(address));
            let request = request(method, path, &host);
            stream.write_all(request.as_bytes()).await.map_err(talk_fault)?;
            *stage = ProbeStage::StatusLine;
            answer::http(&mut stream, status).await
        }
    }
}

/// RFC 9112, sections 3 and 9.6. Path, host and method come from the validated
/// configuration and hold no line ends.
fn request(method: &str, path: &str, host: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tidegate/{}\r\n\
         Accept: */*\r\nConnection: close\r\n\r\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn default_host(address: &BackendAddr) -> String {
    match address {
        BackendAddr::Tcp(address) => address.to_string(),
        BackendAddr::Unix(_) => "localhost".to_owned(),
    }
}

/// Sorts an error of socket or connect.
fn connect_fault(error: io::Error) -> ProbeError {
    classify_error(&error).unwrap_or_else(|| {
        let words = match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => "connection refused".to_owned(),
            Some(libc::ENOENT) => "no such socket".to_owned(),
            Some(libc::EHOSTUNREACH) => "host unreachable".to_owned(),
            Some(libc::ENETUNREACH) => "network unreachable".to_owned(),
            Some(libc::ETIMEDOUT) => "connect timed out".to_owned(),
            // unix(7) does not wait for room when the socket is non-blocking.
            Some(libc::EAGAIN) => "the socket's accept queue is full".to_owned(),
            _ => format!("connect failed: {error}"),
        };
        ProbeError::Backend(words)
    })
}

/// Sorts an error after the connection stood.
fn talk_fault(error: io::Error) -> ProbeError {
    classify_error(&error).unwrap_or_else(|| {
        ProbeError::Backend(match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                "connection reset before an answer".to_owned()
            }
            _ => format!("connection failed before an answer: {error}"),
        })
    })
}

/// Want of descriptors, source ports or memory, or a prohibition of this host,
/// is our own trouble and proves nothing about the backend.
fn classify_error(error: &io::Error) -> Option<ProbeError> {
    let kind = local_errors::local_error_kind(error)?;
    Some(ProbeError::Local(local_error_text(kind, error), kind))
}

fn local_error_text(kind: LocalErrorKind, error: &io::Error) -> String {
    match (kind, error.raw_os_error()) {
        (LocalErrorKind::Descriptors, Some(libc::ENFILE)) => {
            "too many open files in the system".into()
        }
        (LocalErrorKind::Descriptors, _) => "too many open files in this process".into(),
        (LocalErrorKind::Ports, _) => "no source port left, or no such source address here".into(),
        (LocalErrorKind::Memory, Some(libc::ENOBUFS)) => "no buffer space left".into(),
        (LocalErrorKind::Memory, _) => "out of memory".into(),
        (LocalErrorKind::Route, _) => format!("no route on this host: {error}"),
        (LocalErrorKind::Other, _) => format!("this host does not allow it: {error}"),
    }
}

/// A quotation that fits a log line and holds no control characters.
fn quote(bytes: &[u8]) -> QuotedBytes<'_> {
    QuotedBytes(bytes)
}

struct QuotedBytes<'a>(&'a [u8]);

fn bounded(mut reason: String) -> String {
    if reason.len() > REASON_BYTES_MAX {
        let end = (0..=REASON_BYTES_MAX - 3).rev().find(|end| reason.is_char_boundary(*end));
        reason.truncate(end.unwrap_or(0));
        reason.push_str("...");
    }
    reason
}

// === impl ProbeStage ===

impl ProbeStage {
    fn overdue(self, timeout: Duration) -> ProbeError {
        let timeout = humantime::format_duration(timeout);
        ProbeError::Backend(match self {
            ProbeStage::Connecting => format!("no connection within {timeout}"),
            ProbeStage::Sending => format!("no answer within {timeout} (connected, sending)"),
            ProbeStage::Answer => {
                format!("no answer within {timeout} (connected, waiting for the answer)")
            }
            ProbeStage::StatusLine => {
                format!("no answer within {timeout} (connected, waiting for the status line)")
            }
        })
    }
}

// === impl QuotedBytes ===

impl fmt::Display for QuotedBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(QUOTE_BYTES_MAX)];
        let more = if shown.len() < self.0.len() { "..." } else { "" };
        write!(f, "\"{}\"{more}", shown.escape_ascii())
    }
}
