//! Headers of clients: every vector in every split, peers, limits, records.

use super::{FROM, expecting, holds, line, record_of, refused, start};
use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, connect_from};
use crate::common::conf::Pool;
use crate::common::proxy::TestProxy;
use crate::common::vectors::{self, HeaderVector};
use crate::common::{Engine, eventually, ms, on_every_engine, proc, secs};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

on_every_engine!(
    every_vector_in_every_split_has_its_result,
    bytes_after_the_header_arrive_unchanged,
    peer_outside_of_from_is_reset_or_served_directly,
    limits_and_lists_apply_to_the_announced_client,
    client_that_leaves_before_its_header_is_complete_ends_the_session,
    explain_shows_client_and_peer,
);

/// Sent after each header.
const PAYLOAD: &[u8] = b"hello";

/// Connections open at the same time.
const AT_ONCE: usize = 400;

/// A connection that has sent the first `split` bytes of its vector.
struct Half<'v> {
    vector: &'v HeaderVector,
    split: usize,
    stream: TcpStream,
    /// The first bytes were enough for a reset, which the second write has reported.
    reset: bool,
}

fn every_vector_in_every_split_has_its_result(engine: Engine) {
    proc::raise_own_fd_limit();
    let (proxy, _backend) = start(engine, &format!("{FROM}, timeout = \"10s\""), "");
    let vectors = vectors::headers();
    let decided = vectors.iter().filter(|vector| vector.expected != "incomplete");
    let splits = decided.flat_map(|vector| {
        let len = vector.bytes.len();
        let step = if len > 80 { len / 20 } else { 1 };
        (0..=len).step_by(step).map(move |split| (vector, split))
    });
    let splits: Vec<_> = splits.collect();
    assert!(splits.len() > 1_000);
    let mut expected = HashMap::new();
    for chunk in splits.chunks(AT_ONCE) {
        let mut halves: Vec<Half<'_>> =
            chunk.iter().map(|(vector, split)| half(&proxy, vector, *split)).collect();
        // The first halves arrive before the second ones.
        std::thread::sleep(ms(20));
        for half in &mut halves {
            let rest = [&half.vector.bytes[half.split..], PAYLOAD].concat();
            half.reset = half.stream.write_all(&rest).is_err();
        }
        for half in &halves {
            check(half);
            *expected.entry(half.vector.expected).or_insert(0) += 1;
            expected.entry(half.vector.name).or_insert(0);
        }
        check_log(&proxy, &halves);
    }
    for reason in ["missing", "malformed", "crc"] {
        let count = refused(&proxy, &format!("proxy-header-{reason}"));
        assert_eq!(count, f64::from(expected[reason]), "{reason}");
    }
}

fn half<'v>(proxy: &TestProxy, vector: &'v HeaderVector, split: usize) -> Half<'v> {
    let mut stream = connect(proxy.addr("web"));
    stream.write_all(&vector.bytes[..split]).unwrap();
    Half { vector, split, stream, reset: false }
}

fn check(half: &Half<'_>) {
    let Half { vector, split, stream, reset } = half;
    let name = format!("{} split at {split}", vector.name);
    if ["missing", "malformed", "crc"].contains(&vector.expected) {
        assert!(*reset || client::read_to_end(stream) == End::Reset(0), "{name}");
        return;
    }
    let mut echoed = [0; PAYLOAD.len()];
    (&*stream).read_exact(&mut echoed).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(echoed, PAYLOAD, "{name}");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(stream), End::Fin(0), "{name}");
}

/// Checks the newest records against the sessions.
fn check_log(proxy: &TestProxy, halves: &[Half<'_>]) {
    let sockets: Vec<String> =
        halves.iter().map(|half| half.stream.local_addr().unwrap().to_string()).collect();
    let mut records = HashMap::new();
    eventually(secs(10), "each session has a record", || {
        records = HashMap::new();
        // The newest record of a port that was used again.
        for line in proxy.access_log() {
            let socket = if line["peer"].is_null() { &line["client"] } else { &line["peer"] };
            records.insert(socket.as_str().unwrap().to_owned(), line);
        }
        sockets.iter().all(|socket| records.contains_key(socket))
    });
    for (half, socket) in halves.iter().zip(&sockets) {
        let (record, expected) = (&records[socket], half.vector.expected);
        let name = format!("{} split at {}: {record}", half.vector.name, half.split);
        match expected.strip_prefix("client ") {
            Some(client) => assert_eq!(
                (&record["client"], &record["peer"]),
                (&client.into(), &socket.as_str().into()),
                "{name}"
            ),
            None => assert!(record["client"] == **socket && record["peer"].is_null(), "{name}"),
        }
        assert_eq!(record["probe"], expected == "local", "{name}");
        if ["missing", "malformed", "crc"].contains(&expected) {
            assert_eq!(record["cause"], format!("proxy-header-{expected}"), "{name}");
            assert_eq!(record["phase"], "preread", "{name}");
            assert!(record["backend"].is_null(), "{name}");
        } else {
            assert_eq!(
                (&record["cause"], &record["phase"]),
                (&"finished".into(), &"closed".into()),
                "{name}"
            );
            assert_eq!(
                (&record["bytes_in"], &record["bytes_out"]),
                (&5.into(), &5.into()),
                "{name}"
            );
        }
    }
}

fn bytes_after_the_header_arrive_unchanged(engine: Engine) {
    let (proxy, _backend) = start(engine, FROM, "");
    let bulk: Vec<u8> = (0..3_000_000_u32).map(|n| (n ^ n >> 11) as u8).collect();
    let header =
        vectors::headers().into_iter().find(|vector| vector.name == "v2-3000-tlv").unwrap();
    let stream = connect(proxy.addr("web"));
    std::thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&[&header.bytes[..], &bulk].concat()).unwrap());
        let mut echoed = vec![0; bulk.len()];
        (&stream).read_exact(&mut echoed).unwrap();
        assert!(echoed == bulk);
    });
}

