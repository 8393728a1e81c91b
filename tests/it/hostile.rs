//! Misbehaving peers, files and operators: nothing leaks, nothing hangs, and other clients
//! are not affected.
//!
//! When its proxy handle drops, each test runs the leak check.

use crate::common::backend::{self, Gate, ScriptedBackend, Unresponsive, script};
use crate::common::client::{self, End, connect, try_connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::{
    Engine, eventually, measured, ms, on_every_engine, on_every_engine_alone, patience, secs,
};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

on_every_engine!(
    client_reset_during_connect_ends_the_session,
    client_that_half_closes_during_connect_is_served,
    bytes_sent_during_a_connect_retry_arrive,
    clients_reset_in_the_listen_queue_hold_no_slot,
    clients_in_the_listen_queue_of_a_removed_frontend_are_served,
    thousands_of_resets_leave_no_sessions,
    resets_from_both_ends_under_load_end_all_sessions,
    one_way_traffic_resets_the_idle_timeout,
    half_closed_session_with_traffic_continues,
    receiver_that_does_not_read_ends_by_idle_timeout,
    unwritable_access_log_blocks_no_session,
    deleted_config_file_changes_nothing_until_its_return,
    last_of_many_rewrites_takes_effect,
    second_process_on_the_same_address_exits,
    default_workers_and_pinning_serve,
    busy_polling_workers_serve,
    bytes_before_an_immediate_close_arrive,
    address_removed_and_added_again_is_served,
    backend_with_a_changed_address_is_a_new_backend,
    streams_stay_complete_while_backends_are_drained_and_undrained,
    admin_api_answers_under_load,
);
on_every_engine_alone!(reload_of_thousands_of_backends_takes_under_5_seconds);

fn to(backend: &ScriptedBackend) -> Pool {
    Pool::new("web").backend("a", backend.address())
}

fn client_reset_during_connect_ends_the_session(engine: Engine) {
    let dead = Unresponsive::new();
    let pool = Pool::new("web").key("connect_timeout = \"30s\"").backend("a", dead.address);
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let clients: Vec<TcpStream> = (0..20).map(|_| connect(proxy.addr("web"))).collect();
    eventually(secs(5), "all sessions are connecting", || {
        proxy.frontend("web")["sessions_active"] == clients.len()
    });
    clients.into_iter().for_each(client::reset);
    let log = proxy.wait_access_log(20);
    for line in log {
        let what = (&line["cause"], &line["phase"]);
        assert_eq!(what, (&"client-reset".into(), &"connect".into()), "{line:#}");
    }
    assert_eq!(proxy.backend("web", "a")["connect_failures_total"], 0, "no backend failure");
}

fn client_that_half_closes_during_connect_is_served(engine: Engine) {
    let (dead, b) = (Unresponsive::new(), ScriptedBackend::start(backend::echo()));
    let pool = Pool::new("web")
        .key("connect_timeout = \"400ms\"")
        .backend_with("dead", dead.address, "weight = 1000")
        .backend("b", b.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let client = connect(proxy.addr("web"));
    (&client).write_all(b"all I have").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_text(&client).unwrap(), "all I have");
}

fn bytes_sent_during_a_connect_retry_arrive(engine: Engine) {
    let (dead, b) = (Unresponsive::new(), ScriptedBackend::start(backend::echo()));
    let pool = Pool::new("web")
        .key("connect_timeout = \"300ms\"")
        .backend_with("dead", dead.address, "weight = 1000")
        .backend("b", b.address());
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let client = connect(proxy.addr("web"));
    std::thread::scope(|scope| {
        scope.spawn(|| (&client).write_all(&bytes).unwrap());
        let mut echoed = vec![0; bytes.len()];
        (&client).read_exact(&mut echoed).unwrap();
        assert!(echoed == bytes, "the echo differs");
    });
}

fn clients_reset_in_the_listen_queue_hold_no_slot(engine: Engine) {
    let backend = ScriptedBackend::start(backend::greet("x"));
    let conf = Conf::new(engine).frontend("web", "web", "connections_max = 1").pool(to(&backend));
    let proxy = TestProxy::start(conf);
    let mut holder = connect(proxy.addr("web"));
    holder.read_exact(&mut [0]).unwrap();
    for round in 0..100 {
        let waiting = connect(proxy.addr("web"));
        if round % 2 == 0 {
            client::reset(waiting);
        }
    }
    let mut patient = connect(proxy.addr("web"));
    drop(holder);
    patient.read_exact(&mut [0]).expect("served after the clients that left");
    drop(patient);
    assert_eq!(proxy.wait_access_log(102).len(), 102, "every session is in the access log");
}

fn clients_in_the_listen_queue_of_a_removed_frontend_are_served(engine: Engine) {
    let backend = ScriptedBackend::start(backend::greet("x"));
    let conf = Conf::new(engine)
        .frontend("web", "web", "connections_max = 1")
        .frontend("stays", "web", "")
        .pool(to(&backend));
    let mut proxy = TestProxy::start(conf);
    let address = proxy.addr("web");
    let mut holder = connect(address);
    holder.read_exact(&mut [0]).unwrap();
    let waiting: Vec<TcpStream> = (0..5).map(|_| connect(address)).collect();
    let mut conf = proxy.conf();
    conf.frontends.remove(0);
    proxy.reload(conf);
    // The clients wait for the slot, however long it takes.
    std::thread::sleep(ms(800));
    drop(holder);
    // Each client closes after its greeting, which frees the slot for the next client.
    let serve = |mut stream: TcpStream| std::thread::spawn(move || stream.read_exact(&mut [0]));
    let threads: Vec<_> = waiting.into_iter().map(serve).collect();
    let served: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(served.iter().all(Result::is_ok), "{served:?}");
    eventually(secs(5), "the frontend is removed", || {
        try_connect(address)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    });
    proxy.rebaseline();
}

fn thousands_of_resets_leave_no_sessions(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = TestProxy::start(Conf::simple(engine, to(&backend)));
    let address = proxy.addr("web");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                for round in 0..500 {
                    let mut client = connect(address);
                    // Resets in every phase: before accept, during connect and with bytes in
                    // transit.
                    if round % 3 > 0 {
                        let _ = client.write_all(b"some bytes");
                    }
                    if round % 3 > 1 {
                        let _ = client.read(&mut [0; 4]);
                    }
                    client::reset(client);
                }
            });
        }
    });
    eventually(secs(10), "every session has ended", || {
        proxy.metric("tidegate_sessions_active", &[]) == 0.0
    });
    eventually(secs(5), "every backend connection has closed", || backend.active() == 0);
    let stream = connect(address);
    assert_eq!(client::exchange(&stream, b"well").unwrap(), b"well");
}

