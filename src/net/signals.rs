//! The signals this program documents: held back, taken one by one, sent.
//!
//! Called by `cli` as the first thing in the process, by `daemon` once its handlers
//! are there, and by the supervisor, which never has handlers. A blocked signal
//! stays pending; threads and programs that are started meanwhile inherit the mask,
//! so that none of them can be ended by one.

use nix::sys::signal::{SigSet, SigmaskHow, Signal as Number};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Pid, Signal};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// Stop, stop, reload, upgrade.
const DOCUMENTED: [Number; 4] = [Number::SIGTERM, Number::SIGINT, Number::SIGHUP, Number::SIGUSR2];

/// What a thread holds back, to be restored.
#[derive(Debug, Clone, Copy)]
pub struct Mask(SigSet);

/// Takes the documented signals, and the news that a child has ended.
#[derive(Debug)]
pub struct SignalQueue(SignalFd);

/// What [`SignalQueue::take`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A child has ended or several have.
    ChildEnded,
    /// One of the documented signals.
    Signal(Signal),
}

/// Holds the documented signals back on this thread and those it starts; gives what
/// was held back before.
pub fn hold_back() -> Mask {
    let documented: SigSet = DOCUMENTED.into_iter().collect();
    // It fails for no valid arguments (sigprocmask(2)).
    Mask(documented.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap_or_else(|_| SigSet::empty()))
}

/// Lets the documented signals through to this thread: it takes them for the whole
/// process where all others hold them back.
pub fn let_through() {
    let documented: SigSet = DOCUMENTED.into_iter().collect();
    let _ = documented.thread_unblock();
}

/// Sends `signal` to a process.
///
/// # Errors
/// It is gone, or not to be signalled by this one.
pub fn send(pid: Pid, signal: Signal) -> io::Result<()> {
    Ok(rustix::process::kill_process(pid, signal)?)
}

// === impl Mask ===

impl Mask {
    /// Goes back to it.
    pub fn restore(self) {
        let _ = self.0.thread_set_mask();
    }
}

// === impl SignalQueue ===

impl SignalQueue {
    /// From now on signals are taken from here alone. To be called while there is one
    /// thread.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn open() -> io::Result<SignalQueue> {
        let mut wanted: SigSet = DOCUMENTED.into_iter().collect();
        wanted.add(Number::SIGCHLD);
        wanted.thread_block()?;
        Ok(SignalQueue(SignalFd::with_flags(
            &wanted,
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?))
    }

    /// The next one; `None` where none is pending.
    ///
    /// # Errors
    /// The kernel refuses, which it has no reason for.
    pub fn take(&self) -> io::Result<Option<Taken>> {
        let Some(info) = self.0.read_signal()? else { return Ok(None) };
        let taken = match i32::try_from(info.ssi_signo).map(Number::try_from) {
            Ok(Ok(Number::SIGTERM)) => Taken::Signal(Signal::TERM),
            Ok(Ok(Number::SIGINT)) => Taken::Signal(Signal::INT),
            Ok(Ok(Number::SIGHUP)) => Taken::Signal(Signal::HUP),
            Ok(Ok(Number::SIGUSR2)) => Taken::Signal(Signal::USR2),
            _ => Taken::ChildEnded,
        };
        Ok(Some(taken))
    }
}

impl AsFd for SignalQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_held_back_waits_for_the_queue() {
        let held = std::thread::spawn(|| {
            let before = hold_back();
            let queue = SignalQueue::open().unwrap();
            assert_eq!(queue.take().unwrap(), None);
            // To this thread alone: the others of this test have their default.
            nix::sys::signal::raise(Number::SIGHUP).unwrap();
            let taken = queue.take().unwrap();
            before.restore();
            taken
        });
        assert_eq!(held.join().unwrap(), Some(Taken::Signal(Signal::HUP)));
    }
}
