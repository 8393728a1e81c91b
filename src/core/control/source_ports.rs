//! Local ports in use per backend and source address, and warnings before they run out.
//!
//! Called by `daemon`, which passes in the kernel's limits and logs the warnings. The admin
//! API shows them. This code does no I/O. The numbers are estimates: they include
//! connections of this process only, and closed connections only if Tidegate closed first.

use super::{Notice, NoticeFields, NoticeLevel};
use crate::model::{BackendAddr, SourceAddr};
use crate::table::source_addrs::CountedSource;
use crate::table::state::{BackendId, BackendState};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Time between two checks.
pub const LOOK: Duration = Duration::from_secs(2);

/// Checks for which a closed connection holds its port: TIME_WAIT lasts 60 s in Linux
/// (`TCP_TIMEWAIT_LEN`).
const LINGER_LOOKS: usize = 30;

/// Share of used ports at which a warning begins and ends.
const WARN_PERCENT: u64 = 80;
const CLEAR_PERCENT: u64 = 70;

/// Most warnings per check. One line counts the others.
const NOTICES_MAX: usize = 5;

/// What the operator can do.
const HELP: &str = "add addresses to the source of the pool, or widen net.ipv4.ip_local_port_range";

/// Limits of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortLimits {
    /// Local ports for each pair of a source address and a backend.
    pub ports: u32,
    /// Connections for which the kernel reuses a port in TIME_WAIT after 1 s.
    pub reuse: Reuse,
}

/// `net.ipv4.tcp_tw_reuse`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// No connections.
    Never,
    /// Connections within this host; the kernel's default.
    Loopback,
    /// All connections.
    Always,
}

/// A backend and one of its source addresses.
type PortKey = (BackendId, Option<SourceAddr>);

/// Results of the checks so far.
#[derive(Debug, Clone, Default)]
pub struct PortWatch {
    /// Connections that had entered TIME_WAIT at the last checks, oldest first. Holds no
    /// empty entries. Shared by clones, because each scrape clones the value.
    lingered: HashMap<PortKey, Arc<VecDeque<u64>>>,
    warned: HashSet<PortKey>,
}

/// A running check.
#[derive(Debug, Default)]
pub struct PortLook {
    /// The last backend checked.
    after: Option<BackendId>,
    seen: HashSet<PortKey>,
    high: HashSet<PortKey>,
    news: Vec<Notice>,
}

// === impl PortLook ===

impl PortLook {
    /// Returns the last backend checked.
    pub fn after(&self) -> Option<BackendId> {
        self.after
    }
}

// === impl PortWatch ===

impl PortWatch {
    /// Checks some backends.
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
            for source in backend.source_addrs.load().iter() {
                let key = (backend.id, source.source());
                self.remember(key, ports_in_time_wait(backend, source), &mut look.seen);
                let used = self.used(backend, source, limits);
                let percent = used * 100 / u64::from(limits.ports.max(1));
                let was_high = self.warned.contains(&key);
                if percent >= WARN_PERCENT && !was_high {
                    look.news.push(notice(backend, source, used, limits));
                }
                if percent >= WARN_PERCENT || was_high && percent > CLEAR_PERCENT {
                    look.high.insert(key);
                }
            }
        }
    }

    /// Completes a check of all backends. Returns a notice per backend that has reached
    /// 80 % of the ports since the last check.
    pub fn complete(&mut self, look: PortLook) -> Vec<Notice> {
        self.lingered.retain(|key, _| look.seen.contains(key));
        self.warned = look.high;
        shortened(look.news)
    }

    /// Returns the ports in use from one source address to a backend: open connections, and
    /// closed ones in TIME_WAIT if the kernel does not reuse their ports.
    pub fn used(&self, backend: &BackendState, source: &CountedSource, limits: PortLimits) -> u64 {
        let open = match source.counts() {
            Some(counts) => {
                // `ended` first: `begun` can only increase between the reads.
                let ended = counts.sum(|c| c.ended.get());
                counts.sum(|c| c.begun.get()).saturating_sub(ended)
            }
            None => backend.in_flight.get().into(),
        };
        if reuses(backend, limits.reuse) {
            return open;
        }
        let past = self.lingered.get(&(backend.id, source.source()));
        let full = past.filter(|past| past.len() > LINGER_LOOKS);
        let gone = full.and_then(|past| past.front()).copied().unwrap_or(0);
        open + ports_in_time_wait(backend, source).saturating_sub(gone)
    }

    /// Returns the number of warnings in effect.
    pub fn warnings(&self) -> usize {
        self.warned.len()
    }

    /// Whether the backend has few ports left from this source address.
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

/// Whether connections to the backend need a local port.
pub fn has_ports(backend: &BackendState) -> bool {
    !matches!(backend.address, BackendAddr::Unix(_))
}

/// Returns the warning as text, for `status`.
pub fn warning_text(
    backend: &BackendState,
    source: &CountedSource,
    used: u64,
    limits: PortLimits,
) -> String {
    let from = source.source().map_or_else(String::new, |source| format!(" from {source}"));
    format!(
        "local ports to {}{from} are nearly exhausted: {used} of {} in use; add addresses to \
         [pool.{}] source or widen net.ipv4.ip_local_port_range",
        backend.address_text, limits.ports, backend.pool
    )
}

