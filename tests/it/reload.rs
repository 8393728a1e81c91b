//! Configuration reloads of a running process: noticed, applied as a whole or not at all, and
//! without an effect on sessions.
//!
//! Reloads here change the number of listeners, so each test sets a new descriptor baseline
//! after its last reload.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::TestProxy;
use crate::common::servers::{Nginx, Wrk};
use crate::common::stable::Steady;
use crate::common::{
    Engine, eventually, have, long, measured, ms, on_every_engine, on_every_engine_alone, patience,
    secs,
};
use rustix::process::Signal;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

on_every_engine!(
    invalid_files_change_nothing_and_are_reported,
    in_place_write_is_noticed,
    atomic_rename_is_noticed,
    configmap_symlink_swap_is_noticed,
    sighup_reloads,
    reload_command_reports_success_and_errors,
    reload_of_an_unchanged_file_keeps_the_generation,
    reload_moves_a_frontend_to_a_new_address,
    reload_with_an_address_in_use_changes_nothing,
    removed_backend_keeps_its_sessions,
    close_after_resets_the_sessions_of_a_removed_backend,
    removing_a_frontend_resets_no_queued_connection,
    change_that_needs_a_restart_gives_a_warning,
);
on_every_engine_alone!(reloads_under_load_lose_nothing);

fn named(name: &str) -> ScriptedBackend {
    ScriptedBackend::start(backend::name(name))
}

/// A pool `web` with a single backend.
fn only(name: &str, backend: &ScriptedBackend) -> Pool {
    Pool::new("web").backend(name, backend.address())
}

fn reloads_under_load_lose_nothing(engine: Engine) {
    if !have(&["nginx", "wrk"]) {
        return;
    }
    let servers = ["n1", "n2", "n3"].map(Nginx::start);
    let ledger = Ledger::without_aborts(StreamSizes { most: 64 * 1024, large_one_in: 0 });
    let streams = [(); 3].map(|()| ScriptedBackend::start(ledger.script()));
    let web = Pool::new("web").backend("n1", servers[0].address).backend("n2", servers[1].address);
    let led = Pool::new("led").backend("s0", streams[0].address());
    let conf = Conf::new(engine).frontend("web", "web", "").frontend("led", "led", "");
    let mut proxy = TestProxy::start(conf.pool(web).pool(led));
    let (web, led) = (proxy.addr("web"), proxy.addr("led"));
    let first_generation = proxy.generation();
    // Five per second.
    let (reloads, seconds) = if long() { (50, 11) } else { (20, 5) };
    let (wrk, steady) = (Wrk::start(web, 20, seconds), Steady::start(web, 2));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| ledger.run_until(&[led], &stop, 4));
        let _stop_even_on_panic = StopOnDrop(&stop);
        let start = Instant::now();
        for round in 1..=reloads {
            let conf = altered(proxy.conf(), round, &servers, &streams);
            let (had, has) = (proxy.conf(), conf.clone());
            proxy.reload(conf);
            assert_extra_frontend(&had, &has);
            let due = start + ms(200) * round;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    });
    let (report, attempts) = (wrk.report(), steady.stop());
    let failed: Vec<_> = attempts.iter().filter(|attempt| attempt.result.is_err()).collect();
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), attempts.len(), failed[0]);
    assert_eq!(report.errors(), 0, "{}", report.text);
    ledger.settle();
    ledger.assert_clean();
    assert_eq!(proxy.generation(), first_generation + u64::from(reloads));
    let counts = (report.requests, attempts.len(), ledger.streams());
    assert!(counts.0 > 1000 && counts.1 > 200 && counts.2 > 200, "{counts:?}");
    measured(&format!("{reloads} reloads under {counts:?} requests, sessions and streams"));
    proxy.rebaseline();
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Returns the configuration for one of the reloads. Weights always change. One backend of
/// each pool and one frontend are added and removed.
fn altered(mut conf: Conf, round: u32, servers: &[Nginx], streams: &[ScriptedBackend]) -> Conf {
    let web = conf.pool_mut("web");
    web.backends.truncate(2);
    web.backends[0].keys = format!("weight = {}", round + 1);
    if round % 2 == 1 {
        *web = web.clone().backend("n3", servers[2].address);
    }
    let led = conf.pool_mut("led");
    let stream = &streams[round as usize % 3];
    led.backends.clear();
    *led = led
        .clone()
        .backend(&format!("s{}", round % 3), stream.address())
        .backend("other", streams[(round as usize + 1) % 3].address());
    conf.frontends.truncate(2);
    if round % 3 == 1 { conf.frontend("extra", "web", "") } else { conf }
}

