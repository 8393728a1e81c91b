//! The admin API as its clients meet it: real sockets, a control loop played by
//! a task.
//!
//! Each test starts its own API on a Unix socket in a directory of its own or
//! on port 0 of loopback.
#![allow(clippy::unwrap_used)]

use std::future::pending;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tidegate::admin::{
    self, Problem, Readiness, ReloadError, Reloaded, Request, Token, TokenStore,
};
use tidegate::clock;
use tidegate::config::{Admin, AdminListen};
use tidegate::control::OperatorError;
use tidegate::health::Intent;
use tokio::sync::{mpsc, oneshot};

const TOKEN: &str = "a-token-of-fair-length";

/// How the played control loop behaves.
#[derive(Clone, Copy, PartialEq)]
enum Control {
    Answers,
    RefusesTheFile,
    Hangs,
    HasEnded,
}

struct Api {
    address: AdminListen,
    readiness: Readiness,
    tokens: Arc<TokenStore>,
    shut_down: Arc<AtomicBool>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    dir: tempfile::TempDir,
}

impl Api {
    fn unix(control: Control) -> Api {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        Api::start(AdminListen::Unix(path), None, control, dir)
    }

    fn tcp(listen: &str, token: Option<&str>) -> Api {
        let listen = AdminListen::Tcp(listen.parse().unwrap());
        Api::start(listen, token, Control::Answers, tempfile::tempdir().unwrap())
    }

