//! Faults of one backend's host or link, and of the Tidegate process.
//!
//! Partitioned links, killed and stopped backends, a stopped process: faults that need
//! separate hosts. Only sessions on the failed host can be delayed or lost.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::Pool;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, measured, ms, on_every_engine, secs};
use crate::cpu_limit::CpuLimited;
use crate::hosts::Hosts;
use crate::link::channel::Impairment;
use crate::netns::networks_run;
use crate::traffic::{Pace, Traffic, errors};
use rustix::process::Signal;
use std::io::Read;
use std::net::TcpStream;
use std::time::Instant;

on_every_engine!(
    partitioned_backend_is_removed_and_returns,
    killed_backend_fails_no_new_sessions,
    stopped_backend_is_removed_and_keeps_its_sessions,
    stopped_process_counts_no_backend_failures,
    cpu_limited_process_counts_no_backend_failures,
);

/// A probe that the program must answer. The kernel alone cannot.
const ECHO_PROBE: &str = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                          interval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2\nrise = 2";

const TCP_PROBE: &str = "kind = \"tcp\"\ninterval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2";

const PACE: Pace = Pace { at_once: 8, pause: ms(5), patience: secs(10) };

/// A pool with a short connect timeout.
fn quick(pool: Pool) -> Pool {
    pool.key("connect_timeout = \"500ms\"")
}

/// Opens sessions until one is open on each of three backends, which send their names first.
fn a_session_on_each(hosts: &Hosts, proxy: &TestProxy) -> Vec<TcpStream> {
    let names = ["a", "b", "c"];
    let mut open: Vec<Option<TcpStream>> = vec![None, None, None];
    eventually(secs(10), "a session on each backend", || {
        let mut stream = hosts.client.run(|| client::connect(proxy.addr("web")));
        let mut name = [0];
        stream.read_exact(&mut name).unwrap();
        let place = names.iter().position(|backend| backend.as_bytes() == name).unwrap();
        open[place].get_or_insert(stream);
        open.iter().all(Option::is_some)
    });
    open.into_iter().map(|stream| stream.expect("all are open")).collect()
}

fn three_greeting(hosts: &Hosts) -> Vec<ScriptedBackend> {
    hosts.backends.iter().map(|host| host.serve(backend::greet(host.name))).collect()
}

fn partitioned_backend_is_removed_and_returns(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 30);
    let backends = three_greeting(&hosts);
    let proxy =
        hosts.start_and_wait_all_up(hosts.conf(engine, quick(hosts.pool()).probe(TCP_PROBE)));
    let open = a_session_on_each(&hosts, &proxy);
    let (link, cut) = (&hosts.backends[1].link, Instant::now());
    link.partition(true);
    proxy.wait_backend("web", "b", "observation", "down");
    measured(&format!("partitioned link detected after {:?}", cut.elapsed()));
    for stream in [&open[0], &open[2]] {
        assert_eq!(client::exchange(stream, b"still there").unwrap(), b"still there");
    }
    // New sessions go to other backends without delay.
    for _ in 0..10 {
        let start = Instant::now();
        let name = first_byte(&hosts, &proxy);
        assert!(name == b'a' || name == b'c');
        assert!(start.elapsed() < secs(2), "{:?}", start.elapsed());
    }
    link.partition(false);
    proxy.wait_backend("web", "b", "observation", "up");
    eventually(secs(5), "b serves again", || first_byte(&hosts, &proxy) == b'b');
    // TCP survives a partition of a few seconds, so the open session continues.
    assert_eq!(client::exchange(&open[1], b"back again").unwrap(), b"back again");
    assert!(backends.iter().all(|backend| backend.accepted() > 0));
}

fn first_byte(hosts: &Hosts, proxy: &TestProxy) -> u8 {
    let mut byte = [0];
    let mut stream = hosts.client.run(|| client::connect(proxy.addr("web")));
    stream.read_exact(&mut byte).expect("a first byte");
    byte[0]
}

fn killed_backend_fails_no_new_sessions(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 40);
    let mut services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let proxy =
        hosts.start_and_wait_all_up(hosts.conf(engine, quick(hosts.pool()).probe(ECHO_PROBE)));
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), PACE);
    eventually(secs(5), "traffic flows", || traffic.done() > 100);
    let killed = Instant::now();
    services[1].kill();
    let dead = Instant::now();
    proxy.wait_backend("web", "b", "eligible", false);
    measured(&format!("killed backend out of rotation after {:?}", killed.elapsed()));
    services[1] = hosts.backends[1].start_echo();
    proxy.wait_backend("web", "b", "observation", "up");
    let before = proxy.backend("web", "b")["sessions_total"].clone();
    eventually(secs(15), "b serves again", || {
        proxy.backend("web", "b")["sessions_total"] != before
    });
    let sessions = traffic.stop();
    let after =
        sessions.iter().filter(|session| session.began > dead && session.result.is_err()).count();
    let caught = errors(&sessions, killed);
    assert_eq!(after, 0, "sessions that began after the kill failed: {caught:#?}");
    assert!(caught.len() <= PACE.at_once, "{caught:#?}");
}

