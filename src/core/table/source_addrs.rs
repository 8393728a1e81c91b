//! From which of our addresses connections to one backend start, and how many
//! of the ports there they hold.
//!
//! Part of a backend's state: set by the controller, taken in turn by workers,
//! read by the watch over ports. Nothing here binds or connects.
//!
//! A connection is told from others by both addresses and both ports, so each
//! pair of a source address and a backend has the whole range of local ports
//! (ip(7), `ip_local_port_range`) to itself.

use crate::metrics::counters::{Counter, Sharded};
use crate::model::SourceAddr;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Addresses one connect attempt goes through before it gives up: looking for a
/// free port in a range without one costs the kernel milliseconds.
pub const WAYS_TRIED_MAX: usize = 4;

/// How long a way without a free port is left alone, in milliseconds: long
/// enough that a storm of connects does not search the range again for each,
/// short enough that nobody notices once ports are free.
const SPENT_MILLIS: u64 = 50;

/// The ways to one backend; at least one.
#[derive(Debug)]
pub struct SourceAddrs {
    list: Box<[Arc<CountedSource>]>,
    turn: AtomicUsize,
}

/// One of them.
#[derive(Debug)]
pub struct CountedSource {
    /// `None`: the kernel chooses.
    source: Option<SourceAddr>,
    /// In the milliseconds of the process's clock.
    spent_until: AtomicU64,
    /// Of a way with an address of its own; the other's are its backend's.
    counts: Option<Sharded<SourceAddrCounts>>,
}

/// What one worker has done on one way.
#[derive(Debug, Default)]
pub struct SourceAddrCounts {
    /// Connections begun.
    pub begun: Counter,
    /// Those of them that are closed.
    pub ended: Counter,
    /// Those of them whose port the kernel keeps in TIME_WAIT.
    pub lingering: Counter,
}

// === impl SourceAddrs ===

impl SourceAddrs {
    /// The kernel chooses.
    pub fn any() -> SourceAddrs {
        SourceAddrs { list: Box::new([Arc::new(CountedSource::any())]), turn: AtomicUsize::new(0) }
    }

    /// By those of `sources` that are of the backend's family; where there is
    /// none, the kernel chooses. A way that was there `before` goes on counting.
    pub fn new(
        sources: &[SourceAddr],
        to: Option<SocketAddr>,
        workers: usize,
        before: &SourceAddrs,
    ) -> SourceAddrs {
        let list: Vec<Arc<CountedSource>> = of_family(sources, to)
            .map(|source| {
                let known = before.list.iter().find(|way| way.source == Some(source));
                known.map_or_else(|| Arc::new(CountedSource::from(source, workers)), Arc::clone)
            })
            .collect();
        match list.is_empty() {
            true => SourceAddrs::any(),
            false => SourceAddrs { list: list.into(), turn: AtomicUsize::new(0) },
        }
    }

    /// Whether they are the ways over those sources already.
    pub fn are_by(&self, sources: &[SourceAddr], to: Option<SocketAddr>) -> bool {
        let mine = self.list.iter().filter_map(|way| way.source);
        mine.eq(of_family(sources, to))
    }

    /// Those that had a free port when last tried, from the next in turn on; at
    /// most [`WAYS_TRIED_MAX`].
    pub fn round_robin(&self, now_millis: u64) -> impl Iterator<Item = &Arc<CountedSource>> {
        let first = match self.list.len() {
            1 => 0,
            many => self.turn.fetch_add(1, Ordering::Relaxed) % many,
        };
        let (before, from) = self.list.split_at(first);
        from.iter()
            .chain(before)
            .filter(move |way| now_millis >= way.spent_until.load(Ordering::Relaxed))
            .take(WAYS_TRIED_MAX)
    }

    /// Every one, in file order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<CountedSource>> {
        self.list.iter()
    }
}

/// Those from which that address can be reached at all.
fn of_family(sources: &[SourceAddr], to: Option<SocketAddr>) -> impl Iterator<Item = SourceAddr> {
    let fits =
        move |source: &SourceAddr| to.is_some_and(|to| to.is_ipv4() == source.ip().is_ipv4());
    sources.iter().copied().filter(fits)
}

