//! Requests and answers one at a time on each connection: ping-pong, short
//! connections, held and churning ones.
//!
//! Driven by `lane`. A connection has at most one request out; content is never
//! looked at, only counted.

use super::plan::{CloseMode, LoadMode, LoadPlan};
use crate::load::report::LoadErrorKind;
use crate::load::thread::{BUFFER, CONNECTING_MAX, LoadPhase, LoadThread, ModeLoop, Nanos};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tidegate_net::epoll::{EpollEvent, EpollInterest};
use tidegate_net::stream::{self, Connecting};

/// The loop.
#[derive(Debug)]
pub(super) struct RequestLoop {
    slots: Vec<RequestSlot>,
    request: Box<[u8]>,
    buffer: Box<[u8]>,
    /// Slots not yet dialled during set-up.
    waiting: usize,
    /// Slots whose first connection is under way.
    connecting: usize,
}

#[derive(Debug)]
struct RequestSlot {
    socket: Option<OwnedFd>,
    state: RequestState,
    /// Bytes of the request yet to be sent.
    owed: usize,
    /// Bytes of the answer yet to come.
    awaited: usize,
    /// When the request was sent; with a connection for each, when it was
    /// dialled.
    since: Nanos,
    /// Watched for room to send as well.
    both: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestState {
    /// Nothing there: not yet, or until it is tried again.
    Down,
    /// Not known to stand.
    Connecting,
    /// A request is out.
    Asking,
    /// Stands, with nothing out.
    Resting,
}

// === impl RequestLoop ===

impl RequestLoop {
    pub(super) fn new(plan: &LoadPlan, count: usize) -> RequestLoop {
        let down = || RequestSlot {
            socket: None,
            state: RequestState::Down,
            owed: 0,
            awaited: 0,
            since: 0,
            both: false,
        };
        RequestLoop {
            slots: (0..count).map(|_| down()).collect(),
            request: vec![b'x'; plan.size].into(),
            buffer: vec![0; BUFFER].into(),
            waiting: 0,
            connecting: 0,
        }
    }

    /// Makes the connection of `slot` and, where the mode asks on each or the
    /// measured time has begun, its request.
    fn open(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        let (socket, how_far) = match lane.dialer.dial() {
            Ok(dialled) => dialled,
            Err(error) => return lane.lost(slot, LoadErrorKind::of_connect(&error)),
        };
        let place = &mut self.slots[slot as usize];
        place.since = lane.at();
        place.state = RequestState::Connecting;
        (place.owed, place.awaited) = (0, 0);
        place.socket = Some(socket);
        let asks = self.asks_at_once(lane);
        if asks {
            self.owe(lane, slot);
        }
        // A loopback connect is "in progress" and yet done by the time it
        // returns: most requests go out at once, before anything is watched.
        let failed = match self.advance(lane, slot) {
            Ok(()) => None,
            Err(error) if self.slots[slot as usize].state == RequestState::Connecting => {
                Some(LoadErrorKind::of_connect(&error))
            }
            Err(error) => Some(LoadErrorKind::of_transfer(&error)),
        };
        if let Some(kind) = failed {
            return self.lose(lane, slot, kind);
        }
        let place = &mut self.slots[slot as usize];
        if how_far == Connecting::Done && !asks {
            place.state = RequestState::Resting;
        }
        place.both = place.state == RequestState::Connecting || place.owed > 0;
        let interest = if place.both { EpollInterest::Both } else { EpollInterest::EdgeReadable };
        let socket = place.socket.as_ref().expect("it was put there above");
        if let Err(error) = lane.epoll.watch_for(socket, slot.into(), interest) {
            return self.lose(lane, slot, LoadErrorKind::of_connect(&error));
        }
        if place.state != RequestState::Connecting {
            self.stands(lane, slot);
        }
    }

    /// Whether a connection sends its request as soon as it can.
    fn asks_at_once(&self, lane: &LoadThread<'_>) -> bool {
        match lane.plan.mode {
            LoadMode::PingPong => lane.phase == LoadPhase::Timed,
            _ => !self.request.is_empty(),
        }
    }

    /// Puts a whole request on the slot's bill.
    fn owe(&mut self, lane: &LoadThread<'_>, slot: u32) {
        let place = &mut self.slots[slot as usize];
        place.owed = self.request.len();
        place.awaited = lane.plan.answer;
    }

