//! Storms of clients that reset, or that connect and close. No session and no memory is left,
//! and other clients are served during a storm.

use crate::common::client::{self, connect, connect_from};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{Engine, eventually, long, measured, on_every_engine_alone, secs};
use crate::slow::Service;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_every_engine_alone!(
    reset_storm_affects_no_other_clients_and_no_memory,
    connect_flood_affects_no_other_clients_and_no_memory,
);

/// Allowed growth of memory between two equal storms, for caches.
const LEFT_KIB_MAX: u64 = 2048;

fn lasting() -> Duration {
    if long() { secs(30) } else { secs(1) }
}

fn start(engine: Engine) -> (TestProxy, Service) {
    let backend = Service::start("echo");
    // 28,000 sessions use all ports of one address within the second for which the kernel
    // reserves a port.
    let others = Pool::new("others")
        .key("source = [\"127.0.0.1\", \"127.0.5.1\", \"127.0.5.2\", \"127.0.5.3\"]")
        .backend("a", backend.address);
    let conf = Conf::new(engine).frontend("others", "others", "");
    (TestProxy::start(conf.pool(others)), backend)
}

/// Runs `storm` three times together with other clients. The first run is the warm-up. Returns
/// the sessions per second of the storm and the slowest session of the other clients.
fn run_storm(proxy: &TestProxy, storm: impl Fn() + Sync) -> (f64, Duration) {
    let (mut rate, mut slowest, mut memory) = (0.0_f64, Duration::ZERO, Vec::new());
    let sessions = || proxy.metric("tidegate_sessions_total", &[]);
    for _ in 0..3 {
        let (over, begun, before) = (AtomicBool::new(false), Instant::now(), sessions());
        let mut others = 0_u32;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                storm();
                over.store(true, Ordering::Relaxed);
            });
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                let stream = connect(proxy.addr("others"));
                assert_eq!(client::exchange(&stream, b"well").unwrap(), b"well");
                slowest = slowest.max(start.elapsed());
                others += 1;
            }
        });
        // Every other client was served. A full listen queue delays a client by 1 s.
        assert!(others > 0, "no other client was served");
        rate = rate.max((sessions() - before - f64::from(others)) / begun.elapsed().as_secs_f64());
        eventually(secs(20), "every session has ended", || {
            proxy.metric("tidegate_sessions_active", &[]) == 0.0
        });
        memory.push(proxy.rss_kib());
    }
    measured(&format!(
        "{rate:.0} sessions per second; slowest other session {slowest:.1?}; resident {memory:?} KiB"
    ));
    assert!(memory[2] <= memory[1] + LEFT_KIB_MAX, "{memory:?} KiB after each");
    (rate, slowest)
}

fn reset_storm_affects_no_other_clients_and_no_memory(engine: Engine) {
    let (proxy, _backend) = start(engine);
    let seconds = format!("{}s", lasting().as_secs());
    let to = proxy.addr("others").to_string();
    let (rate, _) = run_storm(&proxy, || {
        let mut storm = Command::new(PROGRAM);
        storm.args(["bench", "--to", &to, "--close", "reset", "--for", &seconds, "short"]);
        assert!(storm.stdout(Stdio::null()).status().expect("run the storm").success());
    });
    assert!(rate > 200.0, "only {rate} sessions per second");
}

fn connect_flood_affects_no_other_clients_and_no_memory(engine: Engine) {
    let (proxy, _backend) = start(engine);
    let address = proxy.addr("others");
    let (rate, _) = run_storm(&proxy, || {
        let until = Instant::now() + lasting();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    // Many addresses, because the ports of one address are soon in TIME-WAIT.
                    for number in 0_u32.. {
                        if Instant::now() >= until {
                            break;
                        }
                        let source = Ipv4Addr::new(127, 0, 4 + thread, (number % 250) as u8);
                        let _ = connect_from(source.into(), address).map(drop);
                    }
                });
            }
        });
    });
    assert!(rate > 200.0, "only {rate} sessions per second");
}
