//! The guards of `[pool.NAME.discover]`: what an answer of a source may change.
//!
//! Called by `discover`; the writer uses the defaults. It asks no source.

use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use toml::Spanned;
use toml::de::DeValue;

use super::frontend::any_number;
use super::sources::range;
use crate::file::{Field, Section};
use crate::value::{self, ValueError};
use tidegate_core::model::{
    AnnouncedWeights, CriticalRule, EmptyAnswer, RegistryKind, RegistryQuery, SourceQuestion,
    ViewGuards, WEIGHT_MAX,
};

/// Most members of one source.
const MEMBERS_MAX: u32 = 10_000;

/// Default of `backends_max`.
const BACKENDS_OF_SOURCE: u32 = 1000;

/// Most ranges. Each announced address is compared with them.
const RANGES_MAX: usize = 64;

/// `missing`. With more, members that are gone would stay for hours.
const MISSING: RangeInclusive<u32> = 1..=100;

/// `confirm_after`. Two answers within a second can have the same cause.
const CONFIRM: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// `overlap` and `first_wait`, if not zero.
pub(super) const WAIT: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(3600);

/// `stale_for`. Sources check their connection at least every 10 s.
const STALE: RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(30 * 24 * 3600);

/// Ranges of private networks (RFC 1918, RFC 6598, RFC 4193), sorted.
const PRIVATE: [&str; 5] =
    ["10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"];

/// What a `discover` table asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AskedKind {
    File,
    Http,
    Dns,
    Registry(RegistryKind),
}

/// Returns the guards of a table without their keys.
pub(crate) fn defaults(asked: AskedKind) -> ViewGuards {
    use RegistryKind::{Consul, Etcd, Kubernetes, Zookeeper};
    ViewGuards {
        // These have a single truth, so an empty answer is likely a decision. The others can
        // be empty for a moment while a leader changes or a document is written.
        empty: match asked {
            AskedKind::File | AskedKind::Registry(Etcd | Kubernetes | Zookeeper) => {
                EmptyAnswer::Confirm
            }
            AskedKind::Dns | AskedKind::Http | AskedKind::Registry(Consul) => EmptyAnswer::Keep,
        },
        max_removed: 50,
        confirm_after: Duration::from_secs(10),
        hold_empty: Duration::ZERO,
        min_backends: 1,
        // An answer of DNS can be a part of the addresses.
        missing: if asked == AskedKind::Dns { 2 } else { 1 },
        overlap: Duration::from_secs(10),
        stale_for: None,
        backends_max: BACKENDS_OF_SOURCE,
        weight_max: 100,
        weights: AnnouncedWeights::Use,
        addresses: PRIVATE.iter().filter_map(|range| range.parse().ok()).collect(),
        critical: CriticalRule::Drain,
    }
}

pub(super) fn read(section: &Section<'_, '_>, asked: AskedKind) -> ViewGuards {
    let default = defaults(asked);
    let empty = section.choice("empty").or(default.empty);
    let weights = section.choice("weights").or(default.weights);
    if let (Some(place), AnnouncedWeights::Ignore) = (section.key_place("weight_max"), weights) {
        let message = "weight_max has no effect with weights = \"ignore\"";
        section.report.warning(place, ValueError::new(message));
    }
    let (backends_max, min_backends) = counts(section, empty);
    ViewGuards {
        empty,
        max_removed: section
            .text("max_removed", "a share such as \"50%\"", value::percent)
            .or(default.max_removed),
        confirm_after: section.duration("confirm_after", "10s", CONFIRM).or(default.confirm_after),
        hold_empty: default.hold_empty,
        min_backends: min_backends.or(default.min_backends),
        missing: section.integer("missing", MISSING).or(default.missing),
        overlap: wait(section, "overlap").or(default.overlap),
        stale_for: stale_for(section).or(default.stale_for),
        backends_max: backends_max.or(default.backends_max),
        weight_max: section.integer("weight_max", 1..=WEIGHT_MAX).or(default.weight_max),
        weights,
        addresses: addresses(section).unwrap_or(default.addresses),
        critical: section.choice("critical").or(default.critical),
    }
}

