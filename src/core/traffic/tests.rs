//! Tests of the samples, with invented times.

use super::*;
use crate::model::BackendAddr;
use crate::outcome::RefusedReason;
use crate::table::state::FrontendId;
use proptest::prelude::*;

fn backend(id: u32) -> Arc<BackendState> {
    let (name, address) = (format!("b{id}").into(), BackendAddr::Unix("/run/a.sock".into()));
    Arc::new(BackendState::new(BackendId(id), "web".into(), name, address, 2))
}

fn roster(backends: &[Arc<BackendState>]) -> Arc<TrafficRoster> {
    let frontend = FrontendState::new(FrontendId(1), "front".into(), 2, RefusedReason::COUNT);
    let pool = PoolRoster { name: "web".into(), backends: backends.to_vec() };
    Arc::new(TrafficRoster { frontends: vec![Arc::new(frontend)], pools: vec![pool] })
}

fn new_of(history: &TrafficHistory, id: u32) -> Vec<u32> {
    history.seconds(BackendId(id)).expect("known").iter().map(|slot| slot.new).collect()
}

fn begin() -> Instant {
    tidegate_net::clock::now()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn each_second_has_its_sessions_and_a_late_sample_shares_them_evenly() {
    let (a, start) = (backend(1), begin());
    let roster = roster(&[Arc::clone(&a)]);
    let mut history = TrafficHistory::default();
    a.counters.of(0).sessions.add(1_000);
    history.sample(&roster, start);
    for second in 1..=3 {
        a.counters.of(1).sessions.add(second);
        a.counters.of(0).bytes_in.add(10 * second);
        history.sample(&roster, start + SECOND * second as u32);
    }
    assert_eq!(new_of(&history, 1), [1, 2, 3], "what was before the first sample is left out");
    a.counters.of(1).sessions.add(7);
    history.sample(&roster, start + SECOND * 3 + SECOND / 2);
    history.sample(&roster, start + SECOND * 6);
    assert_eq!(new_of(&history, 1), [1, 2, 3, 2, 2, 3]);
    assert_eq!(history.pool_seconds("web"), [1, 2, 3, 2, 2, 3]);
    let rates = history.rates(BackendId(1));
    assert!((rates.new - 7.0 / 3.0).abs() < 1e-9 && rates.bytes_in == 0.0, "{rates:?}");
}

#[test]
fn minute_keeps_its_sessions_and_latencies_after_it_has_ended() {
    let (a, start) = (backend(1), begin());
    let roster = roster(&[Arc::clone(&a)]);
    let mut history = TrafficHistory::default();
    history.sample(&roster, start);
    a.counters.of(0).sessions.add(50);
    history.record(BackendId(1), Series::FirstByte, Duration::from_millis(20), 99);
    history.record(BackendId(1), Series::FirstByte, Duration::from_secs(2), 1);
    history.record(BackendId(9), Series::FirstByte, Duration::from_secs(2), 1);
    history.sample(&roster, start + SECOND * 30);
    let running = history.minutes(&a);
    assert_eq!((running.len(), running[0].traffic.new), (1, 50));
    history.sample(&roster, start + SECOND * 61);
    a.counters.of(0).sessions.add(4);
    let minutes = history.minutes(&a);
    assert_eq!((minutes.len(), minutes[0].traffic.new, minutes[1].traffic.new), (2, 50, 4));
    let [p50, p99] = minutes[0].first_byte.map(|step| step.seconds().expect("measured"));
    assert!((0.019..0.021).contains(&p50) && (0.019..0.021).contains(&p99), "{p50} {p99}");
    assert_eq!(minutes[1].first_byte[0].seconds(), None);
    let recent = history.recent(BackendId(1));
    assert!(recent.first_byte[1].is_some() && recent.connect[0].is_none());
    assert!(history.pool_first_byte_p99("web", true).is_some());
    history.sample(&roster, start + SECOND * 125);
    assert_eq!(history.recent(BackendId(1)).first_byte[1], None, "two minutes without a session");
    assert!(history.pool_first_byte_p99("web", true).is_some(), "but the hour has them");
    assert_eq!(history.pool_first_byte_p99("web", false), None);
}

#[test]
fn share_follows_the_sessions_and_removed_backends_are_forgotten() {
    let (a, b, start) = (backend(1), backend(2), begin());
    let both = roster(&[Arc::clone(&a), Arc::clone(&b)]);
    let mut history = TrafficHistory::default();
    history.sample(&both, start);
    assert_eq!(history.share("web", BackendId(1)), None, "no session yet");
    for second in 1..=40 {
        a.counters.of(0).sessions.add(3);
        b.counters.of(0).sessions.add(1);
        history.sample(&both, start + SECOND * second);
    }
    let share = history.share("web", BackendId(1)).expect("sessions");
    assert!((share - 0.75).abs() < 0.01, "{share}");
    let one = roster(&[b]);
    history.sample(&one, start + SECOND * 41);
    assert!(history.seconds(BackendId(1)).is_none() && history.minutes(&a).is_empty());
    assert_eq!(new_of(&history, 2).len(), 41);
}

#[test]
fn large_installation_keeps_minutes_only() {
    let all: Vec<_> = (0..=SECONDS_BACKENDS_MAX as u32).map(backend).collect();
    let (large, start) = (roster(&all), begin());
    let mut history = TrafficHistory::default();
    history.sample(&large, start);
    all[7].counters.of(0).sessions.add(9);
    history.sample(&large, start + SECOND * 5);
    assert!(new_of(&history, 7).is_empty());
    assert_eq!(history.minutes(&all[7])[0].traffic.new, 9);
    assert_eq!(history.pool_seconds("web").iter().sum::<u32>(), 9);
}

#[test]
fn rejected_clients_have_a_rate_by_reason() {
    let (roster, start) = (roster(&[]), begin());
    let mut history = TrafficHistory::default();
    history.sample(&roster, start);
    let reason = RefusedReason::SourceRate as usize;
    for second in 1..=60 {
        roster.frontends[0].counters.of(1).refused.cell(reason, 0).add(3);
        history.sample(&roster, start + SECOND * second);
    }
    let rates = history.refused("front");
    assert!((rates[reason] - 3.0).abs() < 0.05 && rates[0] == 0.0, "{rates:?}");
}

proptest! {
    #[test]
    fn rings_are_bounded_and_lose_no_session(
        steps in prop::collection::vec((0_u64..500, 1_u32..90), 1..200),
    ) {
        let (a, start) = (backend(1), begin());
        let roster = roster(&[Arc::clone(&a)]);
        let (mut history, mut at, mut sent) = (TrafficHistory::default(), start, 0);
        history.sample(&roster, start);
        for (new, seconds) in steps {
            a.counters.of(0).sessions.add(new);
            at += SECOND * seconds;
            sent += new;
            history.sample(&roster, at);
            let seconds = new_of(&history, 1);
            prop_assert!(seconds.len() <= TRAFFIC_SLOTS);
            prop_assert!(history.minutes(&a).len() <= TRAFFIC_SLOTS);
            prop_assert!(history.pool_seconds("web").len() <= TRAFFIC_SLOTS);
            if at < start + SECOND * 60 {
                prop_assert_eq!(seconds.iter().map(|n| u64::from(*n)).sum::<u64>(), sent);
            }
            if at < start + SECOND * 3_500 {
                let minutes = history.minutes(&a);
                prop_assert_eq!(minutes.iter().map(|m| u64::from(m.traffic.new)).sum::<u64>(), sent);
            }
        }
    }
}
