//! A connection to a syslog receiver: Unix datagram, UDP or TCP.
//!
//! Used by the threads that write the log and the access log. Never used by a worker or the
//! control thread, because a call can wait for [`WAIT`].
//!
//! - The caller keeps a message that cannot be sent, and sends it again. After an error the
//!   connection is opened again, at most every [`PAUSE_MIN`] to [`PAUSE_MAX`].
//! - TCP separates messages by their lengths (RFC 6587, octet counting). If a connection ends
//!   inside a message, the next connection gets the whole message.
//! - UDP and TCP can lose messages that the kernel has accepted: syslog has no confirmation.

mod message;

pub use message::{MESSAGE_MAX, SyslogForm, SyslogHeader, SyslogSeverity};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where a receiver listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SyslogAddress {
    /// A Unix datagram socket, usually `/dev/log`.
    Unix(PathBuf),
    /// One datagram per message (RFC 5426).
    Udp(SocketAddr),
    /// A connection (RFC 6587).
    Tcp(SocketAddr),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct SyslogConnection {
    address: SyslogAddress,
    clock: fn() -> Instant,
    socket: Option<Socket>,
    /// The connect has not ended; it fails at this time.
    connecting: Option<Instant>,
    pause: Duration,
    retry_at: Option<Instant>,
    /// The frame that is being sent, and how much of it was sent.
    frame: Vec<u8>,
    sent: usize,
}

/// Longest wait of one call, for a receiver that is slow for a moment.
pub const WAIT: Duration = Duration::from_millis(10);

/// Shortest pause between two connects.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// Longest pause between two connects.
pub const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Timeout of a TCP connect, and of data that the receiver's kernel does not acknowledge.
const CONNECT_MAX: Duration = Duration::from_secs(5);
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);

/// Attempts of [`SyslogWriter::flush`] to send the rest of a message, of [`WAIT`] each.
const FLUSH_TRIES: u32 = 20;

// === impl SyslogConnection ===

impl SyslogConnection {
    /// Returns a connection that opens with its first message.
    pub fn new(address: SyslogAddress, clock: fn() -> Instant) -> SyslogConnection {
        SyslogConnection {
            address,
            clock,
            socket: None,
            connecting: None,
            pause: PAUSE_MIN,
            retry_at: None,
            frame: Vec::new(),
            sent: 0,
        }
    }

