//! Cuts the bytes of a stream into lines.
//!
//! The watch pushes what it reads and takes whole lines. Only a line feed ends a
//! line; the network can cut it at any byte.

/// Longest line, in bytes. A line has at most 1,000 revisions of a watch.
pub const LINE_BYTES_MAX: usize = 64 << 20;

/// The bytes after the last whole line.
#[derive(Debug, Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// Start of the first line that was not taken.
    start: usize,
    /// No line feed lies between `start` and here.
    searched: usize,
}

/// A line is longer than [`LINE_BYTES_MAX`].
#[derive(Debug, PartialEq, Eq)]
pub struct LineTooLong;

// === impl LineBuffer ===

impl LineBuffer {
    /// Adds bytes.
    ///
    /// # Errors
    /// The line that is not complete yet is too long. The stream must end.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), LineTooLong> {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.is_empty() {
            // A burst must not hold its memory until the next one.
            self.bytes.shrink_to(64 << 10);
        }
        if self.bytes.len() + bytes.len() > LINE_BYTES_MAX {
            return Err(LineTooLong);
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes the next whole line, without its end. Empty lines are skipped.
    pub fn next_line(&mut self) -> Option<&[u8]> {
        loop {
            let found = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
            let Some(end) = found.map(|at| self.searched + at) else {
                self.searched = self.bytes.len();
                return None;
            };
            let begin = std::mem::replace(&mut self.start, end + 1);
            self.searched = end + 1;
            if begin < end {
                return Some(&self.bytes[begin..end]);
            }
        }
    }
}