    fn start(
        listen: AdminListen,
        token: Option<&str>,
        control: Control,
        dir: tempfile::TempDir,
    ) -> Api {
        let listener = admin::bind(&Admin { listen, token_file: None }).unwrap();
        let address = listener.address();
        let tokens = token.map(|token| Token::new(token.as_bytes()).unwrap());
        let tokens = Arc::new(TokenStore::new(tokens));
        let (readiness, shut_down) = (Readiness::new(), Arc::new(AtomicBool::new(false)));
        let (stop, stopped) = oneshot::channel::<()>();
        let served = (Arc::clone(&tokens), readiness.clone(), Arc::clone(&shut_down));
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (tokens, readiness, shut_down) = served;
            let (requests, inbox) = mpsc::channel(admin::REQUESTS_MAX);
            runtime.spawn(play(control, inbox, shut_down));
            let stop = async { drop(stopped.await) };
            let serve = admin::serve(listener, tokens, requests, readiness, stop);
            runtime.block_on(serve).unwrap();
        });
        Api { address, readiness, tokens, shut_down, stop: Some(stop), thread: Some(thread), dir }
    }

    fn path(&self) -> &Path {
        let AdminListen::Unix(path) = &self.address else { panic!("not a Unix socket") };
        path
    }

    fn to(&self) -> SocketAddr {
        let AdminListen::Tcp(to) = self.address else { panic!("not TCP") };
        SocketAddr::from(([127, 0, 0, 1], to.port()))
    }

    fn connect(&self) -> Box<dyn Stream> {
        let patience = Some(Duration::from_secs(30));
        match &self.address {
            AdminListen::Unix(path) => {
                let stream = UnixStream::connect(path).unwrap();
                stream.set_read_timeout(patience).unwrap();
                Box::new(stream)
            }
            AdminListen::Tcp(_) => {
                let stream = TcpStream::connect(self.to()).unwrap();
                stream.set_read_timeout(patience).unwrap();
                Box::new(stream)
            }
        }
    }

    /// One request with these header lines, `Host` included where wanted.
    fn raw(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        let mut stream = self.connect();
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        for header in headers {
            head.push_str(&format!("{header}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        // The answer may come before all of a large body is taken.
        let _ = stream.write_all(body);
        Answer::read(&mut stream)
    }

    fn ask(&self, method: &str, path: &str) -> Answer {
        self.raw(method, path, &["Host: localhost", "Content-Length: 0"], b"")
    }

    fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Runs the program's client against this API.
    fn cli(&self, arguments: &[&str]) -> Output {
        let admin = self.address.to_string();
        Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(arguments)
            .args(["--admin", &admin])
            .output()
            .unwrap()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop();
    }
}

trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn read(stream: &mut dyn Stream) -> Answer {
        let mut raw = Vec::new();
        // A reset after the answer (unread body) does not unsay it.
        let _ = stream.read_to_end(&mut raw);
        let text = String::from_utf8(raw).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    fn json(&self) -> serde_json::Value {
        assert!(self.head.contains("content-type: application/json"), "{self:?}");
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Status and the `error` of a well-formed error answer.
    fn refusal(&self) -> (u16, String) {
        let value = self.json();
        assert!(value["detail"].is_string(), "{self:?}");
        (self.status, value["error"].as_str().unwrap().to_owned())
    }
}

async fn play(control: Control, mut inbox: mpsc::Receiver<Request>, shut_down: Arc<AtomicBool>) {
    if control == Control::HasEnded {
        return;
    }
    while let Some(request) = inbox.recv().await {
        if control == Control::Hangs {
            pending::<()>().await;
        }
        match request {
            Request::Status(reply) => drop(reply.send(STATUS.to_owned())),
            Request::Metrics(reply) => drop(reply.send("tidegate_x 1\n".to_owned())),
            Request::Reload(reply) => drop(reply.send(match control {
                Control::RefusesTheFile => Err(refused_file()),
                _ => Ok(Reloaded {
                    generation: 4,
                    changed: true,
                    warnings: vec!["process.workers waits for a restart".to_owned()],
                }),
            })),
            Request::SetIntent { pool, backend, intent, reply } => {
                let known = ["a", "10.0.0.1:80", "[::1]:80", "unix:/run/b.sock", "é"];
                drop(reply.send(match (pool.as_str(), known.contains(&backend.as_str())) {
                    ("web", true) => {
                        assert!(matches!(intent, Intent::Draining | Intent::Ready));
                        Ok(())
                    }
                    ("web", false) => Err(OperatorError::UnknownBackend),
                    _ => Err(OperatorError::UnknownPool),
                }));
            }
            Request::Shutdown(reply) => {
                shut_down.store(true, Ordering::Relaxed);
                drop(reply.send(()));
            }
        }
    }
}

const STATUS: &str = r#"{"version":"0.1.0","state":"serving","pools":[]}"#;

fn refused_file() -> ReloadError {
    let problem = |line, message: &str| Problem {
        file: "t.toml".into(),
        line,
        column: 7,
        message: message.to_owned(),
    };
    ReloadError { problems: vec![problem(3, "no such pool"), problem(9, "unknown key")] }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = clock::now() + Duration::from_secs(20);
    while !holds() {
        assert!(clock::now() < deadline, "never: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

// --- endpoints ---

#[test]
fn every_endpoint_answers() {
    let api = Api::unix(Control::Answers);
    let metrics = api.ask("GET", "/metrics");
    assert_eq!((metrics.status, metrics.body.as_str()), (200, "tidegate_x 1\n"));
    assert!(metrics.head.contains("content-type: text/plain; version=0.0.4"));
    assert_eq!(api.ask("GET", "/v1/status").json()["state"], "serving");
    let reloaded = api.ask("POST", "/v1/reload").json();
    assert_eq!((&reloaded["generation"], &reloaded["changed"]), (&4.into(), &true.into()));
    assert_eq!(api.ask("GET", "/live").status, 200);
    assert!(!api.shut_down.load(Ordering::Relaxed));
    assert_eq!(api.ask("POST", "/v1/shutdown").json()["state"], "draining");
    assert!(api.shut_down.load(Ordering::Relaxed));
}

#[test]
fn ready_follows_the_life_of_the_process() {
    let api = Api::unix(Control::HasEnded);
    assert_eq!(api.ask("GET", "/ready").refusal(), (503, "not ready".to_owned()));
    api.readiness.set_ready();
    assert_eq!(api.ask("GET", "/ready").status, 200);
    api.readiness.set_draining();
    api.readiness.set_ready();
    assert_eq!(api.ask("GET", "/ready").status, 503);
    assert_eq!(api.ask("GET", "/live").status, 200);
}

#[test]
fn backends_of_any_name_are_drained_and_undrained() {
    let api = Api::unix(Control::Answers);
    let paths = [
        ("a", "a"),
        ("10.0.0.1:80", "10.0.0.1:80"),
        ("10.0.0.1%3A80", "10.0.0.1:80"),
        ("%5B::1%5D:80", "[::1]:80"),
        ("[::1]:80", "[::1]:80"),
        ("unix%3A%2Frun%2Fb.sock", "unix:/run/b.sock"),
        ("%C3%A9", "é"),
    ];
    for (encoded, name) in paths {
        for (action, intent) in [("drain", "draining"), ("undrain", "ready")] {
            let answer = api.ask("POST", &format!("/v1/pools/web/backends/{encoded}/{action}"));
            assert_eq!(answer.status, 200, "{encoded}: {answer:?}");
            let said = answer.json();
            assert_eq!((&said["backend"], &said["intent"]), (&name.into(), &intent.into()));
        }
    }
}

#[test]
fn unknown_paths_and_names_are_404() {
    let api = Api::unix(Control::Answers);
    let refused = |path| api.ask("POST", path).refusal();
    assert_eq!(refused("/v1/pools/x/backends/a/drain"), (404, "unknown pool".to_owned()));
    assert_eq!(refused("/v1/pools/web/backends/x/drain"), (404, "unknown backend".to_owned()));
    for path in [
        "/",
        "/v1",
        "/metrics/",
        "/v1/pools/web/backends/a",
        "/v1/pools/web/backends//drain",
        "/v1/pools/web/backends/unix:/run/b.sock/drain",
        "/v1/pools/web/backends/%FF/drain",
    ] {
        assert_eq!(refused(path), (404, "unknown path".to_owned()), "{path}");
    }
}

#[test]
fn wrong_methods_are_405_and_name_the_right_one() {
    let api = Api::unix(Control::Answers);
    for path in ["/metrics", "/live", "/ready", "/v1/status"] {
        let answer = api.ask("POST", path);
        assert_eq!(answer.refusal(), (405, "wrong method".to_owned()), "{path}");
        assert!(answer.head.contains("allow: get,head"), "{answer:?}");
    }
    for path in ["/v1/reload", "/v1/shutdown", "/v1/pools/web/backends/a/drain"] {
        for method in ["GET", "PUT", "DELETE"] {
            let answer = api.ask(method, path);
            assert_eq!(answer.refusal().0, 405, "{method} {path}");
            assert!(answer.head.contains("allow: post"), "{answer:?}");
        }
    }
    assert!(!api.shut_down.load(Ordering::Relaxed));
}

#[test]
fn a_refused_file_is_422_with_every_problem() {
    let api = Api::unix(Control::RefusesTheFile);
    let answer = api.ask("POST", "/v1/reload");
    assert_eq!(answer.refusal().0, 422);
    let expected = serde_json::json!([
        {"file": "t.toml", "line": 3, "column": 7, "message": "no such pool"},
        {"file": "t.toml", "line": 9, "column": 7, "message": "unknown key"},
    ]);
    assert_eq!(answer.json()["problems"], expected);
}

// --- a control loop in trouble ---

#[test]
fn a_control_loop_that_does_not_answer_gives_503_in_time() {
    let api = Api::unix(Control::Hangs);
    let start = clock::now();
    assert_eq!(api.ask("GET", "/v1/status").refusal(), (503, "no answer".to_owned()));
    let took = clock::now() - start;
    assert!(took > Duration::from_secs(4) && took < Duration::from_secs(9), "{took:?}");
    assert_eq!(api.ask("GET", "/live").status, 200);
}

#[test]
fn a_control_loop_that_has_ended_gives_503_at_once() {
    let api = Api::unix(Control::HasEnded);
    assert_eq!(api.ask("POST", "/v1/reload").refusal(), (503, "no answer".to_owned()));
}

// --- who may ask ---

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}")
}

#[test]
fn over_loopback_reading_is_free_and_changing_needs_the_token() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let post = |headers: &[&str]| {
        let headers = [&["Host: 127.0.0.1", "Content-Length: 0"], headers].concat();
        api.raw("POST", "/v1/shutdown", &headers, b"")
    };
    assert_eq!(api.ask("GET", "/v1/status").status, 200);
    let missing = post(&[]);
    assert_eq!(missing.refusal(), (401, "unauthorized".to_owned()));
    assert!(missing.head.contains("www-authenticate: bearer"));
    assert_eq!(post(&[&bearer("wrong")]).status, 401);
    assert_eq!(post(&[&bearer(&format!("{TOKEN}x"))]).status, 401);
    assert_eq!(post(&[&format!("Authorization: Basic {TOKEN}")]).status, 401);
    assert_eq!(post(&[&format!("Authorization: {TOKEN}")]).status, 401);
    assert!(!api.shut_down.load(Ordering::Relaxed));
    assert_eq!(post(&[&bearer(TOKEN)]).status, 200);
    assert_eq!(post(&[&format!("Authorization: bearer {TOKEN}")]).status, 200);
}

#[test]
fn over_tcp_without_a_token_nothing_can_be_changed() {
    let api = Api::tcp("127.0.0.1:0", None);
    assert_eq!(api.ask("GET", "/metrics").status, 200);
    let headers = ["Host: localhost", &bearer(TOKEN), "Content-Length: 0"];
    let refused = api.raw("POST", "/v1/shutdown", &headers, b"");
    assert_eq!(refused.refusal(), (403, "no token configured".to_owned()));
    assert!(!api.shut_down.load(Ordering::Relaxed));
}

#[test]
fn off_loopback_reading_needs_the_token_too() {
    let api = Api::tcp("0.0.0.0:0", Some(TOKEN));
    for path in ["/live", "/ready", "/metrics", "/v1/status", "/nothing"] {
        assert_eq!(api.ask("GET", path).status, 401, "{path}");
    }
    let with = ["Host: localhost", &bearer(TOKEN)];
    assert_eq!(api.raw("GET", "/v1/status", &with, b"").status, 200);
}

#[test]
fn a_token_changed_on_reload_counts_from_the_next_request() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let post = |token: &str| {
        let headers = ["Host: localhost", &bearer(token), "Content-Length: 0"];
        api.raw("POST", "/v1/reload", &headers, b"").status
    };
    assert_eq!(post(TOKEN), 200);
    api.tokens.set(Token::new(b"another-token-of-length"));
    assert_eq!((post(TOKEN), post("another-token-of-length")), (401, 200));
    api.tokens.set(None);
    assert_eq!(post("another-token-of-length"), 403);
}

#[test]
fn names_rebound_to_our_address_are_refused() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let get = |headers: &[&str]| api.raw("GET", "/v1/status", headers, b"").status;
    assert_eq!(get(&["Host: evil.example"]), 403);
    assert_eq!(get(&["Host: localhost.evil.example:9900"]), 403);
    assert_eq!(get(&[]), 400);
    assert_eq!(get(&["Host: localhost", "Host: evil.example"]), 400);
    assert_eq!(get(&[&format!("Host: {}", api.to())]), 200);
    assert_eq!(get(&["Host: [::1]:9900"]), 200);
    let absolute = api.raw("GET", "http://evil.example/v1/status", &["Host: localhost"], b"");
    assert_eq!(absolute.status, 403);
}

#[test]
fn web_pages_cannot_change_anything() {
    let tcp = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let headers =
        ["Host: localhost", "Origin: http://localhost", &bearer(TOKEN), "Content-Length: 0"];
    let refused = tcp.raw("POST", "/v1/shutdown", &headers, b"");
    assert_eq!(refused.refusal(), (403, "origin refused".to_owned()));
    assert!(!tcp.shut_down.load(Ordering::Relaxed));
}

#[test]
fn over_the_unix_socket_any_host_will_do() {
    let api = Api::unix(Control::Answers);
    assert_eq!(api.raw("GET", "/v1/status", &["Host: whatever"], b"").status, 200);
    let post = api.raw("POST", "/v1/reload", &["Host: x", "Content-Length: 0"], b"");
    assert_eq!(post.status, 200);
}

// --- bounds ---

#[test]
fn bodies_are_ignored_up_to_a_bound() {
    let api = Api::unix(Control::Answers);
    let post = |length: usize| {
        let announced = format!("Content-Length: {length}");
        api.raw("POST", "/v1/reload", &["Host: x", &announced], &vec![b'x'; length]).status
    };
    assert_eq!((post(65_536), post(65_537), post(10_000_000)), (200, 413, 413));
    let chunk = format!("10000\r\n{}\r\n1\r\nx\r\n0\r\n\r\n", "x".repeat(65_536));
    let headers = ["Host: x", "Transfer-Encoding: chunked"];
    let chunked = api.raw("POST", "/v1/reload", &headers, chunk.as_bytes());
    assert_eq!(chunked.refusal(), (413, "body too large".to_owned()));
}

#[test]
fn slow_heads_and_slow_bodies_lose_their_connection() {
    let api = Api::unix(Control::Answers);
    let start = clock::now();
    let mut silent = api.connect();
    let mut half = api.connect();
    half.write_all(b"GET /live HTTP/1.1\r\nHost:").unwrap();
    let mut body = api.connect();
    body.write_all(b"POST /v1/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab").unwrap();
    let mut idle = api.connect();
    idle.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert_eq!(Answer::read(&mut body).refusal().0, 408);
    for stream in [&mut silent, &mut half, &mut idle] {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("closed, not left open");
    }
    let took = clock::now() - start;
    assert!(took > Duration::from_secs(4) && took < Duration::from_secs(12), "{took:?}");
}

#[test]
fn forty_connections_at_once_are_all_answered() {
    let api = Api::unix(Control::Answers);
    let mut silent: Vec<_> = (0..40).map(|_| api.connect()).collect();
    // Eight of them wait until a slot comes free.
    for stream in silent.iter_mut().rev() {
        stream.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    }
    for stream in &mut silent {
        assert_eq!(Answer::read(stream).status, 200);
    }
}

#[test]
fn silent_clients_that_hold_every_slot_are_got_rid_of() {
    let api = Api::unix(Control::Answers);
    let _silent: Vec<_> = (0..32).map(|_| api.connect()).collect();
    assert_eq!(api.ask("GET", "/live").status, 200);
}

#[test]
fn a_huge_head_is_refused() {
    let api = Api::unix(Control::Answers);
    let header = format!("X: {}", "x".repeat(100_000));
    assert_eq!(api.raw("GET", "/live", &["Host: x", &header], b"").status, 431);
}

#[test]
fn several_requests_may_share_a_connection() {
    let api = Api::unix(Control::Answers);
    let mut stream = api.connect();
    let request = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n";
    for _ in 0..3 {
        stream.write_all(request).unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        let mut byte = [0];
        let mut tail = Vec::new();
        while !tail.ends_with(b"}") {
            stream.read_exact(&mut byte).unwrap();
            tail.push(byte[0]);
        }
    }
}

// --- the socket ---

#[test]
fn the_socket_is_private_and_removed_when_the_api_stops() {
    use std::os::unix::fs::PermissionsExt;
    let mut api = Api::unix(Control::Answers);
    let path: PathBuf = api.path().to_owned();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let again = Admin { listen: api.address.clone(), token_file: None };
    assert!(matches!(admin::bind(&again), Err(admin::BindError::Live(_))));
    assert_eq!(api.ask("GET", "/live").status, 200);
    api.stop();
    assert!(!path.exists());
    drop(admin::bind(&again).unwrap());
}

#[test]
fn an_answer_under_way_is_finished_when_the_api_stops() {
    let mut api = Api::unix(Control::Answers);
    let mut stream = api.connect();
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).unwrap();
    let start = clock::now();
    api.stop();
    assert!(clock::now() - start < Duration::from_secs(3), "an idle connection holds nothing up");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with(STATUS));
}

