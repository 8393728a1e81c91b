//! The traffic of the last minute and the last hour: new sessions, bytes and latencies of
//! each backend, and new sessions of each frontend and pool.
//!
//! `daemon` samples the counters of the workers about once a second, on a thread that may
//! take its time, and passes the latencies that the workers recorded. The admin API reads
//! it. Nothing here decides anything, and the control thread never waits for it.
//!
//! # Memory
//!
//! A backend takes about 3 KB: 60 seconds of 16 B, 60 minutes of 20 B, and four sketches of
//! the running and the last minute. Above [`SECONDS_BACKENDS_MAX`] backends the seconds are
//! left out, which leaves about 2 KB.

mod sketch;

pub use sketch::{LatencySketch, LatencyStep};

use crate::metrics::histograms::Series;
use crate::table::state::{BackendId, BackendState, FrontendState};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Seconds and minutes that are kept.
pub const TRAFFIC_SLOTS: usize = 60;

/// Number of backends up to which the seconds of each backend are kept.
pub const SECONDS_BACKENDS_MAX: usize = 2_000;

/// The share of new sessions that a backend gets is smoothed over this time. Shares of
/// single seconds are mostly chance.
const SHARE_TIME: f64 = 10.0;

/// Time that one sketch of a pool covers.
const POOL_SKETCH_SECONDS: u64 = 600;

/// Sketches of a pool: an hour.
const POOL_SKETCHES: usize = 6;

/// The frontends, pools and backends to sample.
#[derive(Debug, Default)]
pub struct TrafficRoster {
    /// In file order.
    pub frontends: Vec<Arc<FrontendState>>,
    /// In file order.
    pub pools: Vec<PoolRoster>,
}

/// The backends of one pool.
#[derive(Debug)]
pub struct PoolRoster {
    /// Name of the pool.
    pub name: Arc<str>,
    /// Its backends.
    pub backends: Vec<Arc<BackendState>>,
}

/// Rates at the last sample.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TrafficRates {
    /// New sessions per second.
    pub new: f64,
    /// Bytes per second from clients.
    pub bytes_in: f64,
    /// Bytes per second to clients.
    pub bytes_out: f64,
    /// New sessions per second, smoothed.
    pub smoothed: f64,
}

/// Latencies of the running and the last minute, in seconds; `None` if nothing was measured.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RecentLatency {
    /// Median and 99th percentile of the connect time.
    pub connect: [Option<f64>; 2],
    /// Median and 99th percentile of the time to the first byte.
    pub first_byte: [Option<f64>; 2],
}

/// One second or minute of a backend.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TrafficSlot {
    /// New sessions.
    pub new: u32,
    /// Open sessions at its end.
    pub active: u32,
    /// Bytes from clients.
    pub bytes_in: f32,
    /// Bytes to clients.
    pub bytes_out: f32,
}

/// One minute of a backend.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MinuteSlot {
    /// Sessions and bytes.
    pub traffic: TrafficSlot,
    /// Median and 99th percentile of the connect time.
    pub connect: [LatencyStep; 2],
    /// Median and 99th percentile of the time to the first byte.
    pub first_byte: [LatencyStep; 2],
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct TrafficHistory {
    /// First and last sample.
    span: Option<(Instant, Instant)>,
    roster: Arc<TrafficRoster>,
    backends: HashMap<BackendId, BackendTraffic>,
    frontends: HashMap<Arc<str>, FrontendTraffic>,
    pools: HashMap<Arc<str>, PoolTraffic>,
}

/// Values of the counters.
#[derive(Debug, Clone, Copy, Default)]
struct TrafficCounts {
    new: u64,
    bytes_in: u64,
    bytes_out: u64,
}

#[derive(Debug, Default)]
struct BackendTraffic {
    last: TrafficCounts,
    at_minute: TrafficCounts,
    rates: TrafficRates,
    seconds: VecDeque<TrafficSlot>,
    minutes: VecDeque<MinuteSlot>,
    /// Connect and first byte of the running minute.
    running: [LatencySketch; 2],
    /// The same of the minute before.
    before: [LatencySketch; 2],
}

