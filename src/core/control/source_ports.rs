//! How many local ports the connections to each backend hold, and whether they
//! are about to run out.
//!
//! Driven by `daemon`, which brings the time and the kernel's limits and logs the
//! warnings; rendered by the admin API. Pure, and an estimate: it knows this
//! process's connections only, and of closed ones how many it closed first.

use super::Notice;
use crate::model::{BackendAddr, SourceAddr};
use crate::table::source_addrs::CountedSource;
use crate::table::state::{BackendId, BackendState};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Between two looks.
pub const LOOK: Duration = Duration::from_secs(2);

/// Looks a closed connection's port is held for: TIME_WAIT lasts 60 s in Linux
/// (`TCP_TIMEWAIT_LEN`).
const LINGER_LOOKS: usize = 30;

/// Share of the ports that is warned of, and the one at which the warning ends.
const WARN_PERCENT: u64 = 80;
const CLEAR_PERCENT: u64 = 70;

/// Warnings one look may bring; beyond it they are counted in one line.
const NOTICES_MAX: usize = 5;

/// What the kernel has to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortLimits {
    /// Local ports for each pair of a source address and a backend.
    pub ports: u32,
    /// For whom a port in TIME_WAIT is taken again within a second.
    pub reuse: Reuse,
}

/// `net.ipv4.tcp_tw_reuse`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// For nobody.
    Never,
    /// For connections within this host, the kernel's default.
    Loopback,
    /// For every connection.
    Always,
}

/// A backend by one of its ways.
type PortKey = (BackendId, Option<SourceAddr>);

/// What was seen so far.
#[derive(Debug, Clone, Default)]
pub struct PortWatch {
    /// How many connections had lingered at the last looks, oldest first; only
    /// of whom had any.
    // Shared by clones: a picture for a scrape is one.
    lingered: HashMap<PortKey, Arc<VecDeque<u64>>>,
    warned: HashSet<PortKey>,
}

/// A look that is under way.
#[derive(Debug, Default)]
pub struct PortLook {
    /// The last one looked at.
    after: Option<BackendId>,
    seen: HashSet<PortKey>,
    high: HashSet<PortKey>,
    news: Vec<Notice>,
}

// === impl PortLook ===

impl PortLook {
    /// Backends up to this one have been looked at.
    pub fn after(&self) -> Option<BackendId> {
        self.after
    }
}

// === impl PortWatch ===

impl PortWatch {
    /// Looks at some backends, each once every [`LOOK`].
    pub fn sample<'a>(
        &mut self,
        look: &mut PortLook,
        backends: impl Iterator<Item = &'a Arc<BackendState>>,
        limits: PortLimits,
    ) {
        for backend in backends {
            look.after = Some(backend.id);
            if !has_ports(backend) {
                continue;
            }
            for way in backend.source_addrs.load().iter() {
                let key = (backend.id, way.source());
                self.remember(key, ports_in_time_wait(backend, way), &mut look.seen);
                let used = self.used(backend, way, limits);
                let percent = used * 100 / u64::from(limits.ports.max(1));
                let was_high = self.warned.contains(&key);
                if percent >= WARN_PERCENT && !was_high {
                    look.news.push(notice(backend, way, used, limits));
                }
                if percent >= WARN_PERCENT || was_high && percent > CLEAR_PERCENT {
                    look.high.insert(key);
                }
            }
        }
    }

    /// All have been looked at: who has come to 80 % of the ports since the last time.
    pub fn complete(&mut self, look: PortLook) -> Vec<Notice> {
        self.lingered.retain(|key, _| look.seen.contains(key));
        self.warned = look.high;
        shortened(look.news)
    }

    /// Ports held on one way to a backend: open connections, and closed ones in
    /// TIME_WAIT where that keeps a port from new ones.
    pub fn used(&self, backend: &BackendState, way: &CountedSource, limits: PortLimits) -> u64 {
        let open = match way.counts() {
            Some(counts) => {
                // Ended is read first: begun can only have grown by then.
                let ended = counts.sum(|c| c.ended.get());
                counts.sum(|c| c.begun.get()).saturating_sub(ended)
            }
            None => backend.in_flight.get().into(),
        };
        if reuses(backend, limits.reuse) {
            return open;
        }
        let past = self.lingered.get(&(backend.id, way.source()));
        let full = past.filter(|past| past.len() > LINGER_LOOKS);
        let gone = full.and_then(|past| past.front()).copied().unwrap_or(0);
        open + ports_in_time_wait(backend, way).saturating_sub(gone)
    }

    /// Whether there is somebody with few ports left.
    pub fn warnings(&self) -> usize {
        self.warned.len()
    }

    /// Whether that backend has few ports left on that way.
    pub fn is_warned(&self, backend: BackendId, source: Option<SourceAddr>) -> bool {
        self.warned.contains(&(backend, source))
    }

    fn remember(&mut self, key: PortKey, lingering: u64, seen: &mut HashSet<PortKey>) {
        if lingering == 0 {
            return;
        }
        seen.insert(key);
        let past = Arc::make_mut(self.lingered.entry(key).or_default());
        past.push_back(lingering);
        if past.len() > LINGER_LOOKS + 1 {
            past.pop_front();
        }
    }
}

/// Whether connections to it need a port.
pub fn has_ports(backend: &BackendState) -> bool {
    matches!(backend.address, BackendAddr::Tcp(_))
}

