//! PostgreSQL: the standby takes over under load, as with Patroni. The primary is killed in one
//! test, and stopped and demoted in the other one.

use super::rigs::postgres::{PROGRAMS, Postgres, PostgresSession};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, have, measured, ms, on_every_engine, secs};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

on_every_engine!(
    no_write_reaches_a_standby_in_a_failover_of_postgresql,
    clients_wait_in_a_switchover_of_postgresql,
);

const PROBE: &str =
    "kind = \"postgres\"\nuser = \"postgres\"\ninterval = \"200ms\"\ntimeout = \"150ms\"\nfall = 2";

const WAIT: &str = "when_none_eligible = \"wait\"\nqueue_max = 100";

/// Clients of each frontend.
const CLIENTS: u64 = 4;

/// Fails at a primary.
const READ: &str = "SELECT 1 / pg_is_in_recovery()::int";

const WRITE: &str = "INSERT INTO writes DEFAULT VALUES";

fn conf(engine: Engine, a: &Postgres, b: &Postgres, of_replicas: &str) -> Conf {
    let replicas = Pool::new("replicas").key("of = \"db\"\nrole = \"replica\"").key(of_replicas);
    Conf::new(engine)
        .frontend("write", "primary", "")
        .frontend("read", "replicas", "")
        .pool(Pool::new("primary").key("of = \"db\"\nrole = \"primary\"").key(WAIT))
        .pool(replicas)
        .pool(Pool::new("db").probe(PROBE).backend("a", a.address).backend("b", b.address))
}

/// What the clients of a frontend have seen.
#[derive(Default)]
struct Seen {
    done: AtomicU64,
    /// Statements that reached a server of the other role.
    misled: AtomicU64,
    /// Sessions that ended before the server was ready.
    not_opened: AtomicU64,
    /// Statements of open sessions that got no answer, or another error.
    failed: AtomicU64,
    pauses: Mutex<Pauses>,
}

/// The longest time without a statement that is done.
#[derive(Default)]
struct Pauses {
    last: Option<Instant>,
    longest: Duration,
}

/// Two servers, a balancer, and clients of both frontends.
struct Scene {
    proxy: TestProxy,
    stop: AtomicBool,
    writes: Seen,
    reads: Seen,
}

impl Seen {
    /// Opens sessions of ten statements each until told to stop.
    fn run(&self, address: SocketAddr, sql: &str, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let Ok(mut session) = PostgresSession::open(address) else {
                self.not_opened.fetch_add(1, Ordering::Relaxed);
                thread::sleep(ms(5));
                continue;
            };
            for _ in 0..10 {
                let counter = match session.run(sql) {
                    Ok(None) => &self.done,
                    // read_only_sql_transaction, and division_by_zero of READ.
                    Ok(Some(code)) if code == "25006" || code == "22012" => &self.misled,
                    Ok(Some(_)) | Err(_) => &self.failed,
                };
                counter.fetch_add(1, Ordering::Relaxed);
                if std::ptr::eq(counter, &raw const self.done) {
                    self.pauses.lock().unwrap().note();
                }
                thread::sleep(ms(2));
            }
        }
    }

    fn count(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    #[track_caller]
    fn continue_by(&self, more: u64, what: &str) {
        let before = Seen::count(&self.done);
        eventually(secs(10), what, || Seen::count(&self.done) > before + more);
    }
}

impl Pauses {
    fn note(&mut self) {
        let now = Instant::now();
        let pause = self.last.replace(now).map_or(Duration::ZERO, |last| now - last);
        self.longest = self.longest.max(pause);
    }
}

impl Scene {
    fn start(engine: Engine, a: &Postgres, b: &Postgres, of_replicas: &str) -> Scene {
        let proxy = TestProxy::start(conf(engine, a, b, of_replicas));
        let scene = Scene {
            proxy,
            stop: AtomicBool::new(false),
            writes: Seen::default(),
            reads: Seen::default(),
        };
        scene.wait_roles("primary", "replica");
        scene
    }

    fn wait_roles(&self, a: &str, b: &str) {
        let role = |name: &str| self.proxy.backend("db", name)["role"]["name"].clone();
        eventually(secs(10), &format!("a: {a}, b: {b}"), || role("a") == a && role("b") == b);
    }

