//! The epoll set of the fake kernel: edge-triggered, with events in random order.
//!
//! One per thread. As in Linux, an event has the state of the socket at the wait, not at
//! the change. It never changes a socket.

use super::{InjectedFault, SimCall, SimKernel};
use rustix::event::epoll::{Event, EventData, EventFlags};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

#[derive(Debug, Default)]
pub(super) struct SimEpoll {
    /// The eventfd of the set. It becomes readable when a socket is ready.
    eventfd: Option<RawFd>,
    watched: BTreeMap<usize, SimWatch>,
}

#[derive(Debug)]
struct SimWatch {
    token: u64,
    interest: EventFlags,
    edge: bool,
}

// === impl SimEpoll ===

impl SimEpoll {
    pub(super) fn wake(&mut self, id: usize) {
        let Some(watched) = self.watched.get_mut(&id) else { return };
        watched.edge = true;
        if let Some(eventfd) = self.eventfd {
            signal(eventfd);
        }
    }

    pub(super) fn forget(&mut self, id: usize) {
        self.watched.remove(&id);
    }
}

/// Makes an eventfd readable.
pub(super) fn signal(eventfd: RawFd) {
    // SAFETY: the engine that made the eventfd keeps it open, and the engine exists as
    // long as the fake kernel signals it. The borrow lasts for one write.
    #[allow(unsafe_code)]
    let eventfd = unsafe { BorrowedFd::borrow_raw(eventfd) };
    // If the counter is full, the eventfd is already readable.
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}

/// Makes an eventfd.
pub(super) fn eventfd() -> io::Result<OwnedFd> {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    Ok(rustix::event::eventfd(0, flags)?)
}

// === impl SimKernel ===

impl SimKernel {
    pub(super) fn epoll_create(&mut self) -> io::Result<OwnedFd> {
        let own = eventfd()?;
        self.set.eventfd = Some(own.as_raw_fd());
        Ok(own)
    }

    pub(super) fn epoll_watch(
        &mut self,
        id: usize,
        token: u64,
        interest: EventFlags,
    ) -> io::Result<()> {
        if let Some(InjectedFault::Errno(errno)) = self.fault(SimCall::Watch, Some(id)) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.set.watched.insert(id, SimWatch { token, interest, edge: false });
        if !self.flags(id).is_empty() {
            self.set.wake(id);
        }
        Ok(())
    }

    /// Returns the state of the socket, limited to the watched events.
    fn flags(&self, id: usize) -> EventFlags {
        let Some(watched) = self.set.watched.get(&id) else { return EventFlags::empty() };
        let always = EventFlags::ERR | EventFlags::HUP;
        EventFlags::from_bits_truncate(self.sockets[id].ready()) & (watched.interest | always)
    }

    pub(super) fn epoll_wait(&mut self, most: usize) -> io::Result<Vec<Event>> {
        if let Some(InjectedFault::Errno(errno)) = self.fault(SimCall::Wait, None) {
            // The events stay pending, so the eventfd must stay readable.
            if let Some(eventfd) = self.set.eventfd {
                signal(eventfd);
            }
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.note_closed();
        let ids = self.set.watched.iter().filter(|(_, watched)| watched.edge).map(|(id, _)| *id);
        let mut ids: Vec<usize> = ids.collect();
        self.rng.shuffle(&mut ids);
        let mut events = Vec::new();
        for id in ids.into_iter().take(most) {
            let flags = self.flags(id);
            let Some(watched) = self.set.watched.get_mut(&id) else { continue };
            watched.edge = false;
            if !flags.is_empty() {
                events.push(Event { flags, data: EventData::new_u64(watched.token) });
            }
        }
        self.note(events.len());
        Ok(events)
    }
}
