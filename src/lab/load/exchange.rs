//! Requests and answers, one at a time per connection: the modes ping-pong, short, idle
//! and churn.
//!
//! Driven by `thread`. A connection has at most one open request. Content is counted,
//! never inspected.

use super::plan::{CloseMode, LoadMode, LoadPlan, PROXY_HEADER};
use crate::load::report::LoadErrorKind;
use crate::load::thread::{BUFFER, CONNECTING_MAX, LoadPhase, LoadThread, ModeLoop, Nanos};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tidegate_net::epoll::{EpollEvent, EpollInterest};
use tidegate_net::stream::{self, Connecting};

/// The loop of these modes.
#[derive(Debug)]
pub(super) struct RequestLoop {
    slots: Vec<RequestSlot>,
    request: Box<[u8]>,
    buffer: Box<[u8]>,
    /// Slots without a connect attempt so far during setup.
    waiting: usize,
    /// Slots whose first connection is in progress.
    connecting: usize,
}

#[derive(Debug)]
struct RequestSlot {
    socket: Option<OwnedFd>,
    state: RequestState,
    /// Unsent bytes of the request.
    unsent: usize,
    /// Missing bytes of the answer.
    awaited: usize,
    /// When the request was sent; in the mode short, when the connect started.
    since: Nanos,
    /// Whether the socket is also watched for writability.
    both: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestState {
    /// No connection: not yet, or until the next attempt.
    Down,
    /// The connect is in progress.
    Connecting,
    /// A request is open.
    Waiting,
    /// Connected, without an open request.
    Idle,
}

/// Returns the bytes of a request, after the header if there is one.
fn request(plan: &LoadPlan) -> Vec<u8> {
    let mut bytes = if plan.header { PROXY_HEADER.to_vec() } else { Vec::new() };
    bytes.resize(bytes.len() + plan.size, b'x');
    bytes
}

// === impl RequestLoop ===

impl RequestLoop {
    pub(super) fn new(plan: &LoadPlan, count: usize) -> RequestLoop {
        let down = || RequestSlot {
            socket: None,
            state: RequestState::Down,
            unsent: 0,
            awaited: 0,
            since: 0,
            both: false,
        };
        RequestLoop {
            slots: (0..count).map(|_| down()).collect(),
            request: request(plan).into(),
            buffer: vec![0; BUFFER].into(),
            waiting: 0,
            connecting: 0,
        }
    }

    /// Connects `slot`, and sends its request if the mode sends one per connection or
    /// the measured time has begun.
    fn open(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        let (socket, how_far) = match thread.dialer.dial() {
            Ok(dialled) => dialled,
            Err(error) => return thread.lost(slot, LoadErrorKind::of_connect(&error)),
        };
        let conn = &mut self.slots[slot as usize];
        conn.since = thread.at();
        conn.state = RequestState::Connecting;
        (conn.unsent, conn.awaited) = (0, 0);
        conn.socket = Some(socket);
        let sends = self.sends_immediately(thread);
        if sends {
            self.prepare_request(thread, slot);
        }
        // A loopback connect reports "in progress" although it is complete when it
        // returns. Most requests can therefore be sent before the socket is watched.
        let failed = match self.advance(thread, slot) {
            Ok(()) => None,
            Err(error) if self.slots[slot as usize].state == RequestState::Connecting => {
                Some(LoadErrorKind::of_connect(&error))
            }
            Err(error) => Some(LoadErrorKind::of_transfer(&error)),
        };
        if let Some(kind) = failed {
            return self.lose(thread, slot, kind);
        }
        let conn = &mut self.slots[slot as usize];
        if how_far == Connecting::Done && !sends {
            conn.state = RequestState::Idle;
        }
        conn.both = conn.state == RequestState::Connecting || conn.unsent > 0;
        let interest = if conn.both { EpollInterest::Both } else { EpollInterest::EdgeReadable };
        let socket = conn.socket.as_ref().expect("it was put there above");
        if let Err(error) = thread.epoll.watch_for(socket, slot.into(), interest) {
            return self.lose(thread, slot, LoadErrorKind::of_connect(&error));
        }
        if conn.state != RequestState::Connecting {
            self.connected(thread, slot);
        }
    }

    /// Returns whether a connection sends its request as soon as possible.
    fn sends_immediately(&self, thread: &LoadThread<'_>) -> bool {
        match thread.plan.mode {
            LoadMode::PingPong => thread.phase == LoadPhase::Timed,
            _ => !self.request.is_empty(),
        }
    }

