//! The admin API over real sockets with a simulated control loop.
//!
//! Each test starts its own API on a Unix socket in its own directory, or on port 0 of
//! loopback.
#![allow(clippy::unwrap_used)]

mod browsers;
mod client;
mod harness;
mod questions;

use harness::{Answer, Api, Control, STATUS, TOKEN, bearer};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tidegate_daemon::admin::{self, Token, Tokens};
use tidegate_net::clock;

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
fn ready_follows_the_state_of_the_process() {
    let api = Api::unix(Control::HasEnded);
    assert_eq!(api.ask("GET", "/ready").error(), (503, "not ready".to_owned()));
    api.readiness.set_ready();
    assert_eq!(api.ask("GET", "/ready").status, 200);
    api.readiness.set_draining();
    api.readiness.set_ready();
    assert_eq!(api.ask("GET", "/ready").status, 503);
    assert_eq!(api.ask("GET", "/live").status, 200);
}

#[test]
fn backends_with_any_name_can_be_drained_and_undrained() {
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
    let refused = |path| api.ask("POST", path).error();
    assert_eq!(refused("/v1/pools/x/backends/a/drain"), (404, "unknown pool".to_owned()));
    assert_eq!(refused("/v1/pools/web/backends/x/drain"), (404, "unknown backend".to_owned()));
    let asked = |name| api.ask("GET", &format!("/v1/pools/{name}/explain"));
    assert_eq!(asked("x/backends/a").error(), (404, "unknown pool".to_owned()));
    assert_eq!(asked("web/backends/x").error(), (404, "unknown backend".to_owned()));
    assert_eq!(asked("web/backends/a").json()["eligible"], true);
    for path in [
        "/v1",
        "/metrics/",
        "/v1/pools/web/backends/a",
        "/v1/pools/web/backends/unix:/run/b.sock/drain",
        "/v1/pools/web/backends/%FF/drain",
    ] {
        assert_eq!(refused(path), (404, "unknown path".to_owned()), "{path}");
    }
}

#[test]
fn wrong_methods_are_405_with_the_allowed_method() {
    let api = Api::unix(Control::Answers);
    for path in ["/metrics", "/live", "/ready", "/v1/status"] {
        let answer = api.ask("POST", path);
        assert_eq!(answer.error(), (405, "method not allowed".to_owned()), "{path}");
        assert!(answer.head.contains("allow: get,head"), "{answer:?}");
    }
    for path in ["/v1/reload", "/v1/upgrade", "/v1/shutdown", "/v1/pools/web/backends/a/drain"] {
        for method in ["GET", "PUT", "DELETE"] {
            let answer = api.ask(method, path);
            assert_eq!(answer.error().0, 405, "{method} {path}");
            assert!(answer.head.contains("allow: post"), "{answer:?}");
        }
    }
    assert!(!api.shut_down.load(Ordering::Relaxed));
}

#[test]
fn upgrade_reports_done_rejected_or_failed() {
    let api = Api::unix(Control::Answers);
    let done = api.ask("POST", "/v1/upgrade").json();
    let expected = serde_json::json!({"pid": 77, "version": "9", "generation": 5});
    assert_eq!(done, expected);
    let both = api.ask("POST", "/v1/upgrade?binary=/x&config=/y");
    assert_eq!(both.status, 200, "{both:?}");
    let refused = api.ask("POST", "/v1/upgrade?binary=/x");
    assert_eq!(refused.error(), (409, "upgrade rejected".to_owned()));
    let failed = api.ask("POST", "/v1/upgrade?binary=%2Fbroken%20one");
    assert_eq!(failed.error().0, 422);
    assert_eq!(failed.json()["detail"], "it said: no");
    assert_eq!(api.ask("POST", "/v1/upgrade?program=/x").error().0, 400);
}

#[test]
fn upgrade_over_tcp_cannot_name_a_program() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let headers = ["Host: 127.0.0.1", "Content-Length: 0", &bearer(TOKEN)];
    assert_eq!(api.raw("POST", "/v1/upgrade", &headers, b"").status, 200);
    for query in ["binary=/x", "config=/y"] {
        let refused = api.raw("POST", &format!("/v1/upgrade?{query}"), &headers, b"");
        assert_eq!(refused.error(), (403, "not allowed over TCP".to_owned()));
    }
}

