//! `GET /v1/stream`: the state of the process, and its changes.
//!
//! Written by `daemon`, read by the page and by `tidegate top`. It contains only data. Each
//! event has a name and one of these documents. The events of `GET /v1/events` are events here too.

use super::status::{BackendDoc, FreezeDoc, FrontendDoc, PoolDoc, StatusDoc, whole_if_it_is};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// `event: snapshot`: everything that the selection contains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamSnapshotDoc {
    /// The head, without frontends and pools.
    #[serde(flatten)]
    pub head: StreamHeadDoc,
    /// Frontends, in file order.
    pub frontends: Vec<StreamFrontendDoc>,
    /// Pools, in file order.
    pub pools: Vec<StreamPoolDoc>,
}

/// `event: delta`: what changes, once a second. Rows and pools are named by their place in the
/// newest snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamDeltaDoc {
    /// The head again.
    #[serde(flatten)]
    pub head: StreamHeadDoc,
    /// All frontends, without the last minute.
    pub frontends: Vec<StreamFrontendDoc>,
    /// All pools of the snapshot.
    pub pools: Vec<PoolDeltaDoc>,
}

/// `event: transition`: a backend has changed its state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamTransitionDoc {
    /// Name of the pool.
    pub pool: String,
    /// Name of the backend.
    pub backend: String,
    /// The backend now.
    pub row: StreamBackendDoc,
}

/// The fields of another document.
pub type DocumentFields = BTreeMap<String, Value>;

/// The fields of the status that are about the whole process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamHeadDoc {
    /// The status, whose frontends and pools are written elsewhere.
    #[serde(flatten)]
    pub status: DocumentFields,
    /// Name of this host.
    pub node: String,
    /// A configuration that waits for a confirmation; `null` if there is none.
    pub pending: Option<Value>,
}

/// A frontend, with rates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamFrontendDoc {
    /// As in the status.
    #[serde(flatten)]
    pub frontend: FrontendDoc,
    /// `proxy`: sessions are relayed.
    pub mode: String,
    /// Accepted connections per second.
    pub new_rate: f64,
    /// Bytes per second from clients.
    pub in_rate: f64,
    /// Bytes per second to clients.
    pub out_rate: f64,
    /// 99th percentile of the time to the first byte in its pool, in the running and the last
    /// minute; `null` if nothing was measured.
    pub first_byte_p99: Option<f64>,
    /// Rejected clients, by reason.
    pub refused: Vec<StreamRefusedDoc>,
    /// Accepted connections in each of the last 60 s, oldest first. Only in a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_minute: Option<Vec<u32>>,
}

/// Rejected clients of a frontend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamRefusedDoc {
    /// The reason, as in metrics.
    pub reason: String,
    /// The reason in words.
    pub text: String,
    /// Clients per second, smoothed over 10 s.
    pub rate: f64,
}

/// Settings of a pool's probes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamProbeDoc {
    /// Kind of check.
    pub kind: String,
    /// Time between two probes.
    pub interval_seconds: f64,
    /// Successful probes in a row that set a backend to `up`.
    pub rise: u32,
    /// Failures in a row that set it to `down`.
    pub fall: u32,
}

/// A pool in a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamPoolDoc {
    /// As in the status, without backends.
    #[serde(flatten)]
    pub pool: DocumentFields,
    /// Cap on its queue.
    pub queue_max: u32,
    /// `null` if it has no probes.
    pub probe: Option<StreamProbeDoc>,
    /// Duration of a slow start; 0 without one.
    pub slow_start_seconds: f64,
    /// New sessions in each of the last 60 s, oldest first.
    pub new_minute: Vec<u32>,
    /// Number of its backends, shown or not.
    pub total: u64,
    /// Number of its backends by state.
    pub counts: BTreeMap<String, u64>,
    /// The state of each backend as one digit; `null` if the selection has all backends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
    /// The selected backends.
    pub backends: Vec<StreamBackendDoc>,
}

/// A backend in a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamBackendDoc {
    /// Its place in the pool. Only if the selection does not have all backends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// As in the status. Latencies are those of the running and the last minute.
    #[serde(flatten)]
    pub backend: BackendDoc,
    /// New sessions per second.
    pub new_rate: f64,
    /// Bytes per second from clients.
    pub in_rate: f64,
    /// Bytes per second to clients.
    pub out_rate: f64,
    /// Its share of the pool's new sessions, smoothed over 10 s.
    pub gets: f64,
    /// The share that the balancer gives it.
    pub should: f64,
    /// Share of its weight that its health leaves, in percent.
    pub health_percent: u32,
    /// Share of its weight that its load leaves, in percent.
    pub load_percent: u32,
    /// Age of the operator's intent.
    pub intent_seconds: f64,
    /// A setting of an operator that replaces the configured one; `null` if there is none.
    #[serde(rename = "override")]
    pub overridden: Option<String>,
}

