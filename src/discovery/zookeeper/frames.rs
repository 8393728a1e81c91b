//! Cuts the bytes of a connection into frames.
//!
//! The connection reads into the buffer and takes whole frames; the network can cut them at
//! any byte. The length of a frame reserves no memory. Nothing here reads a socket.

use super::wire::{BadFrame, frame_length};

/// Bytes that one read asks for.
const READ_BYTES: usize = 64 * 1024;

/// The bytes after the last whole frame.
#[derive(Debug, Default)]
pub(crate) struct FrameBuffer {
    received: Vec<u8>,
    /// Bytes of `received` that were taken as frames.
    taken: usize,
}

// === impl FrameBuffer ===

impl FrameBuffer {
    /// Returns where further bytes are appended.
    pub(crate) fn space(&mut self) -> &mut Vec<u8> {
        self.received.drain(..std::mem::take(&mut self.taken));
        if self.received.is_empty() {
            // A large frame must not hold its memory until the next one.
            self.received.shrink_to(READ_BYTES);
        }
        self.received.reserve(READ_BYTES);
        &mut self.received
    }

    /// Takes the next whole frame, without its length.
    ///
    /// # Errors
    /// The length is out of bounds. The connection must end.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<u8>>, BadFrame> {
        let rest = &self.received[self.taken..];
        let Some(frame) = frame_length(rest)?.and_then(|length| rest.get(4..4 + length)) else {
            return Ok(None);
        };
        self.taken += 4 + frame.len();
        Ok(Some(frame.to_vec()))
    }
}
