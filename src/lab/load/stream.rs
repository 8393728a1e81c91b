//! Streams without end: each connection only sends, or only receives.
//!
//! Driven by `lane`. What is received is thrown away inside the kernel, so that
//! the generator costs as little as it can.

use super::plan::{LoadMode, LoadPlan};
use crate::load::report::LoadErrorKind;
use crate::load::thread::{LoadPhase, LoadThread, ModeLoop};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use tidegate_net::epoll::{EpollEvent, EpollInterest};
use tidegate_net::stream::{self, Connecting};

/// One socket's turn ends after this much: the others wait.
pub(super) const TURN_BYTES: usize = 256 * 1024;

/// The loop.
#[derive(Debug)]
pub(super) struct StreamLoop {
    slots: Vec<StreamSlot>,
    /// What is sent, or where the discarded is not put.
    buffer: Box<[u8]>,
    sends: bool,
}

#[derive(Debug, Default)]
struct StreamSlot {
    socket: Option<OwnedFd>,
    stands: bool,
}

// === impl StreamLoop ===

impl StreamLoop {
    pub(super) fn new(plan: &LoadPlan, count: usize) -> StreamLoop {
        let sends = plan.mode == LoadMode::Upload;
        let length = if sends { plan.size } else { TURN_BYTES };
        StreamLoop {
            slots: (0..count).map(|_| StreamSlot::default()).collect(),
            buffer: vec![b'x'; length].into(),
            sends,
        }
    }

    fn open(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        let dialled = lane.dialer.dial().and_then(|(socket, how_far)| {
            // Until it stands: room to send is how that shows.
            let interest = match how_far {
                Connecting::Done => self.interest(lane),
                Connecting::Pending => EpollInterest::WhileWritable,
            };
            lane.epoll.watch_for(&socket, slot.into(), interest)?;
            Ok((socket, how_far))
        });
        match dialled {
            Ok((socket, how_far)) => {
                let stands = how_far == Connecting::Done;
                self.slots[slot as usize] = StreamSlot { socket: Some(socket), stands };
                if stands {
                    lane.opened();
                }
            }
            Err(error) => lane.lost(slot, LoadErrorKind::of_connect(&error)),
        }
    }

    /// Before the measured time only hang-ups are of interest.
    fn interest(&self, lane: &LoadThread<'_>) -> EpollInterest {
        match (lane.phase, self.sends) {
            (LoadPhase::Setup, _) => EpollInterest::EdgeReadable,
            (_, true) => EpollInterest::WhileWritable,
            (_, false) => EpollInterest::WhileReadable,
        }
    }

    fn connected(&mut self, lane: &mut LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let place = &mut self.slots[slot as usize];
        let Some(socket) = &place.socket else { return Ok(()) };
        stream::connect_result(socket).map_err(|error| LoadErrorKind::of_connect(&error))?;
        place.stands = true;
        lane.opened();
        self.rewatch(lane, slot)
    }

    fn rewatch(&self, lane: &LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let Some(socket) = &self.slots[slot as usize].socket else { return Ok(()) };
        let changed = lane.epoll.change(socket, slot.into(), self.interest(lane));
        changed.map_err(|error| LoadErrorKind::of_transfer(&error))
    }

    fn send(&mut self, lane: &mut LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let Some(socket) = &self.slots[slot as usize].socket else { return Ok(()) };
        let mut turn = 0;
        while turn < TURN_BYTES {
            match stream::send(socket, &self.buffer) {
                Ok(sent) => {
                    turn += sent;
                    lane.report.bytes_out += sent as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(LoadErrorKind::of_transfer(&error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self, lane: &mut LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let Some(socket) = &self.slots[slot as usize].socket else { return Ok(()) };
        match stream::discard(socket, &mut self.buffer) {
            Ok(0) => return Err(LoadErrorKind::Closed),
            Ok(taken) => lane.report.bytes_in += taken as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(LoadErrorKind::of_transfer(&error)),
        }
        Ok(())
    }

    /// What a sender learns from a hang-up: a FIN alone is the peer's half
    /// being done, and is taken for the end as well.
    fn ended(&self, slot: u32) -> LoadErrorKind {
        match self.slots[slot as usize].socket.as_ref().map(stream::connect_result) {
            Some(Err(error)) => LoadErrorKind::of_transfer(&error),
            _ => LoadErrorKind::Closed,
        }
    }

    fn lose(&mut self, lane: &mut LoadThread<'_>, slot: u32, kind: LoadErrorKind) {
        let place = std::mem::take(&mut self.slots[slot as usize]);
        lane.open -= u64::from(place.stands);
        lane.lost(slot, kind);
    }

    fn handle(
        &mut self,
        lane: &mut LoadThread<'_>,
        readiness: EpollEvent,
    ) -> Result<(), LoadErrorKind> {
        let slot = readiness.token as u32;
        if !self.slots[slot as usize].stands {
            return self.connected(lane, slot);
        }
        match (lane.phase, self.sends) {
            (LoadPhase::Timed, true) if readiness.hang_up => Err(self.ended(slot)),
            (LoadPhase::Timed, true) => self.send(lane, slot),
            (LoadPhase::Timed, false) => self.receive(lane, slot),
            _ if readiness.failed => Err(self.ended(slot)),
            _ => Ok(()),
        }
    }
}

impl ModeLoop for StreamLoop {
    fn prepare(&mut self, lane: &mut LoadThread<'_>) -> io::Result<()> {
        // Streams are few. Should there be thousands, what the target's accept
        // queue drops is sent again by the kernel.
        for slot in 0..self.slots.len() as u32 {
            self.open(lane, slot);
        }
        Ok(())
    }

    fn prepared(&self) -> bool {
        self.slots.iter().all(|slot| slot.stands || slot.socket.is_none())
    }

    fn begin(&mut self, lane: &mut LoadThread<'_>) {
        for slot in 0..self.slots.len() as u32 {
            if self.slots[slot as usize].stands
                && let Err(kind) = self.rewatch(lane, slot)
            {
                self.lose(lane, slot, kind);
            }
        }
    }

    fn ready(&mut self, lane: &mut LoadThread<'_>, readiness: EpollEvent) {
        if let Err(kind) = self.handle(lane, readiness) {
            self.lose(lane, readiness.token as u32, kind);
        }
    }

    fn due(&mut self, lane: &mut LoadThread<'_>, slot: u32) {
        if self.slots[slot as usize].socket.is_none() && lane.phase != LoadPhase::Grace {
            self.open(lane, slot);
        }
    }

    fn unanswered(&self) -> u64 {
        0
    }

    /// Sent is what has reached the peer's kernel, not what waits in ours.
    fn end(&mut self, lane: &mut LoadThread<'_>) {
        if self.sends {
            let queued: u64 = self
                .slots
                .iter()
                .filter_map(|s| s.socket.as_ref())
                .map(stream::unacknowledged)
                .sum();
            lane.report.bytes_out = lane.report.bytes_out.saturating_sub(queued);
        }
    }
}