/// A pool in a delta.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolDeltaDoc {
    /// Clients in its queue.
    pub queued: u64,
    /// The guard in force, or `null`.
    pub frozen: Option<FreezeDoc>,
    /// Rule while no backend is eligible, or `null`.
    pub none_eligible: Option<String>,
    /// Number of its backends by state.
    pub counts: BTreeMap<String, u64>,
    /// Changed rows.
    pub rows: Vec<StreamRowDoc>,
    /// The state of each backend as one digit, if one has changed and the selection does not
    /// have all backends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<String>,
    /// Backends that the selection has now, and had not before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub enter: Vec<StreamBackendDoc>,
    /// Places of the backends that it has no longer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leave: Vec<u64>,
}

/// The numbers of a backend: place in the pool, open sessions, new sessions per second, bytes
/// per second from and to clients, share it gets, share it should get, effective weight,
/// slow start in percent, p50 and p99 of the connect time, p50 and p99 of the time to the first
/// byte, and 1 if it is eligible, else 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StreamRowDoc(
    pub u64,
    pub u32,
    #[serde(serialize_with = "whole_if_it_is")] pub f64,
    #[serde(serialize_with = "whole_if_it_is")] pub f64,
    #[serde(serialize_with = "whole_if_it_is")] pub f64,
    #[serde(serialize_with = "whole_if_it_is")] pub f64,
    #[serde(serialize_with = "whole_if_it_is")] pub f64,
    #[serde(serialize_with = "whole_if_it_is")] pub f64,
    pub u32,
    pub Option<f64>,
    pub Option<f64>,
    pub Option<f64>,
    pub Option<f64>,
    pub u8,
);

// === impl StreamHeadDoc ===

impl StreamHeadDoc {
    /// Returns the head of a status.
    pub fn of(status: &StatusDoc, node: String) -> StreamHeadDoc {
        StreamHeadDoc { status: without(status, &["frontends", "pools"]), node, pending: None }
    }
}

// === impl StreamSnapshotDoc ===

impl StreamSnapshotDoc {
    /// Applies a delta of a stream that has all backends, as a client does.
    pub fn apply(&mut self, delta: &StreamDeltaDoc) {
        self.head = delta.head.clone();
        for (frontend, newer) in self.frontends.iter_mut().zip(&delta.frontends) {
            *frontend =
                StreamFrontendDoc { new_minute: frontend.new_minute.take(), ..newer.clone() };
        }
        for (pool, newer) in self.pools.iter_mut().zip(&delta.pools) {
            pool.counts = newer.counts.clone();
            let json = |value| serde_json::to_value(value).unwrap_or_default();
            pool.pool.insert("queued".to_owned(), newer.queued.into());
            pool.pool.insert("frozen".to_owned(), json(&newer.frozen));
            pool.pool.insert("none_eligible".to_owned(), newer.none_eligible.clone().into());
            for row in &newer.rows {
                if let Some(backend) = pool.backends.get_mut(row.0 as usize) {
                    backend.apply(row);
                }
            }
        }
    }
}

// === impl StreamBackendDoc ===

impl StreamBackendDoc {
    /// Applies a row.
    pub fn apply(&mut self, row: &StreamRowDoc) {
        let StreamRowDoc(_, active, new, bytes_in, bytes_out, gets, should, weight, ramp, ..) =
            *row;
        self.backend.sessions_active = active;
        (self.new_rate, self.in_rate, self.out_rate) = (new, bytes_in, bytes_out);
        (self.gets, self.should) = (gets, should);
        (self.backend.effective_weight, self.backend.ramp_percent) = (weight, ramp);
        self.backend.connect_seconds.p50 = row.9;
        self.backend.connect_seconds.p99 = row.10;
        self.backend.first_byte_seconds.p50 = row.11;
        self.backend.first_byte_seconds.p99 = row.12;
        self.backend.eligible = row.13 == 1;
    }
}

/// Returns a pool without its backends.
pub fn pool_fields(pool: &PoolDoc) -> DocumentFields {
    without(pool, &["backends"])
}

/// Returns the fields of a document without some of them.
fn without(document: &impl Serialize, names: &[&str]) -> DocumentFields {
    match serde_json::to_value(document) {
        Ok(Value::Object(fields)) => {
            fields.into_iter().filter(|(name, _)| !names.contains(&&**name)).collect()
        }
        _ => BTreeMap::new(),
    }
}
