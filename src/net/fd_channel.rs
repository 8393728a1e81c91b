//! Messages with open descriptors between two processes, over a Unix stream
//! socket, and the descriptors a process is started with.
//!
//! Used by `daemon` for upgrades in place and for socket activation. Every call
//! blocks up to its deadline, so it is called from threads that may. It knows
//! frames, not what they mean.
//!
//! A frame is a [`Header`] of 16 bytes, the body, and then one byte for each
//! batch of descriptors that travels with it (unix(7), SCM_RIGHTS): a message
//! of its own for each batch, since the kernel throws descriptors away that
//! come with bytes read without asking for them.

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

/// Longest body: the state of a hundred thousand backends with their histograms
/// is below that.
pub const BODY_MAX: usize = 256 * 1024 * 1024;

/// Most descriptors with one frame: 8,192 addresses on eight workers.
pub const FDS_MAX: usize = 65_536;

/// Most descriptors a process may be started with by a service manager.
pub const ACTIVATED_MAX: usize = 8_192;

/// Descriptors in one message; the kernel takes 253 (unix(7), SCM_MAX_FD).
const FDS_A_MESSAGE: usize = 64;

/// Bytes read into memory at once: a header may lie about its body's length.
const PIECE: usize = 1024 * 1024;

const MAGIC: [u8; 4] = *b"TGUP";

/// Tells a new process that its standard input is the way to the old one; the value is
/// for people who look.
pub const MARK: &str = "TIDEGATE_UPGRADE";

/// Of the frame, not of what it carries.
const FRAME_VERSION: u16 = 1;

/// First descriptor a service manager passes (sd_listen_fds(3)).
const ACTIVATED_FIRST: RawFd = 3;

/// One end of the connection.
#[derive(Debug)]
pub struct HandoverChannel(UnixStream);

/// One message.
#[derive(Debug)]
pub struct ChannelFrame {
    /// What the body is.
    pub kind: u16,
    /// At most [`BODY_MAX`].
    pub body: Vec<u8>,
    /// In the sender's order, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// What a frame begins with; little-endian: magic, version, kind, descriptors,
/// length of the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the body is.
    pub kind: u16,
    /// Descriptors that follow the body.
    pub fds: u32,
    /// Bytes in the body.
    pub length: u32,
}

/// Why a frame did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other process closed its end, by ending or otherwise.
    #[error("the other process closed the connection")]
    Closed,
    /// The deadline is over.
    #[error("no answer in time")]
    TimedOut,
    /// Not a frame at all.
    #[error("not a handover frame: starts with {0:?}")]
    Foreign([u8; 4]),
    /// A frame of another version.
    #[error("unsupported frame version {0}; this process uses {FRAME_VERSION}")]
    Version(u16),
    /// More than is ever needed.
    #[error("frame too large: {length} bytes, {fds} descriptors")]
    TooLarge {
        /// Of the body.
        length: u32,
        /// Descriptors.
        fds: u32,
    },
    /// The descriptors that were announced are not there.
    #[error("received {came} of {wanted} descriptors; check the descriptor limit (ulimit -n)")]
    LostDescriptors {
        /// So many.
        came: usize,
        /// Of so many.
        wanted: usize,
    },
    /// A system call failed.
    #[error("{0}")]
    Io(io::Error),
}

// === impl Header ===

impl Header {
    /// Length in bytes.
    pub const LEN: usize = 16;

