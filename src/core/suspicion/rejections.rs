//! Whose heartbeats are rejected and why, for the log, `status` and `explain`.
//!
//! The receiving thread keeps one for what `trust` rejects, the controller one
//! for what the configuration has no place for. Pure: it decides who is listed
//! and when a warning is due; others write it.
//!
//! Senders that have proven a key are kept apart from sources that have proven
//! nothing: a flood of forged datagrams neither hides a sender nor uses up the
//! warnings about it.
//!
//! # Bounds
//!
//! | what | bound | beyond it |
//! |---|---|---|
//! | listed, each kind | [`LISTED_MAX`] | those without a rejection for a minute are forgotten; while none are, newer ones are only counted by reason |
//! | warnings of one sender | one a minute, after [`WARN_AFTER`] rejections | none |
//! | warnings, each kind | [`WARNINGS_MAX`] a minute | suppressed, and the next one says how many |

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

/// Rejected senders that are known one by one.
pub const LISTED_MAX: usize = 1024;

/// Rejections of a sender before the first warning: the late datagram of a
/// sender that has just been restarted is no news.
pub const WARN_AFTER: u64 = 3;

/// Warnings in a minute over all senders.
pub const WARNINGS_MAX: u32 = 30;

/// Between two warnings about one sender.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// Looking for senders to forget costs a walk over all.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// One rejected heartbeat.
#[derive(Debug, Clone, Copy)]
pub struct Rejected<'a> {
    /// Pool and backend it speaks for, where it could be read.
    pub claim: Option<(&'a str, &'a str)>,
    /// Whether a key in force has signed it, so that the claim is the sender's.
    pub signed: bool,
    /// Where it came from, where that is known.
    pub from: Option<SocketAddr>,
    /// The key it names.
    pub key_id: Option<u32>,
    /// As in metrics.
    pub reason: &'static str,
    /// What the operator can do about it.
    pub help: &'static str,
    /// The sender's clock less ours, in milliseconds, where it is proven.
    pub skew: Option<i64>,
    /// Whether it is worth a warning.
    pub warns: bool,
}

/// The rejections of one sender.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejection {
    /// Pool and backend it speaks for, as last said.
    pub claim: Option<(Arc<str>, Arc<str>)>,
    /// Whether a key in force has signed the last one.
    pub signed: bool,
    /// Where the last one came from.
    pub from: Option<SocketAddr>,
    /// The key it names.
    pub key_id: Option<u32>,
    /// Why the last one was rejected, as in metrics.
    pub reason: &'static str,
    /// What the operator can do about it.
    pub help: &'static str,
    /// The sender's clock less ours, in milliseconds, where it is proven.
    pub skew: Option<i64>,
    /// Rejections so far.
    pub count: u64,
    /// Of those, since a heartbeat of this sender was believed.
    pub row: u64,
    /// When the last one came.
    pub at: Instant,
    warned: Option<Instant>,
    unwarned: u64,
}

/// A warning that is due.
#[derive(Debug, Clone)]
pub struct RejectionWarning {
    /// About whom.
    pub rejection: Rejection,
    /// Warnings suppressed since the last, because there were too many.
    pub suppressed: u64,
}

/// All of them; see the module's documentation.
#[derive(Debug, Default)]
pub struct Rejections {
    senders: Side,
    sources: Side,
}

#[derive(Debug, Default)]
struct Side {
    list: HashMap<Key, Rejection>,
    swept: Option<Instant>,
    /// The minute whose warnings are counted.
    minute: Option<Instant>,
    warnings: u32,
    suppressed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    /// Pool and name; neither holds a slash.
    Sender(String),
    /// An address and a hash of what was claimed from there.
    Source(Option<IpAddr>, u64),
}

