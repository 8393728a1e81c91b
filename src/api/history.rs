//! `GET /v1/pools/{pool}/backends/{name}/history`: the last hour of one backend.
//!
//! Written by `daemon`, read by the page. It contains only data. `.../minute` answers a
//! plain list of numbers.

use serde::{Deserialize, Serialize};

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HistoryDoc {
    /// The last 60 minutes.
    pub minutes: MinutesDoc,
    /// 99th percentile of the time to the first byte, over all backends of the pool and the
    /// last hour; `null` if nothing was measured.
    pub pool_first_p99: Option<f64>,
    /// Its states during the last hour, oldest first.
    pub states: Vec<StateSpanDoc>,
    /// Its last probes, oldest first; at most 24.
    pub probes: Vec<EndedProbeDoc>,
}

/// Lists of 60 values, oldest first. The last one is the running minute. `null`: the minute
/// is before the first sample, or nothing was measured in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MinutesDoc {
    /// Median of the connect time, in seconds.
    pub connect_p50: Vec<Option<f64>>,
    /// 99th percentile of the connect time.
    pub connect_p99: Vec<Option<f64>>,
    /// Median of the time to the first byte.
    pub first_p50: Vec<Option<f64>>,
    /// 99th percentile of the time to the first byte.
    pub first_p99: Vec<Option<f64>>,
    /// New sessions.
    pub new: Vec<Option<u32>>,
    /// Open sessions at the end of the minute.
    pub active: Vec<Option<u32>>,
    /// Bytes from clients.
    pub bytes_in: Vec<Option<f32>>,
    /// Bytes to clients.
    pub bytes_out: Vec<Option<f32>>,
}

/// A time with one state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateSpanDoc {
    /// `up`, `down`, `ejected`, `suspect`, `joining` (slow start), `draining`, `standby` or
    /// `unknown`.
    pub state: String,
    /// Age of its begin in seconds; at most 3,600.
    pub from: f64,
    /// Age of its end in seconds; 0 if it lasts.
    pub to: f64,
    /// Why it began; empty if that is not known.
    pub reason: String,
}

/// A probe that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndedProbeDoc {
    /// Whether it succeeded.
    pub ok: bool,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Age of its result.
    pub seconds_ago: f64,
    /// Why it failed; empty if it succeeded.
    pub text: String,
}
