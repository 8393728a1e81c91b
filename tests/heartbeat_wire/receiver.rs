//! The receiver: what it delivers, counts, and keeps across a reload.

use crate::setup::{PATIENCE, gate, key, next_heartbeat, receiver, secret, settings};
use crate::wait::eventually;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};
use tidegate_daemon::heartbeat::receive::Receiver;
use tidegate_daemon::heartbeat::verify::RejectReason;
use tidegate_heartbeat::keys::{HeartbeatKey, KeyRing};
use tidegate_heartbeat::sender::Sender;

#[test]
fn heartbeats_are_counted_by_result() {
    let (receiver, to) = receiver();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"hello", to).unwrap();
    socket.send_to(&[0; 1_400], to).unwrap();
    let _sender = Sender::start(settings(to)).unwrap();
    next_heartbeat(&receiver, "a fifth", |arrived| arrived.heartbeat.sequence == 5);
    let counts = receiver.counts();
    assert_eq!(counts.rejected(RejectReason::Malformed), 2);
    assert!(counts.accepted() >= 5);
    assert_eq!(
        (counts.dropped(), counts.coalesced(), counts.rejected(RejectReason::Replayed)),
        (0, 0, 0)
    );
}

#[test]
fn control_thread_is_woken() {
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
fn arrival_time_is_that_of_the_kernel() {
    let (receiver, to) = receiver();
    let before = Instant::now();
    let _sender = Sender::start(settings(to)).unwrap();
    eventually(PATIENCE, "ten", || receiver.counts().accepted() >= 10);
    let (first, tenth) = (receiver.pop().unwrap(), Instant::now());
    assert!(first.at >= before - Duration::from_millis(1), "not before the send");
    // If the first heartbeat is sent late, the first of the nine intervals is shorter.
    assert!(tenth - first.at >= Duration::from_millis(150), "{:?}", tenth - first.at);
}

#[test]
fn keys_are_replaced_without_losing_the_socket_or_a_sender() {
    let (receiver, to) = receiver();
    let _sender = Sender::start(settings(to)).unwrap();
    next_heartbeat(&receiver, "a first", |_| true);
    let other = HeartbeatKey { id: 8, secret: secret(), ..key() };
    receiver.set_keys(KeyRing::new([other.clone()]).unwrap());
    let unknown = || receiver.counts().rejected(RejectReason::UnknownKey);
    eventually(PATIENCE, "a rejection", || unknown() > 0);
    receiver.set_keys(KeyRing::new([other, key()]).unwrap());
    let refused = unknown();
    next_heartbeat(&receiver, "an accepted heartbeat", |arrived| {
        arrived.heartbeat.sequence > refused
    });
    assert_eq!(receiver.addresses(), [to]);
}

#[test]
fn addresses_can_be_added_and_removed_without_loss() {
    let kept: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let (receiver, to) = receiver();
    let _sender = Sender::start(settings(to)).unwrap();
    next_heartbeat(&receiver, "a first", |_| true);
    let prepared = receiver.prepare(&[kept, "127.0.0.2:0".parse().unwrap()]).unwrap();
    receiver.commit(prepared);
    let addresses = receiver.addresses();
    assert_eq!((addresses.len(), addresses[0]), (2, to));
    let _second = Sender::start(settings(addresses[1])).unwrap();
    // The second sender has a newer incarnation, so only heartbeats on the new address are
    // accepted.
    let first = next_heartbeat(&receiver, "a heartbeat on the new address", |arrived| {
        arrived.heartbeat.sequence == 1
    });
    let again = receiver.prepare(&[kept]).unwrap();
    receiver.commit(again);
    let old = || receiver.counts().rejected(RejectReason::OldIncarnation);
    let before = old();
    eventually(PATIENCE, "the old address still receives", || old() > before + 3);
    eventually(PATIENCE, "the new address is closed", || UdpSocket::bind(addresses[1]).is_ok());
    assert!(first.heartbeat.incarnation > 0);
}

#[test]
fn address_in_use_is_rejected_and_changes_nothing() {
    let (receiver, to) = receiver();
    let holder = UdpSocket::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    assert!(receiver.prepare(&["127.0.0.1:0".parse().unwrap(), taken]).is_err());
    assert!(Receiver::start(&[taken], gate()).is_err());
    drop(holder);
    assert_eq!(receiver.addresses(), [to]);
    let _sender = Sender::start(settings(to)).unwrap();
    next_heartbeat(&receiver, "a first", |_| true);
}

#[test]
fn wildcard_can_be_narrowed_on_the_same_port() {
    let receiver = Receiver::start(&["0.0.0.0:0".parse().unwrap()], gate()).unwrap();
    let port = receiver.addresses()[0].port();
    let narrow = SocketAddr::new("127.0.0.1".parse().unwrap(), port);
    let _sender = Sender::start(settings(narrow)).unwrap();
    next_heartbeat(&receiver, "a first", |_| true);
    receiver.commit(receiver.prepare(&[narrow]).unwrap());
    assert_eq!(receiver.addresses(), [narrow]);
    let accepted = receiver.counts().accepted();
    next_heartbeat(&receiver, "more", |arrived| arrived.heartbeat.sequence > accepted + 3);
}

#[test]
fn dropped_receiver_frees_its_address() {
    let (receiver, to) = receiver();
    drop(receiver);
    eventually(PATIENCE, "the address is free", || UdpSocket::bind(to).is_ok());
}
