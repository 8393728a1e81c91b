//! Scrapes of many backends: they cost the control thread nothing that a verdict
//! would have to wait for.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, http, long, measured, ms, secs, turn};
use crate::heartbeats::Keys;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Fewer for a debug build on a busy machine.
fn backends() -> u32 {
    if long() { 20_000 } else { 4_000 }
}

/// Between heartbeats.
const INTERVAL: Duration = ms(100);

/// A pool of so many backends that nobody asks about.
fn many(count: u32) -> Pool {
    let addresses =
        (0..count).map(|n| format!("127.{}.{}.{}:9", 1 + n / 62_500, n / 250 % 250, n % 250 + 1));
    addresses
        .fold(Pool::new("many"), |pool, address| pool.backend(&address.replace(":", "-"), &address))
}

/// Scrapes each second until it is told to stop; how often it did.
fn scrape(proxy: &TestProxy, stop: &AtomicBool) -> u32 {
    let (began, mut scrapes, mut rounds) = (Instant::now(), 0, 0);
    while !stop.load(Ordering::Relaxed) {
        let answer = proxy.admin_request("GET", "/metrics");
        // A debug build on a busy machine may need more than the 5 s it has.
        if answer.status == 200 {
            assert!(answer.body.lines().count() > backends() as usize * 10, "it is whole");
            scrapes += 1;
        }
        rounds += 1;
        let due = began + secs(1) * rounds;
        // Each second, as Prometheus might.
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    scrapes
}

/// How long questions to the control thread take, until it is told to stop.
fn ask(proxy: &TestProxy, stop: &AtomicBool) -> Vec<Duration> {
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        assert_eq!(proxy.admin_request("GET", "/v1/pools/web/backends/a/explain").status, 200);
        took.push(began.elapsed());
        // A steady pace.
        std::thread::sleep(ms(20));
    }
    took.sort();
    took
}

/// Ends the backend and its sender; how long until it is out. Then it comes back.
fn die(proxy: &TestProxy, keys: &Keys) -> Duration {
    let backend = ScriptedBackend::start(backend::http("dying", 200));
    let mut sender = keys.sidecar("dying", &backend);
    let explained = || {
        let answer = proxy.admin_request("GET", "/v1/pools/web/backends/dying/explain");
        (answer.status == 200).then(|| answer.json()["eligible"].clone())
    };
    eventually(secs(10), "it serves", || explained().is_some_and(|eligible| eligible == true));
    // It has to be known for a while before its rhythm is.
    std::thread::sleep(ms(500));
    let began = Instant::now();
    sender.kill();
    drop(backend);
    eventually(secs(20), "it is out", || explained().is_none_or(|eligible| eligible == false));
    let took = began.elapsed();
    eventually(secs(20), "it is forgotten", || explained().is_none());
    took
}

fn deaths(proxy: &TestProxy, keys: &Keys, count: u32) -> Vec<Duration> {
    let mut took: Vec<Duration> = (0..count).map(|_| die(proxy, keys)).collect();
    took.sort();
    took
}

mod alone {
    use super::*;

    #[test]
    fn a_scrape_each_second_of_many_backends_excuses_nobody_and_delays_no_verdict() {
        let _turn = turn::alone();
        let keys = Keys::new();
        let heartbeat =
            "register = true\ninterval = \"100ms\"\nttl = \"1s\"\nforget_after = \"1s\"";
        let steady = ["a", "b", "c"].map(|name| ScriptedBackend::start(backend::http(name, 200)));
        let conf = Conf::simple(Engine::Epoll, Pool::new("web").heartbeat(heartbeat));
        let conf = Conf { heartbeat: keys.section(&[1]), ..conf.pool(many(backends())) };
        let proxy = TestProxy::start(conf);

        let _senders: Vec<_> = ["a", "b", "c"]
            .iter()
            .zip(&steady)
            .map(|(name, backend)| keys.ready_every(name, backend, INTERVAL))
            .collect();
        eventually(secs(10), "a serves", || http::over_tcp(proxy.addr("web"), "/").is_ok());
        let count = if long() { 30 } else { 1 };
        let alone = deaths(&proxy, &keys, count);
        let excuses = || proxy.metric("tidegate_heartbeat_excuses_total", &[]);
        let before = excuses();
        let stop = AtomicBool::new(false);
        let quiet = if long() { secs(120) } else { secs(4) };
        let (scraped, excused, scrapes, asked) = std::thread::scope(|scope| {
            let scrapes = scope.spawn(|| scrape(&proxy, &stop));
            let asked = scope.spawn(|| ask(&proxy, &stop));
            std::thread::sleep(quiet);
            let excused = excuses() - before;
            let scraped = deaths(&proxy, &keys, count);
            stop.store(true, Ordering::Relaxed);
            let asked = asked.join().expect("questions");
            (scraped, excused, scrapes.join().expect("scrapes"), asked)
        });
        let (last, p99) = (asked.len() - 1, asked[asked.len() * 99 / 100]);
        measured(&format!(
            "{scrapes} scrapes: deaths {alone:.0?} without, {scraped:.0?} with; the control thread \
             answers in {:.1?} (p50), {p99:.1?} (p99), {:.1?} (longest)",
            asked[asked.len() / 2],
            asked[last],
        ));
        assert!(scrapes >= 2, "{scrapes} scrapes");
        assert_eq!(excused, 0.0, "somebody's silence did not count");
        assert!(scraped[scraped.len() / 2] < alone[alone.len() / 2] * 2 + ms(200));
    }
}
