//! Tests of the pump with scripted sockets, in any order of events.

use super::*;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;
use tidegate_core::outcome::SessionSide::{Backend, Client};
use tidegate_core::outcome::{Cause, Phase, SessionEnd};
use tidegate_net::budget::MemoryBudget;

/// Two sockets whose peers the test controls.
#[derive(Default)]
struct Script {
    sockets: [Fake; 2],
    pipes: [Option<VecDeque<u8>>; 2],
    pipes_left: usize,
    /// Fills report a pipe that is full of little data.
    crams: bool,
    /// Sides with a bulk stream, in the order of `expect_bulk` calls.
    bulk_from: RefCell<Vec<SessionSide>>,
    budget: Arc<MemoryBudget>,
}

#[derive(Default)]
struct Fake {
    arrived: RefCell<VecDeque<u8>>,
    /// `Some(0)` is a FIN, any other value the errno of a failure.
    end: Cell<Option<i32>>,
    sent: RefCell<Vec<u8>>,
    room: Cell<usize>,
    fin_sent: Cell<bool>,
    /// Calls that fail with ENOMEM before one succeeds.
    short: Cell<u32>,
}

impl Fake {
    fn check_memory(&self) -> io::Result<()> {
        match self.short.get().checked_sub(1) {
            None => Ok(()),
            Some(left) => {
                self.short.set(left);
                Err(io::Error::from_raw_os_error(libc::ENOMEM))
            }
        }
    }
}