fn stopped_backend_is_removed_and_keeps_its_sessions(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 50);
    let services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let proxy =
        hosts.start_and_wait_all_up(hosts.conf(engine, quick(hosts.pool()).probe(ECHO_PROBE)));
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), PACE);
    eventually(secs(5), "traffic flows", || traffic.done() > 100);
    let stopped = Instant::now();
    services[1].pause();
    proxy.wait_backend("web", "b", "eligible", false);
    let seen = stopped.elapsed();
    let served = traffic.done();
    services[1].resume();
    proxy.wait_backend("web", "b", "observation", "up");
    eventually(secs(5), "clients of the stopped backend continue", || {
        traffic.done() > served + 100
    });
    let sessions = traffic.stop();
    // Sessions on the stopped backend waited, and none failed.
    assert_eq!(errors(&sessions, stopped), Vec::<String>::new());
    let longest = sessions.iter().map(|session| session.took).max().unwrap();
    measured(&format!("stopped backend detected after {seen:?}; longest session {longest:?}"));
}

/// A pool that removes a backend after a single failed probe or connect, with a link delay so
/// long that probes and connects are always in progress.
fn strict_and_far(hosts: &Hosts) -> Pool {
    let far = Impairment { delay: ms(150), ..Impairment::default() };
    hosts.backends.iter().for_each(|host| host.link.set(far));
    let probe = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                 interval = \"1s\"\ntimeout = \"1s\"\nfall = 1";
    let pool = hosts.pool().key("connect_timeout = \"2s\"");
    pool.probe(probe).ejection("failures = 1")
}

/// Removes the probes before the leak check. With this delay a probe is always in progress, and
/// its socket is not in the descriptor baseline.
fn end_probes(proxy: &mut TestProxy) {
    let mut conf = proxy.conf();
    conf.pool_mut("web").probe = String::new();
    proxy.reload(conf);
}

/// Checks that traffic continues and that no backend has changed its state after the first
/// `known` bytes of the log.
#[track_caller]
fn assert_no_state_changes(hosts: &Hosts, proxy: &TestProxy, traffic: &Traffic, known: usize) {
    let done = traffic.done();
    // Two rounds of sessions, so that every earlier probe has ended.
    eventually(secs(10), "traffic continues", || traffic.done() >= done + 16);
    let said = proxy.log()[known..].to_string();
    assert!(!said.contains(" to="), "{said}");
    for host in &hosts.backends {
        let state = proxy.backend("web", host.name);
        let health = (&state["observation"], &state["ejected"], &state["eligible"]);
        assert_eq!(health, (&"up".into(), &false.into(), &true.into()), "{state:#}");
    }
}

fn stopped_process_counts_no_backend_failures(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 60);
    let _services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let mut proxy = hosts.start_and_wait_all_up(hosts.conf(engine, strict_and_far(&hosts)));
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), PACE);
    eventually(secs(10), "traffic flows", || traffic.done() >= 16);
    let (known, stopped) = (proxy.log().len(), Instant::now());
    for stall in [secs(3), ms(2500)] {
        proxy.signal(Signal::STOP);
        // The stall is the tested condition: seconds without a tick.
        std::thread::sleep(stall);
        proxy.signal(Signal::CONT);
        assert_no_state_changes(&hosts, &proxy, &traffic, known);
    }
    assert_eq!(errors(&traffic.stop(), stopped), Vec::<String>::new());
    end_probes(&mut proxy);
}

fn cpu_limited_process_counts_no_backend_failures(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 65);
    let _services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let mut proxy = hosts.start_and_wait_all_up(hosts.conf(engine, strict_and_far(&hosts)));
    // Several times the load that 1 % of a CPU can handle.
    let pace = Pace { at_once: 64, ..PACE };
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), pace);
    eventually(secs(10), "traffic flows", || traffic.done() >= 128);
    let (known, start) = (proxy.log().len(), Instant::now());
    let before = traffic.done();
    let cpu_limited = CpuLimited::new(&[proxy.pid()]);
    // 1 % of a CPU for a while, so that every probe and connect is late.
    std::thread::sleep(ms(2500));
    let carried = traffic.done() - before;
    measured(&format!("{carried} sessions in 2.5 s of 1 % by {}", cpu_limited.how()));
    drop(cpu_limited);
    assert_no_state_changes(&hosts, &proxy, &traffic, known);
    assert_eq!(errors(&traffic.stop(), start), Vec::<String>::new());
    end_probes(&mut proxy);
}
