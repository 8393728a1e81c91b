//! Tests of ring events that arrive late. The common tests of both engines cannot time them.

use super::streams::{OpResult, RingMode, RingSession};
use super::*;
use crate::relay::engine::{ConnectResult, EngineSession};
use crate::relay::tests::refusing_address;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use tidegate_net::stream::{self, ConnectTarget};

fn ring() -> Ring {
    Ring::new(RingSettings { buffers: 4, shown: 4 }).unwrap()
}

/// Handles all pending events and returns the results.
fn handle_all(session: &mut RingSession, ring: &mut Ring) -> Vec<OpResult> {
    ring.enter().unwrap();
    let mut results = Vec::new();
    while let Some(event) = ring.next_event() {
        results.push(session.handle(event, ring, &mut Pipes::default(), &mut TurnBytes::default()));
    }
    results
}

#[test]
fn late_refusal_of_an_abandoned_attempt_does_not_affect_the_next_attempt() {
    let mut ring = ring();
    let (client, _peer) = UnixStream::pair().unwrap();
    let mut session = RingSession::new(client.into());
    let (_bound, closed) = refusing_address();
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let (refused, _) = stream::connect(ConnectTarget::Tcp(closed)).unwrap();
    session.attach(0, refused, true, &mut ring);
    ring.enter().unwrap();

    session.detach(&mut ring);
    let (connecting, _) = stream::connect(ConnectTarget::Tcp(open.local_addr().unwrap())).unwrap();
    session.attach(0, connecting, true, &mut ring);
    let results = handle_all(&mut session, &mut ring);
    assert_eq!(results, [OpResult::Nothing, OpResult::Connected(ConnectResult::Connected)]);
    assert_eq!(session.close.closed_first(), None);
    assert!(session.is_settled());
}

#[test]
fn halted_session_hands_out_its_sockets_once_all_operations_are_complete() {
    let mut ring = ring();
    let (client, _client_peer) = UnixStream::pair().unwrap();
    let (backend, _backend_peer) = UnixStream::pair().unwrap();
    let mut session = RingSession::new(client.into());
    session.attach(0, backend.into(), false, &mut ring);
    for side in SessionSide::BOTH {
        session.arm(0, side, &mut ring);
    }
    handle_all(&mut session, &mut ring);
    session.halt(&mut ring);
    assert!(!session.is_settled());

    handle_all(&mut session, &mut ring);
    assert!(session.is_settled());
    assert!(session.take_sockets().is_some());
}

/// Reads all bytes that have arrived at `socket`.
fn arrived(socket: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let end = socket.read_to_end(&mut all).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
    all
}

#[test]
fn bulk_stream_uses_a_pipe_and_returns_to_receives_for_small_messages() {
    let mut ring = Ring::new(RingSettings { buffers: 64, shown: 64 }).unwrap();
    let (client, mut client_peer) = UnixStream::pair().unwrap();
    let (backend, mut backend_peer) = UnixStream::pair().unwrap();
    backend_peer.set_nonblocking(true).unwrap();
    let mut session = RingSession::new(client.into());
    session.attach(0, backend.into(), false, &mut ring);
    session.arm(0, SessionSide::Client, &mut ring);
    let mut sent = Vec::new();
    let mut got = Vec::new();
    let mut send = |len: usize, session: &mut RingSession, ring: &mut Ring| {
        let bytes: Vec<u8> = (0..len).map(|at| (at % 253) as u8).collect();
        client_peer.write_all(&bytes).unwrap();
        sent.extend(bytes);
        for _ in 0..6 {
            handle_all(session, ring);
            got.extend(arrived(&mut backend_peer));
        }
        assert!(got == sent, "{} of {}", got.len(), sent.len());
        session.streams[0].mode
    };
    assert_eq!(send(5, &mut session, &mut ring), RingMode::Ring);
    let mut mode = RingMode::Ring;
    for _ in 0..20 {
        mode = send(8 * BUFFER_LEN, &mut session, &mut ring);
    }
    assert_eq!(mode, RingMode::Bulk);
    assert!(session.streams[0].pipe.is_none(), "an idle stream holds no pipe");
    for _ in 0..20 {
        mode = send(5, &mut session, &mut ring);
    }
    assert_eq!(mode, RingMode::Ring);
}
