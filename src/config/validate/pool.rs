//! `[pool.NAME]` with its ejection.
//!
//! Called by `validate` for each pool. `backends` and `discover` read its members. It never reads other sections; `cross` checks what
//! spans several sections.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use toml::de::DeValue;

use super::backends::{self, BackendsRead};
use super::discover::{self, KnownRegistries};
use super::probe::ProbedBackends;
use super::tiers::TierPlaces;
use super::{POOL_SOURCES_MAX, follow, frontend, heartbeat, probe, proxy_protocol, tiers};
use crate::defaults::Defaults;
use crate::file::{Field, NamedSection, Section};
use crate::value::{self, SLOW_FIRST_BYTE, SLOW_START, TIME, ValueError, shown};
use crate::{NamedFiles, Spot, address};
use tidegate_core::model::{
    BackendAddr, BackendConfig, Backups, DnsConfig, EjectionSpec, HASH_SLOTS, OnDown, OnRecover,
    OnRemoval, Policy, PoolConfig, ProbeTarget, SourceAddr, Tiers, ViewGuards, WhenNoneEligible,
    Words,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_ATTEMPTS: u8 = 3;
/// Most connect attempts per session. More attempts only delay the reset of a client
/// during an outage.
const CONNECT_ATTEMPTS_MAX: u8 = 16;
/// Most queued clients. Clients in a longer queue give up before they are served.
const QUEUE_MAX: u32 = 1_000_000;
const STARTUP_GRACE: Duration = Duration::from_secs(3);

const EJECTION_FAILURES: u32 = 5;
const EJECTION_FAILURES_MAX: u32 = 1_000;
const EJECTION_TIME: Duration = Duration::from_secs(10);
const EJECTED_PERCENT_MAX: u8 = 50;
const SLOW_FIRST_BYTE_DEFAULT: Duration = Duration::from_secs(1);

/// A pool with the places that checks across sections point at.
pub(super) struct PoolRead {
    pub(super) model: PoolConfig,
    /// Place of the name.
    pub(super) place: Range<usize>,
    /// Place of the name of the heartbeat table, if the pool has one.
    pub(super) heartbeat: Option<Range<usize>>,
    /// Place of `queue_timeout`, if it is given without `queue_max`.
    pub(super) queue_timeout: Option<Range<usize>>,
    /// Place of each address; as many as `model.backends`.
    pub(super) address_places: Vec<Range<usize>>,
    /// Place of each name; as many as `model.named`.
    pub(super) name_places: Vec<Range<usize>>,
    /// Place of `of`.
    pub(super) of: Option<Range<usize>>,
    /// Place of `role`.
    pub(super) role: Option<Range<usize>>,
    /// Place of `kind`, if the probe of the pool runs a command.
    pub(super) exec: Option<Range<usize>>,
    /// Places of the keys that need several tiers.
    pub(super) tier_places: TierPlaces,
    /// The registry that the pool names, even if it does not exist.
    pub(super) registry: Option<Arc<str>>,
}

pub(super) fn read<'r, 'a>(
    named: NamedSection<'r, 'a>,
    defaults: &'r Defaults<'r, 'a>,
    registries: KnownRegistries<'_>,
    files: NamedFiles<'_>,
) -> PoolRead {
    let NamedSection { name, place, section } = named;
    let section = section.with_defaults(&defaults.pool);
    let of = section.text("of", "the name of a pool", |text| Ok(Arc::<str>::from(text)));
    let role = section.choice("role");
    let (of_place, role_place) = (of.place(), role.place());
    let of = of.value();
    if let Some(of) = &of {
        follow::refuse_own(&section, of);
    }
    let balance = section.choice("balance").or(Policy::WeightedRoundRobin);
    let slots = hash_slots(&section, balance);
    let connect_timeout = section.duration("connect_timeout", "5s", TIME);
    let heartbeat_place = section.key_place("heartbeat");
    let heartbeat = heartbeat::of_pool(&section, name);
    let registered = heartbeat.as_ref().filter(|spec| spec.register).map(|spec| spec.backends_max);
    let discover = discover::of_pool(&section, name, registries, files);
    let may_be_empty =
        of.is_some() || registered.is_some() || section.key_place("discover").is_some();
    let BackendsRead { backends, address_places, named, name_places } =
        backends::read(&section, name, may_be_empty);
    let (discover, registry) = discover.map_or((None, None), |read| (read.spec, read.registry));
    let most = MemberCounts {
        listed: backends.len(),
        named: named.len(),
        registered,
        discovered: discover.as_ref().map(|spec| spec.guards.backends_max),
    };
    let hash_slots = enough_slots(&section, balance, slots, &most);
    let source = sources(&section);
    let header = proxy_protocol::of_pool(&section).map(Arc::new);
    let version = header.as_ref().map(|header| header.version);
    let of_pool = ProbeTarget {
        source: Arc::clone(&source),
        header_version: version,
        ..ProbeTarget::default()
    };
    let probed = ProbedBackends { target: of_pool, all_unix: most.are_unix(&backends) };
    let probe = probe::read(&section, &defaults.probe, name, probed, files);
    let (probe, exec) = probe.map_or((None, None), |read| (Some(read.spec), read.exec));
    let attempts = section.integer("connect_attempts", 1..=CONNECT_ATTEMPTS_MAX);
    let connect_time = connect_timeout.or(CONNECT_TIMEOUT);
    let queue_max = section.integer("queue_max", 0..=QUEUE_MAX).or(0);
    let when_none_eligible = when_none_eligible(&section, queue_max);
    let mut model = PoolConfig {
        name: name.into(),
        of,
        role: role.value(),
        balance,
        hash_slots,
        source,
        connect_timeout: connect_time,
        queue_max,
        queue_timeout: Duration::ZERO,
        connect_attempts: attempts.or(CONNECT_ATTEMPTS),
        when_none_eligible,
        backups: section.choice("backups").or(Backups::All),
        startup_grace: section.duration("startup_grace", "5s", TIME).or(STARTUP_GRACE),
        on_removal: section.text("on_removal", "a string", value::on_removal).or(OnRemoval::Keep),
        on_down: section.text("on_down", "a string", value::on_down).or(OnDown::Keep),
        tiers: Tiers::Strict,
        on_recover: OnRecover::Keep,
        proxy_protocol: header,
        probe: probe.map(Arc::new),
        ejection: ejection(&section, name),
        heartbeat: heartbeat.map(Arc::new),
        slow_start: section.timer("slow_start", "10s", SLOW_START).or(None),
        discover: discover.map(Arc::new),
        backends,
        named,
    };
    let queue_timeout = section.duration("queue_timeout", "5s", TIME);
    model.queue_timeout = queue_timeout.or(model.default_queue_timeout());
    let tier_places = tiers::of_pool(&section, &mut model);
    warn_of_idle_keys(&section, &model);
    let without_max = section.key_place("queue_max").is_none();
    let queue_timeout = section.key_place("queue_timeout").filter(|_| without_max);
    section.finish();
    let heartbeat = heartbeat_place;
    PoolRead {
        model,
        place,
        heartbeat,
        queue_timeout,
        address_places,
        name_places,
        of: of_place,
        role: role_place,
        tier_places,
        exec,
        registry,
    }
}

/// Reads what happens while no backend is eligible. Clients wait in the queue only.
fn when_none_eligible(pool: &Section<'_, '_>, queue_max: u32) -> WhenNoneEligible {
    let read = pool.choice("when_none_eligible");
    let place = read.place();
    let rule = read.or(WhenNoneEligible::Refuse);
    if rule == WhenNoneEligible::Wait
        && queue_max == 0
        && let Some(place) = place
    {
        let message = "when_none_eligible = \"wait\" needs a queue, and queue_max is 0";
        let help = "write queue_max = 1000, or the most clients that may wait";
        pool.report.error(place, ValueError::new(message).help(help));
    }
    rule
}

/// Reads the size of the table of `source-hash`.
fn hash_slots(pool: &Section<'_, '_>, balance: Policy) -> Field<u32> {
    let slots = pool.integer("hash_slots", value::HASH_SLOTS);
    let Field::Good(given) = &slots else { return slots };
    if let Err(complaint) = value::prime(*given.get_ref()) {
        pool.report.error(given.span(), complaint);
        return Field::Bad;
    }
    if balance != Policy::SourceHash {
        let message = format!("hash_slots has no effect with balance = \"{}\"", balance.word());
        pool.report.warning(given.span(), ValueError::new(message));
    }
    slots
}

/// The most members that a pool can have, by their origin.
struct MemberCounts {
    listed: usize,
    named: usize,
    /// `backends_max` of the heartbeats.
    registered: Option<u32>,
    /// `backends_max` of the source.
    discovered: Option<u32>,
}

impl MemberCounts {
    fn total(&self) -> usize {
        let per_name = ViewGuards::of_name(&DnsConfig::default()).backends_max as usize;
        let others = self.registered.unwrap_or(0) as usize + self.discovered.unwrap_or(0) as usize;
        self.listed + self.named.saturating_mul(per_name) + others
    }

    /// Whether all are Unix sockets that the file lists.
    fn are_unix(&self, listed: &[BackendConfig]) -> bool {
        let is_unix = |backend: &BackendConfig| matches!(backend.address, BackendAddr::Unix(_));
        self.listed > 0 && self.total() == self.listed && listed.iter().all(is_unix)
    }

    /// Returns where they are counted, for a message.
    fn origins(&self) -> &'static str {
        let by_key = self.registered.is_some() || self.discovered.is_some();
        match (self.named > 0, by_key) {
            (false, false) => "",
            (false, true) => " in this file and in backends_max",
            (true, false) => " (up to 1000 for each name)",
            (true, true) => " in backends_max and up to 1000 for each name",
        }
    }
}