fn peer_outside_of_from_is_reset_or_served_directly(engine: Engine) {
    let (mut proxy, backend) = start(engine, FROM, "");
    let address = proxy.addr("web");
    if let Ok(mut stream) = connect_from("127.0.0.2".parse().unwrap(), address) {
        let _ = stream.write_all(&line("192.0.2.1"));
        assert_eq!(client::read_to_end(&stream), End::Reset(0));
    }
    assert_eq!((refused(&proxy, "denied"), backend.accepted()), (1.0, 0));

    let pool = Pool::new("web").backend("a", backend.address());
    let mut conf = expecting(engine, &format!("{FROM}, others = \"direct\""), "", pool);
    conf.frontends[0].binds = proxy.conf().frontends[0].binds.clone();
    proxy.reload(conf);
    let stream = connect_from("127.0.0.2".parse().unwrap(), address).unwrap();
    // A header is payload there.
    let payload = line("192.0.2.1");
    assert_eq!(client::exchange(&stream, &payload).unwrap(), payload);
    drop(stream);
    let log = proxy.wait_access_log(2);
    assert!(log[1]["client"].as_str().unwrap().starts_with("127.0.0.2:"), "{}", log[1]);
    assert!(log[1]["peer"].is_null());
}

fn limits_and_lists_apply_to_the_announced_client(engine: Engine) {
    let keys = "sources = { deny = [\"192.0.2.66\"], connections_max = 1 }";
    let (proxy, _backend) = start(engine, FROM, keys);
    let address = proxy.addr("web");
    let open = |client: &str| {
        let mut stream = connect(address);
        stream.write_all(&line(client)).unwrap();
        stream
    };
    let first = open("192.0.2.1");
    assert!(holds(&first), "the first session of a client");
    assert!(!holds(&open("192.0.2.1")), "a second session of the same client");
    assert!(holds(&open("192.0.2.2")), "another client of the same peer");
    assert!(!holds(&open("192.0.2.66")), "a denied client");
    let causes = ["source-connections", "denied"].map(|reason| refused(&proxy, reason));
    assert_eq!(causes, [1.0, 1.0]);
    // Checks of the peer itself have no limits.
    let local = vectors::headers().into_iter().find(|vector| vector.name == "v2-local").unwrap();
    let checks: Vec<TcpStream> = (0..3).map(|_| connect(address)).collect();
    for mut stream in &checks {
        stream.write_all(&local.bytes).unwrap();
        assert!(holds(stream));
    }
}

fn client_that_leaves_before_its_header_is_complete_ends_the_session(engine: Engine) {
    let (proxy, backend) = start(engine, &format!("{FROM}, timeout = \"400ms\""), "");
    let address = proxy.addr("web");
    let silent = connect(address);
    let mut slow = connect(address);
    slow.write_all(&line("192.0.2.1")[..9]).unwrap();
    let fin = connect(address);
    fin.shutdown(std::net::Shutdown::Write).unwrap();
    let mut cut = connect(address);
    cut.write_all(&line("192.0.2.1")[..20]).unwrap();
    // The part is read before the FIN arrives.
    std::thread::sleep(ms(50));
    cut.shutdown(std::net::Shutdown::Write).unwrap();
    let reset = connect(address);
    let sockets: Vec<SocketAddr> =
        [&silent, &slow, &fin, &cut, &reset].map(|s| s.local_addr().unwrap()).into();
    client::reset(reset);
    for stream in [&silent, &slow, &fin, &cut] {
        assert_eq!(client::read_to_end(stream), End::Reset(0));
    }
    let log = proxy.wait_access_log(5);
    let causes = [
        "proxy-header-timeout",
        "proxy-header-timeout",
        "client-left",
        "proxy-header-malformed",
        "client-reset",
    ];
    for (socket, cause) in sockets.iter().zip(causes) {
        let record = record_of(&log, *socket);
        assert_eq!(
            (&record["cause"], &record["phase"]),
            (&cause.into(), &"preread".into()),
            "{record}"
        );
    }
    let timed_out = record_of(&log, sockets[0]);
    assert_eq!(
        (&timed_out["timer"], &timed_out["code"]),
        (&"proxy_protocol.timeout".into(), &"cR".into())
    );
    assert!(timed_out["duration_seconds"].as_f64().unwrap() < 5.0);
    assert_eq!(backend.accepted(), 0, "a backend was picked before the header");
    assert_eq!(refused(&proxy, "proxy-header-timeout"), 2.0);
}

fn explain_shows_client_and_peer(engine: Engine) {
    let echo = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").key("balance = \"source-hash\"").backend("a", echo.address());
    let proxy = TestProxy::start(expecting(engine, FROM, "", pool));
    let mut stream = connect(proxy.addr("web"));
    stream.write_all(&line("192.0.2.1")).unwrap();
    assert!(holds(&stream));
    let socket = stream.local_addr().unwrap();
    drop(stream);
    let session = proxy.wait_access_log(1)[0]["session"].to_string();
    let text = proxy.cli_ok(&["explain", "--session", &session]);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(text.contains("of 192.0.2.1:4000 on frontend web"), "{text}");
    assert!(text.contains(&format!("Its PROXY header came from {socket}.")), "{text}");
}
