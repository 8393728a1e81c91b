//! An epoll set of our own, edge-triggered, that can itself be awaited on the
//! worker's runtime.
//!
//! Used by the readiness engine: one registration a socket for its whole life.
//! The load generator, which has threads of its own to wait on, picks what each
//! socket is watched for. Closing a socket removes it from its set. See
//! epoll(7), "edge-triggered".

use rustix::event::epoll;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

/// Events taken by one wait. More would spread a batch over more sockets than
/// the cache holds: 32 measured 1.3 times as fast as 256 at 512 busy sessions.
pub const BATCH: usize = 32;

/// The set.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

/// Events of one wait.
pub struct EpollBatch(Vec<epoll::Event>);

/// What a socket is watched for, hang-ups apart, which are always told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EpollInterest {
    /// Something to receive, told once (edge-triggered).
    EdgeReadable,
    /// Something to receive or room to send, each told once (edge-triggered).
    Both,
    /// Something to receive, told until it is taken (level-triggered).
    WhileReadable,
    /// Room to send, told as long as there is some (level-triggered).
    WhileWritable,
}

/// What one socket reported.
#[derive(Debug, Clone, Copy)]
pub struct EpollEvent {
    /// The number given at registration.
    pub token: u64,
    /// There is something to receive (data, FIN or an error).
    pub readable: bool,
    /// There is room to send (or an error to learn of).
    pub writable: bool,
    /// The peer will send no more, or the connection is dead: reads must go on
    /// until they say so themselves.
    pub hang_up: bool,
    /// The connection has failed.
    pub failed: bool,
    /// An urgent byte is in the stream: short reads do not mean it is drained.
    pub urgent: bool,
}

// === impl Epoll ===

impl Epoll {
    /// An empty set.
    pub fn new() -> io::Result<Epoll> {
        #[cfg(any(test, feature = "fake"))]
        if let Some(created) = super::fake::epoll_create() {
            return created.map(Epoll);
        }
        Ok(Epoll(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `socket` for everything but room to send, edge-triggered, until
    /// it is closed. A fresh socket has room, and would only say so. One that is
    /// watched already is so by this token from now on.
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

    /// Watches `socket` for everything, as [`Epoll::watch`].
    pub fn watch_all(&self, socket: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let interest = arrivals() | epoll::EventFlags::OUT;
        #[cfg(any(test, feature = "fake"))]
        if let Some(answer) = super::fake::epoll_watch(&socket, token, interest) {
            return answer;
        }
        epoll::add(&self.0, socket, epoll::EventData::new_u64(token), interest)?;
        Ok(())
    }

    /// Watches a `socket` of [`Epoll::watch`] for everything from now on; what
    /// it is ready for already is told again.
    pub fn watch_room(&self, socket: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let interest = arrivals() | epoll::EventFlags::OUT;
        #[cfg(any(test, feature = "fake"))]
        if let Some(answer) = super::fake::epoll_watch(&socket, token, interest) {
            return answer;
        }
        epoll::modify(&self.0, socket, epoll::EventData::new_u64(token), interest)?;
        Ok(())
    }

    /// Watches `socket` for `interest` alone, until it is closed.
    pub fn watch_for(
        &self,
        socket: impl AsFd,
        token: u64,
        interest: EpollInterest,
    ) -> io::Result<()> {
        epoll::add(&self.0, socket, epoll::EventData::new_u64(token), interest.into())?;
        Ok(())
    }

    /// Changes what a watched `socket` is watched for.
    pub fn change(&self, socket: impl AsFd, token: u64, interest: EpollInterest) -> io::Result<()> {
        epoll::modify(&self.0, socket, epoll::EventData::new_u64(token), interest.into())?;
        Ok(())
    }

    /// Takes what is ready now, at most [`BATCH`] sockets; never waits.
    pub fn poll(&self, batch: &mut EpollBatch) -> io::Result<()> {
        self.wait(batch, Duration::ZERO)
    }

    /// Waits until something is ready, but not beyond `timeout` (rounded up to
    /// a millisecond); takes at most [`BATCH`] sockets. May come back early
    /// with nothing.
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
    /// Room for [`BATCH`] events.
    pub fn new() -> EpollBatch {
        EpollBatch(Vec::with_capacity(BATCH))
    }

    /// Events taken.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was ready.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The `index`-th event; `index` is below `len`.
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
