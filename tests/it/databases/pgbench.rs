//! pgbench through the pools `primary` and `replicas` while the primary fails: it is killed in one
//! test, and hangs with open sessions in the other one. The standby is promoted in both.

use super::rigs::postgres::{PROGRAMS, Pgbench, Postgres, PostgresSession};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{
    Engine, eventually, eventually_some, exclusive, have, measured, on_every_engine, patience, secs,
};
use std::time::{Duration, SystemTime};

on_every_engine!(
    pgbench_writes_at_the_new_primary_after_the_old_one_is_killed,
    sessions_of_a_primary_that_hangs_are_cut_within_a_second,
);

const PROBE: &str =
    "kind = \"postgres\"\nuser = \"postgres\"\ninterval = \"200ms\"\ntimeout = \"150ms\"\nfall = 2";

const KEYS: &str = "when_none_eligible = \"wait\"\nqueue_max = 100\non_down = \"reset\"";

/// Fails at a standby with "cannot execute INSERT in a read-only transaction".
const WRITE: &str = "INSERT INTO writes DEFAULT VALUES;\n";

/// Fails at a primary with "division by zero".
const READ: &str = "SELECT 1 / pg_is_in_recovery()::int;\n";

/// A primary, its standby, a balancer, and pgbench at both frontends.
struct Scene {
    writes: Pgbench,
    reads: Pgbench,
    proxy: TestProxy,
    a: Postgres,
    b: Postgres,
}

fn conf(engine: Engine, a: &Postgres, b: &Postgres) -> Conf {
    let pool = |name: &str, role: &str| {
        Pool::new(name).key(&format!("of = \"db\"\nrole = \"{role}\"")).key(KEYS)
    };
    // No replica is left after the promotion. The balancer cannot know whether a client that has
    // sent FIN still reads, so such a client waits this long.
    let replicas = pool("replicas", "replica").key("queue_timeout = \"3s\"");
    Conf::new(engine)
        .frontend("write", "primary", "")
        .frontend("read", "replicas", "")
        .pool(pool("primary", "primary"))
        .pool(replicas)
        .pool(Pool::new("db").probe(PROBE).backend("a", a.address).backend("b", b.address))
}

// === impl Scene ===

impl Scene {
    fn start(engine: Engine) -> Scene {
        let (a, b) = Postgres::primary_and_standby();
        let proxy = TestProxy::start(conf(engine, &a, &b));
        proxy.wait_backend("primary", "a", "eligible", true);
        proxy.wait_backend("replicas", "b", "eligible", true);
        let writes = Pgbench::start(proxy.addr("write"), WRITE);
        let reads = Pgbench::start(proxy.addr("read"), READ);
        let scene = Scene { writes, reads, proxy, a, b };
        scene.writes_continue_at(&scene.a);
        eventually(secs(20), "clients read", || scene.active("replicas", "b") > 0);
        scene
    }

    fn active(&self, pool: &str, backend: &str) -> u64 {
        self.proxy.backend(pool, backend)["sessions_active"].as_u64().expect("a count")
    }

    #[track_caller]
    fn writes_continue_at(&self, server: &Postgres) {
        let count = || server.sql("SELECT count(*) FROM writes").ok()?.parse::<u64>().ok();
        let before = eventually_some(secs(10), "a count of the writes", count);
        eventually(patience(secs(20)), "clients write", || count() > Some(before + 50));
    }

    /// The time since the balancer found that the backend is down.
    fn since_down(&self, backend: &str) -> Duration {
        let answer = self.proxy.admin_request("GET", "/v1/events?kind=state&pool=primary").json();
        let events = answer["events"].as_array().expect("a list");
        let down = events.iter().rev().find(|event| {
            event["subject"].as_str().is_some_and(|subject| subject.ends_with(backend))
                && event["text"].as_str().is_some_and(|text| text.contains("down"))
        });
        let at = down.expect("an event of the failure")["at"].as_f64().expect("a time");
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a time");
        now.saturating_sub(Duration::from_secs_f64(at))
    }

    /// No write reached a standby, and no client was reset because there was no primary.
    fn check(self, what: &str) {
        let refused = [("frontend", "write"), ("reason", "no-backend")];
        assert_eq!(self.proxy.metric("tidegate_refused_total", &refused), 0.0);
        let (writes, reads) = (self.writes.errors(), self.reads.errors());
        assert_eq!(writes.matches("read-only").count(), 0, "writes at a standby: {writes}");
        assert!(!writes.contains("syntax error") && !reads.contains("syntax error"), "{reads}");
        let count = self.b.sql("SELECT count(*) FROM writes").expect("count");
        let aborted = writes.matches(" aborted ").count();
        let rejected = writes.matches("connection to server").count();
        // A killed server ends the sessions that it has just accepted.
        assert!(rejected <= 8, "{rejected} sessions did not open: {writes}");
        measured(&format!(
            "{what}: {count} writes at the new primary, 0 at a standby; {aborted} sessions of \
             pgbench cut, {rejected} not opened"
        ));
    }
}

fn pgbench_writes_at_the_new_primary_after_the_old_one_is_killed(engine: Engine) {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let mut scene = Scene::start(engine);
    scene.a.kill();
    scene.b.promote();
    scene.writes_continue_at(&scene.b);
    assert_eq!(scene.active("primary", "a"), 0, "the killed server has no sessions");
    scene.check("primary killed");
}

/// The open sessions of such a server could still write.
fn sessions_of_a_primary_that_hangs_are_cut_within_a_second(engine: Engine) {
    if !have(&PROGRAMS) {
        return;
    }
    let _share = exclusive::shared();
    let scene = Scene::start(engine);
    let mut direct = PostgresSession::open(scene.a.address).expect("a session past the balancer");
    let mut written = || direct.ask("SELECT count(*) FROM writes").expect("an answer").value;
    // Only the process that accepts: the processes of the sessions continue.
    scene.a.hang();
    scene.proxy.wait_backend("primary", "a", "eligible", false);
    eventually(secs(10), "no session of the former primary", || scene.active("primary", "a") == 0);
    let took = scene.since_down("a");
    measured(&format!("the old sessions are cut {took:.0?} after the verdict at the latest"));
    assert!(took < patience(secs(1)), "{took:?}");
    let before = written();
    scene.b.promote();
    scene.writes_continue_at(&scene.b);
    assert_eq!(written(), before, "no write at the former primary after the verdict");
    scene.a.resume();
    eventually(secs(10), "the former primary answers probes", || {
        scene.proxy.backend("db", "a")["observation"] == "up"
    });
    assert_eq!(scene.proxy.backend("primary", "a")["eligible"], false, "b is the primary now");
    scene.writes_continue_at(&scene.b);
    scene.check("primary hung");
}
