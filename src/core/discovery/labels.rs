//! The labels of a member: texts for people, which decide nothing.
//!
//! Sources create them from what a registry or a list has. Views keep them, and `explain`
//! shows them.

use std::sync::Arc;

/// Most labels that are kept of a member.
pub const LABELS_KEPT_MAX: usize = 16;

/// Longest key of a label that is kept, in bytes.
pub const LABEL_KEY_BYTES_MAX: usize = 64;

/// Longest value of a label that is kept, in bytes.
pub const LABEL_VALUE_BYTES_MAX: usize = 256;

/// Most bytes of all labels of a member, with a separator after each key and value.
pub const LABELS_BYTES_MAX: usize = 768;

/// Labels of a member, sorted by key. Clones share the texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemberLabels(
    /// Keys and values, each followed by a NUL. `None`: no labels.
    Option<Arc<str>>,
);

// === impl MemberLabels ===

impl MemberLabels {
    /// Keeps the labels that fit into the bounds, in the order given. It leaves out a label that
    /// is too long or has a control character, and the first one beyond the number or the bytes
    /// of all with those behind it. Give them sorted by key, so that equal labels compare equal.
    pub fn of<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> MemberLabels {
        let fits = |(key, value): &(&str, &str)| {
            let plain = |text: &str| !text.contains(char::is_control);
            let short = key.len() <= LABEL_KEY_BYTES_MAX && value.len() <= LABEL_VALUE_BYTES_MAX;
            short && plain(key) && plain(value)
        };
        let mut text = String::new();
        for (key, value) in labels.into_iter().filter(fits).take(LABELS_KEPT_MAX) {
            if text.len() + key.len() + value.len() + 2 > LABELS_BYTES_MAX {
                break;
            }
            text.extend([key, "\0", value, "\0"]);
        }
        MemberLabels(Some(text).filter(|text| !text.is_empty()).map(Arc::from))
    }

    /// Returns keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut parts = self.0.as_deref().unwrap_or_default().split_terminator('\0');
        std::iter::from_fn(move || Some((parts.next()?, parts.next()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_kept_up_to_their_bounds() {
        let labels = MemberLabels::of([("rack", ""), ("zone", "a")]);
        assert_eq!(labels.iter().collect::<Vec<_>>(), [("rack", ""), ("zone", "a")]);
        assert_eq!(labels, MemberLabels::of([("rack", ""), ("zone", "a")]));
        assert_eq!(MemberLabels::of([]).iter().count(), 0);
        let (key, value) = ("k".repeat(65), "v".repeat(257));
        let left_out = [(&*key, "a"), ("b", &*value), ("c", "\x1b[2J"), ("d\0", ""), ("e", "f")];
        let labels = MemberLabels::of(left_out);
        assert_eq!(labels.iter().collect::<Vec<_>>(), [("e", "f")]);
        let many = (0..40).map(|number| format!("{number:02}")).collect::<Vec<_>>();
        let labels = MemberLabels::of(many.iter().map(|key| (&**key, "x")));
        assert_eq!(labels.iter().count(), LABELS_KEPT_MAX);
        let long = "v".repeat(250);
        let labels = MemberLabels::of(many.iter().map(|key| (&**key, &*long)));
        assert_eq!(labels.iter().count(), 3);
    }
}
