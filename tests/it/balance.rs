//! Distribution of connections over backends: the split, the caps and the backups.
//!
//! The backends count their connections themselves.

use crate::common::backend::{self, ScriptedBackend, script};
use crate::common::client::{self, connect_from};
use crate::common::conf::{Conf, Pool};
use crate::common::proc::raise_own_fd_limit;
use crate::common::proxy::TestProxy;
use crate::common::servers::{Nginx, Redis, redis_benchmark};
use crate::common::{
    Engine, eventually, have, http, long, measured, ms, on_every_engine, on_every_engine_alone,
    on_every_engine_quiet, patience, secs,
};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

on_every_engine!(
    seven_hundred_connections_split_exactly,
    split_stays_exact_during_reloads_of_other_pools,
    split_stays_exact_under_concurrency,
    least_connections_follows_the_weights,
    restarted_backend_gets_at_most_its_share_in_slow_start,
    random_and_two_choices_use_every_backend,
    peak_ewma_reduces_the_share_of_a_slow_backend,
    source_hash_keeps_the_backend_after_a_restart,
    removing_a_backend_moves_few_sources,
    backend_cap_is_never_exceeded,
    frontend_cap_is_never_exceeded,
    process_cap_is_never_exceeded,
    backup_serves_only_without_primaries,
    second_backup_serves_only_without_the_first_with_backups_one,
);
on_every_engine_alone!(redis_benchmark_runs_without_errors);
on_every_engine_quiet!(waiting_client_is_served_soon_after_a_slot_is_freed);

const TCP_PROBE: &str = "kind = \"tcp\"\ninterval = \"100ms\"\ntimeout = \"100ms\"";
const WEIGHTS: [(&str, u64); 3] = [("a", 5), ("b", 1), ("c", 1)];

/// Sends one request on each of `count` connections over `threads` threads. Returns how
/// many requests each name answered.
fn split(address: SocketAddr, count: u64, threads: usize) -> BTreeMap<String, u64> {
    let names = Mutex::new(BTreeMap::new());
    let left = AtomicU64::new(count);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let take = |n: u64| n.checked_sub(1);
                while left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
                    let answer = http::over_tcp(address, "/").expect("a request that is answered");
                    assert_eq!(answer.status, 200);
                    *names.lock().unwrap().entry(answer.body).or_insert(0) += 1;
                }
            });
        }
    });
    names.into_inner().unwrap()
}

fn weighted_nginx(engine: Engine) -> Option<(Vec<Nginx>, Conf)> {
    if !have(&["nginx"]) {
        return None;
    }
    let servers: Vec<Nginx> = WEIGHTS.iter().map(|(name, _)| Nginx::start(name)).collect();
    let mut pool = Pool::new("web");
    for (server, (name, weight)) in servers.iter().zip(WEIGHTS) {
        pool = pool.backend_with(name, server.address, &format!("weight = {weight}"));
    }
    Some((servers, Conf::simple(engine, pool).workers(2)))
}

fn expected(total: u64) -> BTreeMap<String, u64> {
    WEIGHTS.iter().map(|(name, weight)| (name.to_string(), total * weight / 7)).collect()
}

fn seven_hundred_connections_split_exactly(engine: Engine) {
    let Some((_servers, conf)) = weighted_nginx(engine) else { return };
    let proxy = TestProxy::start(conf);
    assert_eq!(split(proxy.addr("web"), 700, 1), expected(700));
}

fn split_stays_exact_under_concurrency(engine: Engine) {
    let Some((_servers, conf)) = weighted_nginx(engine) else { return };
    let proxy = TestProxy::start(conf);
    assert_eq!(split(proxy.addr("web"), 700, 16), expected(700));
}

fn split_stays_exact_during_reloads_of_other_pools(engine: Engine) {
    let Some((_servers, conf)) = weighted_nginx(engine) else { return };
    let other = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("other").backend_with("x", other.address(), "weight = 1");
    let mut proxy = TestProxy::start(conf.frontend("other", "other", "").pool(pool));
    let address = proxy.addr("web");
    let done = AtomicBool::new(false);
    let got = std::thread::scope(|scope| {
        let counting = scope.spawn(|| {
            let got = split(address, 700, 2);
            done.store(true, Ordering::SeqCst);
            got
        });
        let mut reloads = 0;
        while reloads < 20 || !done.load(Ordering::SeqCst) {
            let mut conf = proxy.conf();
            reloads += 1;
            conf.pool_mut("other").backends[0].keys = format!("weight = {}", reloads % 900 + 2);
            proxy.reload(conf);
        }
        counting.join().unwrap()
    });
    assert_eq!(got, expected(700));
    assert!(proxy.generation() > 20);
}

