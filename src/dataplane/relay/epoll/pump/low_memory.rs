//! Forwarding with nothing to keep bytes in: once the process's budget is spent.
//!
//! Bytes are looked at where they are, sent as far as there is room, and taken
//! from the socket only then. What finds no room stays in the kernel's receive
//! buffer, where TCP holds the sender back: nothing is ever dropped. It costs
//! a system call a message more, and is left as soon as the budget has room.

use super::{Pump, PumpIo};
use crate::relay::close_state::TurnBytes;
use tidegate_core::outcome::SessionSide;

impl Pump {
    /// Moves at most a buffer's worth; false where there is nothing to move or no
    /// room for it.
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
        let there = match io.peek(from, buffer) {
            Ok(0) => {
                self.end_of(from, 0, moved);
                return true;
            }
            Ok(there) => there,
            Err(error) => return self.receive_failed(from, &error, moved),
        };
        if !self.may_send(to) {
            return false;
        }
        match io.send(to, &buffer[..there]) {
            Ok(sent) => {
                self.close.sent_on(from, sent, moved);
                self.sockets[to as usize].writable = sent == there;
                self.take(from, io, &mut buffer[..sent], moved);
                sent == there
            }
            Err(error) => {
                self.send_error(to, &error);
                if self.close.failed(to) {
                    // Nobody wants it; left unread it would turn a close in order
                    // into a reset.
                    self.take(from, io, &mut buffer[..there], moved);
                }
                // Where it has failed, the caller sees; where it was interrupted,
                // it tries again.
                self.sockets[to as usize].writable && !self.short
            }
        }
    }

    /// Takes from the socket what was sent.
    fn take(
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
