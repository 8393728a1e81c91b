//! Ending many sessions at once, by resets.
//!
//! Called by the worker: for a removed backend, and at the end of a drain.

use super::{EngineCore, EngineIo, SessionStage};
use tidegate_core::outcome::Cause;
use tidegate_core::table::state::BackendId;
use tidegate_net::clock;

impl<M: EngineIo> EngineCore<M> {
    pub(in crate::relay) fn abort_all(&self, cause: Cause) -> usize {
        self.abort_where(cause, |_| true)
    }

    pub(in crate::relay) fn abort_backend(&self, backend: BackendId, cause: Cause) -> usize {
        self.abort_where(
            cause,
            |stage| matches!(stage, SessionStage::Relaying(r) | SessionStage::Delivering(_, r) if r.meter.backend.id == backend),
        )
    }

    fn abort_where(&self, cause: Cause, matches: impl Fn(&SessionStage) -> bool) -> usize {
        let state = &mut *self.hold();
        state.now = clock::now();
        let chosen = state.flows.iter().filter(|(_, e)| !e.orphaned && matches(&e.stage));
        let keys: Vec<u32> = chosen.map(|(key, _)| key as u32).collect();
        for key in &keys {
            state.abort(*key, cause, &self.pace);
        }
        self.pace.bring_forward(&state.mover);
        keys.len()
    }
}
