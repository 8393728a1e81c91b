//! The sender: punctual, quick with news, gone with a word.

use crate::place::{heard, receiver, settings};
use std::net::UdpSocket;
use std::time::Duration;
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::sender::{STOPPING_COUNT, Sender, SenderSettings};
use tidegate_heartbeat::wire::ParsedHeartbeat;

#[test]
fn heartbeats_come_at_their_interval_with_nothing_missing() {
    let (receiver, to) = receiver();
    let sender = Sender::start(settings(to)).unwrap();
    let first = heard(&receiver, "a first", |_| true);
    assert_eq!((first.heartbeat.sequence, first.stands_for), (1, 1));
    assert_eq!(first.heartbeat.state, SenderState::Starting);
    for sequence in 2..=25 {
        let next = heard(&receiver, "the next", |_| true);
        assert_eq!(next.heartbeat.sequence, sequence);
        assert_eq!(next.heartbeat.incarnation, first.heartbeat.incarnation);
        if sequence == 25 {
            let took = next.at - first.at;
            // 24 intervals of 20 ms, the first of which is shorter where a busy
            // machine sends the first heartbeat late; it may also skip some.
            assert!(took >= Duration::from_millis(455), "{took:?}");
        }
    }
    assert!(sender.sent() >= 25);
    assert_eq!(sender.failed().0, 0);
}

#[test]
fn what_is_set_is_sent_and_a_state_at_once() {
    let (receiver, to) = receiver();
    let hour = SenderSettings { interval: Duration::from_secs(3600), ..settings(to) };
    let sender = Sender::start(hour).unwrap();
    heard(&receiver, "a first", |_| true);
    sender.set_weight(9);
    sender.set_load(2_000);
    sender.set_in_flight(70_000);
    sender.set_state(SenderState::Ready);
    let ready = heard(&receiver, "news", |_| true).heartbeat;
    assert_eq!(ready.state, SenderState::Ready);
    assert_eq!((ready.weight, ready.load, ready.in_flight), (9, 1_000, 70_000));
}

#[test]
fn a_closed_sender_says_so_and_is_silent() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let sender = Sender::start(settings(socket.local_addr().unwrap())).unwrap();
    sender.set_state(SenderState::Ready);
    sender.close();
    let (mut states, mut buffer) = (Vec::new(), [0; 512]);
    while let Ok(length) = socket.recv(&mut buffer) {
        states.push(ParsedHeartbeat::read(&buffer[..length]).unwrap().state);
    }
    let stopping = states.iter().filter(|state| **state == SenderState::Stopping).count();
    assert_eq!(stopping, STOPPING_COUNT as usize);
    assert!(states.ends_with(&[SenderState::Stopping; STOPPING_COUNT as usize]), "{states:?}");
}

#[test]
fn missing_receiver_does_not_stop_the_sender() {
    let (receiver, to) = receiver();
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let both = SenderSettings { to: vec![nobody, to, "[::1]:9".parse().unwrap()], ..settings(to) };
    let _sender = Sender::start(both).unwrap();
    heard(&receiver, "the tenth", |arrived| arrived.heartbeat.sequence == 10);
}
