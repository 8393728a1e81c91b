//! Sends the request of an HTTP probe and checks the response.
//!
//! Called by probes of kind `http`. Reading stops with the packet that decides the result,
//! or at the bounds below. Of a response, only the status is kept.

use super::answer::{AnswerReader, Decode};
use super::{ProbeError, ProbeStage, exchange_error, quote};
use std::ops::Range;
use tidegate_core::model::{BackendAddr, Expect, HttpProbe, Words};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes read up to the end of the final status line, including interim responses. With
/// `expect`: up to the end of the headers. A status line has a few dozen bytes, so a longer
/// answer is not HTTP.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Initial buffer size. A short health page fits.
const READ_BYTES: usize = 4 * 1024;

/// Longest line with the size of a chunk (RFC 9112, section 7.1).
const CHUNK_LINE_BYTES_MAX: usize = 128;

/// The only 1xx status that is final: the connection switches to another protocol
/// (RFC 9110, section 15.2.2).
const SWITCHING_PROTOCOLS: u16 = 101;

/// Reads an answer line by line.
struct AnswerLines<'s, S> {
    stream: &'s mut S,
    buffer: Vec<u8>,
    /// Offset of the next line in `buffer`.
    start: usize,
}

/// Sends the request and checks the response. Returns its status.
pub(super) async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    probe: &HttpProbe,
    to: &BackendAddr,
    stage: &mut ProbeStage,
) -> Result<u16, ProbeError> {
    *stage = ProbeStage::Sending;
    stream.write_all(request(probe, to).as_bytes()).await.map_err(exchange_error)?;
    stream.flush().await.map_err(exchange_error)?;
    *stage = ProbeStage::StatusLine;
    let mut lines = AnswerLines { stream, buffer: Vec::with_capacity(READ_BYTES), start: 0 };
    let status = lines.status(&probe.status).await?;
    if let Some(expect) = &probe.expect {
        *stage = ProbeStage::Answer;
        lines.body(expect).await?;
    }
    Ok(status)
}

/// Builds the request (RFC 9112, sections 3 and 9.6). Every part comes from the validated
/// configuration and contains no line ends.
fn request(probe: &HttpProbe, to: &BackendAddr) -> String {
    let HttpProbe { path, method, .. } = probe;
    let version = probe.version.word();
    let host = probe.host.clone().unwrap_or_else(|| default_host(to));
    let mut request = format!("{method} {path} HTTP/{version}\r\nHost: {host}\r\n");
    let defaults =
        [("User-Agent", concat!("tidegate/", env!("CARGO_PKG_VERSION"))), ("Accept", "*/*")];
    let given = |name: &str| probe.headers.iter().any(|(own, _)| own.eq_ignore_ascii_case(name));
    let defaults = defaults.into_iter().filter(|(name, _)| !given(name));
    let own = probe.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in defaults.chain(own) {
        request.extend([name, ": ", value, "\r\n"]);
    }
    request.push_str("Connection: close\r\n\r\n");
    request
}

fn default_host(to: &BackendAddr) -> String {
    match to {
        BackendAddr::Tcp(_) | BackendAddr::ClientPort(..) => to.to_string(),
        BackendAddr::Unix(_) => "localhost".to_owned(),
    }
}

/// Returns whether another response follows this one. That is the case for all 1xx
/// except 101 (RFC 9110, section 15.2).
fn is_interim(status: u16) -> bool {
    status < 200 && status != SWITCHING_PROTOCOLS
}

fn check_status(status: u16, wanted: &[(u16, u16)]) -> Result<(), ProbeError> {
    if wanted.iter().any(|(low, high)| (*low..=*high).contains(&status)) {
        return Ok(());
    }
    let ranges: Vec<String> = wanted
        .iter()
        .map(|(low, high)| if low == high { low.to_string() } else { format!("{low}-{high}") })
        .collect();
    Err(ProbeError::Backend(format!("status {status}, expected {}", ranges.join(","))))
}