/// Checks that an added frontend answers at once and that a removed frontend refuses.
fn assert_extra_frontend(had: &Conf, has: &Conf) {
    if has.frontends.len() > 2 {
        let answer = crate::common::http::over_tcp(has.address("extra"), "/").expect("an answer");
        assert_eq!(answer.status, 200);
    } else if had.frontends.len() > 2 {
        eventually(secs(2), "the removed frontend refuses", || {
            // SYNs are dropped while the listener drains. TCP would resend them after 1 s.
            TcpStream::connect_timeout(&had.address("extra"), ms(50))
                .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        });
    }
}

/// The invalid files of the configuration tests.
fn invalid_cases() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config_cases/invalid");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(dir)
        .expect("tests/config_cases/invalid")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    cases.sort();
    cases
}

fn invalid_files_change_nothing_and_are_reported(engine: Engine) {
    let (a, held) = (named("a"), ScriptedBackend::start(backend::echo()));
    let conf = Conf::simple(engine, only("a", &a));
    let conf =
        conf.frontend("held", "held", "").pool(Pool::new("held").backend("h", held.address()));
    let proxy = TestProxy::start(conf);
    let open = connect(proxy.addr("held"));
    let cases = invalid_cases();
    assert!(cases.len() >= 20, "only {} cases", cases.len());
    let generation = proxy.generation();
    for case in &cases {
        let name = case.file_name().unwrap().to_string_lossy();
        proxy.rewrite_by_rename_bytes(&std::fs::read(case).unwrap());
        let answer = proxy.admin_request("POST", "/v1/reload");
        assert_eq!(answer.status, 422, "{name}: {}", answer.body);
        assert_problems(&proxy, &answer.json(), &name);
        assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a", "{name}");
        assert_eq!(client::exchange(&open, b"still").unwrap(), b"still", "{name}");
    }
    assert_eq!(proxy.generation(), generation);
    let refused = proxy.metric("tidegate_reloads_total", &[("result", "refused")]);
    assert!(refused >= cases.len() as f64, "{refused} refused reloads");
}

#[track_caller]
fn assert_problems(proxy: &TestProxy, answer: &serde_json::Value, name: &str) {
    let answer = if answer["problems"].is_array() { answer } else { &answer["detail"] };
    let problems = answer["problems"].as_array();
    let problems = problems.unwrap_or_else(|| panic!("{name}: no problems in {answer:#}"));
    assert!(!problems.is_empty(), "{name}: no problems in {answer:#}");
    for problem in problems {
        let path = proxy.config_path().to_string_lossy();
        assert_eq!(problem["file"], *path, "{name}: {problem:#}");
        assert!(problem["line"].as_u64() >= Some(1), "{name}: {problem:#}");
        assert!(problem["column"].as_u64() >= Some(1), "{name}: {problem:#}");
        assert!(problem["message"].as_str().is_some_and(|text| !text.is_empty()), "{name}");
    }
}

