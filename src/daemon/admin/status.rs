//! Renders `/v1/status`: the state of the whole process as one document.
//!
//! Called by `rendering` with an [`AdminSnapshot`]. Pure: it reads no clock and does no
//! I/O.

use super::findings;
use super::rejections::{self, ByBackend, SHOWN_MAX};
use super::snapshot::AdminSnapshot;
use super::sources;
use super::status_query::{StatusPage, StatusSelection};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_api::status::{
    BackendDoc, BackendHeartbeatDoc, FreezeDoc, FrontendDoc, HeartbeatChannelDoc, PoolDoc,
    QuantilesDoc, RejectedDoc, RemovedBackendDoc, RoleDoc, SandboxLayerDoc, StalledWorkerDoc,
    StatusDoc, TierShareDoc, TransitionDoc,
};
use tidegate_core::control::{
    BackendStatus, FreezeStatus, FrontendStatus, HeartbeatChannelStatus, OperatorError, PoolStatus,
};
use tidegate_core::discovery::view::MemberWish;
use tidegate_core::health::{HeartbeatHealth, Transition};
use tidegate_core::metrics::counters::{PanicScope, WorkerCounters};
use tidegate_core::metrics::histograms::{MergedHistograms, Series};
use tidegate_core::model::{BindKey, Words};
use tidegate_core::outcome::RefusedReason;
use tidegate_core::suspicion::rejections::Rejection;
use tidegate_core::table::state::{BackendState, FrontendCounters};
use tidegate_net::confinement::SandboxLayer;

/// Returns the text of `/v1/status`.
pub fn render(snapshot: &AdminSnapshot, latency: &MergedHistograms) -> String {
    let document = document(snapshot, latency, &StatusSelection::default());
    serde_json::to_string(&document).expect("plain data always serialises")
}

/// Returns the text of `/v1/status` with the selected backends only.
///
/// # Errors
/// The selection names an unknown pool or backend.
pub(super) fn render_selected(
    snapshot: &AdminSnapshot,
    latency: &MergedHistograms,
    selection: &StatusSelection,
) -> Result<String, OperatorError> {
    selection.check(&snapshot.control.pools)?;
    let document = document(snapshot, latency, selection);
    Ok(serde_json::to_string(&document).expect("plain data always serialises"))
}

/// Returns the document of the selected backends.
pub(super) fn document(
    snapshot: &AdminSnapshot,
    latency: &MergedHistograms,
    selection: &StatusSelection,
) -> StatusDoc {
    let control = &snapshot.control;
    let by_controller = control.heartbeat.iter().flat_map(|status| &status.rejections);
    let rejections = ByBackend::new(snapshot.heartbeats.rejections.iter().chain(by_controller));
    let pools = control.pools.iter().filter(|one| selection.has_pool(&one.name));
    StatusDoc {
        trouble: findings::found(snapshot, &snapshot.traffic.lock()),
        frontends: control.frontends.iter().map(frontend).collect(),
        pools: pools
            .map(|one| pool(one, &selection.page(one), &rejections, snapshot, latency))
            .collect(),
        ..head(snapshot)
    }
}

/// Returns the document without findings, frontends and pools.
pub(super) fn head(snapshot: &AdminSnapshot) -> StatusDoc {
    let (control, workers) = (&snapshot.control, &snapshot.workers);
    let panics = workers.iter().flat_map(|worker| {
        PanicScope::ALL.map(|ended| worker.panics.cell(ended as usize, 0).get())
    });
    StatusDoc {
        version: snapshot.version.to_owned(),
        generation: control.generation,
        table_serial: snapshot.table_serial,
        engine: snapshot.engine.into(),
        engine_reason: snapshot.engine_reason.clone(),
        workers: workers.len() as u64,
        stalled: stalled(snapshot),
        worker_panics_total: panics.sum(),
        worker_restarts_total: workers.iter().map(|worker| worker.restarts.get()).sum(),
        uptime_seconds: millis(snapshot.uptime),
        state: snapshot.state.clone(),
        connections_active: snapshot.connections_active,
        connections_max: snapshot.connections_max,
        warnings: snapshot.warnings.iter().chain(&snapshot.other_warnings).cloned().collect(),
        trouble: Vec::new(),
        confinement: confinement(snapshot),
        heartbeat: control.heartbeat.as_ref().map(|status| heartbeats(status, snapshot)),
        frontends: Vec::new(),
        pools: Vec::new(),
        leaving: control.leaving.iter().map(|backend| leaving(backend)).collect(),
    }
}

