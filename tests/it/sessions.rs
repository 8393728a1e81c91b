//! The list of open sessions.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{connect, connect_from, exchange};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;

on_every_engine!(
    list_shows_each_open_session_with_its_place_and_its_bytes,
    conditions_select_sessions,
    client_without_a_backend_is_listed_in_setup,
    announced_client_is_listed,
    long_list_has_the_first_sessions_and_all_totals,
    closed_sessions_end_with_fin_and_others_stay,
    session_with_bytes_on_their_way_is_not_closed_but_can_be_reset,
    waiting_client_can_be_reset,
);

struct Site {
    _backends: [ScriptedBackend; 2],
    proxy: TestProxy,
}

// === impl Site ===

impl Site {
    fn start(engine: Engine) -> Site {
        let backends = [(); 2].map(|()| ScriptedBackend::start(backend::echo()));
        let conf = Conf::new(engine)
            .frontend("web", "web", "")
            .frontend("db", "db", "")
            .pool(Pool::new("web").backend("a", backends[0].address()))
            .pool(Pool::new("db").backend("b", backends[1].address()));
        Site { _backends: backends, proxy: TestProxy::start(conf) }
    }

    /// Opens a session and exchanges `bytes` bytes.
    fn open(&self, frontend: &str, bytes: usize) -> TcpStream {
        let stream = connect(self.proxy.addr(frontend));
        exchange(&stream, &vec![b'x'; bytes]).expect("an echo");
        stream
    }
}