#[derive(Debug, Default)]
struct FrontendTraffic {
    last: TrafficCounts,
    rates: TrafficRates,
    seconds: VecDeque<u32>,
    /// Rejected clients per second by reason.
    refused: Vec<(u64, f64)>,
}

#[derive(Debug, Default)]
struct PoolTraffic {
    seconds: VecDeque<u32>,
    /// New sessions per second, smoothed.
    smoothed: f64,
    /// First bytes, newest last.
    hour: VecDeque<LatencySketch>,
}

/// The time that a sample covers.
#[derive(Debug, Clone, Copy)]
struct Sampled {
    /// Seconds since the last sample.
    seconds: f64,
    /// Whole seconds that have ended.
    slots: usize,
    /// Whole minutes that have ended.
    minutes: u64,
    /// A new sketch of each pool begins.
    pool_sketch: bool,
    /// Whether the seconds of each backend are kept.
    keeps_seconds: bool,
}

// === impl TrafficRoster ===

impl TrafficRoster {
    /// Returns the number of backends.
    pub fn backends(&self) -> usize {
        self.pools.iter().map(|pool| pool.backends.len()).sum()
    }
}

// === impl TrafficHistory ===

impl TrafficHistory {
    /// Reads all counters. Seconds without a sample share the counts evenly.
    pub fn sample(&mut self, roster: &Arc<TrafficRoster>, now: Instant) {
        if !Arc::ptr_eq(&self.roster, roster) {
            self.follow(roster);
        }
        let (first, last) = *self.span.get_or_insert((now, now));
        let sampled = Sampled::between(first, last, now, roster.backends());
        if sampled.slots == 0 {
            return;
        }
        self.span = Some((first, now));
        for frontend in &roster.frontends {
            if let Some(traffic) = self.frontends.get_mut(&frontend.name) {
                traffic.sample(frontend, sampled);
            }
        }
        for pool in &roster.pools {
            let mut all = (0, 0.0);
            let mut first_bytes = (sampled.minutes > 0).then(LatencySketch::default);
            for state in &pool.backends {
                let Some(traffic) = self.backends.get_mut(&state.id) else { continue };
                if let Some(first_bytes) = &mut first_bytes {
                    first_bytes.merge(&traffic.running[1]);
                }
                let (new, smoothed) = traffic.sample(state, sampled);
                all = (all.0 + new, all.1 + smoothed);
            }
            let Some(traffic) = self.pools.get_mut(&pool.name) else { continue };
            spread(&mut traffic.seconds, all.0, sampled.slots);
            traffic.smoothed = all.1;
            if let Some(first_bytes) = first_bytes {
                traffic.add_minute(&first_bytes, sampled);
            }
        }
    }

    /// Adds what a worker has recorded. Unknown backends are ignored.
    pub fn record(&mut self, backend: BackendId, series: Series, latency: Duration, count: u64) {
        let place = match series {
            Series::Connect => 0,
            Series::FirstByte => 1,
            Series::Session => return,
        };
        if let Some(traffic) = self.backends.get_mut(&backend) {
            traffic.running[place].add(latency, count);
        }
    }

