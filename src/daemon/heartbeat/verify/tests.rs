//! The gate held to its promises: each reason, freshness, floods.

use super::*;
use std::net::Ipv4Addr;
use tidegate_heartbeat::keys::HeartbeatKey;
use tidegate_heartbeat::testing::{START, TestSender, key, ring, secret};

/// A gate and the two clocks it is asked by.
struct Place {
    gate: Verifier,
    began: Instant,
    now: Instant,
    /// Our wall clock, ms since 1970.
    wall: u64,
}

const SOURCE: &str = "10.0.0.1:40000";

impl Place {
    fn new() -> Place {
        Place::with([key()])
    }

    fn with(keys: impl IntoIterator<Item = HeartbeatKey>) -> Place {
        let now = tidegate_net::clock::now();
        let gate = Verifier::new(ring(keys), VerifierLimits::default(), 1);
        Place { gate, began: now, now, wall: START }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.wall += time.as_millis() as u64;
    }

    fn hear(&mut self, datagram: &[u8]) -> Result<Heartbeat, RejectReason> {
        self.hear_from(SOURCE.parse().unwrap(), datagram)
    }

    fn hear_from(&mut self, from: SocketAddr, datagram: &[u8]) -> Result<Heartbeat, RejectReason> {
        let wall = UNIX_EPOCH + Duration::from_millis(self.wall);
        self.gate.admit(datagram, from, self.now, wall)
    }

