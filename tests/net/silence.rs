//! Heartbeats between hosts when the trouble is not the backends': the balancer
//! stands still or starves, or a backend is merely far away.
//!
//! Every backend here beats, through a sidecar on its own host. What silence
//! means when it *is* the backend's is in [`crate::detection`].

use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::Running;
use crate::common::{Engine, eventually, exclusive, measured, ms, on_every_engine, secs};
use crate::hosts::{Hosts, Service};
use crate::link::channel::Impairment;
use crate::netns::networks_run;
use crate::starve::Starved;
use crate::traffic::{Pace, Traffic, errors};
use crate::watch::{Heartbeats, Watch};
use rustix::process::Signal;
use std::time::{Duration, Instant};

on_every_engine!(stopped_balancer_takes_no_silence_for_a_death);

const PACE: Pace = Pace { at_once: 8, pause: ms(5), patience: secs(10) };

/// Silence is final after two seconds, and one failed probe or connect is, too. The
/// probe's time is that of a service on a machine that is short of CPU.
const STRICT: &str = "interval = \"100ms\"\nttl = \"2s\"\nrequire = true";
const STRICT_PROBE: &str = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                            interval = \"1s\"\ntimeout = \"1s\"\nfall = 1";

/// A site whose backends all beat.
struct Beating {
    // Ends first, while there still is a network around it.
    proxy: TestProxy,
    beside: Vec<Option<Running>>,
    _services: Vec<Service>,
    hosts: Hosts,
}

impl Beating {
    /// That many backends, `away` from the balancer.
    #[track_caller]
    fn start(engine: Engine, backends: usize, away: Duration, pool: impl Fn(Pool) -> Pool) -> Self {
        let (hosts, watch) = (Hosts::new(backends, 90), Heartbeats::new());
        let far = Impairment { delay: away, ..Impairment::default() };
        hosts.backends.iter().for_each(|host| host.link.set(far));
        let services = hosts.backends.iter().map(|host| host.start_echo()).collect();
        let conf: Conf = watch.conf(hosts.conf(engine, pool(hosts.pool())));
        let proxy = hosts.start(conf);
        let beside =
            hosts.backends.iter().map(|host| watch.start_beside(host, host.name)).collect();
        for host in &hosts.backends {
            proxy.wait_backend("web", host.name, "observation", "up");
        }
        Beating { proxy, beside, _services: services, hosts }
    }

    /// Waits until each has been heard so many times more.
    #[track_caller]
    fn wait_for_beats(&self, count: u64) {
        for host in &self.hosts.backends {
            self.proxy.wait_heartbeats("web", host.name, count);
        }
    }

    /// No state of any backend has changed since `known` bytes of the log,
    /// though sessions and heartbeats went on for a while.
    #[track_caller]
    fn assert_nobody_blamed(&self, traffic: &Traffic, known: usize) {
        let done = traffic.done();
        self.wait_for_beats(10);
        eventually(secs(10), "traffic goes on", || traffic.done() >= done + 16);
        let said = self.proxy.log()[known..].to_string();
        assert!(!said.contains(" to="), "{said}");
        for host in &self.hosts.backends {
            let state = self.proxy.backend("web", host.name);
            assert_eq!((&state["observation"], &state["eligible"]), (&"up".into(), &true.into()));
        }
    }
}

fn strict(pool: Pool) -> Pool {
    let pool = pool.key("connect_timeout = \"2s\"").heartbeat(STRICT);
    pool.probe(STRICT_PROBE).ejection("failures = 1")
}

fn stopped_balancer_takes_no_silence_for_a_death(engine: Engine) {
    if !networks_run() {
        return;
    }
    // Heartbeats, probes and connects are under way at any time.
    let site = Beating::start(engine, 3, ms(60), strict);
    let traffic = Traffic::start(&site.hosts.client, site.proxy.addr("web"), PACE);
    site.wait_for_beats(10);
    let (known, stopped) = (site.proxy.log().len(), Instant::now());
    for stall in [secs(3), ms(700)] {
        site.proxy.signal(Signal::STOP);
        // The stall itself is what is tested: longer than ttl, and shorter.
        std::thread::sleep(stall);
        site.proxy.signal(Signal::CONT);
        site.assert_nobody_blamed(&traffic, known);
    }
    assert_eq!(errors(&traffic.stop(), stopped), Vec::<String>::new());
    assert!(site.proxy.metric("tidegate_heartbeat_excuses_total", &[]) >= 2.0);
}

