//! Probes of a real MariaDB server: logins, TLS, the role, and what a probe leaves behind.

use super::rigs::mariadb::{Mariadb, PROGRAMS};
use super::rigs::private_file;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::find;
use crate::common::{Engine, eventually, exclusive, have, measured, ms, patience, secs};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

fn pool(name: &str, address: SocketAddr, keys: &str) -> Pool {
    let probe = format!("kind = \"mysql\"\ninterval = \"200ms\"\ntimeout = \"200ms\"\n{keys}");
    Pool::new(name).probe(&probe).backend("a", address)
}

fn start(server: &Mariadb, probes: &[(&str, String)]) -> TestProxy {
    let conf = probes.iter().fold(Conf::new(Engine::Epoll), |conf, (name, keys)| {
        conf.frontend(name, name, "").pool(pool(name, server.address, keys))
    });
    TestProxy::start(conf)
}

#[track_caller]
fn wait_for(proxy: &TestProxy, pool: &str, detail: &str) {
    eventually(secs(10), &format!("{pool}: {detail}"), || {
        proxy.explained(pool, "a")["last_probe"]["detail"] == detail
    });
}

#[test]
fn login_over_mysql_finds_the_role_and_leaves_no_aborted_connection() {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let files = tempfile::tempdir().expect("directory");
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("certificate");
    let trusted = private_file(files.path(), "trusted.pem", &made.cert.pem());
    let key = private_file(files.path(), "key.pem", &made.signing_key.serialize_pem());
    super::rigs::give("mysql", files.path());
    let server = Mariadb::start(&[&format!("--ssl-cert={trusted}"), &format!("--ssl-key={key}")]);
    server
        .sql(
            "INSTALL SONAME 'auth_ed25519';
             CREATE USER open@'%';
             CREATE USER native@'%' IDENTIFIED VIA mysql_native_password USING PASSWORD('secret');
             CREATE USER encrypted@'%' IDENTIFIED BY 'secret' REQUIRE SSL;
             CREATE USER edwards@'%' IDENTIFIED VIA ed25519 USING PASSWORD('secret')",
        )
        .expect("create users");
    let password = |name: &str, text: &str| {
        format!("password_file = \"{}\"\n", private_file(files.path(), name, text))
    };
    let (right, wrong) = (password("right", "secret"), password("wrong", "no"));
    let tls = format!("tls = {{ verify = \"{trusted}\" }}\n");
    let good = [
        ("open", "user = \"open\"".to_owned()),
        ("native", format!("user = \"native\"\n{right}")),
        ("encrypted", format!("user = \"encrypted\"\n{right}{tls}")),
    ];
    let before = server.counter("Aborted_connects");
    let proxy = start(&server, &good);
    for (name, _) in &good {
        wait_for(&proxy, name, "role primary");
    }
    server.sql("SET GLOBAL read_only = 1").expect("set read_only");
    for (name, _) in &good {
        wait_for(&proxy, name, "role replica");
    }
    assert_eq!(server.counter("Aborted_connects"), before);
    assert_eq!(server.counter("Aborted_clients"), 0);
    assert!(!server.log().contains("Aborted"), "{}", server.log());
    // The end of the process can interrupt a probe.
    drop(proxy);

    let bad = [
        ("wrong", format!("user = \"native\"\n{wrong}")),
        ("plain", format!("user = \"encrypted\"\n{right}")),
        ("edwards", format!("user = \"edwards\"\n{right}")),
    ];
    let proxy = start(&server, &bad);
    let denied = |user: &str| {
        format!(
            "the server answers \"Access denied for user \\'{user}\\'@\\'localhost\\' (using \
             password: YES)\" (1045)"
        )
    };
    wait_for(&proxy, "wrong", &denied("native"));
    wait_for(&proxy, "plain", &denied("encrypted"));
    let detail = "the server asks for \"client_ed25519\", the probe logs in by \
                  mysql_native_password and caching_sha2_password";
    wait_for(&proxy, "edwards", detail);
}

/// Connects from 127.0.0.2 and leaves during the handshake. Returns the greeting.
fn leave(to: SocketAddr) -> String {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let socket = socket.expect("socket");
    socket.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into()).expect("bind");
    socket.connect(&to.into()).expect("connect");
    let mut stream = TcpStream::from(socket);
    let mut greeting = [0; 256];
    let count = stream.read(&mut greeting).expect("read the greeting");
    String::from_utf8_lossy(&greeting[..count]).into_owned()
}

