//! The answers of an HTTP server: a whole one, and a stream.
//!
//! [`HttpClient`](super::HttpClient) creates them. Every read has a bound in bytes and in
//! time. An answer that ends early is a failure, never a shorter answer.

use super::dial::RequestSender;
use super::failure::{HttpFailure, failure_of_io, io_cause, short_text, with_causes};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_ENCODING, LOCATION, TRANSFER_ENCODING};
use std::time::Duration;
use tidegate_core::discovery::SourceFailure;
use tokio::time::timeout;

/// Largest body of an answer, in bytes.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Longest part of a body that a failure quotes, in bytes.
const QUOTE_BYTES_MAX: usize = 200;

/// A whole answer.
#[derive(Debug, Clone)]
pub struct HttpResponse {
    /// 200 to 299, 304, or 400 to 599.
    pub status: u16,
    /// The head.
    pub headers: HeaderMap,
    /// At most [`ANSWER_BYTES_MAX`] bytes.
    pub body: Bytes,
}

/// An answer of which each part counts when it arrives, such as a watch.
#[derive(Debug)]
pub struct HttpStream {
    status: u16,
    headers: HeaderMap,
    body: Incoming,
    server: String,
    /// The connection closes when its last sender is dropped.
    _sender: RequestSender,
}

// === impl HttpResponse ===

impl HttpResponse {
    /// Returns the failure that the status says; `None` for 200 to 299 and for 304.
    pub fn failure(&self) -> Option<HttpFailure> {
        status_failure(self.status, &self.body)
    }
}

/// Returns the failure that a status says. `body` is the begin of the server's own text.
pub fn status_failure(status: u16, body: &[u8]) -> Option<HttpFailure> {
    let why = match status {
        200..300 | 304 => return None,
        401 | 403 | 407 => SourceFailure::Auth,
        404 => SourceFailure::NotFound,
        408 | 504 => SourceFailure::Timeout,
        _ => SourceFailure::Protocol,
    };
    let begin = &body[..body.len().min(QUOTE_BYTES_MAX)];
    let text = String::from_utf8_lossy(begin);
    let quote = short_text(text.trim(), QUOTE_BYTES_MAX);
    Some(match quote.is_empty() {
        true => HttpFailure::new(why, format_args!("status {status}")),
        false => HttpFailure::new(why, format_args!("status {status}: {quote}")),
    })
}

// === impl HttpStream ===

impl HttpStream {
    pub(super) fn new(
        answer: hyper::Response<Incoming>,
        server: String,
        sender: RequestSender,
    ) -> Self {
        let (head, body) = answer.into_parts();
        let status = head.status.as_u16();
        HttpStream { status, headers: head.headers, body, server, _sender: sender }
    }

    /// The status. The body of a failure can be read with [`failure`](HttpStream::failure).
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The head.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The server's address.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Returns the next part; `None` at the end of the answer. Dropping the future loses no
    /// bytes.
    ///
    /// # Errors
    /// `Timeout`: no byte arrived in time. `Protocol` or `Connect`: the answer ended early.
    pub async fn chunk(&mut self, deadline: Duration) -> Result<Option<Bytes>, HttpFailure> {
        match timeout(deadline, next_part(&mut self.body)).await {
            Ok(part) => part.map_err(|failure| failure.at(&self.server)),
            Err(_) => {
                let text = format_args!("no bytes for {deadline:.1?}");
                Err(HttpFailure::new(SourceFailure::Timeout, text).at(&self.server))
            }
        }
    }

    /// Returns the failure that the status says, with the begin of the body.
    pub async fn failure(&mut self, deadline: Duration) -> Option<HttpFailure> {
        status_failure(self.status, b"")?;
        let body = self.chunk(deadline).await.ok().flatten().unwrap_or_default();
        status_failure(self.status, &body).map(|failure| failure.at(&self.server))
    }
}

// === reading ===

/// Refuses an answer that Tidegate does not read: a redirect, or a coded body.
pub(super) fn check_head<B>(answer: &hyper::Response<B>) -> Result<(), HttpFailure> {
    let header = |name| {
        answer.headers().get(name).map(|value| {
            let bytes = &value.as_bytes()[..value.len().min(QUOTE_BYTES_MAX)];
            String::from_utf8_lossy(bytes).into_owned()
        })
    };
    let status = answer.status().as_u16();
    if (300..400).contains(&status) && status != 304 {
        let target = header(LOCATION).unwrap_or_default();
        return Err(HttpFailure::protocol(format_args!(
            "status {status} redirects to {target:?}; redirects are not followed"
        )));
    }
    for (name, plain) in [(CONTENT_ENCODING, "identity"), (TRANSFER_ENCODING, "chunked")] {
        if let Some(coding) = header(name.clone())
            && !coding.eq_ignore_ascii_case(plain)
        {
            return Err(HttpFailure::protocol(format_args!("{name} {coding:?} is not supported")));
        }
    }
    Ok(())
}

/// Reads a body to its end.
pub(super) async fn whole_body(mut body: Incoming) -> Result<Bytes, HttpFailure> {
    let too_large =
        || HttpFailure::protocol(format_args!("the body is larger than {ANSWER_BYTES_MAX} bytes"));
    let announced = body.size_hint().lower();
    if announced > ANSWER_BYTES_MAX as u64 {
        return Err(too_large());
    }
    let Some(first) = next_part(&mut body).await? else { return Ok(Bytes::new()) };
    let Some(second) = next_part(&mut body).await? else { return Ok(first) };
    // The announced length is a promise of the server, so it reserves at most 1 MiB.
    let mut whole = BytesMut::with_capacity((announced as usize).min(1 << 20));
    whole.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(part) = next {
        if whole.len() + part.len() > ANSWER_BYTES_MAX {
            return Err(too_large());
        }
        whole.extend_from_slice(&part);
        next = next_part(&mut body).await?;
    }
    Ok(whole.freeze())
}

/// Returns the next bytes, without trailers.
async fn next_part(body: &mut Incoming) -> Result<Option<Bytes>, HttpFailure> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| failure_of_hyper(&error))?;
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// Classifies an error of hyper after the request was sent.
pub(super) fn failure_of_hyper(error: &hyper::Error) -> HttpFailure {
    let text = with_causes(error);
    if error.is_parse() || error.is_parse_too_large() {
        return HttpFailure::protocol(format_args!("cannot read the answer: {text}"));
    }
    let why = match io_cause(error) {
        // hyper reports wrong chunks as I/O errors.
        Some(io) if io.kind() == std::io::ErrorKind::InvalidInput => SourceFailure::Protocol,
        Some(io) if io.kind() == std::io::ErrorKind::InvalidData => SourceFailure::Protocol,
        Some(io) => failure_of_io(io, SourceFailure::Connect),
        None if error.is_timeout() => SourceFailure::Timeout,
        None => SourceFailure::Connect,
    };
    HttpFailure::new(why, format_args!("the connection failed: {text}"))
}