fn resets_from_both_ends_under_load_end_all_sessions(engine: Engine) {
    // Both ends write for a time, read a little, and reset at about the same time.
    let backend = ScriptedBackend::start(script(|conn| {
        for round in 0..fastrand::u32(4..12) {
            if conn.write_all(&[3; 64 * 1024]).is_err() {
                return;
            }
            if round % 4 == 0 {
                let _ = conn.read(&mut [0; 64 * 1024]);
            }
        }
        conn.reset();
    }));
    let proxy = TestProxy::start(Conf::simple(engine, to(&backend)));
    let address = proxy.addr("web");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(move || {
                for _ in 0..150 {
                    let mut client = connect(address);
                    for round in 0..fastrand::u32(4..12) {
                        if client.write_all(&[4; 64 * 1024]).is_err() {
                            break;
                        }
                        if round % 4 == 0 {
                            let _ = client.read(&mut [0; 64 * 1024]);
                        }
                    }
                    client::reset(client);
                }
            });
        }
    });
    assert_eq!(proxy.wait_access_log(1200).len(), 1200);
    let before = proxy.cpu_time();
    std::thread::sleep(ms(500));
    let spent = proxy.cpu_time() - before;
    assert!(spent < ms(150), "busy loop without sessions: {spent:?} of CPU in 0.5 s");
}

