//! Waits for a client's first bytes, if its frontend connects only then (`client_first`).
//!
//! A stage of `session`, between admission and the pick. It consumes no byte: the bytes stay
//! in the kernel's receive queue until the relay receives them. During the wait the session
//! holds its permit, but no slot of a pool.

use super::proxy_header::interrupted;
use super::{Session, ended};
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};

impl Session {
    /// Waits until the client has sent the needed bytes, or a FIN after fewer bytes. A client
    /// that sends a FIN and no byte ends the session.
    pub(super) async fn preread(&mut self) -> Result<(), SessionEnd> {
        let Some(preread) = self.route.preread else { return Ok(()) };
        self.waits = Some(Phase::Preread);
        // Both futures only wait for readiness or time, so the loser can be dropped.
        tokio::select! {
            biased;
            sent = self.relay.client_sent(preread.bytes) => sent.map_err(interrupted)?,
            () = tokio::time::sleep(preread.timeout) => {
                return Err(ended(Phase::Preread, Cause::FirstByteTimeout));
            }
        }
        if self.relay.client_left_silently() {
            let closed_first = Some(SessionSide::Client);
            return Err(SessionEnd { closed_first, ..ended(Phase::Preread, Cause::ClientLeft) });
        }
        self.waits = None;
        // A client can be silent for long, and no backend has been picked.
        self.use_newest_table();
        Ok(())
    }
}
