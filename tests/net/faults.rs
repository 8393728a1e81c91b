//! One backend's host or link goes; everybody else goes on.
//!
//! Cut links, killed and stopped backends, a stopped balancer, each a thing
//! that only separate hosts can suffer. What may be slow or lost is exactly
//! what was on the host that went.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client;
use crate::common::conf::Pool;
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, measured, ms, on_every_engine, secs};
use crate::hosts::Hosts;
use crate::link::channel::Impairment;
use crate::netns::networks_run;
use crate::starve::Starved;
use crate::traffic::{Pace, Traffic, errors};
use rustix::process::Signal;
use std::io::Read;
use std::net::TcpStream;
use std::time::Instant;

on_every_engine!(
    cut_backend_is_taken_out_and_comes_back,
    killed_backend_costs_new_clients_nothing,
    stopped_backend_is_taken_out_and_keeps_its_sessions,
    stopped_balancer_blames_no_backend,
    starved_balancer_blames_no_backend,
);

/// Asks the program itself, not only its kernel.
const ECHO_PROBE: &str = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                          interval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2\nrise = 2";

const TCP_PROBE: &str = "kind = \"tcp\"\ninterval = \"200ms\"\ntimeout = \"200ms\"\nfall = 2";

const PACE: Pace = Pace { at_once: 8, pause: ms(5), patience: secs(10) };

/// A pool that leaves a silent backend soon.
fn quick(pool: Pool) -> Pool {
    pool.key("connect_timeout = \"500ms\"")
}

/// One open session on each of three backends that say their names first.
fn a_session_on_each(hosts: &Hosts, proxy: &TestProxy) -> Vec<TcpStream> {
    let names = ["a", "b", "c"];
    let mut open: Vec<Option<TcpStream>> = vec![None, None, None];
    eventually(secs(10), "a session on each backend", || {
        let mut stream = hosts.client.run(|| client::connect(proxy.addr("web")));
        let mut name = [0];
        stream.read_exact(&mut name).unwrap();
        let place = names.iter().position(|one| one.as_bytes() == name).unwrap();
        open[place].get_or_insert(stream);
        open.iter().all(Option::is_some)
    });
    open.into_iter().map(|stream| stream.expect("all are open")).collect()
}

fn three_greeting(hosts: &Hosts) -> Vec<ScriptedBackend> {
    hosts.backends.iter().map(|host| host.serve(backend::greet(host.name))).collect()
}

fn cut_backend_is_taken_out_and_comes_back(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 30);
    let backends = three_greeting(&hosts);
    let proxy =
        hosts.start_and_see_all_up(hosts.conf(engine, quick(hosts.pool()).probe(TCP_PROBE)));
    let open = a_session_on_each(&hosts, &proxy);
    let (link, cut) = (&hosts.backends[1].link, Instant::now());
    link.partition(true);
    proxy.wait_backend("web", "b", "observation", "down");
    measured(&format!("cut link seen after {:?}", cut.elapsed()));
    for stream in [&open[0], &open[2]] {
        assert_eq!(client::exchange(stream, b"still there").unwrap(), b"still there");
    }
    // Whoever comes now goes elsewhere, at once.
    for _ in 0..10 {
        let start = Instant::now();
        let name = first_byte(&hosts, &proxy);
        assert!(name == b'a' || name == b'c');
        assert!(start.elapsed() < secs(2), "{:?}", start.elapsed());
    }
    link.partition(false);
    proxy.wait_backend("web", "b", "observation", "up");
    eventually(secs(5), "b serves again", || first_byte(&hosts, &proxy) == b'b');
    // TCP outlives a cut of seconds: what was open goes on.
    assert_eq!(client::exchange(&open[1], b"back again").unwrap(), b"back again");
    assert!(backends.iter().all(|backend| backend.accepted() > 0));
}

fn first_byte(hosts: &Hosts, proxy: &TestProxy) -> u8 {
    let mut byte = [0];
    let mut stream = hosts.client.run(|| client::connect(proxy.addr("web")));
    stream.read_exact(&mut byte).expect("a first byte");
    byte[0]
}

fn killed_backend_costs_new_clients_nothing(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 40);
    let mut services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let proxy =
        hosts.start_and_see_all_up(hosts.conf(engine, quick(hosts.pool()).probe(ECHO_PROBE)));
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), PACE);
    eventually(secs(5), "traffic flows", || traffic.done() > 100);
    let killed = Instant::now();
    services[1].kill();
    let dead = Instant::now();
    proxy.wait_backend("web", "b", "eligible", false);
    measured(&format!("killed backend out of service after {:?}", killed.elapsed()));
    services[1] = hosts.backends[1].start_echo();
    proxy.wait_backend("web", "b", "observation", "up");
    let before = proxy.backend("web", "b")["sessions_total"].clone();
    eventually(secs(15), "b serves again", || {
        proxy.backend("web", "b")["sessions_total"] != before
    });
    let sessions = traffic.stop();
    let after = sessions.iter().filter(|one| one.began > dead && one.result.is_err()).count();
    let caught = errors(&sessions, killed);
    assert_eq!(after, 0, "sessions that began after the death failed: {caught:#?}");
    assert!(caught.len() <= PACE.at_once, "{caught:#?}");
}