// === impl CountedSource ===

impl CountedSource {
    fn any() -> CountedSource {
        CountedSource { source: None, spent_until: AtomicU64::new(0), counts: None }
    }

    fn from(source: SourceAddr, workers: usize) -> CountedSource {
        let counts = Sharded::new(workers, SourceAddrCounts::default);
        CountedSource { source: Some(source), spent_until: AtomicU64::new(0), counts: Some(counts) }
    }

    /// Where connections start; `None`: the kernel chooses.
    pub fn source(&self) -> Option<SourceAddr> {
        self.source
    }

    /// What was done on it; `None` where the backend's own counts tell.
    pub fn counts(&self) -> Option<&Sharded<SourceAddrCounts>> {
        self.counts.as_ref()
    }

    /// It had no free port (or its address is gone): nobody tries it for a
    /// moment.
    pub fn is_exhausted(&self, now_millis: u64) {
        self.spent_until.store(now_millis + SPENT_MILLIS, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
mod tests {
    use super::*;

    fn source(text: &str) -> SourceAddr {
        SourceAddr::new(text.parse().unwrap())
    }

    fn ways(sources: &[&str], to: &str) -> SourceAddrs {
        let sources: Vec<SourceAddr> = sources.iter().map(|text| source(text)).collect();
        SourceAddrs::new(&sources, Some(to.parse().unwrap()), 1, &SourceAddrs::any())
    }

    fn next(ways: &SourceAddrs, now: u64) -> Vec<String> {
        let word =
            |way: &Arc<CountedSource>| way.source.map_or("any".into(), |source| source.to_string());
        ways.round_robin(now).map(word).collect()
    }

    #[test]
    fn ways_take_turns_and_a_spent_one_sits_out_for_a_moment() {
        let ways = ways(&["10.0.0.1", "10.0.0.2"], "10.0.1.1:80");
        assert_eq!(next(&ways, 0), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(next(&ways, 0), ["10.0.0.2", "10.0.0.1"]);
        ways.iter().next().unwrap().is_exhausted(1000);
        assert_eq!(next(&ways, 1049), ["10.0.0.2"]);
        ways.iter().nth(1).unwrap().is_exhausted(1000);
        assert_eq!(next(&ways, 1049), Vec::<String>::new(), "nobody asks the kernel");
        assert_eq!(next(&ways, 1050).len(), 2);
    }

    #[test]
    fn one_attempt_goes_through_few_of_many() {
        let sources: Vec<String> = (1..=20).map(|n| format!("10.0.0.{n}")).collect();
        let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
        assert_eq!(next(&ways(&sources, "10.0.1.1:80"), 0).len(), WAYS_TRIED_MAX);
    }

    #[test]
    fn sources_are_of_the_backends_family_or_the_kernel_chooses() {
        assert_eq!(next(&ways(&["10.0.0.1", "fd00::1"], "[fd00::2]:80"), 0), ["fd00::1"]);
        assert_eq!(next(&ways(&["10.0.0.1"], "[fd00::2]:80"), 0), ["any"]);
        let unix = SourceAddrs::new(&[source("10.0.0.1")], None, 1, &SourceAddrs::any());
        assert_eq!(next(&unix, 0), ["any"]);
    }

    #[test]
    fn a_source_that_stays_goes_on_counting() {
        let before = ways(&["10.0.0.1", "10.0.0.2"], "10.0.1.1:80");
        let kept = before.list[1].clone();
        kept.counts().unwrap().of(0).begun.add(3);
        let sources: [SourceAddr; 2] = [source("10.0.0.3"), source("10.0.0.2")];
        let to = Some("10.0.1.1:80".parse().unwrap());
        let after = SourceAddrs::new(&sources, to, 1, &before);
        assert!(Arc::ptr_eq(&after.list[1], &kept));
        assert!(after.are_by(&sources, to) && !before.are_by(&sources, to));
    }
}
