//! The one resolver of the process: it turns names into addresses and services.
//!
//! The DNS source asks it for members, the HTTP client for the addresses of registries. It
//! never changes a pool and never removes an address: the views of `core::discovery` do.
//! Callers must be on a tokio runtime.

mod addresses;
mod cache;
mod counters;
mod due;
mod exchange;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hosts;
mod lookup;
mod resolv_conf;
mod system;
#[cfg(test)]
pub(crate) mod tests;
mod wire;

pub(crate) use addresses::{AddressAnswer, AddressOutcome, AnswerDates, PartialAnswer};
use cache::{AnswerCache, PendingAnswer, RecordAnswer, RecordOutcome};
pub use counters::{QuestionResult, ResolverCounters};
use due::DueQuestion;
use lookup::ServerUse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
pub use system::ResolverFiles;
use system::{HostSettings, WatchedFiles};
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::{DnsConfig, NameFamily};
use tidegate_net::clock;
use tokio::sync::watch;
pub(crate) use wire::{DnsName, ServiceRecord};
use wire::{RecordKind, RecordQuestion, RecordSet};

/// Time after which a name is looked up again that no server was asked for.
const LOCAL_AGAIN: Duration = Duration::from_secs(5);

/// Time after which the last known addresses of a registry are used (RFC 8767).
const USE_KNOWN_AFTER: Duration = Duration::from_secs(1);

/// Resolves names. Clones share one cache.
#[derive(Debug, Clone)]
pub struct Resolver(Arc<ResolverState>);

/// Why a name has no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct ResolveFailure {
    /// The kind of failure. `NotFound`: the name does not exist or has no addresses.
    pub why: SourceFailure,
    /// The name, the servers and what they answered.
    pub detail: String,
}

#[derive(Debug)]
struct ResolverState {
    /// Changes of the settings wake the sources.
    config: watch::Sender<Arc<DnsConfig>>,
    files: Mutex<WatchedFiles>,
    cache: Mutex<AnswerCache>,
    /// Questions that no task asks yet.
    due: Mutex<Vec<DueQuestion>>,
    servers: ServerUse,
    counters: ResolverCounters,
}

/// Addresses on their way.
pub(crate) struct PendingAddresses {
    /// Addresses that no server must be asked for.
    local: Option<AddressAnswer>,
    asked: Vec<PendingAnswer>,
}

/// What is known about the services of a name.
pub(crate) struct ServiceAnswer {
    pub(crate) outcome: ServiceOutcome,
    pub(crate) dates: AnswerDates,
}

/// How the question about the services of a name ended.
pub(crate) enum ServiceOutcome {
    /// At least one record.
    Services(ServiceSet),
    /// The name does not exist.
    NoName,
    /// No server answered, or the name has no services.
    Failed(ResolveFailure),
}

/// The SRV records of a name, with the addresses that came with them.
pub(crate) struct ServiceSet {
    records: Arc<RecordSet>,
    answer: Arc<RecordAnswer>,
    additional: HashMap<(DnsName, RecordKind), Vec<IpAddr>>,
}

// === impl Resolver ===

impl Resolver {
    /// Creates a resolver with an empty cache and the files of the system. It asks nothing
    /// yet and needs no runtime.
    pub fn new(config: DnsConfig) -> Resolver {
        Resolver::with_files(config, ResolverFiles::default())
    }

    /// Creates a resolver that reads other files than those of the system.
    pub fn with_files(config: DnsConfig, files: ResolverFiles) -> Resolver {
        Resolver(Arc::new(ResolverState {
            config: watch::Sender::new(Arc::new(config)),
            files: Mutex::new(WatchedFiles::new(files)),
            cache: Mutex::default(),
            due: Mutex::default(),
            servers: ServerUse::default(),
            counters: ResolverCounters::default(),
        }))
    }

    /// Uses other settings from now on. If they differ, every name is asked again.
    pub fn configure(&self, config: DnsConfig) {
        let differs = **self.0.config.borrow() != config;
        if differs {
            self.cache().expire(clock::now());
            self.0.config.send_replace(Arc::new(config));
        }
    }

    /// Asks for each name again when it is needed next.
    pub fn expire(&self) {
        self.cache().expire(clock::now());
    }

    /// The counters.
    pub fn counters(&self) -> &ResolverCounters {
        &self.0.counters
    }

    /// Questions in the cache, answered or not.
    pub fn cached(&self) -> usize {
        self.cache().len()
    }

    /// Returns the addresses of a name, at least one, IPv4 first. An IP address resolves to
    /// itself. If no server answers within 1 s, the last known addresses count.
    ///
    /// # Errors
    /// The name has no address, or no server answered and none is known.
    pub async fn host(&self, name: &str) -> Result<Vec<IpAddr>, ResolveFailure> {
        let why = SourceFailure::NotFound;
        let last = self.last_known(name);
        let limit = if last.is_empty() { Duration::MAX } else { USE_KNOWN_AFTER };
        let asked = self.addresses(name, NameFamily::Both, None);
        let Ok(answer) = tokio::time::timeout(limit, asked).await else { return Ok(last) };
        match answer.outcome {
            AddressOutcome::Whole(addresses) => Ok(addresses),
            AddressOutcome::Part(PartialAnswer { fresh, kept, failure, .. }) => {
                let known = [fresh, kept].concat();
                if known.is_empty() { Err(failure) } else { Ok(known) }
            }
            AddressOutcome::NoName => Err(ResolveFailure { why, detail: no_such_name(name) }),
            AddressOutcome::Nothing => {
                Err(ResolveFailure { why, detail: no_records(name, "address") })
            }
        }
    }

