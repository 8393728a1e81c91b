//! The last minute and hour of a backend, pages of the status, and the findings.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{connect, exchange};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use serde_json::Value;

on_every_engine!(history_has_the_sessions_latencies_states_and_probes_of_a_backend);

struct Site {
    backends: Vec<ScriptedBackend>,
    proxy: TestProxy,
}

// === impl Site ===

impl Site {
    fn start(engine: Engine) -> Site {
        let backends: Vec<_> =
            ["a", "b", "c"].map(|_| ScriptedBackend::start(backend::echo())).into();
        let probe = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"\nfall = 2";
        let mut pool = Pool::new("web").probe(probe);
        for (name, backend) in ["a", "b", "c"].into_iter().zip(&backends) {
            pool = pool.backend(name, backend.address());
        }
        let proxy = TestProxy::start(Conf::simple(engine, pool));
        for name in ["a", "b", "c"] {
            proxy.wait_backend("web", name, "observation", "up");
        }
        Site { backends, proxy }
    }

    fn get(&self, target: &str) -> Value {
        let answer = self.proxy.admin_request("GET", target);
        assert_eq!(answer.status, 200, "{target}: {}", answer.body);
        answer.json()
    }

    fn history(&self, name: &str) -> Value {
        self.get(&format!("/v1/pools/web/backends/{name}/history"))
    }

    fn session(&self) {
        let client = connect(self.proxy.addr("web"));
        exchange(&client, b"hello").expect("an echo");
    }
}

fn names(status: &Value) -> Vec<&str> {
    let backends = status["pools"][0]["backends"].as_array().expect("a list");
    backends.iter().map(|backend| backend["name"].as_str().expect("a name")).collect()
}

fn history_has_the_sessions_latencies_states_and_probes_of_a_backend(engine: Engine) {
    let mut site = Site::start(engine);
    (0..30).for_each(|_| site.session());
    eventually(secs(20), "the minute has the sessions", || {
        let minute = site.get("/v1/pools/web/backends/a/minute");
        let new = minute.as_array().expect("a list").iter().map(|n| n.as_u64().unwrap());
        new.sum::<u64>() == 10
    });
    eventually(secs(30), "the running minute has latencies", || {
        let history = site.history("a");
        let minutes = &history["minutes"];
        let last = |name: &str| minutes[name].as_array().expect("60 values")[59].clone();
        assert_eq!(minutes["first_p99"].as_array().unwrap().len(), 60);
        assert!(last("new") == 10 || last("new") == 0, "a new minute can have begun");
        ["connect_p50", "connect_p99", "first_p50", "first_p99"]
            .iter()
            .all(|name| minutes[name].as_array().unwrap().iter().any(|value| value.is_f64()))
            && history["pool_first_p99"].is_f64()
    });
    let probes = site.history("a")["probes"].clone();
    let probes = probes.as_array().expect("a list");
    assert!(!probes.is_empty() && probes.len() <= 24, "{probes:?}");
    assert!(probes.iter().all(|probe| probe["ok"] == true && probe["ms"].is_f64()));
    drop(site.backends.remove(0));
    site.proxy.wait_backend("web", "a", "observation", "down");
    let history = site.history("a");
    let (states, probes) = (&history["states"], &history["probes"]);
    let last = states.as_array().unwrap().last().unwrap();
    assert_eq!((&last["state"], &last["to"]), (&"down".into(), &0.0.into()));
    assert!(last["reason"].as_str().unwrap().contains("refused"), "{states}");
    let failed = probes.as_array().unwrap().last().unwrap();
    assert_eq!(failed["ok"], false);
    assert!(failed["text"].as_str().unwrap().contains("refused"), "{failed}");
    let unknown = site.proxy.admin_request("GET", "/v1/pools/web/backends/x/history");
    assert_eq!(unknown.status, 404);
}

#[test]
fn status_comes_in_pages() {
    let mut site = Site::start(Engine::Epoll);
    let first = site.get("/v1/status?pool=web&limit=2");
    assert_eq!(names(&first), ["a", "b"]);
    let page = &first["pools"][0]["page"];
    assert_eq!(
        (&page["total"], &page["matched"], &page["next"]),
        (&3.into(), &3.into(), &"b".into())
    );
    let second = site.get("/v1/status?pool=web&limit=2&after=b");
    assert_eq!(names(&second), ["c"]);
    assert!(second["pools"][0]["page"]["next"].is_null());
    drop(site.backends.remove(1));
    site.proxy.wait_backend("web", "b", "observation", "down");
    assert_eq!(names(&site.get("/v1/status?state=down")), ["b"]);
    assert!(site.get("/v1/status")["pools"][0].get("page").is_none());
    for (query, status) in [("pool=db", 404), ("pool=web&after=x", 404), ("limit=0", 400)] {
        let answer = site.proxy.admin_request("GET", &format!("/v1/status?{query}"));
        assert_eq!(answer.status, status, "{query}: {}", answer.body);
    }
}

#[test]
fn findings_come_first_with_the_reason_and_what_happened_before() {
    let mut site = Site::start(Engine::Epoll);
    assert_eq!(site.get("/v1/status")["trouble"], serde_json::json!([]));
    site.proxy.cli_ok(&["drain", "web/c"]);
    site.backends.truncate(0);
    site.proxy.wait_backend("web", "a", "observation", "down");
    site.proxy.wait_backend("web", "b", "observation", "down");
    let trouble = site.get("/v1/status")["trouble"].clone();
    assert_eq!(trouble[0]["title"], "Pool web has no eligible backend");
    assert_eq!(
        (&trouble[0]["severity"], &trouble[0]["kind"]),
        (&3.into(), &"none-eligible".into())
    );
    let down = trouble.as_array().unwrap().iter().find(|one| one["kind"] == "backends").unwrap();
    let why = down["why"].as_str().unwrap();
    assert!(why.contains("refused") && why.contains("web/c: drained"), "{trouble}");
    let shown = site.proxy.cli_ok(&["status"]);
    let line = shown.lines().position(|line| line.starts_with("PROBLEM: Pool web has no eligible"));
    assert!(line.is_some_and(|at| at < 4), "{shown}");
}
