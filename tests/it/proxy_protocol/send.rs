//! Headers to backends: both versions, retries, TLVs, Unix sockets, probes.

use super::{FROM, expecting, holds, record_of};
use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, on_every_engine, secs};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

on_every_engine!(
    backend_gets_the_header_before_the_first_byte,
    each_attempt_sends_the_header_again,
    selected_tlvs_are_sent_on,
    backend_on_a_unix_socket_gets_the_header,
    probes_send_a_header_without_a_client,
);

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// What each connection of a backend received first.
type Heads = Arc<Mutex<Vec<Vec<u8>>>>;

/// A backend that keeps the header of each connection and echoes the rest.
fn keeping(heads: &Heads) -> backend::Script {
    let heads = Arc::clone(heads);
    backend::script(move |conn| {
        let mut head = Vec::new();
        while !is_complete(&head) {
            let mut byte = [0];
            match conn.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => break,
            }
        }
        heads.lock().unwrap().push(head);
        backend::echo()(conn);
    })
}

fn is_complete(head: &[u8]) -> bool {
    match head.strip_prefix(SIGNATURE) {
        Some([_, _, high, low, rest @ ..]) => {
            rest.len() >= usize::from(u16::from_be_bytes([*high, *low]))
        }
        Some(_) => false,
        None => head.ends_with(b"\r\n") && head.starts_with(b"PROXY"),
    }
}