/// How a clock that is off is called: `5m behind`.
pub fn skew_words(skew: i64) -> String {
    let off = Duration::from_millis(skew.unsigned_abs());
    // Nobody sets a clock by milliseconds that is seconds off.
    let off = if off.as_secs() > 0 { Duration::from_secs(off.as_secs()) } else { off };
    let way = if skew < 0 { "behind" } else { "ahead" };
    format!("{} {way}", humantime::format_duration(off))
}

// === impl Rejections ===

impl Rejections {
    /// Notes one; gives a warning if one is due.
    pub fn add(&mut self, rejected: &Rejected<'_>, now: Instant) -> Option<RejectionWarning> {
        let side = if rejected.signed { &mut self.senders } else { &mut self.sources };
        side.add(rejected, now)
    }

    /// A heartbeat of that sender was believed.
    pub fn believed(&mut self, pool: &str, name: &str) {
        if self.senders.list.is_empty() {
            return;
        }
        if let Some(rejection) = self.senders.list.get_mut(&Key::sender(pool, name)) {
            (rejection.row, rejection.unwarned) = (0, 0);
        }
    }

    /// The rejections in the name of that backend: signed ones before others.
    pub fn of(&self, pool: &str, name: &str) -> Option<&Rejection> {
        let signed = self.senders.list.get(&Key::sender(pool, name));
        signed.or_else(|| {
            let claims = |rejection: &&Rejection| {
                rejection.claim.as_ref().is_some_and(|(p, n)| **p == *pool && **n == *name)
            };
            self.sources.list.values().filter(claims).max_by_key(|rejection| rejection.at)
        })
    }

    /// Every sender that is known, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Rejection> {
        self.senders.list.values().chain(self.sources.list.values())
    }
}

// === impl Side ===

impl Side {
    fn add(&mut self, rejected: &Rejected<'_>, now: Instant) -> Option<RejectionWarning> {
        let key = Key::of(rejected);
        if !self.list.contains_key(&key) {
            if self.list.len() >= LISTED_MAX {
                self.sweep(now);
            }
            if self.list.len() >= LISTED_MAX {
                return None;
            }
            self.list.insert(key.clone(), Rejection::of(rejected, now));
        }
        let rejection = self.list.get_mut(&key)?;
        if !rejection.note(rejected, now) {
            return None;
        }
        if self.minute.is_none_or(|began| now.saturating_duration_since(began) >= WARN_INTERVAL) {
            (self.minute, self.warnings) = (Some(now), 0);
        }
        if self.warnings >= WARNINGS_MAX {
            self.suppressed += 1;
            return None;
        }
        self.warnings += 1;
        let suppressed = std::mem::take(&mut self.suppressed);
        Some(RejectionWarning { rejection: rejection.clone(), suppressed })
    }

    fn sweep(&mut self, now: Instant) {
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < SWEEP_EVERY) {
            return;
        }
        self.swept = Some(now);
        self.list.retain(|_, one| now.saturating_duration_since(one.at) < WARN_INTERVAL);
    }
}

// === impl Rejection ===

impl Rejection {
    fn of(rejected: &Rejected<'_>, now: Instant) -> Rejection {
        Rejection {
            claim: rejected.claim.map(|(pool, name)| (pool.into(), name.into())),
            signed: rejected.signed,
            from: rejected.from,
            key_id: rejected.key_id,
            reason: rejected.reason,
            help: rejected.help,
            skew: rejected.skew,
            count: 0,
            row: 0,
            at: now,
            warned: None,
            unwarned: 0,
        }
    }

    /// Whether a warning is due.
    fn note(&mut self, rejected: &Rejected<'_>, now: Instant) -> bool {
        self.from = rejected.from;
        self.key_id = rejected.key_id;
        (self.reason, self.help) = (rejected.reason, rejected.help);
        self.skew = rejected.skew;
        self.count += 1;
        self.row += 1;
        self.at = now;
        self.unwarned += u64::from(rejected.warns);
        let quiet = |at: Instant| now.saturating_duration_since(at) < WARN_INTERVAL;
        if self.unwarned < WARN_AFTER || self.warned.is_some_and(quiet) {
            return false;
        }
        (self.warned, self.unwarned) = (Some(now), 0);
        true
    }

