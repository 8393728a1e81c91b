//! State that the new process receives from the old process.

use crate::common::backend::{self, Refusing, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{
    Engine, eventually, eventually_some, long, ms, on_every_engine, on_every_engine_alone, secs,
};
use std::collections::BTreeMap;

on_every_engine!(
    drains_ejections_and_observations_survive,
    counters_never_decrease,
    sessions_of_the_old_process_are_counted_when_they_end,
    round_robin_continues_in_order,
    peak_ewma_latencies_are_handed_over,
    change_of_the_file_during_an_upgrade_is_applied,
    backend_history_is_handed_over,
    explain_is_right_after_an_upgrade,
);
on_every_engine_alone!(handover_of_thousands_of_backends_is_fast);

fn drains_ejections_and_observations_survive(engine: Engine) {
    let echo = ["a", "b"].map(|_| ScriptedBackend::start(backend::echo()));
    let dead = [Refusing::new(), Refusing::new()];
    let probe = "kind = \"tcp\"\ninterval = \"30s\"\ntimeout = \"1s\"";
    let probed = Pool::new("probed")
        .probe(probe)
        .backend("up", echo[0].address())
        .backend("dead", dead[0].address)
        .backend("drained", echo[1].address());
    let plain = Pool::new("plain")
        .ejection("failures = 2\ntime = \"60s\"")
        .backend("fine", echo[0].address())
        .backend("ejected", dead[1].address);
    let conf = Conf::new(engine).frontend("probed", "probed", "").frontend("plain", "plain", "");
    let mut proxy = TestProxy::start(conf.pool(probed).pool(plain));
    proxy.wait_backend("probed", "dead", "observation", "down");
    proxy.wait_backend("probed", "up", "observation", "up");
    proxy.cli_ok(&["drain", "probed/drained"]);
    while proxy.backend("plain", "ejected")["ejected"] == false {
        client::exchange(&connect(proxy.addr("plain")), b"x").unwrap();
    }
    proxy.upgrade();
    // Read at once, before the first probe of the new process.
    let status = |pool, name| proxy.backend(pool, name);
    assert_eq!(status("probed", "up")["observation"], "up");
    assert_eq!(status("probed", "dead")["observation"], "down");
    assert_eq!(status("probed", "drained")["intent"], "draining");
    assert_eq!(status("plain", "ejected")["ejected"], true);
    assert_eq!(status("plain", "ejected")["ejections_total"], 1);
    client::exchange(&connect(proxy.addr("probed")), b"served at once").unwrap();
    assert_eq!(proxy.generation(), 1);
    proxy.cli_ok(&["undrain", "probed/drained"]);
    assert_eq!(proxy.backend("probed", "drained")["intent"], "ready");
    proxy.rebaseline();
}

/// Returns every sample of a counter or histogram by its series.
fn totals(text: &str) -> BTreeMap<String, f64> {
    let mut kinds = BTreeMap::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            kinds.insert(name.to_owned(), kind.to_owned());
        }
    }
    let counted = |series: &str| {
        let name = series.split('{').next().unwrap();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let kind = |name: &str| kinds.get(name).map(String::as_str);
        kind(name) == Some("counter") && !name.starts_with("process_")
            || base.and_then(kind) == Some("histogram")
    };
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let parsed = samples.filter_map(|line| line.rsplit_once(' '));
    parsed
        .filter(|(series, _)| counted(series))
        .map(|(series, value)| (series.to_owned(), value.parse().unwrap()))
        .collect()
}

fn counters_never_decrease(engine: Engine) {
    let server = ScriptedBackend::start(backend::echo());
    let dead = Refusing::new();
    let pool = Pool::new("web")
        .key("connect_attempts = 2")
        .ejection("failures = 3\ntime = \"1s\"")
        .backend("a", server.address())
        .backend("dead", dead.address);
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    let mut before = BTreeMap::new();
    for _ in 0..3 {
        for _ in 0..20 {
            client::exchange(&connect(proxy.addr("web")), b"some bytes").unwrap();
        }
        // The ejection must end here. Otherwise the new process publishes a table for it.
        eventually(secs(10), "the ejection ends", || {
            proxy.backend("web", "dead")["ejected"] == false
        });
        let now = totals(&proxy.admin_request("GET", "/metrics").body);
        assert_none_decreased(&before, &now);
        proxy.upgrade();
        let then = totals(&proxy.admin_request("GET", "/metrics").body);
        assert_none_decreased(&now, &then);
        before = then;
    }
    assert_eq!(proxy.metric("tidegate_sessions_total", &[]), 60.0);
    // A worker that was late with its last sessions reports them in its final message.
    eventually(secs(10), "every connect is counted", || {
        proxy.metric("tidegate_connect_seconds_count", &[("backend", "a")]) == 60.0
    });
    assert!(proxy.metric("tidegate_connect_failures_total", &[]) >= 3.0);
    assert!(proxy.metric("tidegate_uptime_seconds", &[]) < 60.0);
    proxy.rebaseline();
}

