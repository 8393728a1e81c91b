//! Probes against real sockets on loopback.

use super::*;
use crate::event_log::EventLog;
use runner::{PROBES_RUNNING_MAX, ProbeRunner};
use tidegate_core::control::ProbeLane;
use tidegate_core::control::{ControlEvent, ProbeToken};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::{Config, Expect, HttpProbe, HttpVersion, ProbePattern};
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::table::state::BackendId;

const LANE: ProbeLane = ProbeLane { pool: 1, urgent: false };
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;

mod answers;
mod services;
mod sources;
mod steps;
mod tls_servers;

const TIMEOUT: Duration = Duration::from_millis(300);

fn spec(kind: ProbeKind) -> ProbeSpec {
    ProbeSpec {
        kind,
        interval: Duration::from_secs(2),
        target: ProbeTarget::default(),
        fast_interval: Duration::from_secs(1),
        down_interval: Duration::from_secs(2),
        timeout: TIMEOUT,
        rise: 2,
        fall: 3,
    }
}

fn ping() -> ProbeSpec {
    spec(ProbeKind::SendExpect { send: "PING\r\n".into(), expect: Expect::Starts("+PONG".into()) })
}

fn http() -> ProbeSpec {
    spec(ProbeKind::Http(http_probe()))
}

fn http_probe() -> HttpProbe {
    HttpProbe {
        path: "/health".into(),
        host: None,
        method: "GET".into(),
        version: HttpVersion::Http11,
        headers: Vec::new(),
        status: vec![(200, 299), (304, 304)],
        expect: None,
    }
}

fn on_runtime<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

#[test]
fn local_stall_uses_one_part_of_a_probe_timeout() {
    let took = on_runtime(async {
        let started = clock::now();
        let waiting = tokio::spawn(timeout_without_stalls(Duration::from_millis(400)));
        tokio::time::sleep(Duration::from_millis(100)).await;
        // Blocks the only thread, including its timers.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(Duration::from_secs(1));
        waiting.await.unwrap();
        started.elapsed()
    });
    // 100 ms of 400 ms had passed before the stall, and the stall counts 50 ms at most.
    assert!(took >= Duration::from_millis(1220), "{took:?}");
}

#[test]
fn probe_timeout_without_stalls_has_its_nominal_length() {
    let limit = Duration::from_millis(200);
    let took = on_runtime(async {
        let started = clock::now();
        timeout_without_stalls(limit).await;
        started.elapsed()
    });
    assert!(took >= limit && took < 2 * limit, "{took:?}");
}

/// Starts a backend that reads the first bytes of each connection, sends each of
/// `segments` in its own packet and closes.
async fn server(segments: &'static [&'static [u8]]) -> BackendAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                let mut question = [0; 1024];
                let _ = stream.read(&mut question).await;
                for segment in segments {
                    if stream.write_all(segment).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            });
        }
    });
    BackendAddr::Tcp(address)
}

/// Starts a backend that accepts and sends nothing.
async fn silent_backend() -> BackendAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(listener.accept().await.unwrap());
        }
    });
    BackendAddr::Tcp(address)
}

/// Returns an address without a listener.
async fn closed_port() -> BackendAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    BackendAddr::Tcp(listener.local_addr().unwrap())
}

#[track_caller]
fn failure(outcome: ProbeOutcome) -> String {
    match outcome {
        ProbeOutcome::Failure { reason, .. } => reason,
        other => panic!("expected a failure, got {other:?}"),
    }
}

#[track_caller]
fn assert_success(outcome: &ProbeOutcome) {
    assert!(matches!(outcome, ProbeOutcome::Success { .. }), "{outcome:?}");
}

#[test]
fn tcp_probe_succeeds_at_a_listening_port() {
    on_runtime(async {
        assert_success(&run(&silent_backend().await, &spec(ProbeKind::Tcp)).await);
    });
}

