//! Missing heartbeats that are no fault of a backend: the process is stopped or gets too little
//! CPU, or the backend is far away.
//!
//! Every backend has a sidecar on its host. [`crate::detection`] tests silence that is a
//! backend's fault.

use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::servers::Running;
use crate::common::{Engine, eventually, exclusive, measured, ms, on_every_engine, secs};
use crate::cpu_limit::CpuLimited;
use crate::hosts::{Hosts, Service};
use crate::link::channel::Impairment;
use crate::netns::networks_run;
use crate::traffic::{Pace, Traffic, errors};
use crate::watch::{Heartbeats, Watch};
use rustix::process::Signal;
use std::time::{Duration, Instant};

on_every_engine!(stopped_process_excuses_missing_heartbeats);

const PACE: Pace = Pace { at_once: 8, pause: ms(5), patience: secs(10) };

/// A backend is down after 2 s without heartbeats or after one failed probe or connect. The
/// probe timeout suits a service that gets little CPU.
const STRICT: &str = "interval = \"100ms\"\nttl = \"2s\"\nrequire = true";
const STRICT_PROBE: &str = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                            interval = \"1s\"\ntimeout = \"1s\"\nfall = 1";

/// A site with a sidecar for each backend.
struct HeartbeatSite {
    // Dropped first, while the network still exists.
    proxy: TestProxy,
    sidecars: Vec<Option<Running>>,
    _services: Vec<Service>,
    hosts: Hosts,
}

impl HeartbeatSite {
    /// Starts `backends` backends with a link delay of `away`.
    #[track_caller]
    fn start(engine: Engine, backends: usize, away: Duration, pool: impl Fn(Pool) -> Pool) -> Self {
        let (hosts, watch) = (Hosts::new(backends, 90), Heartbeats::new());
        let far = Impairment { delay: away, ..Impairment::default() };
        hosts.backends.iter().for_each(|host| host.link.set(far));
        let services = hosts.backends.iter().map(|host| host.start_echo()).collect();
        let conf: Conf = watch.conf(hosts.conf(engine, pool(hosts.pool())));
        let proxy = hosts.start(conf);
        let sidecars =
            hosts.backends.iter().map(|host| watch.start_sidecar(host, host.name)).collect();
        for host in &hosts.backends {
            proxy.wait_backend("web", host.name, "observation", "up");
        }
        HeartbeatSite { proxy, sidecars, _services: services, hosts }
    }

    /// Waits until `count` more heartbeats of each backend have been accepted.
    #[track_caller]
    fn wait_for_heartbeats(&self, count: u64) {
        for host in &self.hosts.backends {
            self.proxy.wait_heartbeats("web", host.name, count);
        }
    }