    /// Takes over a new list and forgets what is not on it. What is new begins with the
    /// present values of its counters.
    fn follow(&mut self, roster: &Arc<TrafficRoster>) {
        self.roster = Arc::clone(roster);
        let states = || roster.pools.iter().flat_map(|pool| &pool.backends);
        let known: HashSet<BackendId> = states().map(|state| state.id).collect();
        self.backends.retain(|id, _| known.contains(id));
        for state in states() {
            self.backends.entry(state.id).or_insert_with(|| BackendTraffic::beginning(state));
        }
        let pools: HashSet<&Arc<str>> = roster.pools.iter().map(|pool| &pool.name).collect();
        self.pools.retain(|name, _| pools.contains(name));
        for pool in &roster.pools {
            self.pools.entry(Arc::clone(&pool.name)).or_default();
        }
        let names: HashSet<&Arc<str>> = roster.frontends.iter().map(|state| &state.name).collect();
        self.frontends.retain(|name, _| names.contains(name));
        for state in &roster.frontends {
            let beginning = || FrontendTraffic::beginning(state);
            self.frontends.entry(Arc::clone(&state.name)).or_insert_with(beginning);
        }
    }

    /// Returns the new sessions of the last seconds of a backend, oldest first; `None` if
    /// the backend is not known. Empty above [`SECONDS_BACKENDS_MAX`] backends.
    pub fn seconds(&self, backend: BackendId) -> Option<&VecDeque<TrafficSlot>> {
        self.backends.get(&backend).map(|traffic| &traffic.seconds)
    }

    /// Returns the last minutes of a backend, oldest first. The last one still runs.
    pub fn minutes(&self, state: &BackendState) -> Vec<MinuteSlot> {
        let Some(traffic) = self.backends.get(&state.id) else { return Vec::new() };
        let skipped = traffic.minutes.len().saturating_sub(TRAFFIC_SLOTS - 1);
        let mut minutes: Vec<MinuteSlot> = traffic.minutes.iter().skip(skipped).copied().collect();
        minutes.push(traffic.minute(state));
        minutes
    }

    /// Returns the rates of a backend.
    pub fn rates(&self, backend: BackendId) -> TrafficRates {
        self.backends.get(&backend).map(|traffic| traffic.rates).unwrap_or_default()
    }

    /// Returns the latencies of a backend in the running and the last minute.
    pub fn recent(&self, backend: BackendId) -> RecentLatency {
        let Some(traffic) = self.backends.get(&backend) else { return RecentLatency::default() };
        let [connect, first_byte] = [0, 1].map(|place| {
            let mut both = traffic.before[place].clone();
            both.merge(&traffic.running[place]);
            [0.5, 0.99].map(|q| both.quantile(q).seconds())
        });
        RecentLatency { connect, first_byte }
    }

    /// Returns the share of its pool's new sessions that a backend gets; `None` if the pool
    /// gets none.
    pub fn share(&self, pool: &str, backend: BackendId) -> Option<f64> {
        let all = self.pools.get(pool)?.smoothed;
        (all > 1e-3).then(|| (self.rates(backend).smoothed / all).min(1.0))
    }

    /// Returns the new sessions of a pool in each of the last seconds, oldest first.
    pub fn pool_seconds(&self, pool: &str) -> Vec<u32> {
        self.pools.get(pool).map(|pool| pool.seconds.iter().copied().collect()).unwrap_or_default()
    }

    /// Returns the 99th percentile of the time to the first byte of a pool: of the last hour,
    /// or of the running and the last minute.
    pub fn pool_first_byte_p99(&self, pool: &str, whole_hour: bool) -> Option<f64> {
        let mut all = LatencySketch::default();
        let roster = self.roster.pools.iter().find(|roster| &*roster.name == pool)?;
        for state in &roster.backends {
            let Some(traffic) = self.backends.get(&state.id) else { continue };
            all.merge(&traffic.running[1]);
            if !whole_hour {
                all.merge(&traffic.before[1]);
            }
        }
        if whole_hour {
            self.pools.get(pool)?.hour.iter().for_each(|part| all.merge(part));
        }
        all.quantile(0.99).seconds()
    }

    /// Returns the new sessions of a frontend in each of the last seconds, oldest first.
    pub fn frontend_seconds(&self, frontend: &str) -> Vec<u32> {
        let seconds = self.frontends.get(frontend).map(|traffic| &traffic.seconds);
        seconds.map(|seconds| seconds.iter().copied().collect()).unwrap_or_default()
    }

