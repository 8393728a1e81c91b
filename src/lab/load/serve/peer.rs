//! One connection of a server.
//!
//! Driven by `worker`. It says what became of the connection and leaves closing
//! to the worker; it never waits.

use super::{Behaviour, ServeReport};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use tidegate_net::epoll::{Epoll, EpollEvent, EpollInterest};
use tidegate_net::stream;

/// An answering connection is not read while it is owed this much: a client
/// that only sends is held back by TCP, not by our memory.
const OWED_MAX: u64 = 1024 * 1024;

/// Full buffers taken or given in one turn; then the others have theirs.
const TURN_MAX: usize = 4;

/// The connection.
#[derive(Debug)]
pub(super) struct ServedConnection {
    socket: OwnedFd,
    /// Bytes received.
    got: u64,
    /// Bytes of a request that is not yet whole.
    partial: usize,
    /// Filler bytes yet to be sent.
    owed: u64,
    /// Echoed bytes that found no room; without memory when there are none.
    left: Vec<u8>,
    /// Watched for room to send as well.
    both: bool,
    /// A FIN follows what is owed, or has.
    fin: Fin,
    /// The peer is done sending: reads go on until they say so.
    hung_up: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fin {
    No,
    Due,
    Sent,
}

/// What is to become of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectionFate {
    Keep,
    Close,
    Reset,
}

/// What all connections of a thread share.
#[derive(Debug)]
pub(super) struct ServeShared {
    pub(super) behaviour: Behaviour,
    pub(super) epoll: Epoll,
    pub(super) served: ServeReport,
    /// Received bytes go here.
    pub(super) buffer: Box<[u8]>,
    /// Sent bytes come from here, unless they are echoed.
    pub(super) filler: Box<[u8]>,
}

// === impl ServedConnection ===

impl ServedConnection {
    pub(super) fn new(socket: OwnedFd) -> ServedConnection {
        ServedConnection {
            socket,
            got: 0,
            partial: 0,
            owed: 0,
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

    /// The socket is ready for something.
    pub(super) fn ready(
        &mut self,
        with: &mut ServeShared,
        readiness: EpollEvent,
    ) -> io::Result<ConnectionFate> {
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

    fn only_failures(&self, readiness: EpollEvent) -> io::Result<ConnectionFate> {
        if readiness.failed {
            stream::connect_result(&self.socket)?;
            return Ok(ConnectionFate::Close);
        }
        Ok(ConnectionFate::Keep)
    }

    /// Takes at most `limit` bytes and throws them away.
    pub(super) fn discard(
        &mut self,
        with: &mut ServeShared,
        limit: usize,
    ) -> io::Result<ConnectionFate> {
        let length = with.buffer.len().min(limit);
        match stream::discard(&self.socket, &mut with.buffer[..length]) {
            Ok(0) => Ok(ConnectionFate::Close),
            Ok(taken) => {
                with.served.bytes_in += taken as u64;
                Ok(ConnectionFate::Keep)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(ConnectionFate::Keep),
            Err(error) => Err(error),
        }
    }

    /// Sends as much filler as there is room for.
    fn stream(
        &mut self,
        with: &mut ServeShared,
        readiness: EpollEvent,
    ) -> io::Result<ConnectionFate> {
        if readiness.hang_up {
            return Ok(ConnectionFate::Close);
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
        Ok(ConnectionFate::Keep)
    }

    /// Requests in, answers out.
    fn answer(&mut self, with: &mut ServeShared, token: u64) -> io::Result<ConnectionFate> {
        for _ in 0..TURN_MAX {
            self.pay(with)?;
            if self.owed >= OWED_MAX {
                return self.want_room(with, token);
            }
            let taken = match stream::discard(&self.socket, &mut with.buffer) {
                Ok(0) => return Ok(self.done()),
                Ok(taken) => taken,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return self.want_room(with, token);
                }
                Err(error) => return Err(error),
            };
            with.served.bytes_in += taken as u64;
            self.bill(with, taken);
            self.pay(with)?;
            if taken < with.buffer.len() && !self.hung_up {
                return self.want_room(with, token);
            }
        }
        self.again(with, token)
    }

    /// What `taken` bytes more earn the peer.
    fn bill(&mut self, with: &mut ServeShared, taken: usize) {
        match with.behaviour {
            Behaviour::Respond { request, answer } => {
                self.partial += taken;
                let whole = self.partial / request;
                self.partial %= request;
                with.served.requests += whole as u64;
                self.owed += whole as u64 * answer as u64;
            }
            Behaviour::HalfClose { answer } if self.got == 0 => {
                self.owed = answer as u64;
                self.fin = Fin::Due;
            }
            _ => {}
        }
        self.got += taken as u64;
    }

    /// Sends what is owed, as far as there is room, and the FIN behind it.
    fn pay(&mut self, with: &mut ServeShared) -> io::Result<()> {
        while self.owed > 0 {
            let length = self.owed.min(with.filler.len() as u64) as usize;
            match stream::send(&self.socket, &with.filler[..length]) {
                Ok(sent) => {
                    self.owed -= sent as u64;
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

    /// The peer has sent its last byte.
    fn done(&self) -> ConnectionFate {
        // What is still owed goes out first; room for it wakes us again.
        if self.owed > 0 || !self.left.is_empty() {
            ConnectionFate::Keep
        } else {
            ConnectionFate::Close
        }
    }

    /// Bytes in, the same bytes out.
    fn echo(&mut self, with: &mut ServeShared, token: u64) -> io::Result<ConnectionFate> {
        for _ in 0..TURN_MAX {
            if !self.send_left(with)? {
                return self.want_room(with, token);
            }
            let received = match stream::receive(&self.socket, &mut with.buffer) {
                Ok(0) => return Ok(ConnectionFate::Close),
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(ConnectionFate::Keep);
                }
                Err(error) => return Err(error),
            };
            with.served.bytes_in += received as u64;
            self.got += received as u64;
            if matches!(with.behaviour, Behaviour::Reset { after } if self.got >= after) {
                return Ok(ConnectionFate::Reset);
            }
            let sent = match stream::send(&self.socket, &with.buffer[..received]) {
                Ok(sent) => sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
            with.served.bytes_out += sent as u64;
            if sent < received {
                self.left.extend_from_slice(&with.buffer[sent..received]);
                // From here on every read must run dry before it is believed.
                self.hung_up = true;
            } else if received < with.buffer.len() && !self.hung_up {
                return Ok(ConnectionFate::Keep);
            }
        }
        self.again(with, token)
    }

    /// Sends what found no room before; whether all of it went.
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

    /// Has the connection told when there is room, if something waits for it.
    fn want_room(&mut self, with: &ServeShared, token: u64) -> io::Result<ConnectionFate> {
        if !self.both && (self.owed > 0 || !self.left.is_empty()) {
            self.both = true;
            with.epoll.change(&self.socket, token, EpollInterest::Both)?;
        }
        Ok(ConnectionFate::Keep)
    }

    /// The turn is over with more to do: registering anew tells of it again.
    fn again(&mut self, with: &ServeShared, token: u64) -> io::Result<ConnectionFate> {
        self.both |= self.owed > 0 || !self.left.is_empty();
        let interest = if self.both { EpollInterest::Both } else { EpollInterest::EdgeReadable };
        with.epoll.change(&self.socket, token, interest)?;
        Ok(ConnectionFate::Keep)
    }
}