fn one_way_traffic_resets_the_idle_timeout(engine: Engine) {
    let backend = ScriptedBackend::start(script(|conn| {
        for _ in 0..20 {
            let _ = conn.write_all(b"x");
            std::thread::sleep(ms(100));
        }
    }));
    let pool = to(&backend).key("connect_timeout = \"500ms\"");
    let conf = Conf::new(engine).frontend("web", "web", "idle_timeout = \"600ms\"").pool(pool);
    let proxy = TestProxy::start(conf);
    assert_eq!(client::read_to_end(&connect(proxy.addr("web"))), End::Fin(20));
}

fn half_closed_session_with_traffic_continues(engine: Engine) {
    let backend = ScriptedBackend::start(script(|conn| {
        conn.drain();
        for _ in 0..20 {
            let _ = conn.write_all(b"x");
            std::thread::sleep(ms(100));
        }
    }));
    let keys = "half_closed_timeout = \"600ms\"";
    let proxy = TestProxy::start(Conf::new(engine).frontend("web", "web", keys).pool(to(&backend)));
    let client = connect(proxy.addr("web"));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(20));
}

fn receiver_that_does_not_read_ends_by_idle_timeout(engine: Engine) {
    let gate = Gate::default();
    let backend = ScriptedBackend::start(script({
        let gate = gate.clone();
        move |_| gate.wait()
    }));
    let pool = to(&backend).key("connect_timeout = \"500ms\"");
    let keys = "idle_timeout = \"700ms\"\nstalled_timeout = \"off\"";
    let conf = Conf::new(engine).frontend("web", "web", keys).pool(pool);
    let proxy = TestProxy::start(conf);
    let mut client = connect(proxy.addr("web"));
    client.set_write_timeout(Some(ms(300))).unwrap();
    while client.write_all(&[1; 1 << 20]).is_ok() {}
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "idle-timeout", "{:#}", log[0]);
    gate.open();
}

fn unwritable_access_log_blocks_no_session(engine: Engine) {
    let backend = ScriptedBackend::start(backend::name("a"));
    let mut conf = Conf::simple(engine, to(&backend));
    conf.access = Some("/dev/full".into());
    let mut proxy = TestProxy::start(conf);
    for _ in 0..200 {
        assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a");
    }
    // The lines are kept until the disk is writable. The log reports the error once, not
    // for each line.
    let complaints = || proxy.log().matches("No space left").count();
    eventually(secs(5), "the error is logged", || complaints() > 0);
    assert!(complaints() < 10, "{}", proxy.log());
    proxy.sigterm();
    // The exit waits 2 s for the disk and then drops the lines.
    assert_eq!(proxy.wait_exit(secs(5)), Some(0));
    assert!(proxy.log().contains("lines=200"), "no count of dropped lines: {}", proxy.log());
}

fn deleted_config_file_changes_nothing_until_its_return(engine: Engine) {
    let backends = ["a", "b"].map(|name| ScriptedBackend::start(backend::name(name)));
    let proxy = TestProxy::start(Conf::simple(engine, to(&backends[0])));
    let mut conf = proxy.conf();
    conf.pools = vec![to(&backends[1])];
    std::fs::remove_file(proxy.config_path()).unwrap();
    let answer = proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a");
    proxy.rewrite_in_place(&proxy.render(&conf));
    eventually(secs(5), "the new file is noticed", || {
        client::ask(proxy.addr("web")).unwrap() == "b"
    });
}

