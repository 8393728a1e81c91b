//! Waiting for a client's first bytes, where its frontend needs them to route.
//!
//! A stage of `session`, between admission and the choice of a backend. The bytes stay in
//! the kernel's receive queue, and the relay receives them. The session holds its permit, and
//! takes a slot of the pool only when it is routed. Frontends that need no bytes never
//! come here.

use super::route::client_reset;
use super::{Session, ended};
use crate::relay::ConnectEnd;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};

impl Session {
    /// Waits until the client has sent the bytes, or has ended its side after fewer: then
    /// these are all it has to say. A client that ends without any has left.
    pub(super) async fn preread(&mut self) -> Result<(), SessionEnd> {
        let Some(preread) = self.route.preread else { return Ok(()) };
        self.waits = Some(Phase::Preread);
        // Both are readiness futures: dropping the loser loses nothing.
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
        Ok(())
    }
}

fn interrupted(end: ConnectEnd) -> SessionEnd {
    match end {
        ConnectEnd::Aborted(cause) => ended(Phase::Preread, cause),
        ConnectEnd::ClientGone(errno) => client_reset(Phase::Preread, errno),
        ConnectEnd::Failed(error) => {
            let errno = error.raw_os_error().unwrap_or(0);
            SessionEnd { errno, ..ended(Phase::Preread, Cause::LocalResource) }
        }
        ConnectEnd::TimedOut => ended(Phase::Preread, Cause::FirstByteTimeout),
    }
}
