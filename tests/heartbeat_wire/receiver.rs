//! The receiver: what it hands on, counts, and keeps over a reload.

use crate::place::{PATIENCE, gate, heard, key, receiver, secret, settings};
use crate::wait::eventually;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};
use tidegate_daemon::heartbeat::receive::Receiver;
use tidegate_daemon::heartbeat::verify::RejectReason;
use tidegate_heartbeat::keys::{HeartbeatKey, KeyRing};
use tidegate_heartbeat::sender::Sender;

#[test]
fn heartbeats_are_counted_by_what_became_of_them() {
    let (receiver, to) = receiver();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"hello", to).unwrap();
    socket.send_to(&[0; 1_400], to).unwrap();
    let _sender = Sender::start(settings(to)).unwrap();
    heard(&receiver, "a fifth", |arrived| arrived.heartbeat.sequence == 5);
    let counts = receiver.counts();
    assert_eq!(counts.rejected(RejectReason::Malformed), 2);
    assert!(counts.accepted() >= 5);
    assert_eq!(
        (counts.dropped(), counts.coalesced(), counts.rejected(RejectReason::Replayed)),
        (0, 0, 0)
    );
}

#[test]
fn the_control_thread_is_woken() {
    let (receiver, to) = receiver();
    let _sender = Sender::start(settings(to)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        for _ in 0..5 {
            let arrived = receiver.arrived();
            tokio::time::timeout(PATIENCE, arrived).await.expect("woken");
            while receiver.pop().is_some() {}
        }
    });
}

#[test]
fn arrival_is_when_the_kernel_received_it_not_when_it_was_asked_for() {
    let (receiver, to) = receiver();
    let before = Instant::now();
    let _sender = Sender::start(settings(to)).unwrap();
    eventually(PATIENCE, "ten", || receiver.counts().accepted() >= 10);
    let (first, tenth) = (receiver.pop().unwrap(), Instant::now());
    assert!(first.at >= before - Duration::from_millis(1), "not before it was sent");
    // A first that is sent late shortens the first of the nine intervals since.
    assert!(tenth - first.at >= Duration::from_millis(150), "{:?}", tenth - first.at);
}

#[test]
fn keys_are_replaced_without_losing_the_socket_or_a_sender() {
    let (receiver, to) = receiver();
    let _sender = Sender::start(settings(to)).unwrap();
    heard(&receiver, "a first", |_| true);
    let other = HeartbeatKey { id: 8, secret: secret(), ..key() };
    receiver.set_keys(KeyRing::new([other.clone()]).unwrap());
    let unknown = || receiver.counts().rejected(RejectReason::UnknownKey);
    eventually(PATIENCE, "a refusal", || unknown() > 0);
    receiver.set_keys(KeyRing::new([other, key()]).unwrap());
    let refused = unknown();
    heard(&receiver, "belief again", |arrived| arrived.heartbeat.sequence > refused);
    assert_eq!(receiver.addresses(), [to]);
}

#[test]
fn addresses_come_and_go_and_the_ones_that_stay_lose_nothing() {
    let kept: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let (receiver, to) = receiver();
    let _sender = Sender::start(settings(to)).unwrap();
    heard(&receiver, "a first", |_| true);
    let prepared = receiver.prepare(&[kept, "127.0.0.2:0".parse().unwrap()]).unwrap();
    receiver.commit(prepared);
    let addresses = receiver.addresses();
    assert_eq!((addresses.len(), addresses[0]), (2, to));
    let _second = Sender::start(settings(addresses[1])).unwrap();
    // Its incarnation is newer, so only what came to the new address is.
    let first =
        heard(&receiver, "one on the new address", |arrived| arrived.heartbeat.sequence == 1);
    let again = receiver.prepare(&[kept]).unwrap();
    receiver.commit(again);
    let old = || receiver.counts().rejected(RejectReason::OldIncarnation);
    let before = old();
    eventually(PATIENCE, "the old address is still heard", || old() > before + 3);
    eventually(PATIENCE, "the new one is closed", || UdpSocket::bind(addresses[1]).is_ok());
    assert!(first.heartbeat.incarnation > 0);
}

#[test]
fn an_address_that_is_taken_is_refused_and_nothing_changes() {
    let (receiver, to) = receiver();
    let holder = UdpSocket::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    assert!(receiver.prepare(&["127.0.0.1:0".parse().unwrap(), taken]).is_err());
    assert!(Receiver::start(&[taken], gate()).is_err());
    drop(holder);
    assert_eq!(receiver.addresses(), [to]);
    let _sender = Sender::start(settings(to)).unwrap();
    heard(&receiver, "a first", |_| true);
}

#[test]
fn a_wildcard_may_be_narrowed_on_the_same_port() {
    let receiver = Receiver::start(&["0.0.0.0:0".parse().unwrap()], gate()).unwrap();
    let port = receiver.addresses()[0].port();
    let narrow = SocketAddr::new("127.0.0.1".parse().unwrap(), port);
    let _sender = Sender::start(settings(narrow)).unwrap();
    heard(&receiver, "a first", |_| true);
    receiver.commit(receiver.prepare(&[narrow]).unwrap());
    assert_eq!(receiver.addresses(), [narrow]);
    let accepted = receiver.counts().accepted();
    heard(&receiver, "more", |arrived| arrived.heartbeat.sequence > accepted + 3);
}

#[test]
fn a_dropped_receiver_frees_its_address() {
    let (receiver, to) = receiver();
    drop(receiver);
    eventually(PATIENCE, "the address is free", || UdpSocket::bind(to).is_ok());
}
