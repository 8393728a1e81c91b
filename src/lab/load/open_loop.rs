//! Messages at a fixed rate, whether or not earlier ones are answered.
//!
//! Driven by `lane`. A latency counts from the moment the message was meant to
//! leave, so a stall shows in every message it held up and not only in the one
//! it hit (Tene, "How NOT to measure latency": coordinated omission). Content
//! is never looked at, only counted.

use crate::load::report::LoadErrorKind;
use crate::load::thread::{BUFFER, CONNECTING_MAX, LoadPhase, LoadThread, ModeLoop, Nanos};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tidegate_net::epoll::{EpollEvent, EpollInterest};
use tidegate_net::stream::{self, Connecting};
use tidegate_net::timer::Timer;

/// Messages of one thread that may be without an answer: 16 bytes each, and
/// ten seconds of a hundred thousand a second. Beyond it they are not sent, and
/// counted.
const OUTSTANDING_MAX: u64 = 1_000_000;

/// Messages sent in one go before sockets get their turn again.
const BURST_MAX: u64 = 64;

/// The timer's place in the set.
const TIMER: u64 = u64::MAX;

/// The loop.
#[derive(Debug)]
pub(super) struct OpenLoop {
    slots: Vec<OpenLoopSlot>,
    message: Box<[u8]>,
    buffer: Box<[u8]>,
    timer: Timer,
    /// Messages a nanosecond.
    rate: f64,
    /// Messages that were due so far, sent or not.
    issued: u64,
    outstanding: u64,
    /// The moment the timer is set for.
    armed: Nanos,
    next: usize,
    waiting: usize,
    connecting: usize,
}

#[derive(Debug, Default)]
struct OpenLoopSlot {
    socket: Option<OwnedFd>,
    stands: bool,
    /// Bytes of messages yet to be sent.
    owed: u64,
    /// Bytes of the answer at the head of `asked` that have come.
    got: usize,
    /// When each message without an answer was meant to leave.
    asked: VecDeque<Nanos>,
    both: bool,
}

// === impl OpenLoop ===

impl OpenLoop {
    /// `rate` is this thread's, in messages a second.
    pub(super) fn new(lane: &LoadThread<'_>, count: usize, rate: f64) -> io::Result<OpenLoop> {
        let timer = Timer::new()?;
        lane.epoll.watch_for(&timer, TIMER, EpollInterest::EdgeReadable)?;
        Ok(OpenLoop {
            slots: (0..count).map(|_| OpenLoopSlot::default()).collect(),
            message: vec![b'x'; lane.plan.size].into(),
            buffer: vec![0; BUFFER].into(),
            timer,
            rate: rate / 1e9,
            issued: 0,
            outstanding: 0,
            armed: 0,
            next: 0,
            waiting: 0,
            connecting: 0,
        })
    }

    fn open(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        let dialled = lane.dialer.dial().and_then(|(socket, how_far)| {
            lane.epoll.watch_for(&socket, slot.into(), EpollInterest::Both)?;
            Ok((socket, how_far == Connecting::Done))
        });
        match dialled {
            Ok((socket, stands)) => {
                let place = &mut self.slots[slot as usize];
                (place.socket, place.stands, place.both) = (Some(socket), stands, true);
                if stands {
                    self.settled(lane);
                    lane.opened();
                }
            }
            Err(error) => {
                self.settled(lane);
                lane.lost(slot, LoadErrorKind::of_connect(&error));
            }
        }
    }

    fn settled(&mut self, lane: &LoadThread<'_>) {
        if lane.phase == LoadPhase::Setup {
            self.connecting = self.connecting.saturating_sub(1);
        }
    }

    fn dial_waiting(&mut self, lane: &mut LoadThread<'_>) {
        while self.waiting > 0 && self.connecting < CONNECTING_MAX {
            let slot = self.slots.len() - self.waiting;
            self.waiting -= 1;
            self.connecting += 1;
            self.open(lane, slot as u32);
        }
    }

    /// When message `number` is meant to leave.
    fn intended(&self, lane: &LoadThread<'_>, number: u64) -> Nanos {
        lane.started() + (number as f64 / self.rate) as Nanos
    }

    /// Sends what is due by now; gives when the next one is.
    fn issue(&mut self, lane: &mut LoadThread<'_>) -> Nanos {
        let now = lane.tick();
        for _ in 0..BURST_MAX {
            let when = self.intended(lane, self.issued);
            if when > now {
                return when;
            }
            self.issued += 1;
            self.send_one(lane, when);
        }
        now
    }

    fn send_one(&mut self, lane: &mut LoadThread<'_>, when: Nanos) {
        let slot = if self.outstanding < OUTSTANDING_MAX { self.next_standing() } else { None };
        let Some(slot) = slot else {
            return lane.report.fail(LoadErrorKind::NotSent, 1);
        };
        self.outstanding += 1;
        let place = &mut self.slots[slot as usize];
        place.asked.push_back(when);
        place.owed += self.message.len() as u64;
        if let Err(error) = self.flush(lane, slot) {
            self.lose(lane, slot, LoadErrorKind::of_transfer(&error));
        }
    }

    fn next_standing(&mut self) -> Option<u32> {
        for _ in 0..self.slots.len() {
            let slot = self.next;
            self.next = (slot + 1) % self.slots.len();
            if self.slots[slot].stands {
                return Some(slot as u32);
            }
        }
        None
    }

