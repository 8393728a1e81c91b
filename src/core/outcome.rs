//! How sessions end: cause and phase.
//!
//! Both are metric labels, access-log fields and values that tests assert. A new way to
//! end needs a variant and its line here. Pure.

/// What ended a session first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cause {
    /// Both sides closed with FIN.
    Finished,
    /// The client reset the connection.
    ClientReset,
    /// The backend reset the connection.
    BackendReset,
    /// The client sent FIN without data while it waited in a queue.
    ClientLeft,
    /// The client stopped responding (keepalive, `TCP_USER_TIMEOUT`, no route).
    ClientLost,
    /// The backend stopped responding.
    BackendLost,
    /// The last connect attempt was refused.
    ConnectRefused,
    /// The last connect attempt timed out.
    ConnectTimeout,
    /// The last connect attempt failed for another reason.
    ConnectFailed,
    /// No backend was eligible.
    NoBackend,
    /// No backend slot became free within the queue timeout.
    QueueTimeout,
    /// Neither side sent data within the first-byte timeout.
    FirstByteTimeout,
    /// No data was transferred within the idle timeout.
    IdleTimeout,
    /// The session was as old as `session_max`.
    SessionMax,
    /// No data was transferred within the half-closed timeout after the FIN of one
    /// side.
    HalfClosedTimeout,
    /// The drain timeout expired, or a second signal ended the drain.
    DrainDeadline,
    /// Its backend was removed from the pool, and the time of `on_removal` expired.
    BackendRemoved,
    /// Its backend was down or had lost its role, and the time of `on_down` expired.
    BackendDown,
    /// Its backend is a backup that a lower tier has replaced, and the time of `on_recover`
    /// expired.
    BackupReleased,
    /// An operator closed it.
    ClosedByOperator,
    /// A rebalance closed it, so that its client connects again.
    Rebalanced,
    /// An operator reset it.
    ResetByOperator,
    /// This host ran out of descriptors, memory or ports, has no route, or forbids the
    /// connect.
    LocalResource,
    /// The frontend's `sources` deny the client address, or its `proxy_protocol` the peer.
    Denied,
    /// The client source reached its connection limit.
    SourceConnections,
    /// The client source exceeded its rate limit.
    SourceRate,
    /// A route of the frontend rejects the connection.
    Route,
    /// A peer that must send a PROXY header sent other bytes.
    ProxyHeaderMissing,
    /// The PROXY header was invalid.
    ProxyHeaderMalformed,
    /// The PROXY header was incomplete when its time was over.
    ProxyHeaderTimeout,
    /// The checksum of the PROXY header was wrong.
    ProxyHeaderCrc,
    /// A bug: the session's task or its worker panicked.
    InternalError,
}

/// The phase that a session had reached when it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// Accepted, no backend picked.
    Admit,
    /// Waiting for the PROXY header, or for the client's first bytes, which routing needs.
    Preread,
    /// Waiting for a backend below its cap.
    Queue,
    /// Connecting to a backend.
    Connect,
    /// Both directions are open.
    Data,
    /// One direction has ended.
    HalfClosed,
    /// Both directions have ended.
    Closed,
}

/// A side of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SessionSide {
    /// The client.
    Client,
    /// The backend.
    Backend,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionEnd {
    /// What ended it first.
    pub cause: Cause,
    /// The phase that it had reached.
    pub phase: Phase,
    /// The errno of the failure; 0 for none.
    pub errno: i32,
    /// The side that sent the first FIN or RST, if either did.
    pub closed_first: Option<SessionSide>,
}

/// Why a client was rejected before it had a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RefusedReason {
    /// No backend was eligible.
    NoBackend,
    /// This host ran out of descriptors, memory or buffers.
    LocalResource,
    /// No backend slot became free within the queue timeout.
    QueueTimeout,
    /// Every connect attempt failed.
    ConnectFailed,
    /// The frontend's `sources` deny the client address, or its `proxy_protocol` the peer.
    Denied,
    /// The client source reached its connection limit.
    SourceConnections,
    /// The client source exceeded its rate limit.
    SourceRate,
    /// A route of the frontend rejects the connection.
    Route,
    /// A peer that must send a PROXY header sent other bytes.
    ProxyHeaderMissing,
    /// The PROXY header was invalid.
    ProxyHeaderMalformed,
    /// The PROXY header was incomplete when its time was over.
    ProxyHeaderTimeout,
    /// The checksum of the PROXY header was wrong.
    ProxyHeaderCrc,
}

