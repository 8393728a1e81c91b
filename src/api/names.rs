//! Closed sets of names in the documents.
//!
//! Written by `daemon` from the names of `core`, matched by clients. Each set keeps a
//! name that it does not know as `Other`, since a newer balancer may have more of them.

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
            /// As in the document.
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
        /// Not yet.
        Starting = "starting",
        /// It does.
        Serving = "serving",
        /// It finishes the sessions it has.
        Draining = "draining",
    }

    /// What moves the bytes of sessions.
    pub enum EngineName {
        /// Readiness, with splice for long streams.
        Epoll = "epoll",
        /// Completions.
        IoUring = "io_uring",
    }

    /// How a pool picks backends.
    pub enum PolicyName {
        /// In turn, by weight.
        WeightedRoundRobin = "weighted-round-robin",
        /// Fewest sessions for its weight.
        LeastConnections = "least-connections",
        /// By chance, by weight.
        Random = "random",
        /// The less busy of two drawn by chance.
        TwoChoices = "two-choices",
        /// The less busy of two, by connect time and sessions.
        PeakEwma = "peak-ewma",
        /// By the client's address.
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

    /// What the operator wants of a backend.
    pub enum IntentName {
        /// New sessions.
        Ready = "ready",
        /// No new sessions; those it has finish.
        Draining = "draining",
        /// Out of service.
        Maintenance = "maintenance",
    }

    /// What probes and heartbeats say of a backend.
    pub enum ObservationName {
        /// No result yet.
        Unknown = "unknown",
        /// It works.
        Up = "up",
        /// Unclear: it gets a tenth of its weight.
        Suspect = "suspect",
        /// Confirmed not to work.
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
        /// Unclear.
        Suspect = "suspect",
        /// Confirmed not to work.
        Down = "down",
        /// Out for a time after failures.
        Ejected = "ejected",
        /// One session at a time, after an ejection.
        Trial = "trial",
        /// It is configured no more.
        Removed = "removed",
        /// The operator or its heartbeats want new sessions.
        Ready = "ready",
        /// The operator or its heartbeats want no new sessions.
        Draining = "draining",
        /// The operator has taken it out of service.
        Maintenance = "maintenance",
        /// Its heartbeats want no sessions yet.
        Starting = "starting",
        /// Its heartbeats say that it stops.
        Stopping = "stopping",
    }

    /// What a backend's heartbeats ask for.
    pub enum SenderStateName {
        /// New sessions.
        Ready = "ready",
        /// No sessions yet.
        Starting = "starting",
        /// No new sessions.
        Draining = "draining",
        /// No new sessions, and it stops.
        Stopping = "stopping",
    }

    /// What the silence of a backend's heartbeats means.
    pub enum PulseName {
        /// None were heard and none are needed.
        Absent = "absent",
        /// None were heard; the first one is needed.
        Awaited = "awaited",
        /// They arrive in time.
        Beating = "beating",
        /// Overdue, not confirmed.
        Suspect = "suspect",
        /// Silent, but it answers probes.
        Vouched = "vouched",
        /// Silent, and confirmed.
        Silent = "silent",
        /// Silent for the pool's `ttl`.
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
        /// Confirmed.
        Down = "down",
        /// They arrive again, not proven yet.
        Recovering = "recovering",
    }

    /// What one probe does.
    pub enum ProbeKindName {
        /// Connects.
        Tcp = "tcp",
        /// Compares an answer.
        SendExpect = "send-expect",
        /// Makes an HTTP request.
        Http = "http",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_a_newer_version_is_kept_and_written_as_it_came() {
        let read = |text: &str| serde_json::from_str::<IntentName>(text).expect("a name");
        assert_eq!(read("\"draining\""), IntentName::Draining);
        let newer = read("\"resting\"");
        assert_eq!((&newer, newer.name()), (&IntentName::Other("resting".to_owned()), "resting"));
        assert_eq!(serde_json::to_string(&newer).expect("text"), "\"resting\"");
        assert!(serde_json::from_str::<IntentName>("7").is_err());
    }
}
