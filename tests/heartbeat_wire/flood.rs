//! A flood of forged datagrams, among which valid heartbeats must arrive.

use crate::setup::{receiver, secret, settings};
use std::net::UdpSocket;
use std::time::{Duration, Instant};
use tidegate_daemon::heartbeat::verify::RejectReason;
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::sender::Sender;
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

/// Forged datagrams per second. A debug build cannot make as many.
const RATE: u64 = if cfg!(debug_assertions) { 20_000 } else { 100_000 };

const LASTS: Duration = Duration::from_secs(3);

/// The most expensive datagram to reject: the longest, with only the tag wrong.
fn forged() -> Vec<u8> {
    let identity =
        SenderIdentity::new("web", &"x".repeat(64), "[fd00::1]:80".parse().unwrap()).unwrap();
    let draft = HeartbeatFields {
        identity: &identity,
        key_id: 7,
        incarnation: u64::MAX,
        sequence: u64::MAX,
        sent: u64::MAX,
        interval: Duration::from_millis(100),
        state: SenderState::Stopping,
        weight: 1,
        in_flight: 0,
        load: 0,
    };
    let mut bytes = encode(&draft, &secret()).to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    bytes
}

/// CPU time of the thread `name` of this process (proc(5), schedstat).
fn cpu_time(name: &str) -> Duration {
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        if std::fs::read_to_string(task.join("comm")).unwrap_or_default().trim() == name {
            let stat = std::fs::read_to_string(task.join("schedstat")).unwrap();
            return Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap());
        }
    }
    panic!("no thread {name}");
}

/// Sends at [`RATE`] in bursts of 1 ms. Returns the number of datagrams sent.
fn flood(to: std::net::SocketAddr) -> u64 {
    let (socket, forged) = (UdpSocket::bind("127.0.0.1:0").unwrap(), forged());
    let (began, mut sent) = (Instant::now(), 0);
    while began.elapsed() < LASTS {
        let due = began.elapsed().as_micros() as u64 * RATE / 1_000_000;
        while sent < due {
            let _ = socket.send_to(&forged, to);
            sent += 1;
        }
        // The rate is kept in batches of 1 ms.
        std::thread::sleep(Duration::from_millis(1));
    }
    sent
}

#[test]
fn forged_flood_is_rejected_cheaply_and_no_heartbeat_is_lost() {
    let (receiver, to) = receiver();
    let _sender = Sender::start(settings(to)).unwrap();
    crate::setup::next_heartbeat(&receiver, "a first, so that the source is known", |_| true);
    let (before, began) = (cpu_time("heartbeats"), Instant::now());
    let sent = flood(to);
    let (took, used) = (began.elapsed(), cpu_time("heartbeats") - before);

    let (counts, mut last, mut missing) = (receiver.counts(), 1, 0);
    while let Some(arrived) = receiver.pop() {
        missing += arrived.heartbeat.sequence - last - 1;
        last = arrived.heartbeat.sequence;
    }
    let share = used.as_secs_f64() / took.as_secs_f64();
    let each = used / u32::try_from(sent).unwrap();
    println!(
        "{sent} forged in {took:?} ({RATE} per second): {share:.3} of a core, {each:?} each; \
         {} rejected by signature, {} dropped by the kernel, {missing} of {last} heartbeats missing",
        counts.rejected(RejectReason::Signature),
        counts.kernel_drops()
    );
    assert!(last > 20, "a heartbeat every 20 ms for three seconds: {last}");
    assert!(missing <= counts.dropped(), "a missing heartbeat is not counted as dropped");
    assert!(counts.rejected(RejectReason::Signature) > 0);
    if !cfg!(debug_assertions) {
        assert!(share < 0.5, "{share}");
    }
}