#[test]
fn tcp_probe_does_not_wake_the_backend() {
    on_runtime(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = BackendAddr::Tcp(listener.local_addr().unwrap());
        for _ in 0..20 {
            assert_success(&run(&address, &spec(ProbeKind::Tcp)).await);
        }
        let mut woken = 0;
        while tokio::time::timeout(Duration::from_millis(50), listener.accept()).await.is_ok() {
            woken += 1;
        }
        // On a busy host the reset can be sent after the delayed ACK (40 ms), which
        // wakes the backend.
        assert!(woken < 10, "woken by {woken} of 20 probes");
    });
}

#[test]
fn closed_port_fails_with_connection_refused() {
    on_runtime(async {
        for spec in [spec(ProbeKind::Tcp), ping(), http()] {
            assert_eq!(failure(run(&closed_port().await, &spec).await), "connection refused");
        }
    });
}

#[test]
fn hanging_backend_fails_at_the_timeout_with_the_stage() {
    on_runtime(async {
        let address = silent_backend().await;
        let started = clock::now();
        let reason = failure(run(&address, &http()).await);
        let took = started.elapsed();
        assert_eq!(reason, "timed out after 300ms while waiting for the status line");
        assert!(took >= TIMEOUT && took < TIMEOUT * 3, "{took:?}");
        let reason = failure(run(&address, &ping()).await);
        assert_eq!(reason, "timed out after 300ms while waiting for the answer");
    });
}

#[test]
fn full_listen_queue_fails_at_the_timeout() {
    on_runtime(async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let to = listener.local_addr().unwrap();
        let mut held = Vec::new();
        // Fill the listen queue. The kernel then ignores further connects.
        while let Ok(stream) =
            tokio::time::timeout(Duration::from_millis(100), TcpStream::connect(to)).await
        {
            held.push(stream.unwrap());
            assert!(held.len() < 100, "the listen queue is not full");
        }
        let reason = failure(run(&BackendAddr::Tcp(to), &spec(ProbeKind::Tcp)).await);
        assert_eq!(reason, "timed out after 300ms while connecting");
    });
}

#[test]
fn expected_answer_succeeds_in_any_segmentation() {
    on_runtime(async {
        let split = server(&[b"+", b"P", b"O", b"N", b"G", b"\r\n"]).await;
        assert_success(&run(&split, &ping()).await);
        let whole = server(&[b"+PONG and more than the probe expects"]).await;
        assert_success(&run(&whole, &ping()).await);
    });
}

#[test]
fn wrong_answer_is_quoted_with_control_characters_escaped() {
    on_runtime(async {
        let reason = failure(run(&server(&[b"-ERR\r\n\x1b[0m"]).await, &ping()).await);
        assert_eq!(reason, r#"wrong answer: got "-ERR\r\n\x1b[0m", expected "+PONG""#);
    });
}

#[test]
fn truncated_answer_is_reported_with_its_length() {
    on_runtime(async {
        let reason = failure(run(&server(&[b"+PO"]).await, &ping()).await);
        assert_eq!(reason, r#"connection closed after 3 bytes: got "+PO", expected "+PONG""#);
    });
}

#[test]
fn http_probe_accepts_only_the_configured_status() {
    on_runtime(async {
        for good in [&b"HTTP/1.1 200 OK\r\n"[..], b"HTTP/1.0 304\n", b"HTTP/1.1 204 \r\n"] {
            let address = server(Box::leak(Box::new([good]))).await;
            assert_success(&run(&address, &http()).await);
        }
        let split = server(&[b"HTTP/1.1 ", b"20", b"0 ", b"OK", b"\r", b"\nServer: x\r\n"]).await;
        assert_success(&run(&split, &http()).await);
        let reason = failure(run(&server(&[b"HTTP/1.1 503 No\r\n\r\n"]).await, &http()).await);
        assert_eq!(reason, "status 503, expected 200-299,304");
    });
}

#[test]
fn http_request_contains_host_user_agent_and_connection_close() {
    on_runtime(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let seen = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                stream.read_buf(&mut request).await.unwrap();
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            String::from_utf8(request).unwrap()
        });
        assert_success(&run(&BackendAddr::Tcp(to), &http()).await);
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            seen.await.unwrap(),
            format!(
                "GET /health HTTP/1.1\r\nHost: {to}\r\nUser-Agent: tidegate/{version}\r\n\
                 Accept: */*\r\nConnection: close\r\n\r\n"
            )
        );
    });
}

