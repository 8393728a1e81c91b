//! Source addresses of connections to one backend, and the number of local ports in use
//! at each.
//!
//! Part of a backend's state: the controller sets it, workers take addresses in turn,
//! and the port monitor reads the counts. Nothing here binds or connects.
//!
//! A connection is identified by both addresses and both ports. Each pair of a source
//! address and a backend therefore has the whole range of local ports (ip(7),
//! `ip_local_port_range`).

use crate::metrics::counters::{Counter, Sharded};
use crate::model::SourceAddr;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Maximum number of source addresses per connect attempt. The search for a free port
/// in an exhausted range costs the kernel milliseconds.
pub const SOURCE_ADDRS_TRIED_MAX: usize = 4;

/// Time for which a source address without a free port is skipped, in milliseconds. It
/// prevents a search of the same range for each connect, and is short compared with the
/// time for which ports stay in TIME_WAIT.
const EXHAUSTED_MILLIS: u64 = 50;

/// The source addresses for one backend; at least one entry.
#[derive(Debug)]
pub struct SourceAddrs {
    list: Box<[Arc<CountedSource>]>,
    turn: AtomicUsize,
}

/// A source address and its counts.
#[derive(Debug)]
pub struct CountedSource {
    /// `None`: the kernel chooses.
    source: Option<SourceAddr>,
    /// In milliseconds of the process's clock.
    exhausted_until: AtomicU64,
    /// Set if `source` is. Otherwise the counters of the backend apply.
    counts: Option<Sharded<SourceAddrCounts>>,
}

/// Connections of one worker from one source address.
#[derive(Debug, Default)]
pub struct SourceAddrCounts {
    /// Connections started.
    pub begun: Counter,
    /// Started connections that are closed.
    pub ended: Counter,
    /// Started connections that the kernel keeps in TIME_WAIT after Tidegate closed
    /// them first.
    pub lingering: Counter,
}

// === impl SourceAddrs ===

impl SourceAddrs {
    /// Lets the kernel choose the source address.
    pub fn any() -> SourceAddrs {
        SourceAddrs { list: Box::new([Arc::new(CountedSource::any())]), turn: AtomicUsize::new(0) }
    }

    /// Uses the addresses in `sources` that have the backend's address family. If there
    /// is none, the kernel chooses. An address that is also in `before` keeps its
    /// counts.
    pub fn new(
        sources: &[SourceAddr],
        to: Option<SocketAddr>,
        workers: usize,
        before: &SourceAddrs,
    ) -> SourceAddrs {
        let list: Vec<Arc<CountedSource>> = of_family(sources, to)
            .map(|source| {
                let known = before.list.iter().find(|counted| counted.source == Some(source));
                known.map_or_else(|| Arc::new(CountedSource::from(source, workers)), Arc::clone)
            })
            .collect();
        match list.is_empty() {
            true => SourceAddrs::any(),
            false => SourceAddrs { list: list.into(), turn: AtomicUsize::new(0) },
        }
    }

    /// Returns whether this list already consists of the usable addresses in `sources`.
    pub fn are_of(&self, sources: &[SourceAddr], to: Option<SocketAddr>) -> bool {
        let mine = self.list.iter().filter_map(|counted| counted.source);
        mine.eq(of_family(sources, to))
    }

    /// Returns the addresses that are not marked as exhausted, starting with the next
    /// in turn; at most [`SOURCE_ADDRS_TRIED_MAX`].
    pub fn round_robin(&self, now_millis: u64) -> impl Iterator<Item = &Arc<CountedSource>> {
        let first = match self.list.len() {
            1 => 0,
            many => self.turn.fetch_add(1, Ordering::Relaxed) % many,
        };
        let (before, from) = self.list.split_at(first);
        from.iter()
            .chain(before)
            .filter(move |counted| now_millis >= counted.exhausted_until.load(Ordering::Relaxed))
            .take(SOURCE_ADDRS_TRIED_MAX)
    }

    /// Returns all addresses in file order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<CountedSource>> {
        self.list.iter()
    }
}

/// Returns the sources of the same address family as `to`.
fn of_family(sources: &[SourceAddr], to: Option<SocketAddr>) -> impl Iterator<Item = SourceAddr> {
    let fits =
        move |source: &SourceAddr| to.is_some_and(|to| to.is_ipv4() == source.ip().is_ipv4());
    sources.iter().copied().filter(fits)
}

