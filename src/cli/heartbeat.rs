//! `tidegate heartbeat`: a sidecar that sends heartbeats for a local service.
//!
//! Called by the command line. It checks the service with a probe, counts its connections
//! and reports both with a [`Sender`]. It never reports `ready` if the last check failed.
//!
//! | state | sent |
//! |---|---|
//! | `starting` | until a check succeeds, and from a failed check until the next success |
//! | `ready` | after a successful check, or with `--check none` |
//! | `draining` | from the first SIGTERM or SIGINT, for the time of `--drain` |
//! | `stopping` | in the last heartbeats before the process exits |
//!
//! A check that fails because of a local error (no descriptors, no ports) does not change
//! the state.

use clap::{Args, ValueEnum};
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use tidegate_client::command::{Exit, duration};
use tidegate_core::health::ProbeOutcome;
use tidegate_core::model::{
    BackendAddr, HttpProbe, HttpVersion, ProbeKind, ProbeSpec, ProbeTarget,
};
use tidegate_daemon::heartbeat::verify::SKEW_MAX;
use tidegate_daemon::probe;
use tidegate_heartbeat::sender::{Sender, SenderSettings};
use tidegate_heartbeat::wire::SenderIdentity;
use tidegate_heartbeat::{SenderState, key_file};
use tidegate_net::{ntp, sock_diag};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep};

/// `tidegate heartbeat`
#[derive(Debug, Args)]
pub struct HeartbeatArgs {
    /// Heartbeat address of a balancer; repeatable.
    #[arg(long, value_name = "IP:PORT", required = true, value_parser = peer)]
    pub to: Vec<SocketAddr>,
    /// Pool the service belongs to.
    #[arg(long, value_name = "POOL")]
    pub pool: String,
    /// Name of the backend in the pool [default: its address].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Address at which balancers reach the service.
    #[arg(long, value_name = "IP:PORT", value_parser = peer)]
    pub address: SocketAddr,
    /// Key ID as configured on the balancers.
    #[arg(long, value_name = "ID")]
    pub key_id: u32,
    /// Key file: 32 to 1024 bytes, mode 0600.
    #[arg(long, value_name = "FILE")]
    pub key_file: PathBuf,
    /// Time between two heartbeats.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = duration)]
    pub interval: Duration,
    /// Weight to request, 1 to 1000.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub weight: u16,
    /// How to check the service.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = Check::Tcp)]
    pub check: Check,
    /// Path for --check http; a status from 200 to 399 passes [default: /].
    #[arg(long, value_name = "PATH", value_parser = check_path)]
    pub check_path: Option<String>,
    /// Time between two checks.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub check_interval: Duration,
    /// Address of the service on this host, for checks and connection counts
    /// [default: --address].
    #[arg(long, value_name = "IP:PORT", value_parser = peer)]
    pub local: Option<SocketAddr>,
    /// How long to report draining before exit; 0s to skip.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = drain_time)]
    pub drain: Duration,
}

/// The kinds of check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Check {
    /// The service accepts a connection.
    Tcp,
    /// The service answers a request.
    Http,
    /// Always ready while this command runs.
    None,
}

/// Help after the options.
pub(super) const HELP: &str = "\
Example:
  tidegate heartbeat --to 10.0.0.5:7946 --pool web --address 10.0.0.11:8080 \\
    --key-id 1 --key-file /etc/tidegate/hb.key --check http --check-path /health

It reports starting until the first check succeeds and after a failed check, and
ready while checks succeed. On SIGTERM or SIGINT it reports draining for --drain,
then stopping, and exits with 0. A second signal ends the drain at once.

Exit codes: 0 success; 1 rejected key file; 2 usage error; 3 runtime failure or
second signal.";

/// Upper limit on the timeout of a check.
const CHECK_TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// Interval for counting connections: each count makes the kernel list all connections.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);

/// Files that list the connections of this network namespace (proc(5)).
const TABLES: [&str; 2] = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];

/// The signals that stop the command: SIGTERM and SIGINT.
pub(super) struct StopSignals([Signal; 2]);

