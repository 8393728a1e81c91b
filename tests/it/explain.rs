//! What `explain`, `status` and the access log report about failures that eject a backend
//! and about failures that do not.

use crate::common::backend::{self, Refusing, ScriptedBackend};
use crate::common::client;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use std::io::Write;

on_every_engine!(
    explain_shows_refused_connects_ejection_and_trial,
    explain_counts_early_resets,
    explain_names_failures_while_ejection_is_off,
    explain_shows_the_last_probe,
    explain_says_what_happens_while_no_backend_is_eligible,
    explain_names_the_guard_that_prevents_an_ejection,
    access_log_lists_every_failed_attempt,
    session_is_explained_by_the_number_of_the_access_log,
    forecast_is_what_the_next_client_gets,
    forecast_at_a_cap_waits_in_the_listen_queue,
    forecast_waits_in_the_listen_queue_if_every_pool_is_full,
    forecast_names_the_only_free_backend_and_the_full_one,
);

fn explain_shows_refused_connects_ejection_and_trial(engine: Engine) {
    let (a, b) = (ScriptedBackend::start(backend::name("a")), Refusing::new());
    let pool = Pool::new("web")
        .ejection("failures = 5\ntime = \"1s\"")
        .backend("a", a.address())
        .backend("b", b.address);
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let explained = || proxy.explained("web", "b");
    assert_eq!(explained()["why"], "no probes or heartbeats configured, full weight");
    assert!(proxy.cli_ok(&["status"]).contains("no probes"));

    let ask = || assert_eq!(client::ask(proxy.addr("web")).expect("the other backend serves"), "a");
    eventually(secs(10), "three connects were refused", || {
        let failures = explained()["failures"]["connects"].as_u64().expect("a count");
        if failures < 3 {
            ask();
        }
        failures >= 3
    });
    let facts = explained();
    let (failures, why) = (&facts["failures"], facts["why"].as_str().expect("a sentence"));
    let count = failures["connects"].as_u64().expect("a count");
    assert_eq!(failures["last"], "connection refused", "{facts:#}");
    assert_eq!(failures["connects_total"], count, "{facts:#}");
    assert_eq!((&failures["in_a_row"], &failures["eject_at"]), (&count.into(), &5.into()));
    assert!(why.contains(&format!("{count} connects failed in the last")), "{why}");
    assert!(why.contains("connection refused"), "{why}");
    let said = proxy.cli_ok(&["explain", "web/b"]);
    assert!(said.contains(&format!("{count} in a row, ejection at 5")), "{said}");
    assert!(said.contains(&format!("{count} failed connects, 0 resets")), "{said}");

    eventually(secs(10), "the backend is ejected", || {
        ask();
        explained()["ejection"]["ejected"] == true
    });
    let why = explained()["why"].to_string();
    assert!(why.contains("ejected: ") && why.contains("5 connects failed in a row"), "{why}");
    // No session runs the trial.
    eventually(secs(10), "the backend is on trial", || {
        !explained()["ejection"]["trial_seconds"].is_null()
    });
    let facts = explained();
    let why = facts["why"].to_string();
    assert!(why.contains("on trial for ") && why.contains("connection refused"), "{why}");
    assert!(why.contains("; no session has tried it yet; a success ends the trial"), "{why}");
    let said = proxy.cli_ok(&["explain", "web/b"]);
    assert!(
        said.contains("IN ROTATION for one trial session") && said.contains("ON TRIAL"),
        "{said}"
    );
    assert!(proxy.cli_ok(&["status"]).contains("  trial  "), "status shows the trial");
}