// === impl Cause ===

impl Cause {
    /// Returns the cause if a socket of `side` fails with `errno`. If this host is out of
    /// a resource, neither peer is the cause.
    pub fn of_failure(side: SessionSide, errno: i32) -> Cause {
        let local = matches!(
            errno,
            libc::ENOMEM | libc::ENOBUFS | libc::EMFILE | libc::ENFILE | libc::ENOSPC
        );
        if local {
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

    /// Returns whether both sockets are closed with FIN if `undelivered` bytes were not
    /// delivered. Otherwise they are reset: a truncated stream must not look complete
    /// to a peer.
    pub fn closes_in_order(self, undelivered: u64) -> bool {
        match self {
            Cause::Finished => true,
            Cause::FirstByteTimeout
            | Cause::IdleTimeout
            | Cause::SessionMax
            | Cause::HalfClosedTimeout
            | Cause::BackupReleased
            | Cause::ClosedByOperator
            | Cause::Rebalanced => undelivered == 0,
            _ => false,
        }
    }

    /// Returns the cause with this name.
    pub fn named(name: &str) -> Option<Cause> {
        Cause::ALL.into_iter().find(|cause| cause.name() == name)
    }

    /// Number of causes.
    pub const COUNT: usize = Cause::ALL.len();

    /// Every cause, in numeric order.
    pub const ALL: [Cause; 32] = [
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
        Cause::SessionMax,
        Cause::HalfClosedTimeout,
        Cause::DrainDeadline,
        Cause::BackendRemoved,
        Cause::BackendDown,
        Cause::BackupReleased,
        Cause::ClosedByOperator,
        Cause::Rebalanced,
        Cause::ResetByOperator,
        Cause::LocalResource,
        Cause::Denied,
        Cause::SourceConnections,
        Cause::SourceRate,
        Cause::Route,
        Cause::ProxyHeaderMissing,
        Cause::ProxyHeaderMalformed,
        Cause::ProxyHeaderTimeout,
        Cause::ProxyHeaderCrc,
        Cause::InternalError,
    ];

    /// Metric label and access-log value.
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
            Cause::SessionMax => "session-max",
            Cause::HalfClosedTimeout => "half-closed-timeout",
            Cause::DrainDeadline => "drain-deadline",
            Cause::BackendRemoved => "backend-removed",
            Cause::BackendDown => "backend-down",
            Cause::BackupReleased => "backup-released",
            Cause::ClosedByOperator => "closed-by-operator",
            Cause::Rebalanced => "rebalanced",
            Cause::ResetByOperator => "reset-by-operator",
            Cause::LocalResource => "local-resource",
            Cause::Denied => "denied",
            Cause::SourceConnections => "source-connections",
            Cause::SourceRate => "source-rate",
            Cause::Route => "route",
            Cause::ProxyHeaderMissing => "proxy-header-missing",
            Cause::ProxyHeaderMalformed => "proxy-header-malformed",
            Cause::ProxyHeaderTimeout => "proxy-header-timeout",
            Cause::ProxyHeaderCrc => "proxy-header-crc",
            Cause::InternalError => "internal-error",
        }
    }

    /// Configuration key of the timeout that expired; empty if none did.
    pub fn timer(self, phase: Phase) -> &'static str {
        match self {
            Cause::FirstByteTimeout if phase == Phase::Preread => "client_first",
            Cause::ConnectTimeout => "connect_timeout",
            Cause::QueueTimeout => "queue_timeout",
            Cause::FirstByteTimeout => "first_byte_timeout",
            Cause::IdleTimeout => "idle_timeout",
            Cause::SessionMax => "session_max",
            Cause::HalfClosedTimeout => "half_closed_timeout",
            Cause::DrainDeadline => "drain_timeout",
            Cause::BackendRemoved => "on_removal",
            Cause::BackendDown => "on_down",
            Cause::BackupReleased => "on_recover",
            Cause::ProxyHeaderTimeout => "proxy_protocol.timeout",
            _ => "",
        }
    }
}

