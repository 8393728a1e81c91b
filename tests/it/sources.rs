//! Who may connect, and how much one source may ask for: refusals are resets
//! before any backend is thought of, counted by reason, and gone with a reload.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect_from};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, measured, ms, on_every_engine, secs};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

on_every_engine!(
    denied_client_is_reset_and_reaches_no_backend,
    a_range_of_ipv4_written_as_ipv6_denies,
    lists_of_files_are_read_again_by_a_reload,
    hundred_thousand_ranges_do_not_slow_accepts,
    one_source_has_so_many_sessions_and_another_has_its_own,
    a_prefix_shares_one_count,
    the_rate_of_a_source_is_kept_over_all_workers,
    limits_and_counts_outlive_a_reload,
    a_flood_from_one_source_leaves_others_served,
);

const GOOD: &str = "127.0.0.2";
const BAD: &str = "127.0.0.3";

/// A balancer whose one frontend has these `sources`.
fn start(engine: Engine, sources: &str) -> (TestProxy, ScriptedBackend) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let conf = Conf::new(engine).frontend("web", "web", &format!("sources = {{ {sources} }}"));
    (TestProxy::start(conf.pool(pool)), backend)
}

fn from(source: &str, address: SocketAddr) -> TcpStream {
    connect_from(source.parse::<IpAddr>().unwrap(), address).expect("the kernel takes it")
}

/// Whether a client from there is served.
fn is_served(source: &str, address: SocketAddr) -> bool {
    // A reset may come before connect(2) has returned.
    connect_from(source.parse().unwrap(), address).is_ok_and(|stream| holds(&stream))
}

/// Whether that connection is alive: it echoes a byte.
fn holds(mut stream: &TcpStream) -> bool {
    stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_ok()
}

fn refused(proxy: &TestProxy, reason: &str) -> f64 {
    proxy.metric("tidegate_refused_total", &[("frontend", "web"), ("reason", reason)])
}

