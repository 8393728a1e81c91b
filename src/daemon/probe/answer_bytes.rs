//! Reads the answers of a service in lines and in pieces of known length.
//!
//! Called by the probes that speak a protocol. It never reads more than a bound.

use super::{ProbeError, ProbeStage, exchange_error, quote};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of all answers of one probe. `INFO` of a Redis server has about 5 KiB.
pub(super) const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Initial buffer size.
const READ_BYTES: usize = 1024;

/// Longest wait for the end of a connection.
const DRAIN_TIME: Duration = Duration::from_millis(50);

/// A connection to a service.
pub(super) struct AnswerBytes<'s, S> {
    stream: &'s mut S,
    stage: &'s mut ProbeStage,
    buffer: Vec<u8>,
    /// Of `buffer`, the bytes that were taken.
    taken: usize,
    total: usize,
}

// === impl AnswerBytes ===

impl<'s, S: AsyncRead + AsyncWrite + Unpin> AnswerBytes<'s, S> {
    pub(super) fn new(stream: &'s mut S, stage: &'s mut ProbeStage) -> Self {
        AnswerBytes { stream, stage, buffer: Vec::new(), taken: 0, total: 0 }
    }

    /// Sends bytes and waits for an answer from then on.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> Result<(), ProbeError> {
        *self.stage = ProbeStage::Sending;
        self.stream.write_all(bytes).await.map_err(exchange_error)?;
        self.stream.flush().await.map_err(exchange_error)?;
        *self.stage = ProbeStage::Answer;
        Ok(())
    }

    /// Waits a short time until the service closes, and ignores what it sends. So the
    /// connection ends in order. The result is decided, so an error does not matter.
    pub(super) async fn drain(&mut self) {
        let closed = async {
            while self.read().await.is_ok() {
                self.taken = self.buffer.len();
            }
        };
        let _ = tokio::time::timeout(DRAIN_TIME, closed).await;
    }

    /// Fails if more bytes have arrived than were taken.
    pub(super) fn nothing_left(&self) -> Result<(), ProbeError> {
        match self.buffer.get(self.taken..) {
            Some([]) | None => Ok(()),
            Some(rest) => Err(ProbeError::Backend(format!("unexpected bytes: {}", quote(rest)))),
        }
    }

    /// Returns the next line without its end.
    pub(super) async fn line(&mut self) -> Result<Vec<u8>, ProbeError> {
        let mut searched = 0;
        loop {
            let rest = &self.buffer[self.taken..];
            if let Some(end) = rest[searched..].iter().position(|byte| *byte == b'\n') {
                let line = rest[..searched + end].to_vec();
                self.taken += line.len() + 1;
                return Ok(line.strip_suffix(b"\r").map_or_else(|| line.clone(), <[u8]>::to_vec));
            }
            searched = rest.len();
            self.read().await?;
        }
    }

    /// Returns the next `count` bytes.
    pub(super) async fn bytes(&mut self, count: usize) -> Result<Vec<u8>, ProbeError> {
        if count > ANSWER_BYTES_MAX {
            return Err(too_long());
        }
        while self.buffer.len() - self.taken < count {
            self.read().await?;
        }
        let bytes = self.buffer[self.taken..self.taken + count].to_vec();
        self.taken += count;
        Ok(bytes)
    }

    /// Returns the next `N` bytes.
    pub(super) async fn array<const N: usize>(&mut self) -> Result<[u8; N], ProbeError> {
        let mut array = [0; N];
        array.copy_from_slice(&self.bytes(N).await?);
        Ok(array)
    }

    /// Reads at least one byte.
    async fn read(&mut self) -> Result<(), ProbeError> {
        if self.total >= ANSWER_BYTES_MAX {
            return Err(too_long());
        }
        self.buffer.drain(..std::mem::take(&mut self.taken));
        self.buffer.reserve(READ_BYTES);
        let remaining = (ANSWER_BYTES_MAX - self.total) as u64;
        let read = (&mut *self.stream).take(remaining).read_buf(&mut self.buffer).await;
        let count = read.map_err(exchange_error)?;
        self.total += count;
        match count {
            0 => Err(ProbeError::Backend(format!(
                "connection closed before the answer was complete: got {}",
                quote(&self.buffer)
            ))),
            _ => Ok(()),
        }
    }
}

fn too_long() -> ProbeError {
    let reason = format!("the answer is longer than {} KiB", ANSWER_BYTES_MAX / 1024);
    ProbeError::Backend(reason)
}
