//! Pipes for splice(2), which moves bulk data between sockets without a copy to user
//! space.
//!
//! Used by the relay engines. Each worker has a bounded pool. An engine takes a pipe when
//! it has bytes to move and returns it when it is empty. It never waits for a socket.

use super::budget::{BudgetShare, MemoryBudget};
use super::ioctl;
use rustix::pipe::{
    PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice,
};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// Requested size of a pipe. Above the kernel's limits for users other than root
/// (pipe(7), `pipe-user-pages-soft`), pipes are smaller.
const PIPE_BYTES: usize = 1024 * 1024;

/// A full pipe with less than this share of its size is crammed: 1/4. Packets of an
/// Ethernet fill a larger share.
const CRAMMED: usize = 4;

/// Most pipes per worker. A stalled receiver keeps one in use, with at most
/// [`PIPE_BYTES`]. Streams without a pipe, because of this cap or the memory budget, are
/// copied.
pub const PIPES_MAX: usize = 64;

/// Most unused pipes that stay open.
const SPARE_MAX: usize = 8;

/// A pipe and its bytes. Dropping it closes it and frees its slot in the pool.
#[derive(Debug)]
pub struct Pipe {
    ends: PipeEnds,
    holds: usize,
    _counted: PipeCount,
    _share: BudgetShare,
}

/// The pipes of a worker.
#[derive(Debug, Default)]
pub struct Pipes {
    spare: Vec<PipeEnds>,
    /// True if a pipe was taken after the last [`Pipes::trim`].
    used: bool,
    in_use: Rc<Cell<usize>>,
    /// Each pipe in use takes its size from the budget.
    budget: Arc<MemoryBudget>,
    /// Why the last creation of a pipe failed; see [`Pipes::last_error`].
    last_error: Option<io::Error>,
}

#[derive(Debug)]
struct PipeEnds {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
}

/// The result of a fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillResult {
    /// 0: the peer sent FIN.
    pub bytes: usize,
    /// The pipe is full with few bytes, because each part of a packet uses a page of the
    /// pipe regardless of its length. Copying is cheaper then.
    pub crammed: bool,
}

/// Counts a pipe as in use until it is dropped.
#[derive(Debug)]
struct PipeCount(Rc<Cell<usize>>);

// === impl PipeEnds ===

impl PipeEnds {
    fn new() -> io::Result<PipeEnds> {
        #[cfg(any(test, feature = "fake"))]
        if let Some(pipe) = super::fake::pipe() {
            return pipe.map(|(read, write, size)| PipeEnds { read, write, size });
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A smaller pipe needs more calls but works.
        let size = match fcntl_setpipe_size(&write, PIPE_BYTES) {
            Ok(size) => size,
            Err(_) => fcntl_getpipe_size(&write)?,
        };
        Ok(PipeEnds { read, write, size })
    }
}

impl Drop for PipeCount {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

// === impl Pipe ===

impl Pipe {
    /// Returns the bytes in the pipe.
    pub fn holds(&self) -> usize {
        self.holds
    }

    /// Moves received bytes from `socket` into the pipe, which must be empty.
    ///
    /// With a full pipe, `WouldBlock` would not tell whether the socket or the pipe blocks.
    pub fn fill(&mut self, socket: impl AsFd) -> io::Result<FillResult> {
        #[cfg(any(test, feature = "fake"))]
        if let Some(filled) = super::fake::fill(&socket, &self.ends.write) {
            let (bytes, left) = filled?;
            self.holds += bytes;
            let crammed = bytes < self.ends.size / CRAMMED && bytes > 0 && left >= bytes as u64;
            return Ok(FillResult { bytes, crammed });
        }
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let bytes = splice(&socket, None, &self.ends.write, None, PIPE_BYTES, flags)?;
        self.holds += bytes;
        // The socket has at least as many bytes left, so the pipe ended the fill.
        let crammed = bytes < self.ends.size / CRAMMED
            && bytes > 0
            && ioctl::in_queue(socket.as_fd()) >= bytes as u64;
        Ok(FillResult { bytes, crammed })
    }

    /// Moves bytes from the pipe to the send buffer of `socket`.
    pub fn drain(&mut self, socket: impl AsFd) -> io::Result<usize> {
        #[cfg(any(test, feature = "fake"))]
        if let Some(drained) = super::fake::drain(&socket, &self.ends.read) {
            return drained.inspect(|moved| self.holds -= moved);
        }
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = splice(&self.ends.read, None, socket, None, self.holds, flags)?;
        self.holds -= moved;
        Ok(moved)
    }
}

// === impl Pipes ===

impl Pipes {
    /// Makes an empty pool.
    pub fn new(budget: Arc<MemoryBudget>) -> Pipes {
        Pipes { budget, ..Pipes::default() }
    }

