//! Silence that is our own doing: it puts a verdict off by as much, and no more.

use super::*;
use crate::model;

/// How long a dead backend, of which no probe says anything, stays in service while
/// `each` comes between so much time and the next.
fn dies_after(each: Duration, mut happens: impl FnMut(&mut Bench)) -> Duration {
    let ttl = Duration::from_secs(4);
    let heartbeats = Some(Arc::new(model::HeartbeatSpec { ttl, ..spec() }));
    let mut bench = Bench::new(PoolConfig { heartbeat: heartbeats, ..unprobed(&[]) });
    bench.beat(&["a"], &[], Duration::from_secs(5));
    let died = bench.now;
    while bench.status("a").eligible {
        assert!(bench.now < died + Duration::from_secs(60), "it never dies");
        bench.pass(each);
        happens(&mut bench);
    }
    bench.now - died
}

#[test]
fn being_late_again_and_again_keeps_a_dead_backend_only_for_the_time_lost() {
    let (every, late) = (Duration::from_millis(1_500), Duration::from_millis(300));
    let took = dies_after(every, |bench| {
        bench.now += late;
        bench.apply(ControlEvent::Tick);
    });
    // Four seconds of listening take three times 1.5 s, and as often 0.3 s are lost.
    assert!(took <= Duration::from_secs(6), "{took:?}");
}

#[test]
fn losing_heartbeats_without_end_keeps_a_dead_backend_for_twice_its_ttl_at_most() {
    let took = dies_after(Duration::from_millis(50), |bench| {
        bench.apply(ControlEvent::HeartbeatsLost(3));
    });
    assert!(took <= Duration::from_millis(8_500), "{took:?}");
}