/// Version 2 with IPv4 addresses.
fn binary(client: SocketAddr, destination: SocketAddr, tlvs: &[u8]) -> Vec<u8> {
    let (SocketAddr::V4(client), SocketAddr::V4(destination)) = (client, destination) else {
        panic!("IPv4 addresses")
    };
    let len = u16::try_from(12 + tlvs.len()).unwrap().to_be_bytes();
    let addresses = [client.ip().octets(), destination.ip().octets()].concat();
    let ports = [client.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    [SIGNATURE, &[0x21, 0x11], &len, &addresses, &ports, tlvs].concat()
}

fn backend_gets_the_header_before_the_first_byte(engine: Engine) {
    let heads = Heads::default();
    let keeper = ScriptedBackend::start(keeping(&heads));
    let mut conf = Conf::new(engine);
    for version in ["v1", "v2"] {
        let pool = Pool::new(version).key(&format!("proxy_protocol = \"{version}\""));
        let pool = pool.backend("a", keeper.address());
        conf = conf.frontend(version, version, "").pool(pool);
    }
    let proxy = TestProxy::start(conf);
    for version in ["v1", "v2"] {
        let address = proxy.addr(version);
        let stream = connect(address);
        // The client speaks first on one connection, and waits for the header on the other.
        assert_eq!(client::exchange(&stream, b"hello").unwrap(), b"hello");
        let from = stream.local_addr().unwrap();
        let expected = match version {
            "v1" => {
                format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n", from.port(), address.port())
                    .into_bytes()
            }
            _ => binary(from, address, &[]),
        };
        assert_eq!(heads.lock().unwrap().pop().unwrap(), expected, "{version}");
        drop(stream);
        let silent = connect(address);
        eventually(secs(5), "the header arrives without a byte of the client", || {
            heads.lock().unwrap().pop().is_some()
        });
        assert!(holds(&silent));
    }
    let log = proxy.wait_access_log(2);
    let first = log.iter().find(|line| line["bytes_in"] == 5).expect("the first session");
    assert_eq!((&first["bytes_out"], &first["bytes_undelivered"]), (&5.into(), &0.into()));
}

fn each_attempt_sends_the_header_again(engine: Engine) {
    let heads = Heads::default();
    let keeper = ScriptedBackend::start(keeping(&heads));
    let refusing = backend::Refusing::new();
    // The header reaches it, and no byte of the client.
    let resetting = ScriptedBackend::start(backend::reset_after(10));
    let mut conf =
        Conf::new(engine).frontend("refused", "refused", "").frontend("reset", "reset", "");
    for (name, bad) in
        [("refused", refusing.address.to_string()), ("reset", resetting.address().to_owned())]
    {
        let pool = Pool::new(name).key("proxy_protocol = \"v1\"").ejection("failures = 100");
        let bad = pool.backend("bad", bad);
        conf = conf.pool(bad.backend("good", keeper.address()));
    }
    let proxy = TestProxy::start(conf);
    for name in ["refused", "reset"] {
        for _ in 0..4 {
            let stream = connect(proxy.addr(name));
            let port = stream.local_addr().unwrap().port();
            eventually(secs(5), "the header arrives at the good backend", || {
                let heads = heads.lock().unwrap();
                heads.last().is_some_and(|head| {
                    String::from_utf8_lossy(head).contains(&format!(" {port} "))
                })
            });
            assert!(holds(&stream), "{name}");
        }
    }
    assert_eq!(heads.lock().unwrap().len(), 8);
    assert!(resetting.accepted() > 0);
    let log = proxy.wait_access_log(8);
    let retried = log.iter().filter(|line| line["attempts"] == 2).count();
    assert!(retried >= 3, "{log:?}");
    assert!(log.iter().all(|line| line["bytes_in"] == 1), "{log:?}");
    let failures: Vec<&str> = log
        .iter()
        .flat_map(|line| line["tries"].as_array().unwrap())
        .map(|tried| tried["failure"].as_str().unwrap())
        .collect();
    assert!(failures.contains(&"refused") && failures.contains(&"early-reset"), "{failures:?}");
}

fn selected_tlvs_are_sent_on(engine: Engine) {
    let heads = Heads::default();
    let keeper = ScriptedBackend::start(keeping(&heads));
    let pool = Pool::new("web")
        .key("proxy_protocol = { version = \"v2\", send = [\"authority\", \"unique-id\"], pass = [\"0xE0-0xE3\"] }")
        .backend("a", keeper.address());
    let proxy = TestProxy::start(expecting(engine, FROM, "", pool));
    let client = "192.0.2.10:51234".parse().unwrap();
    let destination = "198.51.100.20:443".parse().unwrap();
    let authority = b"\x02\x00\x03abc";
    let unique = b"\x05\x00\x02id";
    let custom = b"\xe1\x00\x01x";
    let left_out = b"\x01\x00\x02h2\xe4\x00\x01y";
    let received = [&authority[..], left_out, unique, custom].concat();
    let sent = |tlvs: &[u8]| {
        let mut stream = connect(proxy.addr("web"));
        stream.write_all(&binary(client, destination, tlvs)).unwrap();
        assert!(holds(&stream));
        (heads.lock().unwrap().pop().unwrap(), stream.local_addr().unwrap())
    };
    let expected = [&authority[..], unique, custom].concat();
    assert_eq!(sent(&received).0, binary(client, destination, &expected));
    // Without a received identifier it is the number of the session.
    let (head, peer) = sent(authority);
    let session = record_of(&proxy.wait_access_log(2), peer)["session"].to_string();
    let number = [&[5, 0, u8::try_from(session.len()).unwrap()], session.as_bytes()].concat();
    assert_eq!(head, binary(client, destination, &[&authority[..], &number].concat()));
}

fn backend_on_a_unix_socket_gets_the_header(engine: Engine) {
    let heads = Heads::default();
    let dir = tempfile::tempdir().unwrap();
    let keeper = ScriptedBackend::start_unix(&dir.path().join("backend.sock"), keeping(&heads));
    let pool = Pool::new("web").key("proxy_protocol = \"v1\"").backend("a", keeper.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let stream = connect(proxy.addr("web"));
    assert!(holds(&stream));
    let head = String::from_utf8(heads.lock().unwrap().pop().unwrap()).unwrap();
    assert!(head.starts_with("PROXY TCP4 127.0.0.1 127.0.0.1 "), "{head}");
}

fn probes_send_a_header_without_a_client(engine: Engine) {
    let expected: [(&str, &[u8]); 2] =
        [("v1", b"PROXY UNKNOWN\r\n"), ("v2", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")];
    for (version, expected) in expected {
        let heads = Heads::default();
        let keeper = ScriptedBackend::start(keeping(&heads));
        let pool = Pool::new("web")
            .key(&format!("proxy_protocol = \"{version}\""))
            .probe("kind = \"send-expect\"\nsend = \"+PING\"\nexpect = \"+PING\"\ninterval = \"100ms\"")
            .backend("a", keeper.address());
        let proxy = TestProxy::start(Conf::simple(engine, pool));
        proxy.wait_backend("web", "a", "observation", "up");
        assert_eq!(heads.lock().unwrap()[0], expected, "{version}");
    }
}
