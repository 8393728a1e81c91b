//! HAProxy or nginx runs a configuration, and Tidegate runs its translation by `tidegate import`.
//! The same clients and backends use both, and must observe the same.
//!
//! Nothing here looks at the translated text; `tests/import` has its goldens.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect_from, read_to_end};
use crate::common::ports::free_port;
use crate::common::proxy::PROGRAM;
use crate::common::servers::{Running, find};
use crate::common::{Engine, eventually, have, ms, on_every_engine, patience, secs};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

on_every_engine!(
    haproxy_and_its_translation_serve_clients_alike,
    nginx_and_its_translation_serve_clients_alike
);

/// Services that both files have, in the order of their addresses.
const SERVICES: [&str; 8] =
    ["split", "failover", "backup", "returns", "denied", "sticky", "nobody", "capped"];

/// An address that the service `denied` rejects.
const REJECTED: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));

/// Time without data after which both end a session.
const IDLE: Duration = secs(1);

const HAPROXY: &str = "
defaults
  mode tcp
  option redispatch
  retries 3
  timeout connect 2s
  timeout client 1s
  timeout server 1s
  timeout queue 5s
  default-server inter 100ms fall 2 rise 2
listen split
  bind SPLIT
  balance roundrobin
  server a A weight 3
  server b B weight 2
  server c C weight 1
listen failover
  bind FAILOVER
  balance leastconn
  server a A check
  server d D check
listen backup
  bind BACKUP
  server d D check
  server a A check backup
listen returns
  bind RETURNS
  timeout client 1m
  timeout server 1m
  server d D check on-marked-up shutdown-backup-sessions
  server a A check backup
listen denied
  bind DENIED
  tcp-request connection reject if { src 127.0.0.9 }
  server a A
listen sticky
  bind STICKY
  balance source
  hash-type consistent
  server a A
  server b B
  server c C
listen nobody
  bind NOBODY
  server gone GONE check
listen capped
  bind CAPPED
  server b B maxconn 1
";

const NGINX: &str = "
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
pid DIR/nginx.pid;
error_log stderr;
events { worker_connections 400; }
stream {
    proxy_connect_timeout 2s;
    proxy_timeout 1s;
    upstream split { server A weight=3; server B weight=2; server C weight=1; }
    upstream failover { least_conn; server A; server D max_fails=1 fail_timeout=1s; }
    upstream backup { server D max_fails=1 fail_timeout=1s; server A backup; }
    upstream one { server A; }
    upstream sticky { hash $remote_addr consistent; server A; server B; server C; }
    upstream nobody { server GONE; }
    upstream capped { server B max_conns=100; }
    server { listen SPLIT; proxy_pass split; }
    server { listen FAILOVER; proxy_pass failover; }
    server { listen BACKUP; proxy_pass backup; }
    server { listen DENIED; deny 127.0.0.9; allow all; proxy_pass one; }
    server { listen STICKY; proxy_pass sticky; }
    server { listen NOBODY; proxy_pass nobody; }
    server { listen CAPPED; proxy_pass capped; }
}
";

/// A process that balances the services.
struct Balancer {
    kind: &'static str,
    services: BTreeMap<&'static str, SocketAddr>,
    _running: Running,
}

/// The backends A to D. D can stop. Nothing listens at GONE.
struct Backends {
    all: BTreeMap<&'static str, ScriptedBackend>,
    gone: SocketAddr,
}

fn haproxy_and_its_translation_serve_clients_alike(engine: Engine) {
    if have(&["haproxy"]) {
        compare(engine, "haproxy", "haproxy.cfg", HAPROXY, &["-db", "-f"]);
    }
}

fn nginx_and_its_translation_serve_clients_alike(engine: Engine) {
    if have(&["nginx"]) {
        compare(engine, "nginx", "nginx.conf", NGINX, &["-e", "stderr", "-c"]);
    }
}