#[test]
fn probes_without_a_user_do_not_make_mysql_block_this_host() {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let server = Mariadb::start(&["--max-connect-errors=3"]);
    // Without a user that this host may use, the server sends no greeting.
    server.sql("CREATE USER application@'%' IDENTIFIED BY 'secret'").expect("create a user");
    let proxy = start(&server, &[("db", "source = \"127.0.0.2\"".to_owned())]);
    let before = server.counter("Connections");
    eventually(secs(10), "ten probes are done", || server.counter("Connections") > before + 20);
    assert_eq!(proxy.backend("db", "a")["observation"], "up");
    let detail = proxy.explained("db", "a")["last_probe"]["detail"].clone();
    assert_eq!(detail, "expected answer received");
    drop(proxy);

    // The control: connections that end during the handshake do.
    let blocked = (0..8).any(|_| leave(server.address).contains("is blocked"));
    assert!(blocked, "the server blocks hosts");
    let proxy = start(&server, &[("db", "source = \"127.0.0.2\"".to_owned())]);
    eventually(secs(10), "the probe names the block", || {
        let detail = proxy.explained("db", "a")["last_probe"]["detail"].to_string();
        detail.contains("is blocked because of many connection errors") && detail.contains("1129")
    });
}

/// What clients have seen of their writes.
#[derive(Default)]
struct Writes {
    stop: AtomicBool,
    done: AtomicU64,
    rejected: AtomicU64,
    last_rejected: Mutex<Option<Instant>>,
    failed: Mutex<Vec<String>>,
}

impl Writes {
    /// Writes in new sessions until told to stop.
    fn run(&self, to: SocketAddr) {
        let port = to.port().to_string();
        while !self.stop.load(Ordering::Relaxed) {
            let mut client = Command::new(find("mariadb").expect("the test checked for mariadb"));
            client.args(["--no-defaults", "-h127.0.0.1", "-uapp", "-P", &port, "-e"]);
            let output = client.arg("INSERT INTO data.writes VALUES (1)").output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            match output.status.success() {
                true => drop(self.done.fetch_add(1, Ordering::Relaxed)),
                // option_prevents_statement: the server is read-only.
                false if error.contains("ERROR 1290") => {
                    self.rejected.fetch_add(1, Ordering::Relaxed);
                    *self.last_rejected.lock().unwrap() = Some(Instant::now());
                }
                false => self.failed.lock().unwrap().push(error),
            }
        }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

#[test]
fn clients_wait_while_mariadb_servers_exchange_read_only() {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let servers = thread::scope(|scope| {
        let start = |read_only: &'static str| scope.spawn(move || Mariadb::start(&[read_only]));
        [start("--read-only=0"), start("--read-only=1")].map(|one| one.join().expect("a server"))
    });
    for server in &servers {
        let sql = "CREATE DATABASE data; CREATE TABLE data.writes (number INT);
                   CREATE USER app@'%'; GRANT INSERT ON data.* TO app@'%'";
        server.sql(sql).expect("create a table");
    }
    let [a, b] = &servers;
    let probe = "kind = \"mysql\"\nuser = \"app\"\ninterval = \"200ms\"\ntimeout = \"200ms\"";
    let db = Pool::new("db").probe(probe).backend("a", a.address).backend("b", b.address);
    let wait = "when_none_eligible = \"wait\"\nqueue_max = 100";
    let conf = Conf::new(Engine::Epoll)
        .frontend("write", "primary", "")
        .pool(Pool::new("primary").key("of = \"db\"\nrole = \"primary\"").key(wait))
        .pool(db);
    let proxy = TestProxy::start(conf);
    proxy.wait_backend("primary", "a", "eligible", true);
    let (writes, write) = (Writes::default(), proxy.addr("write"));
    let (switched, resumed) = thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(|| writes.run(write))));
        eventually(secs(10), "writes are done", || writes.done() > 10);
        let switched = Instant::now();
        a.sql("SET GLOBAL read_only = 1").expect("set read_only");
        thread::sleep(ms(400));
        b.sql("SET GLOBAL read_only = 0").expect("clear read_only");
        let (cleared, before) = (Instant::now(), writes.done());
        eventually(secs(10), "writes continue", || writes.done() > before);
        let resumed = cleared.elapsed();
        eventually(secs(10), "writes continue", || writes.done() > before + 10);
        writes.stop.store(true, Ordering::Relaxed);
        (switched, resumed)
    });
    assert_eq!(*writes.failed.lock().unwrap(), [] as [String; 0], "clients wait");
    assert_eq!(proxy.metric("tidegate_refused_total", &[]), 0.0);
    let last = writes.last_rejected.lock().unwrap().map_or(Duration::ZERO, |at| at - switched);
    let rejected = writes.rejected.load(Ordering::Relaxed);
    measured(&format!(
        "{} writes, the first one {resumed:.0?} after the switch; {rejected} were rejected by the \
         former primary, the last one {last:.0?} after it became read-only",
        writes.done()
    ));
    assert!(last < patience(secs(1)), "{last:?}");
    let count = |server: &Mariadb| {
        server.sql("SELECT count(*) FROM data.writes").unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(count(a) + count(b), writes.done(), "each confirmed write is at one server");
}
