//! Tests of the harness itself, because a ledger that cannot fail proves nothing.
//!
//! Streams go directly to a backend, and the ledger must be clean. Streams also go through
//! small relays that each break one promise, and the ledger must report it. Tidegate does
//! not run here.

use crate::common::backend::{self, ScriptedBackend, Unresponsive};
use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::servers::{self, Nginx, Wrk};
use crate::common::{client, exclusive, have, http, proxy};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

const SMALL: StreamSizes = StreamSizes { most: 64 * 1024, large_one_in: 50 };

#[test]
fn ledger_is_clean_without_a_relay() {
    let _share = exclusive::shared();
    let ledger = Ledger::new(SMALL);
    let backend = ScriptedBackend::start(ledger.script());
    ledger.run(&[backend.socket_address()], 0..500, 16);
    ledger.settle();
    ledger.assert_clean();
    assert_eq!(ledger.streams(), 500);
}

#[test]
fn ledger_is_clean_through_a_correct_relay() {
    let _share = exclusive::shared();
    assert_eq!(faults_through(|chunk| chunk), Vec::<String>::new());
}

#[test]
fn ledger_reports_a_flipped_bit() {
    let _share = exclusive::shared();
    let faults = faults_through(|mut chunk| {
        if chunk.len() > 4000 {
            chunk[4000] ^= 0x10;
        }
        chunk
    });
    assert!(faults.iter().any(|fault| fault.contains("wrong byte at")), "{faults:?}");
    assert!(faults.iter().all(|fault| fault.contains("seed ")), "{faults:?}");
}

#[test]
fn ledger_reports_a_lost_tail() {
    let _share = exclusive::shared();
    let faults = faults_through(|mut chunk| {
        if chunk.len() > 4000 {
            chunk.pop();
        }
        chunk
    });
    assert!(!faults.is_empty());
}

#[test]
fn scripted_backends_follow_their_scripts() {
    let _share = exclusive::shared();
    let echo = ScriptedBackend::start(backend::echo());
    let stream = client::connect(echo.socket_address());
    assert_eq!(client::exchange(&stream, b"hello").unwrap(), b"hello");
    let name = ScriptedBackend::start(backend::name("a"));
    assert_eq!(client::ask(name.socket_address()).unwrap(), "a");
    let resets = ScriptedBackend::start(backend::reset_after(3));
    let stream = client::connect(resets.socket_address());
    (&stream).write_all(b"abc").unwrap();
    assert_eq!(client::read_to_end(&stream), client::End::Reset(0));
    let halves = ScriptedBackend::start(backend::half_close_after(3));
    let mut stream = client::connect(halves.socket_address());
    stream.write_all(b"abc").unwrap();
    assert_eq!(client::read_to_end(&stream), client::End::Fin(0));
    stream.write_all(b"more").unwrap();
    let refusing = backend::Refusing::new();
    let error = client::try_connect(refusing.address).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    // Its constructor asserts that connects get no answer.
    let _unresponsive = Unresponsive::new();
}

#[test]
fn real_servers_start_answer_and_end() {
    let _share = exclusive::shared();
    if !have(&["nginx", "wrk", "redis-server", "redis-benchmark", "iperf3", "python3"]) {
        return;
    }
    let mut nginx = Nginx::start("a");
    assert_eq!(http::over_tcp(nginx.address, "/").unwrap().body, "a");
    let report = Wrk::start(nginx.address, 4, 1).report();
    assert!(report.requests > 100, "{report:?}");
    assert_eq!(report.errors(), 0, "{report:?}");
    nginx.kill();
    assert!(TcpStream::connect(nginx.address).is_err(), "the worker has ended too");
    let redis = servers::Redis::start();
    servers::redis_benchmark(redis.address, &["-n", "1000", "-c", "5", "-t", "get", "-q"]);
    let iperf = servers::Iperf3::start();
    assert!(servers::iperf3_client(iperf.address, &["-n", "16M"]) > 1e6);
    let idle = servers::IdleBackend::start();
    assert_eq!(client::exchange(&client::connect(idle.address), b"x").unwrap(), b"x");
}

#[test]
fn wrk_reports_are_parsed_with_their_errors() {
    let text = "Running 5s test @ http://127.0.0.1:1/\n  3310 requests in 5.00s, 1.2MB read\n  \
                Socket errors: connect 1, read 20, write 3, timeout 4\n  \
                Non-2xx or 3xx responses: 7\nRequests/sec: 1\n";
    let report = servers::parse_wrk(text);
    assert_eq!((report.requests, report.read_errors, report.errors()), (3310, 20, 35));
}

#[test]
fn metric_samples_are_summed_by_label() {
    let text = "# TYPE a_total counter\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"1\",y=\"3\"} 4\n\
                a_total_more{x=\"1\"} 100\na_total{x=\"2\",y=\"2\"} 5\nb 7\n";
    assert_eq!(proxy::sum_samples(text, "a_total", &[("x", "1")]), 7.0);
    assert_eq!(proxy::sum_samples(text, "a_total", &[]), 12.0);
    assert_eq!(proxy::sum_samples(text, "b", &[]), 7.0);
}

/// Runs 60 streams through a relay that passes each chunk through `alter`. Returns the faults.
fn faults_through(alter: fn(Vec<u8>) -> Vec<u8>) -> Vec<String> {
    let ledger = Ledger::impatient(SMALL);
    let backend = ScriptedBackend::start(ledger.script());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let target = backend.socket_address();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            relay(client, target, alter);
        }
    });
    ledger.run(&[address], 0..60, 8);
    ledger.faults()
}

/// A minimal relay: two threads, and a FIN for a FIN.
fn relay(client: TcpStream, target: SocketAddr, alter: fn(Vec<u8>) -> Vec<u8>) {
    let upstream = TcpStream::connect(target).unwrap();
    for (mut from, mut to) in
        [(client.try_clone().unwrap(), upstream.try_clone().unwrap()), (upstream, client)]
    {
        std::thread::spawn(move || {
            let mut buffer = vec![0; 16 * 1024];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if to.write_all(&alter(buffer[..n].to_vec())).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}
