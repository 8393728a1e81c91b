//! `[heartbeat]` with its keys, and `[pool.NAME.heartbeat]`.
//!
//! Called by `validate` for the file and for each pool; [`check`] checks what spans them.
//! It never opens a file other than the key files, and those only with
//! [`NamedFiles::Read`] or [`NamedFiles::Kept`].

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;

use super::frontend::{addresses, one_or_more};
use super::globals::file_path;
use super::pool::PoolRead;
use super::sources::range;
use crate::diagnose::ProblemCollector;
use crate::file::Section;
use crate::value::shown;
use crate::value::{self, HEARTBEAT_INTERVAL, TIME, ValueError, did_you_mean_or};
use crate::{NamedFiles, Spot};
use tidegate_core::model::{
    HeartbeatConfig, HeartbeatKeyConfig, HeartbeatSpec, WEIGHT_MAX, show_duration,
};
use tidegate_heartbeat::key_file::{self, KeyFileError, KeyFileProblem};
use tidegate_heartbeat::keys::{SECRET_BYTES_MAX, SECRET_BYTES_MIN, Secret};

/// Most addresses. Each costs a socket and an entry in the receiver's poll set.
const LISTEN_MAX: usize = 16;

/// Most keys: enough for several teams that rotate several keys each.
const KEYS_MAX: usize = 64;

/// Most ranges per key. The receiver compares each datagram with them.
const RANGES_MAX: usize = 64;

/// Most registered backends per pool. Each uses memory at the request of a sender.
const REGISTERED_MAX: u32 = 10_000;

/// Least TTL in heartbeat intervals. The detector handles shorter gaps between
/// heartbeats.
const TTL_INTERVALS: u32 = 3;

const INTERVAL: Duration = Duration::from_millis(100);
const TTL: Duration = Duration::from_secs(10);
const FORGET_AFTER: Duration = Duration::from_secs(60);
const BACKENDS: u32 = 1000;
const WEIGHT: u16 = 100;

/// `[heartbeat]` with the places that checks across sections point at.
pub(super) struct HeartbeatRead {
    pub(super) model: HeartbeatConfig,
    listen_places: Vec<Range<usize>>,
    keys: Vec<KeyPlaces>,
}

struct KeyPlaces {
    id: Option<Range<usize>>,
    /// As many as the `pools` of the key.
    pools: Vec<Range<usize>>,
}

pub(super) fn read(top: &Section<'_, '_>, files: NamedFiles<'_>) -> Option<HeartbeatRead> {
    let section = top.table("heartbeat", "[heartbeat]".to_owned())?;
    let listen = addresses(&section, "listen", "\"0.0.0.0:7946\"");
    let too_many = |place: Range<usize>, what: &str, max: usize| {
        section.report.error(place, ValueError::new(format!("more than {max} {what}")));
    };
    if let Some(beyond) = listen.get(LISTEN_MAX) {
        too_many(beyond.span(), "addresses to listen on", LISTEN_MAX);
    }
    let sections = section.array_of_tables("key", "heartbeat.key");
    if sections.is_empty() {
        let complaint = ValueError::new("[heartbeat] has no key: no heartbeat can be verified");
        let help = "add [[heartbeat.key]] with id, file, pools and addresses";
        section.report.error(section.header.clone(), complaint.help(help));
    }
    if let Some(beyond) = sections.get(KEYS_MAX) {
        too_many(beyond.header.clone(), "keys", KEYS_MAX);
    }
    let (models, keys) = sections.into_iter().map(|each| key(each, files)).unzip();
    for one in &listen {
        section.report.keep(Spot::HeartbeatListen(*one.get_ref()), Some(one.span()));
    }
    let (listen_places, listen) =
        listen.into_iter().map(|each| (each.span(), each.into_inner())).unzip();
    section.finish();
    Some(HeartbeatRead { model: HeartbeatConfig { listen, keys: models }, listen_places, keys })
}

