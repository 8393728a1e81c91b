//! Cuts the bytes of a stream into lines.
//!
//! The watches of etcd and Kubernetes push what they read and take whole lines. Only a line
//! feed ends a line; the network can cut it at any byte.

use crate::client::HttpFailure;

/// The bytes after the last whole line.
#[derive(Debug)]
pub struct LineBuffer {
    /// Longest line.
    bytes_max: usize,
    bytes: Vec<u8>,
    /// Start of the first line that was not taken.
    start: usize,
    /// No line feed lies between `start` and here.
    searched: usize,
}

/// Returns the lines of a stream, and checks that they do not depend on how the network cuts
/// it: into one part, or into parts of `step` bytes. For the fuzz targets of the streams.
#[cfg(any(test, fuzzing))]
pub(crate) fn lines_of(data: &[u8], step: usize) -> Vec<Vec<u8>> {
    let cut = |step: usize| {
        let mut buffer = LineBuffer::new(1 << 20);
        let mut lines = Vec::new();
        for part in data.chunks(step) {
            buffer.push(part).expect("the input is shorter than the longest line");
            while let Some(line) = buffer.next_line() {
                lines.push(line.to_vec());
            }
        }
        lines
    };
    let lines = cut(data.len().max(1));
    assert_eq!(lines, cut(step));
    assert!(lines.iter().all(|line| !line.is_empty() && !line.contains(&b'\n')));
    lines
}

// === impl LineBuffer ===

impl LineBuffer {
    /// A buffer for lines of at most `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> LineBuffer {
        LineBuffer { bytes_max, bytes: Vec::new(), start: 0, searched: 0 }
    }

    /// Adds bytes. Take all whole lines before.
    ///
    /// # Errors
    /// `Protocol`: the line that is not complete yet is too long. The stream must end.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), HttpFailure> {
        self.bytes.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        if self.bytes.is_empty() {
            // A burst must not hold its memory until the next one.
            self.bytes.shrink_to(64 << 10);
        }
        if self.bytes.len() + bytes.len() > self.bytes_max {
            let most = self.bytes_max;
            return Err(HttpFailure::protocol(format_args!("a line has more than {most} bytes")));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes the next whole line, without spaces at its ends. Empty lines are skipped.
    pub fn next_line(&mut self) -> Option<&[u8]> {
        loop {
            let found = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
            let Some(end) = found.map(|at| self.searched + at) else {
                self.searched = self.bytes.len();
                return None;
            };
            let begin = std::mem::replace(&mut self.start, end + 1);
            self.searched = end + 1;
            let length = self.bytes[begin..end].trim_ascii().len();
            if length > 0 {
                return Some(self.bytes[begin..end].trim_ascii());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_complete_whatever_the_chunks() {
        let mut lines = LineBuffer::new(20);
        let mut found = Vec::new();
        for chunk in ["{\"a\":", "1}\n{\"b\"", ":2}\r\n\n", "{}\n{", "}\n{\"half"] {
            lines.push(chunk.as_bytes()).unwrap();
            while let Some(line) = lines.next_line() {
                found.push(String::from_utf8(line.to_vec()).unwrap());
            }
        }
        assert_eq!(found, ["{\"a\":1}", "{\"b\":2}", "{}", "{}"]);
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut lines = LineBuffer::new(10_000);
        let refused = (0..11).any(|_| {
            let refused = lines.push(&[b' '; 1000]).is_err();
            assert_eq!(lines.next_line(), None);
            refused
        });
        assert!(refused);
    }
}
