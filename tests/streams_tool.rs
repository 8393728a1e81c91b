//! `tidegate streams`: its report on a path that keeps every byte and on paths that do not.
//!
//! It runs as a separate process. These tests do not test the proxy.

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

use common::conf::{Conf, Pool};
use common::ports::free_port;
use common::proxy::{PROGRAM, TestProxy};
use common::{Engine, exclusive, on_every_engine, proc};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};

fn address() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()))
}

fn streams(to: SocketAddr, listen: &[SocketAddr], line: &str) -> Output {
    let listen = listen.iter().flat_map(|bind| ["--listen".to_owned(), bind.to_string()]);
    let mut command = Command::new(PROGRAM);
    command.args(["streams", "--json", "--to", &to.to_string()]).args(listen);
    command.args(line.split(' ')).output().unwrap()
}

/// Returns the counts in the last line.
fn whole(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).expect("a JSON object")
}

fn count(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no count {key} in {value}"))
}

fn streams_through_tidegate_are_complete(engine: Engine) {
    let backends = [address(), address()];
    let pool = Pool::new("web").backend("a", backends[0]).backend("b", backends[1]);
    // Some streams end with a deliberate reset by their backend.
    let proxy = TestProxy::start(Conf::simple(engine, pool.key("ejection = \"off\"")));
    let line = "--rate 200 --for 1s --seed 7 --every 200ms";
    let output = streams(proxy.addr("web"), &backends, line);
    let found = whole(&output);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // A busy host starts much fewer than the 200 streams of the rate.
    assert!(count(&found, "streams") >= 4 && count(&found, "bytes_out") > 0, "{found}");
    let lost = ["refused", "reset", "wrong", "silent"].map(|kind| count(&found, kind));
    assert_eq!(lost, [0; 4], "{found}");
    assert!(output.stdout.iter().filter(|byte| **byte == b'\n').count() >= 3, "{output:?}");
}

on_every_engine!(streams_through_tidegate_are_complete);

/// Relays everything, but flips one bit after 10,000 bytes to the client.
fn relay_with_flipped_bit(client: TcpStream, to: SocketAddr) {
    let backend = TcpStream::connect(to).unwrap();
    let (mut up_from, mut up_to) = (client.try_clone().unwrap(), backend.try_clone().unwrap());
    let up = std::thread::spawn(move || {
        let _ = std::io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to, mut passed) = (&backend, &client, 0usize);
    let mut buffer = [0; 1000];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if passed < 10_000 && passed + n >= 10_000 {
            buffer[n - 1] ^= 1;
        }
        passed += n;
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = up.join();
}

#[test]
fn one_changed_bit_is_reported_with_the_seed_of_the_stream() {
    let _share = exclusive::shared();
    let (backend, middle) = (address(), TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let to = middle.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in middle.incoming().flatten() {
            std::thread::spawn(move || relay_with_flipped_bit(client, backend));
        }
    });
    let output = streams(to, &[backend], "--rate 100 --for 500ms --seed 7");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(count(&whole(&output), "wrong") > 0, "{output:?}");
    assert!(complaint.contains("stream with seed "), "{complaint}");
}

#[test]
fn unreachable_target_exits_with_3() {
    let _share = exclusive::shared();
    let output = streams(address(), &[address()], "--rate 50 --for 200ms");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(count(&whole(&output), "refused") > 0, "{output:?}");
}

#[test]
fn interrupt_ends_the_run_with_its_counts() {
    let _share = exclusive::shared();
    let own = address().to_string();
    let mut child = Command::new(PROGRAM)
        .args(["streams", "--json", "--to", &own, "--listen", &own])
        .args(["--for", "60s", "--every", "20ms"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The first line shows that the process runs.
    let mut first = [0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    proc::signal(child.id(), Signal::INT);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &whole(&output)["whole"]), (Some(0), &Value::Bool(true)));
}
