//! Which system call fails, and how: at random by a seed, or the one that a
//! test names.
//!
//! Asked by the fake kernel before every call. It knows which errnos a call can
//! give, and what each says of the connection; it fails nothing itself.

use fastrand::Rng;

/// A system call, or an operation of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
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
pub enum Fault {
    Errno(i32),
    /// It does less than it could.
    Short,
}

/// When something goes wrong.
#[derive(Debug)]
pub enum Plan {
    Never,
    /// That call, counted from 0, and no other.
    At(u64, Fault),
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

// === impl Call ===

impl Call {
    /// What it can fail with.
    pub fn errnos(self) -> &'static [i32] {
        use libc::*;
        match self {
            Call::Accept => {
                &[EAGAIN, EINTR, EMFILE, ENFILE, ENOBUFS, ENOMEM, ECONNABORTED, EPROTO, EPERM]
            }
            Call::Socket => &[EMFILE, ENFILE, ENOBUFS, ENOMEM, EACCES],
            Call::Connect => &[
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
            Call::Decide => &[ECONNREFUSED, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH],
            Call::Receive => &[
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
            Call::Send => {
                &[EAGAIN, EINTR, EPIPE, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENOBUFS, ENOMEM]
            }
            Call::Shutdown => &[ENOTCONN],
            Call::Fill => &[EAGAIN, EINTR, EINVAL, ENOMEM, ECONNRESET, ETIMEDOUT],
            Call::Drain => &[EAGAIN, EINTR, EPIPE, ECONNRESET, ENOMEM, ENOBUFS],
            Call::Pipe => &[EMFILE, ENFILE, ENOMEM],
            Call::Watch => &[ENOMEM, ENOSPC],
            Call::Wait => &[EINTR],
            Call::Option => &[EINVAL, ENOBUFS],
            Call::Enter => &[EINTR, EAGAIN, EBUSY],
            Call::RingReceive => {
                &[ENOBUFS, ECANCELED, EINTR, EAGAIN, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENOMEM]
            }
            Call::RingSend => &[EAGAIN, EINTR, EPIPE, ECONNRESET, ETIMEDOUT, ENOBUFS, ENOMEM],
            Call::RingPoll => &[ENOMEM],
        }
    }

    fn can_be_short(self) -> bool {
        use Call::*;
        matches!(self, Receive | Send | Fill | Drain | RingReceive | RingSend)
    }

    /// Everything that can go wrong with it.
    pub fn faults(self) -> impl Iterator<Item = Fault> {
        let short = self.can_be_short().then_some(Fault::Short);
        self.errnos().iter().map(|errno| Fault::Errno(*errno)).chain(short)
    }
}

// === impl Plan ===

impl Plan {
    /// What goes wrong with the `index`-th call.
    pub(super) fn fault(&mut self, call: Call, index: u64, rng: &mut Rng) -> Option<Fault> {
        match self {
            Plan::Never => None,
            Plan::At(at, fault) => (*at == index).then_some(*fault),
            Plan::Random { one_in, left } => {
                if *left == 0 || rng.u32(..*one_in) != 0 {
                    return None;
                }
                *left -= 1;
                if call.can_be_short() && rng.bool() {
                    return Some(Fault::Short);
                }
                rng.choice(call.errnos()).map(|errno| Fault::Errno(*errno))
            }
        }
    }
}
