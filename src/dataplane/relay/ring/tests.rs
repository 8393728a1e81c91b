//! What the two engines' common tests cannot time: events that come late.

use super::streams::{OpResult, RingMode, RingSession};
use super::*;
use crate::relay::engine::{ConnectResult, EngineFlow};
use crate::relay::tests::refusing_address;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use tidegate_net::stream::{self, ConnectTarget};

fn ring() -> Ring {
    Ring::new(RingSettings { buffers: 4, shown: 4 }).unwrap()
}

/// Everything that has happened, dealt with.
fn handle_all(flow: &mut RingSession, ring: &mut Ring) -> Vec<OpResult> {
    ring.enter().unwrap();
    let mut meanings = Vec::new();
    while let Some(event) = ring.next_event() {
        meanings.push(flow.handle(event, ring, &mut Pipes::default(), &mut TurnBytes::default()));
    }
    meanings
}

#[test]
fn a_refusal_that_comes_after_the_attempt_was_given_up_says_nothing_of_the_next() {
    let mut ring = ring();
    let (client, _peer) = UnixStream::pair().unwrap();
    let mut flow = RingSession::new(client.into());
    let (_bound, closed) = refusing_address();
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let (refused, _) = stream::connect(ConnectTarget::Tcp(closed)).unwrap();
    flow.attach(0, refused, true, &mut ring);
    ring.enter().unwrap();

    flow.detach(&mut ring);
    let (connecting, _) = stream::connect(ConnectTarget::Tcp(open.local_addr().unwrap())).unwrap();
    flow.attach(0, connecting, true, &mut ring);
    let meanings = handle_all(&mut flow, &mut ring);
    assert_eq!(meanings, [OpResult::Nothing, OpResult::Connected(ConnectResult::Connected)]);
    assert_eq!(flow.close.closed_first(), None);
    assert!(flow.is_settled());
}

#[test]
fn a_halted_flow_gives_its_sockets_back_once_everything_has_come_back() {
    let mut ring = ring();
    let (client, _client_peer) = UnixStream::pair().unwrap();
    let (backend, _backend_peer) = UnixStream::pair().unwrap();
    let mut flow = RingSession::new(client.into());
    flow.attach(0, backend.into(), false, &mut ring);
    for side in SessionSide::BOTH {
        flow.arm(0, side, &mut ring);
    }
    handle_all(&mut flow, &mut ring);
    flow.halt(&mut ring);
    assert!(!flow.is_settled());

    handle_all(&mut flow, &mut ring);
    assert!(flow.is_settled());
    assert!(flow.take_sockets().is_some());
}

/// What arrives at `socket` now.
fn arrived(socket: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let end = socket.read_to_end(&mut all).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
    all
}

#[test]
fn bulk_goes_through_a_pipe_and_small_messages_come_back_from_it() {
    let mut ring = Ring::new(RingSettings { buffers: 64, shown: 64 }).unwrap();
    let (client, mut client_peer) = UnixStream::pair().unwrap();
    let (backend, mut backend_peer) = UnixStream::pair().unwrap();
    backend_peer.set_nonblocking(true).unwrap();
    let mut flow = RingSession::new(client.into());
    flow.attach(0, backend.into(), false, &mut ring);
    flow.arm(0, SessionSide::Client, &mut ring);
    let mut sent = Vec::new();
    let mut got = Vec::new();
    let mut send = |len: usize, flow: &mut RingSession, ring: &mut Ring| {
        let bytes: Vec<u8> = (0..len).map(|at| (at % 253) as u8).collect();
        client_peer.write_all(&bytes).unwrap();
        sent.extend(bytes);
        for _ in 0..6 {
            handle_all(flow, ring);
            got.extend(arrived(&mut backend_peer));
        }
        assert!(got == sent, "{} of {}", got.len(), sent.len());
        flow.streams[0].mode
    };
    assert_eq!(send(5, &mut flow, &mut ring), RingMode::Ring);
    let mut mode = RingMode::Ring;
    for _ in 0..20 {
        mode = send(8 * BUFFER_LEN, &mut flow, &mut ring);
    }
    assert_eq!(mode, RingMode::Bulk);
    assert!(flow.streams[0].pipe.is_none(), "an idle stream holds no pipe");
    for _ in 0..20 {
        mode = send(5, &mut flow, &mut ring);
    }
    assert_eq!(mode, RingMode::Ring);
}