    /// Waits for other settings.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<DnsConfig>> {
        self.0.config.subscribe()
    }

    /// Resolves a name with the search domains of the host. Answers from before
    /// `newer_than` do not count.
    pub(crate) async fn addresses(
        &self,
        name: &str,
        family: NameFamily,
        newer_than: Option<Instant>,
    ) -> AddressAnswer {
        let now = clock::now();
        if let Some(known) = self.without_dns(name, family, now) {
            return known;
        }
        let candidates = match self.candidates(name) {
            Ok(candidates) => candidates,
            Err(failure) => return AddressAnswer::failed(failure, now, now + LOCAL_AGAIN),
        };
        let mut without = Vec::new();
        for candidate in candidates {
            let asked = self.start_addresses(&candidate, family, newer_than, None);
            let answer = asked.answer().await;
            match answer.outcome {
                // A failure ends the search: the next domain can have another host of that name.
                AddressOutcome::Whole(_) | AddressOutcome::Part(_) => return answer,
                AddressOutcome::Nothing | AddressOutcome::NoName => without.push(answer),
            }
        }
        AddressAnswer::without_records(&without, now)
    }

    /// Asks for SRV records, with the search domains of the host.
    pub(crate) async fn services(&self, name: &str, newer_than: Option<Instant>) -> ServiceAnswer {
        let now = clock::now();
        let failed =
            |failure, dates| ServiceAnswer { outcome: ServiceOutcome::Failed(failure), dates };
        let candidates = match self.candidates(name) {
            Ok(candidates) => candidates,
            Err(failure) => return failed(failure, AnswerDates::local(now, now + LOCAL_AGAIN)),
        };
        let mut answers = Vec::new();
        for name in candidates {
            let question = RecordQuestion { name, kind: RecordKind::Srv };
            let mut asked = Vec::new();
            let pending = self.find(question, newer_than, &mut asked);
            self.start(asked);
            let answer = pending.answer().await;
            let dates = AnswerDates::of(std::slice::from_ref(&answer), now);
            match &answer.outcome {
                RecordOutcome::Records(records) => {
                    let set = ServiceSet::new(Arc::clone(records), Arc::clone(&answer));
                    return ServiceAnswer { outcome: ServiceOutcome::Services(set), dates };
                }
                RecordOutcome::Failed(failure) => return failed(failure.clone(), dates),
                RecordOutcome::Nothing | RecordOutcome::NoName => answers.push(answer),
            }
        }
        let dates = AnswerDates::of(&answers, now);
        let exists = answers.iter().any(|a| matches!(a.outcome, RecordOutcome::Nothing));
        match exists {
            true => {
                let detail = no_records(name, "SRV record");
                failed(ResolveFailure { why: SourceFailure::NotFound, detail }, dates)
            }
            false => ServiceAnswer { outcome: ServiceOutcome::NoName, dates },
        }
    }

    /// Begins to resolve the target of a service. The additional records of the answer are
    /// used; a family that they do not have is asked, because a server leaves out what does
    /// not fit.
    pub(crate) fn start_target(
        &self,
        target: &DnsName,
        family: NameFamily,
        newer_than: Option<Instant>,
        services: &ServiceSet,
    ) -> PendingAddresses {
        match self.without_dns(target.as_str(), family, clock::now()) {
            Some(known) => PendingAddresses { local: Some(known), asked: Vec::new() },
            None => self.start_addresses(target, family, newer_than, Some(services)),
        }
    }

    fn start_addresses(
        &self,
        name: &DnsName,
        family: NameFamily,
        newer_than: Option<Instant>,
        services: Option<&ServiceSet>,
    ) -> PendingAddresses {
        let kinds: &[RecordKind] = match family {
            NameFamily::Both => &[RecordKind::A, RecordKind::Aaaa],
            NameFamily::Ipv4 => &[RecordKind::A],
            NameFamily::Ipv6 => &[RecordKind::Aaaa],
        };
        let mut asked = Vec::new();
        let pending = |kind: &RecordKind| {
            let additional = services.and_then(|services| services.additional(name, *kind));
            additional.map_or_else(
                || {
                    self.find(
                        RecordQuestion { name: name.clone(), kind: *kind },
                        newer_than,
                        &mut asked,
                    )
                },
                PendingAnswer::Known,
            )
        };
        let pending = kinds.iter().map(pending).collect();
        self.start(asked);
        PendingAddresses { local: None, asked: pending }
    }

    /// Returns the answer of the cache, or joins the question that is on its way, or adds the
    /// question to those that must be asked.
    fn find(
        &self,
        question: RecordQuestion,
        newer_than: Option<Instant>,
        to_ask: &mut Vec<DueQuestion>,
    ) -> PendingAnswer {
        let ttl_max = self.0.config.borrow().ttl_max;
        let (pending, slot) = self.cache().find(&question, newer_than, clock::now(), ttl_max);
        to_ask.extend(slot.map(|slot| DueQuestion { question, slot }));
        pending
    }

    /// Resolves an IP address and a name of `/etc/hosts`.
    fn without_dns(&self, name: &str, family: NameFamily, now: Instant) -> Option<AddressAnswer> {
        let of_family = |address: &IpAddr| match family {
            NameFamily::Both => true,
            NameFamily::Ipv4 => address.is_ipv4(),
            NameFamily::Ipv6 => address.is_ipv6(),
        };
        if let Ok(address) = name.parse::<IpAddr>() {
            let until = now + self.0.config.borrow().ttl_max;
            return Some(AddressAnswer::local(vec![address], now, until));
        }
        let hosts = self.settings(now).hosts;
        let found: Vec<IpAddr> = hosts.addresses(name).iter().copied().filter(of_family).collect();
        (!found.is_empty()).then(|| AddressAnswer::local(found, now, now + LOCAL_AGAIN))
    }

    /// Returns the absolute names that `name` can mean, in the order of resolv.conf(5).
    fn candidates(&self, name: &str) -> Result<Vec<DnsName>, ResolveFailure> {
        let why = SourceFailure::NotFound;
        let own = DnsName::parse(name).map_err(|detail| ResolveFailure { why, detail })?;
        if name.ends_with('.') {
            return Ok(vec![own]);
        }
        let conf = self.settings(clock::now()).resolv_conf;
        // A name that a domain makes too long cannot exist there.
        let join = |domain: &DnsName| DnsName::parse(&format!("{own}.{domain}")).ok();
        let mut names: Vec<DnsName> = conf.search.iter().filter_map(join).collect();
        let dots = name.bytes().filter(|byte| *byte == b'.').count();
        let place = if dots >= conf.ndots { 0 } else { names.len() };
        names.insert(place, own);
        Ok(names)
    }

    /// Returns the addresses of the last answer about a name.
    fn last_known(&self, name: &str) -> Vec<IpAddr> {
        let candidates = self.candidates(name).unwrap_or_default();
        let cache = self.cache();
        let of_name = |name: DnsName| {
            [RecordKind::A, RecordKind::Aaaa]
                .iter()
                .flat_map(|kind| cache.known(&RecordQuestion { name: name.clone(), kind: *kind }))
                .collect::<Vec<IpAddr>>()
        };
        candidates.into_iter().map(of_name).find(|known| !known.is_empty()).unwrap_or_default()
    }

    fn settings(&self, now: Instant) -> HostSettings {
        self.0.files.lock().unwrap_or_else(PoisonError::into_inner).settings(now)
    }

    fn cache(&self) -> MutexGuard<'_, AnswerCache> {
        self.0.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl PendingAddresses ===