    /// Returns the rates of a frontend.
    pub fn frontend_rates(&self, frontend: &str) -> TrafficRates {
        self.frontends.get(frontend).map(|traffic| traffic.rates).unwrap_or_default()
    }

    /// Returns the rejected clients of a frontend per second, smoothed, by the number of the
    /// reason.
    pub fn refused(&self, frontend: &str) -> Vec<f64> {
        let refused = self.frontends.get(frontend).map(|traffic| &traffic.refused);
        refused.map(|all| all.iter().map(|(_, rate)| *rate).collect()).unwrap_or_default()
    }
}

// === impl BackendTraffic ===

impl BackendTraffic {
    fn beginning(state: &BackendState) -> BackendTraffic {
        let now = TrafficCounts::of_backend(state);
        BackendTraffic { last: now, at_minute: now, ..BackendTraffic::default() }
    }

    /// Returns the new sessions, and their smoothed rate.
    fn sample(&mut self, state: &BackendState, sampled: Sampled) -> (u64, f64) {
        let now = TrafficCounts::of_backend(state);
        let since = now.since(self.last);
        self.last = now;
        self.rates.update(since, sampled.seconds);
        if !sampled.keeps_seconds {
            self.seconds = VecDeque::new();
        } else {
            let mut new = VecDeque::new();
            spread(&mut new, since.new, sampled.slots);
            let share = 1.0 / sampled.slots as f32;
            for new in new {
                let active = state.in_flight.get();
                let [bytes_in, bytes_out] =
                    [since.bytes_in, since.bytes_out].map(|bytes| bytes as f32 * share);
                push(&mut self.seconds, TrafficSlot { new, active, bytes_in, bytes_out });
            }
        }
        if sampled.minutes > 0 {
            let ended = self.minute(state);
            for _ in 1..sampled.minutes.min(TRAFFIC_SLOTS as u64) {
                push(&mut self.minutes, MinuteSlot::default());
            }
            push(&mut self.minutes, ended);
            self.at_minute = now;
            self.before = std::mem::take(&mut self.running);
        }
        (since.new, self.rates.smoothed)
    }

    /// Returns the running minute.
    fn minute(&self, state: &BackendState) -> MinuteSlot {
        let since = TrafficCounts::of_backend(state).since(self.at_minute);
        let [connect, first_byte] =
            [0, 1].map(|place| [0.5, 0.99].map(|q| self.running[place].quantile(q)));
        let traffic = TrafficSlot {
            new: u32::try_from(since.new).unwrap_or(u32::MAX),
            active: state.in_flight.get(),
            bytes_in: since.bytes_in as f32,
            bytes_out: since.bytes_out as f32,
        };
        MinuteSlot { traffic, connect, first_byte }
    }
}

// === impl FrontendTraffic ===

impl FrontendTraffic {
    fn beginning(state: &FrontendState) -> FrontendTraffic {
        let last = TrafficCounts::of_frontend(state);
        FrontendTraffic { last, ..FrontendTraffic::default() }
    }

    fn sample(&mut self, state: &FrontendState, sampled: Sampled) {
        let now = TrafficCounts::of_frontend(state);
        let since = now.since(self.last);
        self.last = now;
        self.rates.update(since, sampled.seconds);
        spread(&mut self.seconds, since.new, sampled.slots);
        let reasons = crate::outcome::RefusedReason::COUNT;
        let count = |reason| state.counters.sum(|shard| shard.refused.cell(reason, 0).own());
        let known = self.refused.len() == reasons;
        self.refused.resize(reasons, (0, 0.0));
        for (reason, (last, rate)) in self.refused.iter_mut().enumerate() {
            let now = count(reason);
            let new = if known { now.wrapping_sub(*last) } else { 0 };
            *last = now;
            *rate = smoothed(*rate, new, sampled.seconds);
        }
    }
}

// === impl PoolTraffic ===

