//! Crashes while the configuration on disk is invalid, or directly after an upgrade: the
//! running configuration and the intents stay in effect.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{Engine, eventually, http, on_every_engine, proc, secs};
use rustix::process::Signal;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

on_every_engine!(
    crash_with_an_invalid_file_keeps_the_configuration,
    crash_with_an_invalid_referenced_file_keeps_the_configuration,
    crash_with_a_file_that_cannot_be_applied_keeps_the_configuration,
    intents_received_by_a_process_that_exits_early_are_kept,
    intents_are_kept_without_a_supervisor,
);

fn conf(engine: Engine, backend: &ScriptedBackend) -> Conf {
    Conf::simple(engine, Pool::new("web").backend("a", backend.address()))
}

fn echoes(address: SocketAddr) {
    assert_eq!(client::exchange(&connect(address), b"hello").expect("an echo"), b"hello");
}

fn refused(proxy: &TestProxy) -> f64 {
    proxy.metric("tidegate_reloads_total", &[("result", "refused")])
}

/// Kills the serving process. Checks that the next client is served by another process, which
/// logs `why`.
#[track_caller]
fn crash(proxy: &mut TestProxy, why: &str) {
    let before = proxy.pid();
    let generation = proxy.generation();
    proc::signal(before, Signal::KILL);
    echoes(proxy.addr("web"));
    let socket = proxy.dir().join("admin.sock");
    let ready =
        || http::over_unix(&socket, "GET", "/ready").is_ok_and(|answer| answer.status == 200);
    eventually(secs(10), "another process serves", || proc::is_dead(before) && ready());
    proxy.find_serving();
    assert_eq!(proxy.generation(), generation, "the same configuration");
    let file = proxy.config_path().display().to_string();
    let log = proxy.log();
    let said = ["cannot use the configuration file after a crash", &*file, why];
    let says = |line: &str| said.iter().all(|part| line.contains(part));
    assert!(log.lines().any(says), "{said:?} in {log}");
}

#[track_caller]
fn noted(proxy: &TestProxy) -> bool {
    let warnings = proxy.status()["warnings"].to_string();
    warnings.contains("was not used after a crash")
}

/// Checks that crashes with the rejected file `text` change nothing. Then repairs the file and
/// checks that reloads work.
#[track_caller]
fn survives(proxy: &mut TestProxy, text: Option<&str>, why: &str) {
    let before = refused(proxy);
    match text {
        Some(text) => proxy.rewrite_in_place(text),
        None => std::fs::remove_file(proxy.config_path()).unwrap(),
    }
    proxy.sighup();
    eventually(secs(10), "the reload is rejected", || refused(proxy) > before);
    for _ in 0..2 {
        crash(proxy, why);
        eventually(secs(10), "the file is read again and rejected", || refused(proxy) >= 1.0);
        assert!(noted(proxy), "{}", proxy.status()["warnings"]);
    }
    let conf = proxy.conf();
    proxy.rewrite_by_rename(&proxy.render(&conf));
    eventually(secs(10), "the file is read", || !noted(proxy));
    let more = conf.clone().frontend("more", "web", "");
    proxy.reload(more);
    echoes(proxy.addr("more"));
    let before = proxy.pid();
    proc::signal(before, Signal::KILL);
    echoes(proxy.addr("more"));
    eventually(secs(10), "another process serves", || {
        let socket = proxy.dir().join("admin.sock");
        proc::is_dead(before) && http::over_unix(&socket, "GET", "/ready").is_ok()
    });
    proxy.find_serving();
    assert!(!noted(proxy));
    proxy.reload(conf);
}

fn crash_with_an_invalid_file_keeps_the_configuration(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut proxy = TestProxy::start(conf(engine, &backend));
    let whole = proxy.render(&proxy.conf());
    let half = &whole[..whole.len() / 2];
    survives(&mut proxy, Some(&format!("{half}\n[frontend")), "line ");
    survives(&mut proxy, None, "line 1, column 1: cannot open the file");
    proxy.rebaseline();
}

