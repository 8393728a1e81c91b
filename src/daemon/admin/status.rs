//! `/v1/status`: the whole picture as JSON.
//!
//! Called by the control loop with a [`AdminSnapshot`]. Pure: it reads no clock and
//! does no I/O.

use super::rejections::{ByBackend, RejectedDoc, SHOWN_MAX};
use super::snapshot::AdminSnapshot;
use crate::admin::rejections;
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::{
    BackendStatus, FreezeStatus, FrontendStatus, HeartbeatChannelStatus, MemberSourceKind,
    PoolStatus,
};
use tidegate_core::health::{HeartbeatHealth, Transition};
use tidegate_core::metrics::counters::{PanicScope, WorkerCounters};
use tidegate_core::metrics::histograms::{MergedHistograms, Series};
use tidegate_core::model::BackendAddr;
use tidegate_core::suspicion::rejections::Rejection;
use tidegate_core::table::state::{BackendState, FrontendCounters};
use tidegate_net::confinement::SandboxReport;

#[derive(Serialize)]
struct StatusDoc<'a> {
    version: &'a str,
    generation: u64,
    table_serial: u64,
    engine: &'a str,
    engine_reason: &'a str,
    workers: usize,
    /// Those whose loop does not turn.
    stalled: Vec<StalledWorkerDoc>,
    worker_panics_total: u64,
    worker_restarts_total: u64,
    uptime_seconds: f64,
    state: &'static str,
    connections_active: u32,
    connections_max: u32,
    /// Settings that wait for a restart.
    warnings: Vec<&'a String>,
    /// Layer by layer.
    confinement: &'a SandboxReport,
    /// `null` where no pool takes heartbeats.
    heartbeat: Option<HeartbeatChannelDoc<'a>>,
    frontends: Vec<FrontendDoc<'a>>,
    pools: Vec<PoolDoc<'a>>,
    /// Backends no longer configured that still hold sessions.
    leaving: Vec<RemovedBackendDoc<'a>>,
}

#[derive(Serialize)]
struct StalledWorkerDoc {
    worker: usize,
    seconds: f64,
    /// What it was last about.
    stage: &'static str,
}

#[derive(Serialize)]
struct HeartbeatChannelDoc<'a> {
    listen: &'a [SocketAddr],
    accepted_total: u64,
    /// By whatever reason.
    rejected_total: u64,
    kernel_drops_total: u64,
    /// Senders whose heartbeats were rejected, the last first.
    rejections: Vec<RejectedDoc<'a>>,
    /// Times nobody's silence counted, because we were late or deaf.
    excuses_total: u64,
    /// Nobody at all is heard.
    silent: bool,
    /// Why no silent backend of any pool is taken out.
    frozen: Option<FreezeDoc<'a>>,
}

#[derive(Serialize)]
pub(super) struct FreezeDoc<'a> {
    reason: &'a str,
    seconds: f64,
}

#[derive(Serialize)]
struct FrontendDoc<'a> {
    name: &'a str,
    binds: &'a [SocketAddr],
    pool: &'a str,
    connections_max: u32,
    sessions_active: u32,
    sessions_total: u64,
    bytes_in_total: u64,
    bytes_out_total: u64,
    refused_total: u64,
}

#[derive(Serialize)]
struct PoolDoc<'a> {
    name: &'a str,
    balance: &'static str,
    /// While no backend is eligible: `refuse` or `try-all`; before the first verdict
    /// `wait`, or `former` where former backends serve.
    none_eligible: Option<&'static str>,
    /// Why no silent backend is taken out.
    frozen: Option<FreezeDoc<'a>>,
    registered: usize,
    /// 0 where nobody may register.
    registered_max: u32,
    probes: bool,
    heartbeats: bool,
    /// Clients that wait in line for a backend below its cap.
    queued: usize,
    backends: Vec<BackendDoc<'a>>,
}