#[track_caller]
fn assert_none_decreased(before: &BTreeMap<String, f64>, now: &BTreeMap<String, f64>) {
    for (series, was) in before {
        let is = now.get(series).unwrap_or_else(|| panic!("{series} is missing, before: {was}"));
        assert!(is >= was, "{series} decreased from {was} to {is}");
    }
}

fn sessions_of_the_old_process_are_counted_when_they_end(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let conf = Conf::simple(engine, pool).process("drain_timeout = \"30s\"");
    let mut proxy = TestProxy::start(conf);
    let session = connect(proxy.addr("web"));
    client::exchange(&session, b"12345").unwrap();
    let old = proxy.upgrade();
    client::exchange(&session, b"67890").unwrap();
    let ended = |proxy: &TestProxy| proxy.metric("tidegate_session_end_total", &[]);
    assert_eq!(ended(&proxy), 0.0);
    drop(session);
    proxy.wait_gone(old, secs(5));
    eventually(secs(5), "the session is counted", || ended(&proxy) == 1.0);
    assert_eq!(proxy.metric("tidegate_sessions_total", &[]), 1.0);
    assert_eq!(proxy.metric("tidegate_bytes_total", &[("direction", "in")]), 10.0);
    assert_eq!(proxy.metric("tidegate_backend_bytes_total", &[("direction", "out")]), 10.0);
    assert_eq!(proxy.metric("tidegate_session_seconds_count", &[]), 1.0);
    assert_eq!(proxy.metric("tidegate_worker_active", &[]), 0.0);
    proxy.rebaseline();
}

fn round_robin_continues_in_order(engine: Engine) {
    let servers = ["a", "b", "c"].map(|name| ScriptedBackend::start(backend::name(name)));
    let pool = ["a", "b", "c"]
        .iter()
        .zip(&servers)
        .fold(Pool::new("web"), |pool, (name, server)| pool.backend(name, server.address()));
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    let mut order = String::new();
    for _ in 0..6 {
        order += &client::ask(proxy.addr("web")).unwrap();
        proxy.upgrade();
    }
    assert_eq!(order, "abcabc");
    proxy.rebaseline();
}

/// A process without the handed-over latency would send half of the first sessions to `slow`.
fn peak_ewma_latencies_are_handed_over(engine: Engine) {
    let quick = ScriptedBackend::start(backend::echo());
    let slow = ScriptedBackend::start(backend::script(|conn| {
        let mut buffer = [0; 16];
        if let Ok(n @ 1..) = conn.read(&mut buffer) {
            std::thread::sleep(ms(700));
            let _ = conn.write_all(&buffer[..n]);
        }
    }));
    let pool = Pool::new("web").key("balance = \"peak-ewma\"");
    let pool = pool.backend("quick", quick.address()).backend("slow", slow.address());
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    let ask = |proxy: &TestProxy| {
        client::exchange(&connect(proxy.addr("web")), b"hello").expect("an echo");
    };
    while slow.accepted() == 0 || quick.accepted() == 0 {
        ask(&proxy);
    }
    proxy.upgrade();
    let before = slow.accepted();
    (0..8).for_each(|_| ask(&proxy));
    assert_eq!(slow.accepted(), before, "a session on the slow backend");
    proxy.rebaseline();
}

/// The old process postpones the reload until after the upgrade, and the new process performs it.
fn change_of_the_file_during_an_upgrade_is_applied(engine: Engine) {
    let servers = ["a", "b"].map(|name| ScriptedBackend::start(backend::name(name)));
    let pool = Pool::new("web").backend("a", servers[0].address());
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    for round in 0..6 {
        let mut conf = proxy.conf();
        let server = &servers[(round + 1) % 2];
        let name = ["b", "a"][round % 2];
        *conf.pool_mut("web") = Pool::new("web").backend(name, server.address());
        let text = proxy.render(&conf);
        let (path, dir) = (proxy.config_path().to_owned(), proxy.dir().to_owned());
        let writer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(10 * round as u64));
            std::fs::write(dir.join("next.toml"), text).unwrap();
            std::fs::rename(dir.join("next.toml"), path).unwrap();
        });
        proxy.upgrade();
        writer.join().unwrap();
        proxy.adopt(conf);
        eventually(secs(5), "the new file is applied", || {
            client::ask(proxy.addr("web")).unwrap() == name
        });
    }
    proxy.rebaseline();
}

