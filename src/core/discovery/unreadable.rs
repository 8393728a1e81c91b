//! The announcements of an answer that a source could not read.
//!
//! The sources create [`Unreadable`]. The view holds the members that these announcements
//! were before, and the operator reads their keys. Nothing here decides anything.

use std::sync::Arc;

/// Most keys of unreadable announcements that an answer names.
pub const UNREADABLE_NAMED_MAX: usize = 64;

/// Longest such key, in bytes. An announcement with a longer key has no name.
pub const KEY_BYTES_MAX: usize = 128;

/// Most keys in a text for the operator.
const SHOWN_MAX: usize = 3;

/// Announcements that a source could not read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unreadable {
    count: u32,
    /// Keys at the source, sorted; at most [`UNREADABLE_NAMED_MAX`].
    keys: Vec<Arc<str>>,
    /// Announcements without a key in `keys`.
    unnamed: u32,
}

// === impl Unreadable ===

impl Unreadable {
    /// Returns announcements whose keys are not known.
    pub fn unnamed(count: u32) -> Unreadable {
        Unreadable { count, keys: Vec::new(), unnamed: count }
    }

    /// Adds announcements whose keys are not known.
    pub fn add_unnamed(&mut self, count: u32) {
        self.count = self.count.saturating_add(count);
        self.unnamed = self.unnamed.saturating_add(count);
    }

    /// Adds an announcement with this key at the source.
    pub fn add(&mut self, key: &str) {
        let place = self.keys.binary_search_by(|known| (**known).cmp(key));
        match place {
            Ok(_) => self.count = self.count.saturating_add(1),
            Err(_) if key.len() > KEY_BYTES_MAX || self.keys.len() >= UNREADABLE_NAMED_MAX => {
                self.add_unnamed(1);
            }
            Err(place) => {
                self.keys.insert(place, key.into());
                self.count = self.count.saturating_add(1);
            }
        }
    }

    /// Adds those of another part of the answer.
    pub fn merge(&mut self, other: &Unreadable) {
        other.keys.iter().for_each(|key| self.add(key));
        let named = u32::try_from(other.keys.len()).unwrap_or(u32::MAX);
        let rest = other.count.saturating_sub(named);
        self.count = self.count.saturating_add(rest);
        self.unnamed = self.unnamed.saturating_add(other.unnamed);
    }

    /// Returns their number.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Returns the known keys, sorted; at most [`UNREADABLE_NAMED_MAX`].
    pub fn keys(&self) -> &[Arc<str>] {
        &self.keys
    }

    /// Whether one of them has this key.
    pub fn has(&self, key: &str) -> bool {
        self.keys.binary_search_by(|known| (**known).cmp(key)).is_ok()
    }

    /// Whether the keys of all are known.
    pub fn are_named(&self) -> bool {
        self.unnamed == 0
    }

    /// Returns the number and the first keys: `5 unreadable: "a", "b", "c" and 2 more`.
    pub fn text(&self) -> String {
        let shown: Vec<String> =
            self.keys.iter().take(SHOWN_MAX).map(|key| format!("{key:?}")).collect();
        let more = (self.count as usize).saturating_sub(shown.len());
        match (shown.is_empty(), more) {
            (true, _) => format!("{} unreadable", self.count),
            (false, 0) => format!("{} unreadable: {}", self.count, shown.join(", ")),
            (false, _) => {
                format!("{} unreadable: {} and {more} more", self.count, shown.join(", "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_known_up_to_their_bounds_and_all_are_counted() {
        let mut unreadable = Unreadable::default();
        for number in (0..UNREADABLE_NAMED_MAX).rev() {
            unreadable.add(&format!("k{number:03}"));
        }
        assert!(unreadable.are_named() && unreadable.keys().is_sorted());
        unreadable.add("k000");
        assert!(unreadable.are_named() && unreadable.has("k000") && !unreadable.has("k"));
        unreadable.add("beyond");
        assert!(!unreadable.are_named() && !unreadable.has("beyond"));
        assert_eq!(unreadable.count() as usize, UNREADABLE_NAMED_MAX + 2);
        let mut long = Unreadable::default();
        long.add(&"k".repeat(KEY_BYTES_MAX + 1));
        assert_eq!((long.count(), long.are_named()), (1, false));
    }

    #[test]
    fn text_has_the_first_keys_and_the_number_of_the_others() {
        let mut unreadable = Unreadable::unnamed(1);
        assert_eq!(unreadable.text(), "1 unreadable");
        unreadable.add("b");
        assert_eq!(unreadable.text(), "2 unreadable: \"b\" and 1 more");
        let mut named = Unreadable::default();
        ["a", "b\n", "c"].iter().for_each(|key| named.add(key));
        assert_eq!(named.text(), "3 unreadable: \"a\", \"b\\n\", \"c\"");
    }
}
