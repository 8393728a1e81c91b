//! PostgreSQL: the primary is killed and the standby promoted under load, as Patroni does.

use super::rigs::postgres::{PROGRAMS, Postgres, PostgresSession};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, exclusive, have, measured, ms, on_every_engine, secs};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

on_every_engine!(no_write_reaches_a_standby_in_a_failover_of_postgresql);

const PROBE: &str =
    "kind = \"postgres\"\nuser = \"postgres\"\ninterval = \"200ms\"\ntimeout = \"150ms\"\nfall = 2";

fn conf(engine: Engine, a: &Postgres, b: &Postgres) -> Conf {
    Conf::new(engine)
        .frontend("write", "primary", "")
        .frontend("read", "replicas", "")
        .pool(Pool::new("primary").key("of = \"db\"\nrole = \"primary\""))
        .pool(Pool::new("replicas").key("of = \"db\"\nrole = \"replica\""))
        .pool(Pool::new("db").probe(PROBE).backend("a", a.address).backend("b", b.address))
}

/// What clients have seen.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    written: AtomicU64,
    read: AtomicU64,
    writes_at_a_standby: AtomicU64,
    reads_at_a_primary: AtomicU64,
    failed: AtomicU64,
}

impl Load {
    /// Opens sessions of ten statements each until told to stop.
    fn run(&self, address: SocketAddr, sql: &str, done: &AtomicU64, misled: &AtomicU64) {
        while !self.stop.load(Ordering::Relaxed) {
            let Ok(mut session) = PostgresSession::open(address) else {
                self.failed.fetch_add(1, Ordering::Relaxed);
                thread::sleep(ms(5));
                continue;
            };
            for _ in 0..10 {
                let counter = match session.run(sql) {
                    Ok(None) => done,
                    // read_only_sql_transaction, and division_by_zero of READ.
                    Ok(Some(code)) if code == "25006" || code == "22012" => misled,
                    Ok(Some(_)) | Err(_) => &self.failed,
                };
                counter.fetch_add(1, Ordering::Relaxed);
                thread::sleep(ms(2));
            }
        }
    }
}

/// Fails at a primary.
const READ: &str = "SELECT 1 / pg_is_in_recovery()::int";

fn no_write_reaches_a_standby_in_a_failover_of_postgresql(engine: Engine) {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let mut a = Postgres::start();
    a.sql("CREATE TABLE writes (at timestamptz DEFAULT now())").expect("create a table");
    let b = a.standby();
    let proxy = TestProxy::start(conf(engine, &a, &b));
    let role = |name: &str| proxy.backend("db", name)["role"]["name"].clone();
    eventually(secs(10), "both roles are known", || {
        role("a") == "primary" && role("b") == "replica"
    });

    let load = Load::default();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (write, read) = (proxy.addr("write"), proxy.addr("read"));
    thread::scope(|scope| {
        for _ in 0..4 {
            let insert = "INSERT INTO writes DEFAULT VALUES";
            scope.spawn(|| load.run(write, insert, &load.written, &load.writes_at_a_standby));
            scope.spawn(|| load.run(read, READ, &load.read, &load.reads_at_a_primary));
        }
        eventually(secs(10), "clients write and read", || {
            count(&load.written) > 50 && count(&load.read) > 50
        });
        a.kill();
        b.promote();
        let (promoted, before) = (Instant::now(), count(&load.written));
        eventually(secs(10), "writes continue", || count(&load.written) > before + 20);
        measured(&format!("writes continue {:.0?} after the promotion", promoted.elapsed()));

        // The former primary returns as a primary, until its manager demotes it.
        a.restart();
        eventually(secs(10), "the former primary is up", || {
            proxy.backend("db", "a")["observation"] == "up"
        });
        assert_eq!(proxy.backend("primary", "a")["eligible"], false);
        let before = count(&load.written);
        eventually(secs(10), "writes continue", || count(&load.written) > before + 20);
        load.stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(count(&load.writes_at_a_standby), 0, "writes at a standby");
    let lost = a.sql("SELECT count(*) FROM writes").expect("count");
    let kept = b.sql("SELECT count(*) FROM writes").expect("count");
    measured(&format!("{kept} writes at the new primary, {lost} at the former one"));
    assert!(kept.parse::<u64>().unwrap() > lost.parse::<u64>().unwrap(), "{kept} > {lost}");
}