fn backend_history_is_handed_over(engine: Engine) {
    let server = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", server.address());
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.cli_ok(&["drain", "web/a"]);
    proxy.cli_ok(&["undrain", "web/a"]);
    let states = |proxy: &TestProxy| -> Vec<String> {
        let explained = proxy.explained("web", "a");
        let history = explained["history"].as_array().unwrap().iter();
        history.map(|entry| entry["to"].as_str().unwrap().to_owned()).collect()
    };
    let before = states(&proxy);
    assert_eq!(before[..2], ["ready", "draining"]);
    for _ in 0..2 {
        proxy.upgrade();
        assert_eq!(states(&proxy), before);
    }
    assert_eq!(proxy.backend("web", "a")["last_transition"]["to"], "ready");
    proxy.rebaseline();
}

/// Lookups by name once took 12 s of the handover.
fn handover_of_thousands_of_backends_is_fast(engine: Engine) {
    // A debug build needs longer for the status of more backends than the API timeout.
    let count = if long() && !cfg!(debug_assertions) { 50_000 } else { 5_000 };
    let server = ScriptedBackend::start(backend::echo());
    let mut pool = Pool::new("web").backend("a", server.address());
    for number in 0..count {
        let ip = std::net::Ipv4Addr::from_bits(0x7f10_0000 + number);
        pool = pool.backend(&format!("b{number}"), format!("{ip}:9"));
    }
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    let last = format!("b{}", count - 1);
    proxy.cli_ok(&["drain", &format!("web/{last}")]);
    let began = std::time::Instant::now();
    proxy.upgrade();
    let took = began.elapsed();
    crate::common::measured(&format!("{count} backends are handed over in {took:?}"));
    // A release build takes a fraction of this time.
    let a_thousand = if cfg!(debug_assertions) { ms(800) } else { ms(40) };
    let limit = a_thousand * (count / 1_000);
    assert!(took < crate::common::patience(limit), "took {took:?}");
    assert_eq!(proxy.backend("web", &last)["intent"], "draining");
    proxy.rebaseline();
}

fn explain_is_right_after_an_upgrade(engine: Engine) {
    let (echo, dead) = (ScriptedBackend::start(backend::echo()), Refusing::new());
    let pool = Pool::new("web")
        .ejection("failures = 2\ntime = \"60s\"")
        .backend("fine", echo.address())
        .backend("ejected", dead.address);
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    while proxy.backend("web", "ejected")["ejected"] == false {
        client::exchange(&connect(proxy.addr("web")), b"x").unwrap();
    }
    let number = proxy.wait_access_log(1)[0]["session"].to_string();
    assert!(proxy.cli_ok(&["explain", "--session", &number]).contains("Attempt 1, "));
    proxy.upgrade();
    let said = proxy.cli_ok(&["explain", "web/ejected"]);
    assert!(said.contains("\nNOT IN ROTATION: ejected: "), "{said}");
    assert!(said.contains("2 connects failed in a row"), "{said}");
    assert!(said.contains("no recent picks of this pool are recorded"), "{said}");
    let old = proxy.cli(&["explain", "--session", &number]);
    let error = String::from_utf8_lossy(&old.stderr).into_owned();
    assert_eq!(old.status.code(), Some(1), "{error}");
    assert!(error.contains("by an earlier process, before an upgrade"), "{error}");
    client::exchange(&connect(proxy.addr("web")), b"x").unwrap();
    let of_new = |line: &serde_json::Value| line["session"].as_u64().is_some_and(|n| n > 1_000_000);
    let last = eventually_some(secs(10), "the new process logs its session", || {
        proxy.wait_access_log(1).into_iter().find(of_new)
    });
    let said = proxy.cli_ok(&["explain", "--session", &last["session"].to_string()]);
    let flat = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat.contains("web/fine (127.0.0.1:"), "{said}");
    assert!(flat.contains("was the only backend that could be picked."), "{said}");
    assert!(flat.contains("web/ejected (ejected for "), "{said}");
    proxy.rebaseline();
}
