//! Forwards bytes without a buffer, while the process's buffer budget is used up.
//!
//! Called by the pump. It drops no bytes: they are peeked, sent, and consumed only after the
//! send. The rest stays in the kernel's receive queue, and TCP flow control stops the sender.
//! This costs one more system call per message.

use super::{Pump, PumpIo};
use crate::relay::close_state::TurnBytes;
use tidegate_core::outcome::SessionSide;

impl Pump {
    /// Moves at most `buffer.len()` bytes. Returns false if there are no bytes to move or no
    /// room for them.
    #[cold]
    pub(super) fn forward_scarce(
        &mut self,
        from: SessionSide,
        io: &impl PumpIo,
        buffer: &mut [u8],
        moved: &mut TurnBytes,
    ) -> bool {
        let to = from.other();
        self.streams[from as usize].streak = 0;
        let peeked = match io.peek(from, buffer) {
            Ok(0) => {
                self.end_of(from, 0, moved);
                return true;
            }
            Ok(peeked) => peeked,
            Err(error) => return self.receive_failed(from, &error, moved),
        };
        if !self.may_send(to) {
            return false;
        }
        match io.send(to, &buffer[..peeked]) {
            Ok(sent) => {
                self.close.sent_on(from, sent, moved);
                self.sockets[to as usize].writable = sent == peeked;
                self.consume(from, io, &mut buffer[..sent], moved);
                sent == peeked
            }
            Err(error) => {
                self.send_error(to, &error);
                if self.close.failed(to) {
                    // Discard the bytes: left unread, they would turn a close with FIN into a
                    // reset.
                    self.consume(from, io, &mut buffer[..peeked], moved);
                }
                // After a failure the caller checks `close`; after an interrupt it retries.
                self.sockets[to as usize].writable && !self.short
            }
        }
    }

    /// Consumes bytes that have been sent from the receive queue.
    fn consume(
        &mut self,
        from: SessionSide,
        io: &impl PumpIo,
        sent: &mut [u8],
        moved: &mut TurnBytes,
    ) {
        let received =
            self.close.receive_seen(from, sent, moved, |buffer| io.receive(from, buffer));
        if let Err(errno) = received {
            self.end_of(from, errno, moved);
        }
    }
}
