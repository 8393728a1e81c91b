//! When a backend is eligible: the truth tables of the module documentation.

use super::*;
use expect_test::expect;
use std::fmt::Write;

#[test]
fn eligibility_follows_the_truth_table() {
    let mut out = String::new();
    let observations =
        [Observation::Unknown, Observation::Up, Observation::Suspect, Observation::Down];
    for intent in [Intent::Ready, Intent::Draining, Intent::Maintenance] {
        for ejected in [false, true] {
            for when_unknown in [WhenUnknown::NotEligible, WhenUnknown::Eligible] {
                let row: Vec<String> = observations
                    .iter()
                    .map(|o| {
                        let percent = weight_percent(intent, ejected, *o, when_unknown);
                        format!("{}={percent}", o.name())
                    })
                    .collect();
                let ejected = if ejected { "ejected" } else { "in" };
                let row = row.join(" ");
                writeln!(out, "{} {ejected} unknown-{when_unknown:?}: {row}", intent.name())
                    .unwrap();
            }
        }
    }
    expect![[r#"
        ready in unknown-NotEligible: unknown=0 up=100 suspect=10 down=0
        ready in unknown-Eligible: unknown=100 up=100 suspect=10 down=0
        ready ejected unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
        ready ejected unknown-Eligible: unknown=0 up=0 suspect=0 down=0
        draining in unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
        draining in unknown-Eligible: unknown=0 up=0 suspect=0 down=0
        draining ejected unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
        draining ejected unknown-Eligible: unknown=0 up=0 suspect=0 down=0
        maintenance in unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
        maintenance in unknown-Eligible: unknown=0 up=0 suspect=0 down=0
        maintenance ejected unknown-NotEligible: unknown=0 up=0 suspect=0 down=0
        maintenance ejected unknown-Eligible: unknown=0 up=0 suspect=0 down=0
    "#]]
    .assert_eq(&out);
}

#[test]
fn unknown_backend_is_eligible_only_without_a_probe_or_while_it_fails_open() {
    let now = tidegate_net::clock::now();
    let mut health = BackendHealth::new(Intent::Ready, None, now);
    assert_eq!(health.weight_share(), 100);
    health.detector = Some(ProbeDetector::new(2, 3, now));
    assert_eq!(health.weight_share(), 0, "waits for its first result");
    health.slow.suspect(now);
    assert_eq!(health.observation(), Observation::Unknown, "not eligible");
    health.fails_open = true;
    assert_eq!(health.weight_share(), 10);
    health.slow.clear();
    assert_eq!(health.weight_share(), 100);
}

#[test]
fn heartbeats_and_probes_combine_by_the_truth_table() {
    let probes = [None, Some(Observation::Unknown), Some(Observation::Up)];
    let probes = probes.into_iter().chain([Some(Observation::Down)]);
    let mut out = String::new();
    for heartbeats in [
        HeartbeatHealth::Absent,
        HeartbeatHealth::Waiting,
        HeartbeatHealth::OnTime,
        HeartbeatHealth::Suspect,
        HeartbeatHealth::SilentButAnswering,
        HeartbeatHealth::Silent,
        HeartbeatHealth::Expired,
    ] {
        let cell = |probes: Option<Observation>| combine_observations(heartbeats, probes).name();
        let row: Vec<&str> = probes.clone().map(cell).collect();
        writeln!(out, "{}: {}", heartbeats.name(), row.join(" ")).unwrap();
    }
    expect![[r#"
        absent: unknown unknown up down
        awaited: unknown unknown unknown down
        beating: up unknown up down
        suspect: suspect unknown suspect down
        vouched: suspect unknown up down
        silent: down down down down
        expired: down down down down
    "#]]
    .assert_eq(&out);
}

#[test]
fn backend_that_requests_no_sessions_gets_none() {
    let now = tidegate_net::clock::now();
    let mut health = BackendHealth::new(Intent::Ready, None, now);
    health.heartbeat_health = HeartbeatHealth::OnTime;
    for requested in [RequestedState::Starting, RequestedState::Draining, RequestedState::Stopping]
    {
        health.requested = requested;
        assert!(!health.eligible(), "{}", requested.name());
    }
    health.requested = RequestedState::Ready;
    assert!(health.eligible());
    health.heartbeat_health = HeartbeatHealth::Waiting;
    assert!(!health.eligible(), "not yet confirmed");
}
