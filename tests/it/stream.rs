//! The stream of the admin API, over its socket as the page reads it.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{connect, exchange};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, patience, secs};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

on_every_engine!(viewer_gets_a_snapshot_then_deltas_transitions_and_events);

/// Open streams, as `docs/limits.md` says.
const VIEWERS_MAX: usize = 8;

/// One open stream. HTTP/1.0, so that its end is the end of the connection.
pub(crate) struct StreamViewer(BufReader<UnixStream>);

/// An event of a stream.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) name: String,
    pub(crate) data: Value,
}

// === impl StreamViewer ===

impl StreamViewer {
    /// Opens a stream. Returns the status line and the body if it is refused.
    pub(crate) fn try_open(proxy: &TestProxy, query: &str) -> Result<StreamViewer, String> {
        let admin = proxy.admin();
        let path = Path::new(admin.strip_prefix("unix:").unwrap_or(&admin));
        let mut stream = UnixStream::connect(path).expect("the admin socket");
        stream.set_read_timeout(Some(patience(secs(30)))).unwrap();
        write!(stream, "GET /v1/stream?{query} HTTP/1.0\r\n\r\n").unwrap();
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "no head: {head}");
        }
        if head.contains(" 200 ") {
            assert!(head.to_lowercase().contains("content-type: text/event-stream"), "{head}");
            return Ok(StreamViewer(reader));
        }
        reader.read_to_string(&mut head).unwrap();
        Err(head)
    }

    #[track_caller]
    pub(crate) fn open(proxy: &TestProxy, query: &str) -> StreamViewer {
        StreamViewer::try_open(proxy, query).unwrap_or_else(|refusal| panic!("{refusal}"))
    }

    /// Returns the next event; `None` at the end of the stream.
    pub(crate) fn next(&mut self) -> Option<Told> {
        let (mut name, mut data) = (String::new(), None);
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).expect("the stream") == 0 {
                assert!(name.is_empty(), "the stream ended within an event");
                return None;
            }
            let line = line.trim_end_matches('\n');
            if let Some(value) = line.strip_prefix("event: ") {
                name = value.to_owned();
            } else if let Some(value) = line.strip_prefix("data: ") {
                data = Some(serde_json::from_str(value).expect("a document"));
            } else if line.is_empty() {
                return Some(Told { name, data: data.expect("data") });
            }
        }
    }

    /// Returns the next event that is wanted.
    #[track_caller]
    fn until(&mut self, what: &str, wanted: impl Fn(&Told) -> bool) -> Value {
        let until = Instant::now() + patience(secs(30));
        while let Some(told) = self.next() {
            if wanted(&told) {
                return told.data;
            }
            assert!(Instant::now() < until, "no {what} in time");
        }
        panic!("the stream ended before {what}");
    }

    #[track_caller]
    fn snapshot(&mut self) -> Value {
        self.until("snapshot", |told| told.name == "snapshot")
    }
}

fn pool(backends: &[ScriptedBackend]) -> Pool {
    let probe = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"\nfall = 2";
    let names = ["a", "b", "c"].into_iter().zip(backends);
    names.fold(Pool::new("web").probe(probe), |pool, (name, one)| pool.backend(name, one.address()))
}

fn site(engine: Engine) -> (Vec<ScriptedBackend>, TestProxy) {
    let backends: Vec<_> = ["a", "b", "c"].map(|_| ScriptedBackend::start(backend::echo())).into();
    let proxy = TestProxy::start(Conf::simple(engine, pool(&backends)));
    for name in ["a", "b", "c"] {
        proxy.wait_backend("web", name, "observation", "up");
    }
    (backends, proxy)
}

fn viewer_gets_a_snapshot_then_deltas_transitions_and_events(engine: Engine) {
    let (mut backends, mut proxy) = site(engine);
    let mut viewer = StreamViewer::open(&proxy, "");
    let snapshot = viewer.snapshot();
    let (web, frontend) = (&snapshot["pools"][0], &snapshot["frontends"][0]);
    assert_eq!((&snapshot["state"], &snapshot["pending"]), (&"serving".into(), &Value::Null));
    assert!(!snapshot["node"].as_str().unwrap().is_empty() && snapshot.get("cluster").is_none());
    assert_eq!((&frontend["mode"], &web["probe"]["kind"]), (&"proxy".into(), &"tcp".into()));
    assert!(frontend["new_minute"].is_array() && web["new_minute"].is_array());
    let a = &web["backends"][0];
    assert_eq!(
        (&a["name"], &a["health_percent"], &a["override"]),
        (&"a".into(), &100.into(), &Value::Null)
    );
    let should = a["should"].as_f64().unwrap();
    assert!((should - 1.0 / 3.0).abs() < 1e-3, "{should}");

    let open: Vec<_> = (0..3).map(|_| connect(proxy.addr("web"))).collect();
    open.iter().for_each(|client| drop(exchange(client, b"hello").unwrap()));
    let has_session = |told: &Told| {
        let rows = told.data["pools"][0]["rows"].as_array();
        told.name == "delta" && rows.is_some_and(|rows| rows.iter().any(|row| row[1] == 1))
    };
    let delta = viewer.until("delta with the sessions", has_session);
    let row = delta["pools"][0]["rows"].as_array().unwrap()[0].as_array().unwrap().len();
    assert_eq!((row, &delta["pools"][0]["counts"]["up"]), (14, &3.into()));
    drop(open);

    proxy.cli_ok(&["drain", "web/c"]);
    let drained = |told: &Told| told.name == "transition" && told.data["backend"] == "c";
    let transition = viewer.until("transition of c", drained);
    assert_eq!(transition["row"]["intent"], "draining");
    drop(backends.remove(0));
    let down = |told: &Told| told.name == "transition" && told.data["row"]["observation"] == "down";
    let transition = viewer.until("transition of a", down);
    assert!(transition["row"]["last_transition"]["reason"].as_str().unwrap().contains("refused"));
    let found = |told: &Told| told.name == "delta" && told.data["trouble"][0]["backend"] == "a";
    viewer.until("finding about a", found);
    drop(viewer);
    eventually(secs(10), "the stream is closed", || proxy.metric("tidegate_streams", &[]) == 0.0);
    proxy.rebaseline();
}