// === impl Phase ===

impl Phase {
    /// Number of phases.
    pub const COUNT: usize = Phase::ALL.len();

    /// Every phase, in numeric order.
    pub const ALL: [Phase; 7] = [
        Phase::Admit,
        Phase::Preread,
        Phase::Queue,
        Phase::Connect,
        Phase::Data,
        Phase::HalfClosed,
        Phase::Closed,
    ];

    /// Metric label and access-log value.
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
    /// Both sides, client first.
    pub const BOTH: [SessionSide; 2] = [SessionSide::Client, SessionSide::Backend];

    /// The opposite side.
    #[inline]
    pub fn other(self) -> SessionSide {
        match self {
            SessionSide::Client => SessionSide::Backend,
            SessionSide::Backend => SessionSide::Client,
        }
    }

    /// Access-log value.
    pub fn name(self) -> &'static str {
        match self {
            SessionSide::Client => "client",
            SessionSide::Backend => "backend",
        }
    }
}

// === impl RefusedReason ===

impl RefusedReason {
    /// Returns why a session without a backend was rejected; `None` for other endings.
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
            Cause::ProxyHeaderMissing => Some(RefusedReason::ProxyHeaderMissing),
            Cause::ProxyHeaderMalformed => Some(RefusedReason::ProxyHeaderMalformed),
            Cause::ProxyHeaderTimeout => Some(RefusedReason::ProxyHeaderTimeout),
            Cause::ProxyHeaderCrc => Some(RefusedReason::ProxyHeaderCrc),
            _ => None,
        }
    }

    /// Number of reasons.
    pub const COUNT: usize = RefusedReason::ALL.len();

    /// Every reason, in numeric order.
    pub const ALL: [RefusedReason; 12] = [
        RefusedReason::NoBackend,
        RefusedReason::LocalResource,
        RefusedReason::QueueTimeout,
        RefusedReason::ConnectFailed,
        RefusedReason::Denied,
        RefusedReason::SourceConnections,
        RefusedReason::SourceRate,
        RefusedReason::Route,
        RefusedReason::ProxyHeaderMissing,
        RefusedReason::ProxyHeaderMalformed,
        RefusedReason::ProxyHeaderTimeout,
        RefusedReason::ProxyHeaderCrc,
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
            RefusedReason::ProxyHeaderMissing => "proxy-header-missing",
            RefusedReason::ProxyHeaderMalformed => "proxy-header-malformed",
            RefusedReason::ProxyHeaderTimeout => "proxy-header-timeout",
            RefusedReason::ProxyHeaderCrc => "proxy-header-crc",
        }
    }
}

/// Returns the two letters that HAProxy's log tools use (its manual, section 8.5): the
/// side that ended the session first, and the phase.
pub fn code(cause: Cause, phase: Phase) -> [u8; 2] {
    let first = match cause {
        Cause::Finished => b'-',
        Cause::ClientReset | Cause::ClientLeft | Cause::ClientLost => b'C',
        Cause::BackendReset | Cause::BackendLost | Cause::ConnectRefused | Cause::ConnectFailed => {
            b'S'
        }
        Cause::ConnectTimeout | Cause::QueueTimeout => b's',
        Cause::NoBackend => b'S',
        Cause::FirstByteTimeout
        | Cause::IdleTimeout
        | Cause::SessionMax
        | Cause::HalfClosedTimeout
        | Cause::ProxyHeaderTimeout => b'c',
        Cause::DrainDeadline
        | Cause::ClosedByOperator
        | Cause::Rebalanced
        | Cause::ResetByOperator => b'K',
        Cause::BackendRemoved | Cause::BackendDown => b'D',
        Cause::BackupReleased => b'U',
        Cause::LocalResource => b'R',
        Cause::Denied
        | Cause::SourceConnections
        | Cause::SourceRate
        | Cause::Route
        | Cause::ProxyHeaderMissing
        | Cause::ProxyHeaderMalformed
        | Cause::ProxyHeaderCrc => b'P',
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