#[derive(Serialize)]
struct BackendDoc<'a> {
    name: &'a str,
    address: String,
    /// Its heartbeats brought it; it is not in the file.
    registered: bool,
    weight: u32,
    effective_weight: JsonNumber,
    backup: bool,
    connections_max: u32,
    intent: &'static str,
    observation: &'static str,
    ejected: bool,
    on_trial: bool,
    ejections_total: u64,
    /// Ejections that the pool's guard held back.
    ejections_held_total: u64,
    eligible: bool,
    /// Of its full share; below 100 during a slow start.
    ramp_percent: u32,
    /// `null` where none were heard and none are needed.
    heartbeat: Option<BackendHeartbeatDoc<'a>>,
    sessions_active: u32,
    sessions_total: u64,
    connect_failures_total: u64,
    bytes_in_total: u64,
    bytes_out_total: u64,
    connect_seconds: QuantilesDoc,
    first_byte_seconds: QuantilesDoc,
    last_transition: Option<TransitionDoc<'a>>,
}

/// What its heartbeats amount to; the figures are `null` until the first.
#[derive(Serialize)]
struct BackendHeartbeatDoc<'a> {
    pulse: &'static str,
    sender_state: Option<&'static str>,
    silent_seconds: Option<f64>,
    timeout_seconds: Option<f64>,
    loss: Option<f64>,
    load: Option<u16>,
    held: Option<String>,
    /// The last one in its name that was rejected.
    rejected: Option<RejectedDoc<'a>>,
}

/// Whole numbers as such: most weights are.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum JsonNumber {
    Whole(u32),
    Part(f64),
}

/// Both `null` until something was measured.
#[derive(Serialize)]
struct QuantilesDoc {
    p50: Option<f64>,
    p99: Option<f64>,
}

#[derive(Serialize)]
pub(super) struct TransitionDoc<'a> {
    from: &'static str,
    to: &'static str,
    reason: &'a str,
    seconds_ago: f64,
    /// How long the state before had lasted.
    lasted_seconds: f64,
}

#[derive(Serialize)]
struct RemovedBackendDoc<'a> {
    pool: &'a str,
    name: &'a str,
    address: String,
    sessions_active: u32,
}

/// The text of `/v1/status`.
pub fn render(snapshot: &AdminSnapshot<'_>) -> String {
    let control = snapshot.control;
    let unfit = control.heartbeat.iter().flat_map(|status| &status.rejections);
    let rejections = ByBackend::new(snapshot.heartbeats.rejections.iter().chain(unfit));
    let document = StatusDoc {
        version: snapshot.version,
        generation: control.generation,
        table_serial: snapshot.table_serial,
        engine: snapshot.engine,
        engine_reason: snapshot.engine_reason,
        workers: snapshot.workers.len(),
        stalled: stalled(snapshot.workers),
        worker_panics_total: snapshot
            .workers
            .iter()
            .flat_map(|worker| {
                PanicScope::ALL.map(|ended| worker.panics.cell(ended as usize, 0).get())
            })
            .sum(),
        worker_restarts_total: snapshot.workers.iter().map(|worker| worker.restarts.get()).sum(),
        uptime_seconds: millis(snapshot.uptime),
        state: snapshot.state.name(),
        connections_active: snapshot.connections_active,
        connections_max: snapshot.connections_max,
        warnings: snapshot.warnings.iter().chain(snapshot.troubles).collect(),
        confinement: snapshot.confinement,
        heartbeat: control.heartbeat.as_ref().map(|status| heartbeats(status, snapshot)),
        frontends: control.frontends.iter().map(frontend).collect(),
        pools: control.pools.iter().map(|p| pool(p, &rejections, snapshot)).collect(),
        leaving: control.leaving.iter().map(|backend| leaving(backend)).collect(),
    };
    serde_json::to_string(&document).expect("plain data with string keys always serialises")
}

fn stalled(workers: &[Arc<WorkerCounters>]) -> Vec<StalledWorkerDoc> {
    let stalled = |(worker, counters): (usize, &Arc<WorkerCounters>)| {
        let seconds = millis(counters.pulse.stalled_for()?);
        Some(StalledWorkerDoc { worker, seconds, stage: counters.pulse.stage().name() })
    };
    workers.iter().enumerate().filter_map(stalled).collect()
}