    /// Sends what is owed, as far as there is room.
    fn advance(&mut self, lane: &mut LoadThread<'_>, slot: u32) -> io::Result<()> {
        let place = &mut self.slots[slot as usize];
        let Some(socket) = &place.socket else { return Ok(()) };
        while place.owed > 0 {
            match stream::send(socket, &self.request[self.request.len() - place.owed..]) {
                Ok(sent) => {
                    place.owed -= sent;
                    place.state = RequestState::Asking;
                    if lane.phase == LoadPhase::Timed {
                        lane.report.bytes_out += sent as u64;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A connection has been found to stand.
    fn stands(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        lane.opened();
        self.settled(lane);
        if self.slots[slot as usize].state == RequestState::Resting {
            self.rest(lane, slot);
        }
    }

    /// One of the connections of the set-up is decided; the next may start.
    fn settled(&mut self, lane: &mut LoadThread<'_>) {
        if lane.phase == LoadPhase::Setup {
            self.connecting = self.connecting.saturating_sub(1);
        }
    }

    /// Nothing is out on the connection; what the mode does then.
    fn rest(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        self.slots[slot as usize].state = RequestState::Resting;
        match lane.plan.mode {
            LoadMode::PingPong if lane.phase == LoadPhase::Timed => self.ask(lane, slot),
            LoadMode::Churn { lifetime, .. } => {
                let end = lane.at() + exponential(lifetime, fastrand::f64());
                lane.wake(slot, end);
            }
            LoadMode::Short(close) => {
                self.close(lane, slot, close);
                if lane.phase == LoadPhase::Timed {
                    self.open(lane, slot);
                }
            }
            _ => {}
        }
    }

    /// The next request on a connection that stands.
    fn ask(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        self.owe(lane, slot);
        let place = &mut self.slots[slot as usize];
        place.since = lane.at();
        place.state = RequestState::Asking;
        let result = self.advance(lane, slot).and_then(|()| self.want_room(lane, slot));
        if let Err(error) = result {
            self.lose(lane, slot, LoadErrorKind::of_transfer(&error));
        }
    }

    /// Has the rest of a request sent when there is room.
    fn want_room(&mut self, lane: &LoadThread<'_>, slot: u32) -> io::Result<()> {
        let place = &mut self.slots[slot as usize];
        if place.owed > 0 && !place.both {
            place.both = true;
            if let Some(socket) = &place.socket {
                lane.epoll.change(socket, slot.into(), EpollInterest::Both)?;
            }
        }
        Ok(())
    }

    /// Takes what has come, to the last byte there is.
    fn receive(&mut self, lane: &mut LoadThread<'_>, slot: u32, thorough: bool) {
        loop {
            let place = &mut self.slots[slot as usize];
            let Some(socket) = &place.socket else { return };
            let received = match stream::receive(socket, &mut self.buffer) {
                Ok(0) => return self.lose(lane, slot, LoadErrorKind::Closed),
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.lose(lane, slot, LoadErrorKind::of_transfer(&error)),
            };
            if lane.phase == LoadPhase::Timed {
                lane.report.bytes_in += received as u64;
            }
            if received > place.awaited {
                return self.lose(lane, slot, LoadErrorKind::Excess);
            }
            place.awaited -= received;
            let answered = place.awaited == 0;
            if answered {
                self.answered(lane, slot);
            }
            // A full buffer may have left something behind; a closed socket
            // must be read until it says so; a short connection is another
            // one by now.
            let more = received == self.buffer.len() || thorough;
            if !more || (answered && matches!(lane.plan.mode, LoadMode::Short(_))) {
                return;
            }
        }
    }

    fn answered(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        let now = lane.tick();
        match lane.phase {
            LoadPhase::Timed => {
                lane.report.requests += 1;
                lane.report.record(now - self.slots[slot as usize].since);
            }
            LoadPhase::Grace => lane.report.late += 1,
            LoadPhase::Setup => {}
        }
        self.rest(lane, slot);
    }

    fn close(&mut self, lane: &mut LoadThread<'_>, slot: u32, how: CloseMode) {
        let place = &mut self.slots[slot as usize];
        place.state = RequestState::Down;
        let Some(socket) = place.socket.take() else { return };
        lane.open -= 1;
        match how {
            CloseMode::Fin => drop(socket),
            CloseMode::Reset => stream::reset(socket),
        }
    }

    /// The connection is gone, or never came to be.
    fn lose(&mut self, lane: &mut LoadThread<'_>, slot: u32, kind: LoadErrorKind) {
        let place = &mut self.slots[slot as usize];
        let state = std::mem::replace(&mut place.state, RequestState::Down);
        place.socket = None;
        match state {
            RequestState::Connecting => self.settled(lane),
            RequestState::Asking | RequestState::Resting => lane.open = lane.open.saturating_sub(1),
            RequestState::Down => {}
        }
        lane.lost(slot, kind);
    }

    fn dial_waiting(&mut self, lane: &mut LoadThread<'_>) {
        while self.waiting > 0 && self.connecting < CONNECTING_MAX {
            let slot = self.slots.len() - self.waiting;
            self.waiting -= 1;
            self.connecting += 1;
            self.open(lane, slot as u32);
            // One that could not even be dialled is decided.
            if self.slots[slot].state == RequestState::Down {
                self.connecting = self.connecting.saturating_sub(1);
            }
        }
    }
}

impl ModeLoop for RequestLoop {
    fn prepare(&mut self, lane: &mut LoadThread<'_>) -> io::Result<()> {
        if !matches!(lane.plan.mode, LoadMode::Short(_)) {
            self.waiting = self.slots.len();
            self.dial_waiting(lane);
        }
        Ok(())
    }

    fn prepared(&self) -> bool {
        let out = |slot: &&RequestSlot| {
            matches!(slot.state, RequestState::Connecting | RequestState::Asking)
        };
        self.waiting == 0 && !self.slots.iter().any(|slot| out(&slot))
    }

    fn begin(&mut self, lane: &mut LoadThread<'_>) {
        for slot in 0..self.slots.len() as u32 {
            match (lane.plan.mode, self.slots[slot as usize].state) {
                (LoadMode::PingPong, RequestState::Resting) => self.ask(lane, slot),
                (LoadMode::Short(_), RequestState::Down) => self.open(lane, slot),
                _ => {}
            }
        }
    }

    fn ready(&mut self, lane: &mut LoadThread<'_>, readiness: EpollEvent) {
        let slot = readiness.token as u32;
        if self.slots[slot as usize].state == RequestState::Connecting {
            if !readiness.writable && !readiness.hang_up {
                return;
            }
            let socket = self.slots[slot as usize].socket.as_ref();
            if let Some(Err(error)) = socket.map(stream::connect_result) {
                return self.lose(lane, slot, LoadErrorKind::of_connect(&error));
            }
            let asks = self.slots[slot as usize].owed > 0;
            self.slots[slot as usize].state =
                if asks { RequestState::Asking } else { RequestState::Resting };
            self.stands(lane, slot);
        }
        if readiness.writable
            && self.slots[slot as usize].owed > 0
            && let Err(error) = self.advance(lane, slot)
        {
            return self.lose(lane, slot, LoadErrorKind::of_transfer(&error));
        }
        if readiness.readable {
            self.receive(lane, slot, readiness.hang_up);
        }
        if lane.phase == LoadPhase::Setup {
            self.dial_waiting(lane);
        }
    }

    fn due(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        if lane.phase == LoadPhase::Grace {
            return;
        }
        let state = self.slots[slot as usize].state;
        match lane.plan.mode {
            LoadMode::Churn { close, .. } if state == RequestState::Resting => {
                self.close(lane, slot, close);
                self.open(lane, slot);
            }
            _ if state == RequestState::Down => self.open(lane, slot),
            _ => {}
        }
    }

    fn unanswered(&self) -> u64 {
        self.slots.iter().filter(|slot| slot.state == RequestState::Asking).count() as u64
    }
}

/// A span drawn from the exponential distribution with this mean; `uniform` is
/// from [0, 1). Inverse transform: -mean * ln(1 - u).
fn exponential(mean: Duration, uniform: f64) -> Nanos {
    (mean.as_nanos() as f64 * -(1.0 - uniform).ln()) as Nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_lifetimes_have_the_mean_that_was_asked_for() {
        let mut random = fastrand::Rng::with_seed(7);
        let mean = Duration::from_millis(20);
        let sum: u64 = (0..20_000).map(|_| exponential(mean, random.f64())).sum();
        let measured = sum / 20_000;
        assert!((19_000_000..21_000_000).contains(&measured), "{measured} ns");
    }
}
