//! `GET /v1/explain`: why a session got its backend, and where a client would go now.
//!
//! Written by `daemon`, read by `tidegate explain`. It contains only data and computes
//! nothing.

use super::names::{
    CauseName, FailureName, PhaseName, PolicyName, RouteConditionName, SessionStateName,
    SkipReasonName, WaitName, WhyName,
};
use super::status::{TierShareDoc, whole_if_it_is};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// `?session=N`: one session with each of its picks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionExplanation {
    /// Number of the session.
    pub session: u64,
    /// Frontend that accepted it; `null` if its name is no longer known.
    pub frontend: Option<String>,
    /// Address and port of the client, or `unix:uid=USER,pid=PROCESS`.
    pub client: String,
    /// Address and port of the socket's peer, if a PROXY header announced the client; else
    /// `null`.
    #[serde(default)]
    pub peer: Option<String>,
    /// Position of the route it took, from 1; `null` for the frontend's pool, and if the
    /// client was rejected before routing.
    pub route: Option<u8>,
    /// `open` or `ended`; `unknown` if the last decision in the rings is a failed attempt
    /// without an end.
    pub state: SessionStateName,
    /// How it ended; `null` while it is open, and if that is unknown.
    pub end: Option<SessionEndDoc>,
    /// One per connect attempt, oldest first. Attempts that the rings no longer hold are
    /// missing.
    pub decisions: Vec<DecisionDoc>,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionEndDoc {
    /// As in the access log.
    pub cause: CauseName,
    /// As in the access log.
    pub phase: PhaseName,
    /// Time from accept to the end.
    pub lasted_seconds: f64,
}

/// One pick of a backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecisionDoc {
    /// Time of the pick, RFC 3339 with milliseconds.
    pub time: String,
    /// Number of the connect attempt that the pick was for, from 1.
    pub attempt: u8,
    /// Serial of the table.
    pub table: u64,
    /// Pool; `null` if the route or the frontend rejects the client, and if the name is no
    /// longer known.
    pub pool: Option<String>,
    /// Policy of the pool; `null` without a pool.
    pub policy: Option<PolicyName>,
    /// What decided.
    pub why: WhyName,
    /// The backend that was picked; `null` if none was.
    pub backend: Option<BackendRefDoc>,
    /// Tier of that backend; 0 if none was picked.
    #[serde(default)]
    pub tier: u8,
    /// Whether sessions spilled over several tiers (`tiers = "spill"`).
    #[serde(default)]
    pub spilled: bool,
    /// Backends that the balancer could pick from.
    pub candidates: u32,
    /// What the policy compared or drew.
    pub figures: FiguresDoc,
    /// Time in the pool's queue before the pick; `null` if it did not wait.
    pub waited_seconds: Option<f64>,
    /// Backends that were passed over; at most eight.
    pub skipped: Vec<SkippedDoc>,
    /// Number of all backends that were passed over.
    pub skipped_total: u32,
    /// Time from the pick to the connection; `null` if there was none, or none yet.
    pub connect_seconds: Option<f64>,
    /// Why the connect failed; `null` if it did not.
    pub failure: Option<FailureName>,
    /// Whether that is an error of this host, and says nothing about the backend.
    pub local_error: bool,
    /// Its errno; `null` if there was none.
    pub errno: Option<i32>,
    /// Time from the start of the attempt to its failure; for an early reset, from the
    /// established connection. `null` if it did not fail.
    pub failed_after_seconds: Option<f64>,
}

/// A backend by its names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendRefDoc {
    /// Pool name.
    pub pool: String,
    /// Backend name.
    pub backend: String,
    /// `IP:PORT` or `unix:PATH`; empty if it is no longer known.
    pub address: String,
}

/// A backend that a pick passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedDoc {
    /// The backend.
    #[serde(flatten)]
    pub backend: BackendRefDoc,
    /// Why.
    pub reason: SkipReasonName,
    /// How long the reason had held at the pick; for `ejected`, how much of the ejection
    /// was left. 0 for reasons of the pick itself.
    pub seconds: u32,
}

/// What a policy compared or drew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum FiguresDoc {
    /// Nothing was picked, or nothing was compared.
    None,
    /// `weighted-round-robin`.
    Turn {
        /// Position in the sequence, from 0.
        position: u64,
        /// Picks after which the sequence repeats.
        period: u64,
    },
    /// `least-connections`, `two-choices`, `peak-ewma`.
    Loads {
        /// Of the chosen backend, before the pick.
        chosen: LoadDoc,
        /// The best other backend that was compared.
        other: Option<OtherLoadDoc>,
    },
    /// `source-hash`.
    Slot {
        /// Slot of the hash table, from 0.
        slot: u32,
        /// Number of slots.
        slots: u32,
        /// 0: the client's own slot; above 0: the number of alternatives used, because
        /// those before could not be picked.
        alternative: u16,
    },
    /// `random`.
    Share {
        /// Effective weight of the chosen backend.
        #[serde(serialize_with = "whole_if_it_is")]
        weight: f64,
        /// Sum of the candidates' effective weights.
        #[serde(serialize_with = "whole_if_it_is")]
        total: f64,
    },
    /// Figures of a newer version.
    #[serde(other)]
    Other,
}

/// Load of one backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadDoc {
    /// Open sessions.
    pub sessions: u32,
    /// Effective weight.
    #[serde(serialize_with = "whole_if_it_is")]
    pub weight: f64,
    /// Expected time to answer; `null` unless the policy compares it.
    pub answer_seconds: Option<f64>,
}

