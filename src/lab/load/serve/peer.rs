//! One connection of a server.
//!
//! Driven by `worker`. It returns what to do with the connection and leaves closing to
//! the worker. It never waits.

use super::{Behaviour, ServeReport};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use tidegate_net::epoll::{Epoll, EpollEvent, EpollInterest};
use tidegate_net::stream;

/// A connection is not read while this number of answer bytes is unsent. A client that
/// only sends is then limited by TCP and does not fill the server's memory.
const UNSENT_MAX: u64 = 1024 * 1024;

/// Maximum number of full buffers that are received or sent in one turn, so that other
/// connections are served.
const TURN_MAX: usize = 4;

/// A connection and its counters.
#[derive(Debug)]
pub(super) struct ServedConnection {
    socket: OwnedFd,
    /// Bytes received.
    got: u64,
    /// Received bytes of an incomplete request.
    partial: usize,
    /// Unsent filler bytes.
    unsent: u64,
    /// Unsent bytes to echo; holds no memory while it is empty.
    left: Vec<u8>,
    /// Whether the socket is also watched for writability.
    both: bool,
    /// Whether a FIN follows the unsent bytes, or was sent.
    fin: Fin,
    /// Whether the peer has sent FIN. The socket must then be read until the read
    /// returns 0.
    hung_up: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fin {
    No,
    Due,
    Sent,
}

/// What to do with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NextAction {
    Keep,
    Close,
    Reset,
}

/// State that all connections of a thread share.
#[derive(Debug)]
pub(super) struct ServeShared {
    pub(super) behaviour: Behaviour,
    /// Bytes at the start of each connection that are not echoed.
    pub(super) skip: u64,
    pub(super) epoll: Epoll,
    pub(super) served: ServeReport,
    /// Receive buffer.
    pub(super) buffer: Box<[u8]>,
    /// Bytes to send, unless the behaviour echoes.
    pub(super) filler: Box<[u8]>,
}

// === impl ServedConnection ===