    /// Sends a message, which is cut to [`MESSAGE_MAX`] bytes.
    ///
    /// # Errors
    /// The message is not sent. `WouldBlock`: the receiver does not read, or the pause after an
    /// error has not ended. Any other error closes the connection, except `EMSGSIZE`: the kernel
    /// never sends this message.
    pub fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.flush()?;
        let mut message = message.to_vec();
        message::bounded(&mut message);
        self.frame = match self.address {
            SyslogAddress::Tcp(_) => [format!("{} ", message.len()).as_bytes(), &message].concat(),
            SyslogAddress::Unix(_) | SyslogAddress::Udp(_) => message,
        };
        let result = self.flush();
        // The rest of a frame that was begun belongs to this connection.
        if self.sent > 0 {
            return Ok(());
        }
        self.frame.clear();
        result
    }

    /// Returns whether a part of the last message waits for the receiver.
    pub fn has_unsent(&self) -> bool {
        !self.frame.is_empty()
    }

    /// Sends the rest of the last message.
    ///
    /// # Errors
    /// As [`SyslogConnection::send`].
    pub fn flush(&mut self) -> io::Result<()> {
        if self.frame.is_empty() {
            return Ok(());
        }
        self.open()?;
        while self.sent < self.frame.len() {
            match self.write() {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()) => {
                    return Err(error);
                }
                Err(error) => return Err(self.fail(error)),
            }
        }
        self.frame.clear();
        self.sent = 0;
        self.pause = PAUSE_MIN;
        Ok(())
    }

    /// Writes what fits; waits once for [`WAIT`].
    fn write(&self) -> io::Result<usize> {
        let Some(socket) = &self.socket else { return Err(io::ErrorKind::WouldBlock.into()) };
        let rest = &self.frame[self.sent..];
        match socket.send(rest) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && writable(socket)? => {
                socket.send(rest)
            }
            other => other,
        }
    }

    /// Opens the connection if it is not open. Returns an error until it can be used.
    fn open(&mut self) -> io::Result<()> {
        let now = (self.clock)();
        if self.socket.is_none() {
            if self.retry_at.is_some_and(|at| now < at) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if let Err(error) = self.connect(now) {
                return Err(self.fail(error));
            }
        }
        let Some(socket) = &self.socket else { return Err(io::ErrorKind::WouldBlock.into()) };
        let Some(until) = self.connecting else {
            return match self.check_peer() {
                Ok(()) => Ok(()),
                Err(error) => Err(self.fail(error)),
            };
        };
        if !writable(socket)? {
            let late = now >= until;
            let why = if late { io::ErrorKind::TimedOut } else { io::ErrorKind::WouldBlock };
            return Err(if late { self.fail(why.into()) } else { why.into() });
        }
        if let Some(error) = socket.take_error()? {
            return Err(self.fail(error));
        }
        self.connecting = None;
        Ok(())
    }

    fn connect(&mut self, now: Instant) -> io::Result<()> {
        let (domain, kind, address) = match &self.address {
            SyslogAddress::Unix(path) => (Domain::UNIX, Type::DGRAM, SockAddr::unix(path)?),
            SyslogAddress::Udp(to) => (Domain::for_address(*to), Type::DGRAM, (*to).into()),
            SyslogAddress::Tcp(to) => (Domain::for_address(*to), Type::STREAM, (*to).into()),
        };
        let socket = Socket::new(domain, kind.nonblocking(), None)?;
        if kind == Type::STREAM {
            socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
        }
        match socket.connect(&address) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {
                self.connecting = Some(now + CONNECT_MAX);
            }
            Err(error) => return Err(error),
        }
        self.socket = Some(socket);
        // A new connection gets the frame from its start.
        self.sent = 0;
        Ok(())
    }

    /// Finds a closed TCP connection before a message is given to the kernel. Receivers send
    /// nothing; what one sends is discarded.
    fn check_peer(&self) -> io::Result<()> {
        let (SyslogAddress::Tcp(_), Some(socket)) = (&self.address, &self.socket) else {
            return Ok(());
        };
        let mut reader: &Socket = socket;
        match io::Read::read(&mut reader, &mut [0; 512]) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Closes the connection until the pause ends.
    fn fail(&mut self, error: io::Error) -> io::Error {
        self.socket = None;
        self.connecting = None;
        self.sent = 0;
        self.retry_at = Some((self.clock)() + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        error
    }
}

/// Waits until the socket is writable, at most [`WAIT`].
fn writable(socket: &Socket) -> io::Result<bool> {
    let wait = Timespec { tv_sec: 0, tv_nsec: WAIT.subsec_nanos().into() };
    match poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&wait)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes the lines of a [`LogQueue`](crate::log_queue::LogQueue) to a receiver, one message
/// per line. Standard error gets one line when the receiver fails.
#[derive(Debug)]
pub struct SyslogWriter {
    connection: SyslogConnection,
    failing: bool,
}

// === impl SyslogWriter ===

impl SyslogWriter {
    /// Returns a writer over this connection.
    pub fn new(connection: SyslogConnection) -> SyslogWriter {
        SyslogWriter { connection, failing: false }
    }

    fn note(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.failing, true) {
            let _ = writeln!(
                io::stderr(),
                "tidegate: cannot send the log to syslog: {error}; the log waits, \
                 and lines are dropped when its queue is full"
            );
        }
    }
}

impl Write for SyslogWriter {
    /// Sends one line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.connection.send(line.strip_suffix(b"\n").unwrap_or(line)) {
            Ok(()) => {
                self.failing = false;
                Ok(line.len())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            Err(error) if error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()) => Err(error),
            Err(error) => {
                self.note(&error);
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        for _ in 0..FLUSH_TRIES {
            match self.connection.flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

#[cfg(test)]
mod tests;
