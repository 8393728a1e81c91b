//! Child processes: which one has ended, and what a new one inherits.
//!
//! Used by the probe helper, which starts commands. It never starts a process.

#![allow(unsafe_code)]

use nix::sys::wait::{Id, WaitPidFlag, waitid};
use rustix::process::{Pid, set_child_subreaper};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// First descriptor after standard input, output and error.
const FIRST_FD: RawFd = 3;

/// Returns a child that has ended and is not reaped, if there is one. It stays unreaped.
pub fn ended_child() -> Option<Pid> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    let pid = waitid(Id::All, flags).ok()?.pid()?;
    Pid::from_raw(pid.as_raw())
}

/// Makes this process the parent of processes whose parents end: those that its children start.
///
/// # Errors
/// The error of the kernel.
pub fn adopt_orphans() -> io::Result<()> {
    // The value only has to be another one than `None`.
    Ok(set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Closes every other descriptor above standard error. Call it before this process opens any
/// but `kept`.
///
/// # Errors
/// `/proc` is not mounted.
pub fn keep_only(kept: &OwnedFd) -> io::Result<()> {
    let entries = std::fs::read_dir("/proc/self/fd")?.flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let numbers: Vec<RawFd> = numbers.collect();
    for fd in numbers.into_iter().filter(|fd| *fd >= FIRST_FD && *fd != kept.as_raw_fd()) {
        // SAFETY: the caller has opened no other descriptor, so no value of this process owns
        // this one. That of the directory is closed already.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitId, WaitIdOptions, waitid};

    #[test]
    fn ended_child_is_named_until_it_is_reaped() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
        assert_eq!(ended_child(), Some(pid));
        assert_eq!(ended_child(), Some(pid));
        child.wait().unwrap();
        assert_ne!(ended_child(), Some(pid));
    }
}
