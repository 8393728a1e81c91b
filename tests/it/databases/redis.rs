//! Redis: a primary and a replica change places under load.

use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::Redis;
use crate::common::{
    Engine, eventually, exclusive, have, measured, ms, on_every_engine, patience, secs,
};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

on_every_engine!(
    writes_follow_the_primary_of_a_failover,
    clients_wait_while_redis_servers_exchange_their_roles,
);

const WAIT: &str = "when_none_eligible = \"wait\"\nqueue_max = 100";

const PROBE: &str = "kind = \"redis\"\ninterval = \"200ms\"\ntimeout = \"150ms\"\nfall = 2";

/// The pools `db`, `rw` and `ro`, with a frontend each for the last two.
fn conf(engine: Engine, nodes: &[(&str, SocketAddr)]) -> Conf {
    let db = nodes
        .iter()
        .fold(Pool::new("db").probe(PROBE), |pool, (name, address)| pool.backend(name, *address));
    Conf::new(engine)
        .frontend("write", "rw", "")
        .frontend("read", "ro", "")
        .pool(Pool::new("rw").key("of = \"db\"\nrole = \"primary\"").key(WAIT))
        .pool(Pool::new("ro").key("of = \"db\"\nrole = \"replica\""))
        .pool(db)
}

/// What writers have seen.
#[derive(Default)]
struct Writes {
    stop: AtomicBool,
    done: AtomicU64,
    at_a_replica: AtomicU64,
    last_at_a_replica: Mutex<Option<Instant>>,
    failed: AtomicU64,
}

