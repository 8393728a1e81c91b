//! Operators' requests: drain, undrain, maintenance.
//!
//! Called by the controller for the admin API. An intent belongs to pool, name and address
//! and survives reloads. After the backend has left the configuration, the intent is kept
//! for a time (`intents`). Probes continue with every intent, so `status` shows the health
//! of a drained backend.

use super::OperatorError;
use super::state::ControlState;
use crate::health::Intent;
use crate::table::state::BackendId;
use std::time::Instant;

// === impl ControlState ===

impl ControlState {
    /// Returns the configured backend with this name. The error lists the members of a
    /// backend whose address is a name.
    pub(super) fn find_backend(
        &self,
        pool: &str,
        backend: &str,
    ) -> Result<BackendId, OperatorError> {
        let entry = self.pools.named(pool).ok_or(OperatorError::UnknownPool)?;
        let found = entry.member_named(backend);
        found.ok_or_else(|| match self.group_members(pool, backend) {
            Some(ids) => OperatorError::Members(self.names_of_members(&ids)),
            None => OperatorError::UnknownBackend,
        })
    }

    /// Sets the intent and records a change.
    pub(super) fn change_intent(&mut self, id: BackendId, intent: Intent, now: Instant) {
        let Some(entry) = self.backends.touch(id) else { return };
        let from = entry.health.intent;
        if from == intent {
            return;
        }
        let lasted = now.saturating_duration_since(entry.health.intent_since);
        entry.health.intent = intent;
        entry.health.intent_since = now;
        let sessions = entry.state.in_flight.get();
        let reason = match intent {
            Intent::Ready => "operator: undrain".to_owned(),
            Intent::Draining | Intent::Maintenance => {
                format!("operator: drain; open sessions: {sessions}")
            }
        };
        self.record(id, (from.name(), intent.name()), reason, lasted, now);
    }
}