fn notice(backend: &BackendState, source: &CountedSource, used: u64, limits: PortLimits) -> Notice {
    Notice {
        level: NoticeLevel::Warn,
        pool: Arc::clone(&backend.pool),
        backend: Some(Arc::clone(&backend.name)),
        message: "local ports nearly exhausted",
        fields: NoticeFields {
            address: Some(backend.address_text.to_string()),
            source: source.source().map(|source| source.to_string()),
            used: Some(used),
            limit: Some(limits.ports.into()),
            help: HELP,
            ..NoticeFields::default()
        },
    }
}

fn shortened(mut notices: Vec<Notice>) -> Vec<Notice> {
    let more = notices.len().saturating_sub(NOTICES_MAX);
    if more > 0 {
        notices.truncate(NOTICES_MAX);
        let message = "local ports of further backends nearly exhausted";
        let fields =
            NoticeFields { suppressed: Some(more as u64), help: HELP, ..NoticeFields::default() };
        notices.push(Notice {
            level: NoticeLevel::Warn,
            pool: "".into(),
            backend: None,
            message,
            fields,
        });
    }
    notices
}

/// Returns the number of connections so far whose port entered TIME_WAIT.
fn ports_in_time_wait(backend: &BackendState, source: &CountedSource) -> u64 {
    match source.counts() {
        Some(counts) => counts.sum(|c| c.lingering.get()),
        None => backend.counters.sum(|c| c.lingering.get()),
    }
}

fn reuses(backend: &BackendState, reuse: Reuse) -> bool {
    match (&backend.address, reuse) {
        (_, Reuse::Always) => true,
        (BackendAddr::Tcp(to) | BackendAddr::ClientPort(to, _), Reuse::Loopback) => {
            to.ip().is_loopback()
        }
        _ => false,
    }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;

    const LIMITS: PortLimits = PortLimits { ports: 100, reuse: Reuse::Loopback };

    fn backend(address: &str) -> Arc<BackendState> {
        let address = BackendAddr::Tcp(address.parse().unwrap());
        Arc::new(BackendState::new(BackendId(1), "web".into(), "a".into(), address, 1))
    }

    /// Returns a backend with one source address and `begun` connections.
    fn sourced(begun: u64) -> (Arc<BackendState>, Arc<CountedSource>) {
        let backend = backend("10.0.0.9:80");
        backend.start_from(&[SourceAddr::new("10.0.0.1".parse().unwrap())], 1);
        let source = backend.source_addrs.load().iter().next().cloned().unwrap();
        source.counts().unwrap().of(0).begun.add(begun);
        (backend, source)
    }

    fn look(watch: &mut PortWatch, backend: &Arc<BackendState>) -> Vec<NoticeFields> {
        let mut look = PortLook::default();
        watch.sample(&mut look, std::iter::once(backend), LIMITS);
        let notices = watch.complete(look);
        notices.into_iter().map(|notice| notice.fields).collect()
    }

    #[test]
    fn warning_is_due_once_at_80_percent_and_again_after_below_70() {
        let (backend, source) = sourced(79);
        let counts = source.counts().unwrap().of(0);
        let mut watch = PortWatch::default();
        assert_eq!(look(&mut watch, &backend), []);
        counts.begun.add(1);
        let fields = look(&mut watch, &backend).remove(0);
        assert_eq!(fields.address.as_deref(), Some("10.0.0.9:80"));
        assert_eq!(fields.source.as_deref(), Some("10.0.0.1"));
        assert_eq!((fields.used, fields.limit), (Some(80), Some(100)));
        counts.ended.add(5);
        assert!(look(&mut watch, &backend).is_empty());
        counts.begun.add(10);
        assert!(look(&mut watch, &backend).is_empty(), "the warning is still in effect");
        counts.ended.add(30);
        assert!(look(&mut watch, &backend).is_empty());
        assert_eq!(watch.warnings(), 0);
        counts.begun.add(30);
        assert_eq!(look(&mut watch, &backend).len(), 1);
        assert!(watch.is_warned(backend.id, source.source()));
    }

    #[test]
    fn closed_connection_holds_its_port_for_a_minute() {
        let (backend, source) = sourced(10);
        let counts = source.counts().unwrap().of(0);
        let mut watch = PortWatch::default();
        counts.ended.add(10);
        counts.lingering.add(10);
        for _ in 0..LINGER_LOOKS {
            look(&mut watch, &backend);
            assert_eq!(watch.used(&backend, &source, LIMITS), 10);
        }
        look(&mut watch, &backend);
        assert_eq!(watch.used(&backend, &source, LIMITS), 0);
    }

    #[test]
    fn only_open_connections_count_if_the_kernel_reuses_ports() {
        let near = backend("127.0.0.1:80");
        near.counters.of(0).lingering.add(50);
        let source = near.source_addrs.load().iter().next().cloned().unwrap();
        let watch = PortWatch::default();
        assert_eq!(watch.used(&near, &source, LIMITS), 0);
        let never = PortLimits { reuse: Reuse::Never, ..LIMITS };
        assert_eq!(watch.used(&near, &source, never), 50);
    }

    #[test]
    fn warnings_beyond_the_bound_are_counted_in_one_line() {
        let fields = NoticeFields::default();
        let one = Notice {
            level: NoticeLevel::Warn,
            pool: "p".into(),
            backend: None,
            message: "full",
            fields,
        };
        let cut = shortened(vec![one; 9]);
        assert_eq!(cut.len(), NOTICES_MAX + 1);
        assert_eq!(cut[NOTICES_MAX].fields.suppressed, Some(4));
    }
}