/// Starts with backend a, rewrites the file to backend b with `rewrite`, and waits until
/// sessions go to b.
fn assert_noticed(engine: Engine, rewrite: fn(&TestProxy, &str), times: u64) {
    let backends = [named("a"), named("b")];
    let mut proxy = TestProxy::start(Conf::simple(engine, only("a", &backends[0])));
    let address = proxy.addr("web");
    assert_eq!(client::ask(address).unwrap(), "a");
    for round in 0..times {
        let (name, backend) = [("b", &backends[1]), ("a", &backends[0])][round as usize % 2];
        let mut conf = proxy.conf();
        conf.pools = vec![only(name, backend)];
        let start = Instant::now();
        rewrite(&proxy, &proxy.render(&conf));
        eventually(secs(5), &format!("change {round} is noticed"), || {
            client::ask(address).unwrap() == name
        });
        measured(&format!("change {round} noticed in {:.2?}", start.elapsed()));
        proxy.adopt(conf);
    }
    assert_eq!(proxy.generation(), 1 + times);
}

fn in_place_write_is_noticed(engine: Engine) {
    assert_noticed(engine, TestProxy::rewrite_in_place, 2);
}

fn atomic_rename_is_noticed(engine: Engine) {
    // Three rewrites, because a watch on the file itself misses all after the first.
    assert_noticed(engine, TestProxy::rewrite_by_rename, 3);
}

fn configmap_symlink_swap_is_noticed(engine: Engine) {
    // The first call makes the file a link, and later calls replace the link's target.
    assert_noticed(engine, TestProxy::rewrite_by_symlink_swap, 3);
}

fn sighup_reloads(engine: Engine) {
    let backends = [named("a"), named("b")];
    let proxy = TestProxy::start(Conf::simple(engine, only("a", &backends[0])));
    let mut conf = proxy.conf();
    conf.pools = vec![only("b", &backends[1])];
    // The file is written through a hard link in another directory. The watched directory gets
    // no event (inotify(7)), so only the signal causes the reload.
    let elsewhere = tempfile::tempdir_in("/tmp").unwrap();
    let alias = elsewhere.path().join("alias.toml");
    std::fs::hard_link(proxy.config_path(), &alias).unwrap();
    std::fs::write(&alias, proxy.render(&conf)).unwrap();
    std::thread::sleep(ms(700));
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a", "no event in the watched directory");
    proxy.sighup();
    eventually(secs(2), "SIGHUP reloads the file", || {
        client::ask(proxy.addr("web")).unwrap() == "b"
    });
}

fn reload_command_reports_success_and_errors(engine: Engine) {
    let backends = [named("a"), named("b")];
    let mut proxy = TestProxy::start(Conf::simple(engine, only("a", &backends[0])));
    let mut conf = proxy.conf();
    conf.pools = vec![only("b", &backends[1])];
    proxy.rewrite_by_rename(&proxy.render(&conf));
    proxy.cli_ok(&["reload"]);
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "b");
    proxy.rewrite_by_rename("[process]\nworkerz = 1\n");
    let output = proxy.cli(&["reload"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("tidegate.toml:2:1: error:"), "{text}");
    for word in ["2 | workerz = 1", "^^^^^^^", "help: did you mean \"workers\"?"] {
        assert!(text.contains(word), "{word:?} in {text}");
    }
    // An error about an unknown value lists the valid values, in the answer and in the log.
    proxy.rewrite_by_rename("[process]\nengine = \"quick\"\n");
    let answer = proxy.admin_request("POST", "/v1/reload").json();
    let problems = answer["problems"].as_array().cloned().unwrap_or_default();
    let help = problems.iter().filter_map(|problem| problem["help"].as_str());
    let right = "known values: \"auto\", \"io_uring\", \"epoll\"";
    assert!(help.collect::<String>().contains(right), "{answer:#}");
    // The log contains the error as one quoted value.
    eventually(secs(5), "the error is in the log", || {
        proxy.log().replace('\\', "").contains(right)
    });
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(3)), Some(0));
    assert_eq!(proxy.cli(&["reload"]).status.code(), Some(3), "no process");
}

