//! The text form of `bind`, as in a configuration file.
//!
//! Used by the model's `Serialize` implementation. `config` parses the same form. Nothing
//! here parses.

use super::{BACKLOG_MAX, Bind, BindAddr, BindOptions, SOCKET_MODE};
use serde::Serialize;
use serde::ser::Serializer;
use std::sync::Arc;

/// One element of `bind`, before it is written.
struct Run<'b> {
    first: &'b Bind,
    /// Whether the IPv6 wildcard belongs to it.
    both_families: bool,
    last_port: u16,
}

/// One element of `bind` with options.
#[derive(Serialize)]
struct BindForm<'b> {
    address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<&'b Arc<str>>,
    #[serde(skip_serializing_if = "is_default")]
    freebind: bool,
    #[serde(skip_serializing_if = "is_longest")]
    backlog: u16,
    #[serde(skip_serializing_if = "is_default")]
    mark: u32,
    #[serde(skip_serializing_if = "is_default")]
    dscp: u8,
    #[serde(skip_serializing_if = "is_default")]
    proxy_protocol: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
}

/// An element of `bind`: the address alone if no option is set.
#[derive(Serialize)]
#[serde(untagged)]
enum Element<'b> {
    Address(String),
    Table(BindForm<'b>),
}

/// Writes addresses with their options, ports in a row as a range, and pairs of wildcards
/// as `*:PORT`.
pub(super) fn binds<S: Serializer>(binds: &[Bind], serializer: S) -> Result<S::Ok, S::Error> {
    let mut runs: Vec<Run<'_>> = Vec::new();
    for (index, bind) in binds.iter().enumerate().filter(|(_, bind)| !bind.options.if_ipv6) {
        let both_families = binds.get(index + 1).is_some_and(|next| next.options.if_ipv6);
        match runs.last_mut().filter(|run| run.continues_with(bind, both_families)) {
            Some(run) => run.last_port = port(bind),
            None => runs.push(Run { first: bind, both_families, last_port: port(bind) }),
        }
    }
    serializer.collect_seq(runs.iter().map(Run::element))
}

fn port(bind: &Bind) -> u16 {
    bind.key.socket_addr().map_or(0, |address| address.port())
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_longest(backlog: &u16) -> bool {
    *backlog == BACKLOG_MAX
}

// === impl Run ===

impl<'b> Run<'b> {
    fn continues_with(&self, bind: &Bind, both_families: bool) -> bool {
        let next = self.last_port.checked_add(1);
        let Some(address) = self.first.key.socket_addr() else { return false };
        let expected = next.map(|port| {
            let mut address = address;
            address.set_port(port);
            BindAddr::Ip(address)
        });
        expected.as_ref() == Some(&bind.key.address)
            && self.first.key.interface == bind.key.interface
            && self.first.options == bind.options
            && self.both_families == both_families
    }

    fn element(&self) -> Element<'b> {
        let BindOptions { freebind, backlog, mark, dscp, proxy_protocol, if_ipv6: _, mode } =
            self.first.options;
        let mode = (mode != SOCKET_MODE).then(|| format!("{mode:04o}"));
        let (address, interface) = (self.address(), self.first.key.interface.as_ref());
        if interface.is_none() && self.first.options == BindOptions::default() {
            return Element::Address(address);
        }
        let options =
            BindForm { address, interface, freebind, backlog, mark, dscp, proxy_protocol, mode };
        Element::Table(options)
    }

    fn address(&self) -> String {
        let Some(address) = self.first.key.socket_addr() else {
            return self.first.key.to_string();
        };
        let host = match address {
            _ if self.both_families => format!("*:{}", address.port()),
            address => address.to_string(),
        };
        match address.port() == self.last_port {
            true => host,
            false => format!("{host}-{}", self.last_port),
        }
    }
}
