//! What stands behind the end of a stream: a FIN, or a failure that somebody
//! else was told of.
//!
//! Asked by `streams` and `bulk` where a receive came to an end. It changes
//! nothing.

use super::streams::RingSession;
use tidegate_core::outcome::SessionSide;
use tidegate_net::stream;

impl RingSession {
    /// The errno behind the end of what `side` sent; 0 for a FIN.
    ///
    /// A socket tells its error once. A send of the ring that has sent a part
    /// takes it and comes back short (`io_send` in Linux), and what is received
    /// then ends as by a FIN. So while something is being sent to that side, its
    /// end is looked into; nothing else of ours could have taken the error.
    pub(super) fn failure_behind_end(&self, side: SessionSide) -> i32 {
        let back = &self.streams[side.other() as usize];
        if back.send.is_none() && back.pipe.is_none() {
            return 0;
        }
        let socket = self.sockets[side as usize].as_deref();
        socket.and_then(stream::close_error).unwrap_or(0)
    }
}
