//! `bind` of a frontend: addresses, ranges of ports, options.
//!
//! Called by `frontend`. It never reads other keys; `cross` reports addresses that clash.

use std::ops::Range;

use toml::de::DeValue;

use super::BINDS_MAX;
use crate::Spot;
use crate::address::{self, BindAddresses};
use crate::file::{Field, Section, ValueNode};
use tidegate_core::model::{BACKLOG_MAX, Bind, BindKey, BindOptions};

use crate::value::ValueError;

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
    for (model, addresses, place) in nodes.iter().filter_map(|node| element(section, node)) {
        let pair = addresses.hosts.len() == 2;
        for port in addresses.ports {
            for mut address in addresses.hosts.iter().copied() {
                if !count.admits(&place) {
                    continue;
                }
                address.set_port(port);
                let interface = model.key.interface.clone();
                let key = BindKey::tcp(address).on(interface);
                let options = BindOptions { if_ipv6: pair && address.is_ipv6(), ..model.options };
                section.report.keep(Spot::Bind(key.clone()), Some(place.clone()));
                binds.push((Bind { key, options }, place.clone()));
            }
        }
    }
    binds
}

/// Reads one element of `bind`. Returns a bind with its options, its addresses and its
/// place.
fn element(
    section: &Section<'_, '_>,
    node: &ValueNode<'_>,
) -> Option<(Bind, BindAddresses, Range<usize>)> {
    match node.get_ref() {
        DeValue::String(text) => match address::bind_addresses(text) {
            Ok(addresses) => {
                let model = Bind::tcp(*addresses.hosts.first()?);
                Some((model, addresses, node.span()))
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
fn table_of_bind(table: Section<'_, '_>) -> Option<(Bind, BindAddresses, Range<usize>)> {
    let wants = "an address such as \"0.0.0.0:8080\"";
    let addresses = table.text("address", wants, address::bind_addresses);
    if addresses.is_absent() {
        table.missing("address", "\"0.0.0.0:8080\"");
    }
    let interface = table.text("interface", "the name of an interface", address::interface_name);
    let freebind = table.boolean("freebind");
    if let (Field::Good(addresses), Field::Good(free)) = (&addresses, &freebind)
        && addresses.get_ref().hosts.iter().any(|address| address.ip().is_unspecified())
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
    };
    table.finish();
    let addresses = addresses.good()?;
    let (place, addresses) = (addresses.span(), addresses.into_inner());
    let key = BindKey::tcp(*addresses.hosts.first()?).on(interface.value());
    Some((Bind { key, options }, addresses, place))
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
