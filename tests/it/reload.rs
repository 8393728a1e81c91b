//! Changing the configuration while it runs: noticed, applied as a whole or not
//! at all, and felt by nobody.
//!
//! Listener counts change here, so each test takes a new descriptor baseline
//! once its last reload has settled.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, End, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::TestProxy;
use crate::common::servers::{Nginx, Wrk};
use crate::common::stable::Steady;
use crate::common::{
    Engine, eventually, have, measured, ms, on_every_engine, on_every_engine_alone, patience, secs,
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
    reload_command_says_how_it_went,
    unchanged_file_makes_no_generation,
    rebind_moves_a_frontend_without_loss,
    rebind_to_a_taken_address_changes_nothing,
    removed_backend_keeps_its_sessions,
    close_after_cuts_the_sessions_of_a_removed_backend,
    removing_a_frontend_resets_no_queued_connection,
    process_change_that_needs_a_restart_is_named,
);
on_every_engine_alone!(fifty_reloads_in_ten_seconds_lose_nothing);

fn named(name: &str) -> ScriptedBackend {
    ScriptedBackend::start(backend::name(name))
}

/// A pool `web` with the one backend.
fn only(name: &str, backend: &ScriptedBackend) -> Pool {
    Pool::new("web").backend(name, backend.address())
}

fn fifty_reloads_in_ten_seconds_lose_nothing(engine: Engine) {
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
    let (wrk, steady) = (Wrk::start(web, 20, 11), Steady::start(web, 2));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| ledger.run_until(&[led], &stop, 4));
        let _stop_even_on_panic = StopOnDrop(&stop);
        let start = Instant::now();
        for round in 1..=50u32 {
            let conf = altered(proxy.conf(), round, &servers, &streams);
            let (had, has) = (proxy.conf(), conf.clone());
            proxy.reload(conf);
            assert_extra_frontend(&had, &has);
            let due = start + ms(200) * round;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    });
    let (report, attempts) = (wrk.report(), steady.stop());
    let failed: Vec<_> = attempts.iter().filter(|one| one.result.is_err()).collect();
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), attempts.len(), failed[0]);
    assert_eq!(report.errors(), 0, "{}", report.text);
    ledger.settle();
    ledger.assert_clean();
    assert_eq!(proxy.generation(), first_generation + 50);
    let counts = (report.requests, attempts.len(), ledger.streams());
    assert!(counts.0 > 1000 && counts.1 > 200 && counts.2 > 200, "{counts:?}");
    measured(&format!("50 reloads under {counts:?} requests, sessions and streams"));
    proxy.rebaseline();
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The next of the fifty: weights always change, a backend of each pool comes
/// and goes, and so does a frontend.
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

/// A frontend that was added answers at once, one that went away refuses.
fn assert_extra_frontend(had: &Conf, has: &Conf) {
    if has.frontends.len() > 2 {
        let answer = crate::common::http::over_tcp(has.address("extra"), "/").expect("an answer");
        assert_eq!(answer.status, 200);
    } else if had.frontends.len() > 2 {
        eventually(secs(2), "the removed frontend refuses", || {
            // While it retires SYNs are dropped; they would come again in a second.
            TcpStream::connect_timeout(&had.address("extra"), ms(50))
                .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        });
    }
}

/// The invalid examples that the configuration's own tests use.
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

/// Starts on backend a, has `rewrite` bring the file with backend b, and waits
/// for traffic to follow.
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
    // Three: watching the file itself goes blind after the first.
    assert_noticed(engine, TestProxy::rewrite_by_rename, 3);
}

fn configmap_symlink_swap_is_noticed(engine: Engine) {
    // The first makes the file a link, the others swap what it leads to.
    assert_noticed(engine, TestProxy::rewrite_by_symlink_swap, 3);
}

fn sighup_reloads(engine: Engine) {
    let backends = [named("a"), named("b")];
    let proxy = TestProxy::start(Conf::simple(engine, only("a", &backends[0])));
    let mut conf = proxy.conf();
    conf.pools = vec![only("b", &backends[1])];
    // Written through a second name in another directory, the change raises no
    // event in the watched one (inotify(7)): only the signal can tell.
    let elsewhere = tempfile::tempdir_in("/tmp").unwrap();
    let alias = elsewhere.path().join("alias.toml");
    std::fs::hard_link(proxy.config_path(), &alias).unwrap();
    std::fs::write(&alias, proxy.render(&conf)).unwrap();
    std::thread::sleep(ms(700));
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a", "nobody has told it yet");
    proxy.sighup();
    eventually(secs(2), "the signal is followed", || {
        client::ask(proxy.addr("web")).unwrap() == "b"
    });
}

