//! Rejected heartbeats as status and explain show them.
//!
//! Pure; used by the renderers of both.

use super::status::{millis, thousandths};
use std::collections::HashMap;
use std::time::Instant;
use tidegate_api::status::RejectedDoc;
use tidegate_core::suspicion::rejections::Rejection;

/// Senders that status lists; the rest is in the metrics, by reason.
pub(super) const SHOWN_MAX: usize = 64;

/// The rejections in the name of each backend.
pub(super) struct ByBackend<'a>(HashMap<(&'a str, &'a str), &'a Rejection>);

pub(super) fn rejected(rejection: &Rejection, now: Instant) -> RejectedDoc {
    let claim = rejection.claim.as_ref();
    RejectedDoc {
        pool: claim.map(|(pool, _)| pool.to_string()),
        backend: claim.map(|(_, name)| name.to_string()),
        from: rejection.from,
        key: rejection.key_id,
        reason: rejection.reason.to_owned(),
        skew_seconds: rejection.skew.map(|skew| thousandths(skew as f64 / 1e3)),
        signed: rejection.signed,
        total: rejection.count,
        in_a_row: rejection.row,
        seconds_ago: millis(now.saturating_duration_since(rejection.at)),
        help: rejection.help.to_owned(),
    }
}

/// Of two about one backend, the one to show: signed ones first, then newer ones.
pub(super) fn preferred<'a>(one: &'a Rejection, other: &'a Rejection) -> &'a Rejection {
    std::cmp::max_by_key(one, other, |rejection| (rejection.signed, rejection.at))
}

// === impl ByBackend ===

impl<'a> ByBackend<'a> {
    pub(super) fn new(all: impl Iterator<Item = &'a Rejection>) -> ByBackend<'a> {
        let mut by: HashMap<(&str, &str), &Rejection> = HashMap::new();
        for rejection in all {
            let Some((pool, name)) = &rejection.claim else { continue };
            let shown = by.entry((pool, name)).or_insert(rejection);
            *shown = preferred(shown, rejection);
        }
        ByBackend(by)
    }

    pub(super) fn of(&self, pool: &str, name: &str) -> Option<&'a Rejection> {
        self.0.get(&(pool, name)).copied()
    }
}