/// Load of another backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OtherLoadDoc {
    /// The backend.
    pub backend: BackendRefDoc,
    /// Its load.
    pub load: LoadDoc,
}

/// `?client=ADDR&frontend=NAME`: what would happen to a new connection now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForecastDocument {
    /// Frontend name.
    pub frontend: String,
    /// The client, with port 0 if the question names none.
    pub client: SocketAddr,
    /// Address that the client connects to.
    pub local: SocketAddr,
    /// Serial of the table.
    pub table: u64,
    /// Changes that the question assumes.
    pub assumed: Vec<AssumedDoc>,
    /// Whether the client may connect.
    pub admission: AdmissionDoc,
    /// The route; `null` if the client is rejected before routing.
    pub route: Option<RouteDoc>,
    /// The pool; `null` without one.
    pub pool: Option<PoolStepDoc>,
    /// The pick; `null` if no backend can be picked now.
    pub pick: Option<PickDoc>,
    /// What the client gets instead of a backend; `null` if a backend is picked.
    pub refusal: Option<RefusalDoc>,
}

/// A change that the question assumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssumedDoc {
    /// Pool name.
    pub pool: String,
    /// Backend name.
    pub backend: String,
    /// The assumed weight; `null`: the backend is not eligible.
    pub weight: Option<u16>,
}

/// Whether a client may connect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdmissionDoc {
    /// Whether it may.
    pub allowed: bool,
    /// The range of `allow` or `deny` that decided; `null` if none contains the client, or
    /// the frontend has no such ranges.
    pub rule: Option<AccessRuleDoc>,
    /// Whether the frontend has allowed or denied ranges.
    pub has_rules: bool,
    /// Limits of its client source; `null` if there are none.
    pub source: Option<SourceUsageDoc>,
    /// Open sessions of the frontend.
    pub sessions: u32,
    /// Cap on those; 0 means none.
    pub connections_max: u32,
}

/// A range that decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessRuleDoc {
    /// Whether it allows or denies.
    pub allows: bool,
    /// The range, or the file that contains it.
    pub range: String,
}

/// Use of a client source's limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceUsageDoc {
    /// The client source, such as `10.0.0.0/24`.
    pub source: String,
    /// Its open connections.
    pub connections: u32,
    /// Cap on those; 0 means none.
    pub connections_max: u32,
    /// Rate limit, such as `10/s`; `null` if there is none.
    pub rate: Option<String>,
    /// Whether another connection exceeds a limit now.
    pub exceeded: bool,
}

/// The route of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteDoc {
    /// Its position from 1; `null`: the frontend's pool, because no route matches.
    pub position: Option<u8>,
    /// Number of routes of the frontend.
    pub routes: u8,
    /// The routes before it, with the first condition that does not hold.
    pub mismatches: Vec<MismatchDoc>,
}

/// A route that does not match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MismatchDoc {
    /// Its position, from 1.
    pub position: u8,
    /// The condition that does not hold.
    pub condition: RouteConditionName,
    /// The ranges or ports of that condition.
    pub values: String,
}

/// The pool of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStepDoc {
    /// Pool name.
    pub name: String,
    /// Its policy.
    pub policy: PolicyName,
    /// The tiers that serve, the lowest first; empty while no backend is eligible.
    #[serde(default)]
    pub tier_shares: Vec<TierShareDoc>,
    /// Backends that the balancer can pick from.
    pub candidates: u32,
    /// Clients in its queue.
    pub queued: u64,
    /// Backends that cannot be picked now; at most eight.
    pub skipped: Vec<SkippedDoc>,
    /// Number of all backends that cannot be picked now.
    pub skipped_total: u32,
}

/// A pick.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PickDoc {
    /// The backend, or the likeliest one if draws decide.
    pub backend: BackendRefDoc,
    /// Whether each pick at this moment would be the same.
    pub certain: bool,
    /// What decides.
    pub why: WhyName,
    /// Tier of the backend.
    #[serde(default)]
    pub tier: u8,
    /// Whether sessions spill over several tiers (`tiers = "spill"`).
    #[serde(default)]
    pub spills: bool,
    /// What the policy compared or drew.
    pub figures: FiguresDoc,
    /// Share of each backend, largest first; empty if no draw has a part in the pick.
    pub shares: Vec<ShareDoc>,
    /// Number of draws that the shares are measured with.
    pub draws: u32,
    /// The backend without the assumed changes; `null` if there are none, or if no backend
    /// could be picked without them.
    pub unchanged: Option<BackendRefDoc>,
    /// Backends of the next attempts if connects fail, as far as they are certain; at most
    /// three.
    pub retries: Vec<BackendRefDoc>,
    /// Connect attempts of a session, at most.
    pub attempts_max: u8,
    /// Timeout of each attempt.
    pub connect_timeout_seconds: f64,
}

/// Share of a backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShareDoc {
    /// The backend.
    pub backend: BackendRefDoc,
    /// Its share of the draws.
    pub percent: f64,
}

/// What a client gets instead of a backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusalDoc {
    /// Cause of the session's end, as in the access log.
    pub cause: CauseName,
    /// Its phase.
    pub phase: PhaseName,
    /// What the client waits for before; `null` if it does not wait.
    pub waits_for: Option<WaitName>,
    /// How long it waits, at most; 0 if it does not wait, and in the listen queue, which has
    /// no timeout.
    pub waits_seconds: f64,
}
