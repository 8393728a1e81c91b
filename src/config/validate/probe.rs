//! `[pool.NAME.probe]`: the kind of a probe and its times.
//!
//! Called by `pool`. It never sends a probe.

mod answer;
mod exec;
mod http;
mod service;
mod target;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::NamedFiles;
use crate::defaults::SectionDefaults;
use crate::file::{Field, Section};
use crate::value::{self, TIME, ValueError};
use exec::ExecKeys;
use http::HttpKeys;
use service::ServiceKeys;
use tidegate_core::model::{
    Expect, ProbeBytes, ProbeKind, ProbeSpec, ProbeStep, ProbeTarget, Words, show_duration,
};

const INTERVAL: Duration = Duration::from_secs(2);
const FAST_INTERVAL: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_secs(1);
const RISE: u32 = 2;
const FALL: u32 = 3;
/// Most probes in a row. With more, a change of state would take minutes.
const COUNT_MAX: u32 = 100;
/// Shortest interval. Below it, probes are a load for the backend.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// The value of `kind`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeKindKey {
    Tcp,
    SendExpect,
    Steps,
    Http,
    Redis,
    Postgres,
    Mysql,
    Smtp,
    Ldap,
    Dns,
    Agent,
    Exec,
}

impl Words for ProbeKindKey {
    const WORDS: &'static [(&'static str, ProbeKindKey)] = &[
        ("tcp", ProbeKindKey::Tcp),
        ("send-expect", ProbeKindKey::SendExpect),
        ("steps", ProbeKindKey::Steps),
        ("http", ProbeKindKey::Http),
        ("redis", ProbeKindKey::Redis),
        ("postgres", ProbeKindKey::Postgres),
        ("mysql", ProbeKindKey::Mysql),
        ("smtp", ProbeKindKey::Smtp),
        ("ldap", ProbeKindKey::Ldap),
        ("dns", ProbeKindKey::Dns),
        ("agent", ProbeKindKey::Agent),
        ("exec", ProbeKindKey::Exec),
    ];
}

/// What a probe needs to know of the backends of its pool.
pub(super) struct ProbedBackends {
    /// The target of a probe without keys.
    pub(super) target: ProbeTarget,
    /// All backends that the pool can have are Unix sockets.
    pub(super) all_unix: bool,
}

/// The keys that only some kinds take.
struct KindKeys {
    send: Field<ProbeBytes>,
    expect: Field<Expect>,
    steps: Field<Vec<ProbeStep>>,
    http: HttpKeys,
    service: ServiceKeys,
    exec: ExecKeys,
}

/// A probe, with the place of `kind` if it runs a command.
pub(super) struct ProbeRead {
    pub(super) spec: ProbeSpec,
    pub(super) exec: Option<Range<usize>>,
}

/// The keys that only some kinds take, and these kinds. The first one is named in messages.
const OWNED: &[(&str, &[ProbeKindKey])] = &[
    ("send", &[ProbeKindKey::SendExpect, ProbeKindKey::Agent]),
    ("expect", &[ProbeKindKey::SendExpect, ProbeKindKey::Http]),
    ("steps", &[ProbeKindKey::Steps]),
    ("path", &[ProbeKindKey::Http]),
    ("host", &[ProbeKindKey::Http]),
    ("method", &[ProbeKindKey::Http]),
    ("http", &[ProbeKindKey::Http]),
    ("headers", &[ProbeKindKey::Http]),
    ("status", &[ProbeKindKey::Http]),
    ("user", &[ProbeKindKey::Redis, ProbeKindKey::Postgres, ProbeKindKey::Mysql]),
    ("password_file", &[ProbeKindKey::Redis, ProbeKindKey::Postgres, ProbeKindKey::Mysql]),
    ("database", &[ProbeKindKey::Postgres]),
    ("name", &[ProbeKindKey::Dns]),
    ("record", &[ProbeKindKey::Dns]),
    ("transport", &[ProbeKindKey::Dns]),
    ("rcode", &[ProbeKindKey::Dns]),
    ("command", &[ProbeKindKey::Exec]),
    ("exit_codes", &[ProbeKindKey::Exec]),
];