fn stalled(snapshot: &AdminSnapshot) -> Vec<StalledWorkerDoc> {
    let stalled = |(worker, counters): (u64, &Arc<WorkerCounters>)| {
        let seconds = millis(counters.pulse.stalled_for()?);
        let stage = counters.pulse.stage().name().to_owned();
        Some(StalledWorkerDoc { worker, seconds, stage })
    };
    (0..).zip(&snapshot.workers).filter_map(stalled).collect()
}

fn confinement(snapshot: &AdminSnapshot) -> Vec<SandboxLayerDoc> {
    let layer = |layer: &SandboxLayer| SandboxLayerDoc {
        layer: layer.layer.to_owned(),
        in_force: layer.in_force,
        detail: layer.detail.clone(),
    };
    snapshot.confinement.layers().iter().map(layer).collect()
}

fn heartbeats(status: &HeartbeatChannelStatus, snapshot: &AdminSnapshot) -> HeartbeatChannelDoc {
    let ignored: u64 = status.ignored.iter().map(|(_, count)| count).sum();
    let received = &snapshot.heartbeats;
    let mut rejections: Vec<&Rejection> =
        received.rejections.iter().chain(&status.rejections).collect();
    rejections.sort_by_key(|rejection| std::cmp::Reverse(rejection.at));
    let shown = rejections.into_iter().take(SHOWN_MAX);
    HeartbeatChannelDoc {
        listen: received.listen.clone(),
        accepted_total: received.accepted,
        rejected_total: received.rejected.iter().map(|(_, count)| count).sum::<u64>() + ignored,
        kernel_drops_total: received.kernel_drops,
        rejections: shown.map(|rejection| rejections::rejected(rejection, snapshot.now)).collect(),
        excuses_total: status.excuses_total,
        silent: status.silent,
        frozen: status.frozen.as_ref().map(frozen),
    }
}

pub(super) fn frozen(freezing: &FreezeStatus) -> FreezeDoc {
    FreezeDoc { reason: freezing.reason.clone(), seconds: millis(freezing.lasted) }
}

pub(super) fn frontend(status: &FrontendStatus) -> FrontendDoc {
    let sum = |read: fn(&FrontendCounters) -> u64| status.state.counters.sum(read);
    FrontendDoc {
        name: status.state.name.to_string(),
        binds: status.binds.iter().map(BindKey::to_string).collect(),
        pool: status.pool.to_string(),
        connections_max: status.connections_max,
        sessions_active: status.state.in_flight.get(),
        sessions_total: sum(|c| c.sessions.get()),
        bytes_in_total: sum(|c| c.bytes_in.get()),
        bytes_out_total: sum(|c| c.bytes_out.get()),
        refused_total: sum(|c| {
            (0..RefusedReason::COUNT).map(|reason| c.refused.cell(reason, 0).get()).sum()
        }),
    }
}

fn pool(
    status: &PoolStatus,
    page: &StatusPage<'_>,
    rejections: &ByBackend<'_>,
    snapshot: &AdminSnapshot,
    latency: &MergedHistograms,
) -> PoolDoc {
    let of = |one: &&BackendStatus| {
        let rejected = rejections.of(&status.name, &one.state.name);
        backend(one, rejected, latency, snapshot.now)
    };
    PoolDoc {
        page: page.document.clone(),
        backends: page.backends.iter().map(of).collect(),
        ..pool_head(status, snapshot)
    }
}

/// Returns a pool without its backends.
pub(super) fn pool_head(status: &PoolStatus, snapshot: &AdminSnapshot) -> PoolDoc {
    PoolDoc {
        name: status.name.to_string(),
        of: status.of.as_ref().map(ToString::to_string),
        role: status.role.map(|role| role.word().into()),
        balance: status.balance.into(),
        none_eligible: status.none_eligible.map(Into::into),
        frozen: status.frozen.as_ref().map(frozen),
        registered: status.registered as u64,
        registered_max: status.registered_max,
        probes: status.probes,
        heartbeats: status.heartbeats,
        sources: status.sources.iter().map(sources::source).collect(),
        tier_shares: tier_shares(&status.tier_shares),
        queued: snapshot.queued.get(&status.name).copied().unwrap_or_default() as u64,
        page: None,
        backends: Vec::new(),
    }
}

