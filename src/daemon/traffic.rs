//! Samples the traffic of all backends about once a second.
//!
//! Part of `telemetry`. The control thread only hands out the list of backends, which it
//! makes again when the list changes. Another thread reads the counters. It has no effect on
//! traffic.
//!
//! An upgrade does not pass the samples on: they begin again in the new process.

use super::control_loop::Control;
use crate::admin::StreamCounters;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_core::traffic::{SECONDS_BACKENDS_MAX, TrafficHistory, TrafficRoster};
use tidegate_net::clock;
use tokio::task::JoinHandle;

/// Time between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// The same above [`SECONDS_BACKENDS_MAX`] backends while no stream is open.
const LARGE_SAMPLE_INTERVAL: Duration = Duration::from_secs(5);

/// Time between two collections of the workers' histograms while no stream is open.
const COLLECT_INTERVAL: Duration = Duration::from_secs(10);

/// The same while a stream is open. A collection costs a worker about 0.1 µs per backend.
const VIEWED_COLLECT_INTERVAL: Duration = Duration::from_secs(1);

/// The same above [`SECONDS_BACKENDS_MAX`] backends.
const LARGE_COLLECT_INTERVAL: Duration = Duration::from_secs(5);

/// The samples. Clones share them. The control thread never locks them.
#[derive(Debug, Clone, Default)]
pub struct SharedTraffic(Arc<Mutex<TrafficHistory>>);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct TrafficSampler {
    next: Instant,
    collect_at: Instant,
    /// The list, and its version in the controller.
    roster: Option<((u64, u64), Arc<TrafficRoster>)>,
    running: Option<JoinHandle<()>>,
    shared: SharedTraffic,
    streams: StreamCounters,
}

// === impl SharedTraffic ===

impl SharedTraffic {
    /// Returns the samples. Never called on the control thread.
    pub(crate) fn lock(&self) -> MutexGuard<'_, TrafficHistory> {
        // After a panic during a sample, one second can be incomplete.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl TrafficSampler ===

impl TrafficSampler {
    pub(super) fn new(streams: StreamCounters, now: Instant) -> TrafficSampler {
        let shared = SharedTraffic::default();
        TrafficSampler { next: now, collect_at: now, roster: None, running: None, shared, streams }
    }

    /// Returns when the next sample is due.
    pub(super) fn due(&self) -> Instant {
        self.next
    }

    pub(super) fn shared(&self) -> &SharedTraffic {
        &self.shared
    }

    /// Sets the next times. Returns whether the histograms are collected now.
    fn advance(&mut self, backends: usize, now: Instant) -> bool {
        let large = backends > SECONDS_BACKENDS_MAX;
        let viewed = self.streams.open() > 0;
        let interval = if large && !viewed { LARGE_SAMPLE_INTERVAL } else { SAMPLE_INTERVAL };
        // Samples keep their distance, so that each second has one.
        self.next += interval;
        if self.next <= now {
            self.next = now + interval;
        }
        let collects =
            now >= self.collect_at || viewed && self.collect_at > now + LARGE_COLLECT_INTERVAL;
        if collects {
            self.collect_at = now
                + match (viewed, large) {
                    (false, _) => COLLECT_INTERVAL,
                    (true, true) => LARGE_COLLECT_INTERVAL,
                    // A little less, so that the next sample finds it due.
                    (true, false) => VIEWED_COLLECT_INTERVAL / 2,
                };
        }
        collects
    }
}

impl Control {
    /// Begins a sample on another thread, unless the one before still runs.
    pub(super) fn sample_traffic(&mut self) {
        let (now, version) = (clock::now(), self.controller.roster_version());
        let sampler = &mut self.telemetry.traffic;
        let roster = match &sampler.roster {
            Some((known, roster)) if *known == version => Arc::clone(roster),
            _ => {
                let roster = Arc::new(self.controller.traffic_roster());
                sampler.roster = Some((version, Arc::clone(&roster)));
                roster
            }
        };
        if sampler.running.as_ref().is_some_and(|running| !running.is_finished()) {
            sampler.next = now + SAMPLE_INTERVAL;
            return;
        }
        let collects = sampler.advance(roster.backends(), now);
        let shared = sampler.shared.clone();
        let collecting = collects.then(|| self.start_collecting());
        self.telemetry.traffic.running = Some(tokio::spawn(async move {
            let collected = match collecting {
                Some(collecting) => Some(collecting.arrive().await),
                None => None,
            };
            let work = move || {
                if let Some(collected) = collected {
                    collected.absorb();
                }
                shared.lock().sample(&roster, clock::now());
            };
            // Fails only if the work panics.
            let _ = tokio::task::spawn_blocking(work).await;
        }));
    }
}
