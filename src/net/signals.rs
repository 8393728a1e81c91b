//! The documented signals of the program: block, unblock, receive, send.
//!
//! Called by `cli` first in the process, by `daemon` after it has installed its handlers,
//! and by the supervisor, which never installs handlers. A blocked signal stays pending.
//! New threads and programs inherit the mask, so that no signal ends them before they
//! are ready.

use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal as Number, sigaction,
};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Pid, Signal};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// Shutdown (two signals), reload, upgrade.
const DOCUMENTED: [Number; 4] = [Number::SIGTERM, Number::SIGINT, Number::SIGHUP, Number::SIGUSR2];

/// A saved signal mask of a thread.
#[derive(Debug, Clone, Copy)]
pub struct Mask(SigSet);

/// A queue of the documented signals and SIGCHLD.
#[derive(Debug)]
pub struct SignalQueue(SignalFd);

/// A result of [`SignalQueue::take`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// At least one child has ended.
    ChildEnded,
    /// A documented signal.
    Signal(Signal),
}

/// Blocks the documented signals on this thread and on threads that it starts. Returns the
/// previous mask.
pub fn block() -> Mask {
    let documented: SigSet = DOCUMENTED.into_iter().collect();
    // The call fails only for invalid arguments (sigprocmask(2)).
    Mask(documented.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap_or_else(|_| SigSet::empty()))
}

/// Unblocks the documented signals on this thread. It then receives them for the process
/// if all other threads block them.
pub fn unblock() {
    let documented: SigSet = DOCUMENTED.into_iter().collect();
    let _ = documented.thread_unblock();
}

/// Makes the documented signals have no effect on this process, and unblocks all signals.
///
/// A program that this process starts gets the default actions and an empty mask (execve(2)).
/// Ignored or blocked signals would stay so in it, and `std` does not reset them.
///
/// # Errors
/// The error of sigaction(2), which is not expected.
#[allow(unsafe_code)]
pub fn outlive() -> io::Result<()> {
    extern "C" fn no_effect(_: i32) {}
    let action =
        SigAction::new(SigHandler::Handler(no_effect), SaFlags::SA_RESTART, SigSet::empty());
    for signal in DOCUMENTED {
        // SAFETY: the handler does nothing, so it is safe at any time.
        unsafe { sigaction(signal, &action) }?;
    }
    SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Sends `signal` to a process.
///
/// # Errors
/// The process has ended, or this process may not signal it.
pub fn send(pid: Pid, signal: Signal) -> io::Result<()> {
    Ok(rustix::process::kill_process(pid, signal)?)
}

// === impl Mask ===

impl Mask {
    /// Restores the mask on the calling thread.
    pub fn restore(self) {
        let _ = self.0.thread_set_mask();
    }
}

// === impl SignalQueue ===

impl SignalQueue {
    /// Opens the queue and blocks the signals. Call it while the process has one thread.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn open() -> io::Result<SignalQueue> {
        let mut wanted: SigSet = DOCUMENTED.into_iter().collect();
        wanted.add(Number::SIGCHLD);
        wanted.thread_block()?;
        Ok(SignalQueue(SignalFd::with_flags(
            &wanted,
            SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
        )?))
    }

    /// Returns the next pending signal. `None`: no signal is pending.
    ///
    /// # Errors
    /// The error of read(2), which is not expected.
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
    fn blocked_signal_stays_pending_for_the_queue() {
        let held = std::thread::spawn(|| {
            let before = block();
            let queue = SignalQueue::open().unwrap();
            assert_eq!(queue.take().unwrap(), None);
            // raise() signals this thread only. Other threads of the test do not block it.
            nix::sys::signal::raise(Number::SIGHUP).unwrap();
            let taken = queue.take().unwrap();
            before.restore();
            taken
        });
        assert_eq!(held.join().unwrap(), Some(Taken::Signal(Signal::HUP)));
    }
}