#[track_caller]
fn list(proxy: &TestProxy, query: &str) -> Value {
    let answer = proxy.admin_request("GET", &format!("/v1/sessions?{query}"));
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn matched(proxy: &TestProxy, query: &str) -> u64 {
    let document = list(proxy, query);
    assert_eq!(document["sessions"].as_array().unwrap().len() as u64, document["matched"]);
    document["matched"].as_u64().unwrap()
}

fn list_shows_each_open_session_with_its_place_and_its_bytes(engine: Engine) {
    let site = Site::start(engine);
    let (first, second) = (site.open("web", 7), site.open("db", 9));
    let document = list(&site.proxy, "");
    assert_eq!((&document["open"], &document["elsewhere"]), (&2.into(), &0.into()));
    let client = first.local_addr().unwrap().to_string();
    // Ages are exact to a tenth of a second, so the order of these two is not certain.
    let rows = document["sessions"].as_array().unwrap();
    let row = rows.iter().find(|row| row["client"] == client).expect("a row of the session");
    let place = [&row["frontend"], &row["pool"], &row["backend"], &row["phase"]];
    assert_eq!(place, ["web", "web", "a", "data"]);
    assert_eq!((&row["bytes_in"], &row["bytes_out"]), (&7.into(), &7.into()));
    assert!(row["age_seconds"].as_f64().unwrap() < 20.0, "{row}");
    let shown = site.proxy.cli_ok(&["sessions", "--pool", "db"]);
    assert!(shown.starts_with("2 open sessions; 1 match\n"), "{shown}");
    assert!(shown.contains(&second.local_addr().unwrap().to_string()), "{shown}");
    assert!(shown.contains("db/b"), "{shown}");
    let number = row["session"].clone();
    drop(first);
    let log = site.proxy.wait_access_log(1);
    assert_eq!((&log[0]["session"], &log[0]["client"]), (&number, &client.into()));
    eventually(secs(5), "one session is left", || list(&site.proxy, "")["open"] == 1);
}

fn conditions_select_sessions(engine: Engine) {
    let site = Site::start(engine);
    let web = site.open("web", 2_000);
    let _db = site.open("db", 1);
    let other = connect_from("127.0.0.2".parse().unwrap(), site.proxy.addr("web")).unwrap();
    exchange(&other, b"x").unwrap();
    let matched = |query: &str| matched(&site.proxy, query);
    assert_eq!((matched("frontend=web"), matched("pool=db"), matched("backend=a")), (2, 1, 2));
    assert_eq!((matched("client=127.0.0.2"), matched("client=127.0.0.0/8")), (1, 3));
    assert_eq!((matched("bytes=4000"), matched("bytes=4001")), (1, 0));
    assert_eq!((matched("older=3600"), matched("idle=0")), (0, 3));
    assert_eq!(matched("frontend=web&client=127.0.0.2&backend=a"), 1);
    assert_eq!(matched("frontend=none"), 0);
    let first = |query: &str| list(&site.proxy, query)["sessions"][0].clone();
    let most = first("sort=bytes&limit=1");
    assert_eq!(most["client"], web.local_addr().unwrap().to_string());
    let number = most["session"].as_u64().unwrap();
    let session = |query: &str| first(query)["session"].clone();
    assert_eq!(session(&format!("session={number}")), session("bytes=4000"));
    eventually(secs(10), "a session is idle for a second", || matched("idle=1") == 3);
    exchange(&web, b"x").unwrap();
    assert_eq!(matched("idle=1"), 2, "a byte ends the idle time");
    assert_ne!(first("sort=idle")["client"], web.local_addr().unwrap().to_string());
}

fn client_without_a_backend_is_listed_in_setup(engine: Engine) {
    let Queued { proxy, queued, .. } = &Queued::start(engine);
    let client = queued.local_addr().unwrap().ip();
    let rows = list(proxy, &format!("client={client}"))["sessions"].clone();
    let row = rows.as_array().unwrap().iter().find(|row| row["phase"] == "setup").unwrap();
    assert_eq!(row["client"], queued.local_addr().unwrap().to_string());
    assert_eq!((&row["frontend"], &row["backend"]), (&"web".into(), &Value::Null));
    assert_eq!(matched(proxy, "pool=web"), 1, "it is in no pool yet");
}

fn announced_client_is_listed(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let keys = "proxy_protocol = { from = [\"127.0.0.1\"] }";
    let mut conf = Conf::new(engine).frontend("web", "web", keys).pool(pool);
    conf.frontend_mut("web").bind_keys = "proxy_protocol = true".to_owned();
    let proxy = TestProxy::start(conf);
    let mut stream = connect(proxy.addr("web"));
    stream.write_all(b"PROXY TCP4 198.51.100.7 192.0.2.1 5555 80\r\n").unwrap();
    exchange(&stream, b"x").unwrap();
    assert_eq!(
        list(&proxy, "client=198.51.100.0/24")["sessions"][0]["client"],
        "198.51.100.7:5555"
    );
    assert_eq!(matched(&proxy, "client=127.0.0.1"), 0);
}

fn long_list_has_the_first_sessions_and_all_totals(engine: Engine) {
    let site = Site::start(engine);
    let sessions: Vec<TcpStream> = (0..600).map(|_| site.open("web", 1)).collect();
    let document = list(&site.proxy, "limit=10");
    assert_eq!((&document["open"], &document["matched"]), (&600.into(), &600.into()));
    let numbers: Vec<u64> = document["sessions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["session"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers.len(), 10);
    let all = list(&site.proxy, "limit=1000")["sessions"].clone();
    let all: Vec<&Value> = all.as_array().unwrap().iter().collect();
    let ages: Vec<f64> = all.iter().map(|row| row["age_seconds"].as_f64().unwrap()).collect();
    assert!(ages.is_sorted_by(|older, newer| older >= newer), "{ages:?}");
    let of_worker = |worker: u64| all.iter().filter(|row| row["worker"] == worker).count();
    assert_eq!(of_worker(0) + of_worker(1), 600);
    drop(sessions);
    eventually(secs(10), "no session is open", || list(&site.proxy, "")["open"] == 0);
}

/// A balancer with one session at its only backend, and a client that waits in the queue.
/// Both clients leave before the balancer stops.
struct Queued {
    holder: TcpStream,
    queued: TcpStream,
    proxy: TestProxy,
    _backend: ScriptedBackend,
}

impl Queued {
    fn start(engine: Engine) -> Queued {
        let backend = ScriptedBackend::start(backend::echo());
        let pool = Pool::new("web").key("queue_max = 5").backend_with(
            "a",
            backend.address(),
            "connections_max = 1",
        );
        let proxy = TestProxy::start(Conf::simple(engine, pool));
        let holder = connect(proxy.addr("web"));
        exchange(&holder, b"x").unwrap();
        let queued = connect(proxy.addr("web"));
        eventually(secs(5), "the client waits", || list(&proxy, "")["open"] == 2);
        Queued { _backend: backend, proxy, holder, queued }
    }
}

/// Reads until the end of the connection. Returns whether it ended with FIN.
fn ends_in_order(mut stream: TcpStream) -> bool {
    stream.set_read_timeout(Some(secs(10))).unwrap();
    matches!(stream.read(&mut [0; 8]), Ok(0))
}

fn closed_sessions_end_with_fin_and_others_stay(engine: Engine) {
    let site = Site::start(engine);
    let (web, other) = (site.open("web", 5), site.open("web", 5));
    let db = site.open("db", 5);
    let client = other.local_addr().unwrap().to_string();
    let rows = list(&site.proxy, "frontend=web")["sessions"].clone();
    let rows = rows.as_array().unwrap();
    let number = rows.iter().find(|row| row["client"] == client).unwrap()["session"].to_string();
    assert_eq!(site.proxy.cli_ok(&["sessions", "close", &number]).trim(), "1 session closed");
    assert!(ends_in_order(other));
    let refused = site.proxy.cli(&["sessions", "close", "--older", "1ms"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("add --yes"), "{refused:?}");
    assert_eq!(site.proxy.cli(&["sessions", "close", "--yes"]).status.code(), Some(1));
    exchange(&web, b"still open").unwrap();
    exchange(&db, b"still open").unwrap();
    let closed =
        site.proxy.cli_ok(&["sessions", "close", "--older", "1ms", "--yes", "--rate", "1"]);
    assert_eq!(closed.trim(), "2 sessions closed");
    assert!(ends_in_order(web) && ends_in_order(db));
    let log = site.proxy.wait_access_log(3);
    for line in &log {
        let end = [&line["cause"], &line["code"], &line["phase"]];
        assert_eq!(end, ["closed-by-operator", "KD", "data"], "{line}");
        assert_eq!(line["bytes_undelivered"], 0, "{line}");
    }
    let events = site.proxy.admin_request("GET", "/v1/events?kind=operator").json();
    let text = events["events"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("1 of 1 sessions that match closed: "), "{events}");
    assert!(events["events"][0]["who"].as_str().unwrap().starts_with("uid "), "{events}");
}

fn session_with_bytes_on_their_way_is_not_closed_but_can_be_reset(engine: Engine) {
    let backend = ScriptedBackend::start(backend::stall());
    let pool = Pool::new("web").backend("a", backend.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let mut stream = connect(proxy.addr("web"));
    stream.set_write_timeout(Some(secs(1))).unwrap();
    // Fills the socket queues of both connections.
    while stream.write(&[b'x'; 65_536]).is_ok() {}
    let busy = proxy.cli(&["sessions", "close", "--pool", "web"]);
    assert_eq!(busy.status.code(), Some(3), "{busy:?}");
    assert!(String::from_utf8_lossy(&busy.stderr).contains("1 session left"), "{busy:?}");
    assert_eq!(list(&proxy, "")["open"], 1);
    assert_eq!(proxy.cli_ok(&["sessions", "reset", "--pool", "web"]).trim(), "1 session reset");
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "reset-by-operator");
    assert!(log[0]["bytes_undelivered"].as_u64().unwrap() > 0, "{}", log[0]);
    assert!(!ends_in_order(stream));
}

fn waiting_client_can_be_reset(engine: Engine) {
    let Queued { proxy, holder, queued, .. } = &Queued::start(engine);
    let number = list(proxy, "")["sessions"]
        .as_array()
        .unwrap()
        .iter()
        .find_map(|row| (row["phase"] == "setup").then(|| row["session"].to_string()));
    let number = number.expect("a waiting client");
    assert_eq!(proxy.cli(&["sessions", "close", &number]).status.code(), Some(3));
    assert_eq!(proxy.cli_ok(&["sessions", "reset", &number]).trim(), "1 session reset");
    assert!(!ends_in_order(queued.try_clone().unwrap()));
    let log = proxy.wait_access_log(1);
    assert_eq!([&log[0]["cause"], &log[0]["phase"]], ["reset-by-operator", "queue"]);
    exchange(holder, b"still open").unwrap();
}
