//! The program's log: one line per event for any content, and what each level contains.

use crate::common::backend::{self, Refusing, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, client, eventually, on_every_engine, secs};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

on_every_engine!(
    rotation_of_the_access_log_under_load_loses_no_line,
    external_text_cannot_forge_a_log_line,
    debug_and_trace_log_tables_probes_reloads_and_upgrades,
    debug_logs_each_step_of_a_session_and_info_logs_none,
);

fn rotation_of_the_access_log_under_load_loses_no_line(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let proxy = TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", a.address())));
    let log = proxy.dir().join("access.log");
    let (done, total) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    client::ask(proxy.addr("web")).expect("an answer");
                    total.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for turn in 1..=3 {
            let old = proxy.dir().join(format!("access.log.{turn}"));
            eventually(secs(10), "the file has lines", || {
                std::fs::metadata(&log).is_ok_and(|file| file.len() > 0)
            });
            std::fs::rename(&log, &old).expect("rename the log");
            // As the scripts of logrotate do. A reload is not needed for the new file.
            if turn > 1 {
                proxy.sighup();
            }
        }
        eventually(secs(10), "the last file has lines", || {
            std::fs::metadata(&log).is_ok_and(|file| file.len() > 0)
        });
        done.store(true, Ordering::Relaxed);
    });
    let sessions = || -> BTreeSet<u64> {
        let files = ["access.log", "access.log.1", "access.log.2", "access.log.3"];
        let texts = files.map(|file| std::fs::read_to_string(proxy.dir().join(file)));
        let texts = texts.map(|text| text.expect("read the log"));
        let whole = texts.iter().flat_map(|text| text.split_inclusive('\n'));
        let whole = whole.filter(|line| line.ends_with('\n'));
        let parsed = whole.map(serde_json::from_str::<serde_json::Value>);
        parsed.map(|line| line.expect("JSON")["session"].as_u64().expect("a number")).collect()
    };
    let total = total.load(Ordering::Relaxed);
    eventually(secs(10), "each session has its line", || sessions().len() >= total);
    assert_eq!(sessions().len(), total);
    assert_eq!(proxy.metric("tidegate_access_log_dropped_total", &[]), 0.0);
}

/// A name with line breaks and escape codes that imitates a log line.
const FORGED: &str = "a\\n2026-01-01T00:00:00Z ERROR forged: pool=\\\"web\\\" b\\u001b[31m";

