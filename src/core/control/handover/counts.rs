//! Counters of frontends and backends in a handover.
//!
//! Called by `handover`. It copies counts and decides nothing.

use super::{SavedBackend, SavedFrontend};
use crate::outcome::RefusedReason;
use crate::table::state::{BackendState, FrontendState};

pub(super) fn save_frontend(state: &FrontendState) -> SavedFrontend {
    let refused = |reason: RefusedReason| {
        let total = state.counters.sum(|c| c.refused.cell(reason as usize, 0).get());
        (reason.name().to_owned(), total)
    };
    SavedFrontend {
        name: state.name.to_string(),
        sessions: state.counters.sum(|c| c.sessions.get()),
        bytes_in: state.counters.sum(|c| c.bytes_in.get()),
        bytes_out: state.counters.sum(|c| c.bytes_out.get()),
        refused: RefusedReason::ALL.into_iter().map(refused).collect(),
        untracked: state.counters.sum(|c| c.untracked.get()),
    }
}

/// Adds the counts of another process to the shard of the first worker.
pub(super) fn carry_frontend(state: &FrontendState, saved: &SavedFrontend) {
    let counters = state.counters.of(0);
    counters.sessions.carry(saved.sessions);
    counters.bytes_in.carry(saved.bytes_in);
    counters.bytes_out.carry(saved.bytes_out);
    for reason in RefusedReason::ALL {
        let before = saved.refused.get(reason.name()).copied().unwrap_or_default();
        counters.refused.cell(reason as usize, 0).carry(before);
    }
    counters.untracked.carry(saved.untracked);
}

pub(super) fn carry_backend(state: &BackendState, saved: &SavedBackend) {
    let counters = state.counters.of(0);
    counters.sessions.carry(saved.sessions);
    counters.connect_failures.carry(saved.connect_failures);
    counters.bytes_in.carry(saved.bytes_in);
    counters.bytes_out.carry(saved.bytes_out);
}
