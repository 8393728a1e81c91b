//! Running one active check: connect, ask, judge.
//!
//! `app` runs these on the control thread through [`runner::ProbeRunner`]; the
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
use tidegate_core::metrics::counters::LocalError;
use tidegate_core::model::{BackendAddress, Expect, ProbeKind, ProbeSpec};
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
enum Stage {
    Connecting,
    Sending,
    Answer,
    StatusLine,
}

/// Why a probe failed.
#[derive(Debug)]
enum Fault {
    /// The backend or the path is to blame.
    Backend(String),
    /// We are.
    Local(String, LocalError),
}

/// Runs one probe. It takes no longer than the spec's timeout, not counting
/// what this process itself stood still.
pub async fn run(address: &BackendAddress, spec: &ProbeSpec) -> ProbeOutcome {
    run_and_tell(address, spec, 0).await.0
}

/// The same from the source whose turn it is, and what we were short of where
/// that was our own trouble.
async fn run_and_tell(
    address: &BackendAddress,
    spec: &ProbeSpec,
    turn: usize,
) -> (ProbeOutcome, Option<LocalError>) {
    let started = clock::now();
    let mut stage = Stage::Connecting;
    let verdict = tokio::select! {
        // What has come counts, however late we look.
        biased;
        verdict = attempt(address, (spec, turn), &mut stage) => Some(verdict),
        () = awake_for(spec.timeout) => None,
    };
    let verdict = verdict.unwrap_or_else(|| Err(stage.overdue(spec.timeout)));
    match verdict {
        Ok(()) => (ProbeOutcome::Success { took: started.elapsed() }, None),
        Err(Fault::Backend(reason)) => (ProbeOutcome::Failure { reason: bounded(reason) }, None),
        Err(Fault::Local(reason, kind)) => {
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
    address: &BackendAddress,
    (spec, turn): (&ProbeSpec, usize),
    stage: &mut Stage,
) -> Result<(), Fault> {
    let kind = &spec.kind;
    match address {
        BackendAddress::Tcp(to) => {
            let stream = sources::connect((&spec.source, turn), *to, kind).await?;
            converse(stream, kind, address, stage).await
        }
        BackendAddress::Unix(path) => {
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
) -> Result<TcpStream, Fault> {
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
    let stream =
        telling_when(socket.connect(to)).await.map_err(|(error, at_once)| {
            match at_once.then(|| local_errors::local_trouble_at_once(&error)).flatten() {
                Some(kind) => Fault::Local(local_words(kind, &error), kind),
                None => connect_fault(error),
            }
        })?;
    // Nobody listens, but the port the kernel lent us is the very one we
    // called: TCP's simultaneous open then connects us to ourselves.
    if stream.local_addr().is_ok_and(|from| from == to) {
        return Err(Fault::Backend("connection refused".to_owned()));
    }
    Ok(stream)
}

/// Waits for a connect and says of its error whether connect(2) gave it at
/// once, before any packet could have left this host: only then does it speak
/// of our own routes and interfaces.
async fn telling_when<T>(
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
    address: &BackendAddress,
    stage: &mut Stage,
) -> Result<(), Fault> {
    match kind {
        ProbeKind::Tcp => Ok(()),
        ProbeKind::SendExpect { send, expect } => {
            *stage = Stage::Sending;
            stream.write_all(send).await.map_err(talk_fault)?;
            *stage = Stage::Answer;
            match expect {
                Expect::Starts(with) => answer::starts_with(&mut stream, with).await,
                Expect::Contains(what) => answer::contains(&mut stream, what).await,
            }
        }
        ProbeKind::Http { path, host, method, status } => {
            *stage = Stage::Sending;
            let host = host.clone().unwrap_or_else(|| default_host(address));
            let request = request(method, path, &host);
            stream.write_all(request.as_bytes()).await.map_err(talk_fault)?;
            *stage = Stage::StatusLine;
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

fn default_host(address: &BackendAddress) -> String {
    match address {
        BackendAddress::Tcp(address) => address.to_string(),
        BackendAddress::Unix(_) => "localhost".to_owned(),
    }
}

/// Sorts an error of socket or connect.
fn connect_fault(error: io::Error) -> Fault {
    sort_fault(&error).unwrap_or_else(|| {
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
        Fault::Backend(words)
    })
}

/// Sorts an error after the connection stood.
fn talk_fault(error: io::Error) -> Fault {
    sort_fault(&error).unwrap_or_else(|| {
        Fault::Backend(match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                "connection reset before an answer".to_owned()
            }
            _ => format!("connection failed before an answer: {error}"),
        })
    })
}

/// Want of descriptors, source ports or memory, or a prohibition of this host,
/// is our own trouble and proves nothing about the backend.
fn sort_fault(error: &io::Error) -> Option<Fault> {
    let kind = local_errors::local_trouble(error)?;
    Some(Fault::Local(local_words(kind, error), kind))
}

fn local_words(kind: LocalError, error: &io::Error) -> String {
    match (kind, error.raw_os_error()) {
        (LocalError::Descriptors, Some(libc::ENFILE)) => "too many open files in the system".into(),
        (LocalError::Descriptors, _) => "too many open files in this process".into(),
        (LocalError::Ports, _) => "no source port left, or no such source address here".into(),
        (LocalError::Memory, Some(libc::ENOBUFS)) => "no buffer space left".into(),
        (LocalError::Memory, _) => "out of memory".into(),
        (LocalError::Route, _) => format!("no route on this host: {error}"),
        (LocalError::Other, _) => format!("this host does not allow it: {error}"),
    }
}

/// A quotation that fits a log line and holds no control characters.
fn quote(bytes: &[u8]) -> Quote<'_> {
    Quote(bytes)
}

struct Quote<'a>(&'a [u8]);

fn bounded(mut reason: String) -> String {
    if reason.len() > REASON_BYTES_MAX {
        let end = (0..=REASON_BYTES_MAX - 3).rev().find(|end| reason.is_char_boundary(*end));
        reason.truncate(end.unwrap_or(0));
        reason.push_str("...");
    }
    reason
}

// === impl Stage ===

impl Stage {
    fn overdue(self, timeout: Duration) -> Fault {
        let timeout = humantime::format_duration(timeout);
        Fault::Backend(match self {
            Stage::Connecting => format!("no connection within {timeout}"),
            Stage::Sending => format!("no answer within {timeout} (connected, sending)"),
            Stage::Answer => {
                format!("no answer within {timeout} (connected, waiting for the answer)")
            }
            Stage::StatusLine => {
                format!("no answer within {timeout} (connected, waiting for the status line)")
            }
        })
    }
}

// === impl Quote ===

impl fmt::Display for Quote<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(QUOTE_BYTES_MAX)];
        let more = if shown.len() < self.0.len() { "..." } else { "" };
        write!(f, "\"{}\"{more}", shown.escape_ascii())
    }
}
