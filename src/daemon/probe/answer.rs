//! What a backend answers a probe, and whether that is what was wanted.
//!
//! Used by the probes that ask something. It reads no more of an answer than
//! the packets that decide it, and never keeps any.

use super::{ProbeError, QUOTE_BYTES_MAX, quote, talk_fault};
use std::ops::Range;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Everything up to the end of the final status line, interim responses
/// included. A status line is a few dozen bytes; what takes longer than this is
/// no HTTP server.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// How much of an answer is searched: `INFO` of a Redis server has about 5 KiB.
const CONTAINS_BYTES_MAX: usize = 64 * 1024;

/// Room for one read: holds a short health page whole.
const READ_BYTES: usize = 4 * 1024;

/// The only 1xx status that ends the exchange: the connection then speaks
/// another protocol (RFC 9110, section 15.2.2).
const SWITCHING_PROTOCOLS: u16 = 101;

/// An answer, line by line.
struct AnswerLines<'s, S> {
    stream: &'s mut S,
    held: Vec<u8>,
    /// Where the next line starts.
    start: usize,
}

/// Reads until the answer starts with `expect`, or cannot any more.
pub(super) async fn starts_with(
    stream: &mut (impl AsyncRead + Unpin),
    expect: &[u8],
) -> Result<(), ProbeError> {
    let mut answer = vec![0; expect.len().max(QUOTE_BYTES_MAX)];
    let mut held = 0;
    while held < expect.len() {
        let count = stream.read(&mut answer[held..]).await.map_err(talk_fault)?;
        if count == 0 {
            return Err(ProbeError::Backend(format!(
                "connection closed after {held} bytes ({}), expected {}",
                quote(&answer[..held]),
                quote(expect)
            )));
        }
        held += count;
        let compared = held.min(expect.len());
        if answer[..compared] != expect[..compared] {
            return Err(ProbeError::Backend(format!(
                "answer started with {}, expected {}",
                quote(&answer[..held]),
                quote(expect)
            )));
        }
    }
    Ok(())
}

/// Reads until the answer holds `what`, or has ended or grown too long without it.
pub(super) async fn contains(
    stream: &mut (impl AsyncRead + Unpin),
    what: &[u8],
) -> Result<(), ProbeError> {
    let mut answer = Vec::with_capacity(READ_BYTES);
    loop {
        // Only what is new can complete it.
        let from = answer.len().saturating_sub(what.len());
        let room = CONTAINS_BYTES_MAX - answer.len();
        if (&mut *stream).take(room as u64).read_buf(&mut answer).await.map_err(talk_fault)? == 0 {
            return Err(ProbeError::Backend(format!(
                "connection closed after {} bytes ({}), expected {} in them",
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
                "{CONTAINS_BYTES_MAX} bytes of answer without {}",
                quote(what)
            )));
        }
    }
}

/// Reads up to the final status line and holds its status against `wanted`.
pub(super) async fn http(
    stream: &mut (impl AsyncRead + Unpin),
    wanted: &[(u16, u16)],
) -> Result<(), ProbeError> {
    let mut lines = AnswerLines { stream, held: Vec::with_capacity(READ_BYTES), start: 0 };
    loop {
        let line = lines.next().await?;
        let line = &lines.held[line];
        let Some(status) = parse_status(line) else {
            return Err(ProbeError::Backend(format!(
                "answer started with {}, expected an HTTP/1 status line",
                quote(line)
            )));
        };
        if !is_interim(status) {
            return judge_status(status, wanted);
        }
        // Its header section, up to the empty line.
        while !lines.next().await?.is_empty() {}
    }
}

/// A response that another one follows: any 1xx but 101, however many come
/// (RFC 9110, section 15.2).
fn is_interim(status: u16) -> bool {
    status < 200 && status != SWITCHING_PROTOCOLS
}

fn judge_status(status: u16, wanted: &[(u16, u16)]) -> Result<(), ProbeError> {
    if wanted.iter().any(|(low, high)| (*low..=*high).contains(&status)) {
        return Ok(());
    }
    let ranges: Vec<String> = wanted
        .iter()
        .map(|(low, high)| if low == high { low.to_string() } else { format!("{low}-{high}") })
        .collect();
    Err(ProbeError::Backend(format!("status {status}, expected {}", ranges.join(","))))
}

/// RFC 9112, section 4: `HTTP/1.1 200 OK`; the words after the number may be
/// missing.
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
    /// Where the next line stands, without its end.
    async fn next(&mut self) -> Result<Range<usize>, ProbeError> {
        let mut searched = self.start;
        loop {
            if let Some(end) = self.held[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + end;
                let line =
                    self.start..end - usize::from(self.held[self.start..end].ends_with(b"\r"));
                self.start = end + 1;
                return Ok(line);
            }
            searched = self.held.len();
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), ProbeError> {
        let before = self.held.len();
        let room = (HEAD_BYTES_MAX - before) as u64;
        if room == 0 {
            let what = if self.start == 0 { "line end" } else { "final status line" };
            return Err(ProbeError::Backend(format!(
                "no {what} within {HEAD_BYTES_MAX} bytes of answer, which started with {}",
                quote(&self.held)
            )));
        }
        let read = (&mut *self.stream).take(room).read_buf(&mut self.held).await;
        if read.map_err(talk_fault)? == 0 {
            return Err(ProbeError::Backend(format!(
                "connection closed after {before} bytes ({}), expected a status line",
                quote(&self.held)
            )));
        }
        Ok(())
    }
}
