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

    /// The kind of a probe.
    pub enum ProbeKindName {
        /// Connects to the backend.
        Tcp = "tcp",
        /// Sends bytes and compares the answer.
        SendExpect = "send-expect",
        /// Sends an HTTP request.
        Http = "http",
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
