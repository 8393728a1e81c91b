//! A TCP connection of the fake kernel: the socket of the balancer and its peer.
//!
//! Owned by the fake kernel. The number of a stream determines its bytes, so no bytes are
//! stored, and each byte that the balancer sends is compared with the byte that it
//! received. It never makes a system call.

use crate::clock;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::LazyLock;
use std::time::Instant;

/// The bytes of all streams. Its length is a prime, so that it does not repeat at powers
/// of two.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut rng = fastrand::Rng::with_seed(1);
    (0..65_521).map(|_| rng.u8(..)).collect()
});

/// Fills `bytes` with the bytes of stream `stream` at offset `from`. The first byte of a
/// stream is its number.
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

/// The peer of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketRole {
    Client,
    /// The backend with this address.
    Backend(SocketAddr),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimSocketState {
    Fresh,
    Connecting,
    Up,
}

/// The last end-of-stream signal that the peer got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerSignal {
    Nothing,
    Fin,
    Reset,
}

pub struct SimSocket {
    pub role: SocketRole,
    pub(super) fd: RawFd,
    /// Hangs up when its other end, the descriptor of the balancer, is closed.
    pub(super) close_watch: Option<OwnedFd>,
    pub state: SimSocketState,
    /// Number of the stream that the peer sends.
    pub stream: u8,
    /// Bytes that the peer has sent.
    pub sent: u64,
    /// Bytes of `sent` that the balancer has received.
    pub taken: u64,
    /// Bytes of `sent` that the balancer has received or peeked at.
    seen: u64,
    /// The peer has sent FIN.
    pub fin: bool,
    /// Bytes that the balancer has sent.
    pub put: u64,
    /// Bytes of `put` that have arrived at the peer.
    pub got: u64,
    /// Number of the stream that the balancer sends.
    pub got_from: Option<u8>,
    /// When bytes were last sent or arrived.
    pub(super) moved_at: Instant,
    pub garbled: bool,
    /// Bytes that fit into the send buffer.
    pub room: u64,
    /// The connection has failed; `error` is what the next call returns.
    pub dead: bool,
    pub(super) error: i32,
    pub shut: bool,
    pub last_signal: PeerSignal,
    pub(super) reset_on_close: bool,
    /// The peer has closed its socket and answers further bytes with RST.
    pub gone: bool,
    /// The peer or the path has failed. The balancer may not know yet.
    pub peer_failed: bool,
    /// Errnos that were injected into calls on the socket.
    pub injected: Vec<i32>,
}

impl SimSocket {
    pub(super) fn new(role: SocketRole, stream: u8, fd: RawFd, close_watch: OwnedFd) -> SimSocket {
        SimSocket {
            role,
            fd,
            close_watch: Some(close_watch),
            state: if role == SocketRole::Client {
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
            last_signal: PeerSignal::Nothing,
            reset_on_close: false,
            gone: false,
            peer_failed: false,
            injected: Vec::new(),
        }
    }

    /// Returns whether the balancer has the socket open.
    pub fn is_open(&self) -> bool {
        self.close_watch.is_some()
    }

    pub(super) fn waiting(&self) -> u64 {
        self.sent - self.taken
    }

    /// Returns whether the next `bytes` were peeked at. Receiving them cannot fail then.
    pub(super) fn has_shown(&self, bytes: u64) -> bool {
        self.taken + bytes <= self.seen
    }

    /// Returns the events of poll(2).
    pub(super) fn ready(&self) -> u32 {
        let bit = |so: bool, flag: i16| if so { flag as u32 } else { 0 };
        let up = self.state == SimSocketState::Up;
        bit(self.waiting() > 0 || self.fin || self.dead, libc::POLLIN)
            | bit(self.fin || self.dead, libc::POLLRDHUP)
            | bit(up && self.room > 0 || self.dead, libc::POLLOUT)
            | bit(self.error != 0, libc::POLLERR)
            | bit(self.dead || self.fin && self.shut, libc::POLLHUP)
    }

    /// Receives at most `most` bytes. Returns offset and length. Length 0 is the end of the
    /// stream.
    pub(super) fn take(&mut self, most: u64) -> Result<(u64, u64), i32> {
        let (from, count) = self.look(most)?;
        self.taken += count;
        Ok((from, count))
    }

    /// Returns what [`SimSocket::take`] would, without removing the bytes. Bytes that
    /// arrived before a failure can still be received (`tcp_recvmsg`).
    pub(super) fn look(&mut self, most: u64) -> Result<(u64, u64), i32> {
        if self.waiting() > 0 {
            let count = self.waiting().min(most);
            self.seen = self.seen.max(self.taken + count);
            return Ok((self.taken, count));
        }
        match std::mem::take(&mut self.error) {
            0 if self.fin || self.dead => Ok((self.taken, 0)),
            0 if self.state != SimSocketState::Up => Err(libc::ENOTCONN),
            0 => Err(libc::EAGAIN),
            errno => Err(errno),
        }
    }

    /// Returns how many of `most` bytes can be sent now.
    pub(super) fn sendable(&mut self, most: u64) -> Result<u64, i32> {
        if self.dead || self.shut {
            return match std::mem::take(&mut self.error) {
                0 => Err(libc::EPIPE),
                errno => Err(errno),
            };
        }
        match self.room.min(most) {
            _ if self.state != SimSocketState::Up => Err(libc::EAGAIN),
            0 => Err(libc::EAGAIN),
            count => Ok(count),
        }
    }

    /// Returns the bytes that have not arrived at the peer. A FIN after them counts as a
    /// byte.
    pub(super) fn queued(&self) -> u64 {
        let left = self.put - self.got;
        left + u64::from(left > 0 && self.shut)
    }

    /// At most `most` queued bytes arrive at the peer.
    pub(super) fn deliver(&mut self, most: u64) {
        let left = self.put - self.got;
        if left > 0 && !self.dead {
            self.got += left.min(most);
            self.moved_at = clock::now();
        }
    }

    /// Sends bytes, for which the send buffer must have space.
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
            // As `tcp_reset` in Linux: after a FIN from the peer, the error is EPIPE.
            self.fail(if self.fin { libc::EPIPE } else { libc::ECONNRESET });
            self.peer_failed = true;
        }
    }

    /// The connection fails.
    pub(super) fn fail(&mut self, errno: i32) {
        if !self.dead {
            self.dead = true;
            self.error = errno;
        }
    }

    /// The balancer has closed the socket.
    pub(super) fn closed(&mut self) {
        self.close_watch = None;
        if self.last_signal != PeerSignal::Reset {
            let unread = self.waiting() > 0;
            self.last_signal =
                if self.reset_on_close || unread { PeerSignal::Reset } else { PeerSignal::Fin };
        }
        if self.last_signal == PeerSignal::Fin {
            self.deliver(u64::MAX);
        }
    }
}

impl std::fmt::Debug for SimSocket {
    /// Formats on one line, because a simulation has many sockets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let SimSocket { role, stream, state, sent, taken, put, got, got_from, .. } = self;
        write!(f, "{role:?} #{stream} {state:?} sent {sent} taken {taken} put {put} got {got}")?;
        write!(
            f,
            " of {got_from:?} room {} signal {:?} injected {:?}",
            self.room, self.last_signal, self.injected
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