fn reload_of_an_unchanged_file_keeps_the_generation(engine: Engine) {
    let a = named("a");
    let mut proxy = TestProxy::start(Conf::simple(engine, only("a", &a)));
    let generation = proxy.generation();
    let answer = proxy.reload(proxy.conf());
    assert_eq!(answer["changed"], false, "{answer}");
    assert_eq!(answer["generation"], generation, "{answer}");
    // Changes of comments and white space are no change of the configuration.
    proxy.rewrite_in_place(&format!("# a note\n{}\n\n", proxy.render(&proxy.conf())));
    let answer = proxy.admin_request("POST", "/v1/reload").json();
    assert_eq!(answer["changed"], false, "{answer}");
    proxy.sighup();
    std::thread::sleep(ms(300));
    assert_eq!(proxy.generation(), generation);
}

fn reload_moves_a_frontend_to_a_new_address(engine: Engine) {
    let a = ScriptedBackend::start(backend::http("a", 200));
    let mut proxy = TestProxy::start(Conf::simple(engine, only("a", &a)));
    let old = proxy.addr("web");
    let open = connect(old);
    let request = b"GET / HTTP/1.1\r\n\r\n";
    (&open).write_all(request).unwrap();
    let steady = Steady::start(old, 3);
    std::thread::sleep(ms(200));
    let mut conf = proxy.conf();
    conf.move_ports();
    let asked = Instant::now();
    proxy.reload(conf);
    let answer = crate::common::http::over_tcp(proxy.addr("web"), "/");
    assert_eq!(answer.expect("an answer on the new address").body, "a");
    eventually(secs(2), "the old address refuses", || try_connect(old).is_err());
    std::thread::sleep(ms(100));
    let attempts = steady.stop();
    for attempt in attempts.iter().filter(|attempt| attempt.result.is_err()) {
        let error = attempt.result.as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{attempt:?}");
        assert!(attempt.began + patience(ms(50)) >= asked, "refused before the reload");
    }
    // The open session continues.
    (&open).write_all(request).unwrap();
    let mut answers = String::new();
    while answers.matches("200").count() < 2 {
        let mut buffer = [0; 1024];
        let n = std::io::Read::read(&mut &open, &mut buffer).unwrap();
        answers += std::str::from_utf8(&buffer[..n]).unwrap();
    }
    drop(open);
    eventually(secs(5), "the session ends", || a.active() == 0);
    proxy.rebaseline();
}

fn reload_with_an_address_in_use_changes_nothing(engine: Engine) {
    let (a, b) = (named("a"), named("b"));
    let proxy = TestProxy::start(Conf::simple(engine, only("a", &a)));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut conf = proxy.conf();
    conf.frontend_mut("web").binds.push(taken.local_addr().unwrap());
    conf.pools = vec![only("b", &b)];
    proxy.rewrite_by_rename(&proxy.render(&conf));
    let answer = proxy.admin_request("POST", "/v1/reload");
    assert!((400..600).contains(&answer.status), "{} {}", answer.status, answer.body);
    let address = taken.local_addr().unwrap().to_string();
    assert!(answer.body.contains(&address), "no address in the error: {}", answer.body);
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a", "no part of the change is applied");
    assert_eq!(proxy.generation(), 1);
}

fn removed_backend_keeps_its_sessions(engine: Engine) {
    let (a, b) = (ScriptedBackend::start(backend::echo()), named("b"));
    let mut proxy = TestProxy::start(Conf::simple(engine, only("a", &a)));
    let open = connect(proxy.addr("web"));
    client::exchange(&open, b"before").unwrap();
    let mut conf = proxy.conf();
    conf.pools = vec![only("b", &b)];
    proxy.reload(conf);
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "b");
    assert_eq!(client::exchange(&open, b"after").unwrap(), b"after");
    drop(open);
    eventually(secs(5), "the session ends", || a.active() == 0);
    assert_eq!(a.counts().fins_seen.load(Ordering::Relaxed), 1);
}

