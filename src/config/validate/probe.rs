//! `[pool.NAME.probe]`: the kind of a probe and its times.
//!
//! Called by `pool`. It never sends a probe.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use crate::file::{Field, Section};
use crate::value::{self, TIME, ValueError, shown};
use tidegate_core::model::{Expect, ProbeKind, ProbeSpec, SourceAddr, Words, show_duration};

const INTERVAL: Duration = Duration::from_secs(2);
const FAST_INTERVAL: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_secs(1);
const RISE: u32 = 2;
const FALL: u32 = 3;
/// Most probes in a row. With more, a change of state would take minutes.
const COUNT_MAX: u32 = 100;
/// Shortest interval. Below it, probes are a load for the backend.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Longest `send`, `expect`, `path`, `host` and `method`. Each fits into the first
/// segments of a connection, so a probe never waits for a window update.
const SEND_BYTES_MAX: usize = 4_096;
const EXPECT_BYTES_MAX: usize = 1_024;
const PATH_BYTES_MAX: usize = 2_048;
const HOST_BYTES_MAX: usize = 255;
const METHOD_BYTES_MAX: usize = 32;

/// The value of `kind`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeKindKey {
    Tcp,
    SendExpect,
    Http,
}

impl Words for ProbeKindKey {
    const WORDS: &'static [(&'static str, ProbeKindKey)] = &[
        ("tcp", ProbeKindKey::Tcp),
        ("send-expect", ProbeKindKey::SendExpect),
        ("http", ProbeKindKey::Http),
    ];
}

/// The keys that only some kinds take.
struct KindKeys {
    send: Field<String>,
    expect: Field<Expect>,
    path: Field<String>,
    host: Field<String>,
    method: Field<String>,
    status: Field<Vec<(u16, u16)>>,
}

pub(super) fn read(
    pool: &Section<'_, '_>,
    name: &str,
    source: Arc<[SourceAddr]>,
) -> Option<ProbeSpec> {
    let label = format!("[pool.{}.probe]", value::cut(name));
    let section = pool.table("probe", label)?;
    let kind = section.choice("kind");
    let keys = kind_keys(&section);
    let kind_is_bad = kind.is_bad();
    let kind = kind.or(ProbeKindKey::Tcp);
    if !kind_is_bad {
        refuse_foreign_keys(&section, kind);
        require_expect(&section, kind, &keys);
    }
    let (interval, fast_interval, timeout) = times(&section);
    let spec = ProbeSpec {
        kind: keys.into_kind(kind),
        interval,
        fast_interval,
        timeout,
        rise: section.integer("rise", 1..=COUNT_MAX).or(RISE),
        fall: section.integer("fall", 1..=COUNT_MAX).or(FALL),
        source,
    };
    section.finish();
    Some(spec)
}

fn kind_keys(section: &Section<'_, '_>) -> KindKeys {
    KindKeys {
        send: section.text("send", "a string", |text| bounded(text, 0, SEND_BYTES_MAX)),
        expect: expect(section),
        path: section.text("path", "a string", path),
        host: section.text("host", "a string", host),
        method: section.text("method", "a string", method),
        status: section.text("status", "a string such as \"200-399\"", value::status_ranges),
    }
}

/// Reads what the answer must be: `"..."` or `{ starts = "..." }` for its start,
/// `{ contains = "..." }` for a part of it.
fn expect(section: &Section<'_, '_>) -> Field<Expect> {
    let read = |text: &str| bounded(text, 1, EXPECT_BYTES_MAX);
    let Some(node) = section.node("expect") else { return Field::Absent };
    match node.get_ref() {
        DeValue::Table(table) => {
            let label = "the table of expect".to_owned();
            let table = Section::new(section.report, table, label, node.span());
            let starts = table.text("starts", "a string", read);
            let contains = table.text("contains", "a string", read);
            table.finish();
            let bad = starts.is_bad() || contains.is_bad();
            let expect = match (starts.value(), contains.value()) {
                (Some(starts), None) => Some(Expect::Starts(starts)),
                (None, Some(contains)) => Some(Expect::Contains(contains)),
                _ => None,
            };
            if expect.is_none() && !bad {
                let complaint = ValueError::new("expect needs exactly one of starts and contains");
                let help = "write expect = { contains = \"...\" }";
                section.report.error(node.span(), complaint.help(help));
            }
            expect.map_or(Field::Bad, |expect| Field::Good(Spanned::new(node.span(), expect)))
        }
        DeValue::String(_) => section.text("expect", "a string", read).map(Expect::Starts),
        _ => section.wrong_type(
            "expect",
            node,
            "a string, or a table such as { contains = \"...\" }",
        ),
    }
}

fn refuse_foreign_keys(section: &Section<'_, '_>, kind: ProbeKindKey) {
    let owned = [
        (ProbeKindKey::SendExpect, "send"),
        (ProbeKindKey::SendExpect, "expect"),
        (ProbeKindKey::Http, "path"),
        (ProbeKindKey::Http, "host"),
        (ProbeKindKey::Http, "method"),
        (ProbeKindKey::Http, "status"),
    ];
    for (owner, key) in owned {
        if owner != kind
            && let Some(place) = section.key_place(key)
        {
            let (owner, kind) = (owner.word(), kind.word());
            let complaint = ValueError::new(format!("a probe of kind \"{kind}\" takes no {key}"));
            let help = match section.key_place("kind") {
                Some(_) => format!("{key} belongs to kind = \"{owner}\""),
                None => format!("add kind = \"{owner}\"; \"{kind}\" is the default"),
            };
            section.report.error(place, complaint.help(help));
        }
    }
}