fn compare(engine: Engine, kind: &'static str, file: &str, source: &str, arguments: &[&str]) {
    let dir = tempfile::Builder::new().prefix("tg-twin-").tempdir_in("/tmp").unwrap();
    let mut backends = Backends::start();
    let anchor = Balancer::anchor(kind, &dir.path().join(file), source, &backends, arguments);
    let twin = Balancer::translated(engine, &dir.path().join(file), source, &backends);
    let both = [&anchor, &twin];

    let counts = both.map(|one| one.split(60));
    assert_eq!(counts[0], counts[1], "sessions of each backend of 60");
    let expected = BTreeMap::from([("a", 30), ("b", 20), ("c", 10)].map(|(n, c)| (n.into(), c)));
    assert_eq!(counts[1], expected);
    for one in both {
        one.rejects_by_address();
        one.ends_idle_sessions_in_order();
        one.keeps_clients_at_their_backend();
        assert_eq!(one.sees("nobody"), None, "{}: no backend serves", one.kind);
    }
    if kind == "haproxy" {
        both.iter().for_each(|one| one.queues_at_the_cap());
    }
    follow_a_failure(&both, &mut backends);
}

/// Stops D and starts it again: the other backend serves in between, and no session fails. With
/// HAProxy, the return of D ends the sessions of the backup in one service.
fn follow_a_failure(both: &[&Balancer; 2], backends: &mut Backends) {
    let is_serving = |one: &Balancer, service, name: &str| {
        eventually(secs(10), &format!("{}: {name} serves {service}", one.kind), || {
            one.sees(service).as_deref() == Some(name)
        });
    };
    both.iter().for_each(|one| is_serving(one, "backup", "d"));
    let address = backends.all["d"].socket_address();
    backends.all.remove("d");
    for one in both {
        is_serving(one, "backup", "a");
        for _ in 0..20 {
            assert_eq!(one.sees("backup").as_deref(), Some("a"), "{}", one.kind);
            assert_eq!(one.sees("failover").as_deref(), Some("a"), "{}", one.kind);
        }
    }
    let of_backup = both.iter().filter(|_| both[0].kind == "haproxy").map(|one| {
        is_serving(one, "returns", "a");
        let held = client::connect(one.address("returns"));
        assert_eq!(greeting(&held).as_deref(), Some("a"), "{}", one.kind);
        held
    });
    let of_backup: Vec<TcpStream> = of_backup.collect();
    backends.all.insert("d", ScriptedBackend::start_on(address, backend::greet("d")));
    for one in both {
        is_serving(one, "backup", "d");
        is_serving(one, "failover", "d");
    }
    for (one, held) in both.iter().zip(&of_backup) {
        assert_eq!(read_to_end(held), End::Fin(0), "{}: the backup is released", one.kind);
        is_serving(one, "returns", "d");
    }
}

/// Replaces the upper-case names of a file.
fn render(
    source: &str,
    dir: &Path,
    services: &BTreeMap<&'static str, SocketAddr>,
    backends: &Backends,
) -> String {
    let mut values: Vec<(String, String)> =
        services.iter().map(|(name, address)| (name.to_uppercase(), address.to_string())).collect();
    values.push(("GONE".into(), backends.gone.to_string()));
    values.push(("DIR".into(), dir.display().to_string()));
    let backend = |(name, backend): (&&str, &ScriptedBackend)| {
        (name.to_uppercase(), backend.address().to_owned())
    };
    values.extend(backends.all.iter().map(backend));
    let word = |word: &str| {
        let value = values.iter().find(|(name, _)| name == word);
        value.map_or_else(|| word.to_owned(), |(_, value)| value.clone())
    };
    let mut text = String::new();
    for part in source.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
        let end = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_').len();
        text += &word(&part[..end]);
        text += &part[end..];
    }
    text
}

// === impl Backends ===

impl Backends {
    fn start() -> Backends {
        let start = |name| (name, ScriptedBackend::start(backend::greet(name)));
        Backends {
            all: ["a", "b", "c", "d"].map(start).into(),
            gone: SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())),
        }
    }
}

// === impl Balancer ===

impl Balancer {
    /// Starts the program that the file is for.
    fn anchor(
        kind: &'static str,
        path: &Path,
        source: &str,
        backends: &Backends,
        arguments: &[&str],
    ) -> Balancer {
        let services = addresses();
        let dir = path.parent().unwrap();
        std::fs::write(path, render(source, dir, &services, backends)).unwrap();
        let log = std::fs::File::create(dir.join("anchor.log")).unwrap();
        let mut command = Command::new(find(kind).unwrap());
        command.args(arguments).arg(path).stdout(Stdio::null()).stderr(log);
        Balancer::started(kind, services, Running::start(&mut command), &dir.join("anchor.log"))
    }

