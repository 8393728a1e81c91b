//! Continuous streams: each connection only sends, or only receives.
//!
//! Driven by `thread`. Received bytes are discarded inside the kernel, to keep the cost
//! of the generator low.

use super::plan::{LoadMode, LoadPlan};
use crate::load::report::LoadErrorKind;
use crate::load::thread::{LoadPhase, LoadThread, ModeLoop};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use tidegate_net::epoll::{EpollEvent, EpollInterest};
use tidegate_net::stream::{self, Connecting};

/// Bytes after which one socket's turn ends, so that other sockets are served.
pub(super) const TURN_BYTES: usize = 256 * 1024;

/// The loop of these modes.
#[derive(Debug)]
pub(super) struct StreamLoop {
    slots: Vec<StreamSlot>,
    /// Bytes to send, or the buffer of the discarding receive.
    buffer: Box<[u8]>,
    sends: bool,
}

#[derive(Debug, Default)]
struct StreamSlot {
    socket: Option<OwnedFd>,
    connected: bool,
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

    fn open(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        let dialled = thread.dialer.dial().and_then(|(socket, how_far)| {
            // A pending connect is complete when the socket becomes writable.
            let interest = match how_far {
                Connecting::Done => self.interest(thread),
                Connecting::Pending => EpollInterest::WhileWritable,
            };
            thread.epoll.watch_for(&socket, slot.into(), interest)?;
            Ok((socket, how_far))
        });
        match dialled {
            Ok((socket, how_far)) => {
                let connected = how_far == Connecting::Done;
                self.slots[slot as usize] = StreamSlot { socket: Some(socket), connected };
                if connected {
                    thread.opened();
                }
            }
            Err(error) => thread.lost(slot, LoadErrorKind::of_connect(&error)),
        }
    }

    /// Before the measured time only hang-ups are relevant.
    fn interest(&self, thread: &LoadThread<'_>) -> EpollInterest {
        match (thread.phase, self.sends) {
            (LoadPhase::Setup, _) => EpollInterest::EdgeReadable,
            (_, true) => EpollInterest::WhileWritable,
            (_, false) => EpollInterest::WhileReadable,
        }
    }

    fn connected(&mut self, thread: &mut LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let conn = &mut self.slots[slot as usize];
        let Some(socket) = &conn.socket else { return Ok(()) };
        stream::connect_result(socket).map_err(|error| LoadErrorKind::of_connect(&error))?;
        conn.connected = true;
        thread.opened();
        self.rewatch(thread, slot)
    }

    fn rewatch(&self, thread: &LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let Some(socket) = &self.slots[slot as usize].socket else { return Ok(()) };
        let changed = thread.epoll.change(socket, slot.into(), self.interest(thread));
        changed.map_err(|error| LoadErrorKind::of_transfer(&error))
    }

    fn send(&mut self, thread: &mut LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let Some(socket) = &self.slots[slot as usize].socket else { return Ok(()) };
        let mut turn = 0;
        while turn < TURN_BYTES {
            match stream::send(socket, &self.buffer) {
                Ok(sent) => {
                    turn += sent;
                    thread.report.bytes_out += sent as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(LoadErrorKind::of_transfer(&error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self, thread: &mut LoadThread<'_>, slot: u32) -> Result<(), LoadErrorKind> {
        let Some(socket) = &self.slots[slot as usize].socket else { return Ok(()) };
        match stream::discard(socket, &mut self.buffer) {
            Ok(0) => return Err(LoadErrorKind::Closed),
            Ok(taken) => thread.report.bytes_in += taken as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(LoadErrorKind::of_transfer(&error)),
        }
        Ok(())
    }

    /// Returns why a connection ended after a hang-up. A FIN without an error also
    /// counts as the end.
    fn ended(&self, slot: u32) -> LoadErrorKind {
        match self.slots[slot as usize].socket.as_ref().map(stream::connect_result) {
            Some(Err(error)) => LoadErrorKind::of_transfer(&error),
            _ => LoadErrorKind::Closed,
        }
    }

    fn lose(&mut self, thread: &mut LoadThread<'_>, slot: u32, kind: LoadErrorKind) {
        let conn = std::mem::take(&mut self.slots[slot as usize]);
        thread.open -= u64::from(conn.connected);
        thread.lost(slot, kind);
    }

    fn handle(
        &mut self,
        thread: &mut LoadThread<'_>,
        readiness: EpollEvent,
    ) -> Result<(), LoadErrorKind> {
        let slot = readiness.token as u32;
        if !self.slots[slot as usize].connected {
            return self.connected(thread, slot);
        }
        match (thread.phase, self.sends) {
            (LoadPhase::Timed, true) if readiness.hang_up => Err(self.ended(slot)),
            (LoadPhase::Timed, true) => self.send(thread, slot),
            (LoadPhase::Timed, false) => self.receive(thread, slot),
            _ if readiness.failed => Err(self.ended(slot)),
            _ => Ok(()),
        }
    }
}

impl ModeLoop for StreamLoop {
    fn prepare(&mut self, thread: &mut LoadThread<'_>) -> io::Result<()> {
        // Streams are few. With thousands of them, the kernel retransmits what the
        // target's listen queue drops.
        for slot in 0..self.slots.len() as u32 {
            self.open(thread, slot);
        }
        Ok(())
    }

    fn prepared(&self) -> bool {
        self.slots.iter().all(|slot| slot.connected || slot.socket.is_none())
    }

    fn begin(&mut self, thread: &mut LoadThread<'_>) {
        for slot in 0..self.slots.len() as u32 {
            if self.slots[slot as usize].connected
                && let Err(kind) = self.rewatch(thread, slot)
            {
                self.lose(thread, slot, kind);
            }
        }
    }

    fn ready(&mut self, thread: &mut LoadThread<'_>, readiness: EpollEvent) {
        if let Err(kind) = self.handle(thread, readiness) {
            self.lose(thread, readiness.token as u32, kind);
        }
    }

    fn due(&mut self, thread: &mut LoadThread<'_>, slot: u32) {
        if self.slots[slot as usize].socket.is_none() && thread.phase != LoadPhase::Grace {
            self.open(thread, slot);
        }
    }

    fn unanswered(&self) -> u64 {
        0
    }

    /// Subtracts the bytes in the local send queues: only bytes that reached the peer's
    /// kernel count as sent.
    fn end(&mut self, thread: &mut LoadThread<'_>) {
        if self.sends {
            let queued: u64 = self
                .slots
                .iter()
                .filter_map(|s| s.socket.as_ref())
                .map(stream::unacknowledged)
                .sum();
            thread.report.bytes_out = thread.report.bytes_out.saturating_sub(queued);
        }
    }
}
