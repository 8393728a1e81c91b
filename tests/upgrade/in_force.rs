//! A process crashes while its configuration on disk is bad, or an upgrade was told
//! something and is gone: what was in force goes on.

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
    a_crash_while_the_file_is_bad_leaves_the_configuration_in_force,
    a_crash_while_a_named_file_is_bad_leaves_the_configuration_in_force,
    a_crash_while_the_file_cannot_be_put_in_force_leaves_the_configuration_in_force,
    intents_that_only_a_process_that_died_at_once_has_heard_are_kept,
    without_a_supervisor_such_intents_are_kept,
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

/// Kills the process that serves; the next client is served by another one, which says
/// `why`.
#[track_caller]
fn crash(proxy: &mut TestProxy, why: &str) {
    let before = proxy.pid();
    let generation = proxy.generation();
    proc::signal(before, Signal::KILL);
    echoes(proxy.addr("web"));
    let socket = proxy.dir().join("admin.sock");
    let ready = || http::over_unix(&socket, "GET", "/ready").is_ok_and(|one| one.status == 200);
    eventually(secs(10), "another process serves", || proc::is_dead(before) && ready());
    proxy.find_serving();
    assert_eq!(proxy.generation(), generation, "it is the same configuration");
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

/// `text` is refused; a crash; the file is mended, and reloads work.
#[track_caller]
fn survives(proxy: &mut TestProxy, text: Option<&str>, why: &str) {
    let before = refused(proxy);
    match text {
        Some(text) => proxy.rewrite_in_place(text),
        None => std::fs::remove_file(proxy.config_path()).unwrap(),
    }
    proxy.sighup();
    eventually(secs(10), "the reload is refused", || refused(proxy) > before);
    for _ in 0..2 {
        crash(proxy, why);
        eventually(secs(10), "the file is read again, and refused", || refused(proxy) >= 1.0);
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

fn a_crash_while_the_file_is_bad_leaves_the_configuration_in_force(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut proxy = TestProxy::start(conf(engine, &backend));
    let whole = proxy.render(&proxy.conf());
    let half = &whole[..whole.len() / 2];
    survives(&mut proxy, Some(&format!("{half}\n[frontend")), "line ");
    survives(&mut proxy, None, "line 1, column 1: cannot open the file");
    proxy.rebaseline();
}

fn a_crash_while_a_named_file_is_bad_leaves_the_configuration_in_force(engine: Engine) {
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
        eventually(secs(10), "the reload is refused", || refused(&proxy) > before);
        let before = proxy.pid();
        proc::signal(before, Signal::KILL);
        echoes(proxy.addr("web"));
        let socket = proxy.dir().join("admin.sock");
        eventually(secs(10), "another process serves", || {
            proc::is_dead(before) && http::over_unix(&socket, "GET", "/ready").is_ok()
        });
        proxy.find_serving();
        assert!(proxy.log().contains(why), "{}", proxy.log());
        eventually(secs(10), "status tells", || noted(&proxy));
        std::fs::write(&list, "127.0.0.0/8\n").unwrap();
        write_token("0123456789abcdef");
        proxy.sighup();
        eventually(secs(10), "the files are read", || !noted(&proxy));
    }
    proxy.rebaseline();
}

fn a_crash_while_the_file_cannot_be_put_in_force_leaves_the_configuration_in_force(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let mut proxy = TestProxy::start(conf(engine, &backend));
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut taken = proxy.conf().frontend("taken", "web", "");
    taken.frontend_mut("taken").binds = vec![other.local_addr().unwrap()];
    let text = proxy.render(&taken);
    survives(&mut proxy, Some(&text), "a process that started with it exited before it was ready");
    proxy.rebaseline();
}

fn intents_that_only_a_process_that_died_at_once_has_heard_are_kept(engine: Engine) {
    intents_are_kept(engine, 40, TestProxy::start);
}

fn without_a_supervisor_such_intents_are_kept(engine: Engine) {
    intents_are_kept(engine, 10, TestProxy::start_single);
}

/// Tries until the process before is stopped within its second, which a busy machine may
/// miss; the rest takes as long as it takes.
fn intents_are_kept(engine: Engine, count: u8, start: fn(Conf) -> TestProxy) {
    for _ in 0..20 {
        if try_to_keep_intents(engine, count, start) {
            return;
        }
    }
    panic!("the process before is never stopped in time");
}

/// False where the process before had let go before it was stopped.
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
    // The process before hears of them late, and of the new one's end at the same time.
    proc::signal(first, Signal::STOP);
    eventually(secs(5), "all of it has stopped", || proc::is_stopped(first));
    let in_time = began.elapsed() < secs(1);
    let order = |name: &str, what: &str| {
        let path = format!("/v1/pools/web/backends/{name}/{what}");
        assert_eq!(proxy.admin_request("POST", &path).status, 200);
    };
    order(&names[0], "undrain");
    names[1..].iter().for_each(|name| order(name, "drain"));
    // What was answered is known to the process before, or to the supervisor.
    proc::signal(new, Signal::KILL);
    let supervised = proxy.service() != first;
    let ended = || match supervised {
        true => !proc::children(proxy.service()).contains(&new),
        false => proc::is_dead(new),
    };
    eventually(secs(5), "it has ended", ended);
    if !supervised {
        // Its second is over before it looks.
        std::thread::sleep(secs(1).saturating_sub(began.elapsed()));
    }
    proc::signal(first, Signal::CONT);
    let socket = proxy.dir().join("admin.sock");
    let ready = || http::over_unix(&socket, "GET", "/ready").is_ok_and(|one| one.status == 200);
    // The first one, or a third where the first one's second was over.
    eventually(secs(10), "one process is left, and serves", || {
        let children = proc::children(proxy.service());
        let alone = !supervised || (children.len() == 1 && children[0] != new);
        (ready() && alone) || (!supervised && proc::is_dead(first))
    });
    if !supervised && proc::is_dead(first) {
        assert!(!in_time, "it goes on, however late it learns that it has to");
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
