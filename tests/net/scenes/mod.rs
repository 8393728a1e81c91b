//! Fault scenes: faults of a network and its hosts during one session, described as data.
//!
//! A [`Scene`] lists what links, client and backend do in turn and the expected result. [`play`]
//! runs it with all candidates at the same time: Tidegate, and HAProxy and nginx if
//! `TIDEGATE_PEERS=1` is set. Tidegate must match the scene. Differences of the other programs
//! are only reported. `tests/net/README.md` lists the classic fault cases and their scenes.

mod both_ends;
mod candidate;
mod close_orders;
mod delivery;
mod leaks;
mod map;
mod network;
mod peers;
mod play;
mod site;

use crate::common::{ms, secs};
use crate::link::channel::Impairment;
use both_ends::{End, Reading};
use candidate::Candidate;
use site::Site;
use std::fmt;
use std::time::Duration;

/// One scripted session with its expected result.
#[derive(Clone, Copy)]
pub struct Scene {
    pub limits: Limits,
    /// The backend's receive buffer in bytes. `None` for the kernel's default.
    pub receive_buffer: Option<usize>,
    /// Steps in order, in groups that scenes can share.
    pub steps: &'static [&'static [Step]],
    /// What each end has received after the last step.
    pub client: Seen,
    pub backend: Seen,
    /// Bounds for the time from [`Step::Mark`] to the first end.
    pub when: (Duration, Duration),
    /// The cause in Tidegate's access log. Empty if the scene has no single session.
    pub cause: &'static str,
}

/// The timers of the candidate. `None` means the candidate's default.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub connect: Duration,
    pub idle: Duration,
    pub half_closed: Duration,
    pub user_timeout: Option<Duration>,
    /// In whole seconds.
    pub keepalive: Option<Duration>,
}

/// A link of the site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    Client,
    Backend,
}

/// A direction on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the client's side to the backend's side.
    In,
    /// From the backend's side to the client's side.
    Out,
    Both,
}

/// One step, for the site or for each candidate. A step waits at most [`STEP_MAX`] and is then
/// recorded as stuck.
#[derive(Clone, Copy)]
pub enum Step {
    /// Changes a link, for all candidates.
    Link(Leg, Way, fn(&mut Impairment)),
    /// Changes the hosts, for all candidates.
    Hosts(fn(&Site)),
    /// Waits while both ends continue to send and read.
    Pause(Duration),
    /// Starts the time measurement.
    Mark,
    /// The client connects and the backend accepts.
    Connect,
    /// The client connects. The backend does not necessarily get the connection.
    Dial,
    /// The backend accepts the connection.
    Accept,
    /// One end acts.
    Client(Act),
    Backend(Act),
    /// Any other action, for each candidate.
    Each(fn(&mut Candidate, &Site)),
}

/// An action of one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Sends this many more bytes as fast as possible.
    Send(u64),
    /// Sends this many more bytes with one byte per write.
    SendByteByByte(u64),
    /// Sends one byte of urgent data (RFC 9293 section 3.8.5) after all earlier bytes.
    SendUrgent,
    /// Waits until all sent bytes are acknowledged.
    Acknowledged,
    /// Sends FIN after all bytes are sent.
    Fin,
    /// Sends RST immediately.
    Reset,
    /// Changes the way of reading. The default is eager.
    Reads(Reading),
    /// Waits until this many bytes have arrived in total.
    Receives(u64),
    /// Waits for the other end's FIN or RST.
    SeesTheEnd,
}

/// What one end received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub bytes: Bytes,
    pub end: Ended,
}

/// The part of the other end's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bytes {
    All,
    None,
    /// A prefix of the bytes sent.
    Some,
}

/// How the session ended at one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Fin,
    Reset,
    /// Neither FIN nor RST arrived.
    Open,
    /// This end has reset the connection.
    Gone,
    /// No connection was established.
    Never,
}

/// The timeout of a step.
const STEP_MAX: Duration = secs(12);

/// Timers that do not expire in a scene.
pub const LIMITS: Limits = Limits {
    connect: secs(5),
    idle: secs(20),
    half_closed: secs(20),
    user_timeout: None,
    keepalive: None,
};

/// The defaults of most scenes: everything arrives, and both ends close with FIN.
pub const SCENE: Scene = Scene {
    limits: LIMITS,
    receive_buffer: None,
    steps: &[],
    client: Seen { bytes: Bytes::All, end: Ended::Fin },
    backend: Seen { bytes: Bytes::All, end: Ended::Fin },
    when: (ms(0), secs(60)),
    cause: "finished",
};

/// More than a link holds and less than the buffers hold.
pub const STREAM: u64 = 160_000;

/// An established session that has moved some bytes in each direction.
pub const MIDSTREAM: &[Step] = &[
    Step::Connect,
    Step::Client(Act::Send(1000)),
    Step::Backend(Act::Send(2000)),
    Step::Backend(Act::Receives(1000)),
    Step::Client(Act::Receives(2000)),
];

/// The client closes, then the backend.
pub const IN_ORDER: &[Step] = &[
    Step::Client(Act::Fin),
    Step::Backend(Act::SeesTheEnd),
    Step::Backend(Act::Fin),
    Step::Client(Act::SeesTheEnd),
];

/// A FIN after these bytes.
pub const fn fin(bytes: Bytes) -> Seen {
    Seen { bytes, end: Ended::Fin }
}

/// A reset after these bytes.
pub const fn reset(bytes: Bytes) -> Seen {
    Seen { bytes, end: Ended::Reset }
}

/// No end after these bytes.
pub const fn open(bytes: Bytes) -> Seen {
    Seen { bytes, end: Ended::Open }
}

/// This end has reset the connection after any number of bytes.
pub const GONE: Seen = Seen { bytes: Bytes::Some, end: Ended::Gone };

/// No connection.
pub const NEVER: Seen = Seen { bytes: Bytes::None, end: Ended::Never };

/// Makes a test of each scene, with the scene's name, and a list of all scenes.
macro_rules! scenes {
    ($($(#[$doc:meta])* $name:ident: $scene:expr;)+) => {
        /// Every scene of this file with its name.
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
    /// What `end` received if the other end sent `sent` bytes.
    fn of(end: &End, sent: u64) -> Seen {
        let bytes = match end.received() {
            received if received == sent && sent > 0 => Bytes::All,
            0 => Bytes::None,
            _ => Bytes::Some,
        };
        Seen { bytes, end: end.ended() }
    }

    /// Returns true if this matches `expected`. `Bytes::All` matches if nothing was sent.
    fn matches(self, expected: Seen, sent: u64) -> bool {
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
