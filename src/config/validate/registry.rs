//! `[registry.NAME]`: the servers that member sources ask, and the credentials for them.
//!
//! Called by `validate` for each registry, before the pools are read. It opens no
//! connection and resolves no name.

use std::fmt::Display;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;

use super::frontend::any_number;
use super::named_file::{self, FileContent};
use crate::diagnose::ProblemCollector;
use crate::file::{Field, NamedSection, Section};
use crate::host_name;
use crate::value::{ValueError, shown};
use crate::{NamedFiles, Spot, address};
use tidegate_core::model::{RegistryConfig, RegistryKind, ServerAddr, TlsClientConfig, Words};

/// Most registries. Each has a connection and a task.
pub const REGISTRIES_MAX: usize = 16;

/// Most servers of a registry.
const SERVERS_MAX: usize = 16;

/// `timeout`.
const TIMES: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest user name.
const USER_BYTES_MAX: usize = 256;

/// The keys that only some kinds take.
const OWNED: [(&str, &[RegistryKind]); 4] = [
    ("token_file", &[RegistryKind::Consul, RegistryKind::Kubernetes]),
    ("user", &[RegistryKind::Etcd, RegistryKind::Zookeeper]),
    ("password_file", &[RegistryKind::Etcd, RegistryKind::Zookeeper]),
    ("kubeconfig", &[RegistryKind::Kubernetes]),
];

/// The keys that need `tls = true`.
const TLS_KEYS: [&str; 4] = ["ca_file", "cert_file", "key_file", "server_name"];

/// A registry with what checks across sections need.
pub(super) struct RegistryRead {
    pub(super) model: Arc<RegistryConfig>,
    /// `None`: the kind is missing or wrong, and the error is reported.
    pub(super) kind: Option<RegistryKind>,
    /// Place of the name.
    place: Range<usize>,
}

pub(super) fn read(named: NamedSection<'_, '_>, files: NamedFiles<'_>) -> RegistryRead {
    let NamedSection { name, place, section } = named;
    let kind = section.choice::<RegistryKind>("kind");
    if kind.is_absent() && !section.misspells("kind") {
        section.missing("kind", "\"consul\" | \"etcd\" | \"kubernetes\" | \"zookeeper\"");
    }
    let kind = kind.value();
    let servers = servers(&section, name);
    let credentials = Credentials::read(&section, kind, files);
    let tls = tls(&section, files);
    if let Some(kind) = kind {
        refuse_foreign_keys(&section, kind);
        check_servers(&section, kind, &servers, tls.as_ref());
        let in_cluster = kind == RegistryKind::Kubernetes && servers.is_empty();
        if tls.is_none() && !in_cluster {
            refuse_clear_text(&section, &servers);
        }
    }
    let timeout = section.duration("timeout", "5s", TIMES).or(TIMEOUT);
    section.finish();
    let model = RegistryConfig {
        name: name.into(),
        kind: kind.unwrap_or(RegistryKind::Consul),
        servers,
        timeout,
        tls,
        token_file: credentials.token_file.value(),
        user: credentials.user.value(),
        password_file: credentials.password_file.value(),
        kubeconfig: credentials.kubeconfig.value(),
    };
    RegistryRead { model: Arc::new(model), kind, place }
}

fn servers(section: &Section<'_, '_>, name: &str) -> Vec<ServerAddr> {
    let wants = (
        "an address such as \"10.0.0.5:8500\", or a list of addresses",
        "addresses such as \"10.0.0.5:8500\"",
    );
    let read = any_number(section, "servers", wants, address::server_address);
    let too_many = format!("a registry has at most {SERVERS_MAX} servers");
    let servers = distinct_servers(section, read, (SERVERS_MAX, &too_many));
    for server in &servers {
        let spot = Spot::RegistryServer(name.into(), server.get_ref().clone());
        section.report.keep(spot, Some(server.span()));
    }
    servers.into_iter().map(Spanned::into_inner).collect()
}

