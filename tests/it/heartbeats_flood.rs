//! Forged heartbeats by the thousand while a backend dies: the true death is
//! seen no later for it.

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

/// Forged datagrams a second; an unoptimised build cannot make and refuse as
/// many.
const RATE: u64 = if cfg!(debug_assertions) { 20_000 } else { 100_000 };

/// Deaths in quiet and in the flood, in turn.
const ROUNDS: usize = 5;

/// As the sidecars of these tests send.
const INTERVAL: Duration = Duration::from_millis(50);

/// Right in everything but its tag: as dear as possible to refuse.
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

/// Sends at [`RATE`] in bursts of a millisecond while it is wanted.
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

/// How long a backend that dies without a word goes on being eligible; `begin`
/// makes the noise it dies in. It has joined before: newcomers are held back in
/// a flood from their own address.
fn time_to_see_a_death(
    keys: &Keys,
    proxy: &TestProxy,
    name: &str,
    begin: impl FnOnce(),
) -> Duration {
    let mut dying = ScriptedBackend::start(backend::name(name));
    let mut sidecar = keys.sidecar(name, &dying);
    wait(proxy, "web", name, "eligible", true);
    // The detector trusts a newcomer's rhythm only after some beats.
    proxy.wait_beats("web", name, 20);
    begin();
    sidecar.kill();
    dying.stop();
    let died = Instant::now();
    wait(proxy, "web", name, "eligible", false);
    died.elapsed()
}

/// Ends the flood, in a panic too: the scope would wait for it for ever.
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
    fn forgeries_delay_the_sight_of_a_death_by_no_more_than_an_interval() {
        let _share = exclusive::alone();
        let keys = Keys::new();
        let pool = format!("register = true\ninterval = \"{}ms\"", INTERVAL.as_millis());
        let proxy = keys.start(Pool::new("web").heartbeat(&pool));
        let others: Vec<_> =
            ["x", "y", "z"].map(|n| ScriptedBackend::start(backend::name(n))).into();
        let _beating: Vec<_> =
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
                    times.push(time_to_see_a_death(&keys, &proxy, &name, || {
                        if flooded == 1 {
                            let half_a_second = sent.load(Ordering::Relaxed) + RATE / 2;
                            wanted.store(true, Ordering::Relaxed);
                            eventually(secs(10), "it is flooded", || {
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
            "median death seen after {quiet:?} in quiet, {flooded:?} among {} forgeries",
            sent.into_inner()
        ));
        assert!(refused > 1_000.0, "{refused} refused: the flood arrived");
        assert!(flooded <= quiet + INTERVAL, "{flooded:?} against {quiet:?}");
    }
}
