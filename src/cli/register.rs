//! `tidegate register`: a sidecar that keeps a local service registered in a registry.
//!
//! Called by the command line. It checks the service with a probe and passes the health to
//! [`keep`]. It announces nothing before the first successful check, and removes the
//! registration at SIGTERM or SIGINT. A check that fails because of a local error (no
//! descriptors, no ports) does not count.

use crate::heartbeat::{StopSignals, check_path, http_check, local_check, peer};
use clap::{ArgGroup, Args, ValueEnum};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_client::command::{Exit, duration, print};
use tidegate_core::health::ProbeOutcome;
use tidegate_core::model::{
    BackendAddr, DnsConfig, ProbeKind, ProbeSpec, RegistryConfig, RegistryKind, ServerAddr,
    TlsClientConfig,
};
use tidegate_daemon::probe;
use tidegate_discovery::register::check::CheckTally;
use tidegate_discovery::register::consul::ConsulRegistrar;
use tidegate_discovery::register::etcd::EtcdRegistrar;
use tidegate_discovery::register::zookeeper::ZookeeperRegistrar;
use tidegate_discovery::register::{
    RegisterNote, Registrar, Registration, ServiceHealth, TTL_MAX, TTL_MIN, WhenDown, keep,
};
use tidegate_discovery::resolver::Resolver;
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval};

/// `tidegate register`
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("registry").required(true).args(["consul", "etcd", "zookeeper"])))]
pub struct RegisterArgs {
    /// Consul agent; repeatable. The next one is used if one fails.
    #[arg(long, value_name = "SERVER", value_parser = server)]
    pub consul: Vec<ServerAddr>,
    /// File with the token for Consul: mode 0600 or 0640.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["etcd", "zookeeper"])]
    pub token_file: Option<PathBuf>,
    /// Server of an etcd cluster; repeatable.
    #[arg(long, value_name = "SERVER", value_parser = server)]
    pub etcd: Vec<ServerAddr>,
    /// Keys of etcd are put below this prefix [default: /tidegate/services/SERVICE/].
    #[arg(long, value_name = "PREFIX", conflicts_with_all = ["consul", "zookeeper"], value_parser = prefix)]
    pub prefix: Option<String>,
    /// Server of a ZooKeeper ensemble; repeatable.
    #[arg(long, value_name = "SERVER", value_parser = server)]
    pub zookeeper: Vec<ServerAddr>,
    /// Node of ZooKeeper that gets a child [default: /tidegate/services/SERVICE].
    #[arg(long, value_name = "PATH", conflicts_with_all = ["consul", "etcd"], value_parser = node_path)]
    pub path: Option<String>,
    /// Name of the service.
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub service: String,
    /// Address at which balancers reach the service.
    #[arg(long, value_name = "IP:PORT", value_parser = peer)]
    pub address: SocketAddr,
    /// Name of this instance, unique in the service [default: its address].
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub id: Option<String>,
    /// Weight to announce, 1 to 1000.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub weight: Option<u16>,
    /// Label to announce; repeatable.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub labels: Vec<(String, String)>,
    /// The registration expires after this time without a renewal, 3s to 1h.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = ttl)]
    pub ttl: Duration,
    /// How to check the service: tcp, http:/PATH or none.
    #[arg(long, value_name = "CHECK", default_value = "tcp", value_parser = service_check)]
    pub check: ServiceCheck,
    /// Time between two checks.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub check_interval: Duration,
    /// Successful checks in a row after which a failed service is up again.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rise: u32,
    /// Failed checks in a row after which the service is down.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub fall: u32,
    /// What to announce while the service is down.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = DownAnnouncement::Critical)]
    pub when_down: DownAnnouncement,
    /// Address of the service on this host, for checks [default: --address].
    #[arg(long, value_name = "IP:PORT", value_parser = peer)]
    pub local: Option<SocketAddr>,
    /// User of etcd or ZooKeeper.
    #[arg(long, value_name = "USER", requires = "password_file", conflicts_with = "consul")]
    pub user: Option<String>,
    /// File with the password of --user: mode 0600 or 0640.
    #[arg(long, value_name = "FILE", requires = "user")]
    pub password_file: Option<PathBuf>,
    /// Connect with TLS.
    #[arg(long)]
    pub tls: bool,
    /// PEM file of trusted certificates [default: those of the system].
    #[arg(long, value_name = "FILE", requires = "tls")]
    pub ca_file: Option<PathBuf>,
    /// PEM file of a client certificate.
    #[arg(long, value_name = "FILE", requires_all = ["tls", "key_file"])]
    pub cert_file: Option<PathBuf>,
    /// PEM file of its private key.
    #[arg(long, value_name = "FILE", requires_all = ["tls", "cert_file"])]
    pub key_file: Option<PathBuf>,
    /// Name in the certificate of the server [default: the host of the address].
    #[arg(long, value_name = "NAME", requires = "tls")]
    pub server_name: Option<String>,
}