fn require_expect(section: &Section<'_, '_>, kind: ProbeKindKey, keys: &KindKeys) {
    if kind == ProbeKindKey::SendExpect && keys.expect.is_absent() {
        section.missing("expect", "\"...\", what the answer must start with");
    }
}

/// Reads `interval`, `fast_interval` and `timeout`.
///
/// The given times must agree, and defaults depend on the given times, so that
/// `timeout <= fast_interval <= interval`.
fn times(section: &Section<'_, '_>) -> (Duration, Duration, Duration) {
    let interval = section.text("interval", "a duration such as \"2s\"", |text| {
        let time = value::duration(text, TIME)?;
        at_least(time, INTERVAL_MIN)
    });
    let fast_interval = section.duration("fast_interval", "5s", TIME);
    let timeout = section.duration("timeout", "5s", TIME);
    if interval.is_bad() || timeout.is_bad() || fast_interval.is_bad() {
        return (INTERVAL, FAST_INTERVAL.max(TIMEOUT), TIMEOUT);
    }
    let (timeout_place, fast_place) = (timeout.place(), fast_interval.place());
    let interval = interval.or(INTERVAL);
    let (fast, timeout) = default_times(interval, fast_interval.value(), timeout.value());
    let above = |place: Option<Range<usize>>, what: &str, limit: Duration| {
        let place = place.unwrap_or_else(|| section.header.clone());
        section.report.error(place, ValueError::new(format!("{what} ({})", show_duration(limit))));
    };
    if timeout > interval {
        above(timeout_place, "a probe's timeout must not exceed its interval", interval);
    } else if fast > interval {
        above(fast_place, "fast_interval must not exceed interval", interval);
    } else if fast < timeout {
        above(fast_place, "fast_interval must not be below timeout", timeout);
    }
    (interval, fast, timeout)
}

/// Returns `fast_interval` and `timeout`. Their defaults depend on the keys that are
/// given.
pub(crate) fn default_times(
    interval: Duration,
    fast: Option<Duration>,
    timeout: Option<Duration>,
) -> (Duration, Duration) {
    // The default timeout is at most a given fast_interval.
    let longest = fast.unwrap_or(interval).min(interval);
    let timeout = timeout.unwrap_or(TIMEOUT.min(longest));
    let fast = fast.unwrap_or_else(|| FAST_INTERVAL.min(interval).max(timeout));
    (fast, timeout)
}

fn at_least(time: Duration, min: Duration) -> Result<Duration, ValueError> {
    if time < min {
        let (time, min) = (show_duration(time), show_duration(min));
        return Err(ValueError::new(format!("{time} is below the minimum, {min}")));
    }
    Ok(time)
}

fn bounded(text: &str, min: usize, max: usize) -> Result<String, ValueError> {
    if text.len() < min {
        return Err(ValueError::new("it is empty, so any answer would pass")
            .help("to check only that a connection is accepted, use kind = \"tcp\""));
    }
    if text.len() > max {
        return Err(ValueError::new(format!("{} bytes, at most {max} are allowed", text.len())));
    }
    Ok(text.to_owned())
}

fn path(text: &str) -> Result<String, ValueError> {
    if !text.starts_with('/') {
        return Err(ValueError::new(format!("{} does not start with /", shown(text)))
            .help("give the path alone, without scheme and host"));
    }
    visible(text, PATH_BYTES_MAX)
}

fn host(text: &str) -> Result<String, ValueError> {
    if text.is_empty() {
        return Err(ValueError::new("it is empty").help("remove it to send the backend's address"));
    }
    visible(text, HOST_BYTES_MAX)
}

/// Parses a method: a token (RFC 9110 5.6.2).
fn method(text: &str) -> Result<String, ValueError> {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if text.is_empty() || text.len() > METHOD_BYTES_MAX || !text.bytes().all(token) {
        return Err(ValueError::new(format!("{} is not an HTTP method", shown(text)))
            .help("write \"GET\" or \"HEAD\""));
    }
    Ok(text.to_owned())
}

/// Accepts only text that cannot end the request line or the header that holds it.
fn visible(text: &str, max: usize) -> Result<String, ValueError> {
    if let Some(wrong) = text.chars().find(|c| !c.is_ascii_graphic()) {
        let wrong = shown(&wrong.to_string());
        return Err(ValueError::new(format!("{wrong} is not allowed here"))
            .help("only visible ASCII characters; escape others as %XX"));
    }
    if text.len() > max {
        return Err(ValueError::new(format!("{} bytes, at most {max} are allowed", text.len())));
    }
    Ok(text.to_owned())
}

// === impl KindKeys ===

impl KindKeys {
    fn into_kind(self, kind: ProbeKindKey) -> ProbeKind {
        match kind {
            ProbeKindKey::Tcp => ProbeKind::Tcp,
            ProbeKindKey::SendExpect => ProbeKind::SendExpect {
                send: self.send.or(String::new()),
                expect: self.expect.or(Expect::Starts(String::new())),
            },
            ProbeKindKey::Http => ProbeKind::Http {
                path: self.path.or("/".to_owned()),
                host: self.host.value(),
                method: self.method.or("GET".to_owned()),
                status: self.status.or(vec![(200, 399)]),
            },
        }
    }
}
