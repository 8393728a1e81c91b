//! `tidegate bench` and `tidegate backend`: the counts of one compared with the counts of the
//! other, directly and through Tidegate.
//!
//! Both run as separate processes. Times are compared only with deliberate stalls, with a margin
//! for slow machines.

// The program must not sleep or read the clock directly. Tests can.
#![allow(clippy::disallowed_methods)]
// A failed unwrap fails the test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite. No other crate links it.
#![allow(unreachable_pub)]

// Other test binaries use the rest.
#[allow(dead_code)]
#[allow(unused_imports, unused_macros)]
#[path = "common/mod.rs"]
mod common;

use common::backend::{ScriptedBackend, echo};
use common::conf::{Conf, Pool};
use common::proxy::{PROGRAM, TestProxy};
use common::{Engine, exclusive, on_every_engine, proc};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::Ordering;

/// A running `tidegate backend`.
struct Backend {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
    address: SocketAddr,
}

// === impl Backend ===

impl Backend {
    fn start(line: &str) -> Backend {
        let mut child = Command::new(PROGRAM)
            .args(["backend", "--listen", "127.0.0.1:0", "--json"])
            .args(line.split(' '))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut first = String::new();
        out.read_line(&mut first).unwrap();
        let first: Value = serde_json::from_str(&first).expect("the addresses, once bound");
        let address = first["listening"][0].as_str().unwrap().parse().unwrap();
        Backend { child, out, address }
    }