#[test]
fn starved_balancer_takes_no_silence_for_a_death() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let site = Beating::start(Engine::Epoll, 3, ms(60), strict);
    let pace = Pace { at_once: 64, ..PACE };
    let traffic = Traffic::start(&site.hosts.client, site.proxy.addr("web"), pace);
    site.wait_for_beats(10);
    let (known, start, before) = (site.proxy.log().len(), Instant::now(), traffic.done());
    let starved = Starved::new(&[site.proxy.pid()]);
    // A hundredth of a CPU for a while, with every heartbeat read late.
    std::thread::sleep(ms(2500));
    let carried = traffic.done() - before;
    measured(&format!("{carried} sessions in 2.5 s of 1 % by {}", starved.how()));
    drop(starved);
    site.assert_nobody_blamed(&traffic, known);
    assert_eq!(errors(&traffic.stop(), start), Vec::<String>::new());
}

/// Neither its probes nor its sessions get any farther than our own routing
/// table, and its heartbeats go on.
#[test]
fn a_route_that_is_missing_here_is_not_the_backends_fault() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let site = Beating::start(Engine::Epoll, 3, ms(1), strict);
    let traffic = Traffic::start(&site.hosts.client, site.proxy.addr("web"), PACE);
    site.wait_for_beats(10);
    let known = site.proxy.log().len();
    site.hosts.balancer.ip(&format!("route del {}", site.hosts.backends[1].link.b()));
    let lost = Instant::now();
    let noticed = || site.proxy.log()[known..].contains("no route on this host");
    eventually(secs(10), "a probe finds no route", noticed);
    let route = || site.proxy.metric("tidegate_local_errors_total", &[("reason", "route")]);
    eventually(secs(10), "so do sessions", || route() >= 10.0);
    site.assert_nobody_blamed(&traffic, known);
    let sessions = traffic.stop();
    let failed = sessions.iter().find(|one| one.began > lost && one.result.is_err());
    assert!(failed.is_none(), "others serve who comes now: {failed:?}");
    // What was open goes on, or it would be left over at the end.
    site.hosts.balancer.ip(&format!("route add {} dev link2", site.hosts.backends[1].link.b()));
}

/// A backend is asked before it joins and before silence takes it out. Both
/// must work over a way that an answer takes long to come back on: twice that
/// for a connect, four times for a question that is asked and answered.
fn far_backends_join_are_vouched_for_and_are_taken_out(pool: impl Fn(Pool) -> Pool) {
    if !networks_run() {
        return;
    }
    let mut site = Beating::start(Engine::Epoll, 3, ms(150), pool);
    let alive = site.proxy.sender("web", "a");
    let timeout = alive["try_timeout_seconds"].as_f64().unwrap_or(0.0);
    assert!((0.3..=1.0).contains(&timeout), "as long as it takes: {alive:#}");
    site.wait_for_beats(10);
    // The sidecar dies, the service goes on: it answers when it is asked.
    site.beside[1] = None;
    let pulse = || site.proxy.explained("web", "b")["heartbeat"]["pulse"].clone();
    eventually(secs(8), "it is asked and answers", || pulse() == "vouched");
    let mute = site.proxy.backend("web", "b");
    assert_eq!((&mute["eligible"], &mute["ejected"]), (&true.into(), &false.into()), "{mute:#}");
    let cut = Instant::now();
    site.hosts.backends[2].link.partition(true);
    site.proxy.wait_backend("web", "c", "observation", "down");
    measured(&format!("cut at {:?} round trip, out after {:?}", ms(300), cut.elapsed()));
    assert_eq!(site.proxy.backend("web", "b")["eligible"], true, "{}", site.proxy.log());
    // A probe of a silent host hangs until the next one is due, and holds a descriptor.
    site.hosts.backends[2].link.partition(false);
}

#[test]
fn far_backends_that_are_asked_by_a_connect() {
    let _share = exclusive::shared();
    far_backends_join_are_vouched_for_and_are_taken_out(|pool| {
        pool.heartbeat("interval = \"100ms\"\nrequire = true")
    });
}

#[test]
fn far_backends_that_are_asked_by_a_probe_that_speaks() {
    let _share = exclusive::shared();
    let probe = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                 interval = \"5s\"\ntimeout = \"1s\"\nfall = 3";
    far_backends_join_are_vouched_for_and_are_taken_out(|pool| {
        pool.probe(probe).heartbeat("interval = \"100ms\"\nrequire = true")
    });
}
