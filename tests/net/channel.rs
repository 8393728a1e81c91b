//! The decisions of the link emulator without a kernel: shares, seeds, order and queues.
//!
//! Time is an argument, so every bound is exact, or binomial with a fixed seed. The results
//! are the same on every machine. No packet is sent.

use crate::common::ms;
use crate::link::channel::{Channel, Fate, Impairment, Loss};
use std::time::{Duration, Instant};

const PACKET: usize = 1000;

/// Offers `count` packets at intervals of `gap`. Returns the send times and the fates.
fn offer(seed: u64, count: usize, gap: Duration, how: Impairment) -> Vec<(Instant, Fate)> {
    let mut channel = Channel::new(seed);
    let start = Instant::now();
    let times = (0..count as u32).map(|number| start + gap * number);
    times.map(|now| (now, channel.offer(PACKET, now, &how))).collect()
}

/// Returns the arrival times in the order of sending.
fn arrivals(fates: &[(Instant, Fate)]) -> Vec<Instant> {
    let arrival = |(_, fate): &(Instant, Fate)| match fate {
        Fate::Arrives { at, .. } => Some(*at),
        _ => None,
    };
    fates.iter().filter_map(arrival).collect()
}

fn lost(fates: &[(Instant, Fate)]) -> Vec<bool> {
    fates.iter().map(|(_, fate)| *fate == Fate::Lost).collect()
}

/// Checks that `hits` of `count` fit a probability of `share` within five standard deviations.
#[track_caller]
pub fn assert_share(what: &str, hits: u64, count: u64, share: f64) {
    let expected = count as f64 * share;
    let bound = 5.0 * (expected * (1.0 - share)).sqrt();
    let off = (hits as f64 - expected).abs();
    assert!(off <= bound, "{what}: {hits} of {count}, expected {expected:.0} ± {bound:.0}");
}

fn count(fates: &[(Instant, Fate)], is: impl Fn(&Fate) -> bool) -> u64 {
    fates.iter().filter(|(_, fate)| is(fate)).count() as u64
}

#[test]
fn perfect_link_delivers_immediately() {
    for (sent, fate) in offer(1, 1000, ms(1), Impairment::default()) {
        assert_eq!(fate, Fate::Arrives { at: sent, copies: 1, held_back: false, flip: None });
    }
}

#[test]
fn shares_match_the_settings() {
    let how = Impairment {
        loss: Loss::Independent(0.05),
        duplicate: 0.02,
        reorder: 0.1,
        corrupt: 0.03,
        ..Impairment::default()
    };
    let fates = offer(2, 100_000, ms(1), how);
    let arrived = arrivals(&fates).len() as u64;
    let twice = count(&fates, |fate| matches!(fate, Fate::Arrives { copies: 2, .. }));
    let held = count(&fates, |fate| matches!(fate, Fate::Arrives { held_back: true, .. }));
    let flipped = count(&fates, |fate| matches!(fate, Fate::Arrives { flip: Some(_), .. }));
    assert_share("lost", count(&fates, |fate| *fate == Fate::Lost), 100_000, 0.05);
    assert_share("duplicated", twice, arrived, 0.02);
    assert_share("held back", held, arrived, 0.1);
    assert_share("corrupted", flipped, arrived, 0.03);
}

#[test]
fn losses_depend_only_on_the_seed() {
    let plain = Impairment { loss: Loss::Independent(0.1), ..Impairment::default() };
    let busy = Impairment {
        delay: ms(50),
        jitter: ms(20),
        duplicate: 0.5,
        reorder: 0.5,
        corrupt: 0.5,
        rate: Some(1_000_000_000),
        ..plain
    };
    let reference = lost(&offer(3, 10_000, ms(1), plain));
    assert_eq!(reference, lost(&offer(3, 10_000, ms(7), busy)));
    assert_ne!(reference, lost(&offer(4, 10_000, ms(1), plain)));
}

