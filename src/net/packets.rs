//! Messages with open descriptors between a process and a process that it started, over a
//! pair of Unix sockets that keep message boundaries (unix(7), SOCK_SEQPACKET).
//!
//! Used by the supervisor and the processes that it starts. It never interprets messages.

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

/// Longest message: enough for two paths and their fields.
pub const BYTES_MAX: usize = 16 * 1024;

/// Most descriptors per message.
pub const FDS_MAX: usize = 64;

/// One end of the socket pair.
#[derive(Debug)]
pub struct Packets(OwnedFd);

/// A received message.
#[derive(Debug)]
pub struct Packet {
    /// At least one byte.
    pub bytes: Vec<u8>,
    /// The descriptors in the sender's order, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

// === impl Packets ===

impl Packets {
    /// Makes two connected ends, both close-on-exec. A send on either end waits at most
    /// `send_timeout` for space in the buffer.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn pair(send_timeout: Duration) -> io::Result<(Packets, Packets)> {
        let kind = SocketType::SEQPACKET;
        let (one, other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        for end in [&one, &other] {
            set_socket_timeout(end, Timeout::Send, Some(send_timeout))?;
        }
        Ok((Packets(one), Packets(other)))
    }

    /// Sends one message. Waits for space in the buffer.
    ///
    /// # Errors
    /// `WouldBlock`: the buffer stayed full until the timeout. Otherwise the other
    /// process has closed its end.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(bytes, fds, SendFlags::NOSIGNAL)
    }

    /// Sends one message without waiting.
    ///
    /// # Errors
    /// The errors of [`Packets::send`].
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<()> {
        self.send_with(bytes, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    /// Sends one message with descriptors without waiting.
    ///
    /// # Errors
    /// The errors of [`Packets::send`].
    pub fn try_send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(bytes, fds, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
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

    /// Waits for the next message. Returns `None` if the other end is closed and all
    /// messages were read.
    ///
    /// # Errors
    /// Descriptors were lost because the limit on open descriptors is reached.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        self.receive_with(RecvFlags::CMSG_CLOEXEC)
    }

    /// Returns the next message without waiting.
    ///
    /// # Errors
    /// `WouldBlock`: no message has arrived. Otherwise the errors of
    /// [`Packets::receive`].
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

impl From<Packets> for OwnedFd {
    fn from(packets: Packets) -> OwnedFd {
        packets.0
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
    fn messages_keep_their_boundaries_and_descriptors() {
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
