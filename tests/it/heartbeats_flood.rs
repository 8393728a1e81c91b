//! Thousands of forged heartbeats while a backend fails: they must not delay the detection.

use super::heartbeats::{Keys, wait};
use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::Pool;
use crate::common::proxy::TestProxy;
use crate::common::{eventually, exclusive, measured, ms, secs};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tidegate_heartbeat::SenderState;
use tidegate_heartbeat::keys::Secret;
use tidegate_heartbeat::wire::{HeartbeatFields, SenderIdentity, encode};

/// Forged datagrams per second. A debug build cannot make and reject as many.
const RATE: u64 = if cfg!(debug_assertions) { 20_000 } else { 100_000 };

/// Failures without and with a flood, in turn.
const ROUNDS: usize = 3;

/// The heartbeat interval of the sidecars in these tests.
const INTERVAL: Duration = Duration::from_millis(50);

/// A datagram with a valid header and a wrong tag, which is the most expensive to reject.
fn forged() -> Vec<u8> {
    let identity = SenderIdentity::new("web", "a0", "127.0.0.1:80".parse().unwrap()).unwrap();
    let draft = HeartbeatFields {
        identity: &identity,
        key_id: 1,
        incarnation: u64::MAX,
        sequence: u64::MAX,
        sent: u64::MAX,
        interval: INTERVAL,
        state: SenderState::Ready,
        weight: 1,
        in_flight: 0,
        load: 0,
    };
    encode(&draft, &Secret::new(&[9; 32]).unwrap()).to_vec()
}

/// Sends at [`RATE`] in bursts of 1 ms while `wanted` is set, until `over` is set.
fn flood(to: SocketAddr, wanted: &AtomicBool, over: &AtomicBool, sent: &AtomicU64) {
    let (socket, forged) = (UdpSocket::bind("127.0.0.1:0").unwrap(), forged());
    while !over.load(Ordering::Relaxed) {
        let (began, mut here) = (Instant::now(), 0);
        while wanted.load(Ordering::Relaxed) {
            let due = began.elapsed().as_micros() as u64 * RATE / 1_000_000;
            while here < due {
                let _ = socket.send_to(&forged, to);
                here += 1;
                sent.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(ms(1));
        }
        std::thread::sleep(ms(1));
    }
}

/// Returns the time from a backend's failure to its removal from rotation. `begin` starts
/// the flood after the backend has registered, because a flood delays registrations from
/// the same address.
fn detection_time(keys: &Keys, proxy: &TestProxy, name: &str, begin: impl FnOnce()) -> Duration {
    let mut failing = ScriptedBackend::start(backend::name(name));
    let mut sidecar = keys.sidecar(name, &failing);
    wait(proxy, "web", name, "eligible", true);
    // The detector needs some heartbeats before it relies on their interval.
    proxy.wait_heartbeats("web", name, 20);
    begin();
    sidecar.kill();
    failing.stop();
    let died = Instant::now();
    wait(proxy, "web", name, "eligible", false);
    died.elapsed()
}

/// Ends the flood even after a panic. Otherwise the thread scope would wait forever.
struct Ends<'a>(&'a AtomicBool, &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
        self.0.store(false, Ordering::Relaxed);
    }
}

mod alone {
    use super::*;

    #[test]
    fn forged_heartbeats_delay_detection_by_at_most_one_interval() {
        let _share = exclusive::alone();
        let keys = Keys::new();
        let pool = format!("register = true\ninterval = \"{}ms\"", INTERVAL.as_millis());
        let proxy = keys.start(Pool::new("web").heartbeat(&pool));
        let others: Vec<_> =
            ["x", "y", "z"].map(|n| ScriptedBackend::start(backend::name(n))).into();
        let _sidecars: Vec<_> =
            ["x", "y", "z"].iter().zip(&others).map(|(n, b)| keys.sidecar(n, b)).collect();
        wait(&proxy, "web", "z", "eligible", true);
        let (wanted, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let (sent, to) = (AtomicU64::new(0), keys.to());
        let mut took = [Vec::new(), Vec::new()];
        std::thread::scope(|scope| {
            scope.spawn(|| flood(to, &wanted, &over, &sent));
            let _ends = Ends(&wanted, &over);
            for round in 0..ROUNDS {
                for (flooded, times) in took.iter_mut().enumerate() {
                    let name = format!("a{round}-{flooded}");
                    times.push(detection_time(&keys, &proxy, &name, || {
                        if flooded == 1 {
                            let half_a_second = sent.load(Ordering::Relaxed) + RATE / 2;
                            wanted.store(true, Ordering::Relaxed);
                            eventually(secs(10), "the flood has started", || {
                                sent.load(Ordering::Relaxed) > half_a_second
                            });
                        }
                    }));
                    wanted.store(false, Ordering::Relaxed);
                }
            }
        });
        took.iter_mut().for_each(|times| times.sort());
        let [quiet, flooded] = took.map(|times| times[ROUNDS / 2]);
        let refused = proxy.metric("tidegate_heartbeats_rejected_total", &[]);
        measured(&format!(
            "median detection time {quiet:?} without a flood, {flooded:?} with {} forged datagrams",
            sent.into_inner()
        ));
        assert!(refused > 1_000.0, "only {refused} rejected datagrams");
        assert!(flooded <= quiet + INTERVAL, "{flooded:?} against {quiet:?}");
    }
}
