//! Tests of the ring on real socket pairs: bytes, missing buffers, cancellation, drop.

use super::*;
use crate::budget::MemoryBudget;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

fn copied(bytes: &[u8]) -> Chunk {
    Chunk::copied(bytes, std::sync::Arc::new(MemoryBudget::default()).take(bytes.len()))
}

fn pair() -> (Rc<OwnedFd>, UnixStream) {
    let (own, peer) = UnixStream::pair().unwrap();
    own.set_nonblocking(true).unwrap();
    (Rc::new(own.into()), peer)
}

fn small(buffers: u16) -> Ring {
    Ring::new(RingSettings { buffers, shown: buffers }).unwrap()
}

/// Enters the ring until an event arrives. Fails after 1,000,000 calls.
fn await_event(ring: &mut Ring) -> Completion {
    for _ in 0..1_000_000 {
        if let Some(event) = ring.next_event() {
            return event;
        }
        ring.enter().unwrap();
        std::thread::yield_now();
    }
    panic!("nothing happened");
}

#[test]
fn probe_moves_a_byte_through_a_ring() {
    Ring::probe().unwrap();
}

#[test]
fn dropped_chunk_frees_its_buffer() {
    let mut ring = small(4);
    let (own, mut peer) = pair();
    ring.receive(&own, 7);
    for _ in 0..20 {
        peer.write_all(b"hello").unwrap();
        let event = await_event(&mut ring);
        let CompletionKind::Data(chunk) = event.what else { panic!("{event:?}") };
        assert_eq!((event.tag, event.last, chunk.len()), (7, false, 5));
    }
    assert_eq!(ring.counts().starved, 0);
    drop(peer);
    let event = await_event(&mut ring);
    assert!(event.last && matches!(event.what, CompletionKind::End), "{event:?}");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn receive_without_free_buffer_ends_and_loses_no_bytes() {
    let mut ring = small(2);
    let (own, mut peer) = pair();
    peer.write_all(&vec![1; 3 * BUFFER_LEN]).unwrap();
    ring.receive(&own, 0);
    let mut held = Vec::new();
    loop {
        match await_event(&mut ring).what {
            CompletionKind::Data(chunk) => held.push(chunk),
            CompletionKind::Starved => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(held.len(), 2);
    held.clear();
    ring.enter().unwrap();
    ring.receive(&own, 0);
    let CompletionKind::Data(last) = await_event(&mut ring).what else { panic!("no data") };
    assert_eq!(last.len(), BUFFER_LEN);
}

#[test]
fn long_queue_is_sent_completely_to_a_slow_reader() {
    let mut ring = small(2);
    let (own, mut peer) = pair();
    let block: Vec<u8> = (0..BUFFER_LEN).map(|i| (i % 251) as u8).collect();
    let mut queue: VecDeque<Chunk> = (0..64).map(|_| copied(&block)).collect();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        all
    });
    let mut sent = 0;
    while !queue.is_empty() {
        ring.send_queue(&own, 0, &mut queue);
        loop {
            let event = await_event(&mut ring);
            let CompletionKind::Sent(bytes) = event.what else { panic!("{event:?}") };
            sent += bytes;
            if event.last {
                break;
            }
        }
    }
    drop(ring);
    drop(own);
    assert_eq!(sent, 64 * BUFFER_LEN);
    assert!(reader.join().unwrap() == block.repeat(64));
}

#[test]
fn send_reports_its_progress_on_request_and_continues() {
    let mut ring = small(2);
    let (own, mut peer) = pair();
    let mut queue: VecDeque<Chunk> = (0..32).map(|_| copied(&[3; BUFFER_LEN])).collect();
    let op = ring.send_queue(&own, 0, &mut queue);
    ring.enter().unwrap();
    assert!(ring.next_event().is_none(), "the socket took it all");
    ring.request_progress(op);
    let event = await_event(&mut ring);
    let CompletionKind::Sent(first) = event.what else { panic!("{event:?}") };
    assert!(!event.last && first > 0);

    ring.request_progress(op);
    ring.enter().unwrap();
    assert!(ring.next_event().is_none(), "no progress was made");

    let reader = std::thread::spawn(move || {
        let mut all = vec![0; 32 * BUFFER_LEN];
        peer.read_exact(&mut all).unwrap();
        (peer, all)
    });
    let mut rest = 0;
    loop {
        let event = await_event(&mut ring);
        let CompletionKind::Sent(bytes) = event.what else { panic!("{event:?}") };
        rest += bytes;
        if event.last {
            break;
        }
    }
    assert_eq!(first + rest, 32 * BUFFER_LEN);
    assert!(reader.join().unwrap().1.iter().all(|byte| *byte == 3));
}

#[test]
fn cancelled_operation_ends_and_releases_its_socket() {
    let mut ring = small(2);
    let (own, _peer) = pair();
    let receive = ring.receive(&own, 1);
    let poll = ring.poll(&own, 2, PollInterest::Readable);
    ring.enter().unwrap();
    ring.cancel(receive);
    ring.cancel(poll);
    for _ in 0..2 {
        let event = await_event(&mut ring);
        assert!(event.last);
        assert!(matches!(
            event.what,
            CompletionKind::Stopped | CompletionKind::Polled(Err(libc::ECANCELED))
        ));
    }
    ring.cancel(receive);
    ring.enter().unwrap();
    assert!(ring.next_event().is_none());
    assert_eq!(Rc::strong_count(&own), 1);
}

#[test]
fn more_operations_than_the_queues_hold_all_complete() {
    let mut ring = small(2);
    let (own, peer) = pair();
    drop(peer);
    let count = 3 * COMPLETIONS as usize;
    for tag in 0..count {
        ring.poll(&own, tag as u64, PollInterest::Readable);
    }
    let mut seen = vec![false; count];
    for _ in 0..count {
        let event = await_event(&mut ring);
        assert!(matches!(event.what, CompletionKind::Polled(Ok(true))));
        assert!(!std::mem::replace(&mut seen[event.tag as usize], true));
    }
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn dropped_ring_completes_its_operations_in_flight() {
    let mut ring = small(2);
    let (own, _peer) = pair();
    ring.receive(&own, 0);
    let mut queue: VecDeque<Chunk> = (0..32).map(|_| copied(&[3; BUFFER_LEN])).collect();
    ring.send_queue(&own, 0, &mut queue);
    ring.poll(&own, 0, PollInterest::Failure);
    ring.enter().unwrap();
    drop(ring);
    // A leaked operation would still hold a share of the socket.
    assert_eq!(Rc::strong_count(&own), 1);
}

#[test]
fn armed_waker_becomes_readable_when_bytes_arrive() {
    let mut ring = small(2);
    let (own, mut peer) = pair();
    ring.receive(&own, 0);
    ring.enter().unwrap();
    assert!(ring.arm_wakeup());
    let mut count = [0; 8];
    assert!(rustix::io::read(ring.wake(), &mut count).is_err());
    peer.write_all(b"x").unwrap();
    assert_eq!(rustix::io::read(ring.wake(), &mut count), Ok(8));
    ring.disarm_wakeup();
    assert!(matches!(await_event(&mut ring).what, CompletionKind::Data(_)));
}