/// In words, for status and the log.
pub fn warning_text(
    backend: &BackendState,
    way: &CountedSource,
    used: u64,
    limits: PortLimits,
) -> String {
    let from = way.source().map_or_else(String::new, |source| format!(" from {source}"));
    format!(
        "local ports to {}{from} are nearly exhausted: {used} of {} in use; add addresses to \
         [pool.{}] source or widen net.ipv4.ip_local_port_range",
        backend.address_text, limits.ports, backend.pool
    )
}

fn notice(backend: &BackendState, way: &CountedSource, used: u64, limits: PortLimits) -> Notice {
    Notice {
        pool: Arc::clone(&backend.pool),
        backend: Some(Arc::clone(&backend.name)),
        message: warning_text(backend, way, used, limits),
    }
}

fn shortened(mut notices: Vec<Notice>) -> Vec<Notice> {
    let more = notices.len().saturating_sub(NOTICES_MAX);
    if more > 0 {
        notices.truncate(NOTICES_MAX);
        let message = format!("local ports to {more} more backends are nearly exhausted");
        notices.push(Notice { pool: "".into(), backend: None, message });
    }
    notices
}

/// Connections so far whose port went into TIME_WAIT.
fn ports_in_time_wait(backend: &BackendState, way: &CountedSource) -> u64 {
    match way.counts() {
        Some(counts) => counts.sum(|c| c.lingering.get()),
        None => backend.counters.sum(|c| c.lingering.get()),
    }
}

fn reuses(backend: &BackendState, reuse: Reuse) -> bool {
    match (&backend.address, reuse) {
        (_, Reuse::Always) => true,
        (BackendAddr::Tcp(to), Reuse::Loopback) => to.ip().is_loopback(),
        _ => false,
    }
}

#[cfg(test)]
#[cfg(not(tidegate_loom))]
mod tests {
    use super::*;

    const LIMITS: PortLimits = PortLimits { ports: 100, reuse: Reuse::Loopback };

    fn backend(address: &str) -> Arc<BackendState> {
        let address = BackendAddr::Tcp(address.parse().unwrap());
        Arc::new(BackendState::new(BackendId(1), "web".into(), "a".into(), address, 1))
    }

    /// A backend reached from one address, with so many connections begun.
    fn sourced(begun: u64) -> (Arc<BackendState>, Arc<CountedSource>) {
        let backend = backend("10.0.0.9:80");
        backend.start_from(&[SourceAddr::new("10.0.0.1".parse().unwrap())], 1);
        let way = backend.source_addrs.load().iter().next().cloned().unwrap();
        way.counts().unwrap().of(0).begun.add(begun);
        (backend, way)
    }

    fn look(watch: &mut PortWatch, backend: &Arc<BackendState>) -> Vec<String> {
        let mut look = PortLook::default();
        watch.sample(&mut look, std::iter::once(backend), LIMITS);
        let notices = watch.complete(look);
        notices.into_iter().map(|notice| notice.message).collect()
    }

    #[test]
    fn the_warning_comes_once_at_80_percent_and_again_after_it_was_below_70() {
        let (backend, way) = sourced(79);
        let counts = way.counts().unwrap().of(0);
        let mut watch = PortWatch::default();
        assert_eq!(look(&mut watch, &backend), Vec::<String>::new());
        counts.begun.add(1);
        let said = look(&mut watch, &backend);
        assert!(said[0].starts_with("local ports to 10.0.0.9:80 from 10.0.0.1 are"), "{said:?}");
        assert!(said[0].contains("80 of 100 in use"), "{said:?}");
        counts.ended.add(5);
        assert!(look(&mut watch, &backend).is_empty());
        counts.begun.add(10);
        assert!(look(&mut watch, &backend).is_empty(), "it never ended");
        counts.ended.add(30);
        assert!(look(&mut watch, &backend).is_empty());
        assert_eq!(watch.warnings(), 0);
        counts.begun.add(30);
        assert_eq!(look(&mut watch, &backend).len(), 1);
        assert!(watch.is_warned(backend.id, way.source()));
    }

    #[test]
    fn a_closed_connection_holds_its_port_for_a_minute() {
        let (backend, way) = sourced(10);
        let counts = way.counts().unwrap().of(0);
        let mut watch = PortWatch::default();
        counts.ended.add(10);
        counts.lingering.add(10);
        for _ in 0..LINGER_LOOKS {
            look(&mut watch, &backend);
            assert_eq!(watch.used(&backend, &way, LIMITS), 10);
        }
        look(&mut watch, &backend);
        assert_eq!(watch.used(&backend, &way, LIMITS), 0);
    }

    #[test]
    fn where_the_kernel_reuses_ports_only_open_connections_count() {
        let near = backend("127.0.0.1:80");
        near.counters.of(0).lingering.add(50);
        let way = near.source_addrs.load().iter().next().cloned().unwrap();
        let watch = PortWatch::default();
        assert_eq!(watch.used(&near, &way, LIMITS), 0);
        let never = PortLimits { reuse: Reuse::Never, ..LIMITS };
        assert_eq!(watch.used(&near, &way, never), 50);
    }

    #[test]
    fn many_warnings_at_once_are_cut_short() {
        let one = || Notice { pool: "p".into(), backend: None, message: String::new() };
        let cut = shortened((0..9).map(|_| one()).collect());
        assert_eq!(cut.len(), NOTICES_MAX + 1);
        assert!(cut[NOTICES_MAX].message.contains("4 more backends"));
    }
}
