//! Tests of the status and explain documents of a pool with heartbeats, field by field.

use super::*;
use crate::admin::snapshot::HeartbeatCounts;
use expect_test::expect;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tidegate_api::explain::ExplainDoc;
use tidegate_api::names::{
    BackendStateName, DetectorName, EngineName, IntentName, ObservationName, PolicyName, PulseName,
    SenderStateName,
};
use tidegate_api::status::StatusDoc;
use tidegate_core::balance::trial::TrialPhase;
use tidegate_core::control::explain::{
    EjectionView, Explanation, FailuresView, GuardStatus, PreventedRemoval, ProbeView,
};
use tidegate_core::control::{
    BackendHeartbeatStatus, BackendStatus, ControlStatus, FreezeStatus, HeartbeatChannelStatus,
    HeartbeatIgnored, MemberSource, Origins, PoolStatus, Weight,
};
use tidegate_core::decision::rings::PickShare;
use tidegate_core::health::probe_detector::ProbeState;
use tidegate_core::health::recent::Recent;
use tidegate_core::health::{
    ConnectFailure, HeartbeatHealth, LastProbe, Observation, ProbeAnswer, ProbeOutcome,
    RequestedState, Transition,
};
use tidegate_core::metrics::histograms::MergedHistograms;
use tidegate_core::model::{
    BackendAddr, Backups, EjectionSpec, HeartbeatSpec, Policy, PoolId, ProbeKind, ProbeSpec,
    ProbeTarget, Tiers, Words,
};
use tidegate_core::suspicion::rejections::{Rejected, Rejection, Rejections};
use tidegate_core::suspicion::{DetectorReading, DetectorState, PathView};
use tidegate_core::table::state::{BackendId, BackendState};
use tidegate_core::table::tiers::TierRules;
use tidegate_dataplane::worker::EngineKind;
use tidegate_net::clock;

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Breaks the line before each object, so that a difference is readable.
fn broken_into_lines(text: &str) -> String {
    text.replace("{\"", "\n{\"").replace(",\"heartbeat", "\n,\"heartbeat") + "\n"
}

fn freeze(reason: &str) -> Option<FreezeStatus> {
    Some(FreezeStatus { reason: reason.to_owned(), lasted: millis(1_250) })
}

fn rejection(signed: bool, now: Instant) -> Rejection {
    let mut all = Rejections::default();
    let rejected = Rejected {
        claim: Some(("web", "a")),
        signed,
        from: Some("10.0.0.7:7946".parse().unwrap()),
        key_id: Some(3),
        reason: if signed { "stale" } else { "signature" },
        help: "set the clock",
        skew: signed.then_some(-301_250),
        warns: true,
    };
    all.add(&rejected, now - millis(2_000));
    all.add(&rejected, now - millis(500));
    all.all().next().unwrap().clone()
}

fn reading(now: Instant) -> DetectorReading {
    DetectorReading {
        state: DetectorState::Suspect,
        since: now - millis(750),
        incarnation: Some(17),
        sequence: Some(72_000),
        beats_total: 71_990,
        lost_total: 10,
        suspicions_total: 2,
        downs_total: 1,
        loss: 0.001_49,
        loss_after_loss: 0.25,
        jitter: Duration::from_micros(1_234),
        interval: millis(100),
        mean_interval: Duration::from_micros(100_456),
        missing_allowed: 3,
        timeout: millis(325),
        try_timeout: millis(100),
        silence: Some(millis(760)),
        phi_normal: 300.0,
        phi_exponential: 1.234_5,
        flaps: 1,
        hold_until: None,
        held: Some("the path is frozen".to_owned()),
    }
}

fn backend(now: Instant) -> BackendStatus {
    let address = BackendAddr::Tcp("10.0.0.11:8080".parse().unwrap());
    let state = BackendState::new(BackendId(1), "web".into(), "a".into(), address, 1);
    state.counters.of(0).connect_failures.add(9);
    BackendStatus {
        origins: Origins::of(MemberSource::Heartbeats),
        effective_weight: 0.2,
        observation: Observation::Suspect,
        on_trial: true,
        ejections_total: 4,
        heartbeat_health: HeartbeatHealth::Suspect,
        requested: RequestedState::Starting,
        heartbeats: Some(BackendHeartbeatStatus {
            reading: reading(now),
            key_id: 3,
            weight: 10,
            in_flight: 5,
            load: 500,
            load_mean: 480.25,
            load_share: 65,
            known_for: millis(7_300_000),
            expired: false,
            ttl: millis(10_000),
        }),
        last_transition: Some(transition(now)),
        ..BackendStatus::plain(state, clock::now())
    }
}