fn last_of_many_rewrites_takes_effect(engine: Engine) {
    let backends = ["a", "b"].map(|name| ScriptedBackend::start(backend::name(name)));
    let proxy = TestProxy::start(Conf::simple(engine, to(&backends[0])));
    for round in 1..=151u32 {
        let mut conf = proxy.conf();
        let keys = format!("weight = {round}");
        let address = backends[round as usize % 2].address();
        conf.pools = vec![Pool::new("web").backend_with("a", address, &keys)];
        proxy.rewrite_in_place(&proxy.render(&conf));
        if round % 10 == 0 {
            std::thread::sleep(ms(30));
        }
        client::ask(proxy.addr("web")).expect("a half-written file changes nothing");
    }
    proxy.wait_backend("web", "a", "weight", 151);
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "b");
}

fn second_process_on_the_same_address_exits(engine: Engine) {
    let backend = ScriptedBackend::start(backend::name("a"));
    let proxy = TestProxy::start(Conf::simple(engine, to(&backend)));
    let file = proxy.dir().join("second.toml");
    let admin = format!("unix:{}", proxy.dir().join("second.sock").display());
    std::fs::write(&file, proxy.conf().render(&admin, "off")).unwrap();
    let output = Command::new(PROGRAM).args(["run", "--config"]).arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(&proxy.addr("web").to_string()), "{said}");
    assert!((0..20).all(|_| client::ask(proxy.addr("web")).unwrap() == "a"));
}

fn default_workers_and_pinning_serve(engine: Engine) {
    let backend = ScriptedBackend::start(backend::name("a"));
    let conf = Conf::simple(engine, to(&backend)).workers(0).process("pin = true");
    let proxy = TestProxy::start(conf);
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert_eq!(proxy.status()["workers"], cpus);
    assert!((0..20).all(|_| client::ask(proxy.addr("web")).unwrap() == "a"));
}

fn busy_polling_workers_serve(engine: Engine) {
    let ledger = Ledger::new(StreamSizes { most: 64 * 1024, large_one_in: 20 });
    let backend = ScriptedBackend::start(ledger.script());
    let conf = Conf::simple(engine, to(&backend)).workers(1).process("spin = \"50us\"");
    let proxy = TestProxy::start(conf);
    ledger.run(&[proxy.addr("web")], 0..200, 8);
    ledger.settle();
    ledger.assert_clean();
    let before = proxy.cpu_time();
    std::thread::sleep(secs(1));
    let spent = proxy.cpu_time() - before;
    assert!(spent < ms(300), "busy loop without activity: {spent:?} of CPU in 1 s");
}

fn bytes_before_an_immediate_close_arrive(engine: Engine) {
    // Closing with unread input resets the connection on Linux. This backend has no input
    // and reads nothing, so its FIN directly follows the last byte.
    let backend = ScriptedBackend::start(script(|conn| {
        let _ = conn.write_all(&[9; 100_000]);
    }));
    let proxy = TestProxy::start(Conf::simple(engine, to(&backend)));
    for _ in 0..50 {
        assert_eq!(client::read_to_end(&connect(proxy.addr("web"))), End::Fin(100_000));
    }
}

fn address_removed_and_added_again_is_served(engine: Engine) {
    let backend = ScriptedBackend::start(backend::name("a"));
    let conf = Conf::simple(engine, to(&backend)).frontend("other", "web", "");
    let mut proxy = TestProxy::start(conf);
    let with = proxy.conf();
    let mut without = proxy.conf();
    without.frontends.remove(0);
    for _ in 0..5 {
        proxy.reload(without.clone());
        proxy.reload(with.clone());
        assert_eq!(client::ask(with.address("web")).unwrap(), "a", "right after the reload");
    }
    proxy.rebaseline();
}