/// Reports a hash table with fewer slots than backends, including the backends that may
/// join. A backend without a slot is never picked.
fn enough_slots(
    pool: &Section<'_, '_>,
    balance: Policy,
    slots: Field<u32>,
    counts: &MemberCounts,
) -> u32 {
    let place = slots.place().unwrap_or_else(|| pool.header.clone());
    let known = !slots.is_bad();
    let slots = slots.or(HASH_SLOTS);
    let most = counts.total();
    if known && balance == Policy::SourceHash && most > slots as usize {
        let origins = counts.origins();
        let message = format!("{most} backends{origins} are more than hash_slots ({slots})");
        let help = "write a prime of at least 100 for each backend, such as hash_slots = ";
        let enough = most.saturating_mul(100).min(*value::HASH_SLOTS.end() as usize);
        let enough = value::prime_from(u32::try_from(enough).unwrap_or(slots));
        pool.report.error(place, ValueError::new(message).help(format!("{help}{enough}")));
    }
    slots
}

/// Warns of keys that have no effect without another key, and of source addresses of a
/// family that no backend has.
fn warn_of_idle_keys(pool: &Section<'_, '_>, model: &PoolConfig) {
    let idle = |key: &str, why: String| {
        if let Some(place) = pool.key_place(key) {
            let message = format!("{key} has no effect: {why}");
            pool.report.warning(place, ValueError::new(message));
        }
    };
    if model.probe.is_none() && model.heartbeat.is_none() && model.of.is_none() {
        let none = || "the pool has neither probes nor heartbeats".to_owned();
        idle("startup_grace", none());
        if model.on_down != OnDown::Keep {
            idle("on_down", none());
        }
    }
    if others_join(model) || model.backends.is_empty() {
        return;
    }
    if model.backups == Backups::One && !model.backends.iter().any(|backend| backend.tier > 0) {
        idle("backups", "the pool has no backups".to_owned());
    }
    for v4 in [true, false] {
        let is_of = |backend: &BackendConfig| match backend.address {
            BackendAddr::Tcp(address) | BackendAddr::ClientPort(address, _) => {
                address.is_ipv4() == v4
            }
            BackendAddr::Unix(_) => false,
        };
        let source = model.source.iter().find(|source| source.ip().is_ipv4() == v4);
        if let Some(source) = source.filter(|_| !model.backends.iter().any(is_of)) {
            let family = if v4 { "IPv4" } else { "IPv6" };
            idle("source", format!("{source} needs a backend with an {family} address"));
        }
    }
}

