//! Silence with a local cause: it delays a removal by the time lost, and not longer.

use super::*;
use crate::model;

/// Returns how long a failed backend without probe results stays in rotation, if `happens`
/// is called after each interval `each`.
fn removed_after(each: Duration, mut happens: impl FnMut(&mut Bench)) -> Duration {
    let ttl = Duration::from_secs(4);
    let heartbeats = Some(Arc::new(model::HeartbeatSpec { ttl, ..spec() }));
    let mut bench = Bench::new(PoolConfig { heartbeat: heartbeats, ..unprobed(&[]) });
    bench.beat(&["a"], &[], Duration::from_secs(5));
    let died = bench.now;
    while bench.status("a").eligible {
        assert!(bench.now < died + Duration::from_secs(60), "never removed");
        bench.pass(each);
        happens(&mut bench);
    }
    bench.now - died
}

#[test]
fn repeated_stalls_delay_a_removal_only_by_the_time_lost() {
    let (every, late) = (Duration::from_millis(1_500), Duration::from_millis(300));
    let took = removed_after(every, |bench| {
        bench.now += late;
        bench.apply(ControlEvent::Tick);
    });
    // Each 1.5 s, 0.3 s are lost.
    assert!(took <= Duration::from_secs(6), "{took:?}");
}

#[test]
fn continuous_losses_delay_a_removal_to_at_most_twice_the_ttl() {
    let took = removed_after(Duration::from_millis(50), |bench| {
        bench.apply(ControlEvent::HeartbeatsLost(3));
    });
    assert!(took <= Duration::from_millis(8_500), "{took:?}");
}
