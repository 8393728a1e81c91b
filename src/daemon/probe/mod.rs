//! Runs one probe: connect, send a request, check the answer.
//!
//! The control thread calls it through [`runner::ProbeRunner`]. `tidegate heartbeat`
//! calls [`run`]. Workers never run probes. A probe keeps no state, and it does not
//! decide the state of a backend.
//!
//! # How a probe ends its connection
//!
//! - A `tcp` probe without TLS and PROXY header exchanges no data and ends with a reset, as
//!   HAProxy does. No TIME_WAIT entry remains on either side. `TCP_QUICKACK` is off (tcp(7)), so the
//!   kernel delays the last ACK of the handshake, and the reset replaces it. The
//!   backend's kernel has answered, but its process does not wake and logs nothing.
//! - Other probes close the connection when the answer is decided. The rest of a
//!   long answer is not read. The kernel resets a connection that is closed with
//!   unread data (RFC 2525, section 2.17), so a health page should be short, or the
//!   method should be `HEAD`.

mod agent;
mod answer;
mod answer_bytes;
mod dns;
mod exec;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod http;
mod ldap;
mod mysql;
mod password;
mod postgres;
mod redis;
pub mod runner;
mod smtp;
mod sources;
#[cfg(test)]
mod tests;
pub mod tls;

use crate::probe_helper::ProbeHelper;
use answer::AnswerReader;
use answer_bytes::AnswerBytes;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tidegate_core::health::{ProbeAnswer, ProbeOutcome};
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::{
    BackendAddr, CommandSubject, DnsProbeTransport, ExecProbe, ProbeBytes, ProbeKind, ProbeSpec,
    ProbeStep, ProbeTarget,
};
use tidegate_core::proxy_protocol;
use tidegate_dataplane::local_errors;
use tidegate_net::clock;
use tidegate_net::stream;
use tls::{StartTls, TlsConfigs};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::time::MissedTickBehavior;

/// Bytes of an answer that a reason quotes.
const QUOTE_BYTES_MAX: usize = 48;

/// Bytes of a server's error message that a reason quotes.
const MESSAGE_BYTES_MAX: usize = 160;

/// Longest reason of a failed probe, in bytes. The reason appears in log lines and in
/// status.
pub const REASON_BYTES_MAX: usize = 256;

/// A timeout is measured in this many parts. A stall uses up at most one of them.
const TIMEOUT_PARTS: u32 = 8;

/// What a probe is doing, for the reason of a timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProbeStage {
    Connecting,
    Sending,
    Answer,
    /// Reads the answer of the step with this number.
    Step(usize),
    StatusLine,
    Handshake,
}

/// Why a probe failed.
#[derive(Debug)]
enum ProbeError {
    /// The backend or the path failed.
    Backend(String),
    /// The probe ran and says nothing about the backend.
    Undecided(String),
    /// This host failed; this says nothing about the backend.
    Local(String, LocalErrorKind),
}

/// Runs one probe. It ends within the timeout of `spec`, except for stalls of this
/// process (see [`timeout_without_stalls`]).
pub async fn run(address: &BackendAddr, spec: &ProbeSpec) -> ProbeOutcome {
    run_from(address, spec, 0, &TlsConfigs::default()).await.0
}

/// Runs one probe from the source address number `turn`. Also returns the kind of a
/// local error.
async fn run_from(
    address: &BackendAddr,
    spec: &ProbeSpec,
    turn: usize,
    configs: &TlsConfigs,
) -> (ProbeOutcome, Option<LocalErrorKind>) {
    let started = clock::now();
    let mut stage = ProbeStage::Connecting;
    let result = tokio::select! {
        // An answer that has arrived takes precedence over the timeout.
        biased;
        result = connect_and_exchange(address, (spec, turn), configs, &mut stage) => Some(result),
        () = timeout_without_stalls(spec.timeout) => None,
    };
    outcome(result.unwrap_or_else(|| Err(stage.timeout_error(spec.timeout))), started.elapsed())
}

/// Runs one probe of kind `exec`. Its timeout begins with the command, not with the wait for a
/// slot. The helper measures it, so a stall of this process does not end a command early.
async fn run_command(
    helper: &ProbeHelper,
    probe: &ExecProbe,
    (pool, backend): (&str, &str),
    address: &BackendAddr,
    spec: &ProbeSpec,
) -> (ProbeOutcome, Option<LocalErrorKind>) {
    let started = clock::now();
    let subject = CommandSubject::new(pool, backend, &destination(address, &spec.target));
    let result = exec::run(helper, probe, subject, spec.timeout).await;
    outcome(result, started.elapsed())
}