    /// Returns an empty pipe. `None`: [`PIPES_MAX`] is reached, the kernel cannot create a
    /// pipe, or the memory budget cannot cover its size.
    pub fn take(&mut self) -> Option<Pipe> {
        if self.in_use.get() == PIPES_MAX {
            return None;
        }
        self.used = true;
        let ends = match self.spare.pop() {
            Some(ends) => ends,
            None => PipeEnds::new().map_err(|error| self.last_error = Some(error)).ok()?,
        };
        let Some(share) = self.budget.try_take(ends.size) else {
            self.spare.push(ends);
            return None;
        };
        self.in_use.set(self.in_use.get() + 1);
        Some(Pipe { ends, holds: 0, _counted: PipeCount(Rc::clone(&self.in_use)), _share: share })
    }

    /// Returns once why the kernel could not create a pipe.
    #[inline]
    pub fn last_error(&mut self) -> Option<io::Error> {
        self.last_error.take()
    }

    /// Closes the spare pipes if none was taken after the last call.
    ///
    /// The engine calls it periodically, so that an idle worker keeps no pipe.
    pub fn trim(&mut self) {
        if !std::mem::take(&mut self.used) {
            self.spare = Vec::new();
        }
    }

    /// Returns whether the pool has spare pipes.
    pub fn has_spare(&self) -> bool {
        !self.spare.is_empty()
    }

    /// Returns a pipe to the pool. A pipe that still holds bytes is closed.
    pub fn give_back(&mut self, pipe: Pipe) {
        if pipe.holds == 0 && self.spare.len() < SPARE_MAX {
            self.spare.push(pipe.ends);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_move_from_socket_to_socket() {
        let (mut from, entry) = UnixStream::pair().unwrap();
        let (exit, mut to) = UnixStream::pair().unwrap();
        let mut pipe = Pipes::default().take().unwrap();
        from.write_all(b"in bulk").unwrap();
        assert_eq!(pipe.fill(&entry).unwrap(), FillResult { bytes: 7, crammed: false });
        assert_eq!((pipe.drain(&exit).unwrap(), pipe.holds()), (7, 0));
        let mut got = [0; 7];
        to.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"in bulk");
    }

    #[test]
    fn pipe_full_of_small_parts_is_crammed() {
        let (mut from, entry) = UnixStream::pair().unwrap();
        let mut pipe = Pipes::default().take().unwrap();
        // Each write has its own buffer. Hundreds of them fit into a socket.
        for _ in 0..250 {
            from.write_all(b"piece").unwrap();
        }
        while pipe.ends.size > 4096 {
            pipe.ends.size = fcntl_setpipe_size(&pipe.ends.write, pipe.ends.size / 2).unwrap();
        }
        let FillResult { bytes, crammed } = pipe.fill(&entry).unwrap();
        assert!(bytes < 100 && crammed, "{bytes}");
    }

    #[test]
    fn idle_pool_keeps_no_pipe() {
        let mut pool = Pipes::default();
        let pipe = pool.take().unwrap();
        pool.give_back(pipe);
        pool.trim();
        assert!(pool.has_spare(), "a pipe was used before the first trim");
        pool.trim();
        assert!(!pool.has_spare());
    }

    #[test]
    fn pipes_take_their_size_from_the_budget() {
        let budget = Arc::new(MemoryBudget::new(PIPE_BYTES));
        let mut pool = Pipes::new(Arc::clone(&budget));
        let pipe = pool.take().unwrap();
        assert_eq!(budget.used(), pipe.ends.size);
        let rest = budget.take(budget.max() - budget.used());
        assert!(pool.take().is_none() && pool.has_spare());
        drop(rest);
        pool.give_back(pipe);
        assert_eq!(budget.used(), 0);
        assert!(pool.take().is_some());
    }

    #[test]
    fn pool_is_bounded_and_a_dropped_pipe_frees_its_slot() {
        let mut pool = Pipes::default();
        let mut pipes: Vec<Pipe> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(pipes.len(), PIPES_MAX);
        drop(pipes.pop());
        pool.give_back(pipes.pop().unwrap());
        pipes.extend(std::iter::from_fn(|| pool.take()));
        assert_eq!(pipes.len(), PIPES_MAX);
    }
}
