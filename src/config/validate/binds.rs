//! `bind` of a frontend: addresses, ranges of ports, Unix sockets, options.
//!
//! Called by `frontend`. It never reads other keys; `cross` reports addresses that clash.

use std::ops::Range;
use std::sync::Arc;

use toml::de::DeValue;

use super::BINDS_MAX;
use crate::Spot;
use crate::address::{self, BindPlace};
use crate::file::{Field, Section, ValueNode};
use crate::value::{ValueError, shown};
use tidegate_core::model::{BACKLOG_MAX, Bind, BindKey, BindOptions, SOCKET_MODE};

/// A bind with its place.
type PlacedBind = (Bind, Range<usize>);

/// The number of binds of the file until now.
#[derive(Debug, Default)]
pub(super) struct BindCount {
    /// Binds beyond [`BINDS_MAX`] are counted but not kept.
    pub(super) total: usize,
    /// Place of the first bind beyond the bound.
    pub(super) beyond: Option<Range<usize>>,
}

/// Reads `bind`: an address, a table of an address and its options, or a list of both.
pub(super) fn read(section: &Section<'_, '_>, count: &mut BindCount) -> Vec<PlacedBind> {
    let (key, example) = ("bind", "[\"0.0.0.0:8080\"]");
    let Some(node) = section.node(key) else {
        section.missing(key, example);
        return Vec::new();
    };
    let nodes = match node.get_ref() {
        DeValue::String(_) | DeValue::Table(_) => std::slice::from_ref(node),
        DeValue::Array(array) => {
            if array.is_empty() {
                let complaint = ValueError::new("bind lists no address");
                section
                    .report
                    .error(node.span(), complaint.help(format!("write bind = {example}")));
            }
            array
        }
        _ => {
            let _: Field<()> = section.wrong_type(
                key,
                node,
                "an address such as \"0.0.0.0:8080\", or a list of addresses",
            );
            return Vec::new();
        }
    };
    let mut binds = Vec::with_capacity(nodes.len());
    for element in nodes.iter().filter_map(|node| element(section, node)) {
        let BindElement { at, interface, options, place } = element;
        let mut keep = |key: BindKey, options: BindOptions| {
            if count.admits(&place) {
                section.report.keep(Spot::Bind(key.clone()), Some(place.clone()));
                binds.push((Bind { key, options }, place.clone()));
            }
        };
        match at {
            BindPlace::Unix(path) => keep(BindKey::unix(path), options),
            BindPlace::Ip(addresses) => {
                let pair = addresses.hosts.len() == 2;
                for port in addresses.ports {
                    for mut address in addresses.hosts.iter().copied() {
                        address.set_port(port);
                        let if_ipv6 = pair && address.is_ipv6();
                        let key = BindKey::tcp(address).on(interface.clone());
                        keep(key, BindOptions { if_ipv6, ..options });
                    }
                }
            }
        }
    }
    binds
}

/// One element of `bind`.
struct BindElement {
    at: BindPlace,
    interface: Option<Arc<str>>,
    options: BindOptions,
    place: Range<usize>,
}

fn element(section: &Section<'_, '_>, node: &ValueNode<'_>) -> Option<BindElement> {
    match node.get_ref() {
        DeValue::String(text) => match address::bind_place(text) {
            Ok(at) => {
                let (interface, options) = (None, BindOptions::default());
                Some(BindElement { at, interface, options, place: node.span() })
            }
            Err(complaint) => {
                section.report.error(node.span(), complaint.named("bind"));
                None
            }
        },
        DeValue::Table(table) => {
            let label = "a table of bind".to_owned();
            table_of_bind(Section::new(section.report, table, label, node.span()))
        }
        _ => {
            let wants = "addresses such as \"0.0.0.0:8080\", or tables with an address";
            let _: Field<()> = section.wrong_type("bind", node, wants);
            None
        }
    }
}

/// Reads `{ address = "...", ... }`.
fn table_of_bind(table: Section<'_, '_>) -> Option<BindElement> {
    let wants = "an address such as \"0.0.0.0:8080\"";
    let at = table.text("address", wants, address::bind_place);
    if at.is_absent() {
        table.missing("address", "\"0.0.0.0:8080\"");
    }
    let interface = table.text("interface", "the name of an interface", address::interface_name);
    let freebind = table.boolean("freebind");
    let wildcard = |at: &BindPlace| match at {
        BindPlace::Ip(to) => to.hosts.iter().any(|address| address.ip().is_unspecified()),
        BindPlace::Unix(_) => false,
    };
    if let (Field::Good(at), Field::Good(free)) = (&at, &freebind)
        && wildcard(at.get_ref())
        && *free.get_ref()
    {
        let complaint = ValueError::new("freebind has no effect on a wildcard address");
        let help = "remove it: a wildcard address always exists";
        table.report.error(free.span(), complaint.help(help));
    }
    let options = BindOptions {
        freebind: freebind.or(false),
        if_ipv6: false,
        backlog: table.integer("backlog", 1..=BACKLOG_MAX).or(BACKLOG_MAX),
        mark: table.integer("mark", 0..=u32::MAX).or(0),
        dscp: table.integer("dscp", 0..=63).or(0),
        proxy_protocol: table.boolean("proxy_protocol").or(false),
        mode: table.text("mode", "permissions such as \"0660\"", socket_mode).or(SOCKET_MODE),
    };
    if let Field::Good(at) = &at {
        refuse_options_of_the_other_kind(&table, at.get_ref());
    }
    table.finish();
    let at = at.good()?;
    let (place, at) = (at.span(), at.into_inner());
    Some(BindElement { at, interface: interface.value(), options, place })
}

/// Parses permissions: three or four octal digits.
fn socket_mode(text: &str) -> Result<u16, ValueError> {
    let octal = (3..=4).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    let mode = u16::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777);
    let complaint = match mode {
        Some(mode) if mode & 0o222 != 0 => return Ok(mode),
        Some(_) => ValueError::new(format!("with {} no user can connect", shown(text))),
        None => ValueError::new(format!("{} is no permission of a file", shown(text))),
    };
    Err(complaint.help("clients need the right to write; write \"0660\" or \"0666\""))
}

/// Reports options that have no effect on this kind of socket.
fn refuse_options_of_the_other_kind(table: &Section<'_, '_>, at: &BindPlace) {
    let (keys, why): (&[&'static str], &str) = match at {
        BindPlace::Unix(path) if path.as_os_str().as_encoded_bytes().starts_with(b"@") => {
            (&["interface", "freebind", "mark", "dscp", "mode"], "an abstract Unix socket")
        }
        BindPlace::Unix(_) => (&["interface", "freebind", "mark", "dscp"], "a Unix socket"),
        BindPlace::Ip(_) => (&["mode"], "an IP address"),
    };
    for key in keys {
        if let Some(place) = table.value_place(key) {
            let complaint = ValueError::new(format!("{key} has no effect on {why}"));
            table.report.error(place, complaint);
        }
    }
}

// === impl BindCount ===

impl BindCount {
    /// Counts a bind. Returns whether it is within the bound.
    fn admits(&mut self, place: &Range<usize>) -> bool {
        self.total = self.total.saturating_add(1);
        if self.total > BINDS_MAX && self.beyond.is_none() {
            self.beyond = Some(place.clone());
        }
        self.total <= BINDS_MAX
    }
}