    fn flush(&mut self, lane: &mut LoadThread<'_>, slot: u32) -> io::Result<()> {
        let place = &mut self.slots[slot as usize];
        let Some(socket) = &place.socket else { return Ok(()) };
        while place.owed > 0 {
            // The content is all the same: only where messages end counts, and
            // the rest of the one that was cut comes first.
            let length = match place.owed % self.message.len() as u64 {
                0 => self.message.len(),
                rest => rest as usize,
            };
            match stream::send(socket, &self.message[..length]) {
                Ok(sent) => {
                    place.owed -= sent as u64;
                    if lane.phase == LoadPhase::Timed {
                        lane.report.bytes_out += sent as u64;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive(
        &mut self,
        lane: &mut LoadThread<'_>,
        slot: u32,
        thorough: bool,
    ) -> Result<(), LoadErrorKind> {
        loop {
            let Some(socket) = &self.slots[slot as usize].socket else { return Ok(()) };
            let received = match stream::receive(socket, &mut self.buffer) {
                Ok(0) => return Err(LoadErrorKind::Closed),
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(LoadErrorKind::of_transfer(&error)),
            };
            if lane.phase == LoadPhase::Timed {
                lane.report.bytes_in += received as u64;
            }
            self.answered(lane, slot, received)?;
            if received < self.buffer.len() && !thorough {
                return Ok(());
            }
        }
    }

    fn answered(
        &mut self,
        lane: &mut LoadThread<'_>,
        slot: u32,
        received: usize,
    ) -> Result<(), LoadErrorKind> {
        let now = lane.tick();
        let place = &mut self.slots[slot as usize];
        place.got += received;
        while place.got >= lane.plan.answer {
            place.got -= lane.plan.answer;
            let asked = place.asked.pop_front().ok_or(LoadErrorKind::Excess)?;
            self.outstanding -= 1;
            // Late ones belong to the distribution: leaving them out would hide
            // a stall at the end.
            lane.report.record(now.saturating_sub(asked));
            match lane.phase {
                LoadPhase::Grace => lane.report.late += 1,
                _ => lane.report.requests += 1,
            }
        }
        if place.got > 0 && place.asked.is_empty() { Err(LoadErrorKind::Excess) } else { Ok(()) }
    }

    fn lose(&mut self, lane: &mut LoadThread<'_>, slot: u32, kind: LoadErrorKind) {
        let place = &mut self.slots[slot as usize];
        let asked = place.asked.len() as u64;
        self.outstanding -= asked;
        lane.report.fail(LoadErrorKind::Unanswered, asked);
        if place.stands {
            lane.open -= 1;
        }
        let undecided = place.socket.is_some() && !place.stands;
        // The queue's memory serves the next connection.
        place.asked.clear();
        (place.socket, place.stands, place.owed, place.got) = (None, false, 0, 0);
        if undecided {
            self.settled(lane);
        }
        lane.lost(slot, kind);
    }

    fn handle(
        &mut self,
        lane: &mut LoadThread<'_>,
        readiness: EpollEvent,
    ) -> Result<(), LoadErrorKind> {
        let slot = readiness.token as u32;
        let place = &mut self.slots[slot as usize];
        let Some(socket) = &place.socket else { return Ok(()) };
        if !place.stands {
            if !readiness.writable && !readiness.hang_up {
                return Ok(());
            }
            stream::connect_result(socket).map_err(|error| LoadErrorKind::of_connect(&error))?;
            place.stands = true;
            self.settled(lane);
            lane.opened();
        }
        if readiness.writable && self.slots[slot as usize].owed > 0 {
            self.flush(lane, slot).map_err(|error| LoadErrorKind::of_transfer(&error))?;
        }
        if readiness.readable { self.receive(lane, slot, readiness.hang_up) } else { Ok(()) }
    }
}

impl ModeLoop for OpenLoop {
    fn prepare(&mut self, lane: &mut LoadThread<'_>) -> io::Result<()> {
        self.waiting = self.slots.len();
        self.dial_waiting(lane);
        Ok(())
    }

    fn prepared(&self) -> bool {
        self.waiting == 0 && self.slots.iter().all(|slot| slot.stands || slot.socket.is_none())
    }

    fn begin(&mut self, _lane: &mut LoadThread<'_>) {}

    fn ready(&mut self, lane: &mut LoadThread<'_>, readiness: EpollEvent) {
        if readiness.token == TIMER {
            return;
        }
        if let Err(kind) = self.handle(lane, readiness) {
            self.lose(lane, readiness.token as u32, kind);
        }
        if lane.phase == LoadPhase::Setup {
            self.dial_waiting(lane);
        }
    }

    fn due(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        if self.slots[slot as usize].socket.is_none() && lane.phase != LoadPhase::Grace {
            self.open(lane, slot);
        }
    }

    fn turn(&mut self, lane: &mut LoadThread<'_>) -> Option<Nanos> {
        if lane.phase != LoadPhase::Timed {
            return None;
        }
        let next = self.issue(lane);
        if next > lane.at() && next != self.armed {
            self.armed = next;
            // Without the timer the message leaves with the next event, late,
            // and its latency says so.
            let _ = self.timer.arm(Duration::from_nanos(next - lane.at()));
        }
        Some(next)
    }

    fn unanswered(&self) -> u64 {
        self.outstanding
    }

    fn finish(&mut self, lane: &mut LoadThread<'_>) {
        // They took at least this long, and would be missing from the tail.
        let now = lane.tick();
        for asked in self.slots.iter().flat_map(|slot| &slot.asked) {
            lane.report.record(now.saturating_sub(*asked));
        }
        lane.report.fail(LoadErrorKind::Unanswered, self.outstanding);
    }

    fn end(&mut self, lane: &mut LoadThread<'_>) {
        // Messages due before the end leave with their lateness.
        let end = lane.at();
        while self.intended(lane, self.issued) < end {
            let when = self.intended(lane, self.issued);
            self.issued += 1;
            self.send_one(lane, when);
        }
    }
}
