//! Everything that streams show at one moment, computed once for all of them.
//!
//! Made on a blocking thread from a snapshot. Pure, except that it locks the samples.

use super::super::rejections::ByBackend;
use super::super::snapshot::AdminSnapshot;
use super::super::status::{self, millis};
use super::super::{explain, findings};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;
use tidegate_api::names::{IntentName, ObservationName};
use tidegate_api::status::FreezeDoc;
use tidegate_api::stream::{
    StreamBackendDoc, StreamFrontendDoc, StreamHeadDoc, StreamPoolDoc, StreamProbeDoc,
    StreamRefusedDoc, StreamRowDoc, pool_fields,
};
use tidegate_core::control::shown::ShownState;
use tidegate_core::control::{BackendStatus, PoolStatus};
use tidegate_core::metrics::histograms::MergedHistograms;
use tidegate_core::table::state::BackendId;
use tidegate_core::traffic::TrafficHistory;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) snapshot: Arc<AdminSnapshot>,
    pub(super) head: StreamHeadDoc,
    /// With the last minute.
    pub(super) frontends: Vec<StreamFrontendDoc>,
    pub(super) pools: Vec<PicturePool>,
    pub(super) identity: Arc<PictureIdentity>,
}

/// What the places in deltas refer to. A change needs a new snapshot.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PictureIdentity {
    generation: u64,
    frontends: Vec<Arc<str>>,
    pools: Vec<(Arc<str>, Vec<BackendId>)>,
}

/// A pool, and a row for each of its backends.
#[derive(Debug)]
pub(super) struct PicturePool {
    pub(super) rows: Vec<StreamRowDoc>,
    pub(super) keys: Vec<BackendFacts>,
    pub(super) counts: BTreeMap<String, u64>,
    pub(super) queued: u64,
    pub(super) frozen: Option<FreezeDoc>,
    pub(super) none_eligible: Option<String>,
    /// The code of each backend's state as a digit.
    pub(super) map: String,
    new_minute: Vec<u32>,
}

/// The facts about a backend that a row does not have. If they change, viewers get the whole
/// backend.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BackendFacts {
    intent: IntentName,
    observation: ObservationName,
    ejected: bool,
    on_trial: bool,
    weight: u32,
    tier: u8,
    connections_max: u32,
    shares: (u32, u32),
    unverified: bool,
    transition: Option<Instant>,
}

// === impl Picture ===

impl Picture {
    pub(super) fn of(snapshot: Arc<AdminSnapshot>, node: &str) -> Picture {
        let control = &snapshot.control;
        let traffic = snapshot.traffic.lock();
        let pools = control.pools.iter().map(|pool| PicturePool::of(pool, &snapshot, &traffic));
        let pools = pools.collect();
        let frontends = frontends(&snapshot, &traffic);
        let found = findings::found(&snapshot, &traffic);
        drop(traffic);
        let mut document = status::head(&snapshot);
        document.trouble = found;
        let ids = |pool: &PoolStatus| pool.backends.iter().map(|one| one.state.id).collect();
        let identity = Arc::new(PictureIdentity {
            generation: control.generation,
            frontends: control.frontends.iter().map(|one| Arc::clone(&one.state.name)).collect(),
            pools: control.pools.iter().map(|one| (Arc::clone(&one.name), ids(one))).collect(),
        });
        let head = StreamHeadDoc::of(&document, node.to_owned());
        Picture { head, frontends, pools, identity, snapshot }
    }

    /// Returns the name of a pool.
    pub(super) fn pool_name(&self, pool: usize) -> &str {
        &self.snapshot.control.pools[pool].name
    }

