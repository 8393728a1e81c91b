//! The fields `why` and `skipped` of the access log: each reason once, on purpose.
//!
//! `why_ledger` checks them under load.

use crate::common::backend::{self, Refusing, ScriptedBackend, script};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use serde_json::Value;
use std::io::Read;

on_every_engine!(
    why_names_the_policy_that_decided,
    why_names_the_only_backend_a_retry_and_a_queue,
    why_names_a_trial,
    why_names_backups_and_fail_open,
    why_is_null_without_a_backend,
    decisions_survive_a_worker_panic,
);

/// The fields of a line: what decided, backends passed over, and attempts.
#[track_caller]
fn assert_line(line: &Value, why: impl Into<Value>, skipped: u64, attempts: u64) {
    let found = (&line["why"], &line["skipped"], &line["attempts"]);
    assert_eq!(found, (&why.into(), &skipped.into(), &attempts.into()), "{line:#}");
}

/// Checks that `GET /v1/explain` says about the session of this line what the line says.
#[track_caller]
pub fn assert_explained(proxy: &TestProxy, line: &Value) {
    let number = line["session"].as_u64().expect("a number");
    let answer = proxy.admin_request("GET", &format!("/v1/explain?session={number}"));
    assert_eq!(answer.status, 200, "{}\n{line:#}", answer.body);
    let session = answer.json();
    let at = format!("{session:#}\n{line:#}");
    assert_eq!((&session["client"], &session["frontend"]), (&line["client"], &line["frontend"]));
    let end = &session["end"];
    assert_eq!((&end["cause"], &end["phase"]), (&line["cause"], &line["phase"]), "{at}");
    let decisions = session["decisions"].as_array().expect("a list");
    let picked: Vec<&Value> = decisions.iter().filter(|one| !one["backend"].is_null()).collect();
    assert_eq!(Some(picked.len() as u64), line["attempts"].as_u64(), "{at}");
    if let Some(last) = picked.last() {
        assert_eq!(
            (&last["backend"]["backend"], &last["why"]),
            (&line["backend"], &line["why"]),
            "{at}"
        );
        assert_eq!(last["skipped_total"], line["skipped"], "{at}");
    }
    let failed = decisions.iter().filter(|one| !one["failure"].is_null());
    let failed: Vec<_> =
        failed.map(|one| (&one["backend"]["backend"], &one["failure"], &one["errno"])).collect();
    let tries = line["tries"].as_array().expect("a list").iter();
    let tries: Vec<_> =
        tries.map(|one| (&one["backend"], &one["failure"], &one["errno"])).collect();
    assert_eq!(failed, tries, "{at}");
}

fn ask(proxy: &TestProxy, frontend: &str) -> String {
    client::ask(proxy.addr(frontend)).unwrap_or_default()
}

fn why_names_the_policy_that_decided(engine: Engine) {
    let backends = ["a", "b"].map(|name| (name, ScriptedBackend::start(backend::name(name))));
    let policies = [
        ("weighted-round-robin", "turn"),
        ("least-connections", "least"),
        ("two-choices", "least"),
        ("peak-ewma", "least"),
        ("random", "draw"),
        ("source-hash", "hash"),
    ];
    let mut conf = Conf::new(engine);
    for (policy, _) in policies {
        let pool = Pool::new(policy).key(&format!("balance = \"{policy}\""));
        let with =
            |pool: Pool, (name, one): &(&str, ScriptedBackend)| pool.backend(name, one.address());
        conf = conf.frontend(policy, policy, "").pool(backends.iter().fold(pool, with));
    }
    let proxy = TestProxy::start(conf);
    for (sessions, (policy, why)) in policies.into_iter().enumerate() {
        let name = ask(&proxy, policy);
        let line = &proxy.wait_access_log(sessions + 1)[sessions];
        assert_line(line, why, 0, 1);
        assert_eq!(line["backend"], name, "{line:#}");
    }
}

