//! A TCP connection as one end's kernel knows it, and the peer at the other.
//!
//! Owned by the fake kernel. The bytes of a stream follow from its number, so
//! none is kept, and every one that comes out is compared with what went in.

use crate::clock;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::LazyLock;
use std::time::Instant;

/// What a stream's bytes are cut from; prime, so that no power of two repeats.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut rng = fastrand::Rng::with_seed(1);
    (0..65_521).map(|_| rng.u8(..)).collect()
});

/// Fills `bytes` with those of the stream `stream` that begin at `from`. The
/// first one tells its number.
pub(super) fn write_stream(stream: u8, from: u64, bytes: &mut [u8]) {
    let size = PATTERN.len();
    let mut at = (usize::from(stream) * 257 + from as usize) % size;
    let mut done = 0;
    while done < bytes.len() {
        let len = (size - at).min(bytes.len() - done);
        bytes[done..done + len].copy_from_slice(&PATTERN[at..at + len]);
        (done, at) = (done + len, 0);
    }
    if from == 0 && !bytes.is_empty() {
        bytes[0] = stream;
    }
}

/// Which end of the balancer it is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketRole {
    Client,
    /// By the address connected to.
    Backend(SocketAddr),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimSocketState {
    Fresh,
    Connecting,
    Up,
}

/// What the peer was told at last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerSignal {
    Nothing,
    Fin,
    Reset,
}

pub struct SimSocket {
    pub role: SocketRole,
    pub(super) fd: RawFd,
    /// Hangs up when the other end of it, which is the balancer's descriptor, is
    /// closed.
    pub(super) alarm: Option<OwnedFd>,
    pub standing: SimSocketState,
    /// Of the bytes the peer sends.
    pub stream: u8,
    /// So many the peer has sent, and so many of them were received.
    pub sent: u64,
    pub taken: u64,
    /// So many of them somebody has looked at.
    seen: u64,
    /// The peer has ended its stream.
    pub fin: bool,
    /// So many bytes were sent to the peer, so many of them have arrived there, and of
    /// which stream they are.
    pub put: u64,
    pub got: u64,
    pub got_from: Option<u8>,
    /// When bytes were sent, or arrived, at last.
    pub(super) moved_at: Instant,
    pub garbled: bool,
    /// What may be sent before there is no room.
    pub room: u64,
    /// The connection is no more, and so is what it says to the next who asks.
    pub dead: bool,
    pub(super) error: i32,
    pub shut: bool,
    pub told: PeerSignal,
    pub(super) reset_on_close: bool,
    /// The peer has closed: whatever else it is sent, it answers with a reset.
    pub gone: bool,
    /// The peer or the path has failed, whether we know already or not.
    pub peer_failed: bool,
    /// Errnos that calls on it were made to give.
    pub injected: Vec<i32>,
}

impl SimSocket {
    pub(super) fn new(role: SocketRole, stream: u8, fd: RawFd, alarm: OwnedFd) -> SimSocket {
        SimSocket {
            role,
            fd,
            alarm: Some(alarm),
            standing: if role == SocketRole::Client {
                SimSocketState::Up
            } else {
                SimSocketState::Fresh
            },
            stream,
            sent: 0,
            taken: 0,
            seen: 0,
            fin: false,
            put: 0,
            got: 0,
            got_from: None,
            moved_at: clock::now(),
            garbled: false,
            room: 64 * 1024,
            dead: false,
            error: 0,
            shut: false,
            told: PeerSignal::Nothing,
            reset_on_close: false,
            gone: false,
            peer_failed: false,
            injected: Vec::new(),
        }
    }

    /// The balancer still has it.
    pub fn is_open(&self) -> bool {
        self.alarm.is_some()
    }

    pub(super) fn waiting(&self) -> u64 {
        self.sent - self.taken
    }

    /// Whether the next so many bytes were looked at already: then taking them
    /// cannot fail.
    pub(super) fn has_shown(&self, bytes: u64) -> bool {
        self.taken + bytes <= self.seen
    }

    /// poll(2)'s bits.
    pub(super) fn ready(&self) -> u32 {
        let bit = |so: bool, flag: i16| if so { flag as u32 } else { 0 };
        let up = self.standing == SimSocketState::Up;
        bit(self.waiting() > 0 || self.fin || self.dead, libc::POLLIN)
            | bit(self.fin || self.dead, libc::POLLRDHUP)
            | bit(up && self.room > 0 || self.dead, libc::POLLOUT)
            | bit(self.error != 0, libc::POLLERR)
            | bit(self.dead || self.fin && self.shut, libc::POLLHUP)
    }

