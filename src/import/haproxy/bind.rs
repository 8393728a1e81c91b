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

/// Why a socket gets no owner.
const OWNER: &str = "the file of a Unix socket belongs to the user and the group of Tidegate";

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
    ("uid", Dropped, OWNER),
    ("gid", Dropped, OWNER),
    ("user", Dropped, OWNER),
    ("group", Dropped, OWNER),
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
    /// The first address is a Unix socket.
    unix: bool,
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
                    // Clients of a Unix socket connect to no port.
                    ports.push(port.filter(|_| !parameters.unix));
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
        let unix = unix_socket(line.word(1));
        let mut parameters = BindParameters { unix: unix.is_some(), ..Default::default() };
        let mut words = line.from(2).iter();
        while let Some(word) = words.next() {
            match &**word {
                "transparent" => {
                    let why = "freebind = true: it listens before an interface has the address";
                    self.report.note(line.at, Approximated, why);
                    parameters.keys.push("freebind = true".to_owned());
                }
                "accept-proxy" if parameters.unix => {
                    parameters.keys.push("proxy_protocol = true".to_owned());
                }
                "mode" => {
                    let mode = words.next().map_or("", String::as_str);
                    match u16::from_str_radix(mode, 8) {
                        _ if !parameters.unix => self.report.note(line.at, WithoutEffect, ""),
                        Ok(mode) if mode & 0o222 != 0 && mode <= 0o777 => {
                            parameters.keys.push(format!("mode = \"{mode:04o}\""));
                        }
                        _ => self.report.note(line.at, NotUnderstood, "mode is no permission"),
                    }
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
        self.default_mode(line, unix, &parameters);
        parameters
    }

    /// Notes what differs for a Unix socket.
    fn default_mode(
        &mut self,
        line: &Directive,
        unix: Option<String>,
        parameters: &BindParameters,
    ) {
        let Some(unix) = unix else { return };
        let has_mode = parameters.keys.iter().any(|key| key.starts_with("mode"));
        if line.word(1).starts_with("abns@") {
            let why = "HAProxy fills the name with zero bytes: clients must use the name alone";
            self.report.note(line.at, Approximated, why);
        } else if !has_mode && !unix.contains('@') {
            let why = "the mode of the file is 0660: HAProxy uses its umask";
            self.report.note(line.at, Approximated, why);
        }
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

/// Translates `/PATH`, `unix@PATH` or `abns@NAME`. `None`: another address.
fn unix_socket(text: &str) -> Option<String> {
    let name = text.strip_prefix("abns@").or_else(|| text.strip_prefix("abnsz@"));
    match name {
        Some(name) => Some(format!("unix:@{name}")),
        None => {
            let path = text.strip_prefix("unix@").or(text.starts_with('/').then_some(text))?;
            Some(format!("unix:{path}"))
        }
    }
}

/// Translates `[ADDRESS]:PORT[-PORT]` to Tidegate's form. Also returns the port, if it is one.
///
/// # Errors
/// What Tidegate cannot listen on.
fn bind_address(text: &str, v6only: bool) -> Result<(String, Option<u16>), String> {
    if let Some(address) = unix_socket(text) {
        return Ok((address, None));
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