/// Parses a status line such as `HTTP/1.1 200 OK` (RFC 9112, section 4). The reason
/// phrase is optional.
fn parse_status(line: &[u8]) -> Option<u16> {
    let rest = line.strip_prefix(b"HTTP/1.")?;
    let [b'0'..=b'9', b' ', digits @ ..] = rest else { return None };
    let (number, after) = digits.split_at_checked(3)?;
    if !number.iter().all(u8::is_ascii_digit) || !matches!(after.first(), None | Some(b' ')) {
        return None;
    }
    std::str::from_utf8(number).ok()?.parse().ok().filter(|status| *status >= 100)
}

/// Removes the frames of chunks (RFC 9112, section 7.1) from the bytes so far. Returns
/// `None` if they have no such form.
fn unchunked(mut raw: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::with_capacity(raw.len());
    loop {
        let Some(end) = raw.iter().position(|byte| *byte == b'\n') else {
            return (raw.len() <= CHUNK_LINE_BYTES_MAX).then_some(body);
        };
        let line = std::str::from_utf8(&raw[..end]).ok()?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        raw = &raw[end + 1..];
        body.extend_from_slice(&raw[..size.min(raw.len())]);
        // A line end follows each chunk. Nothing follows the last one, which has size 0.
        let rest = raw.get(size..).filter(|_| size > 0);
        raw = match rest.and_then(|rest| rest.iter().position(|byte| *byte == b'\n')) {
            Some(end) => &raw[size + end + 1..],
            None => return Some(body),
        };
    }
}

// === impl AnswerLines ===

impl<S: AsyncRead + Unpin> AnswerLines<'_, S> {
    /// Succeeds if the status of the final response is in one of the `wanted` ranges.
    async fn status(&mut self, wanted: &[(u16, u16)]) -> Result<u16, ProbeError> {
        loop {
            let line = self.next().await?;
            let line = &self.buffer[line];
            let Some(status) = parse_status(line) else {
                return Err(ProbeError::Backend(format!(
                    "wrong answer: got {}, expected an HTTP/1 status line",
                    quote(line)
                )));
            };
            if !is_interim(status) {
                return check_status(status, wanted).map(|()| status);
            }
            // Skip the headers of the interim response, which end with an empty line.
            while !self.next().await?.is_empty() {}
        }
    }

    /// Skips the headers and succeeds if the body is as expected.
    async fn body(&mut self, expect: &Expect) -> Result<(), ProbeError> {
        let mut chunked = false;
        loop {
            let line = self.next().await?;
            if line.is_empty() {
                break;
            }
            let line = self.buffer[line].to_ascii_lowercase();
            if let Some(coding) = line.strip_prefix(b"transfer-encoding:") {
                chunked = coding.trim_ascii().ends_with(b"chunked");
            }
        }
        let begun = self.buffer.split_off(self.start);
        let decode = chunked.then_some(unchunked as Decode);
        AnswerReader::new(&mut *self.stream, begun, decode).expect(expect).await
    }

    /// Returns the range of the next line in `buffer`, without its line end.
    async fn next(&mut self) -> Result<Range<usize>, ProbeError> {
        let mut searched = self.start;
        loop {
            if let Some(end) = self.buffer[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + end;
                let line =
                    self.start..end - usize::from(self.buffer[self.start..end].ends_with(b"\r"));
                self.start = end + 1;
                return Ok(line);
            }
            searched = self.buffer.len();
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), ProbeError> {
        let before = self.buffer.len();
        let remaining = (HEAD_BYTES_MAX - before) as u64;
        if remaining == 0 {
            let what = if self.start == 0 { "line end" } else { "final status line" };
            return Err(ProbeError::Backend(format!(
                "no {what} in the first {} KiB of the answer: got {}",
                HEAD_BYTES_MAX / 1024,
                quote(&self.buffer)
            )));
        }
        let read = (&mut *self.stream).take(remaining).read_buf(&mut self.buffer).await;
        if read.map_err(exchange_error)? == 0 {
            return Err(ProbeError::Backend(format!(
                "connection closed after {before} bytes: got {}, expected a status line",
                quote(&self.buffer)
            )));
        }
        Ok(())
    }
}
