//! What the two engines' common tests cannot time: events that come late.

use super::streams::{Flow, Meaning};
use super::*;
use crate::net::stream::Peer;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;

fn ring() -> Ring {
    Ring::new(Settings { buffers: 4, shown: 4 }).unwrap()
}

/// Everything that has happened, dealt with.
fn handle_all(flow: &mut Flow, ring: &mut Ring) -> Vec<Meaning> {
    ring.enter().unwrap();
    let mut meanings = Vec::new();
    while let Some(event) = ring.next_event() {
        meanings.push(flow.handle(event, ring, &mut Pipes::default(), &mut Moved::default()));
    }
    meanings
}

#[test]
fn a_refusal_that_comes_after_the_attempt_was_given_up_says_nothing_of_the_next() {
    let mut ring = ring();
    let (client, _peer) = UnixStream::pair().unwrap();
    let mut flow = Flow::new(client.into());
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let (refused, _) = stream::connect(Peer::Tcp(closed)).unwrap();
    flow.attach(0, refused, true, &mut ring);
    ring.enter().unwrap();

    flow.detach(&mut ring);
    let (connecting, _) = stream::connect(Peer::Tcp(open.local_addr().unwrap())).unwrap();
    flow.attach(0, connecting, true, &mut ring);
    let meanings = handle_all(&mut flow, &mut ring);
    assert_eq!(meanings, [Meaning::Nothing, Meaning::Connected { failed: false }]);
    assert_eq!(flow.verdict.closed_first(), None);
    assert!(flow.is_settled());
}

#[test]
fn a_halted_flow_gives_its_sockets_back_once_everything_has_come_back() {
    let mut ring = ring();
    let (client, _client_peer) = UnixStream::pair().unwrap();
    let (backend, _backend_peer) = UnixStream::pair().unwrap();
    let mut flow = Flow::new(client.into());
    flow.attach(0, backend.into(), false, &mut ring);
    for side in Side::BOTH {
        flow.arm(0, side, &mut ring);
    }
    handle_all(&mut flow, &mut ring);
    flow.halt(&mut ring);
    assert!(!flow.is_settled());

    handle_all(&mut flow, &mut ring);
    assert!(flow.is_settled());
    assert!(flow.take_sockets().is_some());
}
