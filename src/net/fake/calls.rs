//! The system calls of the fake kernel.
//!
//! Called only by the wrappers in `net`. A call returns `None` if this thread has no fake
//! kernel or the descriptor belongs to the real kernel. It never blocks.

use super::plan;
use super::socket::{PeerSignal, SimSocketState, SocketRole, write_stream};
use super::{InjectedFault, SimCall, SimKernel, SimPipe, try_with};
use crate::clock;
use crate::stream::Delivery;
use rustix::event::epoll::{Event, EventFlags};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

type SimResult<T> = Option<io::Result<T>>;

fn errno<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// Runs `call` on the socket behind `fd`.
fn on<T>(
    fd: &impl AsFd,
    call: impl FnOnce(&mut SimKernel, usize) -> io::Result<T>,
) -> SimResult<T> {
    let fd = fd.as_fd().as_raw_fd();
    try_with(|kernel| kernel.find(fd).map(|id| call(kernel, id))).flatten()
}

pub fn socket(address: SocketAddr) -> SimResult<OwnedFd> {
    try_with(|kernel| match kernel.fault(SimCall::Socket, None) {
        Some(InjectedFault::Errno(error)) => errno(error),
        _ => kernel.add_socket(SocketRole::Backend(address)).map(|(own, _)| own),
    })
}

/// The first connect(2) of a socket, and the second, which returns the result.
pub fn connect(fd: &impl AsFd) -> SimResult<()> {
    on(fd, |kernel, id| match kernel.sockets[id].state {
        SimSocketState::Fresh => {
            if let Some(InjectedFault::Errno(error)) = kernel.fault(SimCall::Connect, Some(id)) {
                kernel.sockets[id].dead = true;
                return errno(error);
            }
            kernel.sockets[id].state = SimSocketState::Connecting;
            if kernel.connects_at_once && kernel.rng.bool() {
                kernel.decide(id);
            }
            errno(libc::EINPROGRESS)
        }
        SimSocketState::Connecting if kernel.sockets[id].dead => {
            errno(std::mem::take(&mut kernel.sockets[id].error))
        }
        SimSocketState::Connecting => errno(libc::EALREADY),
        SimSocketState::Up => Ok(()),
    })
}

pub fn take_error(fd: &impl AsFd) -> SimResult<()> {
    on(fd, |kernel, id| match std::mem::take(&mut kernel.sockets[id].error) {
        0 => Ok(()),
        error => errno(error),
    })
}

pub fn receive(fd: &impl AsFd, buffer: &mut [u8]) -> SimResult<usize> {
    on(fd, |kernel, id| {
        let (stream, from, count) = kernel.take(SimCall::Receive, id, buffer.len() as u64)?;
        write_stream(stream, from, &mut buffer[..count as usize]);
        Ok(count as usize)
    })
}

pub fn peek(fd: &impl AsFd, buffer: &mut [u8]) -> SimResult<usize> {
    on(fd, |kernel, id| {
        let (stream, from, count) = kernel.look(id, buffer.len() as u64)?;
        write_stream(stream, from, &mut buffer[..count as usize]);
        Ok(count as usize)
    })
}

pub fn send(fd: &impl AsFd, bytes: &[u8]) -> SimResult<usize> {
    on(fd, |kernel, id| {
        let count = kernel.may_send(SimCall::Send, id, bytes.len() as u64)? as usize;
        kernel.sockets[id].put(&bytes[..count]);
        kernel.after_put(id);
        Ok(count)
    })
}

pub fn shutdown_write(fd: &impl AsFd) -> SimResult<()> {
    on(fd, |kernel, id| {
        if let Some(InjectedFault::Errno(error)) = kernel.fault(SimCall::Shutdown, Some(id)) {
            return errno(error);
        }
        if kernel.sockets[id].dead {
            return errno(libc::ENOTCONN);
        }
        kernel.sockets[id].shut = true;
        kernel.sockets[id].last_signal = PeerSignal::Fin;
        kernel.changed(id);
        Ok(())
    })
}

pub fn reset_on_close(fd: &impl AsFd) -> Option<()> {
    on(fd, |kernel, id| {
        kernel.sockets[id].reset_on_close = true;
        Ok(())
    })
    .map(|_| ())
}