    /// Translates the same file, with other addresses for the clients, and starts Tidegate.
    fn translated(engine: Engine, path: &Path, source: &str, backends: &Backends) -> Balancer {
        let services = addresses();
        let dir = path.parent().unwrap();
        std::fs::write(path, render(source, dir, &services, backends)).unwrap();
        let import = Command::new(PROGRAM).arg("import").arg(path).output().unwrap();
        let report = String::from_utf8_lossy(&import.stderr);
        assert!(import.status.success(), "{report}");
        let toml = String::from_utf8(import.stdout).unwrap();
        let own = format!(
            "[process]\nengine = \"{}\"\nworkers = 2\n[admin]\nlisten = \"unix:{}\"\n",
            engine.name(),
            dir.join("admin.sock").display()
        );
        let config = dir.join("tidegate.toml");
        std::fs::write(&config, format!("{toml}\n{own}")).unwrap();
        let log = dir.join("tidegate.log");
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--single", "--config"]).arg(&config);
        command.stdout(std::fs::File::create(&log).unwrap()).stderr(Stdio::null());
        Balancer::started("tidegate", services, Running::start(&mut command), &log)
    }

    fn started(
        kind: &'static str,
        services: BTreeMap<&'static str, SocketAddr>,
        running: Running,
        log: &Path,
    ) -> Balancer {
        let balancer = Balancer { kind, services, _running: running };
        eventually(secs(10), &format!("{kind} serves: {}", log.display()), || {
            ["split", "failover"].iter().all(|name| balancer.sees(name).is_some())
        });
        balancer
    }

    fn address(&self, service: &str) -> SocketAddr {
        self.services[service]
    }

    /// The name of the backend that serves one session; `None`: it ended without a byte.
    fn sees(&self, service: &str) -> Option<String> {
        greeting(&client::try_connect(self.address(service)).ok()?)
    }

    fn split(&self, sessions: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..sessions {
            let name = self.sees("split").expect("a session of split");
            *counts.entry(name).or_default() += 1;
        }
        counts
    }

    fn rejects_by_address(&self) {
        let rejected = connect_from(REJECTED, self.address("denied"));
        let seen = rejected.ok().and_then(|stream| greeting(&stream));
        assert_eq!(seen, None, "{}: 127.0.0.9 is rejected", self.kind);
        assert_eq!(self.sees("denied").as_deref(), Some("a"), "{}", self.kind);
    }

    fn ends_idle_sessions_in_order(&self) {
        let stream = client::connect(self.address("denied"));
        let began = Instant::now();
        assert_eq!(read_to_end(&stream), End::Fin(1), "{}", self.kind);
        let took = began.elapsed();
        assert!(took >= IDLE.mul_f64(0.9), "{}: {took:?}", self.kind);
        assert!(took <= patience(IDLE + secs(2)), "{}: {took:?}", self.kind);
    }

    fn keeps_clients_at_their_backend(&self) {
        for number in 10..30 {
            let source = IpAddr::V4(Ipv4Addr::new(127, 0, 0, number));
            let see = || greeting(&connect_from(source, self.address("sticky")).unwrap());
            let first = see();
            assert!(first.is_some(), "{}", self.kind);
            assert!((0..3).all(|_| see() == first), "{}: {source} moves", self.kind);
        }
    }

    /// With a cap of 1, the second client waits until the first one has left.
    fn queues_at_the_cap(&self) {
        let first = client::connect(self.address("capped"));
        assert_eq!(greeting(&first).as_deref(), Some("b"), "{}", self.kind);
        let second = client::connect(self.address("capped"));
        second.set_read_timeout(Some(ms(300))).unwrap();
        let waits = (&second).read(&mut [0]).is_err();
        assert!(waits, "{}: the second client waits", self.kind);
        drop(first);
        second.set_read_timeout(Some(patience(secs(10)))).unwrap();
        assert_eq!(greeting(&second).as_deref(), Some("b"), "{}", self.kind);
    }
}

fn addresses() -> BTreeMap<&'static str, SocketAddr> {
    SERVICES.map(|name| (name, SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())))).into()
}

/// The first byte that the backend sends; `None`: the session ends without one.
fn greeting(mut stream: &TcpStream) -> Option<String> {
    let mut byte = [0];
    let read = stream.read(&mut byte).ok()?;
    (read == 1).then(|| char::from(byte[0]).to_string())
}
