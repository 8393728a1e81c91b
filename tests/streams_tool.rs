//! `tidegate streams`: what it says of a way that keeps every byte, and of ways
//! that do not.
//!
//! It runs as the process users run. Nothing here is a balancer's own test.

// Tests wait and read the clock; the program under test may not.
#![allow(clippy::disallowed_methods)]
// A failed unwrap in a test is a failed test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite, which nobody else links.
#![allow(unreachable_pub)]

// The integration suite uses the rest.
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
    let listen = listen.iter().flat_map(|one| ["--listen".to_owned(), one.to_string()]);
    let mut command = Command::new(PROGRAM);
    command.args(["streams", "--json", "--to", &to.to_string()]).args(listen);
    command.args(line.split(' ')).output().unwrap()
}

/// The last line's counts.
fn whole(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).expect("a line of JSON")
}

fn count(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no count {key} in {value}"))
}

fn streams_through_the_balancer_are_whole(engine: Engine) {
    let backends = [address(), address()];
    let pool = Pool::new("web").backend("a", backends[0]).backend("b", backends[1]);
    // Some streams end in a reset by their backend, on purpose.
    let proxy = TestProxy::start(Conf::simple(engine, pool.key("ejection = \"off\"")));
    let line = "--rate 200 --for 1s --seed 7 --every 200ms";
    let output = streams(proxy.addr("web"), &backends, line);
    let found = whole(&output);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(count(&found, "streams") >= 100 && count(&found, "bytes_out") > 0, "{found}");
    let lost = ["refused", "reset", "wrong", "silent"].map(|kind| count(&found, kind));
    assert_eq!(lost, [0; 4], "{found}");
    assert!(output.stdout.iter().filter(|byte| **byte == b'\n').count() >= 3, "{output:?}");
}

on_every_engine!(streams_through_the_balancer_are_whole);

/// Passes everything on, but for one bit in the tenth kilobyte to the client.
fn spoil(client: TcpStream, to: SocketAddr) {
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
fn one_changed_bit_is_a_failure_that_names_the_stream() {
    let _share = exclusive::shared();
    let (backend, middle) = (address(), TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let to = middle.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in middle.incoming().flatten() {
            std::thread::spawn(move || spoil(client, backend));
        }
    });
    let output = streams(to, &[backend], "--rate 100 --for 500ms --seed 7");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(count(&whole(&output), "wrong") > 0, "{output:?}");
    assert!(complaint.contains("seed: "), "{complaint}");
}

#[test]
fn a_way_that_leads_nowhere_is_a_failure() {
    let _share = exclusive::shared();
    let output = streams(address(), &[address()], "--rate 50 --for 200ms");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(count(&whole(&output), "refused") > 0, "{output:?}");
}

#[test]
fn an_interrupt_ends_it_with_its_counts() {
    let _share = exclusive::shared();
    let own = address().to_string();
    let mut child = Command::new(PROGRAM)
        .args(["streams", "--json", "--to", &own, "--listen", &own])
        .args(["--for", "60s", "--every", "20ms"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its first line says that it is at work.
    let mut first = [0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    proc::signal(child.id(), Signal::INT);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &whole(&output)["whole"]), (Some(0), &Value::Bool(true)));
}