/// `--check`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceCheck {
    /// The service accepts a connection.
    Tcp,
    /// The service answers a request for this path with a status from 200 to 399.
    Http(String),
    /// The service is up while this command runs.
    None,
}

/// `--when-down`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DownAnnouncement {
    /// The service with state critical.
    Critical,
    /// Nothing.
    Nothing,
}

/// Help after the options.
pub(super) const HELP: &str = "\
Example:
  tidegate register --etcd 127.0.0.1:2379 --service web \\
    --address 10.0.0.5:8080 --check http:/health
  tidegate register --consul 127.0.0.1:8500 --token-file /etc/tidegate/consul.token \\
    --service web --address 10.0.0.5:8080
  tidegate register --zookeeper 127.0.0.1:2181 --path /services/web --service web \\
    --address 10.0.0.5:8080

It registers the service after the first successful check, renews the registration
three times per --ttl and repeats it if the registry lost it. On SIGTERM or SIGINT
it removes the registration and exits with 0. If the removal fails, it exits with 3
and the registration expires after --ttl. A second signal exits at once.

etcd and ZooKeeper remove a registration that expired. ZooKeeper limits --ttl to 2
to 20 of its ticks. Consul marks the service critical, and removes it after 1 hour.
A Consul agent announces only its own services, so one agent has the service at a
time: the first that answers.

Exit codes: 0 success; 2 usage error; 3 runtime failure or second signal.";

/// Limits on the timeout of a request to the registry. One member that does not answer must
/// not use up the TTL.
const REQUEST_TIMEOUT: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(5)];