/// Whether heartbeats, names or a source can bring members.
pub(super) fn others_join(model: &PoolConfig) -> bool {
    let registers = model.heartbeat.as_ref().is_some_and(|spec| spec.register);
    registers || model.discover.is_some() || !model.named.is_empty()
}

/// Reads the source addresses.
pub(super) fn sources(pool: &Section<'_, '_>) -> Arc<[SourceAddr]> {
    let wants = (
        "an address such as \"10.0.0.5\", or a list of addresses",
        "addresses such as \"10.0.0.5\"",
    );
    let read = frontend::any_number(pool, "source", wants, address::source_address);
    let mut sources: Vec<SourceAddr> = Vec::with_capacity(read.len());
    for one in &read {
        if sources.contains(one.get_ref()) {
            let message = format!("source {} is given twice", one.get_ref());
            pool.report.error(one.span(), ValueError::new(message));
        } else if sources.len() == POOL_SOURCES_MAX {
            let message = format!("a pool has at most {POOL_SOURCES_MAX} sources");
            pool.report.error(one.span(), ValueError::new(message));
            break;
        }
        pool.report.keep(Spot::Source(*one.get_ref()), Some(one.span()));
        sources.push(*one.get_ref());
    }
    sources.into()
}

fn ejection(pool: &Section<'_, '_>, name: &str) -> Option<EjectionSpec> {
    let label = format!("[pool.{}.ejection]", value::cut(name));
    match pool.node("ejection").map(|node| (node, node.get_ref())) {
        Some((_, DeValue::String(word))) if word == "off" => return None,
        Some((node, DeValue::String(word))) => {
            let complaint = ValueError::new(format!("{} is not a known value", shown(word)));
            let help = format!("write ejection = \"off\", or a table {label}");
            pool.report.error(node.span(), complaint.named("ejection").help(help));
            return None;
        }
        Some((node, value)) if !value.is_table() => {
            let _: Field<()> = pool.wrong_type("ejection", node, "a table or \"off\"");
            return None;
        }
        _ => {}
    }
    let section = pool.table_or_empty("ejection", label);
    let spec = EjectionSpec {
        failures: section.integer("failures", 1..=EJECTION_FAILURES_MAX).or(EJECTION_FAILURES),
        time: section.duration("time", "5s", TIME).or(EJECTION_TIME),
        max_ejected_percent: section
            .text("max_ejected", "a share such as \"50%\"", value::percent)
            .or(EJECTED_PERCENT_MAX),
        early_resets: section.boolean("early_resets").or(true),
        slow_first_byte: section
            .timer("slow_first_byte", "1s", SLOW_FIRST_BYTE)
            .or(Some(SLOW_FIRST_BYTE_DEFAULT)),
    };
    section.finish();
    Some(spec)
}
