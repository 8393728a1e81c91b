//! Whole messages with open descriptors between a process and one it has started: a
//! pair of Unix sockets that keep messages apart (unix(7), SOCK_SEQPACKET).
//!
//! Used by the supervisor and the processes it starts. It knows bytes and
//! descriptors, not what they mean.

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Longest message: two paths and what goes with them.
pub const BYTES_MAX: usize = 16 * 1024;

/// Most descriptors with one message.
pub const FDS_MAX: usize = 64;

/// One end.
#[derive(Debug)]
pub struct Packets(OwnedFd);

/// One message.
#[derive(Debug)]
pub struct Packet {
    /// At least one byte.
    pub bytes: Vec<u8>,
    /// In the sender's order, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

// === impl Packets ===

impl Packets {
    /// Two connected ends, both close-on-exec; a send of either waits at most
    /// `patience` for room.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair(patience: Duration) -> io::Result<(Packets, Packets)> {
        let kind = SocketType::SEQPACKET;
        let (one, other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        for end in [&one, &other] {
            set_socket_timeout(end, Timeout::Send, Some(patience))?;
        }
        Ok((Packets(one), Packets(other)))
    }

    /// Sends one message, waiting for room.
    ///
    /// # Errors
    /// `WouldBlock` where there is no room in time; otherwise the other process is
    /// gone.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(bytes, fds, SendFlags::NOSIGNAL)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// As of [`Packets::send`].
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        self.send_with(bytes, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        loop {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(fds));
            }
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next message, waiting for it; `None` once the other end is closed and
    /// everything was read.
    ///
    /// # Errors
    /// Descriptors were lost on the way: the limit on open descriptors is reached.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        self.receive_with(RecvFlags::CMSG_CLOEXEC)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// `WouldBlock` where there is none; as of [`Packets::receive`].
    pub fn try_receive(&self) -> io::Result<Option<Packet>> {
        self.receive_with(RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT)
    }

    fn receive_with(&self, flags: RecvFlags) -> io::Result<Option<Packet>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut bytes = vec![0; BYTES_MAX];
        let received = loop {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut into = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut into, &mut ancillary, flags) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(message) => {
                    let rights = ancillary.drain().filter_map(|part| match part {
                        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                        _ => None,
                    });
                    break (message.bytes, message.flags, rights.flatten().collect::<Vec<_>>());
                }
            }
        };
        let (length, flags, fds) = received;
        if flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC) {
            return Err(io::Error::other("incomplete message: bytes or descriptors are missing"));
        }
        bytes.truncate(length);
        Ok((length > 0).then_some(Packet { bytes, fds }))
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Packets {
    fn from(fd: OwnedFd) -> Packets {
        Packets(fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_stay_apart_and_keep_their_descriptors() {
        let (one, other) = Packets::pair(Duration::from_secs(1)).unwrap();
        let file = tempfile::tempfile().unwrap();
        one.send(b"first", &[file.as_fd(), file.as_fd()]).unwrap();
        one.try_send(b"second").unwrap();
        let first = other.receive().unwrap().unwrap();
        assert_eq!((&*first.bytes, first.fds.len()), (&b"first"[..], 2));
        assert_eq!(other.try_receive().unwrap().unwrap().bytes, b"second");
        let none = other.try_receive().unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        one.send(b"last", &[]).unwrap();
        drop(one);
        assert_eq!(other.receive().unwrap().unwrap().bytes, b"last");
        assert!(other.receive().unwrap().is_none());
        assert!(other.send(b"x", &[]).is_err());
    }
}