fn external_text_cannot_forge_a_log_line(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let conf = Conf::simple(engine, Pool::new("web").backend("a", a.address()));
    let mut proxy = TestProxy::start(conf);
    for format in ["text", "json"] {
        let known = proxy.log().lines().count();
        let mut text = proxy.render(&proxy.conf());
        text.push_str(&format!(
            "\n[[pool.web.backend]]\naddress = \"unix:/nowhere/{FORGED}\"\n\
             [pool.web.probe]\nkind = \"tcp\"\ninterval = \"50ms\"\ntimeout = \"50ms\"\n"
        ));
        let text = text.replace("[log]", &format!("[log]\nformat = \"{format}\""));
        proxy.rewrite_by_rename(&text);
        if format == "text" {
            assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 200);
        } else {
            proxy.restart();
        }
        let lines = || proxy.log().lines().skip(known).map(String::from).collect::<Vec<_>>();
        let tells = || lines().into_iter().find(|line| line.contains("first probe failed"));
        eventually(secs(10), "the failed probe is logged", || tells().is_some());
        assert!(!proxy.log().contains('\x1b'), "an escape code in the log: {}", proxy.log());
        let lines = lines();
        let own = |line: &&String| line.starts_with("20") || line.starts_with('{');
        assert!(lines.iter().all(|line| own(&line)), "{lines:#?}");
        assert!(!lines.iter().any(|line| line.starts_with("2026-01-01")), "{lines:#?}");
        let line = tells().expect("the line is in the log");
        if format == "json" {
            let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            assert_eq!(value["fields"]["pool"], "web");
            let name = value["fields"]["backend"].as_str().expect("a name");
            assert!(name.contains("/a\n2026"), "{name:?}");
        } else {
            assert!(
                line.contains(r#"backend="unix:/nowhere/a\n2026-01-01T00:00:00Z ERROR forged"#),
                "{line}"
            );
            assert!(line.contains(r#"pool=\"web\" b\u001b[31m""#), "{line}");
        }
    }
}

fn debug_and_trace_log_tables_probes_reloads_and_upgrades(engine: Engine) {
    let a = ScriptedBackend::start(backend::name("a"));
    let pool =
        Pool::new("web").probe("kind = \"tcp\"\ninterval = \"100ms\"").backend("a", a.address());
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    assert!(!proxy.log().contains("DEBUG"), "{}", proxy.log());
    for level in ["debug", "trace"] {
        let text = proxy.render(&proxy.conf());
        proxy.rewrite_by_rename(&text.replace("[log]", &format!("[log]\nlevel = \"{level}\"")));
        assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 200);
    }
    let mut conf = proxy.conf();
    conf.pool_mut("web").backends[0].keys.push_str("weight = 3");
    let text = proxy.render(&conf).replace("[log]", "[log]\nlevel = \"trace\"");
    proxy.rewrite_by_rename(&text);
    assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 200);
    let known = proxy.log().len();
    let before = proxy.upgrade();
    for line in [
        "DEBUG tidegate_daemon::reload: reload change=\"backend web/a changed\"",
        ": table published generation=",
        ": probe ended pool=web backend=a result=\"success after",
        "TRACE tidegate_daemon::effects: probe started address=",
    ] {
        eventually(secs(10), line, || proxy.log().contains(line));
    }
    for step in ["new process started pid=", "new process is ready", "this process serves;"] {
        eventually(secs(10), step, || proxy.log()[known..].contains(step));
    }
    proxy.wait_gone(before, secs(10));
    // Accept, route, pick, connect and close. Not even `trace` logs bytes or messages.
    let lines = || proxy.log().lines().filter(|line| line.contains("tidegate_dataplane")).count();
    let known = lines();
    for _ in 0..20 {
        client::ask(proxy.addr("web")).expect("an answer");
    }
    eventually(secs(10), "five lines per session", || lines() >= known + 20 * 5);
    assert_eq!(lines(), known + 20 * 5, "{}", proxy.log());
}

fn debug_logs_each_step_of_a_session_and_info_logs_none(engine: Engine) {
    let refusing = Refusing::new();
    let a = ScriptedBackend::start(backend::name("a"));
    let pool = Pool::new("web").backend("refusing", refusing.address).backend("a", a.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool).workers(1));
    // Round robin: one of two sessions starts at the refusing backend.
    let serve_two = || {
        for _ in 0..2 {
            assert_eq!(client::ask(proxy.addr("web")).expect("an answer"), "a");
        }
    };
    serve_two();
    assert!(proxy.wait_access_log(2).iter().any(|line| line["attempts"] == 2));
    assert!(!proxy.log().contains("tidegate_dataplane::session"), "{}", proxy.log());

    let text = proxy.render(&proxy.conf()).replace("[log]", "[log]\nlevel = \"debug\"");
    proxy.rewrite_by_rename(&text);
    assert_eq!(proxy.admin_request("POST", "/v1/reload").status, 200);
    serve_two();
    let ended = proxy.wait_access_log(4);
    let session = ended[2..].iter().find(|line| line["attempts"] == 2).expect("a failed attempt");
    let field = format!("session={}", session["session"]);
    let steps = || -> Vec<String> {
        let log = proxy.log();
        let lines = log.lines().filter_map(|line| line.split_once("tidegate_dataplane::session: "));
        let of_session = lines.filter(|(_, step)| step.split(' ').any(|word| word == field));
        of_session.map(|(_, step)| step.to_string()).collect()
    };
    eventually(secs(10), "the session is closed", || {
        steps().iter().any(|step| step.starts_with("session closed"))
    });
    let steps = steps();
    let client = session["client"].as_str().expect("a client");
    for (step, words) in steps.iter().zip([
        vec!["session accepted", "frontend=web", client],
        vec!["session routed", "pool=web"],
        vec!["backend picked", "attempt=1", "backend=refusing"],
        vec!["attempt failed", "backend=refusing", "failure=refused", "errno=111"],
        vec!["backend picked", "attempt=2", "backend=a"],
        vec!["backend connected", "backend=a", "took="],
        vec!["session closed", "cause=finished", "phase=closed", "bytes_out=1"],
    ]) {
        assert!(words.iter().all(|word| step.contains(word)), "{words:?} in {steps:#?}");
    }
    assert_eq!(steps.len(), 7, "{steps:#?}");
}
