//! Messages with open descriptors between two processes over a Unix stream socket, and
//! descriptors that a process inherits.
//!
//! Used by `daemon` for upgrades and for socket activation. Calls block up to their
//! deadline, so no worker may call them. It never interprets the body of a frame.
//!
//! A frame consists of:
//!
//! 1. a [`Header`] of 16 bytes;
//! 2. the body;
//! 3. one byte per batch of descriptors, which carries them (unix(7), SCM_RIGHTS).
//!
//! Each batch is a separate message. The kernel discards descriptors if the bytes that
//! carry them are read without a buffer for descriptors.

#![allow(unsafe_code)]

use crate::clock;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Longest body. The state of 100,000 backends with their histograms is smaller.
pub const BODY_MAX: usize = 256 * 1024 * 1024;

/// Most descriptors per frame: 8,192 addresses on 8 workers.
pub const FDS_MAX: usize = 65_536;

/// Most descriptors that a service manager may pass.
pub const ACTIVATED_MAX: usize = 8_192;

/// Descriptors per message, below the kernel's limit of 253 (unix(7), SCM_MAX_FD).
const FDS_A_MESSAGE: usize = 64;

/// Most bytes that are allocated before they arrive, because the length in a header can
/// be wrong.
const PIECE: usize = 1024 * 1024;

const MAGIC: [u8; 4] = *b"TGUP";

/// Environment variable of a new process whose standard input is the channel to the old
/// process. The process does not read the value.
pub const MARK: &str = "TIDEGATE_UPGRADE";

/// Version of the frame format. The body has its own version.
const FRAME_VERSION: u16 = 1;

/// First descriptor that a service manager passes (sd_listen_fds(3)).
const ACTIVATED_FIRST: RawFd = 3;

/// One end of the channel.
#[derive(Debug)]
pub struct HandoverChannel(UnixStream);

/// A received frame.
#[derive(Debug)]
pub struct ChannelFrame {
    /// Type of the body.
    pub kind: u16,
    /// At most [`BODY_MAX`].
    pub body: Vec<u8>,
    /// The descriptors in the sender's order, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// The start of a frame. Little-endian: magic, version, kind, number of descriptors,
/// length of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type of the body.
    pub kind: u16,
    /// Number of descriptors after the body.
    pub fds: u32,
    /// Length of the body in bytes.
    pub length: u32,
}

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other process closed its end or ended.
    #[error("the other process closed the connection")]
    Closed,
    /// The deadline passed.
    #[error("no answer in time")]
    TimedOut,
    /// The bytes are no frame.
    #[error("not a handover frame: starts with {0:?}")]
    Foreign([u8; 4]),
    /// The frame has another version.
    #[error("unsupported frame version {0}; this process uses {FRAME_VERSION}")]
    Version(u16),
    /// The frame exceeds [`BODY_MAX`] or [`FDS_MAX`].
    #[error("frame too large: {length} bytes, {fds} descriptors")]
    TooLarge {
        /// Length of the body in bytes.
        length: u32,
        /// Number of descriptors.
        fds: u32,
    },
    /// Descriptors that the header announced did not arrive.
    #[error(
        "received {received} of {announced} descriptors; check the descriptor limit (ulimit -n)"
    )]
    LostDescriptors {
        /// Number of descriptors that arrived.
        received: usize,
        /// Number of descriptors that were announced.
        announced: usize,
    },
    /// A system call failed.
    #[error("{0}")]
    Io(io::Error),
}

/// Takes the descriptor that this process has as its standard input, and replaces standard
/// input by /dev/null.
///
/// # Errors
/// Standard input is closed or cannot be replaced.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let own = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), ACTIVATED_FIRST)?;
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    Ok(own)
}

// === impl Header ===

impl Header {
    /// Length of a header in bytes.
    pub const LEN: usize = 16;

    /// Encodes the header.
    pub fn encode(self) -> [u8; Header::LEN] {
        let mut bytes = [0; Header::LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&FRAME_VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.fds.to_le_bytes());
        bytes[12..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Parses an untrusted header.
    ///
    /// # Errors
    /// Another magic or version, or a value above its bound.
    pub fn parse(bytes: &[u8; Header::LEN]) -> Result<Header, ChannelError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, f0, f1, f2, f3, l0, l1, l2, l3] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(ChannelError::Foreign([m0, m1, m2, m3]));
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != FRAME_VERSION {
            return Err(ChannelError::Version(version));
        }
        let fds = u32::from_le_bytes([f0, f1, f2, f3]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if fds as usize > FDS_MAX || length as usize > BODY_MAX {
            return Err(ChannelError::TooLarge { length, fds });
        }
        Ok(Header { kind: u16::from_le_bytes([k0, k1]), fds, length })
    }
}

// === impl HandoverChannel ===

impl HandoverChannel {
    /// Makes two connected ends. The second is for another process.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn pair() -> io::Result<(HandoverChannel, OwnedFd)> {
        let (own, other) = UnixStream::pair()?;
        Ok((HandoverChannel(own), other.into()))
    }