    /// Checks that no backend has changed its state after the first `known` bytes of the log,
    /// while
    /// sessions and heartbeats continue.
    #[track_caller]
    fn assert_no_state_changes(&self, traffic: &Traffic, known: usize) {
        let done = traffic.done();
        self.wait_for_heartbeats(10);
        eventually(secs(10), "traffic continues", || traffic.done() >= done + 16);
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

fn stopped_process_excuses_missing_heartbeats(engine: Engine) {
    if !networks_run() {
        return;
    }
    // Heartbeats, probes and connects are always in progress.
    let site = HeartbeatSite::start(engine, 3, ms(60), strict);
    let traffic = Traffic::start(&site.hosts.client, site.proxy.addr("web"), PACE);
    site.wait_for_heartbeats(10);
    let (known, stopped) = (site.proxy.log().len(), Instant::now());
    for stall in [secs(3), ms(700)] {
        site.proxy.signal(Signal::STOP);
        // The stall is the tested condition: longer than ttl, and shorter.
        std::thread::sleep(stall);
        site.proxy.signal(Signal::CONT);
        site.assert_no_state_changes(&traffic, known);
    }
    assert_eq!(errors(&traffic.stop(), stopped), Vec::<String>::new());
    assert!(site.proxy.metric("tidegate_heartbeat_excuses_total", &[]) >= 2.0);
}

#[test]
fn cpu_limited_process_excuses_missing_heartbeats() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let site = HeartbeatSite::start(Engine::Epoll, 3, ms(60), strict);
    let pace = Pace { at_once: 64, ..PACE };
    let traffic = Traffic::start(&site.hosts.client, site.proxy.addr("web"), pace);
    site.wait_for_heartbeats(10);
    let (known, start, before) = (site.proxy.log().len(), Instant::now(), traffic.done());
    let cpu_limited = CpuLimited::new(&[site.proxy.pid()]);
    // 1 % of a CPU for a while, so that every heartbeat is read late.
    std::thread::sleep(ms(2500));
    let carried = traffic.done() - before;
    measured(&format!("{carried} sessions in 2.5 s of 1 % by {}", cpu_limited.how()));
    drop(cpu_limited);
    site.assert_no_state_changes(&traffic, known);
    assert_eq!(errors(&traffic.stop(), start), Vec::<String>::new());
}

/// The route to a backend is removed on Tidegate's host: probes and sessions fail locally while
/// heartbeats continue.
#[test]
fn missing_local_route_is_no_backend_failure() {
    let _share = exclusive::shared();
    if !networks_run() {
        return;
    }
    let site = HeartbeatSite::start(Engine::Epoll, 3, ms(1), strict);
    let traffic = Traffic::start(&site.hosts.client, site.proxy.addr("web"), PACE);
    site.wait_for_heartbeats(10);
    let known = site.proxy.log().len();
    site.hosts.balancer.ip(&format!("route del {}", site.hosts.backends[1].link.b()));
    let lost = Instant::now();
    let noticed = || site.proxy.log()[known..].contains("no route on this host");
    eventually(secs(10), "a probe finds no route", noticed);
    let route = || site.proxy.metric("tidegate_local_errors_total", &[("reason", "route")]);
    eventually(secs(10), "sessions find no route", || route() >= 10.0);
    site.assert_no_state_changes(&traffic, known);
    let sessions = traffic.stop();
    let failed = sessions.iter().find(|session| session.began > lost && session.result.is_err());
    assert!(failed.is_none(), "other backends serve new sessions: {failed:?}");
    // The route is restored, so that open sessions can end.
    site.hosts.balancer.ip(&format!("route add {} dev link2", site.hosts.backends[1].link.b()));
}

/// A confirmation probe runs before a backend becomes eligible and before silence removes it.
/// Both must work with a long round trip: a connect takes two link delays, a request with an
/// answer four.
fn assert_detection_over_a_long_delay(pool: impl Fn(Pool) -> Pool) {
    if !networks_run() {
        return;
    }
    let mut site = HeartbeatSite::start(Engine::Epoll, 3, ms(150), pool);
    let alive = site.proxy.sender("web", "a");
    let timeout = alive["try_timeout_seconds"].as_f64().unwrap_or(0.0);
    assert!((0.3..=1.0).contains(&timeout), "a timeout that suits the round trip: {alive:#}");
    site.wait_for_heartbeats(10);
    // The sidecar is killed and the service continues, so it answers confirmation probes.
    site.sidecars[1] = None;
    let pulse = || site.proxy.explained("web", "b")["heartbeat"]["pulse"].clone();
    eventually(secs(8), "a confirmation probe succeeds", || pulse() == "vouched");
    let silent = site.proxy.backend("web", "b");
    assert_eq!(
        (&silent["eligible"], &silent["ejected"]),
        (&true.into(), &false.into()),
        "{silent:#}"
    );
    let cut = Instant::now();
    site.hosts.backends[2].link.partition(true);
    site.proxy.wait_backend("web", "c", "observation", "down");
    measured(&format!("partition at {:?} round trip, down after {:?}", ms(300), cut.elapsed()));
    assert_eq!(site.proxy.backend("web", "b")["eligible"], true, "{}", site.proxy.log());
    // A probe of a silent host waits until its timeout and holds a descriptor.
    site.hosts.backends[2].link.partition(false);
}

#[test]
fn confirmation_by_connect_works_over_a_long_delay() {
    let _share = exclusive::shared();
    assert_detection_over_a_long_delay(|pool| {
        pool.heartbeat("interval = \"100ms\"\nrequire = true")
    });
}

#[test]
fn confirmation_by_send_expect_works_over_a_long_delay() {
    let _share = exclusive::shared();
    let probe = "kind = \"send-expect\"\nsend = \"hello\"\nexpect = \"hello\"\n\
                 interval = \"5s\"\ntimeout = \"1s\"\nfall = 3";
    assert_detection_over_a_long_delay(|pool| {
        pool.probe(probe).heartbeat("interval = \"100ms\"\nrequire = true")
    });
}
