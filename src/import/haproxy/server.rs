//! `server`, `default-server` and `server-template`: parameters and addresses.
//!
//! Called by `pool`.

use super::lines::{Directive, ProxyLines};
use crate::available::Available;
use crate::report::{ImportReport, LineVerdict, SourceLine};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Parameters by name: the argument and the line.
pub(super) type Parameters = BTreeMap<String, (String, SourceLine)>;

/// A server with everything that applies to it.
pub(super) struct HaproxyServer {
    pub(super) name: String,
    pub(super) address: String,
    pub(super) at: SourceLine,
    pub(super) parameters: Parameters,
    /// Number of servers that a `server-template` makes; 1 for `server`.
    pub(super) copies: u64,
}

/// Parameters without argument.
const FLAGS: &[&str] = &[
    "check",
    "backup",
    "disabled",
    "enabled",
    "send-proxy",
    "send-proxy-v2",
    "send-proxy-v2-ssl",
    "send-proxy-v2-ssl-cn",
    "check-send-proxy",
    "check-ssl",
    "ssl",
    "stick",
    "non-stick",
    "tfo",
    "agent-check",
    "check-via-socks4",
    "allow-0rtt",
    "strict-maxconn",
    "tls-tickets",
    "check-reuse-pool",
    "sslv3",
    "tlsv10",
    "tlsv11",
    "tlsv12",
    "tlsv13",
    "ssl-reuse",
    "verifyhost",
];

/// Parameters with one argument.
const WITH_ARGUMENT: &[&str] = &[
    "addr",
    "agent-addr",
    "agent-inter",
    "agent-port",
    "agent-send",
    "alpn",
    "ca-file",
    "check-alpn",
    "check-proto",
    "check-sni",
    "ciphers",
    "ciphersuites",
    "cookie",
    "crl-file",
    "crt",
    "curves",
    "downinter",
    "error-limit",
    "fall",
    "fastinter",
    "guid",
    "hash-key",
    "id",
    "init-addr",
    "init-state",
    "inter",
    "log-bufsize",
    "log-proto",
    "maxconn",
    "maxqueue",
    "max-reuse",
    "minconn",
    "namespace",
    "npn",
    "observe",
    "on-error",
    "on-marked-down",
    "on-marked-up",
    "pool-low-conn",
    "pool-max-conn",
    "pool-purge-delay",
    "port",
    "proto",
    "proxy-v2-options",
    "redir",
    "resolve-net",
    "resolve-opts",
    "resolve-prefer",
    "resolvers",
    "rise",
    "shard",
    "slowstart",
    "sni",
    "socks4",
    "source",
    "ssl-max-ver",
    "ssl-min-ver",
    "tcp-md5sig",
    "tcp-ut",
    "track",
    "usesrc",
    "interface",
    "verify",
    "verifyhost",
    "weight",
    "ws",
];

/// Returns the servers of a section, with `default-server` applied in the order of the lines.
pub(super) fn servers(in_force: &ProxyLines<'_>, report: &mut ImportReport) -> Vec<HaproxyServer> {
    let mut lines: Vec<(&Directive, &str)> = Vec::new();
    for keyword in ["default-server", "server", "server-template"] {
        lines.extend(in_force.all(keyword).iter().map(|line| (*line, keyword)));
    }
    // `default-server` of `defaults` comes first, because its section does.
    lines.sort_by_key(|(line, _)| line.at);
    let mut defaults = Parameters::new();
    let mut servers = Vec::new();
    for (line, keyword) in lines {
        let (start, copies) = match keyword {
            "default-server" => (1, 0),
            "server" => (3, 1),
            _ => (4, template_copies(line.word(2))),
        };
        let mut parameters = if copies == 0 { Parameters::new() } else { defaults.clone() };
        let wrong = read(line.from(start), line.at, &mut parameters);
        for word in &wrong {
            let why = format!("the parameter {word} is not known");
            report.note(line.at, LineVerdict::NotUnderstood, why);
        }
        match keyword {
            "default-server" => defaults.extend(parameters),
            _ if copies == 0 || line.words.len() < start => {
                report.note(line.at, LineVerdict::NotUnderstood, "it has no address");
            }
            _ => servers.push(HaproxyServer {
                name: line.word(1).to_owned(),
                address: line.word(start - 1).to_owned(),
                at: line.at,
                parameters,
                copies,
            }),
        }
    }
    servers
}