/// Reads a time that can be `0s`.
pub(super) fn wait(section: &Section<'_, '_>, key: &'static str) -> Field<Duration> {
    section.text(key, "a duration such as \"10s\"", |text| match text {
        "0s" => Ok(Duration::ZERO),
        text => value::duration(text, WAIT).map_err(|complaint| match text {
            "0" | "off" => complaint.help("for no time, write \"0s\""),
            _ => complaint,
        }),
    })
}

fn stale_for(section: &Section<'_, '_>) -> Field<Option<Duration>> {
    section.text("stale_for", "\"forever\" or a duration such as \"1h\"", |text| match text {
        "forever" => Ok(None),
        "off" => Err(ValueError::new("\"off\" is not a duration").help("write \"forever\"")),
        text => value::duration(text, STALE).map(Some),
    })
}

/// Reads `backends_max` and `min_backends`.
fn counts(section: &Section<'_, '_>, empty: EmptyAnswer) -> (Field<u32>, Field<u32>) {
    let most = section.integer("backends_max", 1..=MEMBERS_MAX);
    let least = section.integer("min_backends", 0..=MEMBERS_MAX);
    let Field::Good(given) = &least else { return (most, least) };
    let bound = match &most {
        Field::Good(most) => Some(*most.get_ref()),
        Field::Absent => Some(BACKENDS_OF_SOURCE),
        Field::Bad => None,
    };
    if let Some(bound) = bound
        && *given.get_ref() > bound
    {
        let message =
            format!("min_backends ({}) must not exceed backends_max ({bound})", given.get_ref());
        section.report.error(given.span(), ValueError::new(message));
    }
    if *given.get_ref() == 0 && empty != EmptyAnswer::Accept && !empty_is_bad(section) {
        let complaint = ValueError::new("min_backends = 0 needs empty = \"accept\"");
        let help = "without it, Tidegate holds back an answer with fewer than 1 backend";
        section.report.error(given.span(), complaint.help(help));
    }
    (most, least)
}

/// Returns whether `empty` has a wrong value, which is already reported.
fn empty_is_bad(section: &Section<'_, '_>) -> bool {
    let text = section.node("empty").and_then(|node| node.get_ref().as_str());
    text.is_some_and(|text| value::choice::<EmptyAnswer>(text).is_err())
}

/// Reads the ranges of addresses, sorted, so that a different order gives the same model.
fn addresses(section: &Section<'_, '_>) -> Option<Vec<IpNet>> {
    let node = section.node("addresses")?;
    if let DeValue::Array(list) = node.get_ref()
        && list.is_empty()
    {
        let complaint = ValueError::new("addresses lists no range");
        let help = "without this key, the private ranges are allowed";
        section.report.error(node.span(), complaint.help(help));
    }
    let wants = ("a range or a list of ranges", "ranges such as \"10.0.0.0/8\"");
    let read = any_number(section, "addresses", wants, range);
    if let Some(beyond) = read.get(RANGES_MAX) {
        let complaint = ValueError::new(format!("more than {RANGES_MAX} ranges"));
        section.report.error(beyond.span(), complaint);
    }
    let mut ranges: Vec<IpNet> = read.into_iter().map(Spanned::into_inner).collect();
    ranges.sort_unstable();
    ranges.dedup();
    Some(ranges)
}

// === impl AskedKind ===

impl AskedKind {
    pub(crate) fn of(question: &SourceQuestion) -> AskedKind {
        match question {
            SourceQuestion::File { .. } => AskedKind::File,
            SourceQuestion::Http { .. } => AskedKind::Http,
            SourceQuestion::Dns(_) => AskedKind::Dns,
            SourceQuestion::Registry { query, .. } => AskedKind::Registry(match query {
                RegistryQuery::Consul { .. } => RegistryKind::Consul,
                RegistryQuery::Etcd { .. } => RegistryKind::Etcd,
                RegistryQuery::Kubernetes { .. } => RegistryKind::Kubernetes,
                RegistryQuery::Zookeeper { .. } => RegistryKind::Zookeeper,
            }),
        }
    }
}