fn transition(now: Instant) -> Transition {
    Transition {
        pool: "web".into(),
        backend: "a".into(),
        from: "up",
        to: "suspect",
        reason: "no heartbeat for 325 ms".to_owned(),
        at: now - millis(750),
        lasted: millis(60_000),
    }
}

#[test]
fn status_of_a_pool_with_heartbeats_has_exactly_the_documented_fields() {
    let now = clock::now();
    let pool = PoolStatus {
        none_eligible: Some("try-all"),
        frozen: freeze("2 of 4 backends became suspect together"),
        registered: 1,
        registered_max: 100,
        heartbeats: true,
        probes: true,
        ..PoolStatus::plain("web", vec![backend(now)])
    };
    let control = ControlStatus {
        generation: 7,
        frontends: Vec::new(),
        pools: vec![pool],
        published: Vec::new(),
        heartbeat: Some(HeartbeatChannelStatus {
            taken_total: 71_990,
            ignored: vec![(HeartbeatIgnored::PoolFull, 2)],
            rejections: vec![rejection(false, now)],
            excuses_total: 3,
            silent: true,
            frozen: freeze("no heartbeat arrives"),
        }),
        leaving: Vec::new(),
    };
    let heartbeats = HeartbeatCounts {
        listen: vec!["10.0.0.1:7946".parse().unwrap(), "[::1]:7946".parse().unwrap()],
        accepted: 71_990,
        rejected: vec![("stale", 40)],
        kernel_drops: 1,
        rejections: vec![rejection(true, now)],
    };
    let snapshot = AdminSnapshot {
        heartbeats,
        queued: HashMap::new(),
        other_warnings: vec!["few ports are left".to_owned()],
        ..AdminSnapshot::plain(control, now)
    };
    let text = status::render(&snapshot, &MergedHistograms::new());
    let read: StatusDoc = serde_json::from_str(&text).expect("clients parse the document");
    assert_eq!(serde_json::to_string(&read).unwrap(), text, "no field is lost");
    expect![[r#"

        {"version":"0.1.0","generation":7,"table_serial":12,"engine":"epoll","engine_reason":"configured","workers":0,"stalled":[],"worker_panics_total":0,"worker_restarts_total":0,"uptime_seconds":1.5,"state":"serving","connections_active":5,"connections_max":100,"warnings":["workers waits","few ports are left"],"trouble":[
        {"kind":"frozen","severity":2,"state":null,"short":"web is frozen","title":"Pool web is frozen","why":"2 of 4 backends became suspect together.","effect":"Silent backends stay in rotation.","since_seconds":1.25,"pool":"web","backend":null,"backends":0},
        {"kind":"backends","severity":1,"state":"suspect","short":"web/a is suspect","title":"web/a is suspect","why":"No heartbeat for 325 ms.","effect":"It gets a tenth of its weight until it is up again.","since_seconds":0.75,"pool":"web","backend":"a","backends":1},
        {"kind":"warning","severity":1,"state":null,"short":"a warning","title":"Warning","why":"Workers waits.","effect":"","since_seconds":null,"pool":null,"backend":null,"backends":0},
        {"kind":"warning","severity":1,"state":null,"short":"a warning","title":"Warning","why":"Few ports are left.","effect":"","since_seconds":null,"pool":null,"backend":null,"backends":0}],"confinement":[
        {"layer":"user","in_force":false,"detail":"off"},
        {"layer":"capabilities","in_force":false,"detail":"off"},
        {"layer":"no_new_privs","in_force":false,"detail":"off"},
        {"layer":"landlock","in_force":false,"detail":"off"},
        {"layer":"seccomp","in_force":false,"detail":"off"}]
        ,"heartbeat":
        {"listen":["10.0.0.1:7946","[::1]:7946"],"accepted_total":71990,"rejected_total":42,"kernel_drops_total":1,"rejections":[
        {"pool":"web","backend":"a","from":"10.0.0.7:7946","key":3,"reason":"stale","skew_seconds":-301.25,"signed":true,"total":2,"in_a_row":2,"seconds_ago":0.5,"help":"set the clock"},
        {"pool":"web","backend":"a","from":"10.0.0.7:7946","key":3,"reason":"signature","skew_seconds":null,"signed":false,"total":2,"in_a_row":2,"seconds_ago":0.5,"help":"set the clock"}],"excuses_total":3,"silent":true,"frozen":
        {"reason":"no heartbeat arrives","seconds":1.25}},"frontends":[],"pools":[
        {"name":"web","of":null,"role":null,"balance":"random","none_eligible":"try-all","frozen":
        {"reason":"2 of 4 backends became suspect together","seconds":1.25},"registered":1,"registered_max":100,"probes":true
        ,"heartbeats":true,"sources":[],"tier_shares":[],"queued":0,"backends":[
        {"name":"a","address":"10.0.0.11:8080","registered":true,"weight":2,"effective_weight":0.2,"backup":false,"tier":0,"connections_max":0,"intent":"ready","wish":null,"wished_by":null,"unverified":false,"role":null,"observation":"suspect","ejected":false,"on_trial":true,"ejections_total":4,"ejections_held_total":0,"eligible":true,"ramp_percent":100
        ,"heartbeat":
        {"pulse":"suspect","sender_state":"starting","silent_seconds":0.76,"timeout_seconds":0.325,"loss":0.001,"load":500,"held":"the path is frozen","rejected":
        {"pool":"web","backend":"a","from":"10.0.0.7:7946","key":3,"reason":"stale","skew_seconds":-301.25,"signed":true,"total":2,"in_a_row":2,"seconds_ago":0.5,"help":"set the clock"}},"sessions_active":0,"sessions_total":0,"connect_failures_total":9,"bytes_in_total":0,"bytes_out_total":0,"connect_seconds":
        {"p50":null,"p99":null},"first_byte_seconds":
        {"p50":null,"p99":null},"last_transition":
        {"from":"up","to":"suspect","reason":"no heartbeat for 325 ms","seconds_ago":0.75,"lasted_seconds":60.0}}]}],"leaving":[]}
    "#]].assert_eq(&broken_into_lines(&text));
}

#[test]
fn explanation_has_exactly_the_documented_fields() {
    let now = clock::now();
    let backend = backend(now);
    let explained = Explanation {
        now,
        pool: PoolId(1),
        intent_for: millis(7_300_000),
        observed_for: millis(750),
        requested_for: millis(2_000),
        wish_for: Duration::ZERO,
        announced: Vec::new(),
        weight: Weight { base: 2, health: 10, ramp: 40, load: 65 },
        connections_max: 4,
        probe: Some(ProbeView {
            spec: Arc::new(ProbeSpec {
                kind: ProbeKind::Tcp,
                target: ProbeTarget::default(),
                interval: millis(2_000),
                fast_interval: millis(500),
                down_interval: millis(2_000),
                timeout: millis(400),
                rise: 2,
                fall: 3,
            }),
            observation: Observation::Up,
            lasted: millis(90_000),
            state: ProbeState::Up { probes: 1, connects: 2 },
            fails_open: true,
        }),
        last_probe: Some(LastProbe {
            ended: now.checked_sub(millis(500)).unwrap(),
            outcome: ProbeOutcome::Success {
                took: Duration::from_micros(1_250),
                answer: ProbeAnswer::Status(204),
            },
            confirmation: false,
        }),
        probes: Default::default(),
        rules: TierRules { tiers: Tiers::Strict, backups: Backups::All },
        tier_shares: vec![(0, 100)],
        closes_in: None,
        none_eligible: None,
        last_resort: false,
        heartbeat_spec: Some(Arc::new(HeartbeatSpec {
            register: true,
            require: false,
            interval: millis(100),
            ttl: millis(10_000),
            forget_after: millis(60_000),
            backends_max: 100,
            weight_max: 10,
        })),
        rejected: Some(rejection(false, now)),
        ejection: EjectionView {
            spec: Some(EjectionSpec {
                failures: 5,
                time: millis(1_000),
                max_ejected_percent: 50,
                early_resets: true,
                slow_first_byte: None,
            }),
            left: Some(millis(300)),
            repeats: 2,
            trial: Some(millis(1_500)),
            trial_phase: TrialPhase::Open,
        },
        ramp: Some((millis(30_000), millis(12_000))),
        failures: FailuresView {
            recent: Some(Recent {
                connects: 3,
                early_resets: 1,
                within: millis(12_000),
                last: ConnectFailure::Refused,
                last_ago: millis(1_250),
            }),
            watched: millis(60_000),
            in_a_row: 2,
            connects_total: 9,
        },
        guards: GuardStatus {
            channel_silent: true,
            pool_frozen: freeze("2 of 4 backends became suspect together"),
            all_frozen: None,
            view: PathView { suspects: 2, heard: 2, down: 1, members: 5, ..PathView::default() },
            max_ejected_percent: 50,
            prevented: Some(PreventedRemoval {
                evidence: "probes fail (2 confirmation probes failed)".to_owned(),
                reason: "the path is frozen".to_owned(),
            }),
        },
        history: vec![transition(now)],
        backend,
    };
    let picks = PickShare { backend: 3, pool: 4 };
    let text = explain::render(&explained, Some(&rejection(true, now)), picks);
    let read: ExplainDoc = serde_json::from_str(&text).expect("clients parse the document");
    assert_eq!(serde_json::to_string(&read).unwrap(), text, "no field is lost");
    expect![[r#"

        {"pool":"web","backend":"a","address":"10.0.0.11:8080","registered":true,"eligible":true,"why":"although probes fail (2 confirmation probes failed): the path is frozen; its sender reports starting; its heartbeats are rejected: stale, its clock is 5m 1s behind (set the clock)","observation":"suspect","observation_seconds":0.75,"intent":"ready","intent_seconds":7300.0,"backup":false,"tier":0,"connections_max":0,"connections_max_in_force":4,"sessions_active":0,"picks":
        {"backend":3,"pool":4},"weight":
        {"effective":0.2,"configured":2,"health_percent":10,"ramp_percent":40,"load_percent":65},"probe":
        {"kind":"tcp","interval_seconds":2.0,"timeout_seconds":0.4,"rise":2,"fall":3,"observation":"up","seconds":90.0,"failed_in_a_row":1,"connects_failed_in_a_row":2,"succeeded_in_a_row":0,"fails_open":true},"role":null,"agent":null,"last_probe":
        {"result":"success","detail":"status 204","took_seconds":0.00125,"ended_seconds_ago":0.5,"confirmation":false},"none_eligible":null
        ,"heartbeat":
        {"required":true,"pulse":"suspect","sender":
        {"state":"starting","state_seconds":2.0,"key":3,"incarnation":17,"sequence":72000,"weight_asked":10,"load":500,"load_smoothed":480.25,"in_flight":5,"known_seconds":7300.0,"detector":"suspect","detector_seconds":0.75,"received_total":71990,"lost_total":10,"lost_share":0.0,"loss":0.001,"loss_after_loss":0.25,"jitter_seconds":0.001234,"interval_seconds":0.1,"interval_learned_seconds":0.1,"missing_allowed":3,"timeout_seconds":0.325,"try_timeout_seconds":0.1,"silent_seconds":0.76,"ttl_seconds":10.0,"expired":false,"phi_normal":300.0,"phi_exponential":1.235,"suspicions_total":2,"downs_total":1,"flaps":1,"held":"the path is frozen"},"rejected":
        {"pool":"web","backend":"a","from":"10.0.0.7:7946","key":3,"reason":"stale","skew_seconds":-301.25,"signed":true,"total":2,"in_a_row":2,"seconds_ago":0.5,"help":"set the clock"}},"ejection":
        {"on":true,"ejected":false,"seconds_left":0.3,"in_a_row":2,"trial_seconds":1.5,"total":4,"held_total":0},"failures":
        {"within_seconds":12.0,"connects":3,"early_resets":1,"last":"connection refused","last_seconds_ago":1.25,"in_a_row":2,"eject_at":5,"connects_total":9},"slow_start":
        {"takes_seconds":30.0,"seconds":12.0,"percent":40},"guards":
        {"channel_silent":true,"pool_frozen":
        {"reason":"2 of 4 backends became suspect together","seconds":1.25},"all_frozen":null,"max_ejected_percent":50,"pool_down":1,"pool_suspect":2,"pool_heard":2,"pool_senders":5,"prevented":
        {"evidence":"probes fail (2 confirmation probes failed)","reason":"the path is frozen"}},"in_file":false,"announced":[],"history":[
        {"from":"up","to":"suspect","reason":"no heartbeat for 325 ms","seconds_ago":0.75,"lasted_seconds":60.0}]}
    "#]].assert_eq(&broken_into_lines(&text));
}

#[test]
fn clients_know_every_name_in_the_documents() {
    use {DetectorState as D, HeartbeatHealth as H, Observation as O, RequestedState as R};
    let known = |name: &dyn std::fmt::Debug| {
        assert!(!format!("{name:?}").starts_with("Other"), "{name:?}");
    };
    for policy in Policy::all() {
        known(&PolicyName::from(policy.word()));
    }
    for intent in [Intent::Ready, Intent::Draining, Intent::Maintenance] {
        known(&IntentName::from(intent.name()));
        known(&BackendStateName::from(intent.name()));
    }
    for observation in [O::Unknown, O::Up, O::Suspect, O::Down] {
        known(&ObservationName::from(observation.name()));
        known(&BackendStateName::from(observation.name()));
    }
    for request in [R::Ready, R::Starting, R::Draining, R::Stopping] {
        known(&SenderStateName::from(request.name()));
        known(&BackendStateName::from(request.name()));
    }
    let healths = [H::Absent, H::Waiting, H::OnTime, H::Suspect, H::Silent, H::Expired];
    for health in healths.into_iter().chain([H::SilentButAnswering]) {
        known(&PulseName::from(health.name()));
    }
    for state in [D::Waiting, D::Up, D::Suspect, D::Down, D::Recovering] {
        known(&DetectorName::from(state.name()));
    }
    for engine in [EngineKind::Epoll, EngineKind::IoUring] {
        known(&EngineName::from(engine.name()));
    }
}