impl ServedConnection {
    pub(super) fn new(socket: OwnedFd) -> ServedConnection {
        ServedConnection {
            socket,
            got: 0,
            partial: 0,
            unsent: 0,
            left: Vec::new(),
            both: false,
            fin: Fin::No,
            hung_up: false,
        }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Handles a ready socket.
    pub(super) fn ready(
        &mut self,
        with: &mut ServeShared,
        readiness: EpollEvent,
    ) -> io::Result<NextAction> {
        self.hung_up |= readiness.hang_up;
        match with.behaviour {
            Behaviour::Stall => self.only_failures(readiness),
            Behaviour::SlowRead { .. } => self.only_failures(readiness),
            Behaviour::Sink => self.discard(with, usize::MAX),
            Behaviour::Source { .. } => self.stream(with, readiness),
            Behaviour::Respond { .. } | Behaviour::HalfClose { .. } => {
                self.answer(with, readiness.token)
            }
            Behaviour::Echo | Behaviour::Hiccup { .. } | Behaviour::Reset { .. } => {
                self.echo(with, readiness.token)
            }
        }
    }

    fn only_failures(&self, readiness: EpollEvent) -> io::Result<NextAction> {
        if readiness.failed {
            stream::connect_result(&self.socket)?;
            return Ok(NextAction::Close);
        }
        Ok(NextAction::Keep)
    }

    /// Receives and discards at most `limit` bytes.
    pub(super) fn discard(
        &mut self,
        with: &mut ServeShared,
        limit: usize,
    ) -> io::Result<NextAction> {
        let length = with.buffer.len().min(limit);
        match stream::discard(&self.socket, &mut with.buffer[..length]) {
            Ok(0) => Ok(NextAction::Close),
            Ok(taken) => {
                with.served.bytes_in += taken as u64;
                Ok(NextAction::Keep)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(NextAction::Keep),
            Err(error) => Err(error),
        }
    }

    /// Sends as much filler as the socket accepts.
    fn stream(&mut self, with: &mut ServeShared, readiness: EpollEvent) -> io::Result<NextAction> {
        if readiness.hang_up {
            return Ok(NextAction::Close);
        }
        let mut turn = 0;
        while turn < with.buffer.len() {
            match stream::send(&self.socket, &with.filler) {
                Ok(sent) => {
                    turn += sent;
                    with.served.bytes_out += sent as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(NextAction::Keep)
    }

    /// Receives requests and sends answers.
    fn answer(&mut self, with: &mut ServeShared, token: u64) -> io::Result<NextAction> {
        for _ in 0..TURN_MAX {
            self.flush(with)?;
            if self.unsent >= UNSENT_MAX {
                return self.watch_writable(with, token);
            }
            let taken = match stream::discard(&self.socket, &mut with.buffer) {
                Ok(0) => return Ok(self.done()),
                Ok(taken) => taken,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return self.watch_writable(with, token);
                }
                Err(error) => return Err(error),
            };
            with.served.bytes_in += taken as u64;
            self.count_requests(with, taken);
            self.flush(with)?;
            if taken < with.buffer.len() && !self.hung_up {
                return self.watch_writable(with, token);
            }
        }
        self.requeue(with, token)
    }

    /// Counts `taken` received bytes and adds the answers that they require.
    fn count_requests(&mut self, with: &mut ServeShared, taken: usize) {
        match with.behaviour {
            Behaviour::Respond { request, answer } => {
                self.partial += taken;
                let whole = self.partial / request;
                self.partial %= request;
                with.served.requests += whole as u64;
                self.unsent += whole as u64 * answer as u64;
            }
            Behaviour::HalfClose { answer } if self.got == 0 => {
                self.unsent = answer as u64;
                self.fin = Fin::Due;
            }
            _ => {}
        }
        self.got += taken as u64;
    }

    /// Sends as much of the answer as the socket accepts, and then the FIN.
    fn flush(&mut self, with: &mut ServeShared) -> io::Result<()> {
        while self.unsent > 0 {
            let length = self.unsent.min(with.filler.len() as u64) as usize;
            match stream::send(&self.socket, &with.filler[..length]) {
                Ok(sent) => {
                    self.unsent -= sent as u64;
                    with.served.bytes_out += sent as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        if self.fin == Fin::Due {
            self.fin = Fin::Sent;
            stream::shutdown_write(&self.socket)?;
        }
        Ok(())
    }

    /// Handles the peer's FIN.
    fn done(&self) -> NextAction {
        // Unsent bytes are sent first. The socket reports when it is writable.
        if self.unsent > 0 || !self.left.is_empty() { NextAction::Keep } else { NextAction::Close }
    }

    /// Receives bytes and sends them back.
    fn echo(&mut self, with: &mut ServeShared, token: u64) -> io::Result<NextAction> {
        for _ in 0..TURN_MAX {
            if !self.send_left(with)? {
                return self.watch_writable(with, token);
            }
            let received = match stream::receive(&self.socket, &mut with.buffer) {
                Ok(0) => return Ok(NextAction::Close),
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(NextAction::Keep);
                }
                Err(error) => return Err(error),
            };
            let skipped = with.skip.saturating_sub(self.got).min(received as u64) as usize;
            with.served.bytes_in += received as u64;
            self.got += received as u64;
            if matches!(with.behaviour, Behaviour::Reset { after } if self.got >= after) {
                return Ok(NextAction::Reset);
            }
            let echoed = &with.buffer[skipped..received];
            let sent = match stream::send(&self.socket, echoed) {
                Ok(sent) => sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            with.served.bytes_out += sent as u64;
            if sent < echoed.len() {
                self.left.extend_from_slice(&echoed[sent..]);
                // From here on, every read must continue until the socket is empty.
                self.hung_up = true;
            } else if received < with.buffer.len() && !self.hung_up {
                return Ok(NextAction::Keep);
            }
        }
        self.requeue(with, token)
    }

    /// Sends the bytes that the socket did not accept before. Returns whether all were
    /// sent.
    fn send_left(&mut self, with: &mut ServeShared) -> io::Result<bool> {
        if self.left.is_empty() {
            return Ok(true);
        }
        match stream::send(&self.socket, &self.left) {
            Ok(sent) => {
                with.served.bytes_out += sent as u64;
                self.left.drain(..sent);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if self.left.is_empty() {
            self.left = Vec::new();
        }
        Ok(self.left.is_empty())
    }

    /// Watches the socket for writability if bytes are unsent.
    fn watch_writable(&mut self, with: &ServeShared, token: u64) -> io::Result<NextAction> {
        if !self.both && (self.unsent > 0 || !self.left.is_empty()) {
            self.both = true;
            with.epoll.change(&self.socket, token, EpollInterest::Both)?;
        }
        Ok(NextAction::Keep)
    }

    /// Ends the turn with unfinished work. Registering the socket again reports it
    /// again.
    fn requeue(&mut self, with: &ServeShared, token: u64) -> io::Result<NextAction> {
        self.both |= self.unsent > 0 || !self.left.is_empty();
        let interest = if self.both { EpollInterest::Both } else { EpollInterest::EdgeReadable };
        with.epoll.change(&self.socket, token, interest)?;
        Ok(NextAction::Keep)
    }
}
