//! `[frontend.NAME.proxy_protocol]` and `proxy_protocol` of a pool.
//!
//! Called by `frontend` and `pool`. It rejects settings without effect. It never reads other
//! sections.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::frontend::one_or_more;
use super::sources;
use crate::file::{Field, Section};
use crate::value::{self, DurationRange, ValueError, shown};
use tidegate_core::limits::access_list::AccessList;
use tidegate_core::model::{
    Bind, OtherPeers, PassedTlv, ProxyHeaderSource, ProxyHeaderSpec, ProxyVersion, SentTlv,
};
use tidegate_core::proxy_protocol::tlv;

const TIMEOUT: Duration = Duration::from_secs(3);

/// `timeout`. A longer wait would only keep connections without a client open.
const TIMEOUTS: DurationRange = Duration::from_millis(10)..=Duration::from_secs(60);

/// Most ranges in `from`: the proxies in front of one frontend are few.
const FROM_MAX: usize = 1_024;

/// Most elements of `pass`: more than there are ranges of types in use.
const PASS_MAX: usize = 32;

/// Reads the peers that send headers. `binds` are the binds of the frontend with their places.
pub(super) fn of_frontend<'b>(
    frontend: &Section<'_, '_>,
    name: &str,
    binds: impl Iterator<Item = (&'b Bind, &'b Range<usize>)>,
) -> Option<Arc<ProxyHeaderSource>> {
    let key = "proxy_protocol";
    let label = format!("[frontend.{}.{key}]", value::cut(name));
    let given = frontend.key_place(key);
    let section = frontend.table(key, label);
    let expecting = binds.filter(|(bind, _)| bind.options.proxy_protocol);
    let expecting: Vec<_> = expecting.collect();
    let unix_only = !expecting.is_empty() && expecting.iter().all(|(bind, _)| is_unix(bind));
    match (&given, expecting.first()) {
        (None, Some(_)) if unix_only && frontend.node(key).is_none() => {
            return Some(Arc::new(any_unix_peer(TIMEOUT)));
        }
        (None, Some((_, place))) if frontend.node(key).is_none() => {
            let message = "a bind with proxy_protocol needs the peers that send headers";
            let help =
                format!("add proxy_protocol = {{ from = [\"10.0.0.0/8\"] }} to [frontend.{name}]");
            frontend.report.error((*place).clone(), ValueError::new(message).help(help));
        }
        (Some(place), None) if frontend.value_place("bind").is_some() => {
            let message = "proxy_protocol has no effect: no bind has proxy_protocol = true";
            let help = "write bind = { address = \"0.0.0.0:8080\", proxy_protocol = true }";
            frontend.report.error(place.clone(), ValueError::new(message).help(help));
        }
        _ => {}
    }
    let section = section?;
    if unix_only {
        let source = any_unix_peer(section.duration("timeout", "3s", TIMEOUTS).or(TIMEOUT));
        for key in ["from", "others"] {
            if let Some(place) = section.key_place(key) {
                let message = format!("{key} has no effect: only Unix sockets expect headers");
                let help = "the mode of the file decides which peers can connect";
                section.report.error(place, ValueError::new(message).help(help));
            }
            section.node(key);
        }
        section.finish();
        return Some(Arc::new(source));
    }
    let wants = ("a range or a list of ranges", "ranges such as \"10.0.0.0/8\"");
    let from = one_or_more(&section, "from", wants, "[\"10.0.0.0/8\"]", sources::range);
    if let Some(first) = from.get(FROM_MAX) {
        let message = format!("from has {} ranges, more than {FROM_MAX}", from.len());
        section.report.error(first.span(), ValueError::new(message));
    }
    let mut from: Vec<_> = from.into_iter().map(Spanned::into_inner).collect();
    from.sort_unstable();
    from.dedup();
    let source = ProxyHeaderSource {
        peers: AccessList::new(&from, &[]),
        from,
        others: section.choice("others").or(OtherPeers::Refuse),
        timeout: section.duration("timeout", "3s", TIMEOUTS).or(TIMEOUT),
    };
    section.finish();
    // A default can be that of frontends that expect no headers.
    (!expecting.is_empty()).then(|| Arc::new(source))
}

fn is_unix(bind: &Bind) -> bool {
    bind.key.unix_path().is_some()
}

/// The peers of Unix sockets: the mode of the file decides which of them can connect.
fn any_unix_peer(timeout: Duration) -> ProxyHeaderSource {
    ProxyHeaderSource {
        peers: AccessList::new(&[], &[]),
        from: Vec::new(),
        others: OtherPeers::Refuse,
        timeout,
    }
}

