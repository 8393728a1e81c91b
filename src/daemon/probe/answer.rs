//! Checks the answer of a backend to a probe.
//!
//! Called by `send-expect` and `http` probes. Reading stops with the packet that
//! decides the result, or at the bounds below. Of an answer, only the status is kept.

use super::{ProbeError, QUOTE_BYTES_MAX, exchange_error, quote};
use std::ops::Range;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes read up to the end of the final status line, including interim responses.
/// A status line has a few dozen bytes, so a longer answer is not HTTP.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// Bytes of an answer that are searched. `INFO` of a Redis server has about 5 KiB.
const CONTAINS_BYTES_MAX: usize = 64 * 1024;

/// Initial buffer size. A short health page fits.
const READ_BYTES: usize = 4 * 1024;

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

/// Succeeds if the answer starts with `expect`. Fails at the first byte that differs.
pub(super) async fn starts_with(
    stream: &mut (impl AsyncRead + Unpin),
    expect: &[u8],
) -> Result<(), ProbeError> {
    let mut answer = vec![0; expect.len().max(QUOTE_BYTES_MAX)];
    let mut filled = 0;
    while filled < expect.len() {
        let count = stream.read(&mut answer[filled..]).await.map_err(exchange_error)?;
        if count == 0 {
            return Err(ProbeError::Backend(format!(
                "connection closed after {filled} bytes: got {}, expected {}",
                quote(&answer[..filled]),
                quote(expect)
            )));
        }
        filled += count;
        let compared = filled.min(expect.len());
        if answer[..compared] != expect[..compared] {
            return Err(ProbeError::Backend(format!(
                "wrong answer: got {}, expected {}",
                quote(&answer[..filled]),
                quote(expect)
            )));
        }
    }
    Ok(())
}

/// Succeeds if the first [`CONTAINS_BYTES_MAX`] bytes of the answer contain `what`.
pub(super) async fn contains(
    stream: &mut (impl AsyncRead + Unpin),
    what: &[u8],
) -> Result<(), ProbeError> {
    let mut answer = Vec::with_capacity(READ_BYTES);
    loop {
        // A match that was not found before includes a new byte.
        let from = answer.len().saturating_sub(what.len());
        let remaining = (CONTAINS_BYTES_MAX - answer.len()) as u64;
        let read = (&mut *stream).take(remaining).read_buf(&mut answer).await;
        if read.map_err(exchange_error)? == 0 {
            return Err(ProbeError::Backend(format!(
                "connection closed after {} bytes: got {}, expected {} in the answer",
                answer.len(),
                quote(&answer),
                quote(what)
            )));
        }
        if answer[from..].windows(what.len()).any(|window| window == what) {
            return Ok(());
        }
        if answer.len() >= CONTAINS_BYTES_MAX {
            return Err(ProbeError::Backend(format!(
                "first {} KiB of the answer do not contain {}",
                CONTAINS_BYTES_MAX / 1024,
                quote(what)
            )));
        }
    }
}

/// Succeeds if the status of the final response is in one of the `wanted` ranges.
pub(super) async fn http(
    stream: &mut (impl AsyncRead + Unpin),
    wanted: &[(u16, u16)],
) -> Result<u16, ProbeError> {
    let mut lines = AnswerLines { stream, buffer: Vec::with_capacity(READ_BYTES), start: 0 };
    loop {
        let line = lines.next().await?;
        let line = &lines.buffer[line];
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
        while !lines.next().await?.is_empty() {}
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

// === impl AnswerLines ===

impl<S: AsyncRead + Unpin> AnswerLines<'_, S> {
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
