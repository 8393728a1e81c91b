//! The size of a view that `max_removed` is relative to: the largest of the last
//! `confirm_after`.
//!
//! `removal` tells it the size of each accepted answer. A size that is replaced by a smaller one
//! counts for `confirm_after` more, so several answers within this time remove at most as
//! much as one. Newcomers count, so a replacement is no shrinkage. Nothing here decides about a removal.

use crate::discovery::MEMBERS_MAX;
use std::time::{Duration, Instant};

/// The present size of the view, and larger ones before.
#[derive(Debug, Clone, Default)]
pub(super) struct Base {
    /// Members of the last answer that no guard objected to.
    size: usize,
    /// When a larger size ended. Sizes differ, so there are at most [`MEMBERS_MAX`].
    before: Vec<(Instant, usize)>,
}

// === impl Base ===

impl Base {
    pub(super) fn of(size: usize, before: impl Iterator<Item = (Instant, usize)>) -> Base {
        let bounded = |(end, size): (Instant, usize)| (end, size.min(MEMBERS_MAX));
        let before = before.take(MEMBERS_MAX).map(bounded).collect();
        Base { size: size.min(MEMBERS_MAX), before }
    }

    /// Returns the last size.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Returns the larger sizes before, each with its end.
    pub(super) fn before(&self) -> impl Iterator<Item = (Instant, usize)> {
        self.before.iter().copied()
    }

    /// Returns the largest size in the `window` that ends `at` this time.
    pub(super) fn largest(&self, at: Instant, window: Duration) -> usize {
        let recent = self.before.iter().filter(|(end, _)| is_recent(*end, at, window));
        recent.map(|(_, size)| *size).max().unwrap_or(0).max(self.size)
    }

    /// Accepts an answer with this many members.
    pub(super) fn accept(&mut self, size: usize, at: Instant, window: Duration) {
        self.before.push((at, self.size));
        self.size = size;
        self.before.retain(|(end, before)| *before > size && is_recent(*end, at, window));
    }

    /// Counts members of an answer that is held or not trusted.
    pub(super) fn raise(&mut self, size: usize) {
        self.size = self.size.max(size);
        self.before.retain(|(_, before)| *before > self.size);
    }

    /// Members left by a confirmed removal. They count as removed no longer.
    pub(super) fn lower(&mut self, by: usize, least: usize) {
        let lower = |size: &mut usize| *size = size.saturating_sub(by).max(least);
        lower(&mut self.size);
        self.before.iter_mut().for_each(|(_, size)| lower(size));
        self.before.retain(|(_, before)| *before > self.size);
    }
}

fn is_recent(end: Instant, at: Instant, window: Duration) -> bool {
    at.saturating_duration_since(end) < window
}
