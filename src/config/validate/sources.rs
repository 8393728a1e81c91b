//! `[frontend.NAME.sources]`: the clients that may connect, and the limits per client
//! source.
//!
//! Called by `frontend`. It never opens a file other than the lists of ranges, and those
//! only with [`NamedFiles::Read`] or [`NamedFiles::Kept`].

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use toml::Spanned;

use super::CONNECTIONS_MAX;
use super::frontend::any_number;
use super::globals::file_path;
use crate::file::{Field, Section};
use crate::value::{self, ValueError, shown};
use crate::{NamedFiles, source};
use tidegate_core::limits::access_list::AccessList;
use tidegate_core::limits::client_sources::{Rate, RateUnit, SourceLimits};
use tidegate_core::model::SourceRules;

/// Most ranges in all lists of a frontend: ten times the longest blocklists in common
/// use, and at most 30 MiB of memory.
const RANGES_MAX: usize = 1_000_000;

/// Highest rate and burst.
const RATE_MAX: u32 = 1_000_000;

/// Leading bits of every IPv4 address that is written as IPv6 (RFC 4291, 2.5.5.2).
const MAPPED_BITS: u8 = 96;

const PREFIX_V4: u8 = 32;
/// The size of a network that a provider commonly assigns to one customer (RFC 6177).
const PREFIX_V6: u8 = 64;

