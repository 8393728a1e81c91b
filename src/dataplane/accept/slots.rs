//! The slots a session holds below the caps of process, frontend and source.
//!
//! Taken by the listener before it accepts, held by the session to its end.
//! Giving them back opens the gate for whoever waits.

use super::admission::CapReached;
use crate::accept::admission;
use crate::accept::gate::SlotWaiters;
use crate::worker::context::ProcessContext;
use crossbeam::utils::CachePadded;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::limits::client_sources::SourcePermit;
use tidegate_core::table::state::FrontendState;
use tidegate_core::table::{FrontendRoute, Table};

/// One session's; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct SessionPermit {
    process: Arc<InFlight>,
    /// This process's.
    sessions: Arc<CachePadded<AtomicU32>>,
    frontend: Arc<FrontendState>,
    gate: Arc<SlotWaiters>,
    /// Where the frontend limits what one source may ask for.
    source: Option<SourcePermit>,
}

impl SessionPermit {
    /// Takes a slot everywhere, or nowhere.
    pub(crate) fn take(
        shared: &ProcessContext,
        table: &Table,
        route: &FrontendRoute,
    ) -> Result<SessionPermit, CapReached> {
        let admitted = admission::admit(
            &shared.in_flight,
            table,
            route,
            shared.gate.queued(&route.pool.spec.name),
        );
        if admitted == Err(CapReached::Frontend) {
            // The process's count was up for a moment: somebody may have found
            // it full meanwhile.
            shared.gate.slot_freed();
        }
        admitted.map(|()| {
            shared.sessions.fetch_add(1, Ordering::Relaxed);
            SessionPermit {
                process: Arc::clone(&shared.in_flight),
                sessions: Arc::clone(&shared.sessions),
                frontend: Arc::clone(&route.state),
                gate: Arc::clone(&shared.gate),
                source: None,
            }
        })
    }

    /// Holds the source's as well, to the same end.
    pub(crate) fn hold(&mut self, source: Option<SourcePermit>) {
        self.source = source;
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        self.frontend.in_flight.leave();
        self.process.leave();
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        self.gate.slot_freed();
    }
}