pub(super) fn backend(
    status: &BackendStatus,
    rejected: Option<&Rejection>,
    latency: &MergedHistograms,
    now: Instant,
) -> BackendDoc {
    let state = &status.state;
    BackendDoc {
        name: state.name.to_string(),
        address: state.address.to_string(),
        registered: status.origins.is_registered(),
        weight: status.weight,
        effective_weight: status.effective_weight,
        backup: status.tier > 0,
        tier: status.tier,
        connections_max: status.connections_max,
        intent: status.intent.name().into(),
        wish: wish(status).map(|(wish, _)| wish),
        wished_by: wish(status).and_then(|(_, by)| by),
        unverified: status.unverified,
        role: role(status, now),
        observation: status.observation.name().into(),
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

/// Returns tiers with their shares.
pub(super) fn tier_shares(shares: &[(u8, u8)]) -> Vec<TierShareDoc> {
    shares.iter().map(|&(tier, percent)| TierShareDoc { tier, percent }).collect()
}

/// Returns the wish of a member source, else that of an agent for no sessions, and whose wish
/// it is.
fn wish(status: &BackendStatus) -> Option<(String, Option<String>)> {
    let by = status.wished_by.as_ref().map(ToString::to_string);
    match status.wish {
        MemberWish::Sessions if status.agent.serves() => None,
        MemberWish::Sessions => Some(("draining".to_owned(), Some("agent".to_owned()))),
        wish => Some((wish.name().to_owned(), by)),
    }
}

pub(super) fn role(status: &BackendStatus, now: Instant) -> Option<RoleDoc> {
    status.role.map(|seen| RoleDoc {
        name: seen.role.word().into(),
        seconds: millis(now.saturating_duration_since(seen.since)),
        outranked: status.outranked,
    })
}

fn backend_heartbeat(
    status: &BackendStatus,
    rejected: Option<RejectedDoc>,
) -> Option<BackendHeartbeatDoc> {
    if status.heartbeats.is_none()
        && status.heartbeat_health == HeartbeatHealth::Absent
        && rejected.is_none()
    {
        return None;
    }
    let sender = status.heartbeats.as_ref();
    Some(BackendHeartbeatDoc {
        pulse: status.heartbeat_health.name().into(),
        sender_state: sender.map(|_| status.requested.name().into()),
        silent_seconds: sender.and_then(|sender| sender.reading.silence).map(millis),
        timeout_seconds: sender.map(|sender| thousandths(sender.reading.timeout.as_secs_f64())),
        loss: sender.map(|sender| thousandths(sender.reading.loss)),
        load: sender.map(|sender| sender.load),
        held: sender.and_then(|sender| sender.reading.held.clone()),
        rejected,
    })
}

/// Rounds to three decimals.
pub(super) fn thousandths(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

fn quantiles(state: &BackendState, series: Series, latency: &MergedHistograms) -> QuantilesDoc {
    let data = latency.get(state.id.0, series);
    let at = |q| data.map(|data| data.quantile(q).as_secs_f64());
    QuantilesDoc { p50: at(0.5), p99: at(0.99) }
}

pub(super) fn last_transition(transition: &Transition, now: Instant) -> TransitionDoc {
    TransitionDoc {
        from: transition.from.into(),
        to: transition.to.into(),
        reason: transition.reason.clone(),
        seconds_ago: millis(now.saturating_duration_since(transition.at)),
        lasted_seconds: millis(transition.lasted),
    }
}

fn leaving(state: &BackendState) -> RemovedBackendDoc {
    RemovedBackendDoc {
        pool: state.pool.to_string(),
        name: state.name.to_string(),
        address: state.address.to_string(),
        sessions_active: state.in_flight.get(),
    }
}

/// Returns seconds, rounded down to the millisecond.
pub(super) fn millis(time: Duration) -> f64 {
    time.as_millis() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};
    use tidegate_api::names::ServiceState;
    use tidegate_core::control::ControlStatus;
    use tidegate_core::health::{Intent, Observation};
    use tidegate_core::metrics::histograms::Recorder;
    use tidegate_core::model::BackendAddr;
    use tidegate_core::outcome::{Cause, Phase};
    use tidegate_core::table::state::{BackendId, FrontendId, FrontendState};
    use tidegate_net::clock;

    fn backend(id: u32, name: &str, now: Instant) -> BackendStatus {
        let address = BackendAddr::Unix("/run/a.sock".into());
        let state = BackendState::new(BackendId(id), "web".into(), name.into(), address, 1);
        state.counters.of(0).bytes_in.add(5);
        BackendStatus {
            effective_weight: 0.0,
            tier: 1,
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
            ..BackendStatus::plain(state, now)
        }
    }

    fn check(control: ControlStatus, now: Instant, expected: &Expect) {
        let (mut recorder, mut latency) = (Recorder::new(), MergedHistograms::new());
        recorder.record(1, Series::Connect, Duration::from_micros(200));
        latency.absorb(recorder.take().unwrap());
        let snapshot = AdminSnapshot {
            workers: vec![Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT))],
            state: ServiceState::Draining,
            ..AdminSnapshot::plain(control, now)
        };
        let text = render(&snapshot, &latency);
        let read: StatusDoc = serde_json::from_str(&text).expect("clients parse the document");
        assert_eq!(read, document(&snapshot, &latency, &StatusSelection::default()));
        // A line break before each object makes a difference readable.
        expected.assert_eq(&text.replace("{\"", "\n{\"").replace(",\"pools", "\n,\"pools"));
    }

    #[test]
    fn status_has_exactly_the_documented_fields() {
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
            control,
            now,
            &expect![[r#"

                {"version":"0.1.0","generation":5,"table_serial":12,"engine":"epoll","engine_reason":"configured","workers":1,"stalled":[],"worker_panics_total":0,"worker_restarts_total":0,"uptime_seconds":1.5,"state":"draining","connections_active":5,"connections_max":100,"warnings":["workers waits"],"trouble":[
                {"kind":"none-eligible","severity":3,"state":"down","short":"web has no eligible backend","title":"Pool web has no eligible backend","why":"Its only backend gets no new sessions.","effect":"New clients are reset at once (when_none_eligible = \"refuse\").","since_seconds":null,"pool":"web","backend":null,"backends":1},
                {"kind":"queue","severity":1,"state":null,"short":"3 clients wait in the queue of web","title":"3 clients wait in the queue of web","why":"No backend is eligible.","effect":"","since_seconds":null,"pool":"web","backend":null,"backends":0},
                {"kind":"warning","severity":1,"state":null,"short":"a warning","title":"Warning","why":"Workers waits.","effect":"","since_seconds":null,"pool":null,"backend":null,"backends":0}],"confinement":[
                {"layer":"user","in_force":false,"detail":"off"},
                {"layer":"capabilities","in_force":false,"detail":"off"},
                {"layer":"no_new_privs","in_force":false,"detail":"off"},
                {"layer":"landlock","in_force":false,"detail":"off"},
                {"layer":"seccomp","in_force":false,"detail":"off"}],"heartbeat":null,"frontends":[
                {"name":"web","binds":["[::1]:80"],"pool":"web","connections_max":0,"sessions_active":0,"sessions_total":0,"bytes_in_total":0,"bytes_out_total":0,"refused_total":5}]
                ,"pools":[
                {"name":"web","of":null,"role":null,"balance":"random","none_eligible":null,"frozen":null,"registered":0,"registered_max":0,"probes":false,"heartbeats":false,"sources":[],"tier_shares":[],"queued":3,"backends":[
                {"name":"a","address":"unix:/run/a.sock","registered":false,"weight":2,"effective_weight":0,"backup":true,"tier":1,"connections_max":9,"intent":"draining","wish":null,"wished_by":null,"unverified":false,"role":null,"observation":"up","ejected":false,"on_trial":false,"ejections_total":1,"ejections_held_total":2,"eligible":false,"ramp_percent":100,"heartbeat":null,"sessions_active":0,"sessions_total":0,"connect_failures_total":0,"bytes_in_total":5,"bytes_out_total":0,"connect_seconds":
                {"p50":0.0002,"p99":0.0002},"first_byte_seconds":
                {"p50":null,"p99":null},"last_transition":
                {"from":"up","to":"draining","reason":"operator","seconds_ago":2.5,"lasted_seconds":60.0}}]}],"leaving":[
                {"pool":"web","name":"b","address":"unix:/run/a.sock","sessions_active":0}]}"#]],
        );
    }

    #[test]
    fn missing_measurements_are_null() {
        let now = clock::now();
        let fresh = BackendStatus { last_transition: None, ..backend(7, "a", now) };
        let document = super::backend(&fresh, None, &MergedHistograms::new(), now);
        let text = serde_json::to_string(&document).unwrap();
        assert!(text.contains("\"last_transition\":null"), "{text}");
        assert!(text.contains("\"connect_seconds\":{\"p50\":null,\"p99\":null}"), "{text}");
    }
}
