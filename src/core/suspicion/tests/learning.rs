//! What `Arrivals` learns and what it ignores.

use super::*;
use expect_test::expect;
use std::fmt::Write;

/// Returns arrivals after `count` heartbeats. `lost` selects the lost ones; `delay` is the
/// delay of each in milliseconds.
fn after(
    count: u64,
    lost: impl Fn(u64) -> bool,
    delay: impl Fn(u64) -> u64,
) -> (Arrivals, Instant) {
    let start = tidegate_net::clock::now();
    let mut arrivals = Arrivals::new(INTERVAL);
    for sequence in (0..count).filter(|sequence| !lost(*sequence)) {
        let now = start + ms(sequence * 100 + delay(sequence));
        arrivals.beat(&beat(1, sequence), false, now);
    }
    (arrivals, start + ms(count * 100))
}

fn beat(incarnation: u64, sequence: u64) -> BeatInfo {
    BeatInfo { incarnation, sequence, interval: INTERVAL }
}

#[test]
fn loss_is_measured_from_gaps_in_the_sequence() {
    let (arrivals, _) = after(20_000, |sequence| sequence % 10 == 9, |_| 0);
    assert!((arrivals.loss() - 0.1).abs() < 0.01, "{}", arrivals.loss());
    assert_eq!(arrivals.lost_total(), 1_999);
    assert_eq!(arrivals.missing_allowed(), 6);
}

#[test]
fn loss_of_20_percent_is_measured_within_a_minute() {
    let (arrivals, _) = after(600, |sequence| sequence % 5 == 4, |_| 0);
    assert!((0.15..0.2).contains(&arrivals.loss()), "{}", arrivals.loss());
}

#[test]
fn delays_do_not_count_as_loss_and_loss_does_not_count_as_delay() {
    let (late, _) = after(5_000, |_| false, |sequence| [0, 10, 0, 30][sequence as usize % 4]);
    assert!(late.loss() < 0.001, "{}", late.loss());
    // The standard deviation of the four delays is 12.2 ms.
    assert!((ms(11)..ms(14)).contains(&late.jitter()), "{:?}", late.jitter());
    let (lossy, _) = after(5_000, |sequence| sequence % 5 == 4, |_| 0);
    assert!(lossy.jitter() < ms(1), "{:?}", lossy.jitter());
}

#[test]
fn learned_interval_follows_a_sender_slower_than_declared() {
    let (arrivals, _) = after(5_000, |_| false, |sequence| sequence * 3);
    assert!((ms(102)..ms(104)).contains(&arrivals.mean_interval()));
    assert!(arrivals.jitter() < ms(2), "{:?}", arrivals.jitter());
}

#[test]
fn late_and_repeated_heartbeats_are_ignored() {
    let (mut arrivals, now) = after(100, |_| false, |_| 0);
    let deadline = arrivals.deadline();
    for old in [99, 98, 0] {
        assert_eq!(arrivals.beat(&beat(1, old), false, now), ArrivalOrder::Old);
    }
    assert_eq!(
        arrivals.beat(&beat(0, 1_000), false, now),
        ArrivalOrder::Old,
        "an older incarnation"
    );
    assert_eq!((arrivals.deadline(), arrivals.beats_total()), (deadline, 100));
}

#[test]
fn new_incarnation_starts_with_no_history() {
    let (mut arrivals, now) = after(5_000, |sequence| sequence % 3 == 0, |_| 0);
    assert_eq!(arrivals.beat(&beat(2, 1), false, now), ArrivalOrder::First);
    assert_eq!(arrivals.newest(), Some((2, 1)));
    assert!(arrivals.loss() < 0.03, "{}", arrivals.loss());
    assert_eq!(
        arrivals.beat(&beat(2, 2), false, now + INTERVAL),
        ArrivalOrder::Next { missing: 0 }
    );
}

#[test]
fn gaps_of_outages_and_local_stalls_are_not_learned() {
    let (arrivals, now) = after(2_000, |_| false, |_| 0);
    let known = (arrivals.loss(), arrivals.jitter(), arrivals.loss_after_loss());
    let learned = |arrivals: &Arrivals| {
        let (loss, jitter, again) = known;
        arrivals.loss() > loss * 1.01
            || arrivals.jitter() > jitter + ms(1)
            || arrivals.loss_after_loss() > again * 1.01
    };
    let mut outage = arrivals.clone();
    outage.beat(&beat(1, 2_010), true, now + ms(1_000));
    let mut long = arrivals.clone();
    long.beat(&beat(1, 2_040), false, now + ms(4_000));
    // A stall of 3 s: some heartbeats were dropped, the queued ones arrive at once.
    let mut stalled = arrivals.clone();
    let awake = now + ms(3_000);
    stalled.skip_gap(Duration::MAX, awake);
    for sequence in 2_010..2_030 {
        stalled.beat(&beat(1, sequence), false, awake);
    }
    stalled.beat(&beat(1, 2_030), false, awake + ms(50));
    let mut plain = arrivals.clone();
    plain.beat(&beat(1, 2_010), false, now + ms(1_000));
    assert!(!learned(&outage) && !learned(&long) && !learned(&stalled));
    assert!(learned(&plain), "the same gap is learned otherwise");
}

#[test]
fn missing_allowed_by_loss_rate() {
    let mut out = String::new();
    for per_mille in [1, 10, 50, 100, 200, 300, 500] {
        let mut rng = fastrand::Rng::with_seed(7);
        let lost: Vec<bool> = (0..20_000).map(|_| rng.u64(0..1_000) < per_mille).collect();
        let (alone, _) = after(20_000, |sequence| lost[sequence as usize], |_| 0);
        // The same loss rate in runs of four.
        let (runs, _) = after(20_000, |sequence| lost[sequence as usize / 4 * 4], |_| 0);
        writeln!(
            out,
            "{:<4}% alone {:>2} ({:>4} ms), in runs of four {:>2}",
            per_mille as f64 / 10.0,
            alone.missing_allowed(),
            alone.timeout().as_millis(),
            runs.missing_allowed()
        )
        .unwrap();
    }
    expect![[r#"
        0.1 % alone  3 ( 310 ms), in runs of four  7
        1   % alone  3 ( 310 ms), in runs of four 12
        5   % alone  4 ( 410 ms), in runs of four 12
        10  % alone  6 ( 610 ms), in runs of four 12
        20  % alone  8 ( 810 ms), in runs of four 12
        30  % alone 10 (1010 ms), in runs of four 12
        50  % alone 12 (1210 ms), in runs of four 12
    "#]]
    .assert_eq(&out);
}

#[test]
fn timeout_never_exceeds_its_bound() {
    let (mut arrivals, now) =
        after(10_000, |sequence| sequence % 2 == 0, |sequence| sequence % 7 * 60);
    assert!(arrivals.timeout() <= ms(1_250), "{:?}", arrivals.timeout());
    arrivals.beat(&beat(1, 10_001), false, now);
    assert!(arrivals.deadline().unwrap() <= now + ms(1_250));
}