fn explain_counts_early_resets(engine: Engine) {
    let bad = ScriptedBackend::start(backend::reset_after(1));
    let pool = Pool::new("web").backend("bad", bad.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let mut stream = client::connect(proxy.addr("web"));
    stream.write_all(b"x").expect("send");
    client::read_to_end(&stream);
    eventually(secs(5), "the reset is counted", || {
        proxy.explained("web", "bad")["failures"]["early_resets"] == 1
    });
    let why = proxy.explained("web", "bad")["why"].to_string();
    assert!(why.contains("1 session reset before the first byte"), "{why}");
}

/// Asks `explain` for the sentence in JSON and for the second line of the text.
fn headline(proxy: &TestProxy, backend: &str) -> (String, String) {
    let explained = proxy.explained("web", backend);
    let why = explained["why"].as_str().expect("a sentence").to_owned();
    let said = proxy.cli_ok(&["explain", &format!("web/{backend}")]);
    (why, said.lines().nth(1).expect("a headline").to_owned())
}

fn explain_names_failures_while_ejection_is_off(engine: Engine) {
    let (a, b) = (ScriptedBackend::start(backend::name("a")), Refusing::new());
    let pool = Pool::new("web")
        .key("ejection = \"off\"")
        .backend("a", a.address())
        .backend("b", b.address);
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    eventually(secs(10), "three connects were refused", || {
        client::ask(proxy.addr("web")).expect("the other backend serves");
        proxy.explained("web", "b")["failures"]["connects"] == 3
    });
    let (why, line) = headline(&proxy, "b");
    assert!(why.starts_with("3 connects failed in the last "), "{why}");
    let end = "connection refused), 3 in a row, ejection is off; \
               no probes or heartbeats configured, full weight";
    assert!(why.ends_with(end), "{why}");
    assert!(line.starts_with("IN ROTATION: 3 connects failed in the last "), "{line}");
    let said = proxy.cli_ok(&["explain", "web/b"]);
    assert!(said.contains("; 3 in a row, ejection is off; 3 failed attempts"), "{said}");
    assert!(proxy.explained("web", "b")["failures"]["eject_at"].is_null());
}

fn explain_shows_the_last_probe(engine: Engine) {
    let (good, bad) = (backend::http("a", 204), backend::http("b", 503));
    let (good, bad) = (ScriptedBackend::start(good), ScriptedBackend::start(bad));
    let pool = Pool::new("web")
        .probe("kind = \"http\"\ninterval = \"1s\"\ntimeout = \"1s\"")
        .backend("good", good.address())
        .backend("bad", bad.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.wait_backend("web", "good", "observation", "up");
    proxy.wait_backend("web", "bad", "observation", "down");
    for (name, result, detail, said) in [
        ("good", "success", "status 204", "succeeded after "),
        ("bad", "failure", "status 503, expected 200-399", "failed after "),
    ] {
        let last = proxy.explained("web", name)["last_probe"].clone();
        assert_eq!((&last["result"], &last["detail"]), (&result.into(), &detail.into()));
        assert!(last["took_seconds"].as_f64().is_some_and(|took| took > 0.0), "{last}");
        assert!(last["ended_seconds_ago"].as_f64().is_some_and(|ago| ago < 5.0), "{last}");
        assert_eq!(last["confirmation"], false, "{last}");
        let text = proxy.cli_ok(&["explain", &format!("web/{name}")]);
        let line = text.lines().find(|line| line.starts_with("Last probe")).expect("a line");
        assert!(line.contains(said) && line.ends_with(&format!(" ago: {detail}")), "{line}");
    }
}

fn explain_says_what_happens_while_no_backend_is_eligible(engine: Engine) {
    let (a, b) = (Refusing::new(), Refusing::new());
    let pool = Pool::new("web")
        .probe("kind = \"tcp\"\ninterval = \"200ms\"")
        .backend("a", a.address)
        .backend("b", b.address);
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    for name in ["a", "b"] {
        proxy.wait_backend("web", name, "observation", "down");
    }
    let down = "down: first probe failed: connection refused; no backend of the pool is eligible, ";
    let (why, line) = headline(&proxy, "a");
    let reset = "so new sessions are reset (when_none_eligible = \"refuse\")";
    assert_eq!(why, format!("{down}{reset}"));
    assert_eq!(line, format!("NOT IN ROTATION: {down}{reset}"));
    assert_eq!(proxy.explained("web", "a")["none_eligible"], "refuse");

    let mut conf = proxy.conf();
    let pool = conf.pool_mut("web").clone().key("when_none_eligible = \"try-all\"");
    *conf.pool_mut("web") = pool;
    proxy.reload(conf);
    proxy.cli_ok(&["drain", "web/b"]);
    let (why, _) = headline(&proxy, "a");
    let tried = "so it still gets new sessions (when_none_eligible = \"try-all\")";
    assert_eq!(why, format!("{down}{tried}"));
    let (why, line) = headline(&proxy, "b");
    let drained = "an operator set it to draining; no backend of the pool is eligible, so new \
                   sessions try the backends that are not drained \
                   (when_none_eligible = \"try-all\")";
    assert_eq!((&*why, line), (drained, format!("NOT IN ROTATION: {drained}")));
}

fn explain_names_the_guard_that_prevents_an_ejection(engine: Engine) {
    let backends = [Refusing::new(), Refusing::new(), Refusing::new()];
    let mut pool = Pool::new("web").ejection("failures = 2\ntime = \"60s\"\nmax_ejected = \"34%\"");
    for (name, backend) in ["a", "b", "c"].into_iter().zip(&backends) {
        pool = pool.backend(name, backend.address);
    }
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let prevented = |name| proxy.explained("web", name)["guards"]["prevented"].clone();
    let mut held = Vec::new();
    eventually(secs(10), "the guard prevents two ejections", || {
        client::ask(proxy.addr("web")).unwrap_err();
        held = ["a", "b", "c"].into_iter().filter(|name| !prevented(name).is_null()).collect();
        held.len() == 2
    });
    let (why, line) = headline(&proxy, held[0]);
    let reason = "max_ejected = 34% allows 1 of 3 backends to be removed, and 1 already is";
    assert_eq!(prevented(held[0])["reason"], reason);
    assert!(why.starts_with("although "), "{why}");
    let against = format!(" connects failed in a row, last: connection refused: {reason}; ");
    assert!(why.contains(&against), "{why}");
    assert!(line.starts_with("IN ROTATION although ") && line.contains(&against), "{line}");
    let said = proxy.cli_ok(&["explain", &format!("web/{}", held[0])]);
    assert!(said.contains("PREVENTS THE REMOVAL of this backend: max_ejected = 34%"), "{said}");
}

fn access_log_lists_every_failed_attempt(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let (b, c) = (Refusing::new(), Refusing::new());
    let pool = Pool::new("web").backend("b", b.address).backend("c", c.address).backend_with(
        "a",
        a.address(),
        "backup = true",
    );
    let mut proxy = TestProxy::start(Conf::simple(engine, pool.clone()));
    client::ask(proxy.addr("web")).unwrap_err();
    let line = &proxy.wait_access_log(1)[0];
    let tries = line["tries"].as_array().expect("a list");
    assert_eq!((line["attempts"].as_u64(), tries.len()), (Some(2), 2), "{line:#}");
    let mut names: Vec<&str> =
        tries.iter().filter_map(|attempt| attempt["backend"].as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["b", "c"], "{line:#}");
    for attempt in tries {
        assert_eq!(
            (&attempt["failure"], &attempt["errno"]),
            (&"refused".into(), &111.into()),
            "{line:#}"
        );
        assert!(attempt["seconds"].as_f64().is_some(), "{line:#}");
    }
    // A session that another backend serves lists the refused attempts.
    let mut conf = proxy.conf();
    *conf.pool_mut("web") = Pool::new("web").backend("b", b.address).backend("a", a.address());
    proxy.reload(conf);
    for _ in 0..4 {
        assert_eq!(client::ask(proxy.addr("web")).expect("the other backend serves"), "a");
    }
    let lines = proxy.wait_access_log(5);
    assert!(lines[1..].iter().any(|line| line["attempts"] == 2), "{lines:#?}");
    for line in &lines[1..] {
        let refused = line["tries"].as_array().expect("a list");
        assert_eq!(line["backend"], "a", "{line:#}");
        assert_eq!(line["attempts"].as_u64(), Some(refused.len() as u64 + 1), "{line:#}");
        assert!(refused.iter().all(|attempt| attempt["backend"] == "b"), "{line:#}");
    }
}

fn session_is_explained_by_the_number_of_the_access_log(engine: Engine) {
    let (a, b) = (ScriptedBackend::start(backend::name("a")), Refusing::new());
    let pool = Pool::new("web")
        .key("ejection = \"off\"")
        .backend("b", b.address)
        .backend("a", a.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    client::ask(proxy.addr("web")).expect("a serves");
    client::ask(proxy.addr("web")).expect("a serves");
    let lines = proxy.wait_access_log(2);
    let line = lines.iter().find(|line| line["attempts"] == 2).expect("a retried session");
    let number = line["session"].to_string();
    let said = proxy.cli_ok(&["explain", "--session", &number, "--json"]);
    let told: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((&told["frontend"], &told["state"]), (&"web".into(), &"ended".into()), "{told:#}");
    assert_eq!(told["client"], line["client"], "{told:#}");
    let decisions = told["decisions"].as_array().expect("a list");
    assert_eq!(decisions.len(), 2, "{told:#}");
    assert_eq!(
        (&decisions[0]["why"], &decisions[0]["failure"]),
        (&"turn".into(), &"refused".into())
    );
    assert_eq!(
        (&decisions[1]["why"], &line["why"]),
        (&"retry".into(), &"retry".into()),
        "{told:#}"
    );
    assert_eq!(told["end"]["cause"], line["cause"], "{told:#}");
    let said = proxy.cli_ok(&["explain", "--session", &number]);
    let flat = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat.contains("web/b (127.0.0.1:"), "{said}");
    assert!(flat.contains("was next in turn (position "), "{said}");
    assert!(flat.contains(": refused (ECONNREFUSED)."), "{said}");
    assert!(flat.contains("was picked because the attempt before it failed"), "{said}");
    let unknown = proxy.cli(&["explain", "--session", "999999999"]);
    assert_eq!(unknown.status.code(), Some(1));
    let error = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(error.contains("has not been accepted yet"), "{error}");
}

fn forecast_is_what_the_next_client_gets(engine: Engine) {
    let all = ["a", "b", "c"].map(|name| ScriptedBackend::start(backend::name(name)));
    let mut pool = Pool::new("web").key("balance = \"source-hash\"");
    for (name, one) in ["a", "b", "c"].iter().zip(&all) {
        pool = pool.backend(name, one.address());
    }
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let got = client::ask(proxy.addr("web")).expect("a backend serves");
    let question = ["explain", "--client", "127.0.0.1", "--frontend", "web"];
    let said = proxy.cli_ok(&question);
    assert!(said.starts_with(&format!("127.0.0.1 on web would go to web/{got} (")), "{said}");
    assert!(said.lines().next().is_some_and(|line| line.ends_with(", certain.")), "{said}");
    assert!(said.lines().all(|line| line.chars().count() <= 80), "{said}");
    let without = format!("web/{got}");
    let said = proxy.cli_ok(&[&question[..], &["--without", &without]].concat());
    assert!(!said.contains(&format!("would go to web/{got} ")), "{said}");
    assert!(said.contains(&format!("Assumed: without web/{got}.")), "{said}");
    let flat = said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat.contains(&format!("web/{got} (excluded by --without)")), "{said}");
    // The retry of the forecast is the backend that the changed pool picks.
    assert_eq!(client::ask(proxy.addr("web")).expect("nothing has changed"), got);
}

fn forecast_at_a_cap_waits_in_the_listen_queue(engine: Engine) {
    for (process, frontend, reason) in [
        ("connections_max = 1", "", "The process is at its cap (process.connections_max)."),
        ("", "connections_max = 1", "The frontend is at its cap (connections_max)."),
    ] {
        let backend = ScriptedBackend::start(backend::echo());
        let pool = Pool::new("web").backend("a", backend.address());
        let conf = Conf::new(engine).frontend("web", "web", frontend).pool(pool);
        let conf = if process.is_empty() { conf } else { conf.process(process) };
        let proxy = TestProxy::start(conf);
        let question = ["explain", "--client", "127.0.0.1", "--frontend", "web"];
        assert!(proxy.cli_ok(&question).contains(" would go to web/a ("));
        let mut held = client::connect(proxy.addr("web"));
        held.write_all(b"x").expect("send");
        eventually(secs(5), "the forecast has the cap", || {
            proxy.cli_ok(&question).starts_with("127.0.0.1 on web would wait in the listen queue.")
        });
        let said = proxy.cli_ok(&question);
        let flat = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(flat.contains(reason), "{said}");
    }
}

fn forecast_waits_in_the_listen_queue_if_every_pool_is_full(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let full = |name| Pool::new(name).backend_with("a", backend.address(), "connections_max = 1");
    let conf = Conf::new(engine)
        .frontend("web", "web", "[[frontend.web.route]]\nsources = \"127.0.0.9\"\npool = \"other\"")
        .frontend("other", "other", "")
        .pool(full("web"))
        .pool(full("other"));
    let proxy = TestProxy::start(conf);
    let question = ["explain", "--client", "127.0.0.1", "--frontend", "web"];
    let hold = |frontend, expected: &str| {
        let mut held = client::connect(proxy.addr(frontend));
        held.write_all(b"x").expect("send");
        eventually(secs(5), "the forecast follows", || {
            proxy.cli_ok(&question).starts_with(&format!("127.0.0.1 on web would {expected}"))
        });
        held
    };
    let _web = hold("web", "wait for a backend");
    let _other = hold("other", "wait in the listen queue");
}

fn forecast_names_the_only_free_backend_and_the_full_one(engine: Engine) {
    let [a, b] = ["a", "b"].map(|_| ScriptedBackend::start(backend::echo()));
    let pool = Pool::new("web")
        .key("balance = \"random\"")
        .backend_with("a", a.address(), "connections_max = 1")
        .backend("b", b.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    proxy.cli_ok(&["drain", "web/b"]);
    let mut held = client::connect(proxy.addr("web"));
    held.write_all(b"x").expect("send");
    eventually(secs(5), "a is at its cap", || {
        let (why, _) = headline(&proxy, "a");
        why.ends_with("; at its cap (1 of 1 sessions): no session until a slot is free")
    });
    proxy.cli_ok(&["undrain", "web/b"]);
    let question = ["explain", "--client", "127.0.0.1", "--frontend", "web"];
    eventually(secs(5), "b is eligible", || {
        proxy.cli_ok(&question).contains(" would go to web/b (")
    });
    let weights = ["--with", "weight:web/a=2", "--with", "weight:web/a=3"];
    let said = proxy.cli_ok(&[&question[..], &weights].concat());
    let flat = said.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "Assumed: web/a with weight 3.",
        "Not available: web/a (at its cap).",
        "web/b is the only backend that can be picked.",
        "The client waits for a slot of another backend, at most queue_timeout.",
    ] {
        assert!(flat.contains(part), "{part}: {said}");
    }
}