fn stopped_backend_is_taken_out_and_keeps_its_sessions(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 50);
    let services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let proxy =
        hosts.start_and_see_all_up(hosts.conf(engine, quick(hosts.pool()).probe(ECHO_PROBE)));
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), PACE);
    eventually(secs(5), "traffic flows", || traffic.done() > 100);
    let stopped = Instant::now();
    services[1].freeze();
    proxy.wait_backend("web", "b", "eligible", false);
    let seen = stopped.elapsed();
    let served = traffic.done();
    services[1].thaw();
    proxy.wait_backend("web", "b", "observation", "up");
    eventually(secs(5), "the stopped one's clients go on", || traffic.done() > served + 100);
    let sessions = traffic.stop();
    // Those caught on it waited; not one was lost.
    assert_eq!(errors(&sessions, stopped), Vec::<String>::new());
    let longest = sessions.iter().map(|one| one.took).max().unwrap();
    measured(&format!("stopped backend seen after {seen:?}; longest session {longest:?}"));
}

/// A pool that a single failed probe or connect takes a backend out of, far
/// enough away that both are under way at any time.
fn strict_and_far(hosts: &Hosts) -> Pool {
    let far = Impairment { delay: ms(150), ..Impairment::default() };
    hosts.backends.iter().for_each(|host| host.link.set(far));
    let probe = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                 interval = \"1s\"\ntimeout = \"1s\"\nfall = 1";
    let pool = hosts.pool().key("connect_timeout = \"2s\"");
    pool.probe(probe).ejection("failures = 1")
}

/// Takes the probes away. At that distance one is under way at any time, and its socket is
/// not among the descriptors at the start.
fn end_probes(proxy: &mut TestProxy) {
    let mut conf = proxy.conf();
    conf.pool_mut("web").probe = String::new();
    proxy.reload(conf);
}

/// Traffic goes on, and no state of any backend has changed since `known`
/// bytes of the log.
#[track_caller]
fn assert_nobody_blamed(hosts: &Hosts, proxy: &TestProxy, traffic: &Traffic, known: usize) {
    let done = traffic.done();
    // Two rounds of sessions, so every probe of before is over.
    eventually(secs(10), "traffic goes on", || traffic.done() >= done + 16);
    let said = proxy.log()[known..].to_string();
    assert!(!said.contains(" to="), "{said}");
    for host in &hosts.backends {
        let state = proxy.backend("web", host.name);
        let standing = (&state["observation"], &state["ejected"], &state["eligible"]);
        assert_eq!(standing, (&"up".into(), &false.into(), &true.into()), "{state:#}");
    }
}

fn stopped_balancer_blames_no_backend(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 60);
    let _services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let mut proxy = hosts.start_and_see_all_up(hosts.conf(engine, strict_and_far(&hosts)));
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), PACE);
    eventually(secs(10), "traffic flows", || traffic.done() >= 16);
    let (known, stopped) = (proxy.log().len(), Instant::now());
    for stall in [secs(3), ms(2500)] {
        proxy.signal(Signal::STOP);
        // The stall itself is what is tested: seconds without a tick.
        std::thread::sleep(stall);
        proxy.signal(Signal::CONT);
        assert_nobody_blamed(&hosts, &proxy, &traffic, known);
    }
    assert_eq!(errors(&traffic.stop(), stopped), Vec::<String>::new());
    end_probes(&mut proxy);
}

fn starved_balancer_blames_no_backend(engine: Engine) {
    if !networks_run() {
        return;
    }
    let hosts = Hosts::new(3, 65);
    let _services: Vec<_> = hosts.backends.iter().map(|host| host.start_echo()).collect();
    let mut proxy = hosts.start_and_see_all_up(hosts.conf(engine, strict_and_far(&hosts)));
    // Several times what 1 % of a CPU can carry.
    let pace = Pace { at_once: 64, ..PACE };
    let traffic = Traffic::start(&hosts.client, proxy.addr("web"), pace);
    eventually(secs(10), "traffic flows", || traffic.done() >= 128);
    let (known, start) = (proxy.log().len(), Instant::now());
    let before = traffic.done();
    let starved = Starved::new(&[proxy.pid()]);
    // A hundredth of a CPU for a while, with every probe and connect late.
    std::thread::sleep(ms(2500));
    let carried = traffic.done() - before;
    measured(&format!("{carried} sessions in 2.5 s of 1 % by {}", starved.how()));
    drop(starved);
    assert_nobody_blamed(&hosts, &proxy, &traffic, known);
    assert_eq!(errors(&traffic.stop(), start), Vec::<String>::new());
    end_probes(&mut proxy);
}
