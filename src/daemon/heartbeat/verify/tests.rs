//! Tests of the verifier: each reason, freshness, floods.

use super::*;
use std::net::Ipv4Addr;
use tidegate_heartbeat::keys::HeartbeatKey;
use tidegate_heartbeat::testing::{START, TestSender, key, ring, secret};

/// A verifier and its two clocks.
struct Setup {
    verifier: Verifier,
    began: Instant,
    now: Instant,
    /// The local wall clock, in ms since 1970.
    wall: u64,
}

const SOURCE: &str = "10.0.0.1:40000";

impl Setup {
    fn new() -> Setup {
        Setup::with([key()])
    }

    fn with(keys: impl IntoIterator<Item = HeartbeatKey>) -> Setup {
        let now = tidegate_net::clock::now();
        let verifier = Verifier::new(ring(keys), VerifierLimits::default(), 1);
        Setup { verifier, began: now, now, wall: START }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.wall += time.as_millis() as u64;
    }

    fn receive(&mut self, datagram: &[u8]) -> Result<Heartbeat, RejectReason> {
        self.receive_from(SOURCE.parse().unwrap(), datagram)
    }

    fn receive_from(
        &mut self,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Result<Heartbeat, RejectReason> {
        let wall = UNIX_EPOCH + Duration::from_millis(self.wall);
        self.verifier.admit(datagram, from, self.now, wall)
    }

    /// Receives a heartbeat of `sender`, whose clock agrees with the local clock.
    fn receive_on_time(&mut self, sender: &mut TestSender) -> Result<Heartbeat, RejectReason> {
        sender.sent = self.wall;
        self.receive(&sender.send())
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn signed_heartbeat_is_accepted_unchanged() {
    let heartbeat = Setup::new().receive(&TestSender::new().send()).unwrap();
    assert_eq!((&*heartbeat.pool, &*heartbeat.name), ("web", "a"));
    assert_eq!(heartbeat.address, "10.0.0.1:80".parse().unwrap());
    assert_eq!((heartbeat.incarnation, heartbeat.sequence, heartbeat.key_id), (START, 1, 7));
    assert_eq!((heartbeat.weight, heartbeat.in_flight, heartbeat.load), (3, 17, 250));
}

#[test]
fn every_flipped_bit_is_rejected() {
    let datagram = TestSender::new().send();
    for bit in 0..datagram.len() * 8 {
        let mut bytes = datagram.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let reason = Setup::new().receive(&bytes).expect_err("a flipped bit");
        let fits =
            [RejectReason::Malformed, RejectReason::UnknownVersion, RejectReason::UnknownKey];
        assert!(
            reason == RejectReason::Signature || fits.contains(&reason),
            "bit {bit}: {reason:?}"
        );
    }
}

#[test]
fn other_versions_and_other_keys_have_separate_reasons() {
    let mut setup = Setup::new();
    let mut newer = TestSender::new().send().to_vec();
    newer[4] = 2;
    assert_eq!(setup.receive(&newer), Err(RejectReason::UnknownVersion));
    let mut sender = TestSender::new();
    sender.key_id = 8;
    assert_eq!(setup.receive(&sender.send()), Err(RejectReason::UnknownKey));
    sender.key_id = 7;
    sender.secret = secret(2);
    assert_eq!(setup.receive(&sender.send()), Err(RejectReason::Signature));
    assert_eq!(setup.receive(&[b'x'; 600]), Err(RejectReason::Malformed));
}

#[test]
fn key_is_valid_only_for_its_pools_and_addresses() {
    let mut setup = Setup::new();
    let mut receive =
        |pool, address| setup.receive(&TestSender::named(pool, "a", address).send()).err();
    assert_eq!(receive("db", "10.0.0.1:80"), Some(RejectReason::WrongPool));
    assert_eq!(receive("web", "192.0.2.1:80"), Some(RejectReason::WrongAddress));
    assert_eq!(receive("web", "[2001:db8::1]:80"), Some(RejectReason::WrongAddress));
    assert_eq!(receive("web", "[fd00::1]:80"), None);
}

#[test]
fn two_keys_are_valid_at_the_same_time_and_a_removed_key_is_not() {
    let newer = HeartbeatKey { id: 8, secret: secret(2), ..key() };
    let mut setup = Setup::with([key(), newer.clone()]);
    let mut old = TestSender::new();
    let mut new =
        TestSender { key_id: 8, secret: secret(2), ..TestSender::named("web", "b", "10.0.0.2:80") };
    setup.receive(&old.send()).unwrap();
    setup.receive(&new.send()).unwrap();
    // A sender can change its key within an incarnation.
    (old.key_id, old.secret) = (8, secret(2));
    setup.receive(&old.send()).unwrap();
    setup.verifier.set_keys(ring([newer]));
    (old.key_id, old.secret) = (7, secret(1));
    assert_eq!(setup.receive(&old.send()), Err(RejectReason::UnknownKey));
    setup.receive(&new.send()).unwrap();
}

#[test]
fn accepted_heartbeat_is_rejected_as_replayed_from_then_on() {
    let (mut setup, mut sender) = (Setup::new(), TestSender::new());
    let datagrams: Vec<_> = (0..200).map(|_| sender.send()).collect();
    for datagram in &datagrams {
        setup.receive(datagram).unwrap();
    }
    for datagram in datagrams.iter().rev().chain(&datagrams) {
        assert_eq!(setup.receive(datagram), Err(RejectReason::Replayed));
    }
}

#[test]
fn overtaken_heartbeat_is_rejected_once_as_reordered_then_as_replayed() {
    let (mut setup, mut sender) = (Setup::new(), TestSender::new());
    let datagrams: Vec<_> = (0..70).map(|_| sender.send()).collect();
    setup.receive(&datagrams[0]).unwrap();
    setup.receive(&datagrams[69]).unwrap();
    // 64 sequences are recorded: from 69, the newest, down to 6.
    assert_eq!(setup.receive(&datagrams[6]), Err(RejectReason::Reordered));
    assert_eq!(setup.receive(&datagrams[6]), Err(RejectReason::Replayed));
    assert_eq!(setup.receive(&datagrams[5]), Err(RejectReason::Replayed));
    assert_eq!(setup.receive(&datagrams[68]), Err(RejectReason::Reordered));
}

#[test]
fn older_incarnation_is_rejected_after_a_restart_of_the_sender() {
    let (mut setup, mut old) = (Setup::new(), TestSender::new());
    old.sequence = 1_000;
    setup.receive(&old.send()).unwrap();
    let mut new = TestSender { incarnation: START + 1, ..TestSender::new() };
    setup.receive(&new.send()).unwrap();
    assert_eq!(setup.receive(&old.send()), Err(RejectReason::OldIncarnation));
    setup.receive(&new.send()).unwrap();
}

#[test]
fn sender_whose_clock_was_ahead_at_its_last_start_is_accepted_again_later() {
    let mut setup = Setup::new();
    let mut ahead = TestSender { incarnation: START + 86_400_000, ..TestSender::new() };
    setup.receive_on_time(&mut ahead).unwrap();
    let recorded = ahead.send();
    let mut restarted = TestSender { incarnation: START + 1, ..TestSender::new() };
    setup.pass(60 * SECOND);
    assert_eq!(setup.receive_on_time(&mut restarted), Err(RejectReason::OldIncarnation));
    setup.pass(SECOND);
    setup.receive_on_time(&mut restarted).unwrap();
    assert_eq!(setup.receive(&recorded), Err(RejectReason::Stale));
}

#[test]
fn clock_difference_of_30_s_is_accepted_and_no_more() {
    let receive =
        |sent| Setup::new().receive(&TestSender { sent, ..TestSender::new() }.send()).err();
    assert_eq!(receive(START - 30_000), None);
    assert_eq!(receive(START - 30_001), Some(RejectReason::Stale));
    assert_eq!(receive(START + 30_000), None);
    assert_eq!(receive(START + 30_001), Some(RejectReason::Future));
    assert_eq!(receive(0), Some(RejectReason::Stale));
    assert_eq!(receive(u64::MAX), Some(RejectReason::Future));
}

#[test]
fn recording_is_rejected_by_a_restarted_balancer() {
    let (mut setup, mut sender) = (Setup::new(), TestSender::new());
    let mut recording = Vec::new();
    for _ in 0..600 {
        sender.sent = setup.wall;
        recording.push(sender.send());
        setup.receive(recording.last().unwrap()).unwrap();
        setup.pass(Duration::from_millis(100));
    }
    let mut restarted = Setup { wall: setup.wall + 30_000, ..Setup::new() };
    for datagram in &recording {
        assert_eq!(restarted.receive(datagram), Err(RejectReason::Stale));
        restarted.pass(Duration::from_millis(1));
    }
}

#[test]
fn delayed_heartbeats_are_accepted_only_while_fresh() {
    let (mut setup, mut sender) = (Setup::new(), TestSender::new());
    setup.receive_on_time(&mut sender).unwrap();
    let held: Vec<_> = (0..100).map(|_| sender.send()).collect();
    let mut accepted = 0;
    for datagram in &held {
        setup.pass(SECOND);
        accepted += u32::from(setup.receive(datagram).is_ok());
    }
    assert_eq!(accepted, 30, "each has a newer sequence, but only 30 are fresh");
}

#[test]
fn known_senders_are_accepted_after_the_local_clock_jumps_by_a_day() {
    for day in [86_400_000_i64, -86_400_000] {
        let (mut setup, mut sender) = (Setup::new(), TestSender::new());
        setup.receive_on_time(&mut sender).unwrap();
        let right = setup.wall;
        setup.wall = setup.wall.strict_add_signed(day);
        for second in 1..=3_600 {
            setup.pass(SECOND);
            sender.sent = right + second * 1_000;
            setup.receive(&sender.send()).unwrap();
        }
        let reason = if day > 0 { RejectReason::Stale } else { RejectReason::Future };
        let mut new =
            TestSender { sent: sender.sent, ..TestSender::named("web", "b", "10.0.0.2:80") };
        assert_eq!(setup.receive(&new.send()), Err(reason));
    }
}

#[test]
fn sender_whose_clock_jumps_by_a_day_is_rejected() {
    for (day, reason) in
        [(86_400_000_i64, RejectReason::Future), (-86_400_000, RejectReason::Stale)]
    {
        let (mut setup, mut sender) = (Setup::new(), TestSender::new());
        setup.receive_on_time(&mut sender).unwrap();
        sender.sent = START.strict_add_signed(day);
        assert_eq!(setup.receive(&sender.send()), Err(reason));
    }
}

#[test]
fn sender_above_the_limit_is_accepted_after_others_expire() {
    let mut setup = Setup::new();
    for number in 0..SENDERS_MAX {
        let mut sender = TestSender::named("web", &format!("b{number}"), "10.0.0.1:80");
        setup.receive(&sender.send()).unwrap();
    }
    let mut late = TestSender::named("web", "late", "10.0.0.1:80");
    assert_eq!(setup.receive(&late.send()), Err(RejectReason::SendersFull));
    setup.pass(59 * SECOND);
    assert_eq!(setup.receive_on_time(&mut late), Err(RejectReason::SendersFull));
    setup.pass(2 * SECOND);
    setup.receive_on_time(&mut late).unwrap();
    assert_eq!(setup.verifier.senders(), 1);
}

/// Returns a datagram with valid form and key id and an invalid signature.
fn forged() -> Vec<u8> {
    let mut bytes = TestSender::new().send().to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    bytes
}

fn unknown_source(number: u32) -> SocketAddr {
    (Ipv4Addr::from(0x0b00_0000 + number), 40_000).into()
}

#[test]
fn unknown_sources_are_rate_limited_before_verification() {
    let (mut setup, forged) = (Setup::new(), forged());
    let (mut verified, mut limited) = (0, 0);
    // 200,000 per second for two seconds, each from another source.
    for number in 0..400_000 {
        setup.now = setup.began + Duration::from_micros(5 * u64::from(number));
        match setup.receive_from(unknown_source(number), &forged) {
            Err(RejectReason::Signature) => verified += 1,
            Err(RejectReason::Limited) => limited += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(verified <= 2 * limit::UNKNOWN_PER_SECOND_MAX, "{verified}");
    assert!(verified > limit::UNKNOWN_PER_SECOND_MAX && limited > 0, "{verified}");
}

#[test]
fn flood_from_one_unknown_source_does_not_block_others() {
    let (mut setup, forged) = (Setup::new(), forged());
    for number in 0..200_000 {
        setup.now = setup.began + Duration::from_micros(5 * number);
        let _ = setup.receive_from(unknown_source(1), &forged);
    }
    setup.receive_from(unknown_source(2), &TestSender::new().send()).unwrap();
}

/// Floods with 100,000 forged datagrams per second from `SOURCE`. The real sender sends
/// every 100 ms from there. Returns which of its heartbeats were accepted.
fn flooded(setup: &mut Setup, sender: &mut TestSender, seconds: u64) -> Vec<bool> {
    let (forged, mut accepted) = (forged(), Vec::new());
    for _ in 0..seconds * 10 {
        for _ in 0..10_000 {
            setup.now += Duration::from_micros(10);
            assert!(setup.receive(&forged).is_err());
        }
        setup.wall += 100;
        accepted.push(setup.receive_on_time(sender).is_ok());
    }
    accepted
}

#[test]
fn flood_with_the_address_of_a_known_sender_costs_it_no_heartbeat() {
    let (mut setup, mut sender) = (Setup::new(), TestSender::new());
    setup.receive(&sender.send()).unwrap();
    let accepted = flooded(&mut setup, &mut sender, 3);
    assert!(accepted.iter().all(|accepted| *accepted), "{accepted:?}");
}

#[test]
fn flood_with_the_address_of_a_new_sender_delays_it_by_at_most_8_s() {
    let (mut setup, mut sender) = (Setup::new(), TestSender::new());
    let accepted = flooded(&mut setup, &mut sender, 8);
    let first = accepted.iter().position(|accepted| *accepted).expect("no heartbeat accepted");
    assert!(accepted[first..].iter().all(|accepted| *accepted), "rejected although known");
}

#[test]
fn heartbeats_of_known_senders_pass_at_random_above_their_limit() {
    let (mut setup, mut sender, forged) = (Setup::new(), TestSender::new(), forged());
    setup.receive(&sender.send()).unwrap();
    let mut accepted = 0;
    // 400,000 per second; the real heartbeat is always the last of its step.
    for _ in 0..20 {
        for _ in 0..40_000 {
            setup.now += Duration::from_nanos(2_499);
            let _ = setup.receive(&forged);
        }
        setup.wall += 100;
        match setup.receive_on_time(&mut sender) {
            Ok(_) => accepted += 1,
            Err(reason) => assert!(reason.is_local_drop(), "{reason:?}"),
        }
        setup.now += Duration::from_nanos(40_000);
    }
    assert!((1..20).contains(&accepted), "about half of 20: {accepted}");
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
    let mut setup = Setup::new();
    let datagram = TestSender::new().send();
    setup.wall += 300_000;
    let wall = UNIX_EPOCH + Duration::from_millis(setup.wall);
    let from = SOURCE.parse().unwrap();
    let rejected = setup.verifier.verify(&datagram, from, setup.now, wall).unwrap_err();
    let claim = rejected.claim.unwrap();
    assert_eq!((rejected.reason, rejected.skew), (RejectReason::Stale, Some(-300_000)));
    assert_eq!((claim.pool, claim.name, claim.key_id), ("web", "a", 7));
}