fn close_after_resets_the_sessions_of_a_removed_backend(engine: Engine) {
    let (a, b) = (ScriptedBackend::start(backend::echo()), named("b"));
    let pool = only("a", &a).key("on_removal = \"close-after 700ms\"");
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    let open = connect(proxy.addr("web"));
    client::exchange(&open, b"before").unwrap();
    let mut conf = proxy.conf();
    conf.pools = vec![only("b", &b).key("on_removal = \"close-after 700ms\"")];
    let start = Instant::now();
    proxy.reload(conf);
    client::exchange(&open, b"within the grace").unwrap();
    assert_eq!(client::read_to_end(&open), End::Reset(0));
    let after = start.elapsed();
    assert!(after > ms(500) && after < patience(secs(2)), "reset after {after:?}");
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "backend-removed", "{:#}", log[0]);
}

fn removing_a_frontend_resets_no_queued_connection(engine: Engine) {
    let (a, stays) = (named("a"), named("stays"));
    let conf = Conf::simple(engine, only("a", &a)).frontend("stays", "stays", "");
    let mut proxy = TestProxy::start(conf.pool(Pool::new("stays").backend("s", stays.address())));
    let address = proxy.addr("web");
    let mut conf = proxy.conf();
    conf.frontends.remove(0);
    conf.pools.remove(0);
    // A stopped process accepts nothing, so the connections fill the listen queues.
    proxy.signal(Signal::STOP);
    let queued: Vec<TcpStream> = (0..100).map(|_| connect(address)).collect();
    proxy.rewrite_by_rename(&proxy.render(&conf));
    proxy.sighup();
    proxy.signal(Signal::CONT);
    for stream in &queued {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client::read_text(stream).expect("no reset"), "a");
    }
    proxy.adopt(conf);
    eventually(secs(5), "the frontend is removed", || refuses(address));
    proxy.rebaseline();
}

fn refuses(address: SocketAddr) -> bool {
    try_connect(address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn change_that_needs_a_restart_gives_a_warning(engine: Engine) {
    let a = named("a");
    let mut proxy = TestProxy::start(Conf::simple(engine, only("a", &a)).workers(1));
    let threads = proxy.threads();
    let conf = proxy.conf().workers(2);
    proxy.reload(conf);
    assert_eq!(proxy.status()["workers"], 1, "not applied");
    assert_eq!(proxy.threads(), threads);
    let warnings = proxy.status()["warnings"].clone();
    let warning = warnings[0].as_str().unwrap_or_else(|| panic!("no warning in {warnings}"));
    assert!(warning.contains("[process] workers"), "{warning}");
    eventually(secs(5), "the warning is in the log", || proxy.log().contains(warning));
}

/// Workers once kept records of removed backends until the next admin request. This test runs
/// on one engine, because only the control thread is involved.
#[test]
fn removed_backends_use_no_memory_without_admin_requests() {
    const EACH: u32 = 100;
    let _share = crate::common::exclusive::shared();
    let everywhere = SocketAddr::from(([0, 0, 0, 0], crate::common::ports::free_port()));
    let backend = ScriptedBackend::start_on(everywhere, backend::echo());
    let pool = |round: u32| {
        (0..EACH).fold(Pool::new("web"), |pool, n| {
            let address = format!("127.0.{}.{}:{}", round + 1, n + 1, everywhere.port());
            pool.backend(&format!("r{round}n{n}"), address)
        })
    };
    let mut proxy = TestProxy::start(Conf::simple(Engine::Epoll, pool(0)));
    for round in 1..=30 {
        let mut conf = proxy.conf();
        conf.pools = vec![pool(round)];
        proxy.reload(conf);
        for _ in 0..EACH {
            client::exchange(&connect(proxy.addr("web")), b"x").expect("an echo");
        }
    }
    let before = proxy.rss_kib();
    proxy.status();
    let grown = proxy.rss_kib().saturating_sub(before);
    measured(&format!("{grown} KiB for the first status after 3,000 removed backends"));
    assert!(grown < 8 * 1024, "{grown} KiB");
    eventually(secs(5), "every session ends", || backend.active() == 0);
}