impl PendingAddresses {
    /// Waits for the answers of all address families.
    pub(crate) async fn answer(self) -> AddressAnswer {
        if let Some(local) = self.local {
            return local;
        }
        let mut answers = Vec::with_capacity(self.asked.len());
        for pending in self.asked {
            answers.push(pending.answer().await);
        }
        AddressAnswer::combine(&answers, clock::now())
    }
}

// === impl ServiceSet ===

impl ServiceSet {
    fn new(records: Arc<RecordSet>, answer: Arc<RecordAnswer>) -> ServiceSet {
        let mut additional: HashMap<_, Vec<IpAddr>> = HashMap::new();
        for (name, address) in &records.additional {
            let kind = if address.is_ipv4() { RecordKind::A } else { RecordKind::Aaaa };
            additional.entry((name.clone(), kind)).or_default().push(*address);
        }
        ServiceSet { records, answer, additional }
    }

    /// The records, in the order of the answer.
    pub(crate) fn services(&self) -> &[ServiceRecord] {
        &self.records.services
    }

    /// SRV records that cannot be used.
    pub(crate) fn unusable(&self) -> u32 {
        self.records.unusable
    }

    fn additional(&self, name: &DnsName, kind: RecordKind) -> Option<Arc<RecordAnswer>> {
        let mut addresses = self.additional.get(&(name.clone(), kind))?.clone();
        addresses.sort_unstable();
        addresses.dedup();
        let set = Arc::new(RecordSet { addresses, ..RecordSet::default() });
        let known = Some(Arc::clone(&set));
        let (asked, until) = (self.answer.asked, self.answer.until);
        let outcome = RecordOutcome::Records(set);
        Some(Arc::new(RecordAnswer { outcome, asked, until, known }))
    }
}

/// The text for a name that does not exist.
fn no_such_name(name: &str) -> String {
    format!("{name} does not exist in DNS (NXDOMAIN)")
}

/// The text for a name without records of a type.
pub(crate) fn no_records(name: &str, record: &str) -> String {
    format!("{name} exists in DNS but has no {record} (NOERROR without records)")
}