pub(super) fn read<'r, 'a>(
    pool: &Section<'r, 'a>,
    defaults: &'r SectionDefaults<'r, 'a>,
    name: &str,
    backends: ProbedBackends,
    files: NamedFiles<'_>,
) -> Option<ProbeRead> {
    let label = format!("[pool.{}.probe]", value::cut(name));
    let section = pool.table("probe", label)?.with_defaults(defaults);
    let kind = section.choice("kind");
    let keys = KindKeys {
        send: answer::send(&section),
        expect: answer::expect(&section),
        steps: answer::steps(&section),
        http: http::keys(&section),
        service: service::keys(&section, files),
        exec: exec::keys(&section),
    };
    let mut exec = None;
    let kind_is_bad = kind.is_bad();
    let kind = kind.or(ProbeKindKey::Tcp);
    if !kind_is_bad {
        refuse_foreign_keys(&section, kind);
        require_answer(&section, kind, &keys);
        refuse_status_as_body(&section, kind, &keys);
        service::check(&section, kind, &keys.service);
        exec = exec::check(&section, kind, &keys.exec);
    }
    let ProbeTimes { interval, fast_interval, down_interval, timeout } = times(&section);
    let source = Arc::clone(&backends.target.source);
    let mut target = target::read(&section, backends, files);
    if kind == ProbeKindKey::Exec {
        // A command makes its own connection.
        let ProbeTarget { port, address, .. } = target;
        target = ProbeTarget { port, address, source, ..ProbeTarget::default() };
    }
    let spec = ProbeSpec {
        kind: keys.into_kind(kind),
        target,
        interval,
        fast_interval,
        down_interval,
        timeout,
        rise: section.integer("rise", 1..=COUNT_MAX).or(RISE),
        fall: section.integer("fall", 1..=COUNT_MAX).or(FALL),
    };
    section.finish();
    Some(ProbeRead { spec, exec })
}

fn refuse_foreign_keys(section: &Section<'_, '_>, kind: ProbeKindKey) {
    for (key, owners) in OWNED {
        if !owners.contains(&kind) {
            section.ignore_default(key);
        }
        if !owners.contains(&kind)
            && let Some(place) = section.key_place(key)
        {
            let (owner, kind) = (owners[0].word(), kind.word());
            let complaint = ValueError::new(format!("a probe of kind \"{kind}\" takes no {key}"));
            let help = match section.key_place("kind") {
                Some(_) => format!("{key} belongs to kind = \"{owner}\""),
                None => format!("add kind = \"{owner}\"; \"{kind}\" is the default"),
            };
            section.report.error(place, complaint.help(help));
        }
    }
}

fn require_answer(section: &Section<'_, '_>, kind: ProbeKindKey, keys: &KindKeys) {
    if kind == ProbeKindKey::SendExpect && keys.expect.is_absent() {
        section.missing("expect", "\"...\", what the answer must start with");
    }
    if kind == ProbeKindKey::Steps && keys.steps.is_absent() {
        section.missing("steps", "[{ send = \"...\" }, { expect = \"...\" }]");
    }
    if kind == ProbeKindKey::Agent && section.node("port").is_none() {
        section.missing("port", "9999, the port at which the agents listen");
    }
}

/// Reports `expect = "200"`, which compares the start of the body.
fn refuse_status_as_body(section: &Section<'_, '_>, kind: ProbeKindKey, keys: &KindKeys) {
    if let (ProbeKindKey::Http, Field::Good(expect)) = (kind, &keys.expect)
        && let Expect::Starts(ProbeBytes(text)) = expect.get_ref()
        && let Ok(text) = std::str::from_utf8(text)
        && text.len() == 3
        && text.bytes().all(|byte| byte.is_ascii_digit())
        && section.node("expect").is_some_and(|node| node.get_ref().is_str())
    {
        let complaint = ValueError::new(format!("expect = \"{text}\" compares the body"));
        let help = format!(
            "write status = \"{text}\", or expect = {{ starts = \"{text}\" }} to compare the body"
        );
        section.report.error(expect.span(), complaint.help(help));
    }
}