pub(super) fn read(
    frontend: &Section<'_, '_>,
    name: &str,
    files: NamedFiles<'_>,
) -> Option<Arc<SourceRules>> {
    let label = format!("[frontend.{}.sources]", value::cut(name));
    let section = frontend.table("sources", label)?;
    let (allow, deny) =
        (List::read(&section, Verb::Allow, files), List::read(&section, Verb::Deny, files));
    refuse_contradictions(&section, &allow, &deny);
    refuse_too_many(&section, &allow, &deny);
    warn_of_idle_ranges(&section, &allow, &deny);
    let limits = limits(&section);
    section.finish();
    let anything = allow.is_given() || deny.is_given() || limits.are_any();
    anything.then(|| {
        let access = AccessList::new(&allow.all(), &deny.all());
        // Sorted, so that a different order in the file gives the same model.
        let inline = |list: &List| -> Vec<IpNet> {
            let mut ranges: Vec<_> = list.inline.iter().map(|range| *range.get_ref()).collect();
            ranges.sort_unstable();
            ranges
        };
        Arc::new(SourceRules {
            allow: inline(&allow),
            deny: inline(&deny),
            access,
            allow_file: allow.file,
            deny_file: deny.file,
            limits,
        })
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Allow,
    Deny,
}

impl Verb {
    fn past(self) -> &'static str {
        match self {
            Verb::Allow => "allowed",
            Verb::Deny => "denied",
        }
    }
}

/// The allowed or the denied ranges, from the configuration and from a file.
struct List {
    inline: Vec<Spanned<IpNet>>,
    from_file: Vec<IpNet>,
    file: Option<PathBuf>,
}

impl List {
    fn read(section: &Section<'_, '_>, verb: Verb, files: NamedFiles<'_>) -> List {
        let (key, file_key) = match verb {
            Verb::Allow => ("allow", "allow_file"),
            Verb::Deny => ("deny", "deny_file"),
        };
        let wants = ("a range or a list of ranges", "ranges such as \"10.0.0.0/8\"");
        let inline = any_number(section, key, wants, range);
        let file = section.text(file_key, "a file path", |text| {
            let path = file_path(text)?;
            let ranges = match files {
                NamedFiles::Read => ranges_of_file(&path, None)?,
                NamedFiles::Kept(texts) => ranges_of_file(&path, texts.named(&path))?,
                NamedFiles::Ignore => Vec::new(),
            };
            Ok((path, ranges))
        });
        let (file, from_file) = match file {
            Field::Good(found) => {
                let (path, ranges) = found.into_inner();
                (Some(path), ranges)
            }
            Field::Absent | Field::Bad => (None, Vec::new()),
        };
        List { inline, from_file, file }
    }

    fn all(&self) -> Vec<IpNet> {
        self.inline.iter().map(|range| *range.get_ref()).chain(self.from_file.clone()).collect()
    }

    fn is_given(&self) -> bool {
        self.file.is_some() || !self.inline.is_empty()
    }

    fn len(&self) -> usize {
        self.inline.len() + self.from_file.len()
    }
}

/// Reports ranges that the configuration both allows and denies.
///
/// Ranges of list files are not checked, because other programs write those files. For
/// them, the denial takes precedence.
fn refuse_contradictions(section: &Section<'_, '_>, allow: &List, deny: &List) {
    // In reverse, so that the place of the first of equal ranges stays in the map.
    let allowed = allow.inline.iter().rev().map(|range| (range.get_ref(), range.span()));
    let allowed: HashMap<_, _> = allowed.collect();
    for denied in &deny.inline {
        let Some(place) = allowed.get(denied.get_ref()) else { continue };
        let place = section.report.place_name(place);
        let message = format!("{} is allowed at {place}", denied.get_ref());
        section.report.error(denied.span(), ValueError::new(message));
    }
}

fn refuse_too_many(section: &Section<'_, '_>, allow: &List, deny: &List) {
    let count = allow.len() + deny.len();
    if count > RANGES_MAX {
        let message = format!("{count} address ranges, more than {RANGES_MAX}");
        section.report.error(section.header.clone(), ValueError::new(message));
    }
}

/// Warns of ranges without effect: given twice, or within a wider range of the same
/// verdict. Ranges of list files are not compared.
fn warn_of_idle_ranges(section: &Section<'_, '_>, allow: &List, deny: &List) {
    let mut known: HashMap<IpNet, (Verb, Range<usize>)> = HashMap::new();
    let all = allow.inline.iter().map(|range| (Verb::Allow, range));
    let all = all.chain(deny.inline.iter().map(|range| (Verb::Deny, range)));
    let place_name = |place: &Range<usize>| section.report.place_name(place);
    for (verb, range) in all.clone() {
        match known.entry(*range.get_ref()) {
            Entry::Occupied(first) if first.get().0 == verb => {
                idle(section, range, || format!("it is already at {}", place_name(&first.get().1)));
            }
            // Already reported as a contradiction.
            Entry::Occupied(_) => {}
            Entry::Vacant(free) => drop(free.insert((verb, range.span()))),
        }
    }
    if allow.file.is_some() || deny.file.is_some() {
        return;
    }
    for (verb, range) in all {
        let mut around = std::iter::successors(range.get_ref().supernet(), IpNet::supernet);
        let around =
            around.find_map(|net| known.get(&net).map(|(verb, place)| (net, *verb, place)));
        match around {
            Some((net, other, place)) if other == verb => {
                idle(section, range, || {
                    format!("{net} is {} at {}", verb.past(), place_name(place))
                });
            }
            None if verb == Verb::Deny && allow.is_given() => {
                idle(section, range, || {
                    "allow does not contain it, so it is denied anyway".to_owned()
                });
            }
            _ => {}
        }
    }
}

fn idle(section: &Section<'_, '_>, range: &Spanned<IpNet>, why: impl FnOnce() -> String) {
    section.report.warning_with(range.span(), || {
        ValueError::new(format!("{} has no effect: {}", range.get_ref(), why()))
    });
}

fn limits(section: &Section<'_, '_>) -> SourceLimits {
    let rate = section.text("rate", "a rate such as \"100/s\", or \"off\"", rate);
    let burst = section.integer("burst", 1..=RATE_MAX);
    if let (Some(place), Field::Absent) = (burst.place(), &rate) {
        let complaint = ValueError::new("burst has no effect without rate");
        section.report.error(place, complaint.help("add rate = \"100/s\""));
    }
    let limited = ["rate", "connections_max"].iter().any(|key| section.key_place(key).is_some());
    for key in ["prefix_v4", "prefix_v6"] {
        if let (Some(place), false) = (section.key_place(key), limited) {
            let complaint = ValueError::new(format!("{key} has no effect without a limit"));
            section.report.error(place, complaint.help("add connections_max or rate"));
        }
    }
    let connections_max = section.integer("connections_max", 0..=CONNECTIONS_MAX);
    section.report.limit("connections_max of one source", &connections_max);
    let burst = burst.value();
    let rate = rate.or(None).map(|(count, unit)| Rate::per(count, unit, burst));
    SourceLimits {
        prefix_v4: section.integer("prefix_v4", 0..=32).or(PREFIX_V4),
        prefix_v6: section.integer("prefix_v6", 0..=128).or(PREFIX_V6),
        connections_max: connections_max.or(0),
        rate,
    }
}

/// Parses `100/s`, `30/m`, `500/h` or `off`: a number and its unit.
fn rate(text: &str) -> Result<Option<(u32, RateUnit)>, ValueError> {
    if text == "off" {
        return Ok(None);
    }
    let wrong = || {
        ValueError::new(format!("{} is not a rate", shown(text)))
            .help("write connections in a time, such as \"100/s\", \"30/m\" or \"500/h\"")
    };
    let (count, unit) = text.split_once('/').ok_or_else(wrong)?;
    let unit = Rate::UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    if count.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    match count.parse::<u32>() {
        Ok(0) => Err(ValueError::new("a rate of zero allows no client")
            .help("to switch it off, write \"off\"")),
        Ok(count) if count <= RATE_MAX => Ok(Some((count, unit))),
        _ => Err(ValueError::new(format!("{} is more than {RATE_MAX}", shown(count)))),
    }
}

/// Parses a network in CIDR notation or a single address.
pub(super) fn range(text: &str) -> Result<IpNet, ValueError> {
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map_err(
        |_| {
            ValueError::new(format!("{} is not an address range", shown(text)))
                .help("write ADDRESS/BITS, such as \"10.0.0.0/8\" or \"fd00::/8\"")
        },
    )?;
    let net = as_ipv4(net, text)?;
    if net != net.trunc() {
        return Err(ValueError::new(format!("{} has bits beyond its length", shown(text)))
            .help(format!("write \"{}\"", net.trunc())));
    }
    Ok(net)
}

/// Converts a range of IPv4 addresses that is written as IPv6 (`::ffff:10.0.0.1`) to the
/// IPv4 range, because IPv4 clients are looked up by their IPv4 address.
fn as_ipv4(net: IpNet, text: &str) -> Result<IpNet, ValueError> {
    let Some(mapped) = (match net {
        IpNet::V6(v6) => v6.addr().to_ipv4_mapped(),
        IpNet::V4(_) => None,
    }) else {
        return Ok(net);
    };
    let bits = net.prefix_len().checked_sub(MAPPED_BITS);
    let v4 = bits.and_then(|bits| Ipv4Net::new(mapped, bits).ok());
    v4.map(IpNet::V4).ok_or_else(|| {
        ValueError::new(format!("{} is wider than the IPv4 addresses written as IPv6", shown(text)))
            .help("write the IPv4 range, such as \"10.0.0.0/8\"; \"0.0.0.0/0\" is all of IPv4")
    })
}

/// Reads a list file: one range per line. Blank lines and text after `#` are ignored.
fn ranges_of_file(path: &Path, kept: Option<&[u8]>) -> Result<Vec<IpNet>, ValueError> {
    let shown_path = shown(&path.to_string_lossy());
    let unfit = |why: String| ValueError::new(format!("cannot use the list {shown_path}: {why}"));
    let bytes = match kept {
        Some(kept) => Cow::Borrowed(kept),
        None => Cow::Owned(source::read_file(path).map_err(unfit)?),
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| unfit("it is not UTF-8".to_owned()))?;
    let mut ranges = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split_once('#').map_or(line, |(before, _)| before).trim();
        if !line.is_empty() {
            ranges.push(range(line).map_err(|why| {
                let help = why.help.unwrap_or_default();
                unfit(format!("line {}: {}", index + 1, why.message)).help(help)
            })?);
        }
    }
    Ok(ranges)
}
