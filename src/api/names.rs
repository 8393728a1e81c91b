//! The sets of names in the documents.
//!
//! Written by `daemon` from the names of `core`, matched by clients. A set keeps an unknown
//! name as `Other`, because a newer balancer can have more names.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

macro_rules! names {
    ($(
        $(#[$doc:meta])*
        pub enum $set:ident { $($(#[$what:meta])* $name:ident = $text:literal,)+ }
    )+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $set {
            $($(#[$what])* $name,)+
            /// A name of a newer version.
            Other(String),
        }

        impl $set {
            /// Returns the name in the document.
            pub fn name(&self) -> &str {
                match self {
                    $($set::$name => $text,)+
                    $set::Other(name) => name,
                }
            }
        }

        impl From<&str> for $set {
            fn from(name: &str) -> $set {
                match name {
                    $($text => $set::$name,)+
                    other => $set::Other(other.to_owned()),
                }
            }
        }

        impl fmt::Display for $set {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl Serialize for $set {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl<'de> Deserialize<'de> for $set {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$set, D::Error> {
                String::deserialize(deserializer).map(|name| $set::from(&*name))
            }
        }
    )+};
}

names! {
    /// Whether the process accepts connections.
    pub enum ServiceState {
        /// It does not accept yet.
        Starting = "starting",
        /// It accepts connections.
        Serving = "serving",
        /// It accepts no connections and finishes its sessions.
        Draining = "draining",
    }

    /// The kind of an event.
    pub enum EventKindName {
        /// The state of a backend or a pool has changed.
        State = "state",
        /// An operator has ordered something.
        Operator = "operator",
        /// A configuration was applied or rejected.
        Config = "config",
        /// A process, worker or thread has started, ended or stalled.
        Process = "process",
        /// A limit was reached, or is no longer reached.
        Limit = "limit",
    }

    /// How much an event needs attention.
    pub enum EventLevelName {
        /// Something is well again.
        Good = "good",
        /// For the record.
        Info = "info",
        /// It can become a problem.
        Warn = "warn",
        /// Something has failed.
        Bad = "bad",
    }

    /// The engine that moves the bytes of sessions.
    pub enum EngineName {
        /// epoll, with splice for long streams.
        Epoll = "epoll",
        /// io_uring.
        IoUring = "io_uring",
    }

    /// The policy by which a pool picks backends.
    pub enum PolicyName {
        /// In turn, in proportion to the weights.
        WeightedRoundRobin = "weighted-round-robin",
        /// The backend with the fewest sessions in proportion to its weight.
        LeastConnections = "least-connections",
        /// At random, in proportion to the weights.
        Random = "random",
        /// The less busy of two random backends.
        TwoChoices = "two-choices",
        /// The less busy of two random backends, by connect time and sessions.
        PeakEwma = "peak-ewma",
        /// By a hash of the client address.
        SourceHash = "source-hash",
    }

    /// What a pool does with clients while no backend is eligible.
    pub enum NoneEligible {
        /// It rejects them.
        Refuse = "refuse",
        /// It picks among all backends.
        TryAll = "try-all",
        /// It queues them until the first probe result or heartbeat.
        Wait = "wait",
        /// It queues them until a backend is eligible.
        Queue = "queue",
        /// It picks among former backends until the first probe result or heartbeat.
        Former = "former",
    }

    /// The operator's intent for a backend.
    pub enum IntentName {
        /// New sessions are allowed.
        Ready = "ready",
        /// No new sessions; open sessions continue.
        Draining = "draining",
        /// Out of service.
        Maintenance = "maintenance",
    }

    /// The result of the probes and heartbeats of a backend.
    pub enum ObservationName {
        /// No result yet.
        Unknown = "unknown",
        /// It works.
        Up = "up",
        /// The evidence is unclear; it has 10% of its weight.
        Suspect = "suspect",
        /// Confirmed as not working.
        Down = "down",
    }

    /// A backend's state before and after a change.
    pub enum BackendStateName {
        /// It was not configured.
        New = "new",
        /// No probe result and no heartbeat yet.
        Unknown = "unknown",
        /// It works.
        Up = "up",
        /// The evidence is unclear.
        Suspect = "suspect",
        /// Confirmed as not working.
        Down = "down",
        /// Removed for a time after failures.
        Ejected = "ejected",
        /// It gets one session at a time, after an ejection.
        Trial = "trial",
        /// It is not configured any more.
        Removed = "removed",
        /// The operator or its sender allows new sessions.
        Ready = "ready",
        /// The operator or its sender stopped new sessions.
        Draining = "draining",
        /// The operator set it to maintenance.
        Maintenance = "maintenance",
        /// Its sender reports that it is starting.
        Starting = "starting",
        /// Its sender reports that it is stopping.
        Stopping = "stopping",
    }

    /// The state that the sender of a backend reports.
    pub enum SenderStateName {
        /// It can get new sessions.
        Ready = "ready",
        /// It gets no new sessions yet.
        Starting = "starting",
        /// It gets no new sessions.
        Draining = "draining",
        /// It gets no new sessions, and it exits soon.
        Stopping = "stopping",
    }

    /// What the arrival of a backend's heartbeats means for it.
    pub enum PulseName {
        /// None was received and none is required.
        Absent = "absent",
        /// None was received; the first one is required.
        Awaited = "awaited",
        /// They arrive on time.
        Beating = "beating",
        /// Overdue, not confirmed.
        Suspect = "suspect",
        /// Overdue, but probes succeed.
        Vouched = "vouched",
        /// Overdue, and confirmed as down.
        Silent = "silent",
        /// None arrived for the pool's `ttl`.
        Expired = "expired",
    }

    /// The state of a heartbeat detector.
    pub enum DetectorName {
        /// No heartbeat yet.
        Waiting = "waiting",
        /// They arrive.
        Up = "up",
        /// Overdue, not confirmed.
        Suspect = "suspect",
        /// Confirmed as down.
        Down = "down",
        /// They arrive again, for too short a time.
        Recovering = "recovering",
    }

    /// What ended a session first.
    pub enum CauseName {
        /// Both sides closed with FIN.
        Finished = "finished",
        /// The client reset the connection.
        ClientReset = "client-reset",
        /// The backend reset the connection.
        BackendReset = "backend-reset",
        /// The client sent FIN without data while it waited in a queue.
        ClientLeft = "client-left",
        /// The client stopped responding (keepalive, `TCP_USER_TIMEOUT`, no route).
        ClientLost = "client-lost",
        /// The backend stopped responding.
        BackendLost = "backend-lost",
        /// The last connect attempt was refused.
        ConnectRefused = "connect-refused",
        /// The last connect attempt timed out.
        ConnectTimeout = "connect-timeout",
        /// The last connect attempt failed for another reason.
        ConnectFailed = "connect-failed",
        /// No backend was eligible.
        NoBackend = "no-backend",
        /// No backend slot became free within the queue timeout.
        QueueTimeout = "queue-timeout",
        /// Neither side sent data within the first-byte timeout.
        FirstByteTimeout = "first-byte-timeout",
        /// No data was transferred within the idle timeout.
        IdleTimeout = "idle-timeout",
        /// The session was as old as `session_max`.
        SessionMax = "session-max",
        /// No data was transferred within the half-closed timeout after the FIN of one
        /// side.
        HalfClosedTimeout = "half-closed-timeout",
        /// The drain timeout expired, or a second signal ended the drain.
        DrainDeadline = "drain-deadline",
        /// Its backend was removed from the pool, and the time of `on_removal` expired.
        BackendRemoved = "backend-removed",
        /// Its backend was down or had lost its role, and the time of `on_down` expired.
        BackendDown = "backend-down",
        /// Its backend is a backup that a lower tier has replaced, and the time of `on_recover`
        /// expired.
        BackupReleased = "backup-released",
        /// An operator closed it.
        ClosedByOperator = "closed-by-operator",
        /// A rebalance closed it, so that its client connects again.
        Rebalanced = "rebalanced",
        /// An operator reset it.
        ResetByOperator = "reset-by-operator",
        /// This host ran out of descriptors, memory or ports, has no route, or forbids the
        /// connect.
        LocalResource = "local-resource",
        /// The frontend's `sources` deny the client address.
        Denied = "denied",
        /// The client source reached its connection limit.
        SourceConnections = "source-connections",
        /// The client source exceeded its rate limit.
        SourceRate = "source-rate",
        /// A route of the frontend rejects the connection.
        Route = "route",
        /// A peer that must send a PROXY header sent other bytes.
        ProxyHeaderMissing = "proxy-header-missing",
        /// The PROXY header was invalid.
        ProxyHeaderMalformed = "proxy-header-malformed",
        /// The PROXY header was incomplete when its time was over.
        ProxyHeaderTimeout = "proxy-header-timeout",
        /// The checksum of the PROXY header was wrong.
        ProxyHeaderCrc = "proxy-header-crc",
        /// A bug: the session's task or its worker panicked.
        InternalError = "internal-error",
    }

    /// The phase that a session had reached when it ended.
    pub enum PhaseName {
        /// Accepted, no backend picked.
        Admit = "admit",
        /// Waiting for the PROXY header, or for the client's first bytes, which routing needs.
        Preread = "preread",
        /// Waiting for a backend below its cap.
        Queue = "queue",
        /// Connecting to a backend.
        Connect = "connect",
        /// Both directions are open.
        Data = "data",
        /// One direction has ended.
        HalfClosed = "half-closed",
        /// Both directions have ended.
        Closed = "closed",
    }

    /// Whether a session is open.
    pub enum SessionStateName {
        /// It is open.
        Open = "open",
        /// It has ended.
        Ended = "ended",
        /// Its last attempt in the rings has failed: the next one, or the end, is not kept or
        /// not made yet.
        Unknown = "unknown",
    }

    /// What decided a pick.
    pub enum WhyName {
        /// Nothing was picked.
        None = "none",
        /// The next backend in turn.
        Turn = "turn",
        /// The lowest load.
        Least = "least",
        /// A weighted random draw.
        Draw = "draw",
        /// The hash of the client's address.
        Hash = "hash",
        /// It was the only backend that could be picked.
        Only = "only",
        /// A connect attempt to another backend had failed.
        Retry = "retry",
        /// The session decides the trial of a backend that was ejected.
        Trial = "trial",
        /// The session had waited in the pool's queue.
        Queue = "queue",
        /// No backend was eligible, and the pool fails open.
        FailOpen = "fail-open",
        /// The backend is of a tier above 0: lower tiers have no eligible backend, or sessions
        /// spill.
        Backup = "backup",
        /// An entry of a session table.
        Sticky = "sticky",
    }

    /// Why a pick passed over a backend.
    pub enum SkipReasonName {
        /// Probes or heartbeats report it down.
        Down = "down",
        /// Ejected after failures.
        Ejected = "ejected",
        /// An operator drains it.
        Draining = "draining",
        /// An operator has put it into maintenance.
        Maintenance = "maintenance",
        /// Its heartbeats report `starting`, `draining` or `stopping`.
        DrainingBySender = "draining-by-sender",
        /// A member source asks for no new sessions.
        DrainingByRegistry = "draining-by-registry",
        /// It waits for its first probe result or heartbeat.
        NoVerdict = "no-verdict",
        /// No connect to it has succeeded since it joined.
        Unverified = "unverified",
        /// It is at its cap.
        AtCap = "at-cap",
        /// Its trial session is not decided yet.
        TrialOpen = "trial-open",
        /// Its slow start gives this pick to others.
        SlowStart = "slow-start",
        /// This session has tried it before.
        Tried = "tried",
        /// The question asked to leave it out.
        Excluded = "excluded",
        /// It does not have the role that the pool needs, or its role is unknown.
        OtherRole = "other-role",
        /// It is a primary, but another one is in force, or none.
        Outranked = "outranked",
        /// Its agent asks for no new sessions.
        DrainedByAgent = "draining-by-agent",
    }

    /// Why a connect attempt failed.
    pub enum FailureName {
        /// The backend refused.
        Refused = "refused",
        /// No answer within the connect timeout.
        Timeout = "timeout",
        /// ICMP unreachable and the like.
        Unreachable = "unreachable",
        /// The backend reset the connection before its first byte.
        EarlyReset = "early-reset",
        /// Another error.
        Unspecified = "other",
        /// This host is out of file descriptors.
        Descriptors = "descriptors",
        /// No local port is free.
        Ports = "ports",
        /// This host is out of memory.
        Memory = "memory",
        /// This host has no route.
        Route = "route",
    }

    /// A condition of a route.
    pub enum RouteConditionName {
        /// The port that the client connected to.
        Ports = "ports",
        /// The address that the client connected to.
        Addresses = "addresses",
        /// The client's address.
        Sources = "sources",
    }

    /// What a client waits for in a queue.
    pub enum WaitName {
        /// All backends are at their caps.
        AtCap = "at-cap",
        /// No backend is free, and the queue is full or off. The client waits in
        /// the listen queue, without a timeout of the balancer.
        ListenQueue = "listen-queue",
        /// The frontend is at its cap. The client waits in the listen queue.
        FrontendCap = "frontend-cap",
        /// The process is at its cap. The client waits in the listen queue.
        ProcessCap = "process-cap",
        /// The pool has no first probe result or heartbeat.
        NoVerdict = "no-verdict",
        /// No backend is eligible, and the pool has `when_none_eligible = "wait"`.
        NoneEligible = "none-eligible",
    }

    /// The role of a node of a database.
    pub enum RoleName {
        /// It takes writes.
        Primary = "primary",
        /// It follows a primary and takes reads only.
        Replica = "replica",
    }

    /// The kind of a probe.
    pub enum ProbeKindName {
        /// Connects to the backend.
        Tcp = "tcp",
        /// Sends bytes and compares the answer.
        SendExpect = "send-expect",
        /// Sends bytes and compares the answers, several times.
        Steps = "steps",
        /// Sends an HTTP request.
        Http = "http",
        /// Sends `PING` to a Redis server and asks for its role.
        Redis = "redis",
        /// Asks a PostgreSQL server whether it takes connections, and for its role.
        Postgres = "postgres",
        /// Asks a MySQL or MariaDB server whether it takes connections, and for its role.
        Mysql = "mysql",
        /// Says hello to a mail server.
        Smtp = "smtp",
        /// Binds anonymously to a directory server.
        Ldap = "ldap",
        /// Sends a question to a DNS server.
        Dns = "dns",
        /// Reads the words of an agent.
        Agent = "agent",
        /// Runs a command.
        Exec = "exec",
    }

    /// Result of a probe.
    pub enum ProbeResultName {
        /// The expected answer arrived.
        Success = "success",
        /// The backend or the path to it failed.
        Failure = "failure",
        /// A local error prevented the probe. It says nothing about the backend.
        NotRun = "not-run",
        /// The probe ran and says nothing about the backend.
        Undecided = "undecided",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_name_round_trips() {
        let read = |text: &str| serde_json::from_str::<IntentName>(text).expect("a name");
        assert_eq!(read("\"draining\""), IntentName::Draining);
        let newer = read("\"resting\"");
        assert_eq!((&newer, newer.name()), (&IntentName::Other("resting".to_owned()), "resting"));
        assert_eq!(serde_json::to_string(&newer).expect("text"), "\"resting\"");
        assert!(serde_json::from_str::<IntentName>("7").is_err());
    }
}
