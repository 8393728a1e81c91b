//! `bind` lines: addresses and their parameters.
//!
//! Called by `frontend`.

use super::Translator;
use super::lines::Directive;
use crate::draft::{DraftFrontend, quoted};
use crate::report::LineVerdict::{
    self, Approximated, Dropped, NotPossible, NotUnderstood, Translated, WithoutEffect,
};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Most ports of one range.
const RANGE_MAX: u16 = 8_192;

/// Parameters without argument: verdict and reason.
const FLAGS: &[(&str, LineVerdict, &str)] = &[
    ("defer-accept", Dropped, "use first_byte_timeout"),
    ("tfo", Dropped, "Tidegate uses no TCP fast open"),
    ("v6only", Translated, ""),
    ("v4v6", Translated, ""),
    ("expose-fd", WithoutEffect, ""),
    ("ssl", NotPossible, "Tidegate does not decrypt TLS"),
    ("accept-netscaler-cip", NotPossible, "Tidegate does not read this header"),
    ("generate-certificates", WithoutEffect, ""),
    ("strict-sni", WithoutEffect, ""),
    ("prefer-client-ciphers", WithoutEffect, ""),
    ("allow-0rtt", WithoutEffect, ""),
];

/// Parameters with an argument: verdict and reason.
const WITH_ARGUMENT: &[(&str, LineVerdict, &str)] = &[
    ("backlog", Dropped, "Tidegate chooses the length of the listen queue"),
    ("mss", Dropped, "it has no counterpart"),
    ("tcp-ut", Dropped, "see user_timeout"),
    ("nice", Dropped, "it tunes HAProxy"),
    ("process", Dropped, "every worker accepts"),
    ("thread", Dropped, "every worker accepts"),
    ("shards", Dropped, "every worker accepts"),
    ("name", WithoutEffect, ""),
    ("id", WithoutEffect, ""),
    ("guid-prefix", WithoutEffect, ""),
    ("label", WithoutEffect, ""),
    ("mode", WithoutEffect, ""),
    ("uid", WithoutEffect, ""),
    ("gid", WithoutEffect, ""),
    ("user", WithoutEffect, ""),
    ("group", WithoutEffect, ""),
    ("level", WithoutEffect, ""),
    ("severity-output", WithoutEffect, ""),
    ("maxconn", Approximated, "connections_max is for all binds of a frontend: not written"),
    ("interface", NotPossible, "choose an address of the interface"),
    ("namespace", NotPossible, "Tidegate uses one network namespace"),
    ("crt", WithoutEffect, ""),
    ("crt-list", WithoutEffect, ""),
    ("ca-file", WithoutEffect, ""),
    ("crl-file", WithoutEffect, ""),
    ("verify", WithoutEffect, ""),
    ("alpn", WithoutEffect, ""),
    ("npn", WithoutEffect, ""),
    ("ciphers", WithoutEffect, ""),
    ("ciphersuites", WithoutEffect, ""),
    ("curves", WithoutEffect, ""),
    ("ecdhe", WithoutEffect, ""),
    ("proto", WithoutEffect, ""),
    ("ssl-min-ver", WithoutEffect, ""),
    ("ssl-max-ver", WithoutEffect, ""),
    ("no-tls-tickets", WithoutEffect, ""),
];

/// What the parameters say.
#[derive(Default)]
struct BindParameters {
    v6only: bool,
    freebind: bool,
    accept_proxy: bool,
}

