//! Formats rejected heartbeats for status and explain.
//!
//! Called by the renderers of both. Pure.

use super::status::{millis, thousandths};
use std::collections::HashMap;
use std::time::Instant;
use tidegate_api::status::RejectedDoc;
use tidegate_core::suspicion::rejections::Rejection;

/// Cap on senders that status lists. The metrics count all rejections by reason.
pub(super) const SHOWN_MAX: usize = 64;

/// The rejection to show for each pool and backend name.
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

/// Of two rejections for one backend, returns the signed one, else the newer one.
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