    /// As sent.
    pub fn encode(self) -> [u8; Header::LEN] {
        let mut bytes = [0; Header::LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&FRAME_VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.fds.to_le_bytes());
        bytes[12..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Reads what anybody may have sent.
    ///
    /// # Errors
    /// Another magic or version, or more than the bounds allow.
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
    /// Two connected ends: one to keep, one to give away.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair() -> io::Result<(HandoverChannel, OwnedFd)> {
        let (own, other) = UnixStream::pair()?;
        Ok((HandoverChannel(own), other.into()))
    }

    /// The end this process was started with as its standard input, which is
    /// replaced by /dev/null.
    ///
    /// # Errors
    /// Standard input is closed or cannot be replaced.
    pub fn from_stdin() -> io::Result<HandoverChannel> {
        let own = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), ACTIVATED_FIRST)?;
        rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
        Ok(HandoverChannel(own.into()))
    }

    /// A second handle of the same end, to hang it up from another thread.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn try_clone(&self) -> io::Result<HandoverChannel> {
        self.0.try_clone().map(HandoverChannel)
    }

    /// Ends the connection: whoever waits on either end learns of it.
    pub fn hang_up(&self) {
        // A peer that is gone already needs no telling.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// See [`ChannelError`]; the connection is of no more use then.
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

    /// Waits for one frame.
    ///
    /// # Errors
    /// See [`ChannelError`]; the connection is of no more use then.
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
            let came = fds.len();
            self.receive_batch(&mut fds, deadline)?;
            if fds.len() == came || fds.len() > wanted {
                return Err(ChannelError::LostDescriptors { came: fds.len(), wanted });
            }
        }
        Ok(ChannelFrame { kind, body, fds })
    }

    fn send_all(&self, mut bytes: &[u8], deadline: Instant) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            self.0.set_write_timeout(Some(left(deadline)?)).map_err(ChannelError::Io)?;
            match (&self.0).write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) => judge(error)?,
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
                Err(error) => judge(error.into())?,
            }
        }
    }

    fn receive_all(&self, mut into: &mut [u8], deadline: Instant) -> Result<(), ChannelError> {
        while !into.is_empty() {
            self.0.set_read_timeout(Some(left(deadline)?)).map_err(ChannelError::Io)?;
            match (&self.0).read(into) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(came) => into = &mut into[came..],
                Err(error) => judge(error)?,
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
                        let (came, wanted) = (fds.len(), fds.len() + 1);
                        return Err(ChannelError::LostDescriptors { came, wanted });
                    }
                    return Ok(());
                }
                Err(error) => judge(error.into())?,
            }
        }
    }
}

impl From<UnixStream> for HandoverChannel {
    fn from(stream: UnixStream) -> HandoverChannel {
        HandoverChannel(stream)
    }
}

/// Time until the deadline, for a socket's time-out, which takes no zero.
fn left(deadline: Instant) -> Result<std::time::Duration, ChannelError> {
    let left = deadline.saturating_duration_since(clock::now());
    if left.is_zero() { Err(ChannelError::TimedOut) } else { Ok(left) }
}

/// An interrupted call is made again.
fn judge(error: io::Error) -> Result<(), ChannelError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(ChannelError::TimedOut),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(ChannelError::Closed),
        _ => Err(ChannelError::Io(error)),
    }
}

/// Takes ownership of the `count` descriptors a service manager has passed,
/// and makes them close-on-exec. To be called once, before anything else opens
/// descriptors.
///
/// # Errors
/// One of them is not open, or there are more than [`ACTIVATED_MAX`].
pub fn take_activated(count: usize) -> io::Result<Vec<OwnedFd>> {
    if count > ACTIVATED_MAX {
        let message = format!("{count} descriptors passed; at most {ACTIVATED_MAX} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    (ACTIVATED_FIRST..).take(count).map(take_inherited).collect()
}

/// Takes ownership of descriptor `number`, which this process was started with to
/// own, and makes it close-on-exec. To be called once for each, before anything else
/// opens descriptors.
///
/// # Errors
/// It is not open.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: setting close-on-exec touches no memory; a number that is not open
    // gives EBADF.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, as the call before has shown, and whoever
    // started this process gave it to this process to own; the caller sees to it that
    // nothing in the process has opened one yet.
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
    fn a_frame_arrives_whole_with_its_descriptors_in_order() {
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
    fn silence_ends_at_the_deadline_and_hanging_up_at_once() {
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
    fn announced_descriptors_that_do_not_come_are_an_error() {
        let (one, other) = two_ends();
        let header = Header { kind: 1, fds: 2, length: 0 };
        (&one.0).write_all(&header.encode()).unwrap();
        (&one.0).write_all(&[0, 0]).unwrap();
        let error = other.receive(soon()).unwrap_err();
        assert!(matches!(error, ChannelError::LostDescriptors { came: 0, wanted: 2 }), "{error}");
    }

    #[test]
    fn no_more_is_sent_than_would_be_taken() {
        let (one, _other) = two_ends();
        let stdin = rustix::stdio::stdin();
        let fds = vec![stdin; FDS_MAX + 1];
        assert!(matches!(one.send(1, &[], &fds, soon()), Err(ChannelError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn headers_survive_the_way(kind: u16, fds in 0..=FDS_MAX as u32, length in 0..=BODY_MAX as u32) {
            let header = Header { kind, fds, length };
            prop_assert_eq!(Header::parse(&header.encode()).unwrap(), header);
        }

        #[test]
        fn whatever_bytes_come_a_header_is_within_bounds_or_an_error(bytes: [u8; 16], magic: bool) {
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
        fn garbage_on_the_socket_ends_in_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let (one, other) = two_ends();
            (&one.0).write_all(&bytes).unwrap();
            drop(one);
            prop_assert!(other.receive(soon()).is_err());
        }
    }
}