impl PoolTraffic {
    /// Adds a minute that has ended.
    fn add_minute(&mut self, minute: &LatencySketch, sampled: Sampled) {
        if self.hour.is_empty() || sampled.pool_sketch {
            if self.hour.len() == POOL_SKETCHES {
                self.hour.pop_front();
            }
            self.hour.push_back(LatencySketch::default());
        }
        if let Some(newest) = self.hour.back_mut() {
            newest.merge(minute);
        }
    }
}

// === impl TrafficCounts ===

impl TrafficCounts {
    fn of_backend(state: &BackendState) -> TrafficCounts {
        TrafficCounts {
            new: state.counters.sum(|shard| shard.sessions.own()),
            bytes_in: state.counters.sum(|shard| shard.bytes_in.own()),
            bytes_out: state.counters.sum(|shard| shard.bytes_out.own()),
        }
    }

    fn of_frontend(state: &FrontendState) -> TrafficCounts {
        TrafficCounts {
            new: state.counters.sum(|shard| shard.sessions.own()),
            bytes_in: state.counters.sum(|shard| shard.bytes_in.own()),
            bytes_out: state.counters.sum(|shard| shard.bytes_out.own()),
        }
    }

    fn since(self, before: TrafficCounts) -> TrafficCounts {
        TrafficCounts {
            new: self.new.saturating_sub(before.new),
            bytes_in: self.bytes_in.saturating_sub(before.bytes_in),
            bytes_out: self.bytes_out.saturating_sub(before.bytes_out),
        }
    }
}

// === impl TrafficRates ===

impl TrafficRates {
    fn update(&mut self, since: TrafficCounts, seconds: f64) {
        if seconds <= 0.0 {
            return;
        }
        self.new = since.new as f64 / seconds;
        self.bytes_in = since.bytes_in as f64 / seconds;
        self.bytes_out = since.bytes_out as f64 / seconds;
        self.smoothed = smoothed(self.smoothed, since.new, seconds);
    }
}

// === impl Sampled ===

impl Sampled {
    fn between(first: Instant, last: Instant, now: Instant, backends: usize) -> Sampled {
        let until = |at: Instant| at.saturating_duration_since(first).as_secs();
        let (before, after) = (until(last), until(now));
        Sampled {
            seconds: now.saturating_duration_since(last).as_secs_f64(),
            slots: usize::try_from(after - before).unwrap_or(TRAFFIC_SLOTS),
            minutes: after / 60 - before / 60,
            pool_sketch: after / POOL_SKETCH_SECONDS != before / POOL_SKETCH_SECONDS,
            keeps_seconds: backends <= SECONDS_BACKENDS_MAX,
        }
    }
}

/// Returns the rate after `new` more events in `seconds`.
fn smoothed(before: f64, new: u64, seconds: f64) -> f64 {
    if seconds <= 0.0 {
        return before;
    }
    let weight = 1.0 - (-seconds / SHARE_TIME).exp();
    before + (new as f64 / seconds - before) * weight
}

/// Adds `count` events that happened during the last `slots` seconds.
fn spread(ring: &mut VecDeque<u32>, count: u64, slots: usize) {
    let kept = slots.min(TRAFFIC_SLOTS);
    for slot in slots - kept..slots {
        let share = |end: usize| u128::from(count) * end as u128 / slots as u128;
        let part = share(slot + 1) - share(slot);
        push(ring, u32::try_from(part).unwrap_or(u32::MAX));
    }
}

/// Adds a slot and drops the oldest one beyond [`TRAFFIC_SLOTS`].
fn push<T>(ring: &mut VecDeque<T>, slot: T) {
    if ring.len() >= TRAFFIC_SLOTS {
        ring.pop_front();
    }
    if ring.capacity() == 0 {
        ring.reserve_exact(TRAFFIC_SLOTS);
    }
    ring.push_back(slot);
}

#[cfg(test)]
mod tests;