#[test]
fn answer_without_http_status_line_is_reported_as_such() {
    on_runtime(async {
        for garbage in [
            &b"SSH-2.0-OpenSSH_9.9\r\n"[..],
            b"HTTP/1.1 20 OK\r\n",
            b"HTTP/1.1 2000\r\n",
            b"HTTP/1.1 099 \r\n",
            b"HTTP/2 200\r\n",
            b"\r\n",
        ] {
            let reason = failure(run(&server(Box::leak(Box::new([garbage]))).await, &http()).await);
            assert!(reason.ends_with("expected an HTTP/1 status line"), "{reason}");
        }
        let reason = failure(run(&server(&[]).await, &http()).await);
        assert_eq!(reason, "connection closed after 0 bytes: got \"\", expected a status line");
    });
}

#[test]
fn status_line_without_end_fails_at_8_kib() {
    static HUGE: [&[u8]; 1] = [&[b'x'; 100_000]];
    on_runtime(async {
        let reason = failure(run(&server(&HUGE).await, &http()).await);
        assert!(reason.starts_with("no line end in the first 8 KiB of the answer"), "{reason}");
        assert!(reason.len() <= REASON_BYTES_MAX);
    });
}

#[test]
fn huge_headers_after_the_status_line_are_ignored() {
    static HUGE: [&[u8]; 2] = [b"HTTP/1.1 200 OK\r\nX: ", &[b'x'; 1_000_000]];
    on_runtime(async {
        let address = server(&HUGE).await;
        assert_success(&run(&address, &http()).await);
    });
}

#[test]
fn unix_sockets_are_probed_like_tcp_ports() {
    on_runtime(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backend.sock");
        let address = BackendAddr::Unix(path.clone());
        let reason = failure(run(&address, &spec(ProbeKind::Tcp)).await);
        assert_eq!(reason, "socket file does not exist");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut question = [0; 64];
                // A tcp probe has already closed its connection.
                let _ = stream.read(&mut question).await;
                let _ = stream.write_all(b"+PONG\r\n").await;
            }
        });
        assert_success(&run(&address, &spec(ProbeKind::Tcp)).await);
        assert_success(&run(&address, &ping()).await);
    });
}

#[test]
fn stale_unix_socket_fails_with_connection_refused() {
    on_runtime(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backend.sock");
        drop(UnixListener::bind(&path).unwrap());
        let reason = failure(run(&BackendAddr::Unix(path), &spec(ProbeKind::Tcp)).await);
        assert_eq!(reason, "connection refused");
    });
}

#[test]
fn full_listen_queue_of_a_unix_socket_fails_immediately() {
    on_runtime(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backend.sock");
        let listener =
            socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
        listener.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _held = UnixStream::connect(&path).await.unwrap();
        let reason = failure(run(&BackendAddr::Unix(path), &ping()).await);
        assert_eq!(reason, "listen queue of the socket is full");
    });
}

#[test]
fn local_errors_do_not_count_against_the_backend() {
    for errno in [libc::EMFILE, libc::ENFILE, libc::EADDRNOTAVAIL, libc::ENOBUFS, libc::ENOMEM] {
        let error = || io::Error::from_raw_os_error(errno);
        assert!(matches!(connect_error(error()), ProbeError::Local(..)), "{errno}");
        assert!(matches!(exchange_error(error()), ProbeError::Local(..)), "{errno}");
    }
    for errno in [libc::ECONNREFUSED, libc::EHOSTUNREACH, libc::ENETUNREACH] {
        let error = io::Error::from_raw_os_error(errno);
        assert!(matches!(connect_error(error), ProbeError::Backend(_)), "{errno} from ICMP");
    }
}