#[test]
fn bursts_have_the_configured_share_and_length() {
    let loss = Loss::Bursts { enter: 0.01, leave: 0.2, lost: 1.0 };
    let fates = offer(5, 200_000, ms(1), Impairment { loss, ..Impairment::default() });
    let lost = lost(&fates);
    let total = lost.iter().filter(|lost| **lost).count() as f64;
    let bursts = lost.windows(2).filter(|pair| pair == &[false, true]).count() as f64;
    // Packets depend on their neighbours, so these bounds are not binomial. The standard
    // deviation of a burst's length equals its mean, and there are 1,900 bursts.
    let share = total / lost.len() as f64;
    assert!((share - 0.01 / 0.21).abs() < 0.005, "a share of {share} is lost");
    assert!((total / bursts - 5.0).abs() < 0.6, "bursts of {} packets", total / bursts);
}

#[test]
fn jitter_stays_within_bounds_and_keeps_the_order() {
    let how = Impairment { delay: ms(20), jitter: ms(15), ..Impairment::default() };
    let fates = offer(6, 1000, Duration::from_micros(100), how);
    let arrivals = arrivals(&fates);
    assert!(arrivals.is_sorted());
    assert!(fates.iter().zip(&arrivals).all(|((sent, _), at)| *at - *sent >= ms(5)));
    let apart = offer(6, 1000, ms(100), how);
    let delays: Vec<Duration> = apart
        .iter()
        .map(|(sent, fate)| match fate {
            Fate::Arrives { at, .. } => *at - *sent,
            _ => unreachable!("nothing is lost here"),
        })
        .collect();
    let (least, most) = (delays.iter().min().unwrap(), delays.iter().max().unwrap());
    assert!(*least >= ms(5) && *least < ms(6), "{least:?}");
    assert!(*most <= ms(35) && *most > ms(34), "{most:?}");
}

#[test]
fn held_back_packets_are_overtaken() {
    let how = Impairment { reorder: 0.2, reorder_by: ms(3), ..Impairment::default() };
    let fates = offer(7, 1000, ms(1), how);
    let overtaken = arrivals(&fates).windows(2).filter(|pair| pair[0] > pair[1]).count();
    assert!(overtaken > 100, "{overtaken} overtaken");
}

#[test]
fn limited_rate_sends_packets_in_sequence() {
    // 1,000 bytes at 8 Mbit/s take 1 ms.
    let how = Impairment { rate: Some(8_000_000), queue: 1 << 20, ..Impairment::default() };
    let fates = offer(8, 100, Duration::ZERO, how);
    let (start, arrivals) = (fates[0].0, arrivals(&fates));
    for (number, at) in (1..).zip(arrivals) {
        assert_eq!((at - start).as_micros(), 1000 * number);
    }
}

#[test]
fn limited_rate_drops_packets_beyond_its_queue() {
    let how = Impairment { rate: Some(8_000_000), queue: 10 * PACKET, ..Impairment::default() };
    let fates = offer(9, 100, Duration::ZERO, how);
    assert_eq!(arrivals(&fates).len(), 10);
    assert_eq!(count(&fates, |fate| *fate == Fate::Overflowed), 90);
    let slower = offer(9, 100, ms(1), how);
    assert_eq!(arrivals(&slower).len(), 100);
}

#[test]
fn partition_drops_every_packet() {
    let how = Impairment { partition: true, ..Impairment::default() };
    let fates = offer(10, 1000, ms(1), how);
    assert_eq!(count(&fates, |fate| *fate == Fate::Partitioned), 1000);
}

#[test]
fn flipped_bits_are_within_the_packet() {
    let how = Impairment { corrupt: 1.0, ..Impairment::default() };
    let flips: Vec<usize> = offer(11, 10_000, ms(1), how)
        .iter()
        .filter_map(|(_, fate)| match fate {
            Fate::Arrives { flip, .. } => *flip,
            _ => None,
        })
        .collect();
    assert_eq!(flips.len(), 10_000);
    assert!(flips.iter().all(|bit| *bit < PACKET * 8));
    assert!(flips.iter().any(|bit| *bit < 80) && flips.iter().any(|bit| *bit > 7900));
}