/// Keeps the service registered until a stop signal.
pub fn main(args: &RegisterArgs) -> Exit {
    if let Err(why) = check_servers(args) {
        eprintln!("error: {why}\n\nFor more information, try '--help'.");
        return Exit::Usage;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.and_then(|runtime| runtime.block_on(run(args))).unwrap_or_else(|error| {
        eprintln!("tidegate: register: {error}");
        Exit::Failed
    })
}

async fn run(args: &RegisterArgs) -> io::Result<Exit> {
    // Before the first announcement: from then on a signal must remove it.
    let signals = StopSignals::listen()?;
    let registration = registration(args);
    let registry = registry(args);
    let resolver = Resolver::new(DnsConfig::default());
    let (service, id) = (&args.service, &registration.id);
    Ok(match registry.kind {
        RegistryKind::Consul => {
            let registrar = ConsulRegistrar::new(&registry, resolver);
            keep_at(registrar, args, &registration, signals).await
        }
        RegistryKind::Zookeeper => {
            let path = args.path.clone();
            let path = path.unwrap_or_else(|| format!("/tidegate/services/{service}"));
            let registry = Arc::new(registry);
            let registrar = ZookeeperRegistrar::new(registry, resolver, &path, id, args.ttl);
            keep_at(registrar, args, &registration, signals).await
        }
        RegistryKind::Etcd | RegistryKind::Kubernetes => {
            let prefix = args.prefix.clone();
            let prefix = prefix.unwrap_or_else(|| format!("/tidegate/services/{service}/"));
            let registrar = EtcdRegistrar::new(&registry, resolver, &prefix, id);
            keep_at(registrar, args, &registration, signals).await
        }
    })
}

/// Keeps the service registered until a stop signal.
async fn keep_at(
    registrar: impl Registrar,
    args: &RegisterArgs,
    registration: &Registration,
    mut signals: StopSignals,
) -> Exit {
    let stop = Notify::new();
    let (health, checked) = watch::channel(ServiceHealth::Unknown);
    let mut note = |note: RegisterNote| match note.is_problem() {
        true => eprintln!("tidegate: register: {note}"),
        false => print(&format!("{}/{}: {note}", args.service, registration.id)),
    };
    let kept = keep(registrar, registration, checked, stop.notified(), &mut note);
    tokio::select! {
        removed = kept => if removed { Exit::Fine } else { Exit::Failed },
        () = watch_service(args, &health) => Exit::Failed,
        () = async {
            signals.recv().await;
            stop.notify_one();
            signals.recv().await;
        } => {
            print("second stop signal received; exiting");
            Exit::Failed
        }
    }
}

/// Checks the service until cancelled.
async fn watch_service(args: &RegisterArgs, health: &watch::Sender<ServiceHealth>) {
    let Some(spec) = spec(args) else {
        health.send_replace(ServiceHealth::Up);
        return std::future::pending().await;
    };
    let address = BackendAddr::Tcp(args.local.unwrap_or(args.address));
    let mut tally = CheckTally::new(args.rise, args.fall);
    let mut tick = interval(args.check_interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (success, why) = match probe::run(&address, &spec).await {
            ProbeOutcome::Success { .. } => (true, String::new()),
            ProbeOutcome::Failure { reason, .. } => (false, reason),
            ProbeOutcome::Undecided { reason, .. } | ProbeOutcome::Local { reason } => {
                eprintln!("tidegate: register: cannot run the check: {reason}");
                continue;
            }
        };
        let (before, now) = (*health.borrow(), tally.take(success));
        if before == now {
            continue;
        }
        match now {
            ServiceHealth::Down => eprintln!("tidegate: register: the service is down: {why}"),
            ServiceHealth::Up => print("the service is up"),
            ServiceHealth::Unknown => {}
        }
        health.send_replace(now);
    }
}

fn spec(args: &RegisterArgs) -> Option<ProbeSpec> {
    let kind = match &args.check {
        ServiceCheck::None => return None,
        ServiceCheck::Tcp => ProbeKind::Tcp,
        ServiceCheck::Http(path) => http_check(path),
    };
    Some(local_check(kind, args.check_interval, (args.rise, args.fall)))
}

fn registration(args: &RegisterArgs) -> Registration {
    Registration {
        service: args.service.clone(),
        id: args.id.clone().unwrap_or_else(|| args.address.to_string()),
        address: args.address,
        weight: args.weight,
        labels: args.labels.iter().cloned().collect::<BTreeMap<_, _>>(),
        ttl: args.ttl,
        on_down: match args.when_down {
            DownAnnouncement::Critical => WhenDown::Mark,
            DownAnnouncement::Nothing => WhenDown::Remove,
        },
    }
}

/// Returns the registry that the arguments name. clap requires exactly one.
fn registry(args: &RegisterArgs) -> RegistryConfig {
    let [shortest, longest] = REQUEST_TIMEOUT;
    let (kind, servers) = match (&args.consul[..], &args.etcd[..]) {
        ([], []) => (RegistryKind::Zookeeper, &args.zookeeper),
        ([], _) => (RegistryKind::Etcd, &args.etcd),
        _ => (RegistryKind::Consul, &args.consul),
    };
    RegistryConfig {
        name: "register".into(),
        kind,
        servers: servers.clone(),
        timeout: (args.ttl / 6).clamp(shortest, longest),
        tls: args.tls.then(|| TlsClientConfig {
            ca_file: args.ca_file.clone(),
            cert_file: args.cert_file.clone(),
            key_file: args.key_file.clone(),
            server_name: args.server_name.clone(),
        }),
        token_file: args.token_file.clone(),
        user: args.user.clone(),
        password_file: args.password_file.clone(),
        kubeconfig: None,
    }
}

/// Refuses servers as the configuration does: those that would get a secret from another host
/// in plain text, and Unix sockets where they cannot work.
fn check_servers(args: &RegisterArgs) -> Result<(), String> {
    let RegistryConfig { kind, servers, tls, .. } = registry(args);
    if servers.iter().any(|server| matches!(server, ServerAddr::Unix(_))) {
        if kind == RegistryKind::Zookeeper {
            return Err("ZooKeeper does not listen on Unix sockets".to_owned());
        }
        if tls.as_ref().is_some_and(|tls| tls.server_name.is_none()) {
            return Err("TLS over a Unix socket needs --server-name".to_owned());
        }
    }
    let secret = match (&args.token_file, &args.user) {
        (Some(_), _) => "token",
        (None, Some(_)) => "password",
        (None, None) => return Ok(()),
    };
    match servers.iter().find(|server| !is_local(server)) {
        Some(server) if tls.is_none() => {
            Err(format!("the {secret} would be sent unencrypted to {server}; add --tls"))
        }
        _ => Ok(()),
    }
}

/// Returns whether a server is certain to be on this host (RFC 6761, 6.3).
fn is_local(server: &ServerAddr) -> bool {
    match server {
        ServerAddr::Ip(address) => address.ip().to_canonical().is_loopback(),
        ServerAddr::Name { host, .. } => {
            let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
            host == "localhost" || host.ends_with(".localhost")
        }
        ServerAddr::Unix(_) => true,
    }
}

// === values ===

fn server(text: &str) -> Result<ServerAddr, String> {
    if let Some(path) = text.strip_prefix("unix:/") {
        return Ok(ServerAddr::Unix(format!("/{path}").into()));
    }
    if let Ok(address) = peer(text) {
        return Ok(ServerAddr::Ip(address));
    }
    let wrong =
        || "expected IP:PORT, NAME:PORT or unix:PATH, for example 127.0.0.1:2379".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let is_host = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    match !host.is_empty() && host.chars().all(is_host) && host.parse::<std::net::IpAddr>().is_err()
    {
        true => Ok(ServerAddr::Name { host: host.into(), port }),
        false => Err(wrong()),
    }
}

fn prefix(text: &str) -> Result<String, String> {
    let fits = text.ends_with('/') && text.len() <= 1024 && !text.contains(char::is_control);
    match fits {
        true => Ok(text.to_owned()),
        false => Err("expected at most 1024 bytes that end with /, for example /web/".to_owned()),
    }
}

fn node_path(text: &str) -> Result<String, String> {
    let unfit = |part: &str| matches!(part, "" | "." | "..") || part.contains(char::is_control);
    let parts = text.strip_prefix('/').filter(|_| text.len() <= 1024);
    match parts.is_some_and(|parts| !parts.split('/').any(unfit)) {
        true => Ok(text.to_owned()),
        false => Err("expected a path of at most 1024 bytes, for example /services/web".to_owned()),
    }
}

/// The etcd source reads names of this form.
fn name(text: &str) -> Result<String, String> {
    let unfit = |c: char| c.is_control() || c.is_whitespace() || c == '/';
    match (1..=128).contains(&text.len()) && !text.contains(unfit) {
        true => Ok(text.to_owned()),
        false => Err("expected 1 to 128 bytes without spaces and slashes".to_owned()),
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && key.len() <= 256 && value.len() <= 256 => {
            Ok((key.to_owned(), value.to_owned()))
        }
        _ => Err("expected KEY=VALUE, each of at most 256 bytes".to_owned()),
    }
}

fn ttl(text: &str) -> Result<Duration, String> {
    let ttl = duration(text)?;
    match (TTL_MIN..=TTL_MAX).contains(&ttl) {
        true => Ok(ttl),
        false => Err("expected a time from 3s to 1h".to_owned()),
    }
}

fn service_check(text: &str) -> Result<ServiceCheck, String> {
    match text.split_once(':') {
        None if text == "tcp" => Ok(ServiceCheck::Tcp),
        None if text == "none" => Ok(ServiceCheck::None),
        Some(("http", path)) => check_path(path).map(ServiceCheck::Http),
        _ => Err("expected tcp, http:/PATH or none".to_owned()),
    }
}

#[cfg(test)]
mod tests;