fn backend_with_a_changed_address_is_a_new_backend(engine: Engine) {
    let old = ScriptedBackend::start(backend::echo());
    let new = ScriptedBackend::start(backend::name("new"));
    let mut proxy = TestProxy::start(Conf::simple(engine, to(&old)));
    let open = connect(proxy.addr("web"));
    client::exchange(&open, b"before").unwrap();
    let mut conf = proxy.conf();
    conf.pools = vec![to(&new)];
    proxy.reload(conf);
    assert_eq!(client::ask(proxy.addr("web")).unwrap(), "new");
    assert_eq!(client::exchange(&open, b"after").unwrap(), b"after");
    let state = proxy.backend("web", "a");
    assert_eq!(state["address"], new.address());
    assert_eq!(state["sessions_active"], 0, "the session belongs to the old backend: {state:#}");
}

fn streams_stay_complete_while_backends_are_drained_and_undrained(engine: Engine) {
    let ledger = Ledger::new(StreamSizes { most: 128 * 1024, large_one_in: 200 });
    let backends = [(); 3].map(|()| ScriptedBackend::start(ledger.script()));
    let names = ["a", "b", "c"];
    let pool = names
        .iter()
        .zip(&backends)
        .fold(Pool::new("web"), |pool, (name, backend)| pool.backend(name, backend.address()));
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let stop = AtomicBool::new(false);
    let address = proxy.addr("web");
    std::thread::scope(|scope| {
        scope.spawn(|| ledger.run_until(&[address], &stop, 8));
        for round in 0..60 {
            let name = names[round % 3];
            for action in ["drain", "undrain"] {
                let path = format!("/v1/pools/web/backends/{name}/{action}");
                proxy.admin_request("POST", &path);
                std::thread::sleep(ms(10));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    ledger.settle();
    ledger.assert_clean();
    assert!(ledger.streams() > 100, "{} streams", ledger.streams());
    eventually(secs(5), "every stream is accounted for", || {
        proxy.metric("tidegate_session_end_total", &[]) == ledger.streams() as f64
    });
    assert_eq!(proxy.metric("tidegate_refused_total", &[]), 0.0);
}

fn admin_api_answers_under_load(engine: Engine) {
    let ledger = Ledger::without_aborts(StreamSizes { most: 64 * 1024, large_one_in: 100 });
    let backend = ScriptedBackend::start(ledger.script());
    let proxy = TestProxy::start(Conf::simple(engine, to(&backend)));
    let stop = AtomicBool::new(false);
    let address = proxy.addr("web");
    let mut slowest = ms(0);
    std::thread::scope(|scope| {
        scope.spawn(|| ledger.run_until(&[address], &stop, 8));
        for _ in 0..100 {
            let start = Instant::now();
            assert_eq!(proxy.admin_request("GET", "/metrics").status, 200);
            proxy.status();
            slowest = slowest.max(start.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
    });
    measured(&format!("slowest status and metrics together: {slowest:.2?}"));
    assert!(slowest < patience(secs(1)), "{slowest:?}");
    ledger.settle();
    ledger.assert_clean();
}

fn reload_of_thousands_of_backends_takes_under_5_seconds(engine: Engine) {
    const BACKENDS: u32 = 4000;
    let backend = ScriptedBackend::start(backend::name("a"));
    let mut pool = to(&backend);
    // These backends get no session, because backups serve only without primaries.
    for number in 0..BACKENDS {
        let ip = std::net::Ipv4Addr::from(0x7F01_0000 + number);
        let name = format!("spare{number}");
        pool = pool.backend_with(&name, format!("{ip}:9"), "backup = true");
    }
    let mut proxy = TestProxy::start(Conf::simple(engine, pool));
    let mut slowest = ms(0);
    for round in 1..=10 {
        let mut conf = proxy.conf();
        conf.pool_mut("web").backends[1].keys = format!("backup = true\nweight = {round}");
        conf.pool_mut("web").backends.pop();
        let start = Instant::now();
        proxy.reload(conf);
        slowest = slowest.max(start.elapsed());
        assert_eq!(client::ask(proxy.addr("web")).unwrap(), "a");
    }
    measured(&format!("slowest of 10 reloads of {BACKENDS} backends: {slowest:.2?}"));
    assert!(slowest < patience(secs(5)), "{slowest:?}");
}
