//! Which system calls fail, and how: at random from a seed, or the call that a test names.
//!
//! The fake kernel uses it before every call. It has the errnos of each call and whether a
//! connection survives them. It never changes a socket.

use fastrand::Rng;

/// A system call, or an operation of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SimCall {
    Accept,
    Socket,
    Connect,
    Decide,
    Receive,
    Send,
    Shutdown,
    Fill,
    Drain,
    Pipe,
    Watch,
    Wait,
    Option,
    Enter,
    RingReceive,
    RingSend,
    RingPoll,
}

/// A fault of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InjectedFault {
    Errno(i32),
    /// The call moves fewer bytes than it could.
    Short,
}

/// When calls fail.
#[derive(Debug)]
pub enum FaultSchedule {
    Never,
    /// Only the call with this index, from 0.
    At(u64, InjectedFault),
    /// One in `one_in` calls on average, at most `left` times.
    Random {
        one_in: u32,
        left: u32,
    },
}

/// Errnos of local errors: the host is out of a resource or forbids the call.
const LOCAL_ERRORS: [i32; 9] = [
    libc::EMFILE,
    libc::ENFILE,
    libc::ENOMEM,
    libc::ENOBUFS,
    libc::EADDRNOTAVAIL,
    libc::EADDRINUSE,
    libc::EPERM,
    libc::EACCES,
    libc::ENOSPC,
];

/// Returns whether the errno is a local error.
pub fn is_local_error(errno: i32) -> bool {
    LOCAL_ERRORS.contains(&errno)
}

/// Returns whether the connection survives a call that returned the errno.
pub(super) fn survives(errno: i32) -> bool {
    is_local_error(errno)
        || matches!(errno, libc::EAGAIN | libc::EINTR | libc::EINVAL | libc::ECANCELED)
}

// === impl SimCall ===

impl SimCall {
    /// Returns the errnos of the call.
    pub fn errnos(self) -> &'static [i32] {
        use libc::*;
        match self {
            SimCall::Accept => {
                &[EAGAIN, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, ECONNABORTED, EPROTO, EPERM]
            }
            SimCall::Socket => &[EMFILE, ENFILE, ENOBUFS, ENOMEM, EACCES],
            SimCall::Connect => &[
                EADDRNOTAVAIL,
                EADDRINUSE,
                ENETUNREACH,
                ECONNREFUSED,
                EHOSTUNREACH,
                ETIMEDOUT,
                EPERM,
                ENOBUFS,
                ENOMEM,
            ],
            // The result of a pending connect.
            SimCall::Decide => &[ECONNREFUSED, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH],
            SimCall::Receive => &[
                EAGAIN,
                EINTR,
                ECONNRESET,
                ETIMEDOUT,
                EHOSTUNREACH,
                ENETUNREACH,
                ENOMEM,
                ENOBUFS,
                EIO,
            ],
            SimCall::Send => {
                &[EAGAIN, EINTR, EPIPE, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENOBUFS, ENOMEM]
            }
            SimCall::Shutdown => &[ENOTCONN],
            SimCall::Fill => &[EAGAIN, EINTR, EINVAL, ENOMEM, ECONNRESET, ETIMEDOUT],
            SimCall::Drain => &[EAGAIN, EINTR, EPIPE, ECONNRESET, ENOMEM, ENOBUFS],
            SimCall::Pipe => &[EMFILE, ENFILE, ENOMEM],
            SimCall::Watch => &[ENOMEM, ENOSPC],
            SimCall::Wait => &[EINTR],
            SimCall::Option => &[EINVAL, ENOBUFS],
            SimCall::Enter => &[EINTR, EAGAIN, EBUSY],
            SimCall::RingReceive => {
                &[ENOBUFS, ECANCELED, EINTR, EAGAIN, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENOMEM]
            }
            SimCall::RingSend => &[EAGAIN, EINTR, EPIPE, ECONNRESET, ETIMEDOUT, ENOBUFS, ENOMEM],
            SimCall::RingPoll => &[ENOMEM],
        }
    }

    fn can_be_short(self) -> bool {
        use SimCall::*;
        matches!(self, Receive | Send | Fill | Drain | RingReceive | RingSend)
    }

    /// Returns all faults of the call.
    pub fn faults(self) -> impl Iterator<Item = InjectedFault> {
        let short = self.can_be_short().then_some(InjectedFault::Short);
        self.errnos().iter().map(|errno| InjectedFault::Errno(*errno)).chain(short)
    }
}

// === impl FaultSchedule ===

impl FaultSchedule {
    /// Returns the fault of the call with this index.
    pub(super) fn fault(
        &mut self,
        call: SimCall,
        index: u64,
        rng: &mut Rng,
    ) -> Option<InjectedFault> {
        match self {
            FaultSchedule::Never => None,
            FaultSchedule::At(at, fault) => (*at == index).then_some(*fault),
            FaultSchedule::Random { one_in, left } => {
                if *left == 0 || rng.u32(..*one_in) != 0 {
                    return None;
                }
                *left -= 1;
                if call.can_be_short() && rng.bool() {
                    return Some(InjectedFault::Short);
                }
                rng.choice(call.errnos()).map(|errno| InjectedFault::Errno(*errno))
            }
        }
    }
}