fn outcome(
    result: Result<ProbeAnswer, ProbeError>,
    took: Duration,
) -> (ProbeOutcome, Option<LocalErrorKind>) {
    match result {
        Ok(answer) => (ProbeOutcome::Success { took, answer }, None),
        Err(ProbeError::Backend(reason)) => {
            (ProbeOutcome::Failure { took, reason: bounded(reason) }, None)
        }
        Err(ProbeError::Undecided(reason)) => {
            (ProbeOutcome::Undecided { took, reason: bounded(reason) }, None)
        }
        Err(ProbeError::Local(reason, kind)) => {
            (ProbeOutcome::Local { reason: bounded(reason) }, Some(kind))
        }
    }
}

/// Waits until this process has run for `limit`. Of a stall, at most one part
/// counts, because the process could not read the answer during the stall. Examples
/// are a stopped process, a suspended host, and a host without free CPU time.
async fn timeout_without_stalls(limit: Duration) {
    let part = (limit / TIMEOUT_PARTS).max(Duration::from_nanos(1));
    let mut parts = tokio::time::interval(part);
    // `Delay`: after a late tick, the next tick follows a whole part later.
    parts.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // One tick more than parts, because the first tick is immediate.
    for _ in 0..=TIMEOUT_PARTS {
        parts.tick().await;
    }
}

async fn connect_and_exchange(
    address: &BackendAddr,
    (spec, turn): (&ProbeSpec, usize),
    configs: &TlsConfigs,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    if let ProbeKind::Exec(_) = &spec.kind {
        let why = "this process runs no commands".to_owned();
        return Err(ProbeError::Local(why, LocalErrorKind::Other));
    }
    let target = &spec.target;
    // A probe that ends after the connect resets the connection.
    let silent = target.tls.is_none() && target.header_version.is_none();
    let reset = spec.kind == ProbeKind::Tcp && silent;
    let to = destination(address, target);
    if let (ProbeKind::Dns(probe), BackendAddr::Tcp(socket)) = (&spec.kind, &to)
        && probe.transport == DnsProbeTransport::Udp
    {
        let asked = (probe, spec.timeout);
        return Box::pin(dns::over_udp((&target.source, turn), *socket, asked, stage)).await;
    }
    match &to {
        BackendAddr::Tcp(socket) | BackendAddr::ClientPort(socket, _) => {
            let stream = sources::connect((&target.source, turn), *socket, reset).await?;
            if reset {
                return Ok(ProbeAnswer::Connected);
            }
            // In a box, because many probes that only connect run at the same time.
            Box::pin(exchange_over(stream, spec, &to, configs, stage)).await
        }
        BackendAddr::Unix(path) => {
            let stream = UnixStream::connect(stream::unix_name(path)).await;
            let stream = stream.map_err(connect_error)?;
            Box::pin(exchange_over(stream, spec, &to, configs, stage)).await
        }
    }
}

/// Where the probe of a backend connects.
fn destination(backend: &BackendAddr, target: &ProbeTarget) -> BackendAddr {
    match backend {
        // The reader of the configuration rejects probes of `ClientPort` without a port.
        BackendAddr::Tcp(own) | BackendAddr::ClientPort(own, _) => {
            let ip = target.address.unwrap_or(own.ip());
            BackendAddr::Tcp(SocketAddr::new(ip, target.port.unwrap_or(own.port())))
        }
        BackendAddr::Unix(path) => match (target.address, target.port) {
            (Some(ip), Some(port)) => BackendAddr::Tcp(SocketAddr::new(ip, port)),
            _ => BackendAddr::Unix(path.clone()),
        },
    }
}

/// Sends the PROXY header and does the TLS handshake, if the probe has them, and then the
/// exchange.
async fn exchange_over(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    spec: &ProbeSpec,
    address: &BackendAddr,
    configs: &TlsConfigs,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    if let Some(version) = spec.target.header_version {
        *stage = ProbeStage::Sending;
        let header = proxy_protocol::encode_local(version);
        stream.write_all(&header).await.map_err(exchange_error)?;
    }
    let tls = StartTls { settings: spec.target.tls.as_ref(), backend: address, configs };
    if tls.settings.is_none() || spec.kind.starts_tls() {
        return exchange(stream, &spec.kind, tls, stage).await;
    }
    *stage = ProbeStage::Handshake;
    let mut stream = tls.handshake(stream).await?;
    let inside = StartTls { settings: None, ..tls };
    let result = match exchange(&mut stream, &spec.kind, inside, stage).await {
        Ok(ProbeAnswer::Connected) => Ok(ProbeAnswer::Handshake),
        other => other,
    };
    tls::end(&mut stream).await;
    result
}