    /// Takes the end that this process has as its standard input, and replaces standard
    /// input by /dev/null.
    ///
    /// # Errors
    /// Standard input is closed or cannot be replaced.
    pub fn from_stdin() -> io::Result<HandoverChannel> {
        Ok(HandoverChannel(take_stdin()?.into()))
    }

    /// Makes a second handle of this end, so that another thread can shut it down.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> io::Result<HandoverChannel> {
        self.0.try_clone().map(HandoverChannel)
    }

    /// Shuts the channel down, which ends all waits on both ends.
    pub fn hang_up(&self) {
        // It fails only if the other end is already closed.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// See [`ChannelError`]. The channel must not be used afterwards.
    pub fn send(
        &self,
        kind: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), ChannelError> {
        let header = Header {
            kind,
            fds: u32::try_from(fds.len()).unwrap_or(u32::MAX),
            length: u32::try_from(body.len()).unwrap_or(u32::MAX),
        };
        let bytes = header.encode();
        Header::parse(&bytes)?;
        self.send_all(&bytes, deadline)?;
        self.send_all(body, deadline)?;
        for batch in fds.chunks(FDS_A_MESSAGE) {
            self.send_batch(batch, deadline)?;
        }
        Ok(())
    }

    /// Receives one frame.
    ///
    /// # Errors
    /// See [`ChannelError`]. The channel must not be used afterwards.
    pub fn receive(&self, deadline: Instant) -> Result<ChannelFrame, ChannelError> {
        let mut header = [0; Header::LEN];
        self.receive_all(&mut header, deadline)?;
        let Header { kind, fds: wanted, length } = Header::parse(&header)?;
        let (wanted, length) = (wanted as usize, length as usize);
        let mut body = Vec::new();
        while body.len() < length {
            let (from, to) = (body.len(), length.min(body.len() + PIECE));
            body.resize(to, 0);
            self.receive_all(&mut body[from..], deadline)?;
        }
        let mut fds = Vec::new();
        while fds.len() < wanted {
            let before = fds.len();
            self.receive_batch(&mut fds, deadline)?;
            if fds.len() == before || fds.len() > wanted {
                return Err(ChannelError::LostDescriptors {
                    received: fds.len(),
                    announced: wanted,
                });
            }
        }
        Ok(ChannelFrame { kind, body, fds })
    }

    fn send_all(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            self.0.set_write_timeout(Some(left(deadline)?)).map_err(ChannelError::Io)?;
            match (&self.0).write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) => check_error(error)?,
            }
        }
        Ok(())
    }

    fn send_batch(&self, fds: &[BorrowedFd<'_>], deadline: Instant) -> Result<(), ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_A_MESSAGE))];
        loop {
            self.0.set_write_timeout(Some(left(deadline)?)).map_err(ChannelError::Io)?;
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
            let byte = [IoSlice::new(&[0])];
            match sendmsg(&self.0, &byte, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(error) => check_error(error.into())?,
            }
        }
    }

    fn receive_all(&self, mut into: &mut [u8], deadline: Instant) -> Result<(), ChannelError> {
        while !into.is_empty() {
            self.0.set_read_timeout(Some(left(deadline)?)).map_err(ChannelError::Io)?;
            match (&self.0).read(into) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(received) => into = &mut into[received..],
                Err(error) => check_error(error)?,
            }
        }
        Ok(())
    }

    fn receive_batch(&self, fds: &mut Vec<OwnedFd>, deadline: Instant) -> Result<(), ChannelError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_A_MESSAGE))];
        loop {
            self.0.set_read_timeout(Some(left(deadline)?)).map_err(ChannelError::Io)?;
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let mut into = [IoSliceMut::new(&mut byte)];
            match recvmsg(&self.0, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) if message.bytes == 0 => return Err(ChannelError::Closed),
                Ok(message) => {
                    for part in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(batch) = part {
                            fds.extend(batch);
                        }
                    }
                    if message.flags.contains(ReturnFlags::CTRUNC) {
                        let (received, announced) = (fds.len(), fds.len() + 1);
                        return Err(ChannelError::LostDescriptors { received, announced });
                    }
                    return Ok(());
                }
                Err(error) => check_error(error.into())?,
            }
        }
    }
}

impl From<UnixStream> for HandoverChannel {
    fn from(stream: UnixStream) -> HandoverChannel {
        HandoverChannel(stream)
    }
}

/// Returns the time until the deadline, which is never zero, because a socket timeout of
/// zero means no timeout.
fn left(deadline: Instant) -> Result<std::time::Duration, ChannelError> {
    let left = deadline.saturating_duration_since(clock::now());
    if left.is_zero() { Err(ChannelError::TimedOut) } else { Ok(left) }
}

