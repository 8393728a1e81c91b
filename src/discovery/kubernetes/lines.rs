//! The lines of a watch: one JSON text each.
//!
//! The source puts chunks in and takes complete lines. A line has a bound. Nothing here
//! reads a socket.

use super::codec::EVENT_BYTES_MAX;
use crate::client::HttpFailure;

/// Bytes that arrived and are no complete line yet.
#[derive(Debug, Default)]
pub(crate) struct JsonLines {
    received: Vec<u8>,
    /// Bytes of `received` that were taken.
    taken: usize,
    /// Bytes of `received` that have no line feed.
    searched: usize,
}

// === impl JsonLines ===

impl JsonLines {
    pub(crate) fn push(&mut self, chunk: &[u8]) {
        self.received.drain(..self.taken);
        self.searched -= self.taken;
        self.taken = 0;
        self.received.extend_from_slice(chunk);
    }

    /// Returns the next line that is not empty.
    ///
    /// # Errors
    /// The line has more than [`EVENT_BYTES_MAX`] bytes.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<u8>>, HttpFailure> {
        loop {
            let rest = &self.received[self.searched..];
            let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
                self.searched = self.received.len();
                if self.searched - self.taken > EVENT_BYTES_MAX {
                    let text = format!("an event has more than {EVENT_BYTES_MAX} bytes");
                    return Err(HttpFailure::protocol(text));
                }
                return Ok(None);
            };
            let end = self.searched + length;
            let line = self.received[self.taken..end].trim_ascii().to_vec();
            (self.taken, self.searched) = (end + 1, end + 1);
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_complete_whatever_the_chunks() {
        let mut lines = JsonLines::default();
        let mut found = Vec::new();
        for chunk in ["{\"a\":", "1}\n{\"b\"", ":2}\r\n\n", "{}\n{", "}\n{\"half"] {
            lines.push(chunk.as_bytes());
            while let Some(line) = lines.next().unwrap() {
                found.push(String::from_utf8(line).unwrap());
            }
        }
        assert_eq!(found, ["{\"a\":1}", "{\"b\":2}", "{}", "{}"]);
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut lines = JsonLines::default();
        let refused = (0..EVENT_BYTES_MAX / 1024 + 2).any(|_| {
            lines.push(&[b' '; 1024]);
            lines.next().is_err()
        });
        assert!(refused);
    }
}