fn a_range_of_ipv4_written_as_ipv6_denies(engine: Engine) {
    let (proxy, _backend) = start(engine, r#"deny = ["::ffff:127.0.0.3"]"#);
    let address = proxy.addr("web");
    assert!(is_served(GOOD, address));
    assert!(!is_served(BAD, address), "the rule has no effect");
}

fn denied_client_is_reset_and_reaches_no_backend(engine: Engine) {
    let rules = r#"allow = ["127.0.0.0/30", "127.0.0.9"], deny = ["127.0.0.3"]"#;
    let (proxy, backend) = start(engine, rules);
    let address = proxy.addr("web");
    for (source, served) in [(GOOD, true), (BAD, false), ("127.0.0.9", true), ("127.0.0.10", false)]
    {
        assert_eq!(is_served(source, address), served, "{source}");
    }
    if let Ok(stream) = connect_from(BAD.parse().unwrap(), address) {
        assert_eq!(client::read_to_end(&stream), End::Reset(0));
    }
    assert_eq!(refused(&proxy, "denied"), 3.0);
    assert_eq!(backend.accepted(), 2, "only for those who may");
    let log = proxy.wait_access_log(5);
    let denied: Vec<_> = log.iter().filter(|line| line["cause"] == "denied").collect();
    assert_eq!(denied.len(), 3);
    assert!(
        denied.iter().all(|line| line["phase"] == "admit" && line["code"] == "PR"),
        "{denied:?}"
    );
}

fn lists_of_files_are_read_again_by_a_reload(engine: Engine) {
    let lists = tempfile::tempdir().unwrap();
    let path = lists.path().join("deny.txt");
    std::fs::write(&path, "# from somewhere\n\n127.0.0.3/32 # a bad one\n").unwrap();
    let (proxy, _backend) = start(engine, &format!("deny_file = {:?}", path.to_str().unwrap()));
    let address = proxy.addr("web");
    assert!(is_served(GOOD, address) && !is_served(BAD, address));

    std::fs::write(&path, "127.0.0.2\n").unwrap();
    proxy.cli_ok(&["reload"]);
    eventually(secs(5), "the new list holds", || is_served(BAD, address));
    assert!(!is_served(GOOD, address));

    std::fs::write(&path, "127.0.0.2\n127.0.0.300\n").unwrap();
    let answer = proxy.cli(&["reload"]);
    assert_eq!(answer.status.code(), Some(1));
    let told = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(told.contains("deny.txt") && told.contains("line 2"), "{told}");
    assert!(!is_served(GOOD, address) && is_served(BAD, address), "a bad list changes nothing");
}

fn hundred_thousand_ranges_do_not_slow_accepts(engine: Engine) {
    let lists = tempfile::tempdir().unwrap();
    let path = lists.path().join("deny.txt");
    // Every second address of 10.0.0.0/14: nothing to be merged.
    let text: String = (0..100_000u32)
        .map(|n| format!("{}\n", std::net::Ipv4Addr::from_bits(0x0a00_0000 + 2 * n)))
        .collect();
    std::fs::write(&path, text).unwrap();
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let listed = format!("sources = {{ deny_file = {:?} }}", path.to_str().unwrap());
    let conf = Conf::new(engine).frontend("plain", "web", "").frontend("listed", "web", &listed);
    let proxy = TestProxy::start(conf.pool(pool));
    let mut took = [secs(0); 2];
    for _ in 0..300 {
        for (time, frontend) in took.iter_mut().zip(["plain", "listed"]) {
            let begun = Instant::now();
            assert!(is_served(GOOD, proxy.addr(frontend)));
            *time += begun.elapsed();
        }
    }
    measured(&format!(
        "300 short sessions: {:?} plain, {:?} past 100,000 ranges",
        took[0], took[1]
    ));
    assert!(took[1] < took[0] * 3 / 2 + ms(20), "{took:?}");
}

fn one_source_has_so_many_sessions_and_another_has_its_own(engine: Engine) {
    let (proxy, _backend) = start(engine, "connections_max = 3");
    let address = proxy.addr("web");
    let mut held: Vec<_> = (0..3).map(|_| from(GOOD, address)).collect();
    assert!(held.iter().all(holds));
    for _ in 0..5 {
        assert!(!is_served(GOOD, address));
    }
    assert!(is_served(BAD, address), "another source has slots of its own");
    held.pop();
    eventually(secs(5), "the slot is free again", || is_served(GOOD, address));
    assert!(refused(&proxy, "source-connections") >= 5.0);
}

fn a_prefix_shares_one_count(engine: Engine) {
    let (proxy, _backend) = start(engine, "connections_max = 1, prefix_v4 = 24");
    let address = proxy.addr("web");
    let held = from("127.0.7.1", address);
    assert!(holds(&held));
    assert!(!is_served("127.0.7.200", address));
    assert!(is_served("127.0.8.1", address));
}

fn the_rate_of_a_source_is_kept_over_all_workers(engine: Engine) {
    let (proxy, _backend) = start(engine, "rate = \"20/s\", burst = 5");
    let address = proxy.addr("web");
    let begun = Instant::now();
    let mut served = 0;
    while begun.elapsed() < ms(1500) {
        served += u32::from(is_served(GOOD, address));
    }
    let most = 5 + (begun.elapsed().as_secs_f64() * 20.0).ceil() as u32;
    assert!(served <= most, "{served} of at most {most}");
    assert!(served >= 20, "{served}: the rate is granted, too");
    assert!(refused(&proxy, "source-rate") > 0.0);
}

fn limits_and_counts_outlive_a_reload(engine: Engine) {
    let (mut proxy, backend) = start(engine, "connections_max = 2");
    let address = proxy.addr("web");
    let held = [from(GOOD, address), from(GOOD, address)];
    assert!(held.iter().all(holds));
    let mut conf = proxy.conf();
    conf.pool_mut("web").backends[0].keys = "weight = 7".into();
    proxy.reload(conf);
    assert!(!is_served(GOOD, address), "sessions from before the reload count");
    let mut conf = proxy.conf();
    conf.frontend_mut("web").keys = "sources = { connections_max = 3 }".into();
    proxy.reload(conf);
    assert!(is_served(GOOD, address), "the new cap holds");
    assert!(held.iter().all(holds));
    drop(backend);
}

fn a_flood_from_one_source_leaves_others_served(engine: Engine) {
    let (proxy, backend) = start(engine, "rate = \"5/s\", burst = 5");
    let address = proxy.addr("web");
    let over = std::sync::atomic::AtomicBool::new(false);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    drop(connect_from(BAD.parse().unwrap(), address));
                    // The balancer shares the machine: who connects without a pause has
                    // most of it.
                    std::thread::sleep(ms(1));
                }
            });
        }
        eventually(secs(30), "the flood is on", || refused(&proxy, "source-rate") > 500.0);
        let served = (10..40).filter(|n| is_served(&format!("127.0.1.{n}"), address)).count();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(served, 30, "others, one connection each");
    });
    // The others, and what the rate grants.
    let most = 30 + 5 + (begun.elapsed().as_secs_f64() * 5.0).ceil() as u64;
    assert!(backend.accepted() <= most, "{}: refusals cost no backend", backend.accepted());
}