fn redis_benchmark_runs_without_errors(engine: Engine) {
    if !have(&["redis-server", "redis-benchmark"]) {
        return;
    }
    let servers = [Redis::start(), Redis::start()];
    let pool = Pool::new("redis")
        .key("balance = \"least-connections\"")
        .backend("a", servers[0].address)
        .backend("b", servers[1].address);
    let proxy = TestProxy::start(Conf::new(engine).frontend("redis", "redis", "").pool(pool));
    let address = proxy.addr("redis");
    let requests = if long() { "200000" } else { "50000" };
    for extra in [&["-c", "50"][..], &["-c", "50", "-P", "16"]] {
        let base = ["-n", requests, "-t", "get", "-q"];
        let report = redis_benchmark(address, &[&base[..], extra].concat());
        let last = report.lines().rfind(|line| line.contains("requests per second"));
        measured(&format!("{extra:?}: {}", last.unwrap_or("?").trim()));
    }
    let totals = ["a", "b"].map(|name| proxy.backend("redis", name)["sessions_total"].as_u64());
    // 50 clients in each run. Each goes to the backend with fewer connections.
    let [Some(a), Some(b)] = totals else { panic!("no totals: {totals:?}") };
    assert!(a >= 50 && b >= 50, "{a} and {b} sessions");
}

fn least_connections_follows_the_weights(engine: Engine) {
    let backends = [(); 2].map(|()| ScriptedBackend::start(backend::greet("x")));
    let pool = Pool::new("web")
        .key("balance = \"least-connections\"")
        .backend("a", backends[0].address())
        .backend_with("b", backends[1].address(), "weight = 3");
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    // All connections are held, so the connections in flight follow the weights.
    let held: Vec<TcpStream> = (0..40).map(|_| greeted(proxy.addr("web"))).collect();
    let open = backends.each_ref().map(ScriptedBackend::active);
    assert_eq!(open, [10, 30]);
    drop(held);
}

fn greeted(address: SocketAddr) -> TcpStream {
    let mut stream = client::connect(address);
    stream.read_exact(&mut [0]).expect("a greeting");
    stream
}

/// Opens `count` sessions and keeps them open, each with the name of its backend.
fn named_sessions(address: SocketAddr, count: usize) -> Vec<(char, TcpStream)> {
    let open = || {
        let (mut stream, mut name) = (client::connect(address), [0]);
        stream.read_exact(&mut name).expect("a greeting");
        (char::from(name[0]), stream)
    };
    (0..count).map(|_| open()).collect()
}

fn restarted_backend_gets_at_most_its_share_in_slow_start(engine: Engine) {
    let [mut a, b, c] = ["a", "b", "c"].map(|name| ScriptedBackend::start(backend::greet(name)));
    let pool = Pool::new("web")
        .key("balance = \"least-connections\"\nslow_start = \"3s\"")
        .probe(TCP_PROBE)
        .backend("a", a.address())
        .backend("b", b.address())
        .backend("c", c.address());
    raise_own_fd_limit();
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    ["a", "b", "c"].iter().for_each(|name| proxy.wait_backend("web", name, "observation", "up"));
    let up = Instant::now();
    let before = named_sessions(proxy.addr("web"), 30);
    assert_eq!(of_a(&before), 10);
    let address = a.socket_address();
    a.stop();
    drop(before);
    proxy.wait_backend("web", "a", "observation", "down");
    let others = named_sessions(proxy.addr("web"), 800);
    assert_eq!(of_a(&others), 0);
    eventually(secs(10), "the slow start has passed", || up.elapsed() > ms(3_100));
    let _restarted = ScriptedBackend::start_on(address, backend::greet("a"));
    proxy.wait_backend("web", "a", "observation", "up");
    let (mut sessions, mut ramp) = (Vec::new(), 0.0);
    while sessions.len() < 40 && ramp < 40.0 {
        sessions.extend(named_sessions(proxy.addr("web"), 10));
        ramp = proxy.backend("web", "a")["ramp_percent"].as_f64().unwrap();
    }
    let (its, all) = (of_a(&sessions), sessions.len());
    let share = ramp / (200.0 + ramp) * all as f64;
    measured(&format!("{its} of {all}, expected {share:.1}"));
    assert!((its as f64) < share + 10.0, "{its} of {all}");
}