#[test]
fn rejected_file_is_422_with_every_problem() {
    let api = Api::unix(Control::RejectsTheFile);
    let answer = api.ask("POST", "/v1/reload");
    assert_eq!(answer.error().0, 422);
    let expected = serde_json::json!([
        {"file": "t.toml", "line": 3, "column": 7, "message": "no such pool",
         "rendered": "t.toml:3:7: error: no such pool"},
        {"file": "t.toml", "line": 9, "column": 7, "message": "unknown key",
         "help": "did you mean \"weight\"?", "rendered": "t.toml:9:7: error: unknown key"},
    ]);
    assert_eq!(answer.json()["problems"], expected);
}

// --- failures of the control loop ---

#[test]
fn reload_while_draining_is_a_conflict() {
    let answer = Api::unix(Control::Drains).ask("POST", "/v1/reload");
    assert_eq!(answer.error(), (409, "reload rejected".to_owned()));
    assert_eq!(answer.json()["detail"], "this process is draining");
    assert!(answer.json().get("problems").is_none());
}

#[test]
fn control_loop_without_an_answer_gives_503_in_time() {
    let api = Api::unix(Control::Hangs);
    let start = clock::now();
    assert_eq!(
        api.ask("GET", "/v1/status").error(),
        (503, "no answer from the control loop".to_owned())
    );
    let took = clock::now() - start;
    assert!(took > Duration::from_secs(4) && took < Duration::from_secs(9), "{took:?}");
    assert_eq!(api.ask("GET", "/live").status, 200);
}

#[test]
fn ended_control_loop_gives_503_at_once() {
    let api = Api::unix(Control::HasEnded);
    assert_eq!(
        api.ask("POST", "/v1/reload").error(),
        (503, "no answer from the control loop".to_owned())
    );
}

// --- access ---

#[test]
fn changes_over_loopback_need_the_token_and_reads_do_not() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let post = |headers: &[&str]| {
        let headers = [&["Host: 127.0.0.1", "Content-Length: 0"], headers].concat();
        api.raw("POST", "/v1/shutdown", &headers, b"")
    };
    assert_eq!(api.ask("GET", "/v1/status").status, 200);
    let missing = post(&[]);
    assert_eq!(missing.error(), (401, "unauthorized".to_owned()));
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
fn changes_over_tcp_are_rejected_without_a_configured_token() {
    let api = Api::tcp("127.0.0.1:0", None);
    assert_eq!(api.ask("GET", "/metrics").status, 200);
    let headers = ["Host: localhost", &bearer(TOKEN), "Content-Length: 0"];
    let refused = api.raw("POST", "/v1/shutdown", &headers, b"");
    assert_eq!(refused.error(), (403, "no token configured".to_owned()));
    assert!(!api.shut_down.load(Ordering::Relaxed));
}

#[test]
fn reads_from_other_hosts_need_the_token() {
    let api = Api::tcp("0.0.0.0:0", Some(TOKEN));
    for path in ["/metrics", "/v1/status", "/v1/events", "/nothing"] {
        assert_eq!(api.ask("GET", path).status, 401, "{path}");
    }
    for path in ["/live", "/ready", "/", "/page/main.js"] {
        assert_ne!(api.ask("GET", path).status, 401, "{path}");
    }
    let with = ["Host: localhost", &bearer(TOKEN)];
    assert_eq!(api.raw("GET", "/v1/status", &with, b"").status, 200);
}

#[test]
fn reloaded_token_applies_to_the_next_request() {
    let api = Api::tcp("127.0.0.1:0", Some(TOKEN));
    let post = |token: &str| {
        let headers = ["Host: localhost", &bearer(token), "Content-Length: 0"];
        api.raw("POST", "/v1/reload", &headers, b"").status
    };
    assert_eq!(post(TOKEN), 200);
    api.tokens.set(Tokens { full: Token::new(b"another-token-of-length"), read: None });
    assert_eq!((post(TOKEN), post("another-token-of-length")), (401, 200));
    api.tokens.set(Tokens::default());
    assert_eq!(post("another-token-of-length"), 403);
}

