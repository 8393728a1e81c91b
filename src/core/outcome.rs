//! How sessions end: cause by phase.
//!
//! Both are metric labels, access-log fields and what tests assert. Adding a
//! way to end means adding a variant and its line here. Pure.

/// What ended a session first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cause {
    /// Both directions ended in order (FIN and FIN).
    Finished,
    /// The client reset the connection.
    ClientReset,
    /// The backend reset the connection.
    BackendReset,
    /// The client ended its side without a word while it waited in line.
    ClientLeft,
    /// The client stopped answering (keepalive, `TCP_USER_TIMEOUT`, no route).
    ClientLost,
    /// The backend stopped answering.
    BackendLost,
    /// The last connect attempt was refused.
    ConnectRefused,
    /// The last connect attempt ran into its deadline.
    ConnectTimeout,
    /// The last connect attempt failed otherwise.
    ConnectFailed,
    /// Nobody was eligible.
    NoBackend,
    /// A backend slot did not come free in time.
    QueueTimeout,
    /// Neither side said a word within the first-byte timeout.
    FirstByteTimeout,
    /// Nothing moved for the idle timeout.
    IdleTimeout,
    /// Nothing moved for the half-closed timeout after one side's FIN.
    HalfClosedTimeout,
    /// The drain deadline (or a second signal) cut it.
    DrainDeadline,
    /// Its backend left the pool and the grace after that is over.
    BackendRemoved,
    /// Descriptors, memory or ports ran out here, or this host has no route or
    /// forbids the connect.
    LocalResource,
    /// The frontend's `sources` do not let that address in.
    Denied,
    /// Its source has as many sessions as it may.
    SourceConnections,
    /// Its source connects faster than it may.
    SourceRate,
    /// A route of the frontend refuses it.
    Route,
    /// A bug here: its task or its worker has panicked.
    InternalError,
}

/// How far a session had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// Accepted, nothing chosen yet.
    Admit,
    /// Waiting for the client's first bytes, which its route needs.
    Preread,
    /// Waiting for a backend below its cap.
    Queue,
    /// Connecting upstream.
    Connect,
    /// Both directions open.
    Data,
    /// One direction has ended.
    HalfClosed,
    /// Both directions have ended.
    Closed,
}

/// Which side ended (FIN or RST) first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SessionSide {
    /// Downstream.
    Client,
    /// Upstream.
    Backend,
}

/// How a relayed session ended, and what it moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionEnd {
    /// What ended it first.
    pub cause: Cause,
    /// How far it had come.
    pub phase: Phase,
    /// The errno behind it; 0 for none.
    pub errno: i32,
    /// Which side ended (FIN or RST) first, if either did.
    pub closed_first: Option<SessionSide>,
}

/// Why a client was turned away before it had a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RefusedReason {
    /// Nobody was eligible.
    NoBackend,
    /// Descriptors, memory or buffers ran out here.
    LocalResource,
    /// No backend slot came free in time.
    QueueTimeout,
    /// Every connect attempt failed.
    ConnectFailed,
    /// The frontend's `sources` do not let that address in.
    Denied,
    /// Its source has as many sessions as it may.
    SourceConnections,
    /// Its source connects faster than it may.
    SourceRate,
    /// A route of the frontend refuses it.
    Route,
}

// === impl Cause ===

impl Cause {
    /// The cause when a socket of `side` fails with `errno`. What this host has
    /// run out of is nobody's fault at the other end.
    pub fn of_failure(side: SessionSide, errno: i32) -> Cause {
        let ours = matches!(
            errno,
            libc::ENOMEM | libc::ENOBUFS | libc::EMFILE | libc::ENFILE | libc::ENOSPC
        );
        if ours {
            return Cause::LocalResource;
        }
        let lost = matches!(
            errno,
            libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ENETDOWN
        );
        match (side, lost) {
            (SessionSide::Client, false) => Cause::ClientReset,
            (SessionSide::Backend, false) => Cause::BackendReset,
            (SessionSide::Client, true) => Cause::ClientLost,
            (SessionSide::Backend, true) => Cause::BackendLost,
        }
    }