fn key(section: Section<'_, '_>, files: NamedFiles<'_>) -> (HeartbeatKeyConfig, KeyPlaces) {
    let id = section.integer("id", 1..=u32::MAX);
    if id.is_absent() {
        section.missing("id", "1");
    }
    let file = section.text("file", "a file path", |text| {
        let path = file_path(text)?;
        let secret = match files {
            NamedFiles::Read => Some(secret(&path, None)?),
            NamedFiles::Kept(texts) => Some(secret(&path, texts.named(&path))?),
            NamedFiles::Ignore => None,
        };
        Ok((path, secret))
    });
    if file.is_absent() {
        section.missing("file", "\"/etc/tidegate/hb.key\"");
    }
    let pool = |text: &str| value::name(text).map(|()| Arc::<str>::from(text));
    let wants = ("a pool or a list of pools", "names of pools");
    let pools = one_or_more(&section, "pools", wants, "[\"web\"]", pool);
    let wants = ("a range or a list of ranges", "ranges such as \"10.0.0.0/8\"");
    let ranges = one_or_more(&section, "addresses", wants, "[\"10.0.0.0/8\"]", range);
    if let Some(beyond) = ranges.get(RANGES_MAX) {
        let complaint = ValueError::new(format!("more than {RANGES_MAX} ranges"));
        section.report.error(beyond.span(), complaint);
    }
    let places = KeyPlaces { id: id.place(), pools: pools.iter().map(Spanned::span).collect() };
    let (file, secret) = file.or((PathBuf::new(), None));
    let model = HeartbeatKeyConfig {
        id: id.or(0),
        file,
        pools: pools.into_iter().map(Spanned::into_inner).collect(),
        addresses: ranges.into_iter().map(Spanned::into_inner).collect(),
        secret,
    };
    section.finish();
    (model, places)
}

fn secret(path: &Path, kept: Option<&[u8]>) -> Result<Secret, ValueError> {
    let secret = match kept {
        Some(kept) => key_file::of_bytes(path, kept),
        None => key_file::read(path),
    };
    secret.map_err(|KeyFileError { path, why }| {
        let file = shown(&path.to_string_lossy());
        match why {
            KeyFileProblem::File(why) => ValueError::new(format!("the key file {file} {why}")),
            KeyFileProblem::Length(found) => {
                let needed = format!("{SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} are needed");
                ValueError::new(format!("the key file {file} holds {found}; {needed}"))
                    .help("make one with: head -c 32 /dev/urandom > FILE; chmod 0600 FILE")
            }
        }
    })
}

pub(super) fn of_pool(pool: &Section<'_, '_>, name: &str) -> Option<HeartbeatSpec> {
    let label = format!("[pool.{}.heartbeat]", value::cut(name));
    let section = pool.table("heartbeat", label)?;
    let (interval, ttl) = times(&section);
    let register = section.boolean("register").or(false);
    for key in ["forget_after", "backends_max", "weight_max"] {
        if let (Some(place), false) = (section.key_place(key), register) {
            let message = format!("{key} has no effect without register = true");
            section.report.warning(place, ValueError::new(message));
        }
    }
    let spec = HeartbeatSpec {
        register,
        require: section.boolean("require").or(false),
        interval,
        ttl,
        forget_after: section.duration("forget_after", "5s", TIME).or(FORGET_AFTER),
        backends_max: section.integer("backends_max", 1..=REGISTERED_MAX).or(BACKENDS),
        weight_max: section.integer("weight_max", 1..=WEIGHT_MAX).or(WEIGHT),
    };
    section.finish();
    Some(spec)
}

fn times(section: &Section<'_, '_>) -> (Duration, Duration) {
    let interval = section.duration("interval", "100ms", HEARTBEAT_INTERVAL);
    let ttl = section.duration("ttl", "5s", TIME);
    if interval.is_bad() || ttl.is_bad() {
        return (INTERVAL, TTL);
    }
    let (interval_place, ttl_place) = (interval.place(), ttl.place());
    let (interval, ttl) = (interval.or(INTERVAL), ttl.or(TTL));
    let least = interval * TTL_INTERVALS;
    if ttl < least {
        let place = ttl_place.or(interval_place).unwrap_or_else(|| section.header.clone());
        let (ttl, least) = (show_duration(ttl), show_duration(least));
        let message = format!("ttl ({ttl}) must be at least {TTL_INTERVALS} intervals ({least})");
        section.report.error(place, ValueError::new(message));
    }
    (interval, ttl)
}