fn reload_command_says_how_it_went(engine: Engine) {
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
    // A wrong word lists the right ones, in the answer and in the log.
    proxy.rewrite_by_rename("[process]\nengine = \"quick\"\n");
    let answer = proxy.admin_request("POST", "/v1/reload").json();
    let problems = answer["problems"].as_array().cloned().unwrap_or_default();
    let help = problems.iter().filter_map(|problem| problem["help"].as_str());
    let right = "known values: \"auto\", \"io_uring\", \"epoll\"";
    assert!(help.collect::<String>().contains(right), "{answer:#}");
    // There it is one quoted value.
    eventually(secs(5), "the log says it, too", || proxy.log().replace('\\', "").contains(right));
    proxy.sigterm();
    assert_eq!(proxy.wait_exit(secs(3)), Some(0));
    assert_eq!(proxy.cli(&["reload"]).status.code(), Some(3), "nobody to ask");
}

fn unchanged_file_makes_no_generation(engine: Engine) {
    let a = named("a");
    let mut proxy = TestProxy::start(Conf::simple(engine, only("a", &a)));
    let generation = proxy.generation();
    let answer = proxy.reload(proxy.conf());
    assert_eq!(answer["changed"], false, "{answer}");
    assert_eq!(answer["generation"], generation, "{answer}");
    // Comments and white space mean nothing either.
    proxy.rewrite_in_place(&format!("# a note\n{}\n\n", proxy.render(&proxy.conf())));
    let answer = proxy.admin_request("POST", "/v1/reload").json();
    assert_eq!(answer["changed"], false, "{answer}");
    proxy.sighup();
    std::thread::sleep(ms(300));
    assert_eq!(proxy.generation(), generation);
}

fn rebind_moves_a_frontend_without_loss(engine: Engine) {
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
    assert_eq!(answer.expect("the new address answers at once").body, "a");
    eventually(secs(2), "the old address refuses", || try_connect(old).is_err());
    std::thread::sleep(ms(100));
    let attempts = steady.stop();
    for attempt in attempts.iter().filter(|attempt| attempt.result.is_err()) {
        let error = attempt.result.as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{attempt:?}");
        assert!(attempt.began + patience(ms(50)) >= asked, "refused before the reload");
    }
    // The old session lives on.
    (&open).write_all(request).unwrap();
    let mut answers = String::new();
    while answers.matches("200").count() < 2 {
        let mut buffer = [0; 1024];
        let n = std::io::Read::read(&mut &open, &mut buffer).unwrap();
        answers += std::str::from_utf8(&buffer[..n]).unwrap();
    }
    drop(open);
    eventually(secs(5), "its session ends", || a.active() == 0);
    proxy.rebaseline();
}

fn rebind_to_a_taken_address_changes_nothing(engine: Engine) {
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
    assert!(answer.body.contains(&address), "names the address: {}", answer.body);
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a", "all or nothing");
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

fn close_after_cuts_the_sessions_of_a_removed_backend(engine: Engine) {
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
    assert!(after > ms(500) && after < patience(secs(2)), "cut after {after:?}");
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
    // Stopped, it cannot accept: the connections fill the kernel's queues.
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
    eventually(secs(5), "the frontend is gone", || refuses(address));
    proxy.rebaseline();
}

fn refuses(address: SocketAddr) -> bool {
    try_connect(address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn process_change_that_needs_a_restart_is_named(engine: Engine) {
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
    eventually(secs(5), "it is warned of in the log", || proxy.log().contains(warning));
}

/// What workers had recorded of them was kept until somebody asked for it, and came
/// all at once then. Nothing here is an engine's.
#[test]
fn backends_that_come_and_go_leave_nothing_behind_without_requests() {
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
    measured(&format!("{grown} KiB for the first look at 3,000 backends that are gone"));
    assert!(grown < 8 * 1024, "{grown} KiB");
    eventually(secs(5), "every session ends", || backend.active() == 0);
}
