//! The source against servers that break the protocol. No lie panics, blocks the source or
//! becomes a set of members.

use super::tests::{ask, registry};
use super::*;
use bytes::BufMut;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn frame(content: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.put_i32(content.len() as i32);
    frame.put_slice(content);
    frame
}

/// The answer to a connect: a session timeout of `millis`.
fn welcome(millis: i32) -> Vec<u8> {
    let mut content = Vec::new();
    content.put_i32(0);
    content.put_i32(millis);
    content.put_i64(7);
    content.put_i32(16);
    content.put_slice(&[1; 16]);
    frame(&content)
}

fn reply(xid: i32, error: i32, body: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    content.put_i32(xid);
    content.put_i64(9);
    content.put_i32(error);
    content.put_slice(body);
    frame(&content)
}

/// Starts a server that sends these bytes for the first frames of each client, one entry for
/// each frame, and then says nothing.
async fn liar(script: Vec<Vec<u8>>, close: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(stream, script.clone(), close));
        }
    });
    address
}

async fn serve(mut stream: TcpStream, script: Vec<Vec<u8>>, close: bool) {
    for answer in script {
        let Ok(length) = stream.read_i32().await else { return };
        let mut frame = vec![0; length as usize];
        if stream.read_exact(&mut frame).await.is_err() || stream.write_all(&answer).await.is_err()
        {
            return;
        }
    }
    if !close {
        std::future::pending::<()>().await;
    }
}

#[tokio::test]
async fn every_lie_is_a_failure() {
    let good = || vec![welcome(10_000), reply(1, 0, b"\0\0\0\x01/")];
    let then = |more: Vec<u8>| [good(), vec![more]].concat();
    let names = |names: &[u8]| {
        let stat = [0; 68];
        reply(2, 0, &[names, &stat].concat())
    };
    use SourceFailure::{Connect, Protocol, Timeout};
    let lies = [
        ("another protocol", vec![b"HTTP/1.1 400".to_vec()], true, Protocol, "length"),
        ("a huge frame", vec![b"\x7f\xff\xff\xff".to_vec()], false, Protocol, "64 MiB"),
        ("half a frame", vec![b"\0\0\0\x25\0".to_vec()], true, Connect, "closed"),
        ("silence", vec![Vec::new()], false, Timeout, "no connection in time"),
        ("silence later", vec![welcome(10_000)], false, Timeout, "no answer"),
        ("a short welcome", vec![frame(b"\0\0\0\0")], false, Protocol, "ends early"),
        ("no session ever", vec![welcome(0)], true, Protocol, "refuses a new session"),
        ("a wrong number", vec![welcome(9), reply(5, 0, b"")], false, Protocol, "the oldest"),
        ("a short header", then(frame(b"\0\0")), false, Protocol, "ends early"),
        ("2^31 - 1 names", then(names(b"\x7f\xff\xff\xff")), false, Protocol, "100,000 children"),
        ("hidden names", then(names(b"\0\x01\x86\xa0")), false, Protocol, "ends early"),
        ("negative names", then(names(b"\x80\0\0\0")), false, Protocol, "negative"),
        ("no text", then(names(b"\0\0\0\x01\0\0\0\x01\xff")), false, Protocol, "UTF-8"),
        ("a path", then(names(b"\0\0\0\x01\0\0\0\x03a/b")), false, Protocol, "slash"),
        ("unknown error", then(reply(2, -9999, b"")), false, Protocol, "code -9999"),
        ("lost quorum", then(reply(2, -4, b"")), false, Connect, "leader"),
        ("a child that hides", then(names(b"\0\0\0\x01\0\0\0\x01a")), false, Timeout, "no answer"),
    ];
    for (what, script, close, why, detail) in lies {
        let address = liar(script, close).await;
        let mut settings = registry(&[address]);
        settings.timeout = Duration::from_millis(300);
        let mut asked = ask(settings, "/web", ZookeeperFormat::Json);
        asked.until(what, |asked| !asked.failures.is_empty()).await;
        let (told, said) = &asked.failures[0];
        assert_eq!((*told, asked.sets), (why, 0), "{what}: {said}");
        assert!(said.contains(detail), "{what}: {said}");
    }
}

#[tokio::test]
async fn a_storm_of_events_costs_one_read_for_each_pause() {
    let empty = reply(2, 0, &[0; 72]);
    let mut event = Vec::new();
    event.put_i32(4);
    event.put_i32(3);
    event.put_slice(b"\0\0\0\x04/web");
    let storm = [empty, reply(-1, 0, &event).repeat(10_000)].concat();
    let good = vec![welcome(10_000), reply(1, 0, b"\0\0\0\x01/"), storm];
    let address = liar(good, false).await;
    let mut settings = registry(&[address]);
    settings.timeout = Duration::from_millis(500);
    let mut asked = ask(settings, "/web", ZookeeperFormat::Json);
    asked.until("a set", |asked| asked.sets == 1).await;
    // The server answers no second list.
    asked.until("a failure", |asked| asked.failures.len() == 1).await;
    assert_eq!(asked.failures[0].0, SourceFailure::Timeout);
}
