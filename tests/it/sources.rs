//! Client sources: allow and deny lists, and limits per source. Rejected clients are reset
//! before a backend is picked and are counted by reason. Reloads change the rules.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect_from};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, measured, ms, on_every_engine, secs};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

on_every_engine!(
    denied_client_is_reset_without_a_backend,
    ipv4_range_written_as_ipv6_denies,
    reload_rereads_list_files,
    hundred_thousand_ranges_do_not_slow_accepts,
    session_limit_applies_per_client_source,
    addresses_of_a_prefix_share_one_count,
    rate_limit_of_a_source_holds_over_all_workers,
    source_counts_survive_a_reload,
    other_sources_are_served_during_a_flood_from_one_source,
);

const GOOD: &str = "127.0.0.2";
const BAD: &str = "127.0.0.3";

/// Starts Tidegate with one frontend that has this `sources` table.
fn start(engine: Engine, sources: &str) -> (TestProxy, ScriptedBackend) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let conf = Conf::new(engine).frontend("web", "web", &format!("sources = {{ {sources} }}"));
    (TestProxy::start(conf.pool(pool)), backend)
}

fn from(source: &str, address: SocketAddr) -> TcpStream {
    connect_from(source.parse::<IpAddr>().unwrap(), address).expect("a connection")
}

/// Returns true if a client with this address is served.
fn is_served(source: &str, address: SocketAddr) -> bool {
    // The reset can already fail connect(2).
    connect_from(source.parse().unwrap(), address).is_ok_and(|stream| holds(&stream))
}

/// Returns true if the connection echoes a byte.
fn holds(mut stream: &TcpStream) -> bool {
    stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_ok()
}

fn refused(proxy: &TestProxy, reason: &str) -> f64 {
    proxy.metric("tidegate_refused_total", &[("frontend", "web"), ("reason", reason)])
}

fn ipv4_range_written_as_ipv6_denies(engine: Engine) {
    let (proxy, _backend) = start(engine, r#"deny = ["::ffff:127.0.0.3"]"#);
    let address = proxy.addr("web");
    assert!(is_served(GOOD, address));
    assert!(!is_served(BAD, address), "the rule has no effect");
}

fn denied_client_is_reset_without_a_backend(engine: Engine) {
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
    assert_eq!(backend.accepted(), 2, "a session for a denied client");
    let log = proxy.wait_access_log(5);
    let denied: Vec<_> = log.iter().filter(|line| line["cause"] == "denied").collect();
    assert_eq!(denied.len(), 3);
    assert!(
        denied.iter().all(|line| line["phase"] == "admit" && line["code"] == "PR"),
        "{denied:?}"
    );
}

fn reload_rereads_list_files(engine: Engine) {
    let lists = tempfile::tempdir().unwrap();
    let path = lists.path().join("deny.txt");
    std::fs::write(&path, "# from somewhere\n\n127.0.0.3/32 # a bad one\n").unwrap();
    let (proxy, _backend) = start(engine, &format!("deny_file = {:?}", path.to_str().unwrap()));
    let address = proxy.addr("web");
    assert!(is_served(GOOD, address) && !is_served(BAD, address));

    std::fs::write(&path, "127.0.0.2\n").unwrap();
    proxy.cli_ok(&["reload"]);
    eventually(secs(5), "the new list is applied", || is_served(BAD, address));
    assert!(!is_served(GOOD, address));

    std::fs::write(&path, "127.0.0.2\n127.0.0.300\n").unwrap();
    let answer = proxy.cli(&["reload"]);
    assert_eq!(answer.status.code(), Some(1));
    let error = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(error.contains("deny.txt") && error.contains("line 2"), "{error}");
    assert!(
        !is_served(GOOD, address) && is_served(BAD, address),
        "an invalid list changes nothing"
    );
}

fn hundred_thousand_ranges_do_not_slow_accepts(engine: Engine) {
    let lists = tempfile::tempdir().unwrap();
    let path = lists.path().join("deny.txt");
    // Every second address, so that no ranges can be merged.
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
        "300 short sessions: {:?} plain, {:?} with 100,000 ranges",
        took[0], took[1]
    ));
    assert!(took[1] < took[0] * 3 / 2 + ms(20), "{took:?}");
}

fn session_limit_applies_per_client_source(engine: Engine) {
    let (proxy, _backend) = start(engine, "connections_max = 3");
    let address = proxy.addr("web");
    let mut held: Vec<_> = (0..3).map(|_| from(GOOD, address)).collect();
    assert!(held.iter().all(holds));
    for _ in 0..5 {
        assert!(!is_served(GOOD, address));
    }
    assert!(is_served(BAD, address), "another source has its own slots");
    held.pop();
    eventually(secs(5), "the slot is free again", || is_served(GOOD, address));
    assert!(refused(&proxy, "source-connections") >= 5.0);
}

fn addresses_of_a_prefix_share_one_count(engine: Engine) {
    let (proxy, _backend) = start(engine, "connections_max = 1, prefix_v4 = 24");
    let address = proxy.addr("web");
    let held = from("127.0.7.1", address);
    assert!(holds(&held));
    assert!(!is_served("127.0.7.200", address));
    assert!(is_served("127.0.8.1", address));
}

fn rate_limit_of_a_source_holds_over_all_workers(engine: Engine) {
    let (proxy, _backend) = start(engine, "rate = \"20/s\", burst = 5");
    let address = proxy.addr("web");
    let begun = Instant::now();
    let mut served = 0;
    while begun.elapsed() < ms(1500) {
        served += u32::from(is_served(GOOD, address));
    }
    let most = 5 + (begun.elapsed().as_secs_f64() * 20.0).ceil() as u32;
    assert!(served <= most, "{served} of at most {most}");
    assert!(served >= 20, "{served}: fewer than the rate allows");
    assert!(refused(&proxy, "source-rate") > 0.0);
}

fn source_counts_survive_a_reload(engine: Engine) {
    let (mut proxy, backend) = start(engine, "connections_max = 2");
    let address = proxy.addr("web");
    let held = [from(GOOD, address), from(GOOD, address)];
    assert!(held.iter().all(holds));
    let mut conf = proxy.conf();
    conf.pool_mut("web").backends[0].keys = "weight = 7".into();
    proxy.reload(conf);
    assert!(!is_served(GOOD, address), "sessions from before the reload are not counted");
    let mut conf = proxy.conf();
    conf.frontend_mut("web").keys = "sources = { connections_max = 3 }".into();
    proxy.reload(conf);
    assert!(is_served(GOOD, address), "the new cap is not applied");
    assert!(held.iter().all(holds));
    drop(backend);
}

fn other_sources_are_served_during_a_flood_from_one_source(engine: Engine) {
    let (proxy, backend) = start(engine, "rate = \"5/s\", burst = 5");
    let address = proxy.addr("web");
    let over = std::sync::atomic::AtomicBool::new(false);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    drop(connect_from(BAD.parse().unwrap(), address));
                    // Clients that connect without a pause would use most of the shared CPU.
                    std::thread::sleep(ms(1));
                }
            });
        }
        eventually(secs(30), "the flood has started", || refused(&proxy, "source-rate") > 500.0);
        let served = (10..40).filter(|n| is_served(&format!("127.0.1.{n}"), address)).count();
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(served, 30, "other sources, one connection each");
    });
    // The other clients, and the rate of the flooding source.
    let most = 30 + 5 + (begun.elapsed().as_secs_f64() * 5.0).ceil() as u64;
    assert!(
        backend.accepted() <= most,
        "{}: rejected clients reached the backend",
        backend.accepted()
    );
}