/// The times of a probe.
struct ProbeTimes {
    interval: Duration,
    fast_interval: Duration,
    down_interval: Duration,
    timeout: Duration,
}

/// Reads `interval`, `fast_interval`, `down_interval` and `timeout`.
///
/// The given times must agree, and defaults depend on the given times, so that `timeout`
/// is at most every interval, and `fast_interval` at most `interval`.
fn times(section: &Section<'_, '_>) -> ProbeTimes {
    let interval = interval(section, "interval");
    let down_interval = self::interval(section, "down_interval");
    let fast_interval = section.duration("fast_interval", "5s", TIME);
    let timeout = section.duration("timeout", "5s", TIME);
    if interval.is_bad() || timeout.is_bad() || fast_interval.is_bad() {
        return ProbeTimes {
            interval: INTERVAL,
            fast_interval: FAST_INTERVAL.max(TIMEOUT),
            down_interval: INTERVAL,
            timeout: TIMEOUT,
        };
    }
    let (timeout_place, fast_place) = (timeout.place(), fast_interval.place());
    let down_place = down_interval.place();
    let interval = interval.or(INTERVAL);
    let (fast, timeout) = default_times(interval, fast_interval.value(), timeout.value());
    let down = down_interval.or(interval);
    let wrong = |place: Option<Range<usize>>, what: &str, limit: Duration| {
        let place = place.unwrap_or_else(|| section.header.clone());
        section.report.error(place, ValueError::new(format!("{what} ({})", show_duration(limit))));
    };
    if timeout > interval {
        wrong(timeout_place, "a probe's timeout must not exceed its interval", interval);
    } else if fast > interval {
        wrong(fast_place, "fast_interval must not exceed interval", interval);
    } else if fast < timeout {
        wrong(fast_place, "fast_interval must not be below timeout", timeout);
    } else if down < timeout {
        wrong(down_place, "down_interval must not be below timeout", timeout);
    }
    ProbeTimes { interval, fast_interval: fast, down_interval: down, timeout }
}

fn interval(section: &Section<'_, '_>, key: &'static str) -> Field<Duration> {
    section.text(key, "a duration such as \"2s\"", |text| {
        let time = value::duration(text, TIME)?;
        at_least(time, INTERVAL_MIN)
    })
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

// === impl KindKeys ===

impl KindKeys {
    fn into_kind(self, kind: ProbeKindKey) -> ProbeKind {
        let expect = self.expect.value();
        match kind {
            ProbeKindKey::Tcp => ProbeKind::Tcp,
            ProbeKindKey::SendExpect => ProbeKind::SendExpect {
                send: self.send.or(ProbeBytes::default()),
                expect: expect.unwrap_or(Expect::Starts(ProbeBytes::default())),
            },
            ProbeKindKey::Steps => ProbeKind::Steps { steps: self.steps.or(Vec::new()) },
            ProbeKindKey::Http => ProbeKind::Http(self.http.into_probe(expect)),
            ProbeKindKey::Redis => ProbeKind::Redis(self.service.login()),
            ProbeKindKey::Postgres => ProbeKind::Postgres(self.service.postgres()),
            ProbeKindKey::Mysql => ProbeKind::Mysql(self.service.login()),
            ProbeKindKey::Smtp => ProbeKind::Smtp,
            ProbeKindKey::Ldap => ProbeKind::Ldap,
            ProbeKindKey::Dns => ProbeKind::Dns(self.service.dns()),
            ProbeKindKey::Agent => ProbeKind::Agent { send: self.send.or(ProbeBytes::default()) },
            ProbeKindKey::Exec => ProbeKind::Exec(self.exec.into_probe()),
        }
    }
}
