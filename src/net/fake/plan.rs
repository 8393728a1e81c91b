//! Which system call fails, and how: at random by a seed, or the one that a
//! test names.
//!
//! Asked by the fake kernel before every call. It knows which errnos a call can
//! give, and what each says of the connection; it fails nothing itself.

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

/// What goes wrong with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InjectedFault {
    Errno(i32),
    /// It does less than it could.
    Short,
}

/// When something goes wrong.
#[derive(Debug)]
pub enum FaultSchedule {
    Never,
    /// That call, counted from 0, and no other.
    At(u64, InjectedFault),
    /// One in so many calls, at most so many times.
    Random {
        one_in: u32,
        left: u32,
    },
}

/// Ours, and no peer's: what the machine runs out of, or will not let us do.
const OURS: [i32; 9] = [
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

/// Whether that errno says something of this machine alone.
pub fn is_ours(errno: i32) -> bool {
    OURS.contains(&errno)
}

/// Whether the connection is still there after a call has given that errno.
pub(super) fn survives(errno: i32) -> bool {
    is_ours(errno) || matches!(errno, libc::EAGAIN | libc::EINTR | libc::EINVAL | libc::ECANCELED)
}

// === impl SimCall ===

impl SimCall {
    /// What it can fail with.
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
            // How a connect that was pending ends.
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

    /// Everything that can go wrong with it.
    pub fn faults(self) -> impl Iterator<Item = InjectedFault> {
        let short = self.can_be_short().then_some(InjectedFault::Short);
        self.errnos().iter().map(|errno| InjectedFault::Errno(*errno)).chain(short)
    }
}

// === impl FaultSchedule ===

impl FaultSchedule {
    /// What goes wrong with the `index`-th call.
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
