//! The ring against real socket pairs: bytes, shortage, cancellation, its end.

use super::*;
use crate::budget::MemoryBudget;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

fn copied(bytes: &[u8]) -> Chunk {
    Chunk::copied(bytes, std::sync::Arc::new(MemoryBudget::default()).take(bytes.len()))
}

fn pair() -> (Rc<OwnedFd>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Rc::new(ours.into()), theirs)
}

fn small(buffers: u16) -> Ring {
    Ring::new(RingSettings { buffers, shown: buffers }).unwrap()
}

/// Enters until an event comes; the test would hang where none does.
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
fn a_byte_comes_through() {
    Ring::probe().unwrap();
}

#[test]
fn received_buffers_come_back_when_their_chunks_are_dropped() {
    let mut ring = small(4);
    let (ours, mut theirs) = pair();
    ring.receive(&ours, 7);
    for _ in 0..20 {
        theirs.write_all(b"hello").unwrap();
        let event = await_event(&mut ring);
        let CompletionKind::Data(chunk) = event.what else { panic!("{event:?}") };
        assert_eq!((event.tag, event.last, chunk.len()), (7, false, 5));
    }
    assert_eq!(ring.counts().starved, 0);
    drop(theirs);
    let event = await_event(&mut ring);
    assert!(event.last && matches!(event.what, CompletionKind::End), "{event:?}");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn a_receive_without_buffers_starves_and_loses_nothing() {
    let mut ring = small(2);
    let (ours, mut theirs) = pair();
    theirs.write_all(&vec![1; 3 * BUFFER_LEN]).unwrap();
    ring.receive(&ours, 0);
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
    ring.receive(&ours, 0);
    let CompletionKind::Data(last) = await_event(&mut ring).what else { panic!("no data") };
    assert_eq!(last.len(), BUFFER_LEN);
}

#[test]
fn a_long_queue_is_sent_whole_to_a_slow_reader() {
    let mut ring = small(2);
    let (ours, mut theirs) = pair();
    let block: Vec<u8> = (0..BUFFER_LEN).map(|i| (i % 251) as u8).collect();
    let mut queue: VecDeque<Chunk> = (0..64).map(|_| copied(&block)).collect();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).unwrap();
        all
    });
    let mut sent = 0;
    while !queue.is_empty() {
        ring.send_queue(&ours, 0, &mut queue);
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
    drop(ours);
    assert_eq!(sent, 64 * BUFFER_LEN);
    assert!(reader.join().unwrap() == block.repeat(64));
}

#[test]
fn a_nudged_send_says_how_far_it_is_and_goes_on() {
    let mut ring = small(2);
    let (ours, mut theirs) = pair();
    let mut queue: VecDeque<Chunk> = (0..32).map(|_| copied(&[3; BUFFER_LEN])).collect();
    let op = ring.send_queue(&ours, 0, &mut queue);
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
        theirs.read_exact(&mut all).unwrap();
        (theirs, all)
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
fn a_cancelled_operation_ends_and_lets_go_of_its_socket() {
    let mut ring = small(2);
    let (ours, _theirs) = pair();
    let receive = ring.receive(&ours, 1);
    let poll = ring.poll(&ours, 2, PollInterest::Readable);
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
    assert_eq!(Rc::strong_count(&ours), 1);
}

#[test]
fn more_operations_than_the_queues_hold_are_all_done() {
    let mut ring = small(2);
    let (ours, theirs) = pair();
    drop(theirs);
    let count = 3 * COMPLETIONS as usize;
    for tag in 0..count {
        ring.poll(&ours, tag as u64, PollInterest::Readable);
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
fn a_ring_dropped_with_operations_in_flight_reaps_them() {
    let mut ring = small(2);
    let (ours, _theirs) = pair();
    ring.receive(&ours, 0);
    let mut queue: VecDeque<Chunk> = (0..32).map(|_| copied(&[3; BUFFER_LEN])).collect();
    ring.send_queue(&ours, 0, &mut queue);
    ring.poll(&ours, 0, PollInterest::Failure);
    ring.enter().unwrap();
    drop(ring);
    // A leaked operation would still hold its share.
    assert_eq!(Rc::strong_count(&ours), 1);
}

#[test]
fn a_dozing_ring_rings_its_bell() {
    let mut ring = small(2);
    let (ours, mut theirs) = pair();
    ring.receive(&ours, 0);
    ring.enter().unwrap();
    assert!(ring.arm_wakeup());
    let mut bell = [0; 8];
    assert!(rustix::io::read(ring.wake(), &mut bell).is_err());
    theirs.write_all(b"x").unwrap();
    assert_eq!(rustix::io::read(ring.wake(), &mut bell), Ok(8));
    ring.disarm_wakeup();
    assert!(matches!(await_event(&mut ring).what, CompletionKind::Data(_)));
}