/// Sends heartbeats until a stop signal.
pub fn main(args: &HeartbeatArgs) -> Exit {
    let identity = match identity(args) {
        Ok(identity) => identity,
        Err(why) => {
            eprintln!("error: {why}\n\nFor more information, try '--help'.");
            return Exit::Usage;
        }
    };
    let secret = match key_file::read(&args.key_file) {
        Ok(secret) => secret,
        Err(error) => {
            eprintln!("tidegate: heartbeat: {error}");
            return Exit::Refused;
        }
    };
    let settings = SenderSettings {
        to: args.to.clone(),
        identity,
        key_id: args.key_id,
        secret,
        interval: args.interval,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.and_then(|runtime| runtime.block_on(run(args, settings))).unwrap_or_else(|error| {
        eprintln!("tidegate: heartbeat: {error}");
        Exit::Failed
    })
}

async fn run(args: &HeartbeatArgs, settings: SenderSettings) -> io::Result<Exit> {
    // Before the first heartbeat: from then on a signal must lead to `stopping` heartbeats.
    let mut stop = StopSignals::listen()?;
    warn_of_clock();
    let sender = Sender::start(settings)?;
    sender.set_weight(args.weight);
    tokio::select! {
        () = stop.recv() => {}
        () = watch(args, &sender) => {}
        () = count(args, &sender) => {}
        () = report_failures(&sender) => {}
    }
    if !args.drain.is_zero() {
        set_and_print(&sender, SenderState::Draining, "received a stop signal");
        tokio::select! {
            () = sleep(args.drain) => {}
            () = count(args, &sender) => {}
            () = stop.recv() => {
                tidegate_client::command::print("second stop signal received; exiting");
                return Ok(Exit::Failed);
            }
        }
    }
    tidegate_client::command::print("stopping");
    sender.close();
    Ok(Exit::Fine)
}

/// Warns if the clock of this host is not synchronised. Balancers send no answers, so the
/// command cannot see that they reject its heartbeats because of the clock.
fn warn_of_clock() {
    if ntp::is_synchronised() == Some(false) {
        let most = humantime::format_duration(SKEW_MAX);
        eprintln!(
            "tidegate: heartbeat: the kernel reports that the clock of this host is not \
             synchronised; balancers reject heartbeats if the clocks differ by more than {most}"
        );
    }
}

/// Checks the service until cancelled.
async fn watch(args: &HeartbeatArgs, sender: &Sender) {
    let Some(spec) = spec(args) else {
        set_and_print(sender, SenderState::Ready, "no check configured");
        return std::future::pending().await;
    };
    let address = BackendAddr::Tcp(local(args));
    let mut reported = None;
    let mut tick = interval(args.check_interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (state, why) = match probe::run(&address, &spec).await {
            ProbeOutcome::Success { .. } => (SenderState::Ready, "check succeeded".to_owned()),
            ProbeOutcome::Failure { reason, .. } => (SenderState::Starting, reason),
            ProbeOutcome::Undecided { reason, .. } | ProbeOutcome::Local { reason } => {
                eprintln!("tidegate: heartbeat: cannot run the check: {reason}");
                continue;
            }
        };
        if reported != Some(state) {
            set_and_print(sender, state, &why);
            reported = Some(state);
        }
    }
}

/// Counts the service's connections until cancelled.
async fn count(args: &HeartbeatArgs, sender: &Sender) {
    let local = local(args);
    let mut tick = interval(COUNT_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        // The kernel needs long to list many connections.
        let counted = tokio::task::spawn_blocking(move || established(local)).await;
        match counted {
            Ok(Ok(in_flight)) => sender.set_in_flight(in_flight),
            Ok(Err(error)) => {
                eprintln!("tidegate: heartbeat: cannot count connections: {error}");
                return std::future::pending().await;
            }
            // The runtime is shutting down.
            Err(_) => return std::future::pending().await,
        }
    }
}

/// Prints the first of several failures in a row to send heartbeats.
async fn report_failures(sender: &Sender) {
    let (mut before, mut failing) = (0, false);
    loop {
        sleep(COUNT_INTERVAL).await;
        let (failed, error) = sender.failed();
        if failed > before
            && !failing
            && let Some((to, error)) = error
        {
            eprintln!("tidegate: heartbeat: cannot send to {to}: {error}");
        }
        (failing, before) = (failed > before, failed);
    }
}

fn set_and_print(sender: &Sender, state: SenderState, why: &str) {
    sender.set_state(state);
    tidegate_client::command::print(&format!("{}: {why}", state.name()));
}

fn identity(args: &HeartbeatArgs) -> Result<SenderIdentity, String> {
    if args.check_path.is_some() && args.check != Check::Http {
        return Err("--check-path applies to --check http only".to_owned());
    }
    let name = args.name.clone().unwrap_or_else(|| args.address.to_string());
    SenderIdentity::new(&args.pool, &name, args.address).map_err(|unfit| unfit.to_string())
}

fn local(args: &HeartbeatArgs) -> SocketAddr {
    args.local.unwrap_or(args.address)
}

fn spec(args: &HeartbeatArgs) -> Option<ProbeSpec> {
    let kind = match args.check {
        Check::None => return None,
        Check::Tcp => ProbeKind::Tcp,
        Check::Http => http_check(args.check_path.as_deref().unwrap_or("/")),
    };
    Some(local_check(kind, args.check_interval, (1, 1)))
}

/// Returns a GET request for `path` that succeeds with a status from 200 to 399.
pub(crate) fn http_check(path: &str) -> ProbeKind {
    ProbeKind::Http(HttpProbe {
        path: path.to_owned(),
        host: None,
        method: "GET".to_owned(),
        version: HttpVersion::Http11,
        headers: Vec::new(),
        status: vec![(200, 399)],
        expect: None,
    })
}

/// Returns the check of a local service, with its rise and fall.
pub(crate) fn local_check(
    kind: ProbeKind,
    interval: Duration,
    (rise, fall): (u32, u32),
) -> ProbeSpec {
    ProbeSpec {
        kind,
        target: ProbeTarget::default(),
        interval,
        fast_interval: interval,
        down_interval: interval,
        timeout: interval.min(CHECK_TIMEOUT_MAX),
        rise,
        fall,
    }
}

/// Returns the number of established connections that the service at `local` has accepted.
/// Uses `/proc` if sock_diag is missing or forbidden.
fn established(local: SocketAddr) -> io::Result<u32> {
    sock_diag::established(local).or_else(|_| established_by_proc(local))
}

fn established_by_proc(local: SocketAddr) -> io::Result<u32> {
    let mut sum = 0_u32;
    for table in TABLES {
        match std::fs::read_to_string(table) {
            Ok(text) => sum = sum.saturating_add(established_in(&text, local)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table.ends_with('6') => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sum)
}

/// Counts established connections in a table of proc(5): `sl local_address rem_address st
/// ...`. Addresses are hexadecimal, in 32-bit words of the host's byte order. State 01 is
/// established.
fn established_in(table: &str, local: SocketAddr) -> u32 {
    let accepted = table.lines().skip(1).filter(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (address, state) = (fields.next(), fields.nth(1));
        state == Some("01") && address.and_then(listed_address) == Some(local)
    });
    u32::try_from(accepted.count()).unwrap_or(u32::MAX)
}

fn listed_address(text: &str) -> Option<SocketAddr> {
    let (words, port) = text.split_once(':')?;
    let word = |index: usize| {
        let digits = words.get(8 * index..8 * index + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let ip = match words.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut octets = [0; 16];
            for (index, four) in octets.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(index)?);
            }
            // IPv4 connections of a dual-stack socket have mapped addresses.
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

pub(super) fn peer(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 && !address.ip().is_unspecified() => {
            // A mapped address is replaced by its IPv4 address, as everywhere.
            Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
        }
        _ => Err("expected IP:PORT, for example 10.0.0.5:7946".to_owned()),
    }
}

pub(super) fn check_path(text: &str) -> Result<String, String> {
    // RFC 9112 section 3.2.1: a request target contains no space and no line end.
    if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err("expected a path without spaces, for example /health".to_owned())
    }
}

fn drain_time(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|error| error.to_string())
}