/// Reports servers that are given twice, and those beyond a maximum, with its message.
/// Returns the others.
pub(super) fn distinct_servers<T: PartialEq + Display>(
    section: &Section<'_, '_>,
    read: Vec<Spanned<T>>,
    (most, too_many): (usize, &str),
) -> Vec<Spanned<T>> {
    let mut servers: Vec<Spanned<T>> = Vec::with_capacity(read.len());
    for one in read {
        if servers.iter().any(|server| server.get_ref() == one.get_ref()) {
            let message = format!("server {} is given twice", one.get_ref());
            section.report.error(one.span(), ValueError::new(message));
        } else if servers.len() == most {
            section.report.error(one.span(), ValueError::new(too_many));
            break;
        } else {
            servers.push(one);
        }
    }
    servers
}

/// Checks that the servers fit the kind, and the TLS keys the servers.
fn check_servers(
    section: &Section<'_, '_>,
    kind: RegistryKind,
    servers: &[ServerAddr],
    tls: Option<&TlsClientConfig>,
) {
    let place = section.value_place("servers").unwrap_or_else(|| section.header.clone());
    let unix = servers.iter().any(|server| matches!(server, ServerAddr::Unix(_)));
    if kind == RegistryKind::Kubernetes {
        refuse_decided_keys(section);
    } else if section.key_place("servers").is_none() {
        if !section.misspells("servers") {
            section.missing("servers", "[\"IP:PORT\"]");
        }
    } else if section
        .node("servers")
        .and_then(|node| node.get_ref().as_array())
        .is_some_and(|all| all.is_empty())
    {
        let complaint = ValueError::new("servers lists no server");
        section.report.error(place.clone(), complaint.help("write servers = [\"IP:PORT\"]"));
    }
    if kind == RegistryKind::Zookeeper && unix {
        let complaint = ValueError::new("ZooKeeper does not listen on Unix sockets");
        section.report.error(place.clone(), complaint.help("write servers = [\"IP:PORT\"]"));
    }
    if unix && tls.is_some_and(|tls| tls.server_name.is_none()) {
        let complaint = ValueError::new("TLS over a Unix socket needs server_name");
        let help = "add server_name, the name in the certificate of the server";
        section.report.error(place, complaint.help(help));
    }
}

/// Reports keys of a Kubernetes registry that its kubeconfig, or the environment of the
/// pod, decides.
fn refuse_decided_keys(section: &Section<'_, '_>) {
    let kubeconfig = section.key_place("kubeconfig").is_some();
    if !kubeconfig && section.key_place("servers").is_some() {
        return;
    }
    let help = match kubeconfig {
        true => "the kubeconfig has the server, the CA and the credentials",
        false => "without servers, Tidegate uses the server and the CA that each pod gets",
    };
    let keys = ["servers", "token_file", "tls"].into_iter().chain(TLS_KEYS);
    for key in keys.filter(|key| kubeconfig || *key != "token_file") {
        if let Some(place) = section.key_place(key) {
            let other = if kubeconfig { "with kubeconfig" } else { "without servers" };
            let complaint = ValueError::new(format!("{key} has no effect {other}"));
            section.report.error(place, complaint.help(help));
        }
    }
}

/// Reports keys of another kind.
fn refuse_foreign_keys(section: &Section<'_, '_>, kind: RegistryKind) {
    for (key, owners) in OWNED {
        if let (Some(place), false) = (section.key_place(key), owners.contains(&kind)) {
            let kind = kind.word();
            let complaint =
                ValueError::new(format!("a registry of kind \"{kind}\" takes no {key}"));
            let owners: Vec<_> =
                owners.iter().map(|owner| format!("\"{}\"", owner.word())).collect();
            let help = format!("{key} belongs to kind = {}", owners.join(" or "));
            section.report.error(place, complaint.help(help));
        }
    }
}

fn tls(section: &Section<'_, '_>, files: NamedFiles<'_>) -> Option<TlsClientConfig> {
    let on = section.boolean("tls");
    let is_on = on.value() == Some(true);
    let files = if is_on { files } else { NamedFiles::Ignore };
    let file = |key, content| named_file::read(section, key, content, files);
    let ca_file = file("ca_file", FileContent::Certificates);
    let cert_file = file("cert_file", FileContent::Certificates);
    let key_file = file("key_file", FileContent::PrivateKey);
    let server_name = section.text("server_name", "a host name", |text| {
        host_name::certificate_name(text).map(|()| text.to_owned())
    });
    both_or_neither(section, "cert_file", "key_file");
    if !is_on {
        for key in TLS_KEYS {
            if let Some(place) = section.key_place(key) {
                let complaint = ValueError::new(format!("{key} has no effect without tls = true"));
                section.report.error(place, complaint.help("add tls = true"));
            }
        }
        return None;
    }
    Some(TlsClientConfig {
        ca_file: ca_file.value(),
        cert_file: cert_file.value(),
        key_file: key_file.value(),
        server_name: server_name.value(),
    })
}