impl Writes {
    /// Writes in new connections until told to stop.
    fn run(&self, address: SocketAddr) {
        while !self.stop.load(Ordering::Relaxed) {
            let counter = match Redis::ask(address, "INCR writes") {
                Ok(reply) if reply.starts_with(':') => &self.done,
                Ok(reply) if reply.starts_with("-READONLY") => {
                    *self.last_at_a_replica.lock().unwrap() = Some(Instant::now());
                    &self.at_a_replica
                }
                Ok(_) | Err(_) => &self.failed,
            };
            counter.fetch_add(1, Ordering::Relaxed);
            thread::sleep(ms(2));
        }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

fn writes_follow_the_primary_of_a_failover(engine: Engine) {
    if !have(&["redis-server"]) {
        return;
    }
    let _share = exclusive::shared();
    let (mut a, b) = (Redis::start(), Redis::start());
    b.follow(Some(a.address));
    let proxy = TestProxy::start(conf(engine, &[("a", a.address), ("b", b.address)]));
    let role = |name: &str| proxy.backend("db", name)["role"]["name"].clone();
    eventually(secs(10), "both roles are known", || {
        role("a") == "primary" && role("b") == "replica"
    });
    assert_eq!(Redis::ask(proxy.addr("read"), "ROLE").unwrap(), "*5", "a replica answers");

    let writes = Writes::default();
    let write = proxy.addr("write");
    thread::scope(|scope| {
        (0..4).for_each(|_| drop(scope.spawn(|| writes.run(write))));
        eventually(secs(10), "writes are done", || writes.done() > 50);
        a.kill();
        b.follow(None);
        let (promoted, before) = (Instant::now(), writes.done());
        eventually(secs(10), "writes continue", || writes.done() > before + 20);
        measured(&format!("writes continue {:.0?} after the promotion", promoted.elapsed()));

        // The former primary returns as a primary, until its manager demotes it.
        a.restart();
        eventually(secs(10), "the former primary is up", || {
            proxy.backend("db", "a")["observation"] == "up"
        });
        let first = proxy.backend("rw", "a");
        assert_eq!(
            (&first["eligible"], &first["role"]["outranked"]),
            (&false.into(), &true.into())
        );
        assert_eq!(proxy.backend("rw", "b")["eligible"], true);
        let before = writes.done();
        eventually(secs(10), "writes continue", || writes.done() > before + 20);
        a.follow(Some(b.address));
        eventually(secs(10), "the former primary serves reads", || {
            proxy.backend("ro", "a")["eligible"] == true
        });
        writes.stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(writes.at_a_replica.load(Ordering::Relaxed), 0, "writes at a replica");
    let refused = [("frontend", "write"), ("reason", "no-backend")];
    assert_eq!(proxy.metric("tidegate_refused_total", &refused), 0.0, "clients wait");
    // The killed server ends the sessions that it has just accepted, at most two of each client.
    let failed = writes.failed.load(Ordering::Relaxed);
    measured(&format!("{} writes, 0 at a replica, {failed} ended by the kill", writes.done()));
    assert!(failed <= 8, "{failed} writes got no answer");
    let value = |redis: &Redis| Redis::ask(redis.address, "GET writes").ok();
    eventually(secs(10), "the replica has all writes", || value(&a) == value(&b));
    assert!(proxy.log().contains("several backends are primaries"), "{}", proxy.log());
    let explained = proxy.cli_ok(&["explain", "rw/a"]);
    assert!(explained.contains("its role is replica"), "{explained}");
    let status = proxy.cli_ok(&["status"]);
    assert!(status.contains("role primary, of db, 1 of 2 eligible"), "{status}");
}

/// A session with a server that was a primary when it began.
struct OldSession(TcpStream);

impl OldSession {
    fn open(address: SocketAddr) -> OldSession {
        let mut stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(secs(10))).expect("set the timeout");
        stream.write_all(b"PING\r\n").expect("send");
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"+PONG\r\n");
        OldSession(stream)
    }

    /// Returns when the session was reset.
    fn wait_reset(mut self) -> Instant {
        let error = self.0.read(&mut [0]).expect_err("a reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        Instant::now()
    }
}

/// The roles change while every server works, as in a planned switch.
fn clients_wait_while_redis_servers_exchange_their_roles(engine: Engine) {
    if !have(&["redis-server"]) {
        return;
    }
    let _share = exclusive::shared();
    let (a, b) = (Redis::start(), Redis::start());
    b.follow(Some(a.address));
    let held = Pool::new("held").key("of = \"db\"\nrole = \"primary\"\non_down = \"reset\"");
    let conf = conf(engine, &[("a", a.address), ("b", b.address)]);
    let proxy = TestProxy::start(conf.frontend("held", "held", "").pool(held));
    let role = |name: &str| proxy.backend("db", name)["role"]["name"].clone();
    eventually(secs(10), "both roles are known", || {
        role("a") == "primary" && role("b") == "replica"
    });
    let writes = Writes::default();
    let (write, old) = (proxy.addr("write"), OldSession::open(proxy.addr("held")));
    let (switched, cut) = thread::scope(|scope| {
        (0..4).for_each(|_| drop(scope.spawn(|| writes.run(write))));
        eventually(secs(10), "writes are done", || writes.done() > 50);
        let switched = Instant::now();
        let cut = scope.spawn(move || old.wait_reset());
        a.follow(Some(b.address));
        // Without a primary for longer than a probe takes.
        thread::sleep(ms(400));
        b.follow(None);
        let before = writes.done();
        eventually(secs(10), "writes continue", || writes.done() > before + 50);
        writes.stop.store(true, Ordering::Relaxed);
        (switched, cut.join().expect("the old session is reset") - switched)
    });
    measured(&format!("an old session is reset {cut:.0?} after the switch"));
    // The interval of the probe is 200 ms.
    assert!(cut < patience(secs(1)), "{cut:?}");
    let last_misled = *writes.last_at_a_replica.lock().unwrap();
    let last_misled = last_misled.map_or(Duration::ZERO, |at| at - switched);
    assert_eq!(writes.failed.load(Ordering::Relaxed), 0, "clients wait, and none is reset");
    assert_eq!(proxy.metric("tidegate_refused_total", &[]), 0.0);
    assert!(proxy.metric("tidegate_queued_total", &[]) > 0.0, "clients have waited");
    // The server rejects these writes, so none of them is done twice or lost.
    let misled = writes.at_a_replica.load(Ordering::Relaxed);
    measured(&format!(
        "{} writes; {misled} were rejected by the former primary, the last one {last_misled:.0?} \
         after the switch",
        writes.done()
    ));
    assert!(last_misled < patience(secs(1)), "{last_misled:?}");
}
