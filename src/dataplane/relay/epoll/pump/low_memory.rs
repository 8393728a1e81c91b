//! Forwarding with nothing to keep bytes in: once the process's budget is spent.
//!
//! Bytes are looked at where they are, sent as far as there is room, and taken
//! from the socket only then. What finds no room stays in the kernel's receive
//! buffer, where TCP holds the sender back: nothing is ever dropped. It costs
//! a system call a message more, and is left as soon as the budget has room.

use super::{Pump, PumpIo, errno_of, is_would_block};
use crate::local_errors;
use crate::relay::close_state::TurnBytes;
use std::io;
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
            Err(error) if is_would_block(&error) => {
                self.sockets[from as usize].readable = false;
                return false;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            Err(error) if local_errors::is_shortage(&error) => {
                self.short = true;
                return false;
            }
            Err(error) => {
                self.end_of(from, errno_of(&error), moved);
                return true;
            }
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

    /// Takes from the socket what was sent: as many bytes as `sent` is long. They
    /// were there to be looked at, so they are there to be received.
    fn take(
        &mut self,
        from: SessionSide,
        io: &impl PumpIo,
        sent: &mut [u8],
        moved: &mut TurnBytes,
    ) {
        let mut taken = 0;
        while taken < sent.len() {
            match io.receive(from, &mut sent[taken..]) {
                Ok(0) => return self.end_of(from, libc::EIO, moved),
                Ok(more) => {
                    taken += more;
                    self.close.received(from, more, moved);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.end_of(from, errno_of(&error), moved),
            }
        }
    }
}
