//! Checks the bytes that a backend answers to a probe.
//!
//! Called by probes of the kinds `send-expect`, `steps` and `http`. Reading stops with the
//! packet that decides the result, or at the bound below.

use super::answer_bytes::ANSWER_BYTES_MAX;
use super::{ProbeError, exchange_error, quote};
use tidegate_core::model::Expect;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Initial buffer size.
const READ_BYTES: usize = 4 * 1024;

/// Converts the bytes that were received to the bytes that are searched. Returns `None` if
/// they do not have the form that the backend has announced.
pub(super) type Decode = fn(&[u8]) -> Option<Vec<u8>>;

/// Reads an answer until it is as expected.
pub(super) struct AnswerReader<'s, S> {
    stream: &'s mut S,
    /// Bytes that no step has matched.
    received: Vec<u8>,
    /// Bytes of the answer that hold no match.
    searched: usize,
    /// All bytes that were received.
    total: usize,
    decode: Option<Decode>,
}

/// What the bytes so far say.
enum Match {
    /// The answer is as expected; the match ends here.
    Ends(usize),
    /// Every continuation is wrong.
    Wrong,
    /// More bytes decide.
    Open,
}

/// The first `searched` bytes of the answer hold no match.
fn check(expect: &Expect, answer: &[u8], searched: usize) -> Match {
    let found = match expect {
        Expect::Starts(with) => {
            let with = &with.0;
            let compared = answer.len().min(with.len());
            return match answer[..compared] == with[..compared] {
                false => Match::Wrong,
                true if compared == with.len() => Match::Ends(compared),
                true => Match::Open,
            };
        }
        Expect::Contains(what) => {
            let what = &what.0;
            // A match that was not found before includes a new byte.
            let from = searched.saturating_sub(what.len());
            let at = answer[from..].windows(what.len().max(1)).position(|window| window == what);
            at.map(|at| from + at + what.len())
        }
        Expect::Regex(pattern) => pattern.0.find(answer).map(|found| found.end()),
    };
    found.map_or(Match::Open, Match::Ends)
}

/// Describes what was expected, for reasons.
fn wanted(expect: &Expect) -> String {
    match expect {
        Expect::Starts(with) => format!("expected {}", quote(&with.0)),
        Expect::Contains(what) => format!("expected {} in the answer", quote(&what.0)),
        Expect::Regex(pattern) => {
            format!(
                "expected a match of regex {} in the answer",
                quote(pattern.0.as_str().as_bytes())
            )
        }
    }
}

// === impl AnswerReader ===

impl<'s, S: AsyncRead + Unpin> AnswerReader<'s, S> {
    /// Reads the answer of a stream of which `begun` was read before.
    pub(super) fn new(stream: &'s mut S, begun: Vec<u8>, decode: Option<Decode>) -> Self {
        let total = begun.len();
        AnswerReader { stream, received: begun, searched: 0, total, decode }
    }

    /// Returns the stream, to send the next bytes.
    pub(super) fn stream(&mut self) -> &mut S {
        self.stream
    }

    /// Reads until the answer is as expected, and removes it up to the end of the match.
    pub(super) async fn expect(&mut self, expect: &Expect) -> Result<(), ProbeError> {
        loop {
            let decoded = match self.decode.map(|decode| decode(&self.received)) {
                None => None,
                Some(Some(decoded)) => Some(decoded),
                Some(None) => {
                    let reason =
                        format!("the body has no valid chunks: got {}", quote(&self.received));
                    return Err(ProbeError::Backend(reason));
                }
            };
            let answer = decoded.as_deref().unwrap_or(&self.received);
            match check(expect, answer, self.searched) {
                Match::Ends(end) => {
                    self.received.drain(..end.min(self.received.len()));
                    self.searched = 0;
                    return Ok(());
                }
                Match::Wrong => {
                    let got = quote(answer);
                    let reason = format!("wrong answer: got {got}, {}", wanted(expect));
                    return Err(ProbeError::Backend(reason));
                }
                Match::Open => self.searched = answer.len(),
            }
            if self.total >= ANSWER_BYTES_MAX {
                return Err(ProbeError::Backend(format!(
                    "no match in the first {} KiB of the answer: {}",
                    ANSWER_BYTES_MAX / 1024,
                    wanted(expect)
                )));
            }
            if !self.read().await? {
                return Err(ProbeError::Backend(format!(
                    "connection closed after {} bytes: got {}, {}",
                    self.total,
                    quote(&self.received),
                    wanted(expect)
                )));
            }
        }
    }

    /// Reads more bytes. Returns false at the end of the stream.
    async fn read(&mut self) -> Result<bool, ProbeError> {
        self.received.reserve(READ_BYTES);
        let remaining = (ANSWER_BYTES_MAX - self.total) as u64;
        let read = (&mut *self.stream).take(remaining).read_buf(&mut self.received).await;
        let count = read.map_err(exchange_error)?;
        self.total += count;
        Ok(count > 0)
    }
}