// === impl CountedSource ===

impl CountedSource {
    fn any() -> CountedSource {
        CountedSource { source: None, exhausted_until: AtomicU64::new(0), counts: None }
    }

    fn from(source: SourceAddr, workers: usize) -> CountedSource {
        let counts = Sharded::new(workers, SourceAddrCounts::default);
        CountedSource {
            source: Some(source),
            exhausted_until: AtomicU64::new(0),
            counts: Some(counts),
        }
    }

    /// Returns the address; `None` if the kernel chooses.
    pub fn source(&self) -> Option<SourceAddr> {
        self.source
    }

    /// Returns the counts; `None` if the counters of the backend apply.
    pub fn counts(&self) -> Option<&Sharded<SourceAddrCounts>> {
        self.counts.as_ref()
    }

    /// Marks the address as out of free ports, or as no longer local. It is skipped for
    /// [`EXHAUSTED_MILLIS`].
    pub fn mark_exhausted(&self, now_millis: u64) {
        self.exhausted_until.store(now_millis + EXHAUSTED_MILLIS, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;

    fn source(text: &str) -> SourceAddr {
        SourceAddr::new(text.parse().unwrap())
    }

    fn source_addrs(sources: &[&str], to: &str) -> SourceAddrs {
        let sources: Vec<SourceAddr> = sources.iter().map(|text| source(text)).collect();
        SourceAddrs::new(&sources, Some(to.parse().unwrap()), 1, &SourceAddrs::any())
    }

    fn next(addrs: &SourceAddrs, now: u64) -> Vec<String> {
        let word = |counted: &Arc<CountedSource>| {
            counted.source.map_or("any".into(), |source| source.to_string())
        };
        addrs.round_robin(now).map(word).collect()
    }

    #[test]
    fn source_addresses_take_turns_and_exhausted_ones_are_skipped_for_50_ms() {
        let addrs = source_addrs(&["10.0.0.1", "10.0.0.2"], "10.0.1.1:80");
        assert_eq!(next(&addrs, 0), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(next(&addrs, 0), ["10.0.0.2", "10.0.0.1"]);
        addrs.iter().next().unwrap().mark_exhausted(1000);
        assert_eq!(next(&addrs, 1049), ["10.0.0.2"]);
        addrs.iter().nth(1).unwrap().mark_exhausted(1000);
        assert_eq!(next(&addrs, 1049), Vec::<String>::new(), "the kernel is not asked");
        assert_eq!(next(&addrs, 1050).len(), 2);
    }

    #[test]
    fn connect_attempt_uses_at_most_four_source_addresses() {
        let sources: Vec<String> = (1..=20).map(|n| format!("10.0.0.{n}")).collect();
        let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
        assert_eq!(next(&source_addrs(&sources, "10.0.1.1:80"), 0).len(), SOURCE_ADDRS_TRIED_MAX);
    }

    #[test]
    fn kernel_chooses_if_no_source_has_the_family_of_the_backend() {
        assert_eq!(next(&source_addrs(&["10.0.0.1", "fd00::1"], "[fd00::2]:80"), 0), ["fd00::1"]);
        assert_eq!(next(&source_addrs(&["10.0.0.1"], "[fd00::2]:80"), 0), ["any"]);
        let unix = SourceAddrs::new(&[source("10.0.0.1")], None, 1, &SourceAddrs::any());
        assert_eq!(next(&unix, 0), ["any"]);
    }

    #[test]
    fn kept_source_address_keeps_its_counts() {
        let before = source_addrs(&["10.0.0.1", "10.0.0.2"], "10.0.1.1:80");
        let kept = before.list[1].clone();
        kept.counts().unwrap().of(0).begun.add(3);
        let sources: [SourceAddr; 2] = [source("10.0.0.3"), source("10.0.0.2")];
        let to = Some("10.0.1.1:80".parse().unwrap());
        let after = SourceAddrs::new(&sources, to, 1, &before);
        assert!(Arc::ptr_eq(&after.list[1], &kept));
        assert!(after.are_of(&sources, to) && !before.are_of(&sources, to));
    }
}
