//! The fake kernel's epoll set: edge-triggered, and told in any order.
//!
//! One a thread. As in Linux, what is reported is how the socket stands when it
//! is asked for, not when it changed.

use super::{InjectedFault, SimCall, SimKernel};
use rustix::event::epoll::{Event, EventData, EventFlags};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

#[derive(Debug, Default)]
pub(super) struct SimEpoll {
    /// Becomes readable when something is ready; who waits on the set waits on
    /// this.
    bell: Option<RawFd>,
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
        if let Some(bell) = self.bell {
            ring(bell);
        }
    }

    pub(super) fn forget(&mut self, id: usize) {
        self.watched.remove(&id);
    }
}

/// Makes an eventfd readable.
pub(super) fn ring(bell: RawFd) {
    // SAFETY: the descriptor is that of an eventfd that lives as long as the
    // engine that made it, and the engine as long as it is rung; borrowing it
    // for one write touches no memory.
    #[allow(unsafe_code)]
    let bell = unsafe { BorrowedFd::borrow_raw(bell) };
    // A full counter is readable, too.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

/// An eventfd.
pub(super) fn bell() -> io::Result<OwnedFd> {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    Ok(rustix::event::eventfd(0, flags)?)
}

// === impl SimKernel ===

impl SimKernel {
    pub(super) fn epoll_create(&mut self) -> io::Result<OwnedFd> {
        let own = bell()?;
        self.set.bell = Some(own.as_raw_fd());
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

    /// How the socket stands, as far as it is watched for.
    fn flags(&self, id: usize) -> EventFlags {
        let Some(watched) = self.set.watched.get(&id) else { return EventFlags::empty() };
        let always = EventFlags::ERR | EventFlags::HUP;
        EventFlags::from_bits_truncate(self.sockets[id].ready()) & (watched.interest | always)
    }

    pub(super) fn epoll_wait(&mut self, most: usize) -> io::Result<Vec<Event>> {
        if let Some(InjectedFault::Errno(errno)) = self.fault(SimCall::Wait, None) {
            // Nothing is taken, and nothing lost.
            if let Some(bell) = self.set.bell {
                ring(bell);
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