    /// Stops it with SIGTERM and returns its counts.
    fn stop(mut self) -> Value {
        proc::signal(self.child.id(), Signal::TERM);
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        serde_json::from_str(&rest).expect("the counts")
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn bench(to: SocketAddr, line: &str) -> Output {
    let to = to.to_string();
    let arguments = ["bench", "--to", &to, "--json"].into_iter().chain(line.split(' '));
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

/// Returns the report of a run that measured something.
#[track_caller]
fn report(to: SocketAddr, line: &str) -> Value {
    let output = bench(to, line);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{line}: {complaint}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn count(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no count {key} in {value}"))
}

/// Answers during and after the measured time. A backend cannot distinguish them.
fn answered(report: &Value) -> u64 {
    count(report, "requests") + count(report, "late")
}

#[track_caller]
fn no_errors(report: &Value) {
    assert_eq!(count(report, "errors_total"), 0, "{report}");
}

fn balancer(engine: Engine, backend: &Backend) -> TestProxy {
    TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", backend.address)))
}

// === each mode with its server ===

#[test]
fn ping_pong_counts_what_the_backend_counts() {
    let _share = exclusive::shared();
    let backend = Backend::start("respond --request 100 --size 3000 --threads 2");
    let run =
        report(backend.address, "ping-pong -c 7 --threads 2 --size 100 --answer 3000 --for 300ms");
    let served = backend.stop();
    no_errors(&run);
    assert!(count(&run, "requests") > 100, "{run}");
    assert_eq!(answered(&run), count(&served, "requests"));
    assert_eq!(count(&served, "bytes_out"), answered(&run) * 3000);
    assert_eq!((count(&run, "opened"), count(&served, "accepted")), (7, 7));
}

#[test]
fn short_can_start_with_a_header_that_echo_skips() {
    let _share = exclusive::shared();
    let backend = Backend::start("echo --skip 28");
    let run = report(backend.address, "short -c 4 --proxy-header --for 200ms");
    let served = backend.stop();
    no_errors(&run);
    let (received, sent) = (count(&served, "bytes_in"), count(&served, "bytes_out"));
    assert_eq!((received, sent), (answered(&run) * 92, answered(&run) * 64));
}

#[test]
fn short_makes_one_connection_per_request() {
    let _share = exclusive::shared();
    for close in ["fin", "reset"] {
        let backend = Backend::start("respond");
        let run = report(backend.address, &format!("short -c 4 --close {close} --for 200ms"));
        let served = backend.stop();
        no_errors(&run);
        assert!(count(&run, "requests") > 20, "{run}");
        assert_eq!(answered(&run), count(&served, "requests"));
        assert_eq!(answered(&run), count(&served, "accepted"));
        assert_eq!(count(&run, "opened"), count(&served, "accepted"));
    }
}

#[test]
fn upload_counts_at_most_what_the_sink_received() {
    let _share = exclusive::shared();
    let backend = Backend::start("sink");
    let run = report(backend.address, "upload -c 2 --size 1000 --for 300ms");
    let served = backend.stop();
    no_errors(&run);
    let (sent, received) = (count(&run, "bytes_out"), count(&served, "bytes_in"));
    // The backend also receives bytes in transit at the end of the run.
    assert!(sent > 100_000 && sent <= received, "sent {sent}, received {received}");
}

#[test]
fn download_counts_at_most_what_the_source_sent() {
    let _share = exclusive::shared();
    for size in ["512B", "128KiB"] {
        let backend = Backend::start(&format!("source --size {size}"));
        let run = report(backend.address, "download -c 2 --for 300ms");
        let served = backend.stop();
        no_errors(&run);
        let (received, sent) = (count(&run, "bytes_in"), count(&served, "bytes_out"));
        assert!(received > 100_000 && received <= sent, "received {received}, sent {sent}");
    }
}

#[test]
fn open_loop_keeps_its_rate() {
    let _share = exclusive::shared();
    let backend = Backend::start("respond");
    let run = report(backend.address, "open-loop --rate 2000 -c 8 --for 1s");
    let served = backend.stop();
    no_errors(&run);
    assert_eq!(answered(&run), count(&served, "requests"));
    let due = 2000.0 * run["seconds"].as_f64().unwrap();
    assert!((answered(&run) as f64 - due).abs() <= 2.0, "{run}");
}

#[test]
fn idle_connections_stay_open_and_optionally_send_once() {
    let _share = exclusive::shared();
    let backend = Backend::start("respond");
    let quiet = report(backend.address, "idle -c 300 --for 100ms");
    let asking = report(backend.address, "idle -c 300 --size 64 --for 100ms");
    let served = backend.stop();
    no_errors(&quiet);
    no_errors(&asking);
    assert_eq!((count(&quiet, "opened"), count(&asking, "opened")), (300, 300));
    assert_eq!((count(&served, "accepted"), count(&served, "requests")), (600, 300));
}

#[test]
fn churn_replaces_closed_connections() {
    let _share = exclusive::shared();
    let backend = Backend::start("echo");
    let run = report(backend.address, "churn -c 20 --lifetime 20ms --size 10 --for 500ms");
    let served = backend.stop();
    no_errors(&run);
    // 20 connections with a lifetime of 20 ms each: 25 generations in 500 ms.
    let opened = count(&run, "opened");
    assert!((100..=1000).contains(&opened), "{run}");
    assert_eq!(opened, count(&served, "accepted"));
}

// === through Tidegate ===

fn every_mode_works_through_tidegate(engine: Engine) {
    let respond = Backend::start("respond");
    let proxy = balancer(engine, &respond);
    let to = proxy.addr("web");
    let modes = [
        "ping-pong -c 16 --for 300ms",
        "short -c 4 --for 200ms",
        "open-loop --rate 1000 -c 8 --for 300ms",
        "idle -c 50 --size 64 --for 50ms",
        "churn -c 10 --lifetime 20ms --size 64 --for 200ms",
    ];
    let mut requests = 0;
    for mode in modes {
        let run = report(to, mode);
        no_errors(&run);
        let asks_once = mode.starts_with("idle") || mode.starts_with("churn");
        requests += if asks_once { count(&run, "opened") } else { answered(&run) };
    }
    drop(proxy);
    assert_eq!(requests, count(&respond.stop(), "requests"));
}

fn streams_work_through_tidegate(engine: Engine) {
    let source = Backend::start("source --size 64KiB");
    let sink = Backend::start("sink");
    let down = report(balancer(engine, &source).addr("web"), "download -c 2 --for 300ms");
    let up = report(balancer(engine, &sink).addr("web"), "upload -c 2 --for 300ms");
    no_errors(&down);
    no_errors(&up);
    assert!(count(&down, "bytes_in") <= count(&source.stop(), "bytes_out"));
    assert!(count(&sink.stop(), "bytes_in") > 100_000);
}

on_every_engine!(every_mode_works_through_tidegate, streams_work_through_tidegate);

// === misbehaving servers ===

#[test]
fn stalled_backend_shows_in_the_tail_latency_of_open_loop() {
    let _share = exclusive::alone();
    let backend = Backend::start("hiccup --pause 200ms --every 700ms");
    let run = report(backend.address, "open-loop --rate 500 -c 8 --for 2s");
    // All messages due during a pause wait, about 100 per pause, not only the eight in progress.
    // They are a fifth of all messages, with waits between 0 and the length of the pause.
    assert!(run["latency_seconds"]["p99.9"].as_f64().unwrap() >= 0.150, "{run}");
    assert!(run["latency_seconds"]["p90"].as_f64().unwrap() >= 0.050, "{run}");
    no_errors(&run);
}

#[test]
fn requests_without_an_answer_are_counted_as_unanswered() {
    let _share = exclusive::shared();
    let backend = Backend::start("stall");
    let output = bench(backend.address, "ping-pong -c 3 --for 100ms");
    assert_eq!(output.status.code(), Some(3), "nothing was measured");
    let run: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(count(&run["errors"], "unanswered"), 3, "{run}");
    let rate = "open-loop --rate 100 -c 3 --for 200ms";
    let run: Value = serde_json::from_slice(&bench(backend.address, rate).stdout).unwrap();
    assert!((18..=22).contains(&count(&run["errors"], "unanswered")), "{run}");
    // Each counts with the time it had waited when the run ended.
    assert!(run["latency_seconds"]["p50"].as_f64().unwrap() > 0.5, "{run}");
}

#[test]
fn resets_by_the_backend_are_counted_as_reset() {
    let _share = exclusive::shared();
    let backend = Backend::start("reset --after 1000");
    let run = report(backend.address, "ping-pong -c 2 --size 100 --for 200ms");
    let served = backend.stop();
    let resets = count(&run["errors"], "reset");
    assert_eq!(count(&run, "errors_total"), resets, "another error: {run}");
    assert!(resets >= 2 && resets <= count(&served, "reset"), "{run} {served}");
    // Nine of the ten requests per connection were echoed.
    let whole = resets * 9;
    assert!((whole..=whole + 18).contains(&answered(&run)), "{run}");
}

#[test]
fn backend_that_resets_at_once_gives_no_answers() {
    let _share = exclusive::shared();
    let backend = Backend::start("reset");
    let output = bench(backend.address, "short -c 2 --for 100ms");
    let run: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), count(&run, "requests")), (Some(3), 0));
    assert!(count(&run["errors"], "reset") >= 2, "{run}");
}

#[test]
fn half_closing_backend_answers_once_and_continues_to_read() {
    let _share = exclusive::shared();
    let backend = Backend::start("half-close --size 64");
    let run = report(backend.address, "ping-pong -c 2 --for 200ms");
    assert!(count(&run["errors"], "closed") >= 2, "{run}");
    let served = backend.stop();
    assert_eq!(count(&served, "bytes_out"), count(&served, "accepted") * 64);
}

#[test]
fn slow_reader_limits_an_upload() {
    let _share = exclusive::shared();
    let backend = Backend::start("slow-read --rate 10KiB");
    let run = report(backend.address, "upload -c 1 --size 1KiB --for 500ms");
    no_errors(&run);
    let received = count(&backend.stop(), "bytes_in");
    assert!(received > 0 && received < 20 * 1024, "{received} bytes in half a second");
}

// === exit codes and arguments ===

#[test]
fn address_without_a_listener_is_reported() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = bench(free, "ping-pong --for 5s");
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{complaint}");
    let named = complaint.contains(&free.to_string()) && complaint.contains("connect refused");
    assert!(named, "{complaint}");
}

