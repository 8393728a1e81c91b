//! The events: what has happened to the balancer, and by which order.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::connect;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, eventually, eventually_some, secs};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Instant;

const ENGINE: Engine = Engine::Epoll;

struct Site {
    backends: Vec<ScriptedBackend>,
    proxy: TestProxy,
}

fn conf(backends: &[ScriptedBackend]) -> Conf {
    let probe = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"\nfall = 2";
    let pool = Pool::new("web").probe(probe).backend("a", backends[0].address());
    Conf::simple(ENGINE, pool.backend("b", backends[1].address()))
}

// === impl Site ===

impl Site {
    fn start() -> Site {
        let backends: Vec<_> = ["a", "b"].map(|_| ScriptedBackend::start(backend::echo())).into();
        let proxy = TestProxy::start(conf(&backends));
        proxy.wait_backend("web", "a", "observation", "up");
        proxy.wait_backend("web", "b", "observation", "up");
        Site { backends, proxy }
    }

    fn with_one_session(&self) -> Conf {
        let mut conf = self.proxy.conf();
        conf.frontend_mut("web").keys.push_str("\nconnections_max = 1");
        conf
    }

    fn events(&self, query: &str) -> Value {
        let answer = self.proxy.admin_request("GET", &format!("/v1/events?{query}"));
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    }

    /// Waits for an event and returns the newest one that matches.
    #[track_caller]
    fn event(&self, query: &str, text: &str) -> Value {
        eventually_some(secs(10), &format!("an event {text:?} for {query}"), || {
            let all = self.events(query)["events"].as_array().expect("a list").clone();
            all.into_iter().rev().find(|event| event["text"].as_str().unwrap().contains(text))
        })
    }
}

#[test]
fn state_changes_are_events_with_their_reason() {
    let mut site = Site::start();
    let up = site.event("pool=web&kind=state", "-> up");
    assert_eq!(up["level"], "good");
    drop(site.backends.remove(0));
    let down = site.event("pool=web&level=bad", "-> down");
    assert_eq!((&down["subject"], &down["who"]), (&"web/a".into(), &"".into()));
    assert!(down["text"].as_str().unwrap().contains("refused"), "{down}");
    assert!(down["seq"].as_u64() > up["seq"].as_u64());
    let shown = site.proxy.cli_ok(&["events", "--pool", "web", "--level", "bad"]);
    assert!(shown.contains("bad  web/a: ") && shown.contains("-> down"), "{shown}");
    assert_eq!(site.proxy.cli_ok(&["events", "--pool", "none"]).trim(), "no event matches");
}

#[test]
fn orders_are_events_with_their_originator() {
    let site = Site::start();
    site.proxy.cli_ok(&["drain", "web/a"]);
    let drained = site.event("kind=operator&pool=web", "drained");
    let who = drained["who"].as_str().unwrap();
    let uid = rustix::process::getuid().as_raw();
    assert!(who.starts_with(&format!("uid {uid}, pid ")), "{who}");
    site.proxy.cli_ok(&["undrain", "web/a"]);
    site.event("kind=operator", "undrained");
    site.proxy.sighup();
    let unchanged = site.event("kind=config", "reloaded without a change");
    assert_eq!(unchanged["who"], "SIGHUP");
}

#[test]
fn reloads_are_events_with_what_they_changed() {
    let mut site = Site::start();
    site.proxy.reload(site.with_one_session());
    let applied = site.event("kind=config", "applied");
    assert_eq!(applied["subject"], "generation 2");
    assert_eq!(applied["changes"], serde_json::json!(["frontend web changed"]));
    // The watcher of the file or the request can be first; both name the reload.
    assert!(!applied["who"].as_str().unwrap().is_empty(), "{applied}");
    site.proxy.rewrite_by_rename("[frontend.web]\nbind = 7\n");
    let rejected = site.event("kind=config&level=bad", "rejected");
    assert_eq!(
        (&rejected["subject"], &rejected["who"]),
        (&"generation 2".into(), &"file change".into())
    );
    assert!(
        rejected["text"].as_str().unwrap().contains("tidegate.toml:1:1: missing key"),
        "{rejected}"
    );
}