/// Reads the header that backends get: `"off"`, `"v1"`, `"v2"` or a table.
pub(super) fn of_pool(pool: &Section<'_, '_>) -> Option<ProxyHeaderSpec> {
    let key = "proxy_protocol";
    let node = pool.node(key)?;
    match node.get_ref() {
        DeValue::String(_) => {
            let version = pool.text(key, "a string", |text| match text {
                "off" => Ok(None),
                other => value::choice(other)
                    .map(Some)
                    .map_err(|why: ValueError| why.help("known values: \"off\", \"v1\", \"v2\"")),
            });
            let version = version.or(None)?;
            Some(ProxyHeaderSpec { version, crc32c: false, send: Vec::new(), pass: Vec::new() })
        }
        DeValue::Table(table) => {
            let label = format!("the table of {key}");
            Some(header(Section::new(pool.report, table, label, node.span())))
        }
        _ => {
            let wants = "\"off\", \"v1\", \"v2\", or a table such as { version = \"v2\" }";
            let _: Field<()> = pool.wrong_type(key, node, wants);
            None
        }
    }
}

fn header(table: Section<'_, '_>) -> ProxyHeaderSpec {
    let version = table.choice("version");
    if version.is_absent() {
        table.missing("version", "\"v2\"");
    }
    let crc32c = table.boolean("crc32c").or(false);
    let send = list(&table, "send", "words such as \"authority\"", |node| match node {
        DeValue::String(word) => Some(value::choice::<SentTlv>(word)),
        _ => None,
    });
    let pass = list(&table, "pass", "types such as 0xEA or \"0xE0-0xEF\"", passed);
    if pass.len() > PASS_MAX {
        let message = format!("pass has {} elements, more than {PASS_MAX}", pass.len());
        table.report.error(table.header.clone(), ValueError::new(message));
    }
    let version = version.or(ProxyVersion::V2);
    for key in ["crc32c", "send", "pass"] {
        if let (ProxyVersion::V1, Some(place)) = (version, table.key_place(key)) {
            let complaint = ValueError::new(format!("{key} has no effect with version = \"v1\""));
            table.report.error(place, complaint.help("write version = \"v2\""));
        }
    }
    table.finish();
    ProxyHeaderSpec { version, crc32c, send, pass }
}

/// Reads a list. `read` returns `None` for a value of the wrong type.
fn list<T: PartialEq>(
    table: &Section<'_, '_>,
    key: &'static str,
    wants: &str,
    read: impl Fn(&DeValue<'_>) -> Option<Result<T, ValueError>>,
) -> Vec<T> {
    let Some(node) = table.node(key) else { return Vec::new() };
    let DeValue::Array(nodes) = node.get_ref() else {
        let _: Field<()> = table.wrong_type(key, node, &format!("a list of {wants}"));
        return Vec::new();
    };
    let mut values = Vec::with_capacity(nodes.len());
    for node in nodes {
        match read(node.get_ref()) {
            None => {
                let _: Field<()> = table.wrong_type(key, node, wants);
            }
            Some(Err(complaint)) => table.report.error(node.span(), complaint.named(key)),
            Some(Ok(value)) if values.contains(&value) => {
                let complaint = ValueError::new(format!("{key} lists a value twice"));
                table.report.error(node.span(), complaint);
            }
            Some(Ok(value)) => values.push(value),
        }
    }
    values
}

/// Reads a type such as `0xEA` or `"0xEA"`, or a range such as `"0xE0-0xEF"`.
fn passed(node: &DeValue<'_>) -> Option<Result<PassedTlv, ValueError>> {
    match node {
        DeValue::Integer(number) => {
            let value = i128::from_str_radix(number.as_str(), number.radix()).ok();
            let kind = value.and_then(|value| u8::try_from(value).ok());
            Some(kind.ok_or_else(|| not_a_type(&number.to_string())).and_then(|k| tlvs(k, k)))
        }
        DeValue::String(text) => {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let kind = |text: &str| {
                let digits = text.trim().strip_prefix("0x").filter(|hex| !hex.starts_with('+'));
                let kind = digits.and_then(|hex| u8::from_str_radix(hex, 16).ok());
                kind.ok_or_else(|| not_a_type(text.trim()))
            };
            Some(kind(first).and_then(|first| tlvs(first, kind(last)?)))
        }
        _ => None,
    }
}

fn not_a_type(text: &str) -> ValueError {
    ValueError::new(format!("{} is not the type of a TLV", shown(text)))
        .help("write a type such as 0xEA, or a range such as \"0xE0-0xEF\"")
}

fn tlvs(first: u8, last: u8) -> Result<PassedTlv, ValueError> {
    if first > last {
        return Err(ValueError::new(format!(
            "the range 0x{first:02X}-0x{last:02X} ends before it starts"
        )));
    }
    if (first..=last).contains(&tlv::CRC32C) {
        return Err(ValueError::new("the checksum of another header (0x03) cannot be passed on")
            .help("write crc32c = true for a checksum of the new header"));
    }
    Ok(PassedTlv { first, last })
}