async fn connect_tcp(
    source: Option<IpAddr>,
    to: SocketAddr,
    reset: bool,
) -> Result<TcpStream, ProbeError> {
    let socket = match to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }
    .map_err(connect_error)?;
    socket.set_nodelay(true).map_err(connect_error)?;
    if let Some(source) = source {
        stream::start_at(&socket, source).map_err(connect_error)?;
    }
    if reset {
        let raw = socket2::SockRef::from(&socket);
        raw.set_linger(Some(Duration::ZERO)).map_err(connect_error)?;
        // An optimization: the probe also works without it.
        let _ = raw.set_tcp_quickack(false);
    }
    let connected = note_immediate_error(socket.connect(to)).await;
    let stream = connected.map_err(|(error, immediate)| {
        match immediate.then(|| local_errors::local_error_now(&error)).flatten() {
            Some(kind) => ProbeError::Local(local_error_text(kind, &error), kind),
            None => connect_error(error),
        }
    })?;
    // Without a listener, the kernel may have chosen the destination port as the local
    // port. The connection then leads to itself (TCP simultaneous open).
    if stream.local_addr().is_ok_and(|from| from == to) {
        return Err(ProbeError::Backend("connection refused".to_owned()));
    }
    Ok(stream)
}

/// Waits for a connect. An error comes with a flag: connect(2) itself returned it,
/// before any packet could leave this host. Only such an error is about the routes
/// and interfaces of this host.
async fn note_immediate_error<T>(
    connect: impl Future<Output = io::Result<T>>,
) -> Result<T, (io::Error, bool)> {
    let mut connect = std::pin::pin!(connect);
    let mut immediate = true;
    std::future::poll_fn(|task| {
        let polled = connect.as_mut().poll(task);
        let first = std::mem::replace(&mut immediate, false);
        polled.map_err(|error| (error, first))
    })
    .await
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    kind: &ProbeKind,
    tls: StartTls<'_>,
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    match kind {
        // `run_command` runs commands, without a connection.
        ProbeKind::Tcp | ProbeKind::Exec(_) => Ok(ProbeAnswer::Connected),
        ProbeKind::SendExpect { send, expect } => {
            let mut answer = AnswerReader::new(&mut stream, Vec::new(), None);
            write(answer.stream(), send, stage).await?;
            *stage = ProbeStage::Answer;
            answer.expect(expect).await?;
            Ok(ProbeAnswer::Expected)
        }
        ProbeKind::Steps { steps } => run_steps(&mut stream, steps, stage).await,
        ProbeKind::Http(probe) => {
            http::exchange(&mut stream, probe, tls.backend, stage).await.map(ProbeAnswer::Status)
        }
        ProbeKind::Redis(login) => {
            let password = password::read(login).await?;
            let answer = AnswerBytes::new(&mut stream, stage);
            let password = password.as_ref().map(|password| password.as_str());
            redis::exchange(answer, login.user.as_deref(), password).await
        }
        ProbeKind::Postgres(probe) => postgres::exchange(stream, probe, tls, stage).await,
        ProbeKind::Mysql(login) => mysql::exchange(stream, login, tls, stage).await,
        ProbeKind::Smtp => smtp::exchange(AnswerBytes::new(&mut stream, stage)).await,
        ProbeKind::Ldap => ldap::exchange(AnswerBytes::new(&mut stream, stage)).await,
        ProbeKind::Dns(probe) => {
            dns::over_stream(AnswerBytes::new(&mut stream, stage), probe).await
        }
        ProbeKind::Agent { send } => agent::exchange(&mut stream, send, stage).await,
    }
}

async fn run_steps(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    steps: &[ProbeStep],
    stage: &mut ProbeStage,
) -> Result<ProbeAnswer, ProbeError> {
    let mut answer = AnswerReader::new(stream, Vec::new(), None);
    for (at, step) in steps.iter().enumerate() {
        let done = match step {
            ProbeStep::Send(bytes) => write(answer.stream(), bytes, stage).await,
            ProbeStep::Expect(expect) => {
                *stage = ProbeStage::Step(at + 1);
                answer.expect(expect).await
            }
        };
        done.map_err(|error| match error {
            ProbeError::Backend(reason) => {
                ProbeError::Backend(format!("step {}: {reason}", at + 1))
            }
            local => local,
        })?;
    }
    Ok(ProbeAnswer::Expected)
}