fn heartbeats<'a>(
    status: &'a HeartbeatChannelStatus,
    snapshot: &AdminSnapshot<'a>,
) -> HeartbeatChannelDoc<'a> {
    let misfits: u64 = status.misfits.iter().map(|(_, count)| count).sum();
    let received = snapshot.heartbeats;
    let mut rejections: Vec<&Rejection> =
        received.rejections.iter().chain(&status.rejections).collect();
    rejections.sort_by_key(|rejection| std::cmp::Reverse(rejection.at));
    let shown = rejections.into_iter().take(SHOWN_MAX);
    HeartbeatChannelDoc {
        rejections: shown.map(|rejection| rejections::rejected(rejection, snapshot.now)).collect(),
        listen: &received.listen,
        accepted_total: received.accepted,
        rejected_total: received.rejected.iter().map(|(_, count)| count).sum::<u64>() + misfits,
        kernel_drops_total: received.kernel_drops,
        excuses_total: status.excuses_total,
        silent: status.silent,
        frozen: status.frozen.as_ref().map(frozen),
    }
}

pub(super) fn frozen(freezing: &FreezeStatus) -> FreezeDoc<'_> {
    FreezeDoc { reason: &freezing.reason, seconds: millis(freezing.lasted) }
}

fn frontend(status: &FrontendStatus) -> FrontendDoc<'_> {
    let sum = |read: fn(&FrontendCounters) -> u64| status.state.counters.sum(read);
    FrontendDoc {
        name: &status.state.name,
        binds: &status.binds,
        pool: &status.pool,
        connections_max: status.connections_max,
        sessions_active: status.state.in_flight.get(),
        sessions_total: sum(|c| c.sessions.get()),
        bytes_in_total: sum(|c| c.bytes_in.get()),
        bytes_out_total: sum(|c| c.bytes_out.get()),
        refused_total: sum(|c| {
            (0..tidegate_core::outcome::RefusedReason::COUNT)
                .map(|reason| c.refused.cell(reason, 0).get())
                .sum()
        }),
    }
}

fn pool<'a>(
    status: &'a PoolStatus,
    rejections: &ByBackend<'a>,
    snapshot: &AdminSnapshot<'_>,
) -> PoolDoc<'a> {
    let of = |one: &'a BackendStatus| {
        let rejected = rejections.of(&status.name, &one.state.name);
        backend(one, rejected, (snapshot.latency, snapshot.now))
    };
    PoolDoc {
        name: &status.name,
        balance: status.balance,
        none_eligible: status.none_eligible,
        frozen: status.frozen.as_ref().map(frozen),
        registered: status.registered,
        registered_max: status.registered_max,
        probes: status.probes,
        heartbeats: status.heartbeats,
        queued: snapshot.queued.get(&status.name).copied().unwrap_or_default(),
        backends: status.backends.iter().map(of).collect(),
    }
}

fn backend<'a>(
    status: &'a BackendStatus,
    rejected: Option<&'a Rejection>,
    (latency, now): (&MergedHistograms, Instant),
) -> BackendDoc<'a> {
    let state = &status.state;
    BackendDoc {
        name: &state.name,
        address: address(&state.address),
        registered: status.origin == MemberSourceKind::Registered,
        weight: status.weight,
        effective_weight: number(status.effective_weight),
        backup: status.backup,
        connections_max: status.connections_max,
        intent: status.intent.name(),
        observation: status.observation.name(),
        ejected: status.ejected,
        on_trial: status.on_trial,
        ejections_total: status.ejections_total,
        ejections_held_total: status.ejections_held_total,
        eligible: status.eligible,
        ramp_percent: status.ramp_percent,
        heartbeat: backend_heartbeat(status, rejected.map(|last| rejections::rejected(last, now))),
        sessions_active: state.in_flight.get(),
        sessions_total: state.counters.sum(|c| c.sessions.get()),
        connect_failures_total: state.counters.sum(|c| c.connect_failures.get()),
        bytes_in_total: state.counters.sum(|c| c.bytes_in.get()),
        bytes_out_total: state.counters.sum(|c| c.bytes_out.get()),
        connect_seconds: quantiles(state, Series::Connect, latency),
        first_byte_seconds: quantiles(state, Series::FirstByte, latency),
        last_transition: status.last_transition.as_ref().map(|t| last_transition(t, now)),
    }
}