    /// Hears what `mouth` says at its own time, which is ours.
    fn hear_on_time(&mut self, mouth: &mut TestSender) -> Result<Heartbeat, RejectReason> {
        mouth.sent = self.wall;
        self.hear(&mouth.send())
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_proven_heartbeat_is_believed_as_it_was_said() {
    let heartbeat = Place::new().hear(&TestSender::new().send()).unwrap();
    assert_eq!((&*heartbeat.pool, &*heartbeat.name), ("web", "a"));
    assert_eq!(heartbeat.address, "10.0.0.1:80".parse().unwrap());
    assert_eq!((heartbeat.incarnation, heartbeat.sequence, heartbeat.key_id), (START, 1, 7));
    assert_eq!((heartbeat.weight, heartbeat.in_flight, heartbeat.load), (3, 17, 250));
}

#[test]
fn every_flipped_bit_is_refused() {
    let datagram = TestSender::new().send();
    for bit in 0..datagram.len() * 8 {
        let mut bytes = datagram.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let reason = Place::new().hear(&bytes).expect_err("a flipped bit");
        let fits =
            [RejectReason::Malformed, RejectReason::UnknownVersion, RejectReason::UnknownKey];
        assert!(
            reason == RejectReason::Signature || fits.contains(&reason),
            "bit {bit}: {reason:?}"
        );
    }
}

#[test]
fn other_versions_and_other_keys_have_their_own_reasons() {
    let mut place = Place::new();
    let mut newer = TestSender::new().send().to_vec();
    newer[4] = 2;
    assert_eq!(place.hear(&newer), Err(RejectReason::UnknownVersion));
    let mut mouth = TestSender::new();
    mouth.key_id = 8;
    assert_eq!(place.hear(&mouth.send()), Err(RejectReason::UnknownKey));
    mouth.key_id = 7;
    mouth.secret = secret(2);
    assert_eq!(place.hear(&mouth.send()), Err(RejectReason::Signature));
    assert_eq!(place.hear(&[b'x'; 600]), Err(RejectReason::Malformed));
}

#[test]
fn a_key_speaks_for_its_pools_and_ranges_alone() {
    let mut place = Place::new();
    let mut hear = |pool, address| place.hear(&TestSender::named(pool, "a", address).send()).err();
    assert_eq!(hear("db", "10.0.0.1:80"), Some(RejectReason::WrongPool));
    assert_eq!(hear("web", "192.0.2.1:80"), Some(RejectReason::WrongAddress));
    assert_eq!(hear("web", "[2001:db8::1]:80"), Some(RejectReason::WrongAddress));
    assert_eq!(hear("web", "[fd00::1]:80"), None);
}

#[test]
fn two_keys_are_valid_at_once_and_a_removed_one_is_not() {
    let newer = HeartbeatKey { id: 8, secret: secret(2), ..key() };
    let mut place = Place::with([key(), newer.clone()]);
    let mut old = TestSender::new();
    let mut new =
        TestSender { key_id: 8, secret: secret(2), ..TestSender::named("web", "b", "10.0.0.2:80") };
    place.hear(&old.send()).unwrap();
    place.hear(&new.send()).unwrap();
    // The sender itself may change over in the middle of an incarnation.
    (old.key_id, old.secret) = (8, secret(2));
    place.hear(&old.send()).unwrap();
    place.gate.set_keys(ring([newer]));
    (old.key_id, old.secret) = (7, secret(1));
    assert_eq!(place.hear(&old.send()), Err(RejectReason::UnknownKey));
    place.hear(&new.send()).unwrap();
}

#[test]
fn what_was_believed_once_is_refused_ever_after() {
    let (mut place, mut mouth) = (Place::new(), TestSender::new());
    let said: Vec<_> = (0..200).map(|_| mouth.send()).collect();
    for datagram in &said {
        place.hear(datagram).unwrap();
    }
    for datagram in said.iter().rev().chain(&said) {
        assert_eq!(place.hear(datagram), Err(RejectReason::Replayed));
    }
}

#[test]
fn an_overtaken_heartbeat_is_refused_as_reordered_once() {
    let (mut place, mut mouth) = (Place::new(), TestSender::new());
    let said: Vec<_> = (0..70).map(|_| mouth.send()).collect();
    place.hear(&said[0]).unwrap();
    place.hear(&said[69]).unwrap();
    // 64 sequences are remembered: the newest, 69, and down to 6.
    assert_eq!(place.hear(&said[6]), Err(RejectReason::Reordered));
    assert_eq!(place.hear(&said[6]), Err(RejectReason::Replayed));
    assert_eq!(place.hear(&said[5]), Err(RejectReason::Replayed));
    assert_eq!(place.hear(&said[68]), Err(RejectReason::Reordered));
}

#[test]
fn a_restarted_sender_silences_its_former_self() {
    let (mut place, mut old) = (Place::new(), TestSender::new());
    old.sequence = 1_000;
    place.hear(&old.send()).unwrap();
    let mut new = TestSender { incarnation: START + 1, ..TestSender::new() };
    place.hear(&new.send()).unwrap();
    assert_eq!(place.hear(&old.send()), Err(RejectReason::OldIncarnation));
    place.hear(&new.send()).unwrap();
}

#[test]
fn a_sender_whose_clock_was_ahead_at_its_last_start_is_believed_again_later() {
    let mut place = Place::new();
    let mut ahead = TestSender { incarnation: START + 86_400_000, ..TestSender::new() };
    place.hear_on_time(&mut ahead).unwrap();
    let recorded = ahead.send();
    let mut restarted = TestSender { incarnation: START + 1, ..TestSender::new() };
    place.pass(60 * SECOND);
    assert_eq!(place.hear_on_time(&mut restarted), Err(RejectReason::OldIncarnation));
    place.pass(SECOND);
    place.hear_on_time(&mut restarted).unwrap();
    assert_eq!(place.hear(&recorded), Err(RejectReason::Stale));
}

#[test]
fn half_a_minute_of_difference_is_forgiven_and_no_more() {
    let hear = |sent| Place::new().hear(&TestSender { sent, ..TestSender::new() }.send()).err();
    assert_eq!(hear(START - 30_000), None);
    assert_eq!(hear(START - 30_001), Some(RejectReason::Stale));
    assert_eq!(hear(START + 30_000), None);
    assert_eq!(hear(START + 30_001), Some(RejectReason::Future));
    assert_eq!(hear(0), Some(RejectReason::Stale));
    assert_eq!(hear(u64::MAX), Some(RejectReason::Future));
}

#[test]
fn a_recording_means_nothing_to_a_restarted_balancer() {
    let (mut place, mut mouth) = (Place::new(), TestSender::new());
    let mut recording = Vec::new();
    for _ in 0..600 {
        mouth.sent = place.wall;
        recording.push(mouth.send());
        place.hear(recording.last().unwrap()).unwrap();
        place.pass(Duration::from_millis(100));
    }
    let mut restarted = Place { wall: place.wall + 30_000, ..Place::new() };
    for datagram in &recording {
        assert_eq!(restarted.hear(datagram), Err(RejectReason::Stale));
        restarted.pass(Duration::from_millis(1));
    }
}

#[test]
fn heartbeats_held_back_do_not_keep_a_dead_backend_alive() {
    let (mut place, mut mouth) = (Place::new(), TestSender::new());
    place.hear_on_time(&mut mouth).unwrap();
    let held: Vec<_> = (0..100).map(|_| mouth.send()).collect();
    let mut believed = 0;
    for datagram in &held {
        place.pass(SECOND);
        believed += u32::from(place.hear(datagram).is_ok());
    }
    assert_eq!(believed, 30, "only as long as they are fresh, though each is a newer sequence");
}

#[test]
fn known_senders_survive_a_jump_of_our_clock_by_a_day() {
    for day in [86_400_000_i64, -86_400_000] {
        let (mut place, mut mouth) = (Place::new(), TestSender::new());
        place.hear_on_time(&mut mouth).unwrap();
        let right = place.wall;
        place.wall = place.wall.strict_add_signed(day);
        for second in 1..=3_600 {
            place.pass(SECOND);
            mouth.sent = right + second * 1_000;
            place.hear(&mouth.send()).unwrap();
        }
        let reason = if day > 0 { RejectReason::Stale } else { RejectReason::Future };
        let mut new =
            TestSender { sent: mouth.sent, ..TestSender::named("web", "b", "10.0.0.2:80") };
        assert_eq!(place.hear(&new.send()), Err(reason));
    }
}

#[test]
fn a_sender_whose_clock_jumps_a_day_is_refused() {
    for (day, reason) in
        [(86_400_000_i64, RejectReason::Future), (-86_400_000, RejectReason::Stale)]
    {
        let (mut place, mut mouth) = (Place::new(), TestSender::new());
        place.hear_on_time(&mut mouth).unwrap();
        mouth.sent = START.strict_add_signed(day);
        assert_eq!(place.hear(&mouth.send()), Err(reason));
    }
}

#[test]
fn one_more_sender_than_there_is_room_for_waits_until_others_are_gone() {
    let mut place = Place::new();
    for number in 0..SENDERS_MAX {
        let mut mouth = TestSender::named("web", &format!("b{number}"), "10.0.0.1:80");
        place.hear(&mouth.send()).unwrap();
    }
    let mut late = TestSender::named("web", "late", "10.0.0.1:80");
    assert_eq!(place.hear(&late.send()), Err(RejectReason::SendersFull));
    place.pass(59 * SECOND);
    assert_eq!(place.hear_on_time(&mut late), Err(RejectReason::SendersFull));
    place.pass(2 * SECOND);
    place.hear_on_time(&mut late).unwrap();
    assert_eq!(place.gate.senders(), 1);
}

/// A datagram with a form and key id that hold and a tag that does not.
fn forged() -> Vec<u8> {
    let mut bytes = TestSender::new().send().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    bytes
}

fn stranger(number: u32) -> SocketAddr {
    (Ipv4Addr::from(0x0b00_0000 + number), 40_000).into()
}

#[test]
fn strangers_are_limited_before_anything_is_hashed() {
    let (mut place, forged) = (Place::new(), forged());
    let (mut verified, mut limited) = (0, 0);
    // 200,000 a second for two seconds, each from another source.
    for number in 0..400_000 {
        place.now = place.began + Duration::from_micros(5 * u64::from(number));
        match place.hear_from(stranger(number), &forged) {
            Err(RejectReason::Signature) => verified += 1,
            Err(RejectReason::Limited) => limited += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(verified <= 2 * limit::UNKNOWN_PER_SECOND_MAX, "{verified}");
    assert!(verified > limit::UNKNOWN_PER_SECOND_MAX && limited > 0, "{verified}");
}

#[test]
fn one_noisy_stranger_leaves_room_for_others() {
    let (mut place, forged) = (Place::new(), forged());
    for number in 0..200_000 {
        place.now = place.began + Duration::from_micros(5 * number);
        let _ = place.hear_from(stranger(1), &forged);
    }
    place.hear_from(stranger(2), &TestSender::new().send()).unwrap();
}

/// Floods with 100,000 forged datagrams a second that claim to come from
/// `SOURCE`, among which the real sender's arrive every 100 ms; which of those
/// were believed.
fn flooded(place: &mut Place, mouth: &mut TestSender, seconds: u64) -> Vec<bool> {
    let (forged, mut believed) = (forged(), Vec::new());
    for _ in 0..seconds * 10 {
        for _ in 0..10_000 {
            place.now += Duration::from_micros(10);
            assert!(place.hear(&forged).is_err());
        }
        place.wall += 100;
        believed.push(place.hear_on_time(mouth).is_ok());
    }
    believed
}

#[test]
fn a_flood_in_a_known_senders_name_costs_it_no_heartbeat() {
    let (mut place, mut mouth) = (Place::new(), TestSender::new());
    place.hear(&mouth.send()).unwrap();
    let believed = flooded(&mut place, &mut mouth, 3);
    assert!(believed.iter().all(|believed| *believed), "{believed:?}");
}

#[test]
fn a_flood_in_a_new_senders_name_delays_it_by_seconds_not_for_ever() {
    let (mut place, mut mouth) = (Place::new(), TestSender::new());
    let believed = flooded(&mut place, &mut mouth, 8);
    let first = believed.iter().position(|believed| *believed).expect("heard at last");
    assert!(believed[first..].iter().all(|believed| *believed), "known from then on");
}

#[test]
fn beyond_the_wide_gate_real_heartbeats_are_lost_by_lot() {
    let (mut place, mut mouth, forged) = (Place::new(), TestSender::new(), forged());
    place.hear(&mouth.send()).unwrap();
    let mut believed = 0;
    // 400,000 a second, the real one always the last of its step.
    for _ in 0..20 {
        for _ in 0..40_000 {
            place.now += Duration::from_nanos(2_499);
            let _ = place.hear(&forged);
        }
        place.wall += 100;
        match place.hear_on_time(&mut mouth) {
            Ok(_) => believed += 1,
            Err(reason) => assert!(reason.is_local_drop(), "{reason:?}"),
        }
        place.now += Duration::from_nanos(40_000);
    }
    assert!((1..20).contains(&believed), "about half of 20: {believed}");
}

#[test]
fn reasons_have_one_name_and_number_each() {
    for (number, reason) in RejectReason::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, number);
        assert_eq!(
            RejectReason::ALL.iter().filter(|other| other.name() == reason.name()).count(),
            1
        );
    }
}

#[test]
fn rejection_names_the_sender_and_its_clock_offset() {
    let mut place = Place::new();
    let datagram = TestSender::new().send();
    place.wall += 300_000;
    let wall = UNIX_EPOCH + Duration::from_millis(place.wall);
    let from = SOURCE.parse().unwrap();
    let refused = place.gate.judge(&datagram, from, place.now, wall).unwrap_err();
    let claim = refused.claim.unwrap();
    assert_eq!((refused.reason, refused.skew), (RejectReason::Stale, Some(-300_000)));
    assert_eq!((claim.pool, claim.name, claim.key_id), ("web", "a", 7));
}