/// Checks what spans `[heartbeat]`, its keys and the pools.
pub(super) fn check(
    report: &ProblemCollector<'_>,
    read: Option<&HeartbeatRead>,
    pools: &[PoolRead],
) {
    let Some(read) = read else {
        for pool in pools {
            if let Some(place) = &pool.heartbeat {
                let complaint = ValueError::new("no address receives heartbeats");
                report.error(place.clone(), complaint.help("add [heartbeat] with listen and keys"));
            }
        }
        return;
    };
    listens(report, read);
    ids(report, read);
    keys(report, read, pools);
}

fn listens(report: &ProblemCollector<'_>, read: &HeartbeatRead) {
    let overlaps = |a: SocketAddr, b: SocketAddr| {
        let wild = a.ip().is_unspecified() || b.ip().is_unspecified();
        a == b || (wild && a.port() == b.port() && a.is_ipv4() == b.is_ipv4())
    };
    // Addresses beyond the bound are already reported.
    let all: Vec<_> = read.model.listen.iter().zip(&read.listen_places).take(LISTEN_MAX).collect();
    for (index, (address, place)) in all.iter().enumerate() {
        if let Some((other, first)) = all[..index].iter().find(|(o, _)| overlaps(**o, **address)) {
            let how = if other == address { "repeats" } else { "overlaps" };
            let first = report.place_name(first);
            let message = format!("{address} {how} the heartbeat address {other} at {first}");
            report.error((*place).clone(), ValueError::new(message));
        }
    }
}

fn ids(report: &ProblemCollector<'_>, read: &HeartbeatRead) {
    let mut seen: HashMap<u32, &Range<usize>> = HashMap::new();
    for (key, places) in read.model.keys.iter().zip(&read.keys) {
        let Some(place) = &places.id else { continue };
        if let Some(first) = seen.get(&key.id) {
            let first = report.place_name(first);
            let message = format!("key id {} is already used at {first}", key.id);
            report.error(place.clone(), ValueError::new(message));
        } else {
            seen.insert(key.id, place);
        }
    }
}

/// Checks that keys name only pools that expect heartbeats, and that every such pool has a
/// key.
fn keys(report: &ProblemCollector<'_>, read: &HeartbeatRead, pools: &[PoolRead]) {
    let known: HashMap<&str, &PoolRead> =
        pools.iter().map(|pool| (&*pool.model.name, pool)).collect();
    for (key, places) in read.model.keys.iter().zip(&read.keys) {
        for (name, place) in key.pools.iter().zip(&places.pools) {
            match known.get(&**name) {
                None => report.error_with(place.clone(), || {
                    let names = pools.iter().map(|pool| &*pool.model.name);
                    let help = did_you_mean_or(name, names, || "name a [pool.NAME]".to_owned());
                    ValueError::new(format!("there is no pool {}", shown(name))).help(help)
                }),
                Some(pool) if pool.heartbeat.is_none() => {
                    let message = format!("pool {} does not accept heartbeats", shown(name));
                    let help = format!("add [pool.{}.heartbeat]", value::cut(name));
                    report.error(place.clone(), ValueError::new(message).help(help));
                }
                Some(_) => {}
            }
        }
    }
    let spoken_for: HashSet<_> = read.model.keys.iter().flat_map(|key| &key.pools).collect();
    for pool in pools {
        let Some(place) = &pool.heartbeat else { continue };
        if !spoken_for.contains(&pool.model.name) && !read.keys.is_empty() {
            let name = shown(&pool.model.name);
            let complaint = ValueError::new(format!("no [[heartbeat.key]] names pool {name}"));
            let help = "add the pool to the pools of a [[heartbeat.key]]";
            report.error(place.clone(), complaint.help(help));
        }
    }
}