fn backend_heartbeat<'a>(
    status: &BackendStatus,
    rejected: Option<RejectedDoc<'a>>,
) -> Option<BackendHeartbeatDoc<'a>> {
    if status.heart.is_none() && status.pulse == HeartbeatHealth::Absent && rejected.is_none() {
        return None;
    }
    let heart = status.heart.as_ref();
    let seconds = |time: Duration| time.as_secs_f64();
    Some(BackendHeartbeatDoc {
        pulse: status.pulse.name(),
        sender_state: heart.map(|_| status.calling.name()),
        silent_seconds: heart.and_then(|heart| heart.reading.silence).map(millis),
        timeout_seconds: heart.map(|heart| seconds(heart.reading.timeout)).map(thousandths),
        loss: heart.map(|heart| thousandths(heart.reading.loss)),
        load: heart.map(|heart| heart.load),
        held: heart.and_then(|heart| heart.reading.held.clone()),
        rejected,
    })
}

pub(super) fn number(value: f64) -> JsonNumber {
    if value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&value) {
        JsonNumber::Whole(value as u32)
    } else {
        JsonNumber::Part(value)
    }
}

/// Nobody reads such a figure to the last digit.
pub(super) fn thousandths(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn quantiles(state: &BackendState, series: Series, latency: &MergedHistograms) -> QuantilesDoc {
    let data = latency.get(state.id.0, series);
    let at = |q| data.map(|data| data.quantile(q).as_secs_f64());
    QuantilesDoc { p50: at(0.5), p99: at(0.99) }
}

pub(super) fn last_transition(transition: &Transition, now: Instant) -> TransitionDoc<'_> {
    TransitionDoc {
        from: transition.from,
        to: transition.to,
        reason: &transition.reason,
        seconds_ago: millis(now.saturating_duration_since(transition.at)),
        lasted_seconds: millis(transition.lasted),
    }
}

fn leaving(state: &BackendState) -> RemovedBackendDoc<'_> {
    RemovedBackendDoc {
        pool: &state.pool,
        name: &state.name,
        address: address(&state.address),
        sessions_active: state.in_flight.get(),
    }
}

fn address(address: &BackendAddr) -> String {
    address.to_string()
}