fn of_a(sessions: &[(char, TcpStream)]) -> usize {
    sessions.iter().filter(|(name, _)| *name == 'a').count()
}

fn random_and_two_choices_use_every_backend(engine: Engine) {
    let backends = ["a", "b", "c"].map(|name| ScriptedBackend::start(backend::name(name)));
    for policy in ["random", "two-choices"] {
        let mut pool = Pool::new("web").key(&format!("balance = \"{policy}\""));
        for (backend, name) in backends.iter().zip(["a", "b", "c"]) {
            pool = pool.backend(name, backend.address());
        }
        let before = backends.each_ref().map(ScriptedBackend::accepted);
        let proxy = TestProxy::start(Conf::simple(engine, pool));
        for _ in 0..300 {
            client::ask(proxy.addr("web")).unwrap();
        }
        for (backend, before) in backends.iter().zip(before) {
            // 100 are expected. 60 and 140 are more than 5 standard deviations away.
            let share = backend.accepted() - before;
            assert!((60..=140).contains(&share), "{policy}: {share} of 300");
        }
    }
}

/// Starts a backend that answers HTTP after a delay of `millis`.
fn delayed(millis: &Arc<AtomicU64>) -> ScriptedBackend {
    let (millis, answer) = (millis.clone(), backend::http("x", 200));
    ScriptedBackend::start(script(move |conn| {
        // The delay that this backend exists for.
        std::thread::sleep(ms(millis.load(Ordering::Relaxed)));
        answer(conn);
    }))
}

fn peak_ewma_reduces_the_share_of_a_slow_backend(engine: Engine) {
    let delays = [15, 15, 90].map(|millis| Arc::new(AtomicU64::new(millis)));
    let backends = delays.each_ref().map(delayed);
    let mut pool = Pool::new("web").key("balance = \"peak-ewma\"");
    for (backend, name) in backends.iter().zip(["a", "b", "c"]) {
        pool = pool.backend(name, backend.address());
    }
    let proxy = TestProxy::start(Conf::simple(engine, pool).workers(2));
    let share = |sessions| {
        let before = backends[2].accepted();
        split(proxy.addr("web"), sessions, 2);
        (backends[2].accepted() - before) as f64 / sessions as f64
    };
    let slow = share(300);
    assert!(slow < 1.0 / 3.0 / 2.0, "{slow:.3} of the sessions went to the slow backend");
    delays[2].store(15, Ordering::Relaxed);
    let started = Instant::now();
    // The measured latency decays: from 90 ms to 15 ms it takes 18 s.
    eventually(secs(60), "the backend has its share again", || share(100) > 1.0 / 3.0 / 2.0);
    measured(&format!("{slow:.3} while slow, its share again after {:.1?}", started.elapsed()));
}

/// Returns the backend of each of 40 source addresses.
fn by_source(address: SocketAddr) -> BTreeMap<IpAddr, String> {
    (1..=40)
        .map(|last| {
            let source = IpAddr::V4(Ipv4Addr::new(127, 0, 1, last));
            let stream = connect_from(source, address).expect("connect");
            stream.shutdown(std::net::Shutdown::Write).expect("FIN");
            (source, client::read_text(&stream).expect("a name"))
        })
        .collect()
}

fn source_hash_pool(backends: &[ScriptedBackend]) -> Pool {
    let pool = Pool::new("web").key("balance = \"source-hash\"");
    backends
        .iter()
        .zip(["a", "b", "c", "d"])
        .fold(pool, |pool, (backend, name)| pool.backend(name, backend.address()))
}