/// Returns the number of servers of `NUMBER` or `FROM-TO`.
fn template_copies(text: &str) -> u64 {
    match text.split_once('-') {
        Some((from, to)) => match (from.parse::<u64>(), to.parse::<u64>()) {
            (Ok(from), Ok(to)) if from <= to => to - from + 1,
            _ => 0,
        },
        None => text.parse().unwrap_or(0),
    }
}

/// Reads parameters and returns the words that it does not know.
fn read(words: &[String], at: SourceLine, parameters: &mut Parameters) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if let Some(name) = word.strip_prefix("no-").filter(|name| FLAGS.contains(name)) {
            parameters.remove(name);
        } else if WITH_ARGUMENT.contains(&&**word) {
            match words.next() {
                Some(argument) => drop(parameters.insert(word.clone(), (argument.clone(), at))),
                None => wrong.push(word.clone()),
            }
        } else if FLAGS.contains(&&**word) || word == "verify" {
            parameters.insert(word.clone(), (String::new(), at));
        } else {
            wrong.push(word.clone());
        }
    }
    // `enabled` and `disabled` replace each other.
    if parameters.get("enabled").is_some_and(|enabled| enabled.1 == at) {
        parameters.remove("disabled");
    }
    wrong
}

impl HaproxyServer {
    pub(super) fn has(&self, name: &str) -> bool {
        self.parameters.contains_key(name)
    }

    pub(super) fn argument(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(|(argument, _)| &**argument)
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.argument(name)?.parse().ok()
    }

    pub(super) fn time(&self, name: &str) -> Option<u64> {
        crate::times::time(self.argument(name)?, 1)
    }

    /// Returns the line of a parameter, else that of the server.
    pub(super) fn line_of(&self, name: &str) -> SourceLine {
        self.parameters.get(name).map_or(self.at, |(_, at)| *at)
    }
}

/// The address of a server in Tidegate's form.
pub(super) enum ServerAddress {
    /// Ready to write.
    Written(String),
    /// A name that can have several addresses.
    Named(String),
}

/// Translates the address of a server. `client_port`: the only port that clients connect to.
///
/// # Errors
/// What Tidegate cannot express.
pub(super) fn address(
    text: &str,
    client_port: Option<u16>,
    can: Available,
) -> Result<ServerAddress, String> {
    let unix = |path: &str| Ok(ServerAddress::Written(format!("unix:{path}")));
    if let Some(path) = text.strip_prefix("unix@") {
        return unix(path);
    }
    if let Some(name) = text.strip_prefix("abns@") {
        return unix(&format!("@{name}"));
    }
    if text.starts_with('/') {
        return unix(text);
    }
    let prefixes = ["ipv4@", "ipv6@", "tcp@", "tcp4@", "tcp6@"];
    let text = prefixes.iter().find_map(|prefix| text.strip_prefix(prefix)).unwrap_or(text);
    if let Some((kind, _)) = text.split_once('@') {
        return Err(format!("Tidegate has no addresses of the kind {kind}@"));
    }
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => (host, port.strip_prefix(':').unwrap_or(port)),
        None => text.rsplit_once(':').unwrap_or((text, "")),
    };
    if matches!(host, "" | "*" | "0.0.0.0" | "::") {
        return Err("Tidegate connects to the backends of a pool only".to_owned());
    }
    let relative = client_port.is_none() && (port.is_empty() || port.starts_with(['+', '-']));
    if relative && host.parse::<IpAddr>().is_ok() {
        return match port {
            "" if can.client_port => Ok(ServerAddress::Written(host.to_owned())),
            port if can.port_offset => Ok(ServerAddress::Written(format!("{host}:{port}"))),
            _ => Err("its port depends on the port of the client".to_owned()),
        };
    }
    let port = port_of(port, client_port)?;
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(ServerAddress::Written(SocketAddr::new(ip, port).to_string()));
    }
    match host.starts_with('_') {
        true => Ok(ServerAddress::Named(format!("srv:{host}"))),
        false => Ok(ServerAddress::Named(format!("{host}:{port}"))),
    }
}

/// Returns the port of a server: a number, or an offset to the port of the client.
fn port_of(text: &str, client_port: Option<u16>) -> Result<u16, String> {
    let offset: i32 = match text.chars().next() {
        None => 0,
        Some('+' | '-') => {
            text.parse().map_err(|_| format!("the port {text} is not understood"))?
        }
        Some(_) => {
            return text.parse().map_err(|_| format!("the port {text} is not understood"));
        }
    };
    let Some(client) = client_port else {
        return Err("the port depends on the port of the client".to_owned());
    };
    let port = i32::from(client).checked_add(offset).and_then(|port| u16::try_from(port).ok());
    port.ok_or_else(|| format!("the port {client}{text} does not exist"))
}
