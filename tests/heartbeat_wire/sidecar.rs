//! `tidegate heartbeat` and the example senders `examples/heartbeat/sender.py` and
//! `src/heartbeat/examples/service.rs`.

#[allow(dead_code)]
#[path = "../../src/heartbeat/examples/service.rs"]
mod service;

use crate::setup::{key_file, next_heartbeat, receiver, settings};
use rustix::process::{Pid, Signal, kill_process};
use socket2::{Domain, Socket, Type};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tidegate_heartbeat::SenderState;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tidegate");

/// A process that is killed with its test.
struct Sidecar(Child);

fn sidecar(to: SocketAddr, service: SocketAddr, key: &Path, more: &[&str]) -> Sidecar {
    let (to, service) = (to.to_string(), service.to_string());
    let child = Command::new(PROGRAM)
        .args(["heartbeat", "--to", &to, "--pool", "web", "--address", &service, "--key-id", "7"])
        .args(["--interval", "20ms", "--check-interval", "50ms", "--key-file"])
        .arg(key)
        .args(more)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Sidecar(child)
}

impl Sidecar {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn end(&mut self) -> (Option<i32>, String) {
        let code = self.0.wait().unwrap().code();
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (code, said)
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn service_is_ready_only_while_its_check_succeeds() {
    let ((_dir, key), (receiver, to)) = (key_file(), receiver());
    // The port is bound from the start, so that neither another process nor the check's own
    // connect can use it.
    let place = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    place.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let service = place.local_addr().unwrap().as_socket().unwrap();
    let _sidecar = sidecar(to, service, &key, &["--name", "a", "--weight", "5"]);
    let first = next_heartbeat(&receiver, "a first", |_| true).heartbeat;
    assert_eq!((first.state, &*first.name), (SenderState::Starting, "a"));
    let is = |state| {
        move |received: &tidegate_daemon::heartbeat::receive::ReceivedHeartbeat| {
            received.heartbeat.state == state
        }
    };

    place.listen(16).unwrap();
    let ready = next_heartbeat(&receiver, "ready", is(SenderState::Ready)).heartbeat;
    assert_eq!((ready.weight, ready.address), (5, service));
    drop(place);
    next_heartbeat(&receiver, "starting again", is(SenderState::Starting));
}

#[test]
fn sidecar_reports_connections_of_the_service() {
    let ((_dir, key), (receiver, to)) = (key_file(), receiver());
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = service.local_addr().unwrap();
    let _clients: Vec<_> = (0..4).map(|_| TcpStream::connect(address).unwrap()).collect();
    let _sidecar = sidecar(to, address, &key, &["--check", "none"]);
    let reported =
        next_heartbeat(&receiver, "four", |received| received.heartbeat.in_flight == 4).heartbeat;
    assert_eq!(&*reported.name, address.to_string());
}

#[test]
fn http_check_needs_a_success_status() {
    let ((_dir, key), (receiver, to)) = (key_file(), receiver());
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, asked) = (service.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&asked);
    std::thread::spawn(move || {
        for (number, client) in service.incoming().enumerate() {
            count.fetch_add(1, Ordering::Relaxed);
            let status = if number < 3 { "503 Later" } else { "200 OK" };
            let (mut client, mut question) = (client.unwrap(), [0; 1024]);
            let length = client.read(&mut question).unwrap();
            assert!(question[..length].starts_with(b"GET /health HTTP/1.1\r\n"));
            let _ = client.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes());
        }
    });
    let http = ["--check", "http", "--check-path", "/health"];
    let _sidecar = sidecar(to, address, &key, &http);
    next_heartbeat(&receiver, "ready", |received| received.heartbeat.state == SenderState::Ready);
    assert!(asked.load(Ordering::Relaxed) > 3, "more than three checks");
}

#[test]
fn sigterm_drains_then_stops_and_exits_with_0() {
    let ((_dir, key), (receiver, to)) = (key_file(), receiver());
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sidecar = sidecar(to, service.local_addr().unwrap(), &key, &["--drain", "300ms"]);
    next_heartbeat(&receiver, "ready", |received| received.heartbeat.state == SenderState::Ready);
    let signalled = Instant::now();
    sidecar.signal(Signal::TERM);
    next_heartbeat(&receiver, "draining", |received| {
        received.heartbeat.state == SenderState::Draining
    });
    let stopping = next_heartbeat(&receiver, "stopping", |received| {
        received.heartbeat.state == SenderState::Stopping
    });
    // Measured from the signal, because a busy machine can send `draining` late.
    let drained = stopping.at - signalled;
    assert!(drained >= Duration::from_millis(290), "{drained:?}");
    let (code, said) = sidecar.end();
    // A warning about an unsynchronised clock of this host is allowed.
    let said: Vec<&str> = said.lines().filter(|line| !line.contains("not synchronised")).collect();
    assert_eq!((code, said), (Some(0), Vec::new()));
}