fn source_hash_keeps_the_backend_after_a_restart(engine: Engine) {
    let backends = ["a", "b", "c", "d"].map(|name| ScriptedBackend::start(backend::name(name)));
    let mut proxy = TestProxy::start(Conf::simple(engine, source_hash_pool(&backends)));
    let first = by_source(proxy.addr("web"));
    assert_eq!(by_source(proxy.addr("web")), first, "the same process");
    let used: std::collections::BTreeSet<&String> = first.values().collect();
    assert!(used.len() >= 3, "40 sources use only {used:?}");
    proxy.restart();
    assert_eq!(by_source(proxy.addr("web")), first, "another process");
}

fn removing_a_backend_moves_few_sources(engine: Engine) {
    let backends = ["a", "b", "c", "d"].map(|name| ScriptedBackend::start(backend::name(name)));
    let mut proxy = TestProxy::start(Conf::simple(engine, source_hash_pool(&backends)));
    let before = by_source(proxy.addr("web"));
    let mut conf = proxy.conf();
    conf.pool_mut("web").backends.remove(1);
    proxy.reload(conf);
    let after = by_source(proxy.addr("web"));
    assert!(after.values().all(|name| name != "b"));
    let strays: Vec<_> =
        before.iter().filter(|(ip, name)| *name != "b" && after[ip] != **name).collect();
    // At most 2 % of the sources move without need. Of 40 sources that is 0, or 1 by
    // rounding.
    assert!(strays.len() <= 1, "moved without need: {strays:?}");
}

/// Opens `clients` connections through a cap of `cap`. Checks that at most `cap` are open
/// at the same time and that every client is served.
fn assert_cap_holds(proxy: &TestProxy, backends: &[&ScriptedBackend], cap: u64, clients: usize) {
    let address = proxy.addr("web");
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(move || {
                let stream = greeted(address);
                // Long enough for other clients to wait for the slot.
                std::thread::sleep(ms(20));
                drop(stream);
            });
        }
    });
    let peak: u64 = backends.iter().map(|backend| backend.active_peak()).sum();
    let accepted: u64 = backends.iter().map(|backend| backend.accepted()).sum();
    assert_eq!(accepted, clients as u64);
    assert!(peak <= cap, "{peak} connections with a cap of {cap}");
    assert!(peak > cap / 2, "at most {peak} connections, so the cap was not reached");
}

/// Starts a backend that greets and closes as soon as it sees the client's FIN, before
/// Tidegate can count the slot as free.
fn capped_backend() -> ScriptedBackend {
    ScriptedBackend::start(script(|conn| {
        let _ = conn.write_all(b"x");
        conn.drain();
    }))
}

fn backend_cap_is_never_exceeded(engine: Engine) {
    let (a, b) = (capped_backend(), capped_backend());
    let pool = Pool::new("web").backend_with("a", a.address(), "connections_max = 3").backend_with(
        "b",
        b.address(),
        "connections_max = 5",
    );
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    assert_cap_holds(&proxy, &[&a, &b], 8, 60);
    assert!(a.active_peak() <= 3 && b.active_peak() <= 5);
}

fn frontend_cap_is_never_exceeded(engine: Engine) {
    let a = capped_backend();
    let pool = Pool::new("web").backend("a", a.address());
    let conf = Conf::new(engine).frontend("web", "web", "connections_max = 7").pool(pool);
    assert_cap_holds(&TestProxy::start(conf), &[&a], 7, 60);
}

fn process_cap_is_never_exceeded(engine: Engine) {
    let a = capped_backend();
    let conf = Conf::simple(engine, Pool::new("web").backend("a", a.address()));
    let proxy = TestProxy::start(conf.process("connections_max = 9"));
    assert_cap_holds(&proxy, &[&a], 9, 60);
}