impl Translator<'_> {
    /// Adds the addresses of a line to the frontend. Returns the ports.
    pub(super) fn bind(&mut self, line: &Directive, frontend: &mut DraftFrontend) -> Vec<u16> {
        let parameters = self.bind_parameters(line, frontend);
        let mut ports = Vec::new();
        if line.words.len() < 2 {
            self.report.note(line.at, NotUnderstood, "it has no address");
        }
        for text in line.word(1).split(',').filter(|_| line.words.len() > 1) {
            match bind_addresses(text, parameters.v6only) {
                Ok(addresses) => {
                    for (address, port) in addresses {
                        frontend.binds.push((written(&address, &parameters), line.at));
                        ports.push(port);
                    }
                    self.report.note(line.at, Translated, "bind");
                }
                Err(why) => self.report.lose(line.at, NotPossible, why),
            }
        }
        ports
    }

    fn bind_parameters(
        &mut self,
        line: &Directive,
        frontend: &mut DraftFrontend,
    ) -> BindParameters {
        let mut parameters = BindParameters::default();
        let mut words = line.from(2).iter();
        while let Some(word) = words.next() {
            match &**word {
                "transparent" => {
                    let why = "freebind = true: it listens before an interface has the address";
                    self.report.note(line.at, Approximated, why);
                    parameters.freebind = true;
                }
                "accept-proxy" if self.can.proxy_in => {
                    parameters.accept_proxy = true;
                    let why = "every client can send a PROXY header, as in HAProxy; narrow \
                               proxy_protocol.from to the balancers in front";
                    self.report.note(line.at, Approximated, why);
                    frontend.accept_proxy.push(line.at);
                }
                "accept-proxy" => {
                    let why = "Tidegate reads no PROXY header";
                    self.report.lose(line.at, NotPossible, why);
                }
                word => self.bind_parameter(line, word, &mut words),
            }
            parameters.v6only |= word == "v6only";
        }
        parameters
    }

    fn bind_parameter(
        &mut self,
        line: &Directive,
        word: &str,
        words: &mut std::slice::Iter<'_, String>,
    ) {
        let find = |rows: &[(&str, LineVerdict, &'static str)]| {
            rows.iter().find(|row| row.0 == word).map(|row| (row.1, row.2))
        };
        let known = find(FLAGS).or_else(|| {
            let row = find(WITH_ARGUMENT)?;
            words.next();
            Some(row)
        });
        let without_tls = word.starts_with("no-") || word.starts_with("force-");
        match known {
            Some((verdict, why)) => self.report.note(line.at, verdict, why),
            None if without_tls => self.report.note(line.at, WithoutEffect, ""),
            None => {
                let why = format!("the parameter {word} is not known");
                self.report.note(line.at, NotUnderstood, why);
            }
        }
    }
}

fn written(address: &str, parameters: &BindParameters) -> String {
    let mut table = format!("address = {}", quoted(address));
    if parameters.freebind {
        table.push_str(", freebind = true");
    }
    if parameters.accept_proxy {
        table.push_str(", proxy_protocol = true");
    }
    match parameters.freebind || parameters.accept_proxy {
        true => format!("{{ {table} }}"),
        false => quoted(address),
    }
}

/// Translates `[ADDRESS]:PORT[-PORT]` to Tidegate's form, with the port.
///
/// # Errors
/// What Tidegate cannot listen on.
fn bind_addresses(text: &str, v6only: bool) -> Result<Vec<(String, u16)>, String> {
    if text.starts_with('/') || text.starts_with("unix@") || text.starts_with("abns@") {
        return Err("frontends listen on IP addresses".to_owned());
    }
    let (only_v4, only_v6) = (text.starts_with("ipv4@"), text.starts_with("ipv6@"));
    let text = text.strip_prefix("ipv4@").or(text.strip_prefix("ipv6@")).unwrap_or(text);
    if let Some((kind, _)) = text.split_once('@') {
        return Err(format!("frontends cannot listen on {kind}@"));
    }
    let Some((host, ports)) = text.rsplit_once(':') else {
        return Err("the port is missing".to_owned());
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let number = |text: &str| text.parse::<u16>().map_err(|_| format!("{text} is not a port"));
    let (first, last) = match ports.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(ports)?, number(ports)?),
    };
    if first > last || first == 0 || last - first >= RANGE_MAX {
        return Err(format!("{ports} is not a range of ports"));
    }
    let host: IpAddr = match host {
        "" | "*" if only_v6 => Ipv6Addr::UNSPECIFIED.into(),
        "" | "*" => [0, 0, 0, 0].into(),
        host => host.parse().map_err(|_| format!("{host} is a name; give an address"))?,
    };
    // HAProxy leaves the choice to the kernel, and the usual default of Linux is both families.
    let both = host == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !v6only && !only_v6 && !only_v4;
    let one = |port| match both {
        true => (format!("*:{port}"), port),
        false => (SocketAddr::new(host, port).to_string(), port),
    };
    Ok((first..=last).map(one).collect())
}