impl PumpIo for Script {
    fn receive(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize> {
        let fake = &self.sockets[side as usize];
        fake.check_memory()?;
        let mut arrived = fake.arrived.borrow_mut();
        let count = arrived.len().min(buffer.len());
        if count > 0 {
            arrived.drain(..count).zip(buffer).for_each(|(byte, slot)| *slot = byte);
            return Ok(count);
        }
        match fake.end.get() {
            None => Err(io::ErrorKind::WouldBlock.into()),
            Some(0) => Ok(0),
            // The kernel reports an error once; later reads return 0.
            Some(errno) => {
                fake.end.set(Some(0));
                Err(io::Error::from_raw_os_error(errno))
            }
        }
    }

    fn peek(&self, side: SessionSide, buffer: &mut [u8]) -> io::Result<usize> {
        let fake = &self.sockets[side as usize];
        let arrived = fake.arrived.borrow().clone();
        if arrived.is_empty() {
            return self.receive(side, buffer);
        }
        arrived.iter().zip(&mut *buffer).for_each(|(byte, slot)| *slot = *byte);
        Ok(arrived.len().min(buffer.len()))
    }

    fn may_keep(&self, bytes: usize) -> bool {
        self.budget.has(bytes)
    }

    fn keep(&self, bytes: usize) -> BudgetShare {
        self.budget.take(bytes)
    }

    fn send(&self, side: SessionSide, bytes: &[u8]) -> io::Result<usize> {
        let fake = &self.sockets[side as usize];
        assert!(!fake.fin_sent.get(), "bytes sent after the FIN");
        fake.check_memory()?;
        if fake.end.get().is_some_and(|errno| errno != 0) {
            return Err(io::Error::from_raw_os_error(libc::EPIPE));
        }
        let count = bytes.len().min(fake.room.get());
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        fake.room.set(fake.room.get() - count);
        fake.sent.borrow_mut().extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn shutdown_write(&self, side: SessionSide) -> io::Result<()> {
        let fake = &self.sockets[side as usize];
        assert!(!fake.fin_sent.replace(true), "a second FIN");
        Ok(())
    }

    fn expect_bulk(&self, from: SessionSide) {
        self.bulk_from.borrow_mut().push(from);
    }

    fn open_pipe(&mut self, from: SessionSide) -> bool {
        let pipe = &mut self.pipes[from as usize];
        if pipe.is_none() && self.pipes_left > 0 {
            self.pipes_left -= 1;
            *pipe = Some(VecDeque::new());
        }
        pipe.is_some()
    }

    fn close_pipe(&mut self, from: SessionSide) {
        self.pipes_left += usize::from(self.pipes[from as usize].take().is_some());
    }

    fn piped(&self, from: SessionSide) -> usize {
        self.pipes[from as usize].as_ref().map_or(0, VecDeque::len)
    }

    fn fill(&mut self, from: SessionSide) -> io::Result<FillResult> {
        assert_eq!(self.piped(from), 0, "only an empty pipe is filled");
        let mut bytes = vec![0; 300_000];
        let count = self.receive(from, &mut bytes)?;
        self.pipes[from as usize].as_mut().unwrap().extend(&bytes[..count]);
        Ok(FillResult { bytes: count, crammed: self.crams })
    }

    fn drain(&mut self, from: SessionSide) -> io::Result<usize> {
        let bytes: Vec<u8> = self.pipes[from as usize].iter().flatten().copied().collect();
        let count = self.send(from.other(), &bytes)?;
        self.pipes[from as usize].as_mut().unwrap().drain(..count);
        Ok(count)
    }
}

struct Bench {
    script: Script,
    pump: Pump,
    buffer: Vec<u8>,
    ending: Option<SessionEnd>,
    received: [u64; 2],
}

impl Bench {
    fn new(room: usize) -> Bench {
        let bench = Bench {
            script: Script::default(),
            pump: Pump::new(),
            buffer: vec![0; READ_BULK],
            ending: None,
            received: [0; 2],
        };
        bench.script.sockets.iter().for_each(|fake| fake.room.set(room));
        bench
    }

    /// Reports an edge on `side`, then runs turns until the pump waits.
    fn edge(&mut self, side: SessionSide) {
        let ended = self.script.sockets[side as usize].end.get().is_some();
        self.pump.note(side, true, true, ended);
        for _ in 0..100_000 {
            if self.ending.is_some() {
                return;
            }
            let mut moved = TurnBytes::default();
            let next = self.pump.turn(&mut self.script, &mut self.buffer, &mut moved);
            self.received.iter_mut().zip(moved.received).for_each(|(sum, more)| *sum += more);
            match next {
                TurnNext::Again => {}
                TurnNext::Wait => return,
                TurnNext::End(ending) => self.ending = Some(ending),
            }
        }
        panic!("the pump never waits");
    }

    fn arrive(&mut self, side: SessionSide, bytes: &[u8]) {
        self.script.sockets[side as usize].arrived.borrow_mut().extend(bytes);
        self.edge(side);
    }

    fn end(&mut self, side: SessionSide, errno: i32) {
        self.script.sockets[side as usize].end.set(Some(errno));
        self.edge(side);
    }

    fn make_room(&mut self, side: SessionSide, room: usize) {
        let fake = &self.script.sockets[side as usize];
        fake.room.set(fake.room.get().saturating_add(room));
        self.edge(side);
    }

    /// Uses the budget up, or frees it. Applies to the copying modes; pipes have their own
    /// limit.
    fn spend(&mut self, all: bool) {
        self.script.budget.set_max(if all { 0 } else { usize::MAX });
    }

    fn sent_to(&self, side: SessionSide) -> Vec<u8> {
        self.script.sockets[side as usize].sent.borrow().clone()
    }

    fn fin_sent_to(&self, side: SessionSide) -> bool {
        self.script.sockets[side as usize].fin_sent.get()
    }

    fn kept(&self) -> usize {
        let piped: usize = SessionSide::BOTH.into_iter().map(|side| self.script.piped(side)).sum();
        let kept = self.pump.streams.iter().filter_map(|stream| stream.kept.as_ref());
        kept.map(|kept| kept.bytes.capacity()).sum::<usize>() + piped
    }
}

#[test]
fn fin_follows_the_last_byte_and_the_other_direction_stays_open() {
    let mut bench = Bench::new(4);
    bench.arrive(Client, b"request");
    bench.end(Client, 0);
    assert!(!bench.fin_sent_to(Backend), "three bytes are not sent yet");

    bench.make_room(Backend, 100);
    assert_eq!(bench.sent_to(Backend), b"request");
    assert!(bench.fin_sent_to(Backend));
    assert_eq!(bench.pump.close.phase(), Phase::HalfClosed);

    bench.make_room(Client, 100);
    bench.arrive(Backend, b"answer");
    bench.end(Backend, 0);
    let ending = bench.ending.expect("both directions have ended");
    assert_eq!((ending.cause, ending.phase), (Cause::Finished, Phase::Closed));
    assert_eq!(ending.closed_first, Some(Client));
    assert_eq!(bench.sent_to(Client), b"answer");
}

#[test]
fn memory_shortage_ends_no_session_and_requests_another_turn() {
    let mut bench = Bench::new(100);
    for side in [Client, Backend] {
        bench.script.sockets[side as usize].short.set(1);
        bench.arrive(Client, b"piece");
        assert!(bench.pump.is_short(), "no event follows");
        // The engine runs this turn without an edge.
        let mut moved = TurnBytes::default();
        let next = bench.pump.turn(&mut bench.script, &mut bench.buffer, &mut moved);
        assert_eq!((next, bench.pump.is_short()), (TurnNext::Wait, false));
    }
    assert_eq!(bench.sent_to(Backend), b"piecepiece");
}

#[test]
fn reset_ends_the_session_after_the_bytes_before_it_are_delivered() {
    let mut bench = Bench::new(2);
    bench.arrive(Backend, b"last bytes");
    bench.end(Backend, libc::ECONNRESET);
    assert!(bench.ending.is_none(), "eight bytes are still kept");

    bench.make_room(Client, 100);
    let ending = bench.ending.expect("delivered");
    assert_eq!((ending.cause, ending.errno), (Cause::BackendReset, libc::ECONNRESET));
    assert_eq!(bench.sent_to(Client), b"last bytes");
    assert!(!bench.fin_sent_to(Client), "a reset is not passed on as FIN");
}

#[test]
fn answer_sent_before_the_backend_resets_an_upload_arrives() {
    let mut bench = Bench::new(1000);
    let backend = &bench.script.sockets[Backend as usize];
    backend.arrived.borrow_mut().extend(b"413 too large");
    backend.end.set(Some(libc::ECONNRESET));

    bench.arrive(Client, b"more of the upload");
    let ending = bench.ending.expect("the backend has failed");
    assert_eq!((ending.cause, ending.closed_first), (Cause::BackendReset, Some(Backend)));
    assert_eq!(bench.sent_to(Client), b"413 too large");
}

#[test]
fn failure_of_both_sides_in_sends_ends_the_session() {
    let mut bench = Bench::new(1000);
    for side in SessionSide::BOTH {
        let fake = &bench.script.sockets[side as usize];
        fake.arrived.borrow_mut().extend(b"undelivered");
        fake.end.set(Some(libc::ECONNRESET));
        bench.pump.note(side, true, true, true);
    }
    bench.edge(Client);
    let ending = bench.ending.expect("no bytes can be delivered");
    // The pump sends to the backend first, so it notices that failure first.
    assert_eq!((ending.cause, ending.closed_first), (Cause::BackendReset, Some(Backend)));
}

#[test]
fn client_that_fails_with_unsent_bytes_is_closed_first() {
    let mut bench = Bench::new(0);
    bench.arrive(Client, b"unsent");
    assert!(bench.pump.close.note_failure(Client), "the half-closed timeout starts");
    assert!(!bench.pump.close.note_failure(Client), "it starts once");
    bench.end(Client, libc::ECONNRESET);
    assert!(bench.ending.is_none(), "its bytes can still be delivered");
    assert_eq!(bench.pump.close.closed_first(), Some(Client));
}

#[test]
fn two_failed_sides_end_the_session_with_unsent_bytes() {
    let mut bench = Bench::new(0);
    bench.arrive(Client, b"for the backend");
    bench.arrive(Backend, b"for the client");
    for side in SessionSide::BOTH {
        // More bytes follow the kept ones, so that neither failure is received.
        bench.script.sockets[side as usize].arrived.borrow_mut().extend(b"more");
        bench.script.sockets[side as usize].end.set(Some(libc::ECONNRESET));
    }
    bench.edge(Client);
    bench.edge(Backend);
    let ending = bench.ending.expect("both sides have failed");
    assert_eq!((ending.cause, ending.phase), (Cause::ClientReset, Phase::Data));
}

#[test]
fn second_fin_is_sent_by_the_close_unless_the_peer_may_answer_with_a_reset() {
    for (answered_late, sent) in [(false, false), (true, true)] {
        let mut bench = Bench::new(100);
        bench.end(Client, 0);
        if answered_late {
            bench.arrive(Backend, b"late");
        }
        bench.end(Backend, 0);
        assert_eq!(bench.ending.unwrap().cause, Cause::Finished);
        assert_eq!((bench.fin_sent_to(Backend), bench.fin_sent_to(Client)), (true, sent));
    }
}

#[test]
fn reset_after_the_peers_fin_has_phase_half_closed() {
    let mut bench = Bench::new(100);
    bench.end(Client, 0);
    bench.end(Backend, libc::ECONNRESET);
    let ending = bench.ending.expect("ended");
    assert_eq!((ending.cause, ending.phase), (Cause::BackendReset, Phase::HalfClosed));
}

#[test]
fn bulk_stream_takes_a_pipe_and_returns_it_when_idle() {
    let mut bench = Bench::new(usize::MAX);
    bench.script.pipes_left = 1;
    bench.arrive(Backend, &vec![5; 2_000_000]);
    assert_eq!(bench.pump.streams[Backend as usize].mode, PumpMode::Bulk);
    assert_eq!(bench.script.pipes_left, 1, "an idle stream holds no pipe");
    assert_eq!(*bench.script.bulk_from.borrow(), [Backend], "called once");

    for _ in 0..20 {
        bench.arrive(Backend, b"now small");
    }
    assert_eq!(bench.pump.streams[Backend as usize].mode, PumpMode::Copy);
    assert_eq!(bench.sent_to(Client).len(), 2_000_000 + 20 * 9);
}

#[test]
fn bulk_is_copied_without_a_pipe() {
    let mut bench = Bench::new(usize::MAX);
    bench.arrive(Client, &vec![5; 2_000_000]);
    assert_ne!(bench.pump.streams[Client as usize].mode, PumpMode::Bulk);
    assert_eq!(bench.sent_to(Backend).len(), 2_000_000);
}

#[test]
fn bulk_that_crams_its_pipe_is_copied_and_retries_later() {
    let mut bench = Bench::new(usize::MAX);
    bench.script.pipes_left = 1;
    bench.script.crams = true;
    bench.arrive(Client, &vec![5; 8_000_000]);
    // Once, not again after a few megabytes.
    assert_eq!(bench.pump.streams[Client as usize].pipe_failures, 1);
    assert_ne!(bench.pump.streams[Client as usize].mode, PumpMode::Bulk);
    assert_eq!(bench.script.pipes_left, 1);
    bench.script.crams = false;
    bench.arrive(Client, &vec![5; 8_000_000]);
    assert_eq!(bench.pump.streams[Client as usize].mode, PumpMode::Bulk);
    assert_eq!(bench.sent_to(Backend).len(), 16_000_000);
}

#[test]
fn bytes_in_the_pipe_are_delivered_after_a_reset_of_their_sender() {
    let mut bench = Bench::new(100_000);
    bench.script.pipes_left = 1;
    bench.arrive(Backend, &vec![5; 300_000]);
    assert!(bench.script.piped(Backend) > 0, "the client has no room for more");
    bench.end(Backend, libc::ECONNRESET);
    assert!(bench.ending.is_none());
    bench.make_room(Client, 1_000_000);
    assert_eq!(bench.ending.expect("delivered").cause, Cause::BackendReset);
    assert_eq!(bench.sent_to(Client).len(), 300_000);
    assert_eq!(bench.script.pipes_left, 1);
}

#[test]
fn etimedout_counts_as_lost_not_as_reset() {
    let mut bench = Bench::new(10);
    bench.end(Client, libc::ETIMEDOUT);
    assert_eq!(bench.ending.expect("ended").cause, Cause::ClientLost);
}

#[test]
fn stalled_reader_uses_memory_for_at_most_one_read() {
    let mut bench = Bench::new(0);
    for _ in 0..100 {
        bench.arrive(Client, &[7; READ_SMALL]);
    }
    assert!(bench.kept() <= READ_SMALL, "{} bytes kept", bench.kept());
    bench.make_room(Backend, usize::MAX);
    assert_eq!(bench.sent_to(Backend).len(), 100 * READ_SMALL);
    assert_eq!(bench.kept(), 0, "an idle session holds no buffer");
}

#[test]
fn without_budget_no_bytes_are_kept_and_none_lost() {
    let mut bench = Bench::new(0);
    bench.spend(true);
    for _ in 0..100 {
        bench.arrive(Client, &[7; READ_SMALL]);
        bench.make_room(Backend, 1000);
    }
    assert_eq!(bench.kept(), 0);
    assert_eq!(bench.sent_to(Backend).len(), 100 * 1000);
    assert_eq!(bench.received[Client as usize], 100 * 1000, "received bytes equal sent bytes");
    assert!(bench.script.budget.refused() > 0);
    bench.end(Client, 0);
    assert!(!bench.fin_sent_to(Backend));

    bench.make_room(Backend, usize::MAX / 2);
    assert_eq!(bench.sent_to(Backend).len(), 100 * READ_SMALL);
    assert!(bench.fin_sent_to(Backend));
}

#[test]
fn kept_bytes_use_the_budget_until_they_are_sent() {
    let mut bench = Bench::new(10);
    bench.arrive(Client, &[7; 100]);
    assert_eq!(bench.script.budget.used(), 90);
    bench.make_room(Backend, 1000);
    assert_eq!(bench.script.budget.used(), 0);
}

#[test]
fn fast_sender_is_limited_to_its_share_of_a_turn() {
    let mut bench = Bench::new(usize::MAX);
    bench.script.sockets[Client as usize].arrived.borrow_mut().extend(vec![1; 4 * BYTES_PER_TURN]);
    bench.pump.note(Client, true, true, false);
    let mut moved = TurnBytes::default();
    let next = bench.pump.turn(&mut bench.script, &mut bench.buffer, &mut moved);
    assert_eq!(next, TurnNext::Again);
    assert!(moved.received[Client as usize] < (BYTES_PER_TURN + READ_BULK) as u64);
}

#[test]
fn bytes_after_an_urgent_mark_are_received() {
    // A read stops at the mark, so it is short although more bytes are queued.
    let mut bench = Bench::new(100);
    bench.pump.note(Client, true, true, true);
    let client = &bench.script.sockets[Client as usize];
    client.arrived.borrow_mut().extend(b"before");
    let mut moved = TurnBytes::default();
    let next = bench.pump.turn(&mut bench.script, &mut bench.buffer, &mut moved);
    assert_eq!(next, TurnNext::Wait);
    assert_eq!(bench.sent_to(Backend), b"before");
    assert!(!bench.pump.sockets[Client as usize].readable, "read until it would block");
}

#[derive(Debug, Clone)]
enum Act {
    Arrive(bool, usize),
    Room(bool, usize),
    End(bool),
}

fn act() -> impl Strategy<Value = Act> {
    let size = prop_oneof![1..50usize, 16_000..17_000usize, 200_000..300_000usize];
    prop_oneof![
        4 => (any::<bool>(), size.clone()).prop_map(|(side, size)| Act::Arrive(side, size)),
        4 => (any::<bool>(), size).prop_map(|(side, size)| Act::Room(side, size)),
        1 => any::<bool>().prop_map(Act::End),
    ]
}

fn side(backend: bool) -> SessionSide {
    if backend { Backend } else { Client }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_byte_before_a_fin_arrives_once_and_in_order(
        acts in prop::collection::vec(act(), 0..40),
        pipes in 0..3usize,
        spent in any::<bool>(),
    ) {
        let mut bench = Bench::new(0);
        bench.script.pipes_left = pipes;
        bench.spend(spent);
        let mut expected: [Vec<u8>; 2] = Default::default();
        let mut next_byte = 0u8;
        for act in acts {
            match act {
                Act::Arrive(from, size) => {
                    let from = side(from);
                    if bench.script.sockets[from as usize].end.get().is_none() {
                        let bytes: Vec<u8> = (0..size).map(|_| { next_byte = next_byte.wrapping_add(1); next_byte }).collect();
                        expected[from.other() as usize].extend(&bytes);
                        bench.arrive(from, &bytes);
                    }
                }
                Act::Room(to, room) => bench.make_room(side(to), room),
                Act::End(from) => bench.end(side(from), 0),
            }
            for to in SessionSide::BOTH {
                let sent = bench.sent_to(to);
                prop_assert!(expected[to as usize].starts_with(&sent));
                prop_assert!(!bench.fin_sent_to(to) || sent.len() == expected[to as usize].len());
            }
        }
        for both in [Client, Backend] {
            bench.end(both, 0);
        }
        bench.make_room(Client, usize::MAX / 2);
        bench.make_room(Backend, usize::MAX / 2);
        prop_assert_eq!(bench.ending.map(|ending| ending.cause), Some(Cause::Finished));
        prop_assert!(SessionSide::BOTH.into_iter().any(|side| bench.fin_sent_to(side)));
        for to in SessionSide::BOTH {
            let expected = &expected[to as usize];
            prop_assert_eq!(&bench.sent_to(to), expected);
            prop_assert_eq!(bench.received[to.other() as usize], expected.len() as u64);
        }
        prop_assert_eq!(bench.kept(), 0);
    }

    #[test]
    fn failure_ends_the_session_once_the_other_side_has_room(
        acts in prop::collection::vec(act(), 0..20),
        failing in any::<bool>(),
        pipes in 0..3usize,
        spent in any::<bool>(),
    ) {
        let mut bench = Bench::new(0);
        bench.script.pipes_left = pipes;
        bench.spend(spent);
        for act in acts {
            match act {
                Act::Arrive(from, size) => bench.arrive(side(from), &vec![1; size]),
                Act::Room(to, room) => bench.make_room(side(to), room),
                Act::End(_) => {}
            }
        }
        bench.end(side(failing), libc::ECONNRESET);
        bench.make_room(side(failing).other(), usize::MAX / 2);
        let ending = bench.ending.expect("ended");
        prop_assert_eq!(ending.cause, Cause::of_failure(side(failing), libc::ECONNRESET));
    }
}
