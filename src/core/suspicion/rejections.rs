//! Senders with rejected heartbeats and the reasons, for the log, `status` and `explain`.
//!
//! The receiving thread owns one list for rejections by `trust`; the controller owns one
//! for heartbeats that do not match the configuration. This code decides which senders are
//! listed and when a warning is due. It writes no log line.
//!
//! Senders with a valid signature and sources without one are listed separately. A flood of
//! forged datagrams therefore hides no sender and uses no warning about one.
//!
//! # Bounds
//!
//! | what | bound | beyond it |
//! |---|---|---|
//! | listed, per kind | [`LISTED_MAX`] | entries without a rejection for a minute are dropped; if there are none, the new sender is not listed |
//! | warnings about one sender | one per minute, after [`WARN_AFTER`] rejections | none |
//! | warnings, per kind | [`WARNINGS_MAX`] per minute | suppressed; the next warning counts them |

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::xxh3_64;

/// Listed senders, per kind.
pub const LISTED_MAX: usize = 1024;

/// Rejections of a sender before its first warning. A late datagram after a restart of
/// the sender must not warn.
pub const WARN_AFTER: u64 = 3;

/// Warnings per minute over all senders of a kind.
pub const WARNINGS_MAX: u32 = 30;

/// Time between two warnings about one sender.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// Time between two searches for expired entries. Each scans the whole list.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// One rejected heartbeat.
#[derive(Debug, Clone, Copy)]
pub struct Rejected<'a> {
    /// Pool and backend in the datagram, if readable.
    pub claim: Option<(&'a str, &'a str)>,
    /// Whether the signature is valid under a configured key.
    pub signed: bool,
    /// Source address, if known.
    pub from: Option<SocketAddr>,
    /// Key id in the datagram.
    pub key_id: Option<u32>,
    /// Reason, as in metrics.
    pub reason: &'static str,
    /// What the operator can do about it.
    pub help: &'static str,
    /// The sender's clock minus the local clock, in milliseconds, if signed.
    pub skew: Option<i64>,
    /// Whether the rejection counts towards a warning.
    pub warns: bool,
}

/// The rejections of one sender.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejection {
    /// Pool and backend in the datagrams.
    pub claim: Option<(Arc<str>, Arc<str>)>,
    /// Whether the signatures are valid under a configured key.
    pub signed: bool,
    /// Source address of the last datagram.
    pub from: Option<SocketAddr>,
    /// Key id in the last datagram.
    pub key_id: Option<u32>,
    /// Reason of the last rejection, as in metrics.
    pub reason: &'static str,
    /// What the operator can do about it.
    pub help: &'static str,
    /// The sender's clock minus the local clock, in milliseconds, if signed.
    pub skew: Option<i64>,
    /// Rejections so far.
    pub count: u64,
    /// Rejections since the last accepted heartbeat of this sender.
    pub row: u64,
    /// When the last datagram arrived.
    pub at: Instant,
    warned: Option<Instant>,
    unwarned: u64,
}

/// A warning that is due.
#[derive(Debug, Clone)]
pub struct RejectionWarning {
    /// The sender.
    pub rejection: Rejection,
    /// Warnings suppressed by the rate limit since the last warning.
    pub suppressed: u64,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Rejections {
    senders: RejectionList,
    sources: RejectionList,
}

#[derive(Debug, Default)]
struct RejectionList {
    list: HashMap<Key, Rejection>,
    swept: Option<Instant>,
    /// Start of the minute whose warnings are counted.
    minute: Option<Instant>,
    warnings: u32,
    suppressed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    /// Pool and backend name; neither contains a slash.
    Sender(String),
    /// Source address and a hash of the claim.
    Source(Option<IpAddr>, u64),
}

/// Formats a clock offset: `5m behind`.
pub fn skew_words(skew: i64) -> String {
    let off = Duration::from_millis(skew.unsigned_abs());
    // Milliseconds only for offsets below 1 s.
    let off = if off.as_secs() > 0 { Duration::from_secs(off.as_secs()) } else { off };
    let direction = if skew < 0 { "behind" } else { "ahead" };
    format!("{} {direction}", humantime::format_duration(off))
}

// === impl Rejections ===

impl Rejections {
    /// Records a rejection. Returns a warning if one is due.
    pub fn add(&mut self, rejected: &Rejected<'_>, now: Instant) -> Option<RejectionWarning> {
        let list = if rejected.signed { &mut self.senders } else { &mut self.sources };
        list.add(rejected, now)
    }

    /// Records an accepted heartbeat: ends the sender's row of rejections.
    pub fn believed(&mut self, pool: &str, name: &str) {
        if self.senders.list.is_empty() {
            return;
        }
        if let Some(rejection) = self.senders.list.get_mut(&Key::sender(pool, name)) {
            (rejection.row, rejection.unwarned) = (0, 0);
        }
    }

    /// Returns the rejections with the name of this backend; signed ones take precedence.
    pub fn of(&self, pool: &str, name: &str) -> Option<&Rejection> {
        let signed = self.senders.list.get(&Key::sender(pool, name));
        signed.or_else(|| {
            let claims = |rejection: &&Rejection| {
                rejection.claim.as_ref().is_some_and(|(p, n)| **p == *pool && **n == *name)
            };
            self.sources.list.values().filter(claims).max_by_key(|rejection| rejection.at)
        })
    }

    /// Returns all listed senders, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Rejection> {
        self.senders.list.values().chain(self.sources.list.values())
    }
}

// === impl RejectionList ===

impl RejectionList {
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

    /// Records a rejection and returns whether a warning is due.
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

    /// Returns the reason as text: `stale, its clock is 5m behind`.
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
    fn sender_causes_one_warning_per_minute_from_the_third_rejection() {
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
    fn rejections_between_accepted_heartbeats_cause_no_warning() {
        let (mut rejections, began) = (Rejections::default(), tidegate_net::clock::now());
        for second in 0..500 {
            assert!(rejections.add(&stale("a"), began + seconds(second)).is_none());
            rejections.believed("web", "a");
        }
        assert_eq!(rejections.of("web", "a").unwrap().row, 0);
    }

    #[test]
    fn flood_of_forged_datagrams_hides_no_sender_and_is_bounded() {
        let (mut rejections, began) = (Rejections::default(), tidegate_net::clock::now());
        let warnings = (0..100_000_u32)
            .filter(|n| rejections.add(&forged("a", n / 10), began).is_some())
            .count();
        assert_eq!(warnings, WARNINGS_MAX as usize);
        assert_eq!(rejections.all().count(), LISTED_MAX);
        let mut warned = (0..3).filter_map(|_| rejections.add(&stale("b"), began));
        assert_eq!(warned.next().unwrap().suppressed, 0);
        // After a minute the entries expire and new sources are listed.
        let later = began + seconds(60);
        rejections.add(&forged("c", u32::MAX), later);
        assert!(rejections.of("web", "c").is_some());
        assert!(rejections.of("web", "a").is_none());
    }

    #[test]
    fn unsigned_rejections_are_shown_only_without_signed_ones() {
        let (mut rejections, now) = (Rejections::default(), tidegate_net::clock::now());
        rejections.add(&forged("a", 1), now);
        assert_eq!(rejections.of("web", "a").map(|of| of.signed), Some(false));
        rejections.add(&stale("a"), now);
        assert_eq!(rejections.of("web", "a").map(|of| of.signed), Some(true));
    }
}
