//! The sender: its interval, immediate state changes and the final heartbeats.

use crate::setup::{next_heartbeat, receiver, settings};
use std::net::UdpSocket;
use std::time::Duration;
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::sender::{STOPPING_COUNT, Sender, SenderSettings};
use tidegate_heartbeat::wire::ParsedHeartbeat;

#[test]
fn heartbeats_arrive_at_their_interval() {
    let (receiver, to) = receiver();
    let sender = Sender::start(settings(to)).unwrap();
    let first = next_heartbeat(&receiver, "a first", |_| true);
    assert_eq!((first.heartbeat.sequence, first.stands_for), (1, 1));
    assert_eq!(first.heartbeat.state, SenderState::Starting);
    for sequence in 2..=25 {
        let next = next_heartbeat(&receiver, "the next", |_| true);
        assert_eq!(next.heartbeat.sequence, sequence);
        assert_eq!(next.heartbeat.incarnation, first.heartbeat.incarnation);
        if sequence == 25 {
            let took = next.at - first.at;
            // 24 intervals of 20 ms. The first interval is shorter if a busy machine sends the
            // first
            // heartbeat late. The sender can also skip intervals.
            assert!(took >= Duration::from_millis(455), "{took:?}");
        }
    }
    assert!(sender.sent() >= 25);
    assert_eq!(sender.failed().0, 0);
}

#[test]
fn new_values_are_sent_and_a_state_change_at_once() {
    let (receiver, to) = receiver();
    let hour = SenderSettings { interval: Duration::from_secs(3600), ..settings(to) };
    let sender = Sender::start(hour).unwrap();
    next_heartbeat(&receiver, "a first", |_| true);
    sender.set_weight(9);
    sender.set_load(2_000);
    sender.set_in_flight(70_000);
    sender.set_state(SenderState::Ready);
    let ready = next_heartbeat(&receiver, "the new state", |_| true).heartbeat;
    assert_eq!(ready.state, SenderState::Ready);
    assert_eq!((ready.weight, ready.load, ready.in_flight), (9, 1_000, 70_000));
}

#[test]
fn closed_sender_sends_stopping_and_nothing_more() {
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
    let unused = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let both = SenderSettings { to: vec![unused, to, "[::1]:9".parse().unwrap()], ..settings(to) };
    let _sender = Sender::start(both).unwrap();
    next_heartbeat(&receiver, "the tenth", |arrived| arrived.heartbeat.sequence == 10);
}