    /// Whether both sockets are closed in order, with FIN, when so many bytes were
    /// not delivered. To a peer, a stream cut short must not look like a whole one.
    pub fn closes_in_order(self, undelivered: u64) -> bool {
        match self {
            Cause::Finished => true,
            Cause::FirstByteTimeout | Cause::IdleTimeout | Cause::HalfClosedTimeout => {
                undelivered == 0
            }
            _ => false,
        }
    }

    /// Number of causes.
    pub const COUNT: usize = Cause::ALL.len();

    /// Every cause, in the order of their numbers.
    pub const ALL: [Cause; 22] = [
        Cause::Finished,
        Cause::ClientReset,
        Cause::BackendReset,
        Cause::ClientLeft,
        Cause::ClientLost,
        Cause::BackendLost,
        Cause::ConnectRefused,
        Cause::ConnectTimeout,
        Cause::ConnectFailed,
        Cause::NoBackend,
        Cause::QueueTimeout,
        Cause::FirstByteTimeout,
        Cause::IdleTimeout,
        Cause::HalfClosedTimeout,
        Cause::DrainDeadline,
        Cause::BackendRemoved,
        Cause::LocalResource,
        Cause::Denied,
        Cause::SourceConnections,
        Cause::SourceRate,
        Cause::Route,
        Cause::InternalError,
    ];

    /// Metric label and access-log word.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Finished => "finished",
            Cause::ClientReset => "client-reset",
            Cause::BackendReset => "backend-reset",
            Cause::ClientLeft => "client-left",
            Cause::ClientLost => "client-lost",
            Cause::BackendLost => "backend-lost",
            Cause::ConnectRefused => "connect-refused",
            Cause::ConnectTimeout => "connect-timeout",
            Cause::ConnectFailed => "connect-failed",
            Cause::NoBackend => "no-backend",
            Cause::QueueTimeout => "queue-timeout",
            Cause::FirstByteTimeout => "first-byte-timeout",
            Cause::IdleTimeout => "idle-timeout",
            Cause::HalfClosedTimeout => "half-closed-timeout",
            Cause::DrainDeadline => "drain-deadline",
            Cause::BackendRemoved => "backend-removed",
            Cause::LocalResource => "local-resource",
            Cause::Denied => "denied",
            Cause::SourceConnections => "source-connections",
            Cause::SourceRate => "source-rate",
            Cause::Route => "route",
            Cause::InternalError => "internal-error",
        }
    }

    /// The timer that fired, in the configuration's word; empty for none.
    pub fn timer(self) -> &'static str {
        match self {
            Cause::ConnectTimeout => "connect_timeout",
            Cause::QueueTimeout => "queue_timeout",
            Cause::FirstByteTimeout => "first_byte_timeout",
            Cause::IdleTimeout => "idle_timeout",
            Cause::HalfClosedTimeout => "half_closed_timeout",
            Cause::DrainDeadline => "drain_timeout",
            Cause::BackendRemoved => "on_removal",
            _ => "",
        }
    }
}

// === impl Phase ===

impl Phase {
    /// Number of phases.
    pub const COUNT: usize = Phase::ALL.len();

    /// Every phase, in the order of their numbers.
    pub const ALL: [Phase; 7] = [
        Phase::Admit,
        Phase::Preread,
        Phase::Queue,
        Phase::Connect,
        Phase::Data,
        Phase::HalfClosed,
        Phase::Closed,
    ];

    /// Metric label and access-log word.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Admit => "admit",
            Phase::Preread => "preread",
            Phase::Queue => "queue",
            Phase::Connect => "connect",
            Phase::Data => "data",
            Phase::HalfClosed => "half-closed",
            Phase::Closed => "closed",
        }
    }
}

// === impl SessionSide ===