fn why_names_the_only_backend_a_retry_and_a_queue(engine: Engine) {
    let (a, b) = (ScriptedBackend::start(backend::greet("x")), Refusing::new());
    let only = Pool::new("only").backend("a", a.address());
    let retry =
        Pool::new("retry").backend_with("b", b.address, "weight = 1000").backend("a", a.address());
    let queue = Pool::new("queue").key("queue_max = 4\nqueue_timeout = \"20s\"").backend_with(
        "a",
        a.address(),
        "connections_max = 1",
    );
    let names = ["only", "retry", "queue"];
    let conf = names.iter().fold(Conf::new(engine), |conf, name| conf.frontend(name, name, ""));
    let proxy = TestProxy::start(conf.pool(only).pool(retry).pool(queue));

    ask(&proxy, "only");
    assert_line(&proxy.wait_access_log(1)[0], "only", 0, 1);
    ask(&proxy, "retry");
    assert_line(&proxy.wait_access_log(2)[1], "retry", 1, 2);

    let mut holder = connect(proxy.addr("queue"));
    holder.read_exact(&mut [0]).unwrap();
    let mut queued = connect(proxy.addr("queue"));
    eventually(secs(5), "the client is queued", || {
        proxy.metric("tidegate_pool_queued", &[("pool", "queue")]) == 1.0
    });
    drop(holder);
    queued.read_exact(&mut [0]).unwrap();
    drop(queued);
    // Each worker has a queue of lines, so the two lines come in any order.
    let mut log = proxy.wait_access_log(4).split_off(2);
    log.sort_by_key(|line| line["why"].to_string());
    assert_line(&log[0], "only", 0, 1);
    assert_line(&log[1], "queue", 0, 1);
}

