//! Caps over the processes of an upgrade: both count in the same memory, so no moment
//! shows more sessions than a cap allows, and nothing of it is lost with a process.
//!
//! The backend counts, not the balancer.

use crate::common::backend::{ScriptedBackend, script};
use crate::common::client::connect;
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{
    Engine, eventually, ms, on_every_engine, on_every_engine_alone, patience, proc, secs,
};
use rustix::process::Signal;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

on_every_engine!(
    what_a_killed_process_held_is_free_soon,
    a_new_process_that_is_killed_leaves_its_slots_to_the_old_one,
);
on_every_engine_alone!(
    a_backends_cap_holds_through_twenty_upgrades,
    a_frontends_cap_holds_through_twenty_upgrades,
    the_processes_cap_holds_through_twenty_upgrades,
    a_cap_holds_while_old_processes_are_killed,
    a_slot_the_old_process_gives_back_is_taken_within_10_ms,
);

const CAP: u64 = 10;

/// What has a cap.
#[derive(Debug, Clone, Copy)]
enum Capped {
    Backend,
    Frontend,
    Process,
}

/// Greets, and ends its connection the moment the client's end is seen, before the
/// balancer can count the slot free.
fn greeting_backend() -> ScriptedBackend {
    ScriptedBackend::start(script(|conn| {
        let _ = conn.write_all(b"x");
        conn.drain();
    }))
}

fn conf(engine: Engine, backend: &ScriptedBackend, capped: Capped, pool_keys: &str) -> Conf {
    let cap = format!("connections_max = {CAP}");
    let [of_backend, of_frontend, of_process] = match capped {
        Capped::Backend => [&*cap, "", ""],
        Capped::Frontend => ["", &cap, ""],
        Capped::Process => ["", "", &cap],
    };
    let pool = Pool::new("web").key(pool_keys).backend_with("a", backend.address(), of_backend);
    let conf = Conf::new(engine).frontend("web", "web", of_frontend).pool(pool);
    conf.process(of_process).process("drain_timeout = \"60s\"")
}

/// Clients that come and go, many more than the cap lets in.
struct Storm {
    stop: AtomicBool,
    served: AtomicU64,
    failed: AtomicU64,
}

impl Storm {
    const CLIENTS: u64 = 64;

    /// Runs until `during` is over; gives how many sessions were served, and how many
    /// failed.
    fn around(address: SocketAddr, during: impl FnOnce(&Storm)) -> (u64, u64) {
        let storm = Storm { stop: AtomicBool::new(false), served: 0.into(), failed: 0.into() };
        std::thread::scope(|scope| {
            for client in 0..Storm::CLIENTS {
                let storm = &storm;
                scope.spawn(move || storm.come_and_go(address, client));
            }
            // A failed assertion ends the clients, too.
            let stop = StopAtEnd(&storm);
            during(&storm);
            drop(stop);
        });
        (storm.served.into_inner(), storm.failed.into_inner())
    }

    fn come_and_go(&self, address: SocketAddr, client: u64) {
        let mut rng = fastrand::Rng::with_seed(client);
        while !self.stop.load(Ordering::Relaxed) {
            let stream = connect(address);
            let came = (&stream).read_exact(&mut [0]);
            let counted = if came.is_ok() { &self.served } else { &self.failed };
            counted.fetch_add(1, Ordering::Relaxed);
            if came.is_ok() && !self.stop.load(Ordering::Relaxed) {
                std::thread::sleep(ms(rng.u64(50..500)));
            }
        }
    }
}

struct StopAtEnd<'a>(&'a Storm);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

fn greeted(address: SocketAddr) -> TcpStream {
    let stream = connect(address);
    (&stream).read_exact(&mut [0]).expect("a greeting");
    stream
}

/// Whether nobody serves that client for a while.
fn waits(stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(ms(300))).unwrap();
    let came = (&*stream).read_exact(&mut [0]);
    stream.set_read_timeout(Some(patience(secs(20)))).unwrap();
    came.is_err()
}

/// Every slot can be taken, and not one more.
#[track_caller]
fn whole_cap_is_there(proxy: &TestProxy, backend: &ScriptedBackend) {
    eventually(secs(10), "all sessions are over", || backend.active() == 0);
    let held: Vec<TcpStream> = (0..CAP).map(|_| greeted(proxy.addr("web"))).collect();
    let one_more = connect(proxy.addr("web"));
    assert!(waits(&one_more), "let in beyond the cap");
    assert_eq!(backend.active(), CAP);
    drop(held);
    (&one_more).read_exact(&mut [0]).expect("its turn");
    drop(one_more);
    eventually(secs(10), "all sessions are over", || backend.active() == 0);
}

fn holds_through_twenty_upgrades(engine: Engine, capped: Capped) {
    let backend = greeting_backend();
    let mut proxy = TestProxy::start(conf(engine, &backend, capped, ""));
    let mut olds = Vec::new();
    let (served, failed) = Storm::around(proxy.addr("web"), |_| {
        for round in 1..=20 {
            olds.push(proxy.upgrade());
            std::thread::sleep(ms(100));
            assert!(backend.active_peak() <= CAP, "upgrade {round}: {}", backend.active_peak());
        }
    });
    assert_eq!((backend.active_peak(), failed), (CAP, 0), "of {served} sessions");
    assert!(served > 60, "{served} sessions");
    for old in olds {
        proxy.wait_gone(old, secs(20));
    }
    whole_cap_is_there(&proxy, &backend);
    assert_eq!(backend.active_peak(), CAP);
    proxy.rebaseline();
}

