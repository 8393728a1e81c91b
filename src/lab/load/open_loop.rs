//! Messages at a fixed rate, whether or not earlier ones are answered.
//!
//! Driven by `thread`. A latency counts from the scheduled send time of the message. A
//! stall therefore shows in every message that it delayed, not only in the first (Tene,
//! "How NOT to measure latency": coordinated omission). Content is counted, never
//! inspected.

use crate::load::report::LoadErrorKind;
use crate::load::thread::{BUFFER, CONNECTING_MAX, LoadPhase, LoadThread, ModeLoop, Nanos};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tidegate_net::epoll::{EpollEvent, EpollInterest};
use tidegate_net::stream::{self, Connecting};
use tidegate_net::timer::Timer;

/// Maximum number of unanswered messages of a thread: 16 bytes each, and ten seconds at
/// 100,000 messages per second. Further messages are not sent, and counted.
const OUTSTANDING_MAX: u64 = 1_000_000;

/// Maximum number of messages that are sent before sockets are served again.
const BURST_MAX: u64 = 64;

/// The timer's token in the epoll set.
const TIMER: u64 = u64::MAX;

/// The loop of this mode.
#[derive(Debug)]
pub(super) struct OpenLoop {
    slots: Vec<OpenLoopSlot>,
    message: Box<[u8]>,
    buffer: Box<[u8]>,
    timer: Timer,
    /// Messages per nanosecond.
    rate: f64,
    /// Messages that were due so far, sent or not.
    issued: u64,
    outstanding: u64,
    /// The time that the timer is set to.
    armed: Nanos,
    next: usize,
    waiting: usize,
    connecting: usize,
}

#[derive(Debug, Default)]
struct OpenLoopSlot {
    socket: Option<OwnedFd>,
    connected: bool,
    /// Unsent bytes of messages.
    unsent: u64,
    /// Received bytes of the answer to the first message in `scheduled`.
    got: usize,
    /// Scheduled send time of each unanswered message.
    scheduled: VecDeque<Nanos>,
    both: bool,
}

// === impl OpenLoop ===