#[test]
fn second_signal_exits_at_once_with_3() {
    let ((_dir, key), (receiver, to)) = (key_file(), receiver());
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut sidecar = sidecar(to, service.local_addr().unwrap(), &key, &["--drain", "1h"]);
    next_heartbeat(&receiver, "ready", |received| received.heartbeat.state == SenderState::Ready);
    sidecar.signal(Signal::INT);
    next_heartbeat(&receiver, "draining", |received| {
        received.heartbeat.state == SenderState::Draining
    });
    let signalled = Instant::now();
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.end().0, Some(3));
    assert!(signalled.elapsed() < Duration::from_secs(5));
}

#[test]
fn key_file_readable_by_others_is_rejected_with_1() {
    use std::os::unix::fs::PermissionsExt;
    let ((_dir, key), (_receiver, to)) = (key_file(), receiver());
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (code, said) = sidecar(to, "127.0.0.1:80".parse().unwrap(), &key, &[]).end();
    assert_eq!(code, Some(1));
    assert!(said.contains(key.to_str().unwrap()) && said.contains("0644"), "{said}");
}

#[test]
fn invalid_names_are_usage_errors() {
    let ((_dir, key), (_receiver, to)) = (key_file(), receiver());
    for wrong in [&["--name", "a/b"][..], &["--check-path", "/x"]] {
        let (code, said) = sidecar(to, "127.0.0.1:80".parse().unwrap(), &key, wrong).end();
        assert_eq!(code, Some(2), "{said}");
    }
}

#[test]
fn python_example_sends_heartbeats() {
    let ((_dir, key), (receiver, to)) = (key_file(), receiver());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/heartbeat/sender.py");
    let sent = Command::new("python3")
        .args([script, &to.to_string(), "web", "snake", "127.0.0.1:8080", "7"])
        .arg(&key)
        .arg("3")
        .status();
    let Ok(status) = sent else {
        assert!(std::env::var_os("CI").is_none(), "no python3");
        eprintln!("skipped: no python3");
        return;
    };
    assert!(status.success());
    let third =
        next_heartbeat(&receiver, "three", |received| received.heartbeat.sequence == 3).heartbeat;
    assert_eq!((&*third.name, third.state), ("snake", SenderState::Ready));
    assert_eq!((third.address, third.weight), ("127.0.0.1:8080".parse().unwrap(), 1));
    assert_eq!(receiver.counts().accepted(), 3);
}

#[test]
fn rust_example_reports_connections_and_drains_at_end_of_input() {
    let (receiver, to) = receiver();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (input, keep) = std::os::unix::net::UnixStream::pair().unwrap();
    let example = std::thread::spawn(move || service::run(listener, settings(to), input));
    next_heartbeat(&receiver, "ready", |received| received.heartbeat.state == SenderState::Ready);

    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
    next_heartbeat(&receiver, "one connection", |received| received.heartbeat.in_flight == 1);

    drop(keep);
    next_heartbeat(&receiver, "draining", |received| {
        received.heartbeat.state == SenderState::Draining
    });
    drop(client);
    next_heartbeat(&receiver, "stopping", |received| {
        received.heartbeat.state == SenderState::Stopping
    });
    example.join().unwrap().unwrap();
}

#[test]
fn python_example_stops_at_sigterm() {
    let ((_dir, key), (receiver, to)) = (key_file(), receiver());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/heartbeat/sender.py");
    let sender = Command::new("python3")
        .args([script, &to.to_string(), "web", "snake", "127.0.0.1:8080", "7"])
        .arg(&key)
        .spawn();
    let Ok(sender) = sender else {
        assert!(std::env::var_os("CI").is_none(), "no python3");
        eprintln!("skipped: no python3");
        return;
    };
    let mut sender = Sidecar(sender);
    next_heartbeat(&receiver, "ready", |received| received.heartbeat.state == SenderState::Ready);
    sender.signal(Signal::TERM);
    next_heartbeat(&receiver, "stopping", |received| {
        received.heartbeat.state == SenderState::Stopping
    });
    assert_eq!(sender.0.wait().unwrap().code(), Some(0));
}
