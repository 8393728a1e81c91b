//! `bind` lines: addresses and their parameters.
//!
//! Called by `frontend`.

use super::Translator;
use super::lines::Directive;
use crate::draft::{DraftFrontend, quoted};
use crate::report::LineVerdict::{
    self, Approximated, Dropped, NotPossible, NotUnderstood, Translated, WithoutEffect,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Parameters without argument: verdict and reason.
const FLAGS: &[(&str, LineVerdict, &str)] = &[
    ("defer-accept", Dropped, "use client_first"),
    ("tfo", Dropped, "Tidegate uses no TCP fast open"),
    ("v6only", Translated, ""),
    ("v4v6", Translated, ""),
    ("expose-fd", WithoutEffect, ""),
    ("accept-netscaler-cip", NotPossible, "Tidegate does not read this header"),
    ("generate-certificates", WithoutEffect, ""),
    ("strict-sni", WithoutEffect, ""),
    ("prefer-client-ciphers", WithoutEffect, ""),
    ("allow-0rtt", WithoutEffect, ""),
];

/// Parameters with an argument: verdict and reason.
const WITH_ARGUMENT: &[(&str, LineVerdict, &str)] = &[
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
    /// Keys of the table of a bind.
    keys: Vec<String>,
    /// Tidegate would not understand the clients.
    impossible: bool,
}

impl Translator<'_> {
    /// Adds the addresses of a line to the frontend. Returns the ports: `None` for a range.
    pub(super) fn bind(
        &mut self,
        line: &Directive,
        frontend: &mut DraftFrontend,
    ) -> Vec<Option<u16>> {
        let parameters = self.bind_parameters(line, frontend);
        let mut ports = Vec::new();
        if line.words.len() < 2 {
            self.report.note(line.at, NotUnderstood, "it has no address");
        }
        let wanted = line.words.len() > 1 && !parameters.impossible;
        for text in line.word(1).split(',').filter(|_| wanted) {
            match bind_address(text, parameters.v6only) {
                Ok((address, port)) => {
                    let bind = written(&address, &parameters.keys);
                    self.report.note(line.at, Translated, format!("bind = {bind}"));
                    frontend.binds.push((bind, line.at));
                    ports.push(port);
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
                    parameters.keys.push("freebind = true".to_owned());
                }
                "accept-proxy" if self.can.proxy_in => {
                    parameters.keys.push("proxy_protocol = true".to_owned());
                    let why = "proxy_protocol.from is every address, as in HAProxy; narrow it to \
                               the balancers in front";
                    self.report.note(line.at, Approximated, why);
                    frontend.accept_proxy.push(line.at);
                }
                "accept-proxy" => {
                    self.report.lose(line.at, NotPossible, "Tidegate reads no PROXY header");
                    parameters.impossible = true;
                }
                "ssl" => {
                    self.report.lose(line.at, NotPossible, "Tidegate does not decrypt TLS");
                    parameters.impossible = true;
                }
                "interface" => {
                    let name = words.next().cloned().unwrap_or_default();
                    parameters.keys.push(format!("interface = {}", quoted(&name)));
                }
                "backlog" => match words.next().map(|length| length.parse::<u64>()) {
                    Some(Ok(length)) => {
                        parameters.keys.push(format!("backlog = {}", length.clamp(1, 65_535)));
                    }
                    _ => self.report.note(line.at, NotUnderstood, "backlog is not a number"),
                },
                "v6only" => parameters.v6only = true,
                word => self.bind_parameter(line, word, &mut words),
            }
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

fn written(address: &str, keys: &[String]) -> String {
    match keys {
        [] => quoted(address),
        keys => format!("{{ address = {}, {} }}", quoted(address), keys.join(", ")),
    }
}

/// Translates `[ADDRESS]:PORT[-PORT]` to Tidegate's form. Also returns the port, if it is one.
///
/// # Errors
/// What Tidegate cannot listen on.
fn bind_address(text: &str, v6only: bool) -> Result<(String, Option<u16>), String> {
    if text.starts_with('/') || text.starts_with("unix@") || text.starts_with("abns@") {
        return Err("frontends listen on IP addresses".to_owned());
    }
    let only_v6 = text.starts_with("ipv6@");
    let text = text.strip_prefix("ipv4@").or(text.strip_prefix("ipv6@")).unwrap_or(text);
    if let Some((kind, _)) = text.split_once('@') {
        return Err(format!("frontends cannot listen on {kind}@"));
    }
    let Some((host, ports)) = text.rsplit_once(':') else {
        return Err("the port is missing".to_owned());
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let one = ports.parse::<u16>().ok();
    if one.is_none() && !ports.split('-').all(|port| port.parse::<u16>().is_ok()) {
        return Err(format!("{ports} is not a port"));
    }
    let host: IpAddr = match host {
        "" | "*" if only_v6 => Ipv6Addr::UNSPECIFIED.into(),
        "" | "*" => Ipv4Addr::UNSPECIFIED.into(),
        host => host.parse().map_err(|_| format!("{host} is a name; give an address"))?,
    };
    // The usual setting of Linux gives `::` both families.
    let both = host == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !v6only && !only_v6;
    let host = match host {
        _ if both => "*".to_owned(),
        IpAddr::V4(host) => host.to_string(),
        IpAddr::V6(host) => format!("[{host}]"),
    };
    Ok((format!("{host}:{ports}"), one))
}