    /// Sets the counters of the slot to a whole request and answer.
    fn prepare_request(&mut self, thread: &LoadThread<'_>, slot: u32) {
        let conn = &mut self.slots[slot as usize];
        conn.unsent = self.request.len();
        conn.awaited = thread.plan.answer;
    }

    /// Sends as much of the request as the socket accepts.
    fn advance(&mut self, thread: &mut LoadThread<'_>, slot: u32) -> io::Result<()> {
        let conn = &mut self.slots[slot as usize];
        let Some(socket) = &conn.socket else { return Ok(()) };
        while conn.unsent > 0 {
            match stream::send(socket, &self.request[self.request.len() - conn.unsent..]) {
                Ok(sent) => {
                    conn.unsent -= sent;
                    conn.state = RequestState::Waiting;
                    if thread.phase == LoadPhase::Timed {
                        thread.report.bytes_out += sent as u64;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Counts an established connection and continues with its mode.
    fn connected(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        thread.opened();
        self.settled(thread);
        if self.slots[slot as usize].state == RequestState::Idle {
            self.idle(thread, slot);
        }
    }

    /// Counts a connect of the setup as complete or failed, so that the next can start.
    fn settled(&mut self, thread: &mut LoadThread<'_>) {
        if thread.phase == LoadPhase::Setup {
            self.connecting = self.connecting.saturating_sub(1);
        }
    }

    /// Continues a connection without an open request, depending on the mode.
    fn idle(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        self.slots[slot as usize].state = RequestState::Idle;
        match thread.plan.mode {
            LoadMode::PingPong if thread.phase == LoadPhase::Timed => {
                self.send_request(thread, slot)
            }
            LoadMode::Churn { lifetime, .. } => {
                let end = thread.at() + exponential(lifetime, fastrand::f64());
                thread.wake(slot, end);
            }
            LoadMode::Short(close) => {
                self.close(thread, slot, close);
                if thread.phase == LoadPhase::Timed {
                    self.open(thread, slot);
                }
            }
            _ => {}
        }
    }

    /// Sends the next request on an established connection.
    fn send_request(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        self.prepare_request(thread, slot);
        let conn = &mut self.slots[slot as usize];
        conn.since = thread.at();
        conn.state = RequestState::Waiting;
        let result = self.advance(thread, slot).and_then(|()| self.watch_writable(thread, slot));
        if let Err(error) = result {
            self.lose(thread, slot, LoadErrorKind::of_transfer(&error));
        }
    }

    /// Watches the socket for writability if part of the request is unsent.
    fn watch_writable(&mut self, thread: &LoadThread<'_>, slot: u32) -> io::Result<()> {
        let conn = &mut self.slots[slot as usize];
        if conn.unsent > 0 && !conn.both {
            conn.both = true;
            if let Some(socket) = &conn.socket {
                thread.epoll.change(socket, slot.into(), EpollInterest::Both)?;
            }
        }
        Ok(())
    }

    /// Receives all available bytes.
    fn receive(&mut self, thread: &mut LoadThread<'_>, slot: u32, thorough: bool) {
        loop {
            let conn = &mut self.slots[slot as usize];
            let Some(socket) = &conn.socket else { return };
            let received = match stream::receive(socket, &mut self.buffer) {
                Ok(0) => return self.lose(thread, slot, LoadErrorKind::Closed),
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.lose(thread, slot, LoadErrorKind::of_transfer(&error)),
            };
            if thread.phase == LoadPhase::Timed {
                thread.report.bytes_in += received as u64;
            }
            if received > conn.awaited {
                return self.lose(thread, slot, LoadErrorKind::Excess);
            }
            conn.awaited -= received;
            let answered = conn.awaited == 0;
            if answered {
                self.answered(thread, slot);
            }
            // A full buffer can leave bytes in the socket. A closed socket must be read
            // until the read returns 0. After an answer, the slot of a short connection
            // already holds another connection.
            let more = received == self.buffer.len() || thorough;
            if !more || (answered && matches!(thread.plan.mode, LoadMode::Short(_))) {
                return;
            }
        }
    }

    fn answered(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        let now = thread.tick();
        match thread.phase {
            LoadPhase::Timed => {
                thread.report.requests += 1;
                thread.report.record(now - self.slots[slot as usize].since);
            }
            LoadPhase::Grace => thread.report.late += 1,
            LoadPhase::Setup => {}
        }
        self.idle(thread, slot);
    }

    fn close(&mut self, thread: &mut LoadThread<'_>, slot: u32, how: CloseMode) {
        let conn = &mut self.slots[slot as usize];
        conn.state = RequestState::Down;
        let Some(socket) = conn.socket.take() else { return };
        thread.open -= 1;
        match how {
            CloseMode::Fin => drop(socket),
            CloseMode::Reset => stream::reset(socket),
        }
    }

    /// Removes a connection that was lost or never established.
    fn lose(&mut self, thread: &mut LoadThread<'_>, slot: u32, kind: LoadErrorKind) {
        let conn = &mut self.slots[slot as usize];
        let state = std::mem::replace(&mut conn.state, RequestState::Down);
        conn.socket = None;
        match state {
            RequestState::Connecting => self.settled(thread),
            RequestState::Waiting | RequestState::Idle => {
                thread.open = thread.open.saturating_sub(1)
            }
            RequestState::Down => {}
        }
        thread.lost(slot, kind);
    }

    fn dial_waiting(&mut self, thread: &mut LoadThread<'_>) {
        while self.waiting > 0 && self.connecting < CONNECTING_MAX {
            let slot = self.slots.len() - self.waiting;
            self.waiting -= 1;
            self.connecting += 1;
            self.open(thread, slot as u32);
            // The connect failed immediately.
            if self.slots[slot].state == RequestState::Down {
                self.connecting = self.connecting.saturating_sub(1);
            }
        }
    }
}

impl ModeLoop for RequestLoop {
    fn prepare(&mut self, thread: &mut LoadThread<'_>) -> io::Result<()> {
        if !matches!(thread.plan.mode, LoadMode::Short(_)) {
            self.waiting = self.slots.len();
            self.dial_waiting(thread);
        }
        Ok(())
    }

    fn prepared(&self) -> bool {
        let out = |slot: &&RequestSlot| {
            matches!(slot.state, RequestState::Connecting | RequestState::Waiting)
        };
        self.waiting == 0 && !self.slots.iter().any(|slot| out(&slot))
    }

    fn begin(&mut self, thread: &mut LoadThread<'_>) {
        for slot in 0..self.slots.len() as u32 {
            match (thread.plan.mode, self.slots[slot as usize].state) {
                (LoadMode::PingPong, RequestState::Idle) => self.send_request(thread, slot),
                (LoadMode::Short(_), RequestState::Down) => self.open(thread, slot),
                _ => {}
            }
        }
    }

    fn ready(&mut self, thread: &mut LoadThread<'_>, readiness: EpollEvent) {
        let slot = readiness.token as u32;
        if self.slots[slot as usize].state == RequestState::Connecting {
            if !readiness.writable && !readiness.hang_up {
                return;
            }
            let socket = self.slots[slot as usize].socket.as_ref();
            if let Some(Err(error)) = socket.map(stream::connect_result) {
                return self.lose(thread, slot, LoadErrorKind::of_connect(&error));
            }
            let sends = self.slots[slot as usize].unsent > 0;
            self.slots[slot as usize].state =
                if sends { RequestState::Waiting } else { RequestState::Idle };
            self.connected(thread, slot);
        }
        if readiness.writable
            && self.slots[slot as usize].unsent > 0
            && let Err(error) = self.advance(thread, slot)
        {
            return self.lose(thread, slot, LoadErrorKind::of_transfer(&error));
        }
        if readiness.readable {
            self.receive(thread, slot, readiness.hang_up);
        }
        if thread.phase == LoadPhase::Setup {
            self.dial_waiting(thread);
        }
    }

    fn due(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        if thread.phase == LoadPhase::Grace {
            return;
        }
        let state = self.slots[slot as usize].state;
        match thread.plan.mode {
            LoadMode::Churn { close, .. } if state == RequestState::Idle => {
                self.close(thread, slot, close);
                self.open(thread, slot);
            }
            _ if state == RequestState::Down => self.open(thread, slot),
            _ => {}
        }
    }

    fn unanswered(&self) -> u64 {
        self.slots.iter().filter(|slot| slot.state == RequestState::Waiting).count() as u64
    }
}

/// Returns a random value of the exponential distribution with this mean. `uniform` is
/// from [0, 1). Inverse transform: -mean * ln(1 - u).
fn exponential(mean: Duration, uniform: f64) -> Nanos {
    (mean.as_nanos() as f64 * -(1.0 - uniform).ln()) as Nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_lifetimes_have_the_given_mean() {
        let mut random = fastrand::Rng::with_seed(7);
        let mean = Duration::from_millis(20);
        let sum: u64 = (0..20_000).map(|_| exponential(mean, random.f64())).sum();
        let measured = sum / 20_000;
        assert!((19_000_000..21_000_000).contains(&measured), "{measured} ns");
    }
}