#[test]
fn immediate_connect_error_is_distinguished_from_a_later_error() {
    let error = || io::Error::from_raw_os_error(libc::ENETUNREACH);
    on_runtime(async {
        let (_, immediate) = note_immediate_error::<()>(async { Err(error()) }).await.unwrap_err();
        assert!(immediate, "connect(2) returned the error");
        let later = async {
            tokio::task::yield_now().await;
            Err::<(), _>(error())
        };
        assert!(!note_immediate_error(later).await.unwrap_err().1, "the error is from ICMP");
    });
}

#[test]
fn long_reason_is_truncated_between_characters() {
    let cut = bounded("ä".repeat(500));
    assert!(cut.len() <= REASON_BYTES_MAX && cut.ends_with("ä..."));
    assert_eq!(bounded("short".into()), "short");
}

fn start_runner(results: mpsc::Sender<ControlEvent>, running_max: usize) -> ProbeRunner {
    let counters = Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT));
    let helper = ProbeHelper::new(None, Arc::clone(&counters), EventLog::new());
    ProbeRunner::start(results, running_max, counters, helper)
}

fn names() -> (Arc<str>, Arc<str>) {
    ("web".into(), "a".into())
}

#[test]
fn controller_detects_a_failure_and_the_return_of_a_backend() {
    use tidegate_core::control::{ControlEffect, Controller};
    on_runtime(async {
        let (sender, mut results) = mpsc::channel(16);
        let runner = start_runner(sender, PROBES_RUNNING_MAX);
        let mut controller = Controller::new(1, 1);
        let mut listener = Some(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.as_ref().unwrap().local_addr().unwrap();
        let config = probed_config(address, Duration::from_millis(20));
        let mut event = ControlEvent::Configure(config);
        let mut seen = Vec::new();
        let patience = clock::now() + Duration::from_secs(10);
        while seen.len() < 3 {
            assert!(clock::now() < patience, "only these states: {seen:?}");
            for effect in controller.apply(event, clock::now()) {
                match effect {
                    ControlEffect::Probe { backend, token, names, address, spec, .. } => {
                        runner.probe(LANE, backend, token, names, address, spec);
                    }
                    ControlEffect::Log(transition) => seen.push(transition.to),
                    _ => {}
                }
            }
            match seen.len() {
                1 => listener = None,
                2 if listener.is_none() => {
                    listener = Some(TcpListener::bind(address).await.unwrap());
                }
                _ => {}
            }
            let due = controller.next_due().unwrap();
            event = tokio::select! {
                Some(result) = results.recv() => result,
                () = tokio::time::sleep_until(due.into()) => ControlEvent::Tick,
            };
        }
        assert_eq!(seen, ["up", "down", "up"]);
    });
}

/// Returns the next result. Panics after 10 s without one.
async fn next(results: &mut mpsc::Receiver<ControlEvent>) -> (BackendId, ProbeToken, ProbeOutcome) {
    let patience = Duration::from_secs(10);
    match tokio::time::timeout(patience, results.recv()).await.expect("no result within 10 s") {
        Some(ControlEvent::Probed { backend, token, outcome }) => (backend, token, outcome),
        other => panic!("unexpected {other:?}"),
    }
}

#[test]
fn runner_keeps_its_cap_and_the_order_of_requests() {
    on_runtime(async {
        let (sender, mut results) = mpsc::channel(1);
        let runner = start_runner(sender, 2);
        let (silent, good) = (silent_backend().await, server(&[b"+PONG"]).await);
        let started: Instant = clock::now();
        for n in 0..4 {
            runner.probe(
                LANE,
                BackendId(n),
                ProbeToken(n.into()),
                names(),
                silent.clone(),
                Arc::new(ping()),
            );
        }
        runner.probe(LANE, BackendId(4), ProbeToken(4), names(), good, Arc::new(ping()));
        let mut order = Vec::new();
        for _ in 0..5 {
            let (backend, token, outcome) = next(&mut results).await;
            assert_eq!(u64::from(backend.0), token.0);
            assert_eq!(matches!(outcome, ProbeOutcome::Success { .. }), backend.0 == 4);
            order.push(backend.0);
        }
        assert!(started.elapsed() >= TIMEOUT * 2, "two probes at the same time");
        order[..2].sort_unstable();
        assert_eq!(order[..2], [0, 1]);
        assert!(order[2..].iter().all(|n| *n >= 2));
    });
}

#[test]
fn newer_request_replaces_the_older_request_of_its_backend() {
    on_runtime(async {
        let (sender, mut results) = mpsc::channel(1);
        let runner = start_runner(sender, 1);
        let (silent, good) = (silent_backend().await, server(&[b"+PONG"]).await);
        runner.probe(LANE, BackendId(1), ProbeToken(1), names(), silent, Arc::new(ping()));
        tokio::task::yield_now().await;
        runner.probe(LANE, BackendId(1), ProbeToken(2), names(), good, Arc::new(ping()));
        let (_, token, outcome) = next(&mut results).await;
        assert_eq!(token, ProbeToken(2));
        assert_success(&outcome);
        drop(runner);
        assert!(results.recv().await.is_none(), "another result, or the task still runs");
    });
}

#[test]
fn pool_of_hanging_backends_does_not_delay_probes_of_another_pool() {
    on_runtime(async {
        let (sender, mut results) = mpsc::channel(1);
        let runner = start_runner(sender, 8);
        let (silent, good) = (silent_backend().await, server(&[b"+PONG"]).await);
        for n in 0..100 {
            runner.probe(
                LANE,
                BackendId(n),
                ProbeToken(0),
                names(),
                silent.clone(),
                Arc::new(ping()),
            );
        }
        let other = ProbeLane { pool: 2, urgent: false };
        runner.probe(other, BackendId(200), ProbeToken(0), names(), good, Arc::new(ping()));
        let (first, _, outcome) = next(&mut results).await;
        assert_eq!(first, BackendId(200), "a reserved slot is free before the first timeout");
        assert_success(&outcome);
    });
}

#[test]
fn backend_about_to_change_is_probed_first_in_its_pool() {
    on_runtime(async {
        let (sender, mut results) = mpsc::channel(1);
        let runner = start_runner(sender, 1);
        let silent = silent_backend().await;
        for n in 0..4 {
            runner.probe(
                LANE,
                BackendId(n),
                ProbeToken(0),
                names(),
                silent.clone(),
                Arc::new(ping()),
            );
        }
        let urgent = ProbeLane { urgent: true, ..LANE };
        runner.probe(
            urgent,
            BackendId(3),
            ProbeToken(1),
            names(),
            silent.clone(),
            Arc::new(ping()),
        );
        let mut order = Vec::new();
        for _ in 0..4 {
            order.push(next(&mut results).await.0.0);
        }
        assert_eq!(order, [0, 3, 1, 2]);
    });
}

#[test]
fn a_probe_that_only_connects_is_small() {
    let spec = ProbeSpec { kind: ProbeKind::Tcp, ..ping() };
    let address = BackendAddr::Tcp("127.0.0.1:9".parse().unwrap());
    let configs = TlsConfigs::default();
    let probe = run_from(&address, &spec, 0, &configs);
    assert!(size_of_val(&probe) <= 1536, "{} bytes", size_of_val(&probe));
}

/// Returns a configuration with one pool of one backend at `address`, probed every
/// `interval`.
fn probed_config(address: std::net::SocketAddr, interval: Duration) -> Arc<Config> {
    let text = format!(
        "[frontend.in]\nbind = [\"127.0.0.1:80\"]\npool = \"web\"\n[pool.web.probe]\nkind = \"tcp\"\n\
         [[pool.web.backend]]\naddress = \"{address}\"\n"
    );
    let mut config = tidegate_config::parse(&text, "probed.toml").unwrap();
    let pool = Arc::make_mut(&mut config.pools[0]);
    let spec = Arc::make_mut(pool.probe.as_mut().unwrap());
    (spec.interval, spec.fast_interval) = (interval, interval);
    Arc::new(config)
}