    /// Returns backends of a pool as whole documents, with their places if `indexed`.
    pub(super) fn backends(
        &self,
        pool: usize,
        places: impl Iterator<Item = usize>,
        indexed: bool,
    ) -> Vec<StreamBackendDoc> {
        let (snapshot, rows) = (&self.snapshot, &self.pools[pool].rows);
        let status = &snapshot.control.pools[pool];
        let by_controller = snapshot.control.heartbeat.iter().flat_map(|status| &status.rejections);
        let rejections = ByBackend::new(snapshot.heartbeats.rejections.iter().chain(by_controller));
        let latency = MergedHistograms::new();
        let whole = |place: usize| {
            let one = &status.backends[place];
            let rejected = rejections.of(&status.name, &one.state.name);
            let mut document = StreamBackendDoc {
                index: indexed.then_some(place as u64),
                backend: status::backend(one, rejected, &latency, snapshot.now),
                new_rate: 0.0,
                in_rate: 0.0,
                out_rate: 0.0,
                gets: 0.0,
                should: 0.0,
                health_percent: one.health_percent,
                load_percent: one.load_percent,
                intent_seconds: millis(snapshot.now.saturating_duration_since(one.intent_since)),
                overridden: None,
            };
            document.apply(&rows[place]);
            document
        };
        places.map(whole).collect()
    }

    /// Returns a pool as in a snapshot.
    pub(super) fn pool(&self, pool: usize, backends: Vec<StreamBackendDoc>) -> StreamPoolDoc {
        let (snapshot, shown) = (&self.snapshot, &self.pools[pool]);
        let status = &snapshot.control.pools[pool];
        let table = snapshot.table.pools.iter().find(|table| table.spec.name == status.name);
        let spec = table.map(|table| &table.spec);
        let probe = spec.and_then(|spec| spec.probe.as_ref()).map(|probe| StreamProbeDoc {
            kind: explain::probe_kind(&probe.kind).name().to_owned(),
            interval_seconds: millis(probe.interval),
            rise: probe.rise,
            fall: probe.fall,
        });
        let slow_start = spec.and_then(|spec| spec.slow_start);
        StreamPoolDoc {
            pool: pool_fields(&status::pool_head(status, snapshot)),
            queue_max: spec.map_or(0, |spec| spec.queue_max),
            probe,
            slow_start_seconds: slow_start.map_or(0.0, millis),
            new_minute: shown.new_minute.clone(),
            total: status.backends.len() as u64,
            counts: shown.counts.clone(),
            map: None,
            backends,
        }
    }
}

// === impl PicturePool ===

impl PicturePool {
    fn of(pool: &PoolStatus, snapshot: &AdminSnapshot, traffic: &TrafficHistory) -> PicturePool {
        let shares = shares(pool, snapshot);
        let mut counts: BTreeMap<String, u64> =
            ShownState::ALL.iter().map(|state| (state.name().to_owned(), 0)).collect();
        let mut map = String::with_capacity(pool.backends.len());
        for backend in &pool.backends {
            let state = ShownState::of(backend);
            if let Some(count) = counts.get_mut(state.name()) {
                *count += 1;
            }
            map.push(char::from(b'0' + state.code()));
        }
        let row = |(place, backend): (usize, &BackendStatus)| {
            let should = shares.get(&backend.state.id).copied().unwrap_or_default();
            row(place, backend, should, &pool.name, traffic)
        };
        PicturePool {
            rows: pool.backends.iter().enumerate().map(row).collect(),
            keys: pool.backends.iter().map(BackendFacts::of).collect(),
            counts,
            queued: snapshot.queued.get(&pool.name).copied().unwrap_or_default() as u64,
            frozen: pool.frozen.as_ref().map(status::frozen),
            none_eligible: pool.none_eligible.map(str::to_owned),
            map,
            new_minute: traffic.pool_seconds(&pool.name),
        }
    }

    /// Returns the worst backends, at most `most`, by their places.
    pub(super) fn worst(&self, most: usize) -> Vec<usize> {
        let mut latencies: Vec<f64> = self.rows.iter().filter_map(|row| row.12).collect();
        let middle = latencies.len() / 2;
        let median = (!latencies.is_empty())
            .then(|| *latencies.select_nth_unstable_by(middle, f64::total_cmp).1);
        let mut ranks: Vec<(u32, usize)> = (self.rows.iter().zip(self.map.bytes()).enumerate())
            .map(|(place, (row, code))| (badness(row, code - b'0', median), place))
            .collect();
        let order = |one: &(u32, usize)| (std::cmp::Reverse(one.0), one.1);
        if ranks.len() > most {
            ranks.select_nth_unstable_by_key(most, order);
            ranks.truncate(most);
        }
        let mut places: Vec<usize> = ranks.into_iter().map(|(_, place)| place).collect();
        places.sort_unstable();
        places
    }
}

