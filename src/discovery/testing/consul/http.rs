//! The connections of the double: requests in, replies out, with the scripted faults of the
//! transport.
//!
//! [`super`] starts one task per connection. [`super::routes`] answers. Hand-written,
//! because an HTTP library sends no half answers. Bodies have a length; chunked requests
//! are refused.

use super::{ConsulFault, DoubleShared, routes};
use percent_encoding::percent_decode_str;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest head and body of a request.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// A request.
#[derive(Debug, Default)]
pub(super) struct DoubleRequest {
    pub(super) method: String,
    /// The decoded segments of the path.
    pub(super) path: Vec<String>,
    pub(super) query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

/// A reply.
#[derive(Debug)]
pub(super) struct DoubleReply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
}

/// Serves one connection until it ends or the double closes all connections.
pub(super) async fn serve(mut stream: TcpStream, shared: Arc<DoubleShared>) {
    let epoch = shared.epoch();
    let mut received = Vec::new();
    loop {
        let changed = shared.changed.notified();
        if shared.epoch() != epoch {
            return reset(&stream);
        }
        let request = tokio::select! {
            request = read(&mut stream, &mut received) => request,
            () = changed => continue,
        };
        let Ok(Some(request)) = request else { return };
        let reply = tokio::select! {
            reply = answer(&shared, &request) => reply,
            () = shared.closed_since(epoch) => return reset(&stream),
        };
        let sent = write(&mut stream, &reply, &shared).await;
        let last = request.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        if sent.is_err() || last {
            return;
        }
    }
}

/// A reply, which a hung agent does not send.
async fn answer(shared: &DoubleShared, request: &DoubleRequest) -> DoubleReply {
    let reply = routes::answer(shared, request).await;
    loop {
        let changed = shared.changed.notified();
        if shared.fault() != ConsulFault::Hang {
            return reply;
        }
        changed.await;
    }
}

/// The next request; `None` at the end of the connection.
async fn read(
    stream: &mut TcpStream,
    received: &mut Vec<u8>,
) -> std::io::Result<Option<DoubleRequest>> {
    loop {
        if let Some(length) = complete(received) {
            let rest = received.split_off(length.min(received.len()));
            let whole = std::mem::replace(received, rest);
            return Ok(parse(&whole));
        }
        let mut part = [0; 16 * 1024];
        let bytes = stream.read(&mut part).await?;
        if bytes == 0 || received.len() > REQUEST_BYTES_MAX {
            return Ok(None);
        }
        received.extend_from_slice(&part[..bytes]);
    }
}

/// The length of the first request, if it is complete.
fn complete(received: &[u8]) -> Option<usize> {
    let head = received.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&received[..head]).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    let body = length.and_then(|length| length.trim().parse::<usize>().ok()).unwrap_or(0);
    (received.len() >= head + body).then_some(head + body)
}

fn parse(whole: &[u8]) -> Option<DoubleRequest> {
    let head = whole.windows(4).position(|four| four == b"\r\n\r\n")?;
    let text = String::from_utf8_lossy(&whole[..head]);
    let mut lines = text.lines();
    let mut words = lines.next()?.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(&key.replace('+', " ")), decoded(&value.replace('+', " ")))
    };
    let header = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
    };
    Some(DoubleRequest {
        method,
        path: path.trim_matches('/').split('/').map(decoded).collect(),
        query: query.split('&').filter(|part| !part.is_empty()).map(pair).collect(),
        headers: lines.filter_map(header).collect(),
        body: whole[head + 4..].to_vec(),
    })
}

/// Sends a reply as the fault wants it.
async fn write(
    stream: &mut TcpStream,
    reply: &DoubleReply,
    shared: &DoubleShared,
) -> std::io::Result<()> {
    let bytes = reply.bytes();
    match shared.fault() {
        ConsulFault::Reset => {
            reset(stream);
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
        ConsulFault::HalfAnswer => {
            let head = bytes.len() - reply.body.len();
            stream.write_all(&bytes[..head + reply.body.len() / 2]).await?;
            Err(std::io::ErrorKind::UnexpectedEof.into())
        }
        ConsulFault::SlowDrip(pause) => drip(stream, &bytes, pause, shared).await,
        _ => stream.write_all(&bytes).await,
    }
}

/// Sends one byte per pause while the fault lasts, then the rest.
async fn drip(
    stream: &mut TcpStream,
    bytes: &[u8],
    pause: Duration,
    shared: &DoubleShared,
) -> std::io::Result<()> {
    for (at, byte) in bytes.iter().enumerate() {
        if !matches!(shared.fault(), ConsulFault::SlowDrip(_)) {
            return stream.write_all(&bytes[at..]).await;
        }
        stream.write_all(&[*byte]).await?;
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// Makes the close of the stream a reset.
fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

// === impl DoubleRequest ===

impl DoubleRequest {
    /// The value of a header; `name` in lower case.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    /// The first value of a parameter.
    pub(super) fn param(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn params<'r>(&'r self, name: &'r str) -> impl Iterator<Item = &'r str> {
        self.query.iter().filter(move |(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

// === impl DoubleReply ===

impl DoubleReply {
    pub(super) fn text(status: u16, text: impl Into<String>) -> DoubleReply {
        DoubleReply { status, headers: Vec::new(), body: text.into().into_bytes() }
    }

    /// The empty 200 of requests that change something.
    pub(super) fn done() -> DoubleReply {
        DoubleReply::text(200, "")
    }

    pub(super) fn json(document: &impl serde::Serialize) -> DoubleReply {
        match serde_json::to_vec(document) {
            Ok(body) => {
                let headers = vec![("Content-Type", "application/json".to_owned())];
                DoubleReply { status: 200, headers, body }
            }
            Err(error) => DoubleReply::text(500, error.to_string()),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            _ => "Internal Server Error",
        };
        let mut head = format!("HTTP/1.1 {} {reason}\r\n", self.status);
        for (name, value) in &self.headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        let _ = write!(head, "Content-Length: {}\r\n\r\n", self.body.len());
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}
