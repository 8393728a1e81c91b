//! Pipes for splice(2): bulk bytes go from socket to socket without being
//! copied through this process.
//!
//! Used by the relay engines. A worker has a bounded pool; a pipe is taken when
//! there is something to move and given back as soon as it is empty.

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

/// Asked of the kernel for each pipe; beyond its limits for users other than
/// root (pipe(7), `pipe-user-pages-soft`) pipes stay smaller.
const PIPE_BYTES: usize = 1024 * 1024;

/// A fill of less than this share of a pipe's size, where the pipe is what ended
/// it, is crammed. At a quarter, packets of an Ethernet are well above.
const CRAMMED: usize = 4;

/// Pipes one worker may have. A stalled receiver pins one, at most
/// [`PIPE_BYTES`] of it; streams beyond this number, or beyond what the budget
/// has left, are copied.
pub const PIPES_MAX: usize = 64;

/// Unused pipes kept open.
const SPARE_MAX: usize = 8;

/// A pipe and what is in it. Dropping it closes it and makes room in the pool.
#[derive(Debug)]
pub struct Pipe {
    ends: PipeEnds,
    holds: usize,
    _counted: PipeCount,
    _share: BudgetShare,
}

/// A worker's pipes.
#[derive(Debug, Default)]
pub struct Pipes {
    spare: Vec<PipeEnds>,
    /// Since the last [`Pipes::trim`].
    used: bool,
    in_use: Rc<Cell<usize>>,
    /// Each pipe in use takes its size from it.
    budget: Arc<MemoryBudget>,
    /// Why the kernel gave none, since [`Pipes::trouble`] was last asked.
    trouble: Option<io::Error>,
}

#[derive(Debug)]
struct PipeEnds {
    read: OwnedFd,
    write: OwnedFd,
    size: usize,
}

/// What a fill brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillResult {
    /// 0 is the peer's FIN.
    pub bytes: usize,
    /// The pipe is full of little: a piece of a packet takes up a page's place
    /// in it, however small it is. Copying is cheaper then.
    pub crammed: bool,
}

/// One pipe among those in use.
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
        // A smaller pipe works as well, in more steps.
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
    /// Bytes in it.
    pub fn holds(&self) -> usize {
        self.holds
    }

    /// Takes what has arrived at `socket`, as far as there is room. Only for an
    /// empty pipe: a full one would say `WouldBlock` as well.
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
        // As much again was there to be taken.
        let crammed = bytes < self.ends.size / CRAMMED
            && bytes > 0
            && ioctl::in_queue(socket.as_fd()) >= bytes as u64;
        Ok(FillResult { bytes, crammed })
    }

    /// Sends what is in it, as far as `socket` has room.
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
    /// None yet.
    pub fn new(budget: Arc<MemoryBudget>) -> Pipes {
        Pipes { budget, ..Pipes::default() }
    }

    /// An empty pipe; `None` at [`PIPES_MAX`], when the kernel gives none or when
    /// the budget has no room for what it may hold.
    pub fn take(&mut self) -> Option<Pipe> {
        if self.in_use.get() == PIPES_MAX {
            return None;
        }
        self.used = true;
        let ends = match self.spare.pop() {
            Some(ends) => ends,
            None => PipeEnds::new().map_err(|error| self.trouble = Some(error)).ok()?,
        };
        let Some(share) = self.budget.try_take(ends.size) else {
            self.spare.push(ends);
            return None;
        };
        self.in_use.set(self.in_use.get() + 1);
        Some(Pipe { ends, holds: 0, _counted: PipeCount(Rc::clone(&self.in_use)), _share: share })
    }

    /// Why the kernel gave no pipe, once after it did not.
    #[inline]
    pub fn last_error(&mut self) -> Option<io::Error> {
        self.trouble.take()
    }

    /// Closes the spare pipes if none was taken since the last call: to be
    /// called now and then, so that an idle worker keeps none.
    pub fn trim(&mut self) {
        if !std::mem::take(&mut self.used) {
            self.spare = Vec::new();
        }
    }

    /// Whether there is something to trim.
    pub fn has_spare(&self) -> bool {
        !self.spare.is_empty()
    }

    /// Takes a pipe back. One that still holds something is closed.
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
    fn bytes_pass_from_socket_to_socket() {
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
    fn a_pipe_full_of_small_pieces_is_crammed() {
        let (mut from, entry) = UnixStream::pair().unwrap();
        let mut pipe = Pipes::default().take().unwrap();
        // Each in a buffer of its own; hundreds fit into a socket.
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
    fn an_idle_pool_keeps_no_pipe() {
        let mut pool = Pipes::default();
        let pipe = pool.take().unwrap();
        pool.give_back(pipe);
        pool.trim();
        assert!(pool.has_spare(), "one was used a moment ago");
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
    fn the_pool_is_bounded_and_a_dropped_pipe_makes_room() {
        let mut pool = Pipes::default();
        let mut pipes: Vec<Pipe> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(pipes.len(), PIPES_MAX);
        drop(pipes.pop());
        pool.give_back(pipes.pop().unwrap());
        pipes.extend(std::iter::from_fn(|| pool.take()));
        assert_eq!(pipes.len(), PIPES_MAX);
    }
}