/// Returns `Ok` if the call was interrupted and must be repeated, else the error.
fn check_error(error: io::Error) -> Result<(), ChannelError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(ChannelError::TimedOut),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(ChannelError::Closed),
        _ => Err(ChannelError::Io(error)),
    }
}

/// Takes ownership of the `count` descriptors that a service manager passed, and makes
/// them close-on-exec.
///
/// Call it once, before other code opens descriptors.
///
/// # Errors
/// A descriptor is not open, or `count` exceeds [`ACTIVATED_MAX`].
pub fn take_activated(count: usize) -> io::Result<Vec<OwnedFd>> {
    if count > ACTIVATED_MAX {
        let message = format!("{count} descriptors passed; at most {ACTIVATED_MAX} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    (ACTIVATED_FIRST..).take(count).map(take_inherited).collect()
}

/// Takes ownership of descriptor `number`, which this process inherited, and makes it
/// close-on-exec.
///
/// Call it once per descriptor, before other code opens descriptors.
///
/// # Errors
/// The descriptor is not open.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: setting close-on-exec touches no memory. A number that is not open gives
    // EBADF.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as the previous call showed. The parent process
    // passed it to this process. The caller ensures that no other code in the process
    // has opened a descriptor, so nothing else owns this number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;
    use std::time::Duration;

    fn soon() -> Instant {
        clock::now() + Duration::from_secs(10)
    }

    fn two_ends() -> (HandoverChannel, HandoverChannel) {
        let (one, other) = HandoverChannel::pair().unwrap();
        (one, HandoverChannel(other.into()))
    }

    #[test]
    fn frame_arrives_complete_with_its_descriptors_in_order() {
        let (one, other) = two_ends();
        let files: Vec<_> = (0..200).map(|_| tempfile::tempfile().unwrap()).collect();
        for (number, mut file) in files.iter().enumerate() {
            write!(file, "{number}").unwrap();
        }
        let body: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
        let sent = body.clone();
        let sender = std::thread::spawn(move || {
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            one.send(7, &sent, &fds, soon()).unwrap();
            one.send(8, &[], &[], soon()).unwrap();
        });
        let frame = other.receive(soon()).unwrap();
        assert!(frame.kind == 7 && frame.body == body);
        for (number, fd) in frame.fds.into_iter().enumerate() {
            use std::io::Seek;
            let (mut file, mut text) = (std::fs::File::from(fd), String::new());
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, number.to_string());
        }
        assert_eq!(other.receive(soon()).unwrap().kind, 8);
        sender.join().unwrap();
        assert!(matches!(other.receive(soon()), Err(ChannelError::Closed)));
    }

    #[test]
    fn receive_ends_at_the_deadline_or_when_the_channel_is_shut_down() {
        let (one, other) = two_ends();
        let deadline = clock::now() + Duration::from_millis(30);
        assert!(matches!(one.receive(deadline), Err(ChannelError::TimedOut)));
        let clone = one.try_clone().unwrap();
        let waiting = std::thread::spawn(move || one.receive(soon()).unwrap_err());
        clone.hang_up();
        assert!(matches!(waiting.join().unwrap(), ChannelError::Closed));
        assert!(matches!(other.receive(soon()), Err(ChannelError::Closed)));
    }

    #[test]
    fn missing_descriptors_are_an_error() {
        let (one, other) = two_ends();
        let header = Header { kind: 1, fds: 2, length: 0 };
        (&one.0).write_all(&header.encode()).unwrap();
        (&one.0).write_all(&[0, 0]).unwrap();
        let error = other.receive(soon()).unwrap_err();
        assert!(
            matches!(error, ChannelError::LostDescriptors { received: 0, announced: 2 }),
            "{error}"
        );
    }

    #[test]
    fn sender_rejects_frames_that_the_receiver_would_reject() {
        let (one, _other) = two_ends();
        let stdin = rustix::stdio::stdin();
        let fds = vec![stdin; FDS_MAX + 1];
        assert!(matches!(one.send(1, &[], &fds, soon()), Err(ChannelError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn parsed_header_equals_the_encoded_header(kind: u16, fds in 0..=FDS_MAX as u32, length in 0..=BODY_MAX as u32) {
            let header = Header { kind, fds, length };
            prop_assert_eq!(Header::parse(&header.encode()).unwrap(), header);
        }

        #[test]
        fn header_of_arbitrary_bytes_is_within_bounds_or_an_error(bytes: [u8; 16], magic: bool) {
            let mut bytes = bytes;
            if magic {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..6].copy_from_slice(&FRAME_VERSION.to_le_bytes());
            }
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.fds as usize <= FDS_MAX && header.length as usize <= BODY_MAX);
            }
        }

        #[test]
        fn arbitrary_bytes_on_the_socket_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let (one, other) = two_ends();
            (&one.0).write_all(&bytes).unwrap();
            drop(one);
            prop_assert!(other.receive(soon()).is_err());
        }
    }
}