fn why_names_a_trial(engine: Engine) {
    let (good, refusing) = (ScriptedBackend::start(backend::name("b")), Refusing::new());
    let address = refusing.address;
    let pool = Pool::new("web")
        .ejection("failures = 2\ntime = \"600ms\"")
        .backend("a", address)
        .backend("b", good.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    eventually(secs(10), "a is ejected", || {
        assert_eq!(ask(&proxy, "web"), "b");
        proxy.backend("web", "a")["ejected"] == true
    });
    eventually(secs(10), "b is the only backend while a is ejected", || {
        assert_eq!(ask(&proxy, "web"), "b");
        proxy.access_log().iter().any(|line| line["why"] == "only" && line["skipped"] == 1)
    });
    drop(refusing);
    let _a = ScriptedBackend::start_on(address, backend::name("a"));
    eventually(secs(20), "a serves its trial session", || ask(&proxy, "web") == "a");
    eventually(secs(5), "the session is logged", || {
        proxy.access_log().iter().any(|line| line["backend"] == "a" && line["attempts"] == 1)
    });
    let log = proxy.access_log();
    let first = log.iter().find(|line| line["backend"] == "a");
    assert_line(first.unwrap(), "trial", 0, 1);
}

fn why_names_backups_and_fail_open(engine: Engine) {
    let backups = [(); 2].map(|()| ScriptedBackend::start(backend::name("backup")));
    let refusing = Refusing::new();
    let spare = Pool::new("spare")
        .backend("a", refusing.address)
        .backend_with("s", backups[0].address(), "backup = true")
        .backend_with("t", backups[1].address(), "backup = true");
    let open = Pool::new("open")
        .key("when_none_eligible = \"try-all\"")
        .probe("interval = \"100ms\"\ntimeout = \"100ms\"\nfall = 1")
        .backend("a", refusing.address)
        .backend("b", format!("127.0.0.1:{}", crate::common::ports::free_port()));
    let names = ["spare", "open"];
    let conf = names.iter().fold(Conf::new(engine), |conf, name| conf.frontend(name, name, ""));
    let proxy = TestProxy::start(conf.pool(spare).pool(open));
    proxy.cli_ok(&["drain", "spare/a"]);
    assert_eq!(ask(&proxy, "spare"), "backup");
    assert_line(&proxy.wait_access_log(1)[0], "backup", 1, 1);
    proxy.wait_backend("open", "a", "observation", "down");
    proxy.wait_backend("open", "b", "observation", "down");
    client::ask(proxy.addr("open")).unwrap_err();
    let line = &proxy.wait_access_log(2)[1];
    // The first pick fails open, and the retry is the last one.
    assert_eq!((&line["why"], &line["attempts"]), (&"retry".into(), &2.into()), "{line:#}");
    let mut conf = proxy.conf();
    conf.pool_mut("open").keys += "connect_attempts = 1\n";
    let mut proxy = proxy;
    proxy.reload(conf);
    client::ask(proxy.addr("open")).unwrap_err();
    assert_line(&proxy.wait_access_log(3)[2], "fail-open", 0, 1);
}

fn why_is_null_without_a_backend(engine: Engine) {
    let hold = ScriptedBackend::start(script(|conn| {
        let _ = conn.write_all(b"x");
        conn.drain();
    }));
    let full = Pool::new("full").key("queue_max = 4\nqueue_timeout = \"200ms\"").backend_with(
        "a",
        hold.address(),
        "connections_max = 1",
    );
    let refusing = [(); 2].map(|()| Refusing::new());
    let none =
        Pool::new("none").backend("a", refusing[0].address).backend("b", refusing[1].address);
    let conf = Conf::new(engine)
        .frontend("full", "full", "")
        .frontend("none", "none", "")
        .frontend("denied", "none", "[frontend.denied.sources]\ndeny = [\"127.0.0.0/8\"]");
    let proxy = TestProxy::start(conf.pool(full).pool(none));
    for name in ["a", "b"] {
        proxy.cli_ok(&["drain", &format!("none/{name}")]);
    }
    client::connect_and_read_to_end(proxy.addr("none"));
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "no-backend");
    assert_line(&log[0], Value::Null, 2, 0);
    client::connect_and_read_to_end(proxy.addr("denied"));
    let log = proxy.wait_access_log(2);
    assert_eq!(log[1]["cause"], "denied");
    assert_line(&log[1], Value::Null, 0, 0);
    let mut holder = connect(proxy.addr("full"));
    holder.read_exact(&mut [0]).unwrap();
    client::connect_and_read_to_end(proxy.addr("full"));
    let log = proxy.wait_access_log(3);
    assert_eq!(log[2]["cause"], "queue-timeout");
    assert_line(&log[2], Value::Null, 1, 0);
}

/// A restarted worker continues in the same rings.
fn decisions_survive_a_worker_panic(engine: Engine) {
    if !cfg!(debug_assertions) {
        return;
    }
    let (echo, refusing) = (ScriptedBackend::start(backend::echo()), Refusing::new());
    let pool = Pool::new("web")
        .backend_with("b", refusing.address, "weight = 1000")
        .backend("a", echo.address());
    let conf = Conf::simple(engine, pool).workers(1);
    let proxy = TestProxy::start_under(conf, &["env", "TIDEGATE_FAULTS=1"]);
    client::exchange(&connect(proxy.addr("web")), b"x").unwrap();
    let open = connect(proxy.addr("web"));
    client::exchange(&open, b"x").unwrap();
    proxy.wait_access_log(1);
    assert_eq!(proxy.admin_request("POST", "/debug/fault/worker/0/0").status, 200);
    client::read_to_end(&open);
    eventually(secs(10), "the worker serves again", || {
        client::try_connect(proxy.addr("web")).is_ok_and(|one| client::exchange(&one, b"x").is_ok())
    });
    let log = proxy.wait_access_log(3);
    assert_eq!((&log[0]["attempts"], &log[1]["cause"]), (&2.into(), &"internal-error".into()));
    log.iter().for_each(|line| assert_explained(&proxy, line));
}