/// Returns how much a backend needs attention. Only large differences count, in coarse steps.
fn badness(row: &StreamRowDoc, code: u8, median: Option<f64>) -> u32 {
    // By the codes of `ShownState`: up, down, ejected, suspect, joining, draining, standby,
    // unknown.
    let state = [0, 7, 6, 5, 4, 3, 2, 1].get(usize::from(code)).copied().unwrap_or_default();
    let slower = row.12.zip(median).map_or(0.0, |(p99, median)| p99 / median.max(1e-6));
    let slow = if slower > 3.0 { (slower.round() as u32 * 10).min(400) } else { 0 };
    let (new, gets, should) = (row.2, row.5, row.6);
    let error = if should > 0.0 && new > 0.3 { (gets / should - 1.0).abs() } else { 0.0 };
    let uneven = if error > 0.25 { ((error * 4.0).round() as u32 * 10).min(90) } else { 0 };
    state * 1_000 + slow + uneven
}

// === impl BackendFacts ===

impl BackendFacts {
    fn of(backend: &BackendStatus) -> BackendFacts {
        BackendFacts {
            intent: backend.intent.name().into(),
            observation: backend.observation.name().into(),
            ejected: backend.ejected,
            on_trial: backend.on_trial,
            weight: backend.weight,
            tier: backend.tier,
            connections_max: backend.connections_max,
            shares: (backend.health_percent, backend.load_percent),
            unverified: backend.unverified,
            transition: backend.last_transition.as_ref().map(|transition| transition.at),
        }
    }
}

/// Returns the share that the balancer gives to each backend that can be picked.
fn shares(pool: &PoolStatus, snapshot: &AdminSnapshot) -> HashMap<BackendId, f64> {
    let table = snapshot.table.pools.iter().find(|table| table.spec.name == pool.name);
    let shares = table.into_iter().flat_map(|table| table.shares());
    shares.map(|(state, share)| (state.id, share)).collect()
}

fn row(
    place: usize,
    backend: &BackendStatus,
    should: f64,
    pool: &str,
    traffic: &TrafficHistory,
) -> StreamRowDoc {
    let id = backend.state.id;
    let (rates, recent) = (traffic.rates(id), traffic.recent(id));
    let gets = traffic.share(pool, id).unwrap_or(should);
    StreamRowDoc(
        place as u64,
        backend.state.in_flight.get(),
        rounded(rates.new, 100.0),
        rates.bytes_in.round(),
        rates.bytes_out.round(),
        rounded(gets, 1e5),
        rounded(should, 1e5),
        rounded(backend.effective_weight, 100.0),
        backend.ramp_percent,
        recent.connect[0],
        recent.connect[1],
        recent.first_byte[0],
        recent.first_byte[1],
        u8::from(backend.eligible),
    )
}

/// Rounds to a fraction of 1/`parts`.
fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

fn frontends(snapshot: &AdminSnapshot, traffic: &TrafficHistory) -> Vec<StreamFrontendDoc> {
    let latencies: HashMap<&str, Option<f64>> = (snapshot.control.pools.iter())
        .map(|pool| (&*pool.name, traffic.pool_first_byte_p99(&pool.name, false)))
        .collect();
    let of = |frontend| {
        let document = status::frontend(frontend);
        let rates = traffic.frontend_rates(&document.name);
        let refused = findings::refused(&frontend.state.name, traffic);
        let refused = refused.into_iter().map(|one| StreamRefusedDoc {
            reason: one.reason.to_owned(),
            text: one.text.to_owned(),
            rate: rounded(one.rate, 100.0),
        });
        StreamFrontendDoc {
            mode: "proxy".to_owned(),
            new_rate: rounded(rates.new, 100.0),
            in_rate: rates.bytes_in.round(),
            out_rate: rates.bytes_out.round(),
            first_byte_p99: latencies.get(&*document.pool).copied().flatten(),
            refused: refused.collect(),
            new_minute: Some(traffic.frontend_seconds(&document.name)),
            frontend: document,
        }
    };
    snapshot.control.frontends.iter().map(of).collect()
}