pub fn tear_down(fd: &impl AsFd) -> Option<()> {
    on(fd, |kernel, id| {
        kernel.sockets[id].fail(libc::ECONNABORTED);
        kernel.sockets[id].last_signal = PeerSignal::Reset;
        kernel.changed(id);
        Ok(())
    })
    .map(|_| ())
}

/// Sets a socket option. The options have no effect here.
pub fn set_option(fd: &impl AsFd) -> SimResult<()> {
    on(fd, |kernel, id| match kernel.fault(SimCall::Option, Some(id)) {
        Some(InjectedFault::Errno(error)) => errno(error),
        _ => Ok(()),
    })
}

pub fn delivery(fd: &impl AsFd) -> Option<Delivery> {
    on(fd, |kernel, id| {
        let socket = &kernel.sockets[id];
        let quiet = clock::now().saturating_duration_since(socket.moved_at);
        let (waiting, dead) = (socket.queued(), socket.dead);
        Ok(Delivery { waiting, quiet: Some(quiet), blocked: false, dead })
    })
    .and_then(Result::ok)
}

pub fn unread(fd: &impl AsFd) -> Option<u64> {
    on(fd, |kernel, id| Ok(kernel.sockets[id].waiting())).and_then(Result::ok)
}

pub fn accept(fd: &impl AsFd) -> SimResult<(OwnedFd, SocketAddr)> {
    let fd = fd.as_fd();
    try_with(|kernel| {
        let listener = fd.as_raw_fd();
        if !kernel.listeners.contains_key(&listener) {
            return None;
        }
        while rustix::net::recv(fd, &mut [0_u8; 8], rustix::net::RecvFlags::DONTWAIT).is_ok() {}
        if kernel.listeners[&listener] == 0 {
            return Some(errno(libc::EAGAIN));
        }
        match kernel.fault(SimCall::Accept, None) {
            // The client stays in the queue, so EAGAIN would be wrong here.
            Some(InjectedFault::Errno(libc::EAGAIN)) | Some(InjectedFault::Short) | None => {}
            Some(InjectedFault::Errno(error)) => return Some(errno(error)),
        }
        *kernel.listeners.get_mut(&listener)? -= 1;
        let added = kernel.add_socket(SocketRole::Client);
        Some(added.map(|(own, id)| (own, SimKernel::address_of(id))))
    })
    .flatten()
}

pub fn has_queued(fd: &impl AsFd) -> Option<bool> {
    let fd = fd.as_fd().as_raw_fd();
    try_with(|kernel| kernel.listeners.get(&fd).map(|queue| *queue > 0)).flatten()
}

// === pipes ===

/// Makes a pipe. Returns the read end, the write end and its size.
pub fn pipe() -> SimResult<(OwnedFd, OwnedFd, usize)> {
    try_with(|kernel| {
        if let Some(InjectedFault::Errno(error)) = kernel.fault(SimCall::Pipe, None) {
            return errno(error);
        }
        kernel.note_closed();
        let flags = rustix::pipe::PipeFlags::CLOEXEC;
        let (read_watch, read) = rustix::pipe::pipe_with(flags)?;
        let (write_watch, write) = rustix::pipe::pipe_with(flags)?;
        let size = kernel.rng.choice([4096, 65_536, 1 << 20]).unwrap_or(4096);
        kernel.pipes.push(SimPipe {
            ends: [read.as_raw_fd(), write.as_raw_fd()],
            close_watches: [read_watch, write_watch],
            size,
            holds: Default::default(),
        });
        Ok((read, write, size as usize))
    })
}

/// splice(2) from a socket into a pipe. Returns the bytes moved and the bytes left in the
/// socket.
pub fn fill(fd: &impl AsFd, pipe: &OwnedFd) -> SimResult<(usize, u64)> {
    on(fd, |kernel, id| {
        let at = kernel.pipe(1, pipe);
        let held: u64 = kernel.pipes[at].holds.iter().map(|(_, _, len)| len).sum();
        let room = kernel.pipes[at].size.saturating_sub(held);
        assert!(room > 0, "fill of a full pipe");
        let (stream, from, count) = kernel.take(SimCall::Fill, id, room)?;
        if count > 0 {
            kernel.pipes[at].holds.push_back((stream, from, count));
        }
        Ok((count as usize, kernel.sockets[id].waiting()))
    })
}