#[test]
fn reached_cap_is_an_event() {
    let mut site = Site::start();
    site.proxy.reload(site.with_one_session());
    let open = connect(site.proxy.addr("web"));
    let reached = site.event("kind=limit", "1 of 1 sessions");
    assert_eq!(reached["subject"], "frontend web");
    assert_eq!(reached["level"], "warn");
    drop(open);
}

#[test]
fn question_that_waits_is_answered_at_the_next_event_that_matches() {
    let site = Site::start();
    let last = site.events("limit=1")["last"].as_u64().unwrap();
    let began = Instant::now();
    let none = site.events(&format!("after={last}&wait=1&kind=operator"));
    assert_eq!(none["events"], serde_json::json!([]));
    assert!(began.elapsed() >= secs(1));
    let (answered, answer) = mpsc::channel();
    let descriptors = site.proxy.fd_count();
    std::thread::scope(|scope| {
        let question = format!("after={last}&wait=30&kind=operator");
        let site = &site;
        scope.spawn(move || {
            let event = site.events(&question)["events"][0].clone();
            answered.send((event, Instant::now())).unwrap();
        });
        eventually(secs(5), "the question waits", || site.proxy.fd_count() > descriptors);
        let ordered = Instant::now();
        site.proxy.cli_ok(&["drain", "web/b"]);
        let (event, at) = answer.recv_timeout(secs(10)).expect("an answer");
        assert_eq!((&event["subject"], &event["kind"]), (&"web/b".into(), &"operator".into()));
        assert!(at.saturating_duration_since(ordered) < secs(5));
    });
}

#[test]
fn invalid_question_is_rejected_with_the_parameter() {
    let site = Site::start();
    for query in ["after=x", "wait=99", "kind=x", "color=red"] {
        let answer = site.proxy.admin_request("GET", &format!("/v1/events?{query}"));
        let name = query.split('=').next().unwrap();
        assert_eq!(answer.status, 400);
        assert!(answer.json()["detail"].as_str().unwrap().contains(name), "{}", answer.body);
    }
}

/// A running `tidegate events --follow --json`.
struct Follower {
    child: Child,
    lines: mpsc::Receiver<Value>,
}

// === impl Follower ===

impl Follower {
    fn start(proxy: &TestProxy) -> Follower {
        let mut child = Command::new(PROGRAM)
            .args(["events", "--follow", "--json", "--admin", &proxy.admin()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("run the program");
        let output = BufReader::new(child.stdout.take().expect("standard output"));
        let (line, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for text in output.lines().map_while(Result::ok) {
                let _ = line.send(serde_json::from_str(&text).expect("a JSON line"));
            }
        });
        Follower { child, lines }
    }

    /// Returns all events up to one with this text.
    #[track_caller]
    fn until(&self, text: &str) -> Vec<Value> {
        let mut all = Vec::new();
        loop {
            let event = self.lines.recv_timeout(secs(20)).unwrap_or_else(|_| panic!("{all:?}"));
            let found = event["text"].as_str().unwrap().contains(text);
            all.push(event);
            if found {
                return all;
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn follower_sees_each_event_once_and_in_order_over_an_upgrade() {
    let mut site = Site::start();
    let follower = Follower::start(&site.proxy);
    site.proxy.cli_ok(&["drain", "web/a"]);
    let mut seen = follower.until("drained");
    site.proxy.upgrade();
    site.proxy.cli_ok(&["undrain", "web/a"]);
    seen.extend(follower.until("undrained"));
    let numbers: Vec<u64> = seen.iter().map(|event| event["seq"].as_u64().unwrap()).collect();
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected, "{seen:?}");
    let text = |event: &Value| event["text"].as_str().unwrap().to_owned();
    let starts = seen.iter().filter(|event| text(event).starts_with("started: ")).count();
    assert_eq!(starts, 2, "{seen:?}");
    assert!(seen.iter().any(|event| text(event) == "upgrade started"), "{seen:?}");
    // The new process has the events of the old one.
    assert_eq!(site.events("limit=10000")["events"][0], seen[0]);
    site.proxy.rebaseline();
}