fn crash_with_an_invalid_referenced_file_keeps_the_configuration(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let dir = tempfile::tempdir().unwrap();
    let [list, token] = ["list", "token"].map(|name| dir.path().join(name));
    let write_token = |text: &str| {
        std::fs::write(&token, text).unwrap();
        std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    };
    write_token("0123456789abcdef");
    std::fs::write(&list, "127.0.0.0/8\n").unwrap();
    let pool = Pool::new("web").backend("a", backend.address());
    let keys = format!("sources = {{ allow_file = {:?} }}", list.to_str().unwrap());
    let conf = Conf::new(engine).frontend("web", "web", &keys).pool(pool);
    let mut proxy = TestProxy::start(conf.clone());
    let with_token = |text: String| {
        text.replace("[admin]\n", &format!("[admin]\ntoken_file = {:?}\n", token.to_str().unwrap()))
    };
    proxy.rewrite_by_rename(&with_token(proxy.render(&conf)));
    let answer = proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 200, "{}", answer.body);
    for (break_it, why) in [(true, "the list"), (false, "a process that started with it exited")] {
        let before = refused(&proxy);
        match break_it {
            true => std::fs::write(&list, "127.0.0.0/8\nno range\n").unwrap(),
            false => write_token("short"),
        }
        proxy.sighup();
        eventually(secs(10), "the reload is rejected", || refused(&proxy) > before);
        let before = proxy.pid();
        proc::signal(before, Signal::KILL);
        echoes(proxy.addr("web"));
        let socket = proxy.dir().join("admin.sock");
        eventually(secs(10), "another process serves", || {
            proc::is_dead(before) && http::over_unix(&socket, "GET", "/ready").is_ok()
        });
        proxy.find_serving();
        assert!(proxy.log().contains(why), "{}", proxy.log());
        eventually(secs(10), "status shows the warning", || noted(&proxy));
        std::fs::write(&list, "127.0.0.0/8\n").unwrap();
        write_token("0123456789abcdef");
        proxy.sighup();
        eventually(secs(10), "the files are read", || !noted(&proxy));
    }
    proxy.rebaseline();
}

fn crash_with_a_file_that_cannot_be_applied_keeps_the_configuration(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut proxy = TestProxy::start(conf(engine, &backend));
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut taken = proxy.conf().frontend("taken", "web", "");
    taken.frontend_mut("taken").binds = vec![other.local_addr().unwrap()];
    let text = proxy.render(&taken);
    survives(&mut proxy, Some(&text), "a process that started with it exited before it was ready");
    proxy.rebaseline();
}

fn intents_received_by_a_process_that_exits_early_are_kept(engine: Engine) {
    intents_are_kept(engine, 40, TestProxy::start);
}

fn intents_are_kept_without_a_supervisor(engine: Engine) {
    intents_are_kept(engine, 10, TestProxy::start_single);
}

/// Repeats the test until the old process is stopped within its first second after the
/// upgrade, which a busy machine can miss.
fn intents_are_kept(engine: Engine, count: u8, start: fn(Conf) -> TestProxy) {
    for _ in 0..20 {
        if try_to_keep_intents(engine, count, start) {
            return;
        }
    }
    panic!("the old process was never stopped in time");
}

/// Returns false if the old process had already released the service when it was stopped.
fn try_to_keep_intents(engine: Engine, count: u8, start: fn(Conf) -> TestProxy) -> bool {
    let echo = ScriptedBackend::start(backend::echo());
    let names: Vec<String> = (0..count).map(|number| format!("n{number}")).collect();
    let mut pool = Pool::new("web").backend("a", echo.address());
    for (name, number) in names.iter().zip(1..) {
        let address = SocketAddr::from(([127, 0, 1, number], echo.socket_address().port()));
        pool = pool.backend(name, address);
    }
    let mut proxy = start(Conf::simple(engine, pool));
    proxy.cli_ok(&["drain", &format!("web/{}", names[0])]);
    let first = proxy.pid();
    let began = Instant::now();
    let answer = proxy.try_upgrade("");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let new = answer.json()["pid"].as_u64().unwrap() as u32;
    // The old process learns the intents late, together with the exit of the new process.
    proc::signal(first, Signal::STOP);
    eventually(secs(5), "every thread has stopped", || proc::is_stopped(first));
    let in_time = began.elapsed() < secs(1);
    let order = |name: &str, what: &str| {
        let path = format!("/v1/pools/web/backends/{name}/{what}");
        assert_eq!(proxy.admin_request("POST", &path).status, 200);
    };
    order(&names[0], "undrain");
    names[1..].iter().for_each(|name| order(name, "drain"));
    // Every answered request is known to the old process or to the supervisor.
    proc::signal(new, Signal::KILL);
    let supervised = proxy.service() != first;
    let ended = || match supervised {
        true => !proc::children(proxy.service()).contains(&new),
        false => proc::is_dead(new),
    };
    eventually(secs(5), "the new process has ended", ended);
    if !supervised {
        // The first second has passed before the old process continues.
        std::thread::sleep(secs(1).saturating_sub(began.elapsed()));
    }
    proc::signal(first, Signal::CONT);
    let socket = proxy.dir().join("admin.sock");
    let ready =
        || http::over_unix(&socket, "GET", "/ready").is_ok_and(|answer| answer.status == 200);
    // The first process serves, or a third process if the first second had passed.
    eventually(secs(10), "a single process serves", || {
        let children = proc::children(proxy.service());
        let alone = !supervised || (children.len() == 1 && children[0] != new);
        (ready() && alone) || (!supervised && proc::is_dead(first))
    });
    if !supervised && proc::is_dead(first) {
        assert!(!in_time, "the old process must take the service back");
        proxy.wait_exit(secs(5));
        return false;
    }
    proxy.find_serving();
    assert_eq!(proxy.backend("web", &names[0])["intent"], "ready");
    for name in &names[1..] {
        assert_eq!(proxy.backend("web", name)["intent"], "draining", "{name}");
    }
    echoes(proxy.addr("web"));
    proxy.rebaseline();
    true
}