/// splice(2) from a pipe into a socket.
pub fn drain(fd: &impl AsFd, pipe: &OwnedFd) -> SimResult<usize> {
    on(fd, |kernel, id| {
        let at = kernel.pipe(0, pipe);
        let Some((stream, from, held)) = kernel.pipes[at].holds.front().copied() else {
            return errno(libc::EAGAIN);
        };
        let count = kernel.may_send(SimCall::Drain, id, held)?;
        let mut bytes = vec![0; count as usize];
        write_stream(stream, from, &mut bytes);
        kernel.pipes[at].holds.pop_front();
        if count < held {
            kernel.pipes[at].holds.push_front((stream, from + count, held - count));
        }
        kernel.sockets[id].put(&bytes);
        kernel.after_put(id);
        Ok(count as usize)
    })
}

// === the epoll set ===

pub fn epoll_create() -> SimResult<OwnedFd> {
    try_with(SimKernel::epoll_create)
}

pub fn epoll_watch(fd: &impl AsFd, token: u64, interest: EventFlags) -> SimResult<()> {
    on(fd, |kernel, id| kernel.epoll_watch(id, token, interest))
}

pub fn epoll_wait(most: usize) -> SimResult<Vec<Event>> {
    try_with(|kernel| kernel.epoll_wait(most))
}

// === impl SimKernel ===

impl SimKernel {
    fn pipe(&self, end: usize, fd: &OwnedFd) -> usize {
        let fd = fd.as_raw_fd();
        let at = self.pipes.iter().rposition(|pipe| pipe.ends[end] == fd);
        at.expect("the descriptor is a pipe of the fake kernel")
    }

    /// Receives bytes. Returns stream, offset and length. Length 0 is the end of the stream.
    pub(super) fn take(
        &mut self,
        call: SimCall,
        id: usize,
        most: u64,
    ) -> io::Result<(u8, u64, u64)> {
        let most = match self.sockets[id].has_shown(most) {
            true => most,
            false => self.may_take(call, id, most)?,
        };
        let socket = &mut self.sockets[id];
        let (from, count) = socket.take(most).or_else(errno)?;
        let stream = socket.stream;
        self.note(count);
        if self.sockets[id].waiting() > 0 {
            // As if the rest arrived after the call.
            self.changed(id);
        }
        Ok((stream, from, count))
    }

    /// Returns what [`SimKernel::take`] would, without removing the bytes.
    fn look(&mut self, id: usize, most: u64) -> io::Result<(u8, u64, u64)> {
        let most = self.may_take(SimCall::Receive, id, most)?;
        let socket = &mut self.sockets[id];
        let (from, count) = socket.look(most).or_else(errno)?;
        let stream = socket.stream;
        self.note(("seen", count));
        Ok((stream, from, count))
    }

    fn may_take(&mut self, call: SimCall, id: usize, most: u64) -> io::Result<u64> {
        let most = match self.fault(call, Some(id)) {
            Some(InjectedFault::Errno(error)) => {
                self.report_later(id, error);
                return errno(error);
            }
            Some(InjectedFault::Short) => self.rng.u64(1..=most),
            None => most,
        };
        Ok(most.min(self.most))
    }

    /// Returns how many of `most` bytes a send accepts now.
    pub(super) fn may_send(&mut self, call: SimCall, id: usize, most: u64) -> io::Result<u64> {
        let most = match self.fault(call, Some(id)) {
            Some(InjectedFault::Errno(error)) => {
                self.report_later(id, error);
                return errno(error);
            }
            Some(InjectedFault::Short) => {
                // As if more space became free after the call.
                self.changed(id);
                self.rng.u64(1..=most)
            }
            None => most,
        };
        self.sockets[id].sendable(most).or_else(errno)
    }

    pub(super) fn after_put(&mut self, id: usize) {
        // In 3 of 4 cases the bytes arrive immediately; else they stay queued.
        if self.rng.u8(..4) > 0 {
            self.sockets[id].deliver(u64::MAX);
        }
        let SimKernel { sockets, .. } = self;
        let (put, dead) = (sockets[id].put, sockets[id].dead);
        self.note((id, put));
        if dead {
            self.changed(id);
        }
    }

    /// Reports the socket as ready again, because an injected EAGAIN is not followed by a
    /// real change.
    fn report_later(&mut self, id: usize, error: i32) {
        if error == libc::EAGAIN || !plan::survives(error) {
            self.changed(id);
        }
    }
}
