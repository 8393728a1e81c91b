//! Tests of the findings.

use super::*;
use crate::control::PoolStatus;
use crate::health::{Observation, Transition};
use crate::model::BackendId;
use crate::table::state::BackendState;

fn backend(id: u32, observation: Observation, reason: &str, now: Instant) -> BackendStatus {
    let address = BackendAddr::Tcp(([10, 0, 0, id as u8], 80).into());
    let name: Arc<str> = format!("b{id}").into();
    let state = BackendState::new(BackendId(id), "web".into(), Arc::clone(&name), address, 1);
    let transition = Transition {
        pool: "web".into(),
        backend: name,
        from: "up",
        to: observation.name(),
        reason: reason.to_owned(),
        at: now.checked_sub(Duration::from_secs(41)).expect("not at boot"),
        lasted: Duration::ZERO,
    };
    BackendStatus {
        observation,
        eligible: observation != Observation::Down,
        last_transition: (!reason.is_empty()).then_some(transition),
        ..BackendStatus::plain(state, now)
    }
}

fn found<'a>(
    pool: PoolStatus,
    now: Instant,
    change: impl Fn(&mut FindingFacts<'a>),
) -> Vec<Finding> {
    let control = ControlStatus {
        generation: 1,
        frontends: Vec::new(),
        pools: vec![pool],
        leaving: Vec::new(),
        published: Vec::new(),
        heartbeat: None,
    };
    let mut facts = FindingFacts {
        control: Box::leak(Box::new(control)),
        now,
        queued: Box::leak(Box::default()),
        refused: &[],
        connections: (5, 100),
        rejected_reload: None,
        warnings: Vec::new(),
        lead: &|_| None,
    };
    change(&mut facts);
    find(&facts)
}

fn pool(count: u32, sick: std::ops::Range<u32>, now: Instant) -> PoolStatus {
    let backends = (1..=count).map(|id| match sick.contains(&id) {
        true => backend(id, Observation::Down, &format!("{id} probes failed"), now),
        false => backend(id, Observation::Up, "", now),
    });
    PoolStatus::plain("web", backends.collect())
}

#[test]
fn balancer_without_problems_has_no_finding() {
    let now = tidegate_net::clock::now();
    assert_eq!(found(pool(5, 0..0, now), now, |_| ()), []);
}

#[test]
fn backends_with_one_reason_are_one_finding_with_its_place_and_what_happened_before() {
    let now = tidegate_net::clock::now();
    let lead = |since: Duration| {
        assert_eq!(since, Duration::from_secs(41));
        let (text, before) = ("generation 7 by uid 1000".to_owned(), Duration::from_secs(12));
        Some(LeadEvent { text, before })
    };
    let all = found(pool(24, 4..8, now), now, |facts| facts.lead = &lead);
    let [one] = &*all else { panic!("{all:?}") };
    assert_eq!(one.title, "4 backends of web are down");
    assert_eq!(
        one.why,
        "4 probes failed. All 4 lie in 10.0.0.4–10.0.0.7, and no backend there is up. \
         It began 12 s after generation 7 by uid 1000."
    );
    assert_eq!(one.effect, "Their 17% of new sessions goes to the other 20.");
    assert_eq!((one.severity, one.backends, &one.backend), (FindingSeverity::Bad, 4, &None));
}

#[test]
fn single_backend_is_named_and_scattered_ones_have_no_place() {
    let now = tidegate_net::clock::now();
    let all = found(pool(2, 1..2, now), now, |_| ());
    assert_eq!(all[0].title, "web/b1 is down");
    assert_eq!(all[0].why, "1 probes failed.");
    assert_eq!(all[0].effect, "Its 50% of new sessions goes to the one that is left.");
    let mut scattered = pool(20, 1..3, now);
    scattered.backends[19] = backend(20, Observation::Down, "9 probes failed", now);
    assert!(!found(scattered, now, |_| ())[0].why.contains("lie in"));
}

#[test]
fn pool_without_an_eligible_backend_is_the_worst() {
    let now = tidegate_net::clock::now();
    let mut dead = pool(2, 1..3, now);
    dead.none_eligible = Some("refuse");
    let warnings = vec!["worker 3 is stalled".to_owned()];
    let all = found(dead, now, |facts| facts.warnings = warnings.clone());
    let titles: Vec<&str> = all.iter().map(|one| &*one.title).collect();
    let down = "2 backends of web are down";
    assert_eq!(titles, ["Pool web has no eligible backend", down, "Warning"]);
    assert_eq!(all[0].why, "None of its 2 backends gets new sessions.");
    assert!(all[0].effect.contains("\"refuse\"") && all[1].effect.is_empty());
    assert_eq!(all[2].why, "Worker 3 is stalled.");
}

#[test]
fn queues_refusals_and_caps_are_findings() {
    let now = tidegate_net::clock::now();
    let refused = |rate| RefusedRate {
        frontend: "front".into(),
        reason: "source-rate",
        text: "the client source exceeded its rate limit",
        rate,
    };
    let (queued, refused) = (HashMap::from([("web".into(), 2)]), [refused(3.0), refused(0.4)]);
    let all = found(pool(2, 0..0, now), now, |facts| {
        facts.connections = (1_950, 2_000);
        (facts.queued, facts.refused) = (&queued, &refused);
    });
    let titles: Vec<&str> = all.iter().map(|one| &*one.title).collect();
    let expected = [
        "2 clients wait in the queue of web",
        "front refuses 3.0 clients/s",
        "Open sessions are near the cap",
    ];
    assert_eq!(titles, expected);
    assert_eq!(all[2].why, "1,950 of 2,000; at the cap new clients wait in the listen queue.");
}

#[test]
fn findings_are_bounded() {
    let now = tidegate_net::clock::now();
    let many = |reason: &str, id| backend(id, Observation::Down, reason, now);
    let reasons = (0..80_u32).map(|id| {
        many(&format!("reason {}", char::from_u32(0x4e00 + id).expect("a letter")), id + 1)
    });
    let all = found(PoolStatus::plain("web", reasons.collect()), now, |_| ());
    assert_eq!(all.len(), FINDINGS_MAX);
    assert_eq!(all[0].severity, FindingSeverity::Outage);
}

#[test]
fn rejected_reload_is_named_with_its_problem() {
    let now = tidegate_net::clock::now();
    let all = found(pool(1, 0..0, now), now, |facts| {
        let why = "the new configuration was rejected: t.toml:3:1: unknown key".to_owned();
        facts.rejected_reload = Some((why, Duration::from_secs(9)));
    });
    let [one] = &*all else { panic!("{all:?}") };
    assert_eq!(one.short, "the last reload was rejected");
    assert_eq!(one.why, "The new configuration was rejected: t.toml:3:1: unknown key.");
    assert_eq!(one.since, Some(Duration::from_secs(9)));
}