/// Nobody reads an uptime to the nanosecond.
pub(super) fn millis(time: Duration) -> f64 {
    time.as_millis() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::process::ProcessFacts;
    use crate::admin::snapshot::{HeartbeatCounts, ReloadCounts, ServiceState};
    use expect_test::{Expect, expect};
    use std::collections::HashMap;
    use std::sync::Arc;
    use tidegate_core::control::ControlStatus;
    use tidegate_core::control::source_ports::{PortLimits, PortWatch, Reuse};
    use tidegate_core::health::{Intent, Observation};
    use tidegate_core::metrics::counters::WorkerCounters;
    use tidegate_core::metrics::histograms::Recorder;
    use tidegate_core::outcome::{Cause, Phase, RefusedReason};
    use tidegate_core::table::state::{BackendId, FrontendId, FrontendState};
    use tidegate_net::budget::MemoryBudget;
    use tidegate_net::clock;

    fn backend(id: u32, name: &str, now: Instant) -> BackendStatus {
        let address = BackendAddr::Unix("/run/a.sock".into());
        let state = BackendState::new(BackendId(id), "web".into(), name.into(), address, 1);
        state.counters.of(0).bytes_in.add(5);
        BackendStatus {
            effective_weight: 0.0,
            backup: true,
            connections_max: 9,
            intent: Intent::Draining,
            observation: Observation::Up,
            ejections_total: 1,
            ejections_held_total: 2,
            eligible: false,
            last_transition: Some(Transition {
                pool: "web".into(),
                backend: name.into(),
                from: "up",
                to: "draining",
                reason: "operator".to_owned(),
                at: now - Duration::from_millis(2_500),
                lasted: Duration::from_secs(60),
            }),
            ..BackendStatus::plain(state)
        }
    }

    fn check(control: &ControlStatus, now: Instant, expected: &Expect) {
        let (mut recorder, mut latency) = (Recorder::new(), MergedHistograms::new());
        recorder.record(1, Series::Connect, Duration::from_micros(200));
        latency.absorb(recorder.take().unwrap());
        let text = render(&AdminSnapshot {
            control,
            workers: &[Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))],
            latency: &latency,
            version: "0.1.0",
            engine: "epoll",
            engine_reason: "configured",
            now,
            uptime: Duration::from_millis(1_500),
            state: ServiceState::Draining,
            reloads: ReloadCounts::default(),
            transitions_unlogged: 0,
            upgrades: crate::admin::UpgradeCounts::default(),
            table_serial: 12,
            connections_active: 5,
            connections_max: 100,
            buffers: &MemoryBudget::default(),
            buffers_refused: 0,
            queued: &HashMap::from([("web".into(), 3)]),
            warnings: &["workers waits".to_owned()],
            admin_crowded: 0,
            confinement: &SandboxReport::none("off"),
            troubles: &[],
            control_counts: &WorkerCounters::new(1, 1),
            log_dropped: 0,
            ports: &PortWatch::default(),
            port_limits: PortLimits { ports: 28_232, reuse: Reuse::Loopback },
            process: ProcessFacts::default(),
            heartbeats: &HeartbeatCounts::default(),
            backend_metrics_max: 100,
        });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(value.is_object());
        // Broken at objects, so that a change shows as a line.
        expected.assert_eq(&text.replace("{\"", "\n{\"").replace(",\"pools", "\n,\"pools"));
    }

    #[test]
    fn the_document_has_exactly_the_documented_fields() {
        let now = clock::now();
        let frontend = FrontendState::new(FrontendId(0), "web".into(), 1, RefusedReason::COUNT);
        frontend.counters.of(0).refused.cell(RefusedReason::QueueTimeout as usize, 0).add(2);
        frontend.counters.of(0).refused.cell(RefusedReason::NoBackend as usize, 0).add(3);
        let control = ControlStatus {
            generation: 5,
            frontends: vec![FrontendStatus {
                state: Arc::new(frontend),
                binds: vec!["[::1]:80".parse().unwrap()],
                pool: "web".into(),
                connections_max: 0,
            }],
            pools: vec![PoolStatus::plain("web", vec![backend(1, "a", now)])],
            published: Vec::new(),
            heartbeat: None,
            leaving: vec![backend(2, "b", now).state],
        };
        check(
            &control,
            now,
            &expect![[r#"

                {"version":"0.1.0","generation":5,"table_serial":12,"engine":"epoll","engine_reason":"configured","workers":1,"stalled":[],"worker_panics_total":0,"worker_restarts_total":0,"uptime_seconds":1.5,"state":"draining","connections_active":5,"connections_max":100,"warnings":["workers waits"],"confinement":[
                {"layer":"user","in_force":false,"detail":"off"},
                {"layer":"capabilities","in_force":false,"detail":"off"},
                {"layer":"no_new_privs","in_force":false,"detail":"off"},
                {"layer":"landlock","in_force":false,"detail":"off"},
                {"layer":"seccomp","in_force":false,"detail":"off"}],"heartbeat":null,"frontends":[
                {"name":"web","binds":["[::1]:80"],"pool":"web","connections_max":0,"sessions_active":0,"sessions_total":0,"bytes_in_total":0,"bytes_out_total":0,"refused_total":5}]
                ,"pools":[
                {"name":"web","balance":"random","none_eligible":null,"frozen":null,"registered":0,"registered_max":0,"probes":false,"heartbeats":false,"queued":3,"backends":[
                {"name":"a","address":"unix:/run/a.sock","registered":false,"weight":2,"effective_weight":0,"backup":true,"connections_max":9,"intent":"draining","observation":"up","ejected":false,"on_trial":false,"ejections_total":1,"ejections_held_total":2,"eligible":false,"ramp_percent":100,"heartbeat":null,"sessions_active":0,"sessions_total":0,"connect_failures_total":0,"bytes_in_total":5,"bytes_out_total":0,"connect_seconds":
                {"p50":0.0002,"p99":0.0002},"first_byte_seconds":
                {"p50":null,"p99":null},"last_transition":
                {"from":"up","to":"draining","reason":"operator","seconds_ago":2.5,"lasted_seconds":60.0}}]}],"leaving":[
                {"pool":"web","name":"b","address":"unix:/run/a.sock","sessions_active":0}]}"#]],
        );
    }

    #[test]
    fn what_never_happened_is_null() {
        let now = clock::now();
        let fresh = BackendStatus { last_transition: None, ..backend(7, "a", now) };
        let value =
            serde_json::to_value(super::backend(&fresh, None, (&MergedHistograms::new(), now)))
                .unwrap();
        assert!(value["last_transition"].is_null());
        assert!(value["connect_seconds"]["p50"].is_null());
        assert!(value["connect_seconds"].as_object().unwrap().contains_key("p99"));
    }
}
