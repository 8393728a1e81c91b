//! An epoll set, which the runtime of a worker can itself wait for.
//!
//! Used by the readiness engine (edge-triggered, one registration per socket) and by the
//! load generator, which waits on its own threads. Closing a socket removes it from its
//! set. It never closes a socket itself. See epoll(7), "edge-triggered".

use rustix::event::epoll;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

/// Most events of one wait. A larger batch uses more sockets than the cache holds: with
/// 512 busy sessions, 32 was 1.3 times as fast as 256.
pub const BATCH: usize = 32;

/// An epoll set.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

/// The events of one wait.
pub struct EpollBatch(Vec<epoll::Event>);

/// The conditions that a socket is watched for. Hang-ups are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EpollInterest {
    /// Readable, edge-triggered.
    EdgeReadable,
    /// Readable or writable, edge-triggered.
    Both,
    /// Readable, level-triggered.
    WhileReadable,
    /// Writable, level-triggered.
    WhileWritable,
}

/// The state of a socket as the kernel reported it.
#[derive(Debug, Clone, Copy)]
pub struct EpollEvent {
    /// The number given at registration.
    pub token: u64,
    /// A receive returns data, FIN or an error.
    pub readable: bool,
    /// A send has room or returns an error.
    pub writable: bool,
    /// The peer sent FIN, or the connection has failed. Reads must continue until one of
    /// them returns FIN or an error.
    pub hang_up: bool,
    /// The connection has failed.
    pub failed: bool,
    /// An urgent byte is in the stream, so a short read does not mean that the queue is
    /// empty.
    pub urgent: bool,
}

// === impl Epoll ===

impl Epoll {
    /// Makes an empty set.
    pub fn new() -> io::Result<Epoll> {
        #[cfg(any(test, feature = "fake"))]
        if let Some(created) = super::fake::epoll_create() {
            return created.map(Epoll);
        }
        Ok(Epoll(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `socket` for all events except writable, edge-triggered, until the socket
    /// is closed.
    ///
    /// A new socket is writable, so that event would have no use. If the socket is
    /// already watched, the token replaces the earlier one.
    pub fn watch(&self, socket: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        #[cfg(any(test, feature = "fake"))]
        if let Some(answer) = super::fake::epoll_watch(&socket, token, arrivals()) {
            return answer;
        }
        let data = epoll::EventData::new_u64(token);
        match epoll::add(&self.0, socket, data, arrivals()) {
            Err(rustix::io::Errno::EXIST) => epoll::modify(&self.0, socket, data, arrivals())?,
            added => added?,
        }
        Ok(())
    }

    /// Watches `socket` as [`Epoll::watch`] does, and for writable.
    pub fn watch_all(&self, socket: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let interest = arrivals() | epoll::EventFlags::OUT;
        #[cfg(any(test, feature = "fake"))]
        if let Some(answer) = super::fake::epoll_watch(&socket, token, interest) {
            return answer;
        }
        epoll::add(&self.0, socket, epoll::EventData::new_u64(token), interest)?;
        Ok(())
    }

    /// Adds writable to a `socket` of [`Epoll::watch`]. The kernel reports its current
    /// state again.
    pub fn watch_room(&self, socket: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let interest = arrivals() | epoll::EventFlags::OUT;
        #[cfg(any(test, feature = "fake"))]
        if let Some(answer) = super::fake::epoll_watch(&socket, token, interest) {
            return answer;
        }
        epoll::modify(&self.0, socket, epoll::EventData::new_u64(token), interest)?;
        Ok(())
    }

    /// Watches `socket` for `interest` until the socket is closed.
    pub fn watch_for(
        &self,
        socket: impl AsFd,
        token: u64,
        interest: EpollInterest,
    ) -> io::Result<()> {
        epoll::add(&self.0, socket, epoll::EventData::new_u64(token), interest.into())?;
        Ok(())
    }

    /// Changes the interest of a watched `socket`.
    pub fn change(&self, socket: impl AsFd, token: u64, interest: EpollInterest) -> io::Result<()> {
        epoll::modify(&self.0, socket, epoll::EventData::new_u64(token), interest.into())?;
        Ok(())
    }

    /// Returns at most [`BATCH`] ready sockets. Never waits.
    pub fn poll(&self, batch: &mut EpollBatch) -> io::Result<()> {
        self.wait(batch, Duration::ZERO)
    }

    /// Waits at most `timeout` for ready sockets. Returns at most [`BATCH`] of them.
    ///
    /// The timeout is rounded up to a millisecond. The call can return early without an
    /// event.
    pub fn wait(&self, batch: &mut EpollBatch, timeout: Duration) -> io::Result<()> {
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        batch.0.clear();
        #[cfg(any(test, feature = "fake"))]
        if let Some(events) = super::fake::epoll_wait(BATCH) {
            return match events {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
                events => {
                    batch.0.extend(events.into_iter().flatten());
                    Ok(())
                }
            };
        }
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut batch.0), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn arrivals() -> epoll::EventFlags {
    use epoll::EventFlags as E;
    E::IN | E::RDHUP | E::PRI | E::ET
}

impl AsRawFd for Epoll {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

// === impl Interest ===

impl From<EpollInterest> for epoll::EventFlags {
    fn from(interest: EpollInterest) -> epoll::EventFlags {
        use epoll::EventFlags as E;
        E::RDHUP
            | match interest {
                EpollInterest::EdgeReadable => E::IN | E::ET,
                EpollInterest::Both => E::IN | E::OUT | E::ET,
                EpollInterest::WhileReadable => E::IN,
                EpollInterest::WhileWritable => E::OUT,
            }
    }
}

// === impl EpollBatch ===

impl EpollBatch {
    /// Makes an empty batch with the capacity for [`BATCH`] events.
    pub fn new() -> EpollBatch {
        EpollBatch(Vec::with_capacity(BATCH))
    }

    /// Returns the number of events.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether no socket was ready.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the event at `index`, which must be below `len`.
    pub fn get(&self, index: usize) -> EpollEvent {
        use epoll::EventFlags as E;
        let event = self.0[index];
        let flags = event.flags;
        let failed = flags.intersects(E::ERR);
        let hang_up = flags.intersects(E::HUP | E::RDHUP | E::ERR);
        EpollEvent {
            token: event.data.u64(),
            readable: flags.intersects(E::IN) || hang_up,
            writable: flags.intersects(E::OUT) || failed,
            hang_up,
            failed,
            urgent: flags.intersects(E::PRI),
        }
    }
}

impl std::fmt::Debug for EpollBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Batch of {}", self.len())
    }
}

impl Default for EpollBatch {
    fn default() -> Self {
        EpollBatch::new()
    }
}