// --- the command line's client ---

#[test]
fn the_client_shows_and_changes_over_the_unix_socket() {
    let api = Api::unix(Control::Answers);
    let said = |arguments: &[&str]| {
        let output = api.cli(arguments);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(said(&["status", "--json"]).trim_end(), STATUS);
    assert!(said(&["status"]).starts_with("tidegate 0.1.0: serving"));
    assert!(said(&["reload"]).contains("generation 4"));
    assert!(said(&["drain", "web/unix:/run/b.sock"]).starts_with("web/unix:/run/b.sock takes no"));
    assert!(said(&["undrain", "web/[::1]:80"]).starts_with("web/[::1]:80 takes new"));
    assert!(said(&["shutdown"]).starts_with("draining"));
    assert!(api.shut_down.load(Ordering::Relaxed));
}

#[test]
fn the_client_exits_1_when_refused_and_says_why_on_standard_error() {
    let api = Api::unix(Control::RefusesTheFile);
    let unknown = api.cli(&["drain", "web/x"]);
    assert_eq!(unknown.status.code(), Some(1));
    let text = String::from_utf8(unknown.stderr).unwrap();
    assert_eq!(text, "tidegate: unknown backend: pool \"web\" has no backend \"x\"\n");
    assert!(unknown.stdout.is_empty());
    let refused = api.cli(&["reload"]);
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(text.starts_with("t.toml:3:7: error: no such pool\nt.toml:9:7: error: unknown key\n"));
}

#[test]
fn the_client_exits_2_on_usage_and_3_when_nobody_answers() {
    let mut api = Api::unix(Control::Answers);
    assert_eq!(api.cli(&["drain", "web"]).status.code(), Some(2));
    api.stop();
    let unreachable = api.cli(&["status"]);
    assert_eq!(unreachable.status.code(), Some(3));
    let text = String::from_utf8(unreachable.stderr).unwrap();
    assert!(text.starts_with("tidegate: cannot reach the balancer at unix:/"), "{text}");
}

#[test]
fn the_client_brings_its_token_over_tcp() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let file = api.dir.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(api.cli(&["status"]).status.code(), Some(0));
    assert_eq!(api.cli(&["drain", "web/a"]).status.code(), Some(1));
    assert_eq!(api.cli(&["drain", "web/a", "--token-file", file]).status.code(), Some(0));
    let missing = api.cli(&["drain", "web/a", "--token-file", "/no/such/file"]);
    assert_eq!(missing.status.code(), Some(1));
}

#[test]
fn a_closed_standard_output_is_no_failure() {
    use std::process::Stdio;
    let api = Api::unix(Control::Answers);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["status", "--admin", &api.address.to_string()])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the client ends", || child.try_wait().unwrap().is_some());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}
