//! The slots a session holds below the caps of process, frontend and source.
//!
//! Taken by the listener before it accepts, held by the session to its end.
//! Giving them back opens the gate for whoever waits.

use super::admission::Held;
use crate::accept::admission;
use crate::accept::gate::Gate;
use crate::worker::context::Shared;
use crossbeam::utils::CachePadded;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tidegate_core::balance::in_flight::InFlight;
use tidegate_core::limits::client_sources::SourceSlot;
use tidegate_core::table::state::FrontendState;
use tidegate_core::table::{FrontendRoute, Table};

/// One session's; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Slots {
    process: Arc<InFlight>,
    /// This process's.
    sessions: Arc<CachePadded<AtomicU32>>,
    frontend: Arc<FrontendState>,
    gate: Arc<Gate>,
    /// Where the frontend limits what one source may ask for.
    source: Option<SourceSlot>,
}

impl Slots {
    /// Takes a slot everywhere, or nowhere.
    pub(crate) fn take(
        shared: &Shared,
        table: &Table,
        route: &FrontendRoute,
    ) -> Result<Slots, Held> {
        let admitted = admission::admit(
            &shared.in_flight,
            table,
            route,
            shared.gate.queued(&route.pool.spec.name),
        );
        if admitted == Err(Held::Frontend) {
            // The process's count was up for a moment: somebody may have found
            // it full meanwhile.
            shared.gate.opened();
        }
        admitted.map(|()| {
            shared.sessions.fetch_add(1, Ordering::Relaxed);
            Slots {
                process: Arc::clone(&shared.in_flight),
                sessions: Arc::clone(&shared.sessions),
                frontend: Arc::clone(&route.state),
                gate: Arc::clone(&shared.gate),
                source: None,
            }
        })
    }

    /// Holds the source's as well, to the same end.
    pub(crate) fn hold(&mut self, source: Option<SourceSlot>) {
        self.source = source;
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.frontend.in_flight.leave();
        self.process.leave();
        self.sessions.fetch_sub(1, Ordering::Relaxed);
        self.gate.opened();
    }
}
