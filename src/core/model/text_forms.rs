//! Text forms of the model's values: keywords, durations, sizes, as in a configuration
//! file.
//!
//! Used by the model's `Serialize` implementations and by the messages of `config`,
//! which parses the same forms. Nothing here parses.

use super::{
    FrontendConfig, OnDown, OnRecover, OnRemoval, PoolConfig, RegistryConfig, RouteTarget,
    TlsClientConfig,
};
use ipnet::IpNet;
use serde::Serialize;
use serde::ser::Serializer;
use std::fmt::Display;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

/// Units of sizes, smallest first: name and power of two.
pub const SIZE_UNITS: [(&str, u32); 5] =
    [("B", 0), ("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

/// A setting with a closed set of keywords.
pub trait Words: Copy + PartialEq + 'static {
    /// Every keyword and its value, in the order of the documentation.
    const WORDS: &'static [(&'static str, Self)];

    /// Returns every value, in that order.
    fn all() -> impl Iterator<Item = Self> {
        Self::WORDS.iter().map(|(_, value)| *value)
    }

    /// Returns the keyword of this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
    }
}

/// Implements [`Words`] for a type, and serialises it as its keyword.
macro_rules! words {
    ($type:ty: $($word:literal => $value:ident),+ $(,)?) => {
        impl $crate::model::Words for $type {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, <$type>::$value)),+];
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str($crate::model::Words::word(*self))
            }
        }
    };
}

pub(super) use words;

/// Formats a duration like `1m30s`.
pub fn show_duration(value: Duration) -> String {
    let text = humantime::format_duration(value).to_string();
    text.replace("days", "d").replace("day", "d").replace(' ', "")
}

/// Formats a size like `64MiB`, in the largest unit that divides it.
pub fn show_size(bytes: u64) -> String {
    let divides = |(_, shift): &(&str, u32)| bytes.is_multiple_of(1 << shift);
    let (unit, shift) = SIZE_UNITS.into_iter().rev().find(divides).unwrap_or(SIZE_UNITS[0]);
    format!("{}{unit}", bytes >> shift)
}

// === forms of single keys, for `serialize_with` ===

pub(super) fn duration<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&show_duration(*value))
}

/// A duration or `off`.
pub(super) fn timer<S: Serializer>(
    value: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    or_off(&value.map(show_duration), serializer)
}

/// The value, or `off`.
pub(super) fn or_off<T: Serialize, S: Serializer>(
    value: &Option<T>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => value.serialize(serializer),
        None => serializer.serialize_str("off"),
    }
}

/// A rate such as `1MiB/s`, or `off`.
pub(super) fn byte_rate<S: Serializer>(
    rate: &Option<u64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    or_off(&rate.map(|bytes| format!("{}/s", show_size(bytes))), serializer)
}

/// A duration or `forever`.
pub(super) fn forever<S: Serializer>(
    value: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.serialize_str(&show_duration(*value)),
        None => serializer.serialize_str("forever"),
    }
}

/// Addresses or `system`.
pub(super) fn servers<S: Serializer>(
    value: &Option<Vec<SocketAddr>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(servers) => servers.serialize(serializer),
        None => serializer.serialize_str("system"),
    }
}

/// `tls = true` and the keys of TLS, or `tls = false`, among the keys of a registry.
pub(super) fn tls<S: Serializer>(
    tls: &Option<TlsClientConfig>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct TlsForm<'t> {
        tls: bool,
        #[serde(flatten)]
        keys: Option<&'t TlsClientConfig>,
    }
    TlsForm { tls: tls.is_some(), keys: tls.as_ref() }.serialize(serializer)
}

pub(super) fn registry_name<S: Serializer>(
    registry: &Arc<RegistryConfig>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&registry.name)
}

/// A number or `auto`.
pub(super) fn or_auto<S: Serializer>(
    value: &Option<usize>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => value.serialize(serializer),
        None => serializer.serialize_str("auto"),
    }
}

pub(super) fn size<S: Serializer>(bytes: &usize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&show_size(*bytes as u64))
}

pub(super) fn percent<S: Serializer>(share: &u8, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{share}%"))
}

/// `200,204,300-302`
pub(super) fn status_ranges<S: Serializer>(
    ranges: &[(u16, u16)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let part = |(low, high): &(u16, u16)| match low == high {
        true => low.to_string(),
        false => format!("{low}-{high}"),
    };
    serializer.serialize_str(&ranges.iter().map(part).collect::<Vec<_>>().join(","))
}

pub(super) fn ranges<S: Serializer>(nets: &[IpNet], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(nets.iter().map(ToString::to_string))
}

/// `443`, or `"8000-8010"`.
#[derive(Serialize)]
#[serde(untagged)]
enum PortsForm {
    One(u16),
    Range(String),
}

pub(super) fn ports<S: Serializer>(
    ports: &[RangeInclusive<u16>],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ports.iter().map(|ports| match (ports.start(), ports.end()) {
        (first, last) if first == last => PortsForm::One(*first),
        (first, last) => PortsForm::Range(format!("{first}-{last}")),
    }))
}

/// `pool = "NAME"` or `refuse = true`, among the keys of its route.
pub(super) fn route_target<S: Serializer>(
    target: &RouteTarget,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match target {
        RouteTarget::Pool(name) => serializer.collect_map([("pool", name)]),
        RouteTarget::Refuse => serializer.collect_map([("refuse", true)]),
    }
}

/// `backup = true`, or `tier = N`, among the keys of its backend.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
pub(super) fn tier<S: Serializer>(tier: &u8, serializer: S) -> Result<S::Ok, S::Error> {
    match tier {
        0 | 1 => serializer.collect_map([("backup", *tier == 1)]),
        _ => serializer.collect_map([("tier", tier)]),
    }
}

/// `[frontend.NAME]`
pub(super) fn frontends<S: Serializer>(
    frontends: &[FrontendConfig],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(frontends.iter().map(|frontend| (&*frontend.name, frontend)))
}

/// `[pool.NAME]`
pub(super) fn pools<S: Serializer>(
    pools: &[Arc<PoolConfig>],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pools.iter().map(|pool| (&*pool.name, pool)))
}

/// `[registry.NAME]`
pub(super) fn registries<S: Serializer>(
    registries: &[Arc<RegistryConfig>],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(registries.iter().map(|registry| (&*registry.name, registry)))
}

/// The `Display` form.
pub(super) fn shown<T: Display, S: Serializer>(
    value: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

// === impl OnDown ===

impl Serialize for OnDown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            OnDown::Keep => serializer.serialize_str("keep"),
            OnDown::Reset => serializer.serialize_str("reset"),
            OnDown::CloseAfter(time) => OnRemoval::CloseAfter(*time).serialize(serializer),
        }
    }
}

// === impl OnRecover ===

impl Serialize for OnRecover {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            OnRecover::Keep => serializer.serialize_str("keep"),
            OnRecover::CloseAfter(time) => OnRemoval::CloseAfter(*time).serialize(serializer),
        }
    }
}

// === impl OnRemoval ===

impl Serialize for OnRemoval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            OnRemoval::Keep => serializer.serialize_str("keep"),
            OnRemoval::CloseAfter(time) => {
                serializer.collect_str(&format_args!("close-after {}", show_duration(*time)))
            }
        }
    }
}
