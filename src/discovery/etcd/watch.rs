//! A stream of watches: one answer of `/v3/watch`, read line by line.
//!
//! The follower reads it. An end of the stream is a failure, because a watch has no end.

use super::codec::{StreamLine, WatchMessage};
use crate::client::{HttpFailure, HttpStream};
use crate::lines::LineBuffer;
use std::time::Duration;
use tidegate_core::discovery::SourceFailure;

/// Longest line, in bytes. A line has at most 1,000 revisions of a watch.
const LINE_BYTES_MAX: usize = 64 << 20;

/// Deadline of a read. The follower lists again before it.
const SILENCE_MAX: Duration = Duration::from_secs(900);

/// Messages of several watches.
#[derive(Debug)]
pub struct WatchStream {
    stream: HttpStream,
    lines: LineBuffer,
}

// === impl WatchStream ===

impl WatchStream {
    pub(super) fn new(stream: HttpStream) -> WatchStream {
        WatchStream { stream, lines: LineBuffer::new(LINE_BYTES_MAX) }
    }

    /// Waits for the next message. Dropping the future loses none.
    ///
    /// # Errors
    /// The stream ended, or it cannot be read.
    pub async fn next_message(&mut self) -> Result<WatchMessage, HttpFailure> {
        loop {
            if let Some(line) = self.lines.next_line() {
                return read_line(line, self.stream.server());
            }
            let Some(bytes) = self.stream.chunk(SILENCE_MAX).await? else {
                let text = format_args!("{}: the watch ended", self.stream.server());
                return Err(HttpFailure::new(SourceFailure::Connect, text));
            };
            self.lines.push(&bytes)?;
        }
    }
}

fn read_line(line: &[u8], server: &str) -> Result<WatchMessage, HttpFailure> {
    match StreamLine::parse(line) {
        Ok(StreamLine::Watch(message)) => Ok(message),
        Ok(StreamLine::Ended(refusal)) => {
            let text = format_args!("{server}: the watch ended: {}", refusal.message);
            Err(HttpFailure::new(refusal.why, text))
        }
        Err(error) => Err(HttpFailure::protocol(format_args!("{server}: {error}"))),
    }
}