#[test]
fn address_in_use_makes_the_backend_exit_with_3() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output =
        Command::new(PROGRAM).args(["backend", "--listen", &address, "echo"]).output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{complaint}");
    assert!(complaint.contains(&address), "{complaint}");
}

#[test]
fn options_of_another_mode_are_usage_errors() {
    for line in [
        "bench --to 127.0.0.1:1 open-loop",
        "bench --to 127.0.0.1:1 open-loop --rate 0",
        "bench --to 127.0.0.1:1 ping-pong --rate 5",
        "bench --to 127.0.0.1:1 ping-pong --size 0",
        "bench --to 127.0.0.1:1 ping-pong -c 1 --threads 2",
        "bench --to 127.0.0.1:1 ping-pong --cpu 9999",
        "bench --to 127.0.0.1:1 download --size 5",
        "bench --to [::1]:1 ping-pong --sources 2",
        "bench --to example.com:80 ping-pong",
        "bench ping-pong",
        "backend echo",
        "backend --listen 127.0.0.1:0 echo --size 5",
        "backend --listen 127.0.0.1:0 respond --size 0",
        "backend --listen 127.0.0.1:0 hiccup --pause 2s",
    ] {
        let output = Command::new(PROGRAM).args(line.split(' ')).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(!output.stderr.is_empty(), "{line}");
    }
}