    /// Why, in words: `stale, its clock is 5m behind`.
    pub fn words(&self) -> String {
        match self.skew {
            Some(skew) if matches!(self.reason, "stale" | "future") => {
                format!("{}, its clock is {}", self.reason, skew_words(skew))
            }
            _ => self.reason.to_owned(),
        }
    }
}

// === impl Key ===

impl Key {
    fn of(rejected: &Rejected<'_>) -> Key {
        match rejected.claim {
            Some((pool, name)) if rejected.signed => Key::sender(pool, name),
            claim => {
                let hash = claim.map_or(0, |(pool, name)| {
                    xxh3_64(pool.as_bytes()).rotate_left(1) ^ xxh3_64(name.as_bytes())
                });
                Key::Source(rejected.from.map(|from| from.ip().to_canonical()), hash)
            }
        }
    }

    fn sender(pool: &str, name: &str) -> Key {
        Key::Sender(format!("{pool}/{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stale(name: &str) -> Rejected<'_> {
        Rejected {
            claim: Some(("web", name)),
            signed: true,
            from: Some(([10, 0, 0, 1], 7946).into()),
            key_id: Some(1),
            reason: "stale",
            help: "synchronise the clocks",
            skew: Some(-300_250),
            warns: true,
        }
    }

    fn forged(name: &str, host: u32) -> Rejected<'_> {
        let from = SocketAddr::new(std::net::Ipv4Addr::from_bits(host).into(), 1);
        Rejected { signed: false, reason: "signature", skew: None, from: Some(from), ..stale(name) }
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_sender_is_warned_of_once_a_minute_from_the_third_rejection_on() {
        let (mut rejections, began) = (Rejections::default(), tidegate_net::clock::now());
        let mut warned = Vec::new();
        for second in 0..130 {
            if rejections.add(&stale("a"), began + seconds(second)).is_some() {
                warned.push(second);
            }
        }
        assert_eq!(warned, [2, 62, 122]);
        let of = rejections.of("web", "a").unwrap();
        assert_eq!((of.count, of.words()), (130, "stale, its clock is 5m behind".to_owned()));
    }

    #[test]
    fn rejections_between_believed_heartbeats_warn_of_nothing() {
        let (mut rejections, began) = (Rejections::default(), tidegate_net::clock::now());
        for second in 0..500 {
            assert!(rejections.add(&stale("a"), began + seconds(second)).is_none());
            rejections.believed("web", "a");
        }
        assert_eq!(rejections.of("web", "a").unwrap().row, 0);
    }

    #[test]
    fn a_flood_of_forged_datagrams_hides_no_sender_and_stays_bounded() {
        let (mut rejections, began) = (Rejections::default(), tidegate_net::clock::now());
        let warnings = (0..100_000_u32)
            .filter(|n| rejections.add(&forged("a", n / 10), began).is_some())
            .count();
        assert_eq!(warnings, WARNINGS_MAX as usize);
        assert_eq!(rejections.all().count(), LISTED_MAX);
        let mut warned = (0..3).filter_map(|_| rejections.add(&stale("b"), began));
        assert_eq!(warned.next().unwrap().suppressed, 0);
        // A minute later others have their turn.
        let later = began + seconds(60);
        rejections.add(&forged("c", u32::MAX), later);
        assert!(rejections.of("web", "c").is_some());
        assert!(rejections.of("web", "a").is_none());
    }

    #[test]
    fn unsigned_claims_are_told_where_there_is_nothing_better() {
        let (mut rejections, now) = (Rejections::default(), tidegate_net::clock::now());
        rejections.add(&forged("a", 1), now);
        assert_eq!(rejections.of("web", "a").map(|of| of.signed), Some(false));
        rejections.add(&stale("a"), now);
        assert_eq!(rejections.of("web", "a").map(|of| of.signed), Some(true));
    }
}
