//! Fault scenes: what a network and its hosts can do to one session, as data.
//!
//! A [`Scene`] says what links, client and backend do in turn and what must
//! come of it; [`play`] runs it against every candidate at once, ours and,
//! where `TIDEGATE_PEERS=1` asks for them, HAProxy and nginx. Ours has to come
//! out as written; of the peers it is only said where they differ. A scene
//! decides nothing itself. Which of the classic fault cases is covered where
//! stands in `tests/net/README.md`.

mod candidate;
mod close_orders;
mod delivery;
mod duet;
mod leaks;
mod map;
mod network;
mod peers;
mod play;
mod site;

use crate::common::{ms, secs};
use crate::link::channel::Impairment;
use candidate::Candidate;
use duet::{End, Reading};
use site::Site;
use std::fmt;
use std::time::Duration;

/// One scene.
#[derive(Clone, Copy)]
pub struct Scene {
    pub limits: Limits,
    /// The backend's receive buffer, in bytes; `None` for the kernel's choice.
    pub receive_buffer: Option<usize>,
    /// One after another; in groups, so that scenes can share some.
    pub steps: &'static [&'static [Step]],
    /// What each end holds when all is over.
    pub client: Seen,
    pub backend: Seen,
    /// How long after [`Step::Mark`] the first end may come, and must have.
    pub when: (Duration, Duration),
    /// The cause our access log gives; empty where there is no session of ours.
    pub cause: &'static str,
}

/// The timers of the balancer; `None` leaves a candidate's default.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub connect: Duration,
    pub idle: Duration,
    pub half_closed: Duration,
    pub user_timeout: Option<Duration>,
    /// Whole seconds.
    pub keepalive: Option<Duration>,
}

/// Which cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    Client,
    Backend,
}

/// Which way on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the client's side to the backend's.
    In,
    /// To the client's side.
    Out,
    Both,
}

/// One thing that happens, to everybody or at each candidate. A step that
/// waits does so for [`STEP_MAX`] and is noted as stuck after that.
#[derive(Clone, Copy)]
pub enum Step {
    /// Changes a cable, for all.
    Link(Leg, Way, fn(&mut Impairment)),
    /// Does something to the hosts, for all.
    Hosts(fn(&Site)),
    /// Time passes, and both ends go on with what they were told.
    Pause(Duration),
    /// From now on the time counts.
    Mark,
    /// The client connects and the backend has the connection.
    Connect,
    /// The client connects; the backend may never hear of it.
    Dial,
    /// The backend has the connection.
    Accept,
    /// One end does something.
    Client(Act),
    Backend(Act),
    /// Anything else, at each candidate.
    Each(fn(&mut Candidate, &Site)),
}

/// What one end does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// So many bytes more are to be sent, as fast as they go.
    Send(u64),
    /// The same in writes of one byte.
    SendByteByByte(u64),
    /// One byte of urgent data (RFC 9293 section 3.8.5), after all before it.
    SendUrgent,
    /// Waits until all that was sent is acknowledged.
    Acknowledged,
    /// FIN once everything is sent.
    Fin,
    /// RST, at once.
    Reset,
    /// Reads in that manner from now on; ends read eagerly unless told.
    Reads(Reading),
    /// Waits until so many bytes have come in all.
    Receives(u64),
    /// Waits until the other end's FIN or RST has come.
    SeesTheEnd,
}

/// What one end got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub bytes: Bytes,
    pub end: Ended,
}

/// Of what the other end had sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bytes {
    All,
    None,
    /// Whatever came is the beginning of what was sent.
    Some,
}

/// How it ended, at one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Fin,
    Reset,
    /// Nothing said it is over.
    Open,
    /// It has reset the connection itself.
    Gone,
    /// There was no connection.
    Never,
}

/// How long a step may wait.
const STEP_MAX: Duration = secs(12);

/// Timers out of the way.
pub const LIMITS: Limits = Limits {
    connect: secs(5),
    idle: secs(20),
    half_closed: secs(20),
    user_timeout: None,
    keepalive: None,
};

/// What most scenes have in common: everything arrives and ends in order.
pub const SCENE: Scene = Scene {
    limits: LIMITS,
    receive_buffer: None,
    steps: &[],
    client: Seen { bytes: Bytes::All, end: Ended::Fin },
    backend: Seen { bytes: Bytes::All, end: Ended::Fin },
    when: (ms(0), secs(60)),
    cause: "finished",
};

/// More than any cable holds, less than buffers do.
pub const STREAM: u64 = 160_000;

/// A session that stands and has moved a little each way.
pub const MIDSTREAM: &[Step] = &[
    Step::Connect,
    Step::Client(Act::Send(1000)),
    Step::Backend(Act::Send(2000)),
    Step::Backend(Act::Receives(1000)),
    Step::Client(Act::Receives(2000)),
];

/// The client is done, then the backend.
pub const IN_ORDER: &[Step] = &[
    Step::Client(Act::Fin),
    Step::Backend(Act::SeesTheEnd),
    Step::Backend(Act::Fin),
    Step::Client(Act::SeesTheEnd),
];

/// Seen as a FIN after so much.
pub const fn fin(bytes: Bytes) -> Seen {
    Seen { bytes, end: Ended::Fin }
}

/// Seen as a reset after so much.
pub const fn reset(bytes: Bytes) -> Seen {
    Seen { bytes, end: Ended::Reset }
}

/// No word of an end, after so much.
pub const fn open(bytes: Bytes) -> Seen {
    Seen { bytes, end: Ended::Open }
}

/// Has reset, and saw whatever it saw before.
pub const GONE: Seen = Seen { bytes: Bytes::Some, end: Ended::Gone };

/// Never connected.
pub const NEVER: Seen = Seen { bytes: Bytes::None, end: Ended::Never };

/// Makes a test of each scene, of its name, and a list of all.
macro_rules! scenes {
    ($($(#[$doc:meta])* $name:ident: $scene:expr;)+) => {
        /// Every scene of this file, by its name.
        pub static ALL: &[(&str, crate::scenes::Scene)] = &[$((stringify!($name), $scene)),+];

        $(
            $(#[$doc])*
            #[test]
            fn $name() {
                let (name, scene) = ALL.iter().find(|(name, _)| *name == stringify!($name)).unwrap();
                crate::scenes::play::play(name, scene);
            }
        )+
    };
}
use scenes;

// === impl Seen ===

impl Seen {
    /// What `end` got, when `sent` bytes were sent to it.
    fn of(end: &End, sent: u64) -> Seen {
        let bytes = match end.received() {
            received if received == sent && sent > 0 => Bytes::All,
            0 => Bytes::None,
            _ => Bytes::Some,
        };
        Seen { bytes, end: end.ended() }
    }

    /// Whether it is what was expected: nothing of nothing is all of it.
    fn is_as(self, expected: Seen, sent: u64) -> bool {
        let bytes = match expected.bytes {
            Bytes::All => self.bytes == Bytes::All || sent == 0,
            Bytes::None => self.bytes == Bytes::None,
            Bytes::Some => true,
        };
        bytes && self.end == expected.end
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.end {
            Ended::Never => return to.write_str("never connected"),
            Ended::Gone => return to.write_str("gone"),
            _ => {}
        }
        let bytes = match self.bytes {
            Bytes::All => "all, ",
            Bytes::None => "",
            Bytes::Some => "part, ",
        };
        let end = match self.end {
            Ended::Fin => "FIN",
            Ended::Reset => "RST",
            _ => "no end",
        };
        write!(to, "{bytes}{end}")
    }
}