impl OpenLoop {
    /// `rate` is the rate of this thread in messages per second.
    pub(super) fn new(thread: &LoadThread<'_>, count: usize, rate: f64) -> io::Result<OpenLoop> {
        let timer = Timer::new()?;
        thread.epoll.watch_for(&timer, TIMER, EpollInterest::EdgeReadable)?;
        Ok(OpenLoop {
            slots: (0..count).map(|_| OpenLoopSlot::default()).collect(),
            message: vec![b'x'; thread.plan.size].into(),
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

    fn open(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        let dialled = thread.dialer.dial().and_then(|(socket, how_far)| {
            thread.epoll.watch_for(&socket, slot.into(), EpollInterest::Both)?;
            Ok((socket, how_far == Connecting::Done))
        });
        match dialled {
            Ok((socket, connected)) => {
                let conn = &mut self.slots[slot as usize];
                (conn.socket, conn.connected, conn.both) = (Some(socket), connected, true);
                if connected {
                    self.settled(thread);
                    thread.opened();
                }
            }
            Err(error) => {
                self.settled(thread);
                thread.lost(slot, LoadErrorKind::of_connect(&error));
            }
        }
    }

    fn settled(&mut self, thread: &LoadThread<'_>) {
        if thread.phase == LoadPhase::Setup {
            self.connecting = self.connecting.saturating_sub(1);
        }
    }

    fn dial_waiting(&mut self, thread: &mut LoadThread<'_>) {
        while self.waiting > 0 && self.connecting < CONNECTING_MAX {
            let slot = self.slots.len() - self.waiting;
            self.waiting -= 1;
            self.connecting += 1;
            self.open(thread, slot as u32);
        }
    }

    /// Returns the scheduled send time of message `number`.
    fn intended(&self, thread: &LoadThread<'_>, number: u64) -> Nanos {
        thread.started() + (number as f64 / self.rate) as Nanos
    }

    /// Sends the messages that are due. Returns when the next one is due.
    fn issue(&mut self, thread: &mut LoadThread<'_>) -> Nanos {
        let now = thread.tick();
        for _ in 0..BURST_MAX {
            let when = self.intended(thread, self.issued);
            if when > now {
                return when;
            }
            self.issued += 1;
            self.send_one(thread, when);
        }
        now
    }

    fn send_one(&mut self, thread: &mut LoadThread<'_>, when: Nanos) {
        let slot = if self.outstanding < OUTSTANDING_MAX { self.next_connected() } else { None };
        let Some(slot) = slot else {
            return thread.report.fail(LoadErrorKind::NotSent, 1);
        };
        self.outstanding += 1;
        let conn = &mut self.slots[slot as usize];
        conn.scheduled.push_back(when);
        conn.unsent += self.message.len() as u64;
        if let Err(error) = self.flush(thread, slot) {
            self.lose(thread, slot, LoadErrorKind::of_transfer(&error));
        }
    }

    fn next_connected(&mut self) -> Option<u32> {
        for _ in 0..self.slots.len() {
            let slot = self.next;
            self.next = (slot + 1) % self.slots.len();
            if self.slots[slot].connected {
                return Some(slot as u32);
            }
        }
        None
    }

    fn flush(&mut self, thread: &mut LoadThread<'_>, slot: u32) -> io::Result<()> {
        let conn = &mut self.slots[slot as usize];
        let Some(socket) = &conn.socket else { return Ok(()) };
        while conn.unsent > 0 {
            // All messages have the same content, so only their ends matter. The rest
            // of a partly sent message comes first.
            let length = match conn.unsent % self.message.len() as u64 {
                0 => self.message.len(),
                rest => rest as usize,
            };
            match stream::send(socket, &self.message[..length]) {
                Ok(sent) => {
                    conn.unsent -= sent as u64;
                    if thread.phase == LoadPhase::Timed {
                        thread.report.bytes_out += sent as u64;
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
        thread: &mut LoadThread<'_>,
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
            if thread.phase == LoadPhase::Timed {
                thread.report.bytes_in += received as u64;
            }
            self.answered(thread, slot, received)?;
            if received < self.buffer.len() && !thorough {
                return Ok(());
            }
        }
    }

    fn answered(
        &mut self,
        thread: &mut LoadThread<'_>,
        slot: u32,
        received: usize,
    ) -> Result<(), LoadErrorKind> {
        let now = thread.tick();
        let conn = &mut self.slots[slot as usize];
        conn.got += received;
        while conn.got >= thread.plan.answer {
            conn.got -= thread.plan.answer;
            let scheduled = conn.scheduled.pop_front().ok_or(LoadErrorKind::Excess)?;
            self.outstanding -= 1;
            // Late answers are recorded, too. Without them a stall at the end would not
            // show.
            thread.report.record(now.saturating_sub(scheduled));
            match thread.phase {
                LoadPhase::Grace => thread.report.late += 1,
                _ => thread.report.requests += 1,
            }
        }
        if conn.got > 0 && conn.scheduled.is_empty() { Err(LoadErrorKind::Excess) } else { Ok(()) }
    }

    fn lose(&mut self, thread: &mut LoadThread<'_>, slot: u32, kind: LoadErrorKind) {
        let conn = &mut self.slots[slot as usize];
        let scheduled = conn.scheduled.len() as u64;
        self.outstanding -= scheduled;
        thread.report.fail(LoadErrorKind::Unanswered, scheduled);
        if conn.connected {
            thread.open -= 1;
        }
        let undecided = conn.socket.is_some() && !conn.connected;
        // Keeps the memory of the queue for the next connection.
        conn.scheduled.clear();
        (conn.socket, conn.connected, conn.unsent, conn.got) = (None, false, 0, 0);
        if undecided {
            self.settled(thread);
        }
        thread.lost(slot, kind);
    }

    fn handle(
        &mut self,
        thread: &mut LoadThread<'_>,
        readiness: EpollEvent,
    ) -> Result<(), LoadErrorKind> {
        let slot = readiness.token as u32;
        let conn = &mut self.slots[slot as usize];
        let Some(socket) = &conn.socket else { return Ok(()) };
        if !conn.connected {
            if !readiness.writable && !readiness.hang_up {
                return Ok(());
            }
            stream::connect_result(socket).map_err(|error| LoadErrorKind::of_connect(&error))?;
            conn.connected = true;
            self.settled(thread);
            thread.opened();
        }
        if readiness.writable && self.slots[slot as usize].unsent > 0 {
            self.flush(thread, slot).map_err(|error| LoadErrorKind::of_transfer(&error))?;
        }
        if readiness.readable { self.receive(thread, slot, readiness.hang_up) } else { Ok(()) }
    }
}

impl ModeLoop for OpenLoop {
    fn prepare(&mut self, thread: &mut LoadThread<'_>) -> io::Result<()> {
        self.waiting = self.slots.len();
        self.dial_waiting(thread);
        Ok(())
    }

    fn prepared(&self) -> bool {
        self.waiting == 0 && self.slots.iter().all(|slot| slot.connected || slot.socket.is_none())
    }

    fn begin(&mut self, _lane: &mut LoadThread<'_>) {}

    fn ready(&mut self, thread: &mut LoadThread<'_>, readiness: EpollEvent) {
        if readiness.token == TIMER {
            return;
        }
        if let Err(kind) = self.handle(thread, readiness) {
            self.lose(thread, readiness.token as u32, kind);
        }
        if thread.phase == LoadPhase::Setup {
            self.dial_waiting(thread);
        }
    }

    fn due(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        if self.slots[slot as usize].socket.is_none() && thread.phase != LoadPhase::Grace {
            self.open(thread, slot);
        }
    }

    fn turn(&mut self, thread: &mut LoadThread<'_>) -> Option<Nanos> {
        if thread.phase != LoadPhase::Timed {
            return None;
        }
        let next = self.issue(thread);
        if next > thread.at() && next != self.armed {
            self.armed = next;
            // If the timer fails, the message is sent with the next event, and its
            // latency includes the delay.
            let _ = self.timer.arm(Duration::from_nanos(next - thread.at()));
        }
        Some(next)
    }

    fn unanswered(&self) -> u64 {
        self.outstanding
    }

    fn finish(&mut self, thread: &mut LoadThread<'_>) {
        // Unanswered messages took at least this long. Without them the tail of the
        // distribution would be too short.
        let now = thread.tick();
        for scheduled in self.slots.iter().flat_map(|slot| &slot.scheduled) {
            thread.report.record(now.saturating_sub(*scheduled));
        }
        thread.report.fail(LoadErrorKind::Unanswered, self.outstanding);
    }

    fn end(&mut self, thread: &mut LoadThread<'_>) {
        // Messages that were due before the end are sent late.
        let end = thread.at();
        while self.intended(thread, self.issued) < end {
            let when = self.intended(thread, self.issued);
            self.issued += 1;
            self.send_one(thread, when);
        }
    }
}