    /// Takes at most `most` bytes: where they begin, and how many. Zero of them
    /// is the end.
    pub(super) fn take(&mut self, most: u64) -> Result<(u64, u64), i32> {
        let (from, count) = self.look(most)?;
        self.taken += count;
        Ok((from, count))
    }

    /// The same, and they stay to be taken. What came before a failure is still
    /// there (`tcp_recvmsg`).
    pub(super) fn look(&mut self, most: u64) -> Result<(u64, u64), i32> {
        if self.waiting() > 0 {
            let count = self.waiting().min(most);
            self.seen = self.seen.max(self.taken + count);
            return Ok((self.taken, count));
        }
        match std::mem::take(&mut self.error) {
            0 if self.fin || self.dead => Ok((self.taken, 0)),
            0 if self.standing != SimSocketState::Up => Err(libc::ENOTCONN),
            0 => Err(libc::EAGAIN),
            errno => Err(errno),
        }
    }

    /// Room for at most `most` bytes that are to go out now.
    pub(super) fn make_way(&mut self, most: u64) -> Result<u64, i32> {
        if self.dead || self.shut {
            return match std::mem::take(&mut self.error) {
                0 => Err(libc::EPIPE),
                errno => Err(errno),
            };
        }
        match self.room.min(most) {
            _ if self.standing != SimSocketState::Up => Err(libc::EAGAIN),
            0 => Err(libc::EAGAIN),
            count => Ok(count),
        }
    }

    /// What has not arrived at the peer; a FIN behind it counts as well.
    pub(super) fn queued(&self) -> u64 {
        let left = self.put - self.got;
        left + u64::from(left > 0 && self.shut)
    }

    /// So much of what is queued arrives.
    pub(super) fn deliver(&mut self, most: u64) {
        let left = self.put - self.got;
        if left > 0 && !self.dead {
            self.got += left.min(most);
            self.moved_at = clock::now();
        }
    }

    /// These bytes go to the peer; there was room for them.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let Some(first) = bytes.first() else { return };
        let stream = *self.got_from.get_or_insert(*first);
        let mut expected = vec![0; bytes.len()];
        write_stream(stream, self.put, &mut expected);
        self.garbled |= expected != bytes;
        self.put += bytes.len() as u64;
        self.moved_at = clock::now();
        self.room -= bytes.len() as u64;
        if self.gone {
            // `tcp_reset` in Linux: after the peer's FIN it reads as EPIPE.
            self.fail(if self.fin { libc::EPIPE } else { libc::ECONNRESET });
            self.peer_failed = true;
        }
    }

    /// The connection breaks.
    pub(super) fn fail(&mut self, errno: i32) {
        if !self.dead {
            self.dead = true;
            self.error = errno;
        }
    }

    /// The balancer has closed it.
    pub(super) fn closed(&mut self) {
        self.alarm = None;
        if self.told != PeerSignal::Reset {
            let unread = self.waiting() > 0;
            self.told =
                if self.reset_on_close || unread { PeerSignal::Reset } else { PeerSignal::Fin };
        }
        if self.told == PeerSignal::Fin {
            self.deliver(u64::MAX);
        }
    }
}

impl std::fmt::Debug for SimSocket {
    /// On one line: there are many.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let SimSocket { role, stream, standing, sent, taken, put, got, got_from, .. } = self;
        write!(f, "{role:?} #{stream} {standing:?} sent {sent} taken {taken} put {put} got {got}")?;
        write!(
            f,
            " of {got_from:?} room {} told {:?} injected {:?}",
            self.room, self.told, self.injected
        )?;
        let flags = [
            (self.is_open(), "open"),
            (self.fin, "fin"),
            (self.gone, "gone"),
            (self.dead, "dead"),
            (self.error != 0, "error"),
            (self.shut, "shut"),
            (self.peer_failed, "peer-failed"),
            (self.garbled, "garbled"),
        ];
        flags.iter().filter(|(so, _)| *so).try_for_each(|(_, name)| write!(f, " {name}"))
    }
}