fn a_backends_cap_holds_through_twenty_upgrades(engine: Engine) {
    holds_through_twenty_upgrades(engine, Capped::Backend);
}

fn a_frontends_cap_holds_through_twenty_upgrades(engine: Engine) {
    holds_through_twenty_upgrades(engine, Capped::Frontend);
}

fn the_processes_cap_holds_through_twenty_upgrades(engine: Engine) {
    holds_through_twenty_upgrades(engine, Capped::Process);
}

fn a_cap_holds_while_old_processes_are_killed(engine: Engine) {
    let backend = greeting_backend();
    let mut proxy = TestProxy::start(conf(engine, &backend, Capped::Backend, ""));
    let (served, _) = Storm::around(proxy.addr("web"), |_| {
        for round in 1..=8 {
            let old = proxy.upgrade();
            std::thread::sleep(ms(30));
            proc::signal(old, Signal::KILL);
            proxy.wait_gone(old, secs(5));
            std::thread::sleep(ms(400));
            assert!(backend.active_peak() <= CAP, "upgrade {round}: {}", backend.active_peak());
        }
    });
    assert!(served > 50, "{served} sessions");
    whole_cap_is_there(&proxy, &backend);
    assert_eq!(backend.active_peak(), CAP);
    proxy.rebaseline();
}

fn what_a_killed_process_held_is_free_soon(engine: Engine) {
    for capped in [Capped::Backend, Capped::Frontend, Capped::Process] {
        let backend = greeting_backend();
        let mut proxy = TestProxy::start_single(conf(engine, &backend, capped, ""));
        // Two processes drain, each with a part of the cap.
        let mut held: Vec<TcpStream> = (0..6).map(|_| greeted(proxy.addr("web"))).collect();
        let first = proxy.upgrade();
        held.extend((6..CAP).map(|_| greeted(proxy.addr("web"))));
        let second = proxy.upgrade();
        let waiting: Vec<TcpStream> = (0..CAP).map(|_| connect(proxy.addr("web"))).collect();
        assert!(waits(&waiting[0]), "{capped:?}: let in beyond the cap");
        assert_eq!(backend.active(), CAP, "{capped:?}");
        for (killed, freed) in [(first, 6), (second, CAP)] {
            proc::signal(killed, Signal::KILL);
            proxy.wait_gone(killed, secs(5));
            let accepted = || backend.accepted() - CAP;
            eventually(secs(5), "as many are let in as the killed process held", || {
                accepted() == freed
            });
            assert!(backend.active_peak() <= CAP, "{capped:?}: {}", backend.active_peak());
        }
        for stream in &waiting {
            (&*stream).read_exact(&mut [0]).expect("a greeting");
        }
        drop((held, waiting));
        whole_cap_is_there(&proxy, &backend);
    }
}

/// The successor serves, holds slots, and ends within its first second.
fn a_new_process_that_is_killed_leaves_its_slots_to_the_old_one(engine: Engine) {
    let backend = greeting_backend();
    let mut proxy = TestProxy::start_single(conf(engine, &backend, Capped::Backend, ""));
    let held: Vec<TcpStream> = (0..5).map(|_| greeted(proxy.addr("web"))).collect();
    let old = proxy.upgrade();
    let of_the_new: Vec<TcpStream> = (5..CAP).map(|_| greeted(proxy.addr("web"))).collect();
    let new = proxy.pid();
    proc::signal(new, Signal::KILL);
    proxy.serve_by(old);
    let log = "new process exited; this process accepts connections again";
    eventually(secs(5), "the old one serves", || proxy.log().contains(log));
    let next: Vec<TcpStream> = (5..CAP).map(|_| greeted(proxy.addr("web"))).collect();
    assert!(waits(&connect(proxy.addr("web"))), "let in beyond the cap");
    drop((held, of_the_new, next));
    whole_cap_is_there(&proxy, &backend);
    assert_eq!(backend.active_peak(), CAP);
}

fn a_slot_the_old_process_gives_back_is_taken_within_10_ms(engine: Engine) {
    for (capped, pool_keys) in [
        (Capped::Backend, ""),
        (Capped::Backend, "queue_max = 5\nqueue_timeout = \"60s\""),
        (Capped::Frontend, ""),
        (Capped::Process, ""),
    ] {
        let backend = greeting_backend();
        let mut proxy = TestProxy::start(conf(engine, &backend, capped, pool_keys));
        let mut old: Vec<TcpStream> = (0..CAP).map(|_| greeted(proxy.addr("web"))).collect();
        proxy.upgrade();
        let (mut took, mut taken) = (Vec::new(), Vec::new());
        while let Some(given_back) = old.pop() {
            let waiting = connect(proxy.addr("web"));
            assert!(waits(&waiting), "{capped:?}: let in beyond the cap");
            let began = Instant::now();
            drop(given_back);
            (&waiting).read_exact(&mut [0]).expect("its turn");
            took.push(began.elapsed());
            taken.push(waiting);
        }
        took.sort();
        let (median, worst): (Duration, Duration) = (took[took.len() / 2], took[took.len() - 1]);
        println!("{capped:?} {pool_keys:?}: median {median:.2?}, worst {worst:.2?}");
        assert!(median <= patience(ms(10)), "{capped:?} {pool_keys:?}: {took:?}");
    }
}