/// Reports one of two keys without the other.
fn both_or_neither(section: &Section<'_, '_>, one: &str, other: &str) {
    for (given, missing) in [(one, other), (other, one)] {
        if let (Some(place), None) = (section.key_place(given), section.key_place(missing)) {
            let complaint = ValueError::new(format!("{given} without {missing}"));
            section.report.error(place, complaint.help("set both, or neither"));
        }
    }
}

/// The keys with secrets.
struct Credentials {
    token_file: Field<PathBuf>,
    user: Field<String>,
    password_file: Field<PathBuf>,
    kubeconfig: Field<PathBuf>,
}

/// Warns of registries that no pool uses, and reports more than [`REGISTRIES_MAX`].
pub(super) fn check<'u>(
    report: &ProblemCollector<'_>,
    registries: &[RegistryRead],
    used: impl Iterator<Item = &'u str> + Clone,
) {
    for registry in registries {
        let name = &*registry.model.name;
        if !used.clone().any(|other| other == name) {
            let message = format!("no pool uses registry {}", shown(name));
            report.warning(registry.place.clone(), ValueError::new(message));
        }
    }
    if let Some(beyond) = registries.get(REGISTRIES_MAX) {
        let message =
            format!("{} registries are more than the {REGISTRIES_MAX} allowed", registries.len());
        report.error(beyond.place.clone(), ValueError::new(message));
    }
}

/// Returns whether a server is certain to be on this host.
fn is_local(server: &ServerAddr) -> bool {
    match server {
        ServerAddr::Ip(address) => address.ip().to_canonical().is_loopback(),
        ServerAddr::Name { host, .. } => host_name::is_loopback_name(host),
        ServerAddr::Unix(_) => true,
    }
}

/// Reports a secret that would go to another host in clear text.
fn refuse_clear_text(section: &Section<'_, '_>, servers: &[ServerAddr]) {
    let Some(server) = servers.iter().find(|server| !is_local(server)) else { return };
    for (key, what) in [("token_file", "token"), ("password_file", "password")] {
        if let Some(place) = section.value_place(key) {
            let message = format!("the {what} would go to {server} without encryption");
            let help = "add tls = true, or use a server on a loopback address or a Unix socket";
            let complaint = ValueError::new(message).named(key);
            section.report.error(place, complaint.help(help));
        }
    }
}

// === impl Credentials ===

impl Credentials {
    fn read(
        section: &Section<'_, '_>,
        kind: Option<RegistryKind>,
        files: NamedFiles<'_>,
    ) -> Credentials {
        let file = |key, content| {
            // The file of a key that does not belong here is not worth an error.
            let owned = |(owned, owners): &(&str, &[RegistryKind])| {
                *owned == key && kind.is_some_and(|kind| owners.contains(&kind))
            };
            let files = if OWNED.iter().any(owned) { files } else { NamedFiles::Ignore };
            named_file::read(section, key, content, files)
        };
        let credentials = Credentials {
            token_file: file("token_file", FileContent::Secret),
            user: section.text("user", "a name", user),
            password_file: file("password_file", FileContent::Secret),
            kubeconfig: file("kubeconfig", FileContent::Kubeconfig),
        };
        both_or_neither(section, "user", "password_file");
        credentials
    }
}

/// Checks the name of a user. A colon ends it in the protocols that use it.
fn user(text: &str) -> Result<String, ValueError> {
    let fits = !text.is_empty() && text.len() <= USER_BYTES_MAX;
    if !fits || text.contains(|c: char| c.is_control() || c == ':') {
        return Err(ValueError::new(format!("{} is not a user name", shown(text)))
            .help(format!("1 to {USER_BYTES_MAX} bytes without a colon")));
    }
    Ok(text.to_owned())
}