async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    bytes: &ProbeBytes,
    stage: &mut ProbeStage,
) -> Result<(), ProbeError> {
    *stage = ProbeStage::Sending;
    stream.write_all(&bytes.0).await.map_err(exchange_error)?;
    stream.flush().await.map_err(exchange_error)
}

/// Classifies an error of socket(2) or connect(2).
fn connect_error(error: io::Error) -> ProbeError {
    local_error(&error).unwrap_or_else(|| {
        let reason = match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => "connection refused".to_owned(),
            Some(libc::ENOENT) => "socket file does not exist".to_owned(),
            Some(libc::EHOSTUNREACH) => "host unreachable".to_owned(),
            Some(libc::ENETUNREACH) => "network unreachable".to_owned(),
            Some(libc::ETIMEDOUT) => "connect timed out".to_owned(),
            // A non-blocking connect to a full UNIX socket fails immediately (unix(7)).
            Some(libc::EAGAIN) => "listen queue of the socket is full".to_owned(),
            _ => format!("connect failed: {error}"),
        };
        ProbeError::Backend(reason)
    })
}

/// Classifies an error of an established connection.
fn exchange_error(error: io::Error) -> ProbeError {
    local_error(&error).unwrap_or_else(|| {
        ProbeError::Backend(match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                "connection reset before the answer was complete".to_owned()
            }
            _ => format!("connection failed before the answer was complete: {error}"),
        })
    })
}

/// Returns the local error, if `error` is one: no file descriptors, source ports or
/// memory, or rejected by this host.
fn local_error(error: &io::Error) -> Option<ProbeError> {
    let kind = local_errors::local_error_kind(error)?;
    Some(ProbeError::Local(local_error_text(kind, error), kind))
}

fn local_error_text(kind: LocalErrorKind, error: &io::Error) -> String {
    match (kind, error.raw_os_error()) {
        (LocalErrorKind::Descriptors, Some(libc::ENFILE)) => {
            "too many open files in the system".into()
        }
        (LocalErrorKind::Descriptors, _) => "too many open files in this process".into(),
        (LocalErrorKind::Ports, _) => {
            "no free source port, or the source address is not on this host".into()
        }
        (LocalErrorKind::Memory, Some(libc::ENOBUFS)) => "out of kernel buffers".into(),
        (LocalErrorKind::Memory, _) => "out of memory".into(),
        (LocalErrorKind::Route, _) => format!("no route on this host: {error}"),
        (LocalErrorKind::Other, _) => format!("rejected by this host: {error}"),
    }
}

/// Quotes at most [`QUOTE_BYTES_MAX`] bytes, with control characters escaped.
fn quote(bytes: &[u8]) -> QuotedBytes<'_> {
    QuotedBytes { bytes, max: QUOTE_BYTES_MAX }
}

/// Quotes an error message of a server: at most [`MESSAGE_BYTES_MAX`] bytes.
fn quote_message(bytes: &[u8]) -> QuotedBytes<'_> {
    QuotedBytes { bytes, max: MESSAGE_BYTES_MAX }
}

struct QuotedBytes<'a> {
    bytes: &'a [u8],
    max: usize,
}

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
    fn timeout_error(self, timeout: Duration) -> ProbeError {
        let timeout = humantime::format_duration(timeout);
        let doing = match self {
            ProbeStage::Handshake => "waiting for the TLS handshake",
            ProbeStage::Step(number) => {
                let reason = format!(
                    "timed out after {timeout} while waiting for the answer of step {number}"
                );
                return ProbeError::Backend(reason);
            }
            ProbeStage::Connecting => "connecting",
            ProbeStage::Sending => "sending the request",
            ProbeStage::Answer => "waiting for the answer",
            ProbeStage::StatusLine => "waiting for the status line",
        };
        ProbeError::Backend(format!("timed out after {timeout} while {doing}"))
    }
}

// === impl QuotedBytes ===

impl fmt::Display for QuotedBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.bytes[..self.bytes.len().min(self.max)];
        let more = if shown.len() < self.bytes.len() { "..." } else { "" };
        write!(f, "\"{}\"{more}", shown.escape_ascii())
    }
}