#[test]
fn foreign_host_names_are_rejected() {
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
fn bodies_are_ignored_up_to_64_kib() {
    let api = Api::unix(Control::Answers);
    let post = |length: usize| {
        let announced = format!("Content-Length: {length}");
        api.raw("POST", "/v1/reload", &["Host: x", &announced], &vec![b'x'; length]).status
    };
    assert_eq!((post(65_536), post(65_537), post(10_000_000)), (200, 413, 413));
    let chunk = format!("10000\r\n{}\r\n1\r\nx\r\n0\r\n\r\n", "x".repeat(65_536));
    let headers = ["Host: x", "Transfer-Encoding: chunked"];
    let chunked = api.raw("POST", "/v1/reload", &headers, chunk.as_bytes());
    assert_eq!(chunked.error(), (413, "body too large".to_owned()));
}

#[test]
fn slow_heads_and_slow_bodies_are_closed() {
    let api = Api::unix(Control::Answers);
    let start = clock::now();
    let mut silent = api.connect();
    let mut half = api.connect();
    half.write_all(b"GET /live HTTP/1.1\r\nHost:").unwrap();
    let mut body = api.connect();
    body.write_all(b"POST /v1/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab").unwrap();
    let mut idle = api.connect();
    idle.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert_eq!(Answer::read(&mut body).error().0, 408);
    for stream in [&mut silent, &mut half, &mut idle] {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("the connection is closed");
    }
    let took = clock::now() - start;
    assert!(took > Duration::from_secs(4) && took < Duration::from_secs(12), "{took:?}");
}

#[test]
fn forty_connections_at_once_are_all_answered() {
    let api = Api::unix(Control::Answers);
    let ask = |_| {
        let mut stream = api.connect();
        stream.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        stream
    };
    // Eight of them wait for a free connection slot.
    let mut asking: Vec<_> = (0..40).map(ask).collect();
    for stream in &mut asking {
        assert_eq!(Answer::read(stream).status, 200);
    }
}

#[test]
fn oldest_silent_admin_client_is_closed_for_a_request() {
    let api = Api::unix(Control::Answers);
    let mut silent: Vec<_> = (0..64).map(|_| api.connect()).collect();
    let asked = clock::now();
    assert_eq!(api.ask("GET", "/live").status, 200);
    // Much earlier than the timeout for silent clients.
    assert!(clock::now() - asked < Duration::from_secs(4));
    let mut closed = Vec::new();
    silent[0].read_to_end(&mut closed).expect("the oldest connection is closed");
    assert!(closed.is_empty());
    assert_eq!(api.dropped.count(), 1);
}

#[test]
fn too_many_headers_are_rejected() {
    let api = Api::unix(Control::Answers);
    let with = |count: usize| {
        let all: Vec<String> = (0..count).map(|number| format!("X-{number}: x")).collect();
        let mut headers = vec!["Host: x"];
        headers.extend(all.iter().map(String::as_str));
        api.raw("GET", "/live", &headers, b"").status
    };
    assert_eq!((with(60), with(70)), (200, 431));
}

#[test]
fn large_head_is_rejected() {
    let api = Api::unix(Control::Answers);
    let header = format!("X: {}", "x".repeat(1_000_000));
    assert_eq!(api.raw("GET", "/live", &["Host: x", &header], b"").status, 431);
}

#[test]
fn several_requests_can_share_a_connection() {
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
fn socket_is_private_and_removed_when_the_api_stops() {
    use std::os::unix::fs::PermissionsExt;
    let mut api = Api::unix(Control::Answers);
    let path: PathBuf = api.path().to_owned();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let again = harness::endpoint(api.address.clone());
    assert!(matches!(admin::bind(&again), Err(admin::AdminBindError::Live(_))));
    assert_eq!(api.ask("GET", "/live").status, 200);
    api.stop();
    assert!(!path.exists());
    drop(admin::bind(&again).unwrap());
}

#[test]
fn answer_in_progress_is_finished_when_the_api_stops() {
    let mut api = Api::unix(Control::Answers);
    let mut stream = api.connect();
    stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).unwrap();
    let start = clock::now();
    api.stop();
    assert!(clock::now() - start < Duration::from_secs(3), "an idle connection delays the stop");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with(STATUS));
}
