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
    access_log_lists_every_failed_attempt,
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