#[test]
fn interrupt_ends_a_run_with_its_report() {
    let _share = exclusive::shared();
    let backend = ScriptedBackend::start(echo());
    let child = Command::new(PROGRAM)
        .args(["bench", "--to", backend.address(), "--json", "ping-pong", "--size", "64"])
        .args(["-c", "2", "--for", "60s"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The third request follows an answer on one of the two connections.
    let echoed = || backend.counts().bytes_written.load(Ordering::Relaxed);
    common::eventually(common::secs(20), "three requests", || echoed() >= 3 * 64);
    proc::signal(child.id(), Signal::INT);
    let output = child.wait_with_output().unwrap();
    let run: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(output.status.code(), Some(0));
    assert!(count(&run, "requests") > 0 && run["seconds"].as_f64().unwrap() < 30.0, "{run}");
}

#[test]
fn sources_sets_the_number_of_client_addresses() {
    let _share = exclusive::shared();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let run = std::thread::spawn(move || report(to, "idle -c 6 --sources 3 --for 300ms"));
    // The connections are kept open, because the generator would reconnect.
    let held: Vec<_> = (0..6).map(|_| listener.accept().unwrap()).collect();
    let mut sources: Vec<_> = held.iter().map(|(_, from)| from.ip().to_string()).collect();
    sources.sort();
    let wanted = ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.3"];
    assert_eq!(sources, wanted);
    assert_eq!(count(&run.join().unwrap(), "opened"), 6);
}

#[test]
fn report_without_json_is_text() {
    let _share = exclusive::shared();
    let backend = Backend::start("echo");
    let output = Command::new(PROGRAM)
        .args(["bench", "--to", &backend.address.to_string(), "ping-pong", "--for", "100ms"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    for word in ["requests", "connections", "p50", "p99.99", "max"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    assert!(output.stderr.is_empty(), "progress is for terminals only");
}

// === windows ===

#[test]
fn windows_are_printed_when_they_end_and_add_up_to_the_total() {
    let _share = exclusive::shared();
    let backend = Backend::start("respond");
    let line = "open-loop --rate 1000 -c 6 --threads 2 --every 100ms --for 650ms";
    let output = bench(backend.address, line);
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("one JSON object per line"))
        .collect();
    let whole = lines.pop().unwrap();
    no_errors(&whole);
    assert!(whole["window"].is_null() && lines.len() >= 2, "{text}");
    let numbers: Vec<u64> = lines.iter().map(|line| count(line, "window")).collect();
    assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
    // Requests after the last window are only in the total.
    let sum: u64 = lines.iter().map(|line| count(line, "requests")).sum();
    assert!(sum > 0 && sum <= count(&whole, "requests"), "{text}");
    assert_eq!(answered(&whole), count(&backend.stop(), "requests"));
    let latency = lines[0]["latency_seconds"]["p99"].as_f64();
    assert!(latency.is_some_and(|seconds| seconds > 0.0), "{text}");
}

#[test]
fn unsuitable_server_is_reported_with_suitable_servers() {
    let _share = exclusive::shared();
    let http = ScriptedBackend::start(common::backend::http("a", 200));
    for (mode, server) in [("ping-pong", http.address()), ("short", http.address())] {
        let output = Command::new(PROGRAM)
            .args(["bench", mode, "--to", server, "--for", "300ms", "--connections", "2"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        for words in ["nothing was measured", mode, "--answer", "tidegate backend", "HTTP"] {
            assert!(said.contains(words), "no {words:?} in {said}");
        }
    }
}