fn waiting_client_is_served_soon_after_a_slot_is_freed(engine: Engine) {
    for (what, frontend_keys, backend_keys, process) in [
        ("frontend", "connections_max = 2", "", ""),
        ("backend", "", "connections_max = 2", ""),
        ("process", "", "", "connections_max = 2"),
    ] {
        let backend = capped_backend();
        let pool = Pool::new("web").backend_with("a", backend.address(), backend_keys);
        let conf = Conf::new(engine).frontend("web", "web", frontend_keys).pool(pool);
        let proxy = TestProxy::start(conf.process(process));
        let lateness = Lateness::watch();
        let waits = wait_times(proxy.addr("web"), 40);
        let lateness = lateness.worst();
        let (median, worst) = (waits[waits.len() / 2], waits[waits.len() - 1]);
        let count = waits.len();
        measured(&format!(
            "{what} cap: median {median:.2?}, worst {worst:.2?} of {count}, \
             machine late by {lateness:.2?}"
        ));
        assert!(median <= patience(ms(10)), "{what}: median {median:?}");
        // A freed slot takes three wake-ups, and each can be as late as the measured lateness.
        // 50 ms more cover the time slices of a shared machine, which a sleeping thread does
        // not notice.
        let allowed = patience(ms(60)) + 3 * lateness;
        assert!(worst <= allowed, "{what}: worst {worst:?}, machine late by {lateness:?}");
    }
}

/// Measures how late this machine wakes a sleeping thread.
struct Lateness {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Duration>,
}

impl Lateness {
    fn watch() -> Lateness {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                let mut worst = Duration::ZERO;
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    std::thread::sleep(ms(1));
                    worst = worst.max(start.elapsed() - ms(1));
                }
                worst
            }
        });
        Lateness { stop, thread }
    }

    fn worst(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread only sleeps")
    }
}

/// Runs 2 + `rounds` clients through two slots. Returns the times from the end of one
/// session to the start of the next, sorted.
fn wait_times(address: SocketAddr, rounds: usize) -> Vec<Duration> {
    let (served, inbox) = mpsc::channel();
    for _ in 0..rounds + 2 {
        let served = served.clone();
        std::thread::spawn(move || {
            let stream = greeted(address);
            let _ = served.send((Instant::now(), stream));
        });
    }
    let timeout = patience(secs(10));
    let mut held: Vec<TcpStream> =
        (0..2).map(|_| inbox.recv_timeout(timeout).expect("a free slot is used").1).collect();
    let mut waits: Vec<Duration> = (0..rounds)
        .map(|_| {
            let left = Instant::now();
            drop(held.pop());
            let (at, stream) = inbox.recv_timeout(timeout).expect("a waiting client is served");
            held.insert(0, stream);
            at.duration_since(left)
        })
        .collect();
    waits.sort();
    waits
}

fn second_backup_serves_only_without_the_first_with_backups_one(engine: Engine) {
    let [main, first, second] =
        ["main", "first", "second"].map(|name| ScriptedBackend::start(backend::name(name)));
    let pool = Pool::new("web")
        .key("backups = \"one\"")
        .backend_with("first", first.address(), "backup = true")
        .backend("main", main.address())
        .backend_with("second", second.address(), "backup = true");
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let answers = |expected: &str| {
        for _ in 0..10 {
            assert_eq!(client::ask(proxy.addr("web")).unwrap(), expected);
        }
    };
    answers("main");
    proxy.cli_ok(&["drain", "web/main"]);
    answers("first");
    let why = proxy.explained("web", "second")["why"].to_string();
    assert!(why.contains("while no primary and no backup before it is eligible"), "{why}");
    proxy.cli_ok(&["drain", "web/first"]);
    answers("second");
    proxy.cli_ok(&["undrain", "web/main"]);
    answers("main");
}

fn backup_serves_only_without_primaries(engine: Engine) {
    let mut a = ScriptedBackend::start(backend::name("a"));
    let b = ScriptedBackend::start(backend::name("b"));
    let spare = ScriptedBackend::start(backend::name("spare"));
    let pool = Pool::new("web")
        .probe(TCP_PROBE)
        .backend("a", a.address())
        .backend("b", b.address())
        .backend_with("spare", spare.address(), "backup = true");
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    for name in ["a", "b", "spare"] {
        proxy.wait_backend("web", name, "observation", "up");
    }
    let ask = || client::ask(proxy.addr("web")).unwrap();
    assert!((0..20).all(|_| ask() != "spare"));
    proxy.cli_ok(&["drain", "web/b"]);
    assert!((0..20).all(|_| ask() == "a"));
    a.stop();
    proxy.wait_backend("web", "a", "observation", "down");
    assert!((0..20).all(|_| ask() == "spare"));
    proxy.cli_ok(&["undrain", "web/b"]);
    eventually(secs(5), "the primary is eligible", || ask() == "b");
    assert!((0..20).all(|_| ask() == "b"));
}