impl SessionSide {
    /// Both, client first.
    pub const BOTH: [SessionSide; 2] = [SessionSide::Client, SessionSide::Backend];

    /// The one across.
    #[inline]
    pub fn other(self) -> SessionSide {
        match self {
            SessionSide::Client => SessionSide::Backend,
            SessionSide::Backend => SessionSide::Client,
        }
    }

    /// Access-log word.
    pub fn name(self) -> &'static str {
        match self {
            SessionSide::Client => "client",
            SessionSide::Backend => "backend",
        }
    }
}

// === impl RefusedReason ===

impl RefusedReason {
    /// Why a session that never had a backend was turned away; `None` for one
    /// that ended otherwise.
    pub fn of(ending: SessionEnd) -> Option<RefusedReason> {
        if matches!(ending.phase, Phase::Data | Phase::HalfClosed | Phase::Closed) {
            return None;
        }
        match ending.cause {
            Cause::NoBackend => Some(RefusedReason::NoBackend),
            Cause::LocalResource => Some(RefusedReason::LocalResource),
            Cause::QueueTimeout => Some(RefusedReason::QueueTimeout),
            Cause::ConnectRefused | Cause::ConnectTimeout | Cause::ConnectFailed => {
                Some(RefusedReason::ConnectFailed)
            }
            Cause::Denied => Some(RefusedReason::Denied),
            Cause::SourceConnections => Some(RefusedReason::SourceConnections),
            Cause::SourceRate => Some(RefusedReason::SourceRate),
            Cause::Route => Some(RefusedReason::Route),
            _ => None,
        }
    }

    /// Number of reasons.
    pub const COUNT: usize = RefusedReason::ALL.len();

    /// Every reason, in the order of their numbers.
    pub const ALL: [RefusedReason; 8] = [
        RefusedReason::NoBackend,
        RefusedReason::LocalResource,
        RefusedReason::QueueTimeout,
        RefusedReason::ConnectFailed,
        RefusedReason::Denied,
        RefusedReason::SourceConnections,
        RefusedReason::SourceRate,
        RefusedReason::Route,
    ];

    /// Metric label.
    pub fn name(self) -> &'static str {
        match self {
            RefusedReason::NoBackend => "no-backend",
            RefusedReason::LocalResource => "local-resource",
            RefusedReason::QueueTimeout => "queue-timeout",
            RefusedReason::ConnectFailed => "connect-failed",
            RefusedReason::Denied => "denied",
            RefusedReason::SourceConnections => "source-connections",
            RefusedReason::SourceRate => "source-rate",
            RefusedReason::Route => "route",
        }
    }
}

/// The two letters HAProxy's log tools know (its manual, section 8.5): who
/// ended it first, then in which phase.
pub fn code(cause: Cause, phase: Phase) -> [u8; 2] {
    let first = match cause {
        Cause::Finished => b'-',
        Cause::ClientReset | Cause::ClientLeft | Cause::ClientLost => b'C',
        Cause::BackendReset | Cause::BackendLost | Cause::ConnectRefused | Cause::ConnectFailed => {
            b'S'
        }
        Cause::ConnectTimeout | Cause::QueueTimeout => b's',
        Cause::NoBackend => b'S',
        Cause::FirstByteTimeout | Cause::IdleTimeout | Cause::HalfClosedTimeout => b'c',
        Cause::DrainDeadline => b'K',
        Cause::BackendRemoved => b'D',
        Cause::LocalResource => b'R',
        Cause::Denied | Cause::SourceConnections | Cause::SourceRate | Cause::Route => b'P',
        Cause::InternalError => b'I',
    };
    let second = match phase {
        _ if first == b'P' => b'R',
        Phase::Admit | Phase::Connect => b'C',
        Phase::Preread => b'R',
        Phase::Queue => b'Q',
        Phase::Data | Phase::HalfClosed => b'D',
        Phase::Closed => b'-',
    };
    [first, second]
}