#[test]
fn event_is_sent_at_once() {
    let (_backends, mut proxy) = site(Engine::Epoll);
    let mut viewer = StreamViewer::open(&proxy, "");
    viewer.snapshot();
    proxy.cli_ok(&["drain", "web/a"]);
    let event =
        viewer.until("event", |told| told.name == "event" && told.data["kind"] == "operator");
    assert_eq!((&event["subject"], event["seq"].is_u64()), (&"web/a".into(), true));
    drop(viewer);
    eventually(secs(10), "the stream is closed", || proxy.metric("tidegate_streams", &[]) == 0.0);
    proxy.rebaseline();
}

#[test]
fn ninth_viewer_is_refused_until_one_leaves() {
    let (_backends, mut proxy) = site(Engine::Epoll);
    let mut viewers: Vec<StreamViewer> =
        (0..VIEWERS_MAX).map(|_| StreamViewer::open(&proxy, "")).collect();
    viewers.iter_mut().for_each(|viewer| drop(viewer.snapshot()));
    let Err(refusal) = StreamViewer::try_open(&proxy, "") else { panic!("nine streams") };
    assert!(
        refusal.starts_with("HTTP/1.0 503") && refusal.contains("8 streams are open"),
        "{refusal}"
    );
    assert_eq!(proxy.metric("tidegate_stream_refused_total", &[]), 1.0);
    viewers.truncate(VIEWERS_MAX - 1);
    eventually(secs(10), "a stream is free", || StreamViewer::try_open(&proxy, "").is_ok());
    let Err(wrong) = StreamViewer::try_open(&proxy, "backends=many") else { panic!("accepted") };
    assert!(wrong.starts_with("HTTP/1.0 400"), "{wrong}");
    drop(viewers);
    eventually(secs(10), "all are closed", || proxy.metric("tidegate_streams", &[]) == 0.0);
    proxy.rebaseline();
}

#[test]
fn reload_sends_a_new_snapshot() {
    let (backends, mut proxy) = site(Engine::Epoll);
    let mut viewer = StreamViewer::open(&proxy, "");
    assert_eq!(viewer.snapshot()["pools"][0]["backends"].as_array().unwrap().len(), 3);
    let mut conf = proxy.conf();
    *conf.pool_mut("web") = pool(&backends[..2]);
    proxy.reload(conf);
    let newer = |told: &Told| told.name == "snapshot" && told.data["generation"] == 2;
    let snapshot = viewer.until("snapshot of generation 2", newer);
    assert_eq!(snapshot["pools"][0]["backends"].as_array().unwrap().len(), 2);
    viewer.until("delta after it", |told| told.name == "delta" && told.data["generation"] == 2);
    drop(viewer);
    eventually(secs(10), "the stream is closed", || proxy.metric("tidegate_streams", &[]) == 0.0);
    proxy.rebaseline();
}

#[test]
fn upgrade_ends_the_stream_in_order_and_the_new_process_has_another() {
    let (_backends, mut proxy) = site(Engine::Epoll);
    let mut viewer = StreamViewer::open(&proxy, "");
    viewer.snapshot();
    proxy.upgrade();
    while viewer.next().is_some() {}
    let mut again = StreamViewer::open(&proxy, "");
    assert_eq!(again.snapshot()["state"], "serving");
    drop(again);
    eventually(secs(10), "the stream is closed", || proxy.metric("tidegate_streams", &[]) == 0.0);
    proxy.rebaseline();
}

#[test]
fn viewer_that_reads_nothing_is_dropped() {
    let many = |count: u32| {
        let addresses = (0..count).map(|n| format!("127.1.{}.{}:9", n / 250, n % 250 + 1));
        addresses.fold(Pool::new("web"), |pool, address| {
            pool.backend(&address.replace(':', "-"), &address)
        })
    };
    let mut proxy = TestProxy::start(Conf::simple(Engine::Epoll, many(3_000)));
    let mut slow = StreamViewer::open(&proxy, "");
    let mut other = StreamViewer::open(&proxy, "pools=none");
    other.snapshot();
    let mut count = 3_000;
    eventually(secs(60), "the slow viewer is dropped", || {
        count -= 1;
        let mut conf = proxy.conf();
        *conf.pool_mut("web") = many(count);
        proxy.reload(conf);
        let generation = proxy.generation();
        let newer = |told: &Told| told.name == "snapshot" && told.data["generation"] == generation;
        other.until("the snapshot of the generation", newer);
        proxy.metric("tidegate_stream_dropped_total", &[]) == 1.0
    });
    // What was sent arrives, and then the end.
    let mut rest = Vec::new();
    let _ = slow.0.read_to_end(&mut rest);
    assert!(!rest.is_empty());
    other.until("delta for the other viewer", |told| told.name == "delta");
    drop((slow, other));
    eventually(secs(10), "the streams are closed", || proxy.metric("tidegate_streams", &[]) == 0.0);
    proxy.rebaseline();
}
