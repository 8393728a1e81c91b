//! Member sources in the documents of the admin API: what a source said, and what its guards
//! hold.
//!
//! Used by `status` and `explain`. It contains only data and computes nothing.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A source of a pool's members: the pool's `discover` table, or a backend whose address is
/// a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberSourceDoc {
    /// `file`, `http`, `dns`, the kind of a registry, or the name in an address.
    pub source: String,
    /// The backend of the file whose address is the name; `null` for a `discover` table.
    pub backend: Option<String>,
    /// Members in use, held ones included.
    pub members: u32,
    /// Announcements in the last complete answer, refused ones included.
    pub announced: u32,
    /// Members that the last answer lacks.
    pub held: u32,
    /// Announcements of the last answer that were refused or changed.
    pub refused: RefusedAnnouncementsDoc,
    /// Keys at the source of the announcements of the last answer that it could not read, in
    /// order; at most 64. Some sources know none.
    #[serde(default)]
    pub unreadable: Vec<String>,
    /// Answers of this process, by result.
    pub answers: SourceAnswersDoc,
    /// Version of the last complete answer, in the words of the source; empty without one.
    pub version: String,
    /// The last complete answer was current, so it can remove members.
    pub trusted: bool,
    /// `stale_for` is over, and the members drain.
    pub stale: bool,
    /// The members are from the state directory or another process, and the source has not
    /// answered since.
    pub restored: bool,
    /// The members are from the question of an earlier configuration.
    pub moved: bool,
    /// More than half of the members turned critical at once; these wishes do not count.
    pub burst: bool,
    /// Age of the last complete answer or sign of life; `null` if there was none.
    pub confirmed_seconds_ago: Option<f64>,
    /// What the source said last; `null` if nothing in this process.
    pub last_word: Option<LastWordDoc>,
    /// The answer that waits for its confirmation.
    pub held_answer: Option<HeldAnswerDoc>,
}

/// What a source said last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastWordDoc {
    /// The kind of failure, as in the metrics; `null` for an answer.
    pub failure: Option<String>,
    /// The failure in words, or the version of the answer.
    pub detail: String,
    /// Time since then.
    pub seconds_ago: f64,
}

/// Announcements that were refused or changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RefusedAnnouncementsDoc {
    /// Outside of `addresses`, or no usable address.
    pub addresses: u32,
    /// Beyond `backends_max`.
    pub too_many: u32,
    /// With the address of another announcement.
    pub duplicate: u32,
    /// The source could not read it.
    pub unreadable: u32,
    /// Accepted under its address, because its name is not a valid name of a backend.
    pub bad_name: u32,
    /// Accepted with `weight_max`.
    pub weight_clamped: u32,
}

/// Answers of a source, by result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SourceAnswersDoc {
    /// They changed members.
    pub changed: u64,
    /// They changed nothing.
    pub same: u64,
    /// A guard holds their removals.
    pub held: u64,
    /// They would remove members and are not trusted.
    pub refused: u64,
    /// The source gave no answer.
    pub failed: u64,
}

/// An answer that waits for its confirmation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeldAnswerDoc {
    /// The guard: `small`, `kept`, `max-removed`, `incomplete`, `unreadable` or
    /// `last-eligible`.
    pub reason: String,
    /// Members that it would remove.
    pub removes: u32,
    /// Time until a second answer can confirm it; `null` if none can.
    pub confirmable_in_seconds: Option<f64>,
}

/// What a source says about one backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnnouncementDoc {
    /// The source.
    pub from: MemberSourceDoc,
    /// What it wishes: `sessions`, `starting`, `draining` or `suspect`.
    pub wish: String,
    /// The backend's state in the words of the source; empty without one.
    pub raw: String,
    /// Labels that the source announces, at most 16.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The weight that counts.
    pub weight: u16,
    /// Since when the source lists the backend.
    pub listed_seconds: f64,
    /// Why the backend stays although the last answer lacks it; `null` if it is in it.
    pub held: Option<HeldRemovalDoc>,
}

/// A removal that a guard holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeldRemovalDoc {
    /// The guard: `missing`, `small`, `kept`, `max-removed`, `incomplete`, `unreadable`,
    /// `untrusted`, `last-eligible` or `overlap`.
    pub reason: String,
    /// With `overlap`, time until the backend leaves at the latest. Otherwise time until an
    /// answer can confirm the removal; `null` if no time is known.
    pub until_seconds: Option<f64>,
}