// === impl StopSignals ===

impl StopSignals {
    pub(super) fn listen() -> io::Result<StopSignals> {
        Ok(StopSignals([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]))
    }

    pub(super) fn recv(&mut self) -> impl Future<Output = ()> {
        let [terminate, interrupt] = &mut self.0;
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_connections_are_counted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(established(address).unwrap(), 0);
        let clients: Vec<_> =
            (0..3).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        for count in [established, established_by_proc] {
            settles_at(count, address, 3);
        }
        drop(clients);
        for count in [established, established_by_proc] {
            settles_at(count, address, 0);
        }
    }

    /// Counts until the expected number is seen: the kernel can list a connection twice or
    /// not at all if its table changes during a read.
    fn settles_at(counts: fn(SocketAddr) -> io::Result<u32>, address: SocketAddr, count: u32) {
        let mut seen = Vec::new();
        while seen.last() != Some(&count) && seen.len() < 100 {
            seen.push(counts(address).unwrap());
        }
        assert_eq!(seen.last(), Some(&count), "{seen:?}");
    }

    #[test]
    fn connections_of_a_dual_stack_socket_are_counted() {
        let Ok(listener) = std::net::TcpListener::bind("[::]:0") else { return };
        let port = listener.local_addr().unwrap().port();
        let addresses = ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
        for address in addresses {
            let Ok(_client) = std::net::TcpStream::connect(address) else { continue };
            assert_eq!(established(address).unwrap(), 1, "{address}");
        }
    }

    #[test]
    fn invalid_table_lines_are_not_counted() {
        let local = "127.0.0.1:80".parse().unwrap();
        let table = "header\n\n 0:\n 1: x y 01\n 2: 0100007F 0:0 01\n 3: ZZ00007F:0050 0:0 01\n";
        assert_eq!(established_in(table, local), 0);
    }
}