    /// Runs `change` while clients write and read.
    fn under_load(&self, change: impl FnOnce()) {
        let (write, read) = (self.proxy.addr("write"), self.proxy.addr("read"));
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| self.writes.run(write, WRITE, &self.stop));
                scope.spawn(|| self.reads.run(read, READ, &self.stop));
            }
            self.writes.continue_by(50, "clients write");
            self.reads.continue_by(50, "clients read");
            change();
            self.stop.store(true, Ordering::Relaxed);
        });
    }

    /// No write reached a standby, and no client was reset because there was no primary. At most
    /// `not_opened_max` clients were reset by the former primary.
    fn check_writes(&self, not_opened_max: u64, what: &str) {
        assert_eq!(Seen::count(&self.writes.misled), 0, "writes at a standby");
        let refused = [("frontend", "write"), ("reason", "no-backend")];
        assert_eq!(self.proxy.metric("tidegate_refused_total", &refused), 0.0);
        let not_opened = Seen::count(&self.writes.not_opened);
        assert!(not_opened <= not_opened_max, "{not_opened} sessions did not open");
        let pause = self.writes.pauses.lock().unwrap().longest;
        let (done, failed) = (Seen::count(&self.writes.done), Seen::count(&self.writes.failed));
        measured(&format!(
            "{what}: {done} writes, longest pause {pause:.0?}, 0 at a standby, {failed} in sessions \
             that the former primary ended, {not_opened} sessions not opened"
        ));
    }
}

fn no_write_reaches_a_standby_in_a_failover_of_postgresql(engine: Engine) {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let (mut a, b) = Postgres::primary_and_standby();
    let scene = Scene::start(engine, &a, &b, "");
    scene.under_load(|| {
        a.kill();
        b.promote();
        let promoted = Instant::now();
        scene.writes.continue_by(0, "writes continue");
        measured(&format!("writes continue {:.0?} after the promotion", promoted.elapsed()));

        // The former primary returns as a primary, until its manager demotes it.
        a.restart();
        eventually(secs(10), "the former primary is up", || {
            scene.proxy.backend("db", "a")["observation"] == "up"
        });
        assert_eq!(scene.proxy.backend("primary", "a")["eligible"], false);
        scene.writes.continue_by(20, "writes continue");
    });
    // The killed server ends the sessions that it has just accepted, at most two of each client.
    scene.check_writes(2 * CLIENTS, "primary killed");
    let lost = a.sql("SELECT count(*) FROM writes").expect("count");
    let kept = b.sql("SELECT count(*) FROM writes").expect("count");
    measured(&format!("{kept} writes at the new primary, {lost} at the former one"));
    assert!(kept.parse::<u64>().unwrap() > lost.parse::<u64>().unwrap(), "{kept} > {lost}");
}

fn clients_wait_in_a_switchover_of_postgresql(engine: Engine) {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let (mut a, b) = Postgres::primary_and_standby();
    let scene = Scene::start(engine, &a, &b, WAIT);
    scene.under_load(|| {
        // A server that shuts down rejects sessions until the probes see it. So an operator
        // drains it first.
        scene.proxy.cli_ok(&["drain", "primary/a"]);
        eventually(secs(10), "the sessions of the primary have ended", || {
            scene.proxy.backend("primary", "a")["sessions_active"] == 0
        });
        a.stop();
        b.promote();
        a.follow(b.address);
        scene.wait_roles("replica", "primary");
        scene.proxy.cli_ok(&["undrain", "primary/a"]);
        scene.writes.continue_by(20, "writes continue");
        scene.reads.continue_by(20, "reads continue");
    });
    scene.check_writes(0, "switchover");
    assert_eq!(Seen::count(&scene.writes.failed), 0, "each statement is answered");
    let refused = [("reason", "no-backend")];
    assert_eq!(scene.proxy.metric("tidegate_refused_total", &refused), 0.0, "readers wait, too");
    let count = |server: &Postgres| server.sql("SELECT count(*) FROM writes").expect("count");
    eventually(secs(10), "the new standby has every write", || count(&a) == count(&b));
    let done = Seen::count(&scene.writes.done);
    assert!(count(&b).parse::<u64>().unwrap() >= done, "{done} writes were confirmed");
}
