//! Waiting in line for a backend below its cap, or for the pool's first verdict,
//! before the first connect.
//!
//! Called by `session` for clients that `listener` has given a place in their
//! pool's line. Who waits goes by the newest table, as no backend has been
//! thought of for it: a new backend or a raised cap serves it. A session whose
//! connect has failed waits in `connect`, and not in line.

use super::gate::QueueTicket;
use crate::relay::{ConnectEnd, RelayHandle};
use crate::worker::context::WorkerContext;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tidegate_core::outcome::{Cause, Phase, SessionEnd, SessionSide};
use tidegate_core::table::{FrontendRoute, NoBackend, Reservation};

/// How often a waiting client is looked at for its FIN. A reset is noticed at
/// once.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Whose turn has come.
#[derive(Debug)]
pub(crate) struct QueuedPick {
    pub(crate) pick: Result<Reservation, NoBackend>,
    /// By which it goes on.
    pub(crate) route: Arc<FrontendRoute>,
    /// Of the table that is from, where that is not the one it came by.
    pub(crate) generation: Option<u64>,
}

/// Waits until the client is first in line and a backend has room, at most for
/// the pool's `queue_timeout`, and before that for a first verdict until
/// `startup_grace` is over.
pub(crate) async fn wait(
    ctx: &WorkerContext,
    flow: &RelayHandle,
    place: QueueTicket,
    came_by: &Arc<FrontendRoute>,
    client: IpAddr,
) -> Result<QueuedPick, SessionEnd> {
    let (mut route, mut generation) = (Arc::clone(came_by), None);
    let mut serial = None;
    let pick = place.wait_until(|| {
        let table = ctx.table();
        if serial != Some(table.serial) {
            serial = Some(table.serial);
            if let Some(newer) = table.frontend(&route.state) {
                (route, generation) = (Arc::clone(newer), Some(table.generation));
            }
        }
        match route.pool.pick(ctx.pick_key(client), &[]) {
            Err(NoBackend::AtCapacity | NoBackend::Undecided) => None,
            pick => Some(pick),
        }
    });
    let spec = &came_by.pool.spec;
    // The controller ends the wait for a verdict; this is only its latest end.
    let grace = if came_by.pool.undecided { spec.startup_grace } else { Duration::ZERO };
    let longest = spec.queue_timeout.saturating_add(grace);
    // All are readiness futures: dropping the losers loses nothing.
    let pick = tokio::select! {
        biased;
        pick = pick => pick,
        end = flow.interrupted() => return Err(interrupted(end)),
        () = client_left(flow) => return Err(over(Cause::ClientLeft, Some(SessionSide::Client))),
        () = tokio::time::sleep(longest) => {
            return Err(over(Cause::QueueTimeout, None));
        }
    };
    Ok(QueuedPick { pick, route, generation })
}

/// Resolves once the client has ended its side without a word. Who has said
/// something may have all it wants to say behind it, and wait for the answer.
async fn client_left(flow: &RelayHandle) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if flow.client_left_silently() {
            return;
        }
    }
}

fn interrupted(end: ConnectEnd) -> SessionEnd {
    match end {
        ConnectEnd::Aborted(cause) => over(cause, None),
        _ => SessionEnd {
            errno: libc::ECONNRESET,
            ..over(Cause::ClientReset, Some(SessionSide::Client))
        },
    }
}

fn over(cause: Cause, closed_first: Option<SessionSide>) -> SessionEnd {
    SessionEnd { cause, phase: Phase::Queue, errno: 0, closed_first }
}
