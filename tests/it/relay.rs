//! Established sessions: every byte arrives in order, and FIN and RST are passed on.
//!
//! Scripted peers on both sides, with runs of up to 1 GiB and thousands of streams.

use crate::common::backend::{self, Gate, ScriptedBackend, script};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ledger::{Ledger, StreamSizes};
use crate::common::proxy::TestProxy;
use crate::common::servers::{Iperf3, iperf3_client};
use crate::common::{
    Engine, eventually, have, long, measured, ms, on_every_engine, on_every_engine_alone,
    on_every_engine_quiet, patience, ports, secs,
};
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Instant;

on_every_engine!(
    half_close_after_64_mib_gets_the_whole_answer,
    reset_from_the_client_reaches_the_backend_as_a_reset,
    reset_from_the_backend_reaches_the_client_as_a_reset,
    fin_comes_only_after_the_last_byte_to_a_slow_reader,
    fin_from_the_backend_waits_for_a_slow_client,
    greeting_of_the_backend_arrives,
    ipv6_on_both_sides,
    unix_socket_backend_serves,
    one_frontend_listens_on_several_addresses,
    sessions_without_bytes_end_with_fin,
    idle_sessions_are_closed_with_fin_on_both_sides,
    half_closed_sessions_are_closed_after_half_closed_timeout,
    backend_half_close_leaves_the_other_direction_open,
    urgent_byte_does_not_break_the_stream,
    reset_with_pending_output_reaches_the_backend,
    thousand_simultaneous_connections_are_served,
);
on_every_engine_alone!(
    bulk_each_way_arrives_unchanged,
    ten_thousand_streams_arrive_unchanged,
    iperf3_runs_both_ways_in_parallel,
);
on_every_engine_quiet!(slow_backend_does_not_grow_memory);

fn relay_to(engine: Engine, backend: &ScriptedBackend) -> TestProxy {
    TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", backend.address())))
}

/// Writes `len` bytes without repetition. Returns the length and the SHA-256.
fn send_noise(len: u64, seed: u64, mut to: impl FnMut(&[u8]) -> io::Result<()>) -> String {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut block: Vec<u8> = (0..1 << 20).map(|_| random.u8(..)).collect();
    let mut hash = Sha256::new();
    let mut left = len;
    while left > 0 {
        block[..8].copy_from_slice(&left.to_le_bytes());
        let part = &block[..block.len().min(left as usize)];
        hash.update(part);
        to(part).expect("the peer reads to the end");
        left -= part.len() as u64;
    }
    format!("{len} {:x?}", hash.finalize())
}

/// Reads until FIN. Returns the length and the SHA-256.
fn digest_received(mut from: impl FnMut(&mut [u8]) -> io::Result<usize>) -> String {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut len = 0;
    loop {
        let n = from(&mut buffer).expect("the peer sends to the end");
        if n == 0 {
            return format!("{len} {:x?}", hash.finalize());
        }
        hash.update(&buffer[..n]);
        len += n;
    }
}

fn bulk_each_way_arrives_unchanged(engine: Engine) {
    let len: u64 = if long() { 1 << 30 } else { 1 << 28 };
    let (digests, at_the_backend) = mpsc::channel();
    let backend = ScriptedBackend::start(script(move |conn| {
        // First up to the client's FIN, then down.
        digests.send(digest_received(|buffer| conn.read(buffer))).unwrap();
        digests.send(send_noise(len, 2, |bytes| conn.write_all(bytes))).unwrap();
    }));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    let start = Instant::now();
    let sent = send_noise(len, 1, |bytes| client.write_all(bytes));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(at_the_backend.recv_timeout(patience(secs(60))).unwrap(), sent);
    let up = start.elapsed();
    let received = digest_received(|buffer| client.read(buffer));
    assert_eq!(received, at_the_backend.recv_timeout(patience(secs(60))).unwrap());
    let (mib, down) = (len >> 20, start.elapsed() - up);
    measured(&format!("{mib} MiB up in {up:.2?}, {mib} MiB down in {down:.2?}"));
}

fn half_close_after_64_mib_gets_the_whole_answer(engine: Engine) {
    const LEN: u64 = 64 << 20;
    let (digests, at_the_backend) = mpsc::channel();
    let backend = ScriptedBackend::start(script(move |conn| {
        digests.send(digest_received(|buffer| conn.read(buffer))).unwrap();
        digests.send(send_noise(LEN, 4, |bytes| conn.write_all(bytes))).unwrap();
    }));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    let sent = send_noise(LEN, 3, |bytes| client.write_all(bytes));
    client.shutdown(Shutdown::Write).unwrap();
    let received = digest_received(|buffer| client.read(buffer));
    assert_eq!(at_the_backend.recv().unwrap(), sent);
    assert_eq!(received, at_the_backend.recv().unwrap());
}

fn ten_thousand_streams_arrive_unchanged(engine: Engine) {
    // 10,000 streams on the two engines together. The long run has ten times as many.
    let streams = if long() { 50_000 } else { 5_000 };
    let ledger = Ledger::new(StreamSizes { most: 256 * 1024, large_one_in: 500 });
    let backends = [(); 3].map(|()| ScriptedBackend::start(ledger.script()));
    let mut pool = Pool::new("web");
    for (backend, name) in backends.iter().zip(["a", "b", "c"]) {
        pool = pool.backend(name, backend.address());
    }
    let proxy = TestProxy::start(Conf::simple(engine, pool));
    let start = Instant::now();
    ledger.run(&[proxy.addr("web")], 0..streams, 48);
    ledger.settle();
    ledger.assert_clean();
    assert_eq!(ledger.streams(), streams);
    let bytes = ledger.bytes_up.load(Ordering::Relaxed) + ledger.bytes_down.load(Ordering::Relaxed);
    measured(&format!("{streams} streams, {} MiB in {:.2?}", bytes >> 20, start.elapsed()));
}

fn reset_from_the_client_reaches_the_backend_as_a_reset(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = relay_to(engine, &backend);
    let client = connect(proxy.addr("web"));
    client::exchange(&client, b"x").unwrap();
    client::reset(client);
    eventually(secs(5), "the backend's connection ends", || backend.active() == 0);
    let counts = backend.counts();
    assert_eq!(counts.resets_seen.load(Ordering::Relaxed), 1);
    assert_eq!(counts.fins_seen.load(Ordering::Relaxed), 0);
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "client-reset", "{:#}", log[0]);
    assert_eq!(log[0]["closed_first"], "client", "{:#}", log[0]);
}

fn reset_from_the_backend_reaches_the_client_as_a_reset(engine: Engine) {
    let backend = ScriptedBackend::start(backend::reset_after(3));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    client.write_all(b"abc").unwrap();
    assert_eq!(client::read_to_end(&client), End::Reset(0));
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "backend-reset", "{:#}", log[0]);
    assert_eq!(log[0]["closed_first"], "backend", "{:#}", log[0]);
}

fn fin_comes_only_after_the_last_byte_to_a_slow_reader(engine: Engine) {
    const LEN: u64 = 4 << 20;
    let backend = ScriptedBackend::start(backend::slow_read(64 * 1024, ms(1)));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    send_noise(LEN, 5, |bytes| client.write_all(bytes));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(0));
    let counts = backend.counts();
    assert_eq!(counts.fins_seen.load(Ordering::Relaxed), 1);
    assert_eq!(counts.bytes_read.load(Ordering::Relaxed), LEN);
}

fn fin_from_the_backend_waits_for_a_slow_client(engine: Engine) {
    const LEN: u64 = 8 << 20;
    let backend = ScriptedBackend::start(script(|conn| {
        send_noise(LEN, 6, |bytes| conn.write_all(bytes));
        conn.fin();
        conn.drain();
    }));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    let mut buffer = vec![0; 128 * 1024];
    let mut total = 0;
    loop {
        let n = client.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        total += n as u64;
        std::thread::sleep(ms(2));
    }
    assert_eq!(total, LEN);
}

fn greeting_of_the_backend_arrives(engine: Engine) {
    let backend = ScriptedBackend::start(backend::greet("220 ready\r\n"));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    let mut greeting = [0; 11];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
    assert_eq!(client::exchange(&client, b"EHLO").unwrap(), b"EHLO");
}

fn slow_backend_does_not_grow_memory(engine: Engine) {
    const CLIENTS: usize = 64;
    let gate = Gate::default();
    let backend = ScriptedBackend::start(script({
        let gate = gate.clone();
        move |conn| {
            gate.wait();
            conn.drain();
        }
    }));
    let proxy = relay_to(engine, &backend);
    let before = proxy.rss_kib();
    let block = vec![7u8; 1 << 20];
    let clients: Vec<_> = (0..CLIENTS).map(|_| connect(proxy.addr("web"))).collect();
    let fill = |mut client: &TcpStream| {
        let mut sent = 0;
        client.set_write_timeout(Some(ms(300))).unwrap();
        let blocked = (0..256).any(|_| match client.write(&block) {
            Ok(n) => {
                sent += n as u64;
                n < block.len()
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                true
            }
        });
        assert!(blocked, "256 MiB went into a backend that does not read");
        sent
    };
    let sent: u64 = std::thread::scope(|scope| {
        let filling: Vec<_> = clients.iter().map(|client| scope.spawn(|| fill(client))).collect();
        filling.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let grown = proxy.rss_kib().saturating_sub(before);
    measured(&format!("{CLIENTS} blocked clients hold {grown} KiB; {} MiB sent", sent >> 20));
    // epoll keeps one read per session. io_uring sessions share the buffer pool of each
    // worker: 1,024 buffers of 16 KiB.
    let bound = match engine {
        Engine::Epoll => CLIENTS as u64 * 256,
        Engine::IoUring => 2 * 16 * 1024 + 4 * 1024,
    };
    assert!(grown < bound, "{grown} KiB for {CLIENTS} blocked sessions, {bound} KiB allowed");
    gate.open();
    clients.iter().for_each(|client| client.shutdown(Shutdown::Write).unwrap());
    let counts = backend.counts();
    eventually(secs(20), "all bytes have arrived", || {
        counts.bytes_read.load(Ordering::Relaxed) == sent
    });
}

fn ipv6_on_both_sides(engine: Engine) {
    let address: SocketAddr = format!("[::1]:{}", ports::free_port()).parse().unwrap();
    let backend = ScriptedBackend::start_on(address, backend::echo());
    let pool = Pool::new("web").backend("a", backend.address());
    let proxy = TestProxy::start(Conf::new(engine).frontend_on("::1", "six", "web", "").pool(pool));
    let client = connect(proxy.addr("six"));
    assert!(client.peer_addr().unwrap().is_ipv6());
    assert_eq!(client::exchange(&client, b"six").unwrap(), b"six");
    drop(client);
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["backend_address"], address.to_string());
    let from: SocketAddr = log[0]["client"].as_str().unwrap().parse().unwrap();
    assert!(from.is_ipv6());
}

fn unix_socket_backend_serves(engine: Engine) {
    let dir = tempfile::Builder::new().prefix("tg-ux-").tempdir_in("/tmp").unwrap();
    let backend = ScriptedBackend::start_unix(&dir.path().join("b.sock"), backend::echo());
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    let sent = send_noise(3 << 20, 8, |bytes| {
        let echoed = client::exchange(&client, bytes)?;
        assert!(echoed == bytes, "the echo differs");
        Ok(())
    });
    assert!(sent.starts_with("3145728 "));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

fn one_frontend_listens_on_several_addresses(engine: Engine) {
    let backend = ScriptedBackend::start(backend::name("a"));
    let mut conf = Conf::simple(engine, Pool::new("web").backend("a", backend.address()));
    let more: Vec<SocketAddr> = ["127.0.0.2", "::1"]
        .map(|ip| SocketAddr::new(ip.parse().unwrap(), ports::free_port()))
        .into();
    conf.frontend_mut("web").binds.extend(&more);
    let proxy = TestProxy::start(conf);
    for address in [proxy.addr("web"), more[0], more[1]] {
        assert_eq!(client::ask(address).unwrap(), "a", "at {address}");
    }
}

fn sessions_without_bytes_end_with_fin(engine: Engine) {
    let backend = ScriptedBackend::start(script(|conn| conn.drain()));
    let proxy = relay_to(engine, &backend);
    for round in 0..50 {
        let client = connect(proxy.addr("web"));
        if round % 2 == 0 {
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(client::read_to_end(&client), End::Fin(0));
        }
    }
    let log = proxy.wait_access_log(50);
    for line in log {
        assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&0.into(), &0.into()), "{line:#}");
        assert_eq!(line["cause"], "finished", "{line:#}");
    }
    assert_eq!(backend.counts().fins_seen.load(Ordering::Relaxed), 50);
}

fn idle_sessions_are_closed_with_fin_on_both_sides(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let pool = Pool::new("web").key("connect_timeout = \"500ms\"").backend("a", backend.address());
    let conf = Conf::new(engine).frontend("web", "web", "idle_timeout = \"600ms\"").pool(pool);
    let proxy = TestProxy::start(conf);
    let client = connect(proxy.addr("web"));
    let start = Instant::now();
    while start.elapsed() < ms(1800) {
        // Three timeouts long, and never idle for a whole timeout.
        client::exchange(&client, b"x").unwrap();
        std::thread::sleep(ms(100));
    }
    let idle_since = Instant::now();
    assert_eq!(client::read_to_end(&client), End::Fin(0));
    let idle = idle_since.elapsed();
    assert!(idle > ms(400) && idle < patience(ms(2500)), "closed after {idle:?} of idleness");
    eventually(secs(5), "the backend's connection ends", || backend.active() == 0);
    assert_eq!(backend.counts().fins_seen.load(Ordering::Relaxed), 1);
    assert_eq!(backend.counts().resets_seen.load(Ordering::Relaxed), 0);
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "idle-timeout", "{:#}", log[0]);
    assert_eq!(log[0]["timer"], "idle_timeout", "{:#}", log[0]);
}

fn half_closed_sessions_are_closed_after_half_closed_timeout(engine: Engine) {
    let gate = Gate::default();
    let backend = ScriptedBackend::start(script({
        let gate = gate.clone();
        move |conn| {
            conn.drain();
            gate.wait();
        }
    }));
    let pool = Pool::new("web").backend("a", backend.address());
    let keys = "half_closed_timeout = \"500ms\"";
    let proxy = TestProxy::start(Conf::new(engine).frontend("web", "web", keys).pool(pool));
    let client = connect(proxy.addr("web"));
    client.shutdown(Shutdown::Write).unwrap();
    let start = Instant::now();
    assert_eq!(client::read_to_end(&client), End::Fin(0));
    let waited = start.elapsed();
    assert!(waited > ms(300) && waited < patience(ms(2500)), "closed after {waited:?}");
    gate.open();
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "half-closed-timeout", "{:#}", log[0]);
}

fn backend_half_close_leaves_the_other_direction_open(engine: Engine) {
    let backend = ScriptedBackend::start(backend::half_close_after(3));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    client.write_all(b"abc").unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(0));
    let sent = 1 << 20;
    send_noise(sent, 9, |bytes| client.write_all(bytes));
    client.shutdown(Shutdown::Write).unwrap();
    let read = &backend.counts().bytes_read;
    eventually(secs(5), "the rest arrives", || read.load(Ordering::Relaxed) == sent + 3);
}

fn urgent_byte_does_not_break_the_stream(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = relay_to(engine, &backend);
    let client = connect(proxy.addr("web"));
    assert_eq!(client::exchange(&client, b"before").unwrap(), b"before");
    socket2::SockRef::from(&client).send_out_of_band(b"!").unwrap();
    // The urgent byte stays in the stream as an ordinary byte, as RFC 6093 recommends. All
    // following bytes arrive.
    (&client).write_all(b"after").unwrap();
    let mut echoed = [0; 6];
    (&client).read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"!after");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(0));
}

fn reset_with_pending_output_reaches_the_backend(engine: Engine) {
    let gate = Gate::default();
    let backend = ScriptedBackend::start(script({
        let gate = gate.clone();
        // Reads late, so that output for the backend is pending at the reset.
        move |conn| {
            gate.wait();
            conn.drain();
        }
    }));
    let proxy = relay_to(engine, &backend);
    let mut client = connect(proxy.addr("web"));
    client.set_write_timeout(Some(ms(300))).unwrap();
    let block = vec![1u8; 1 << 20];
    while client.write_all(&block).is_ok() {}
    client::reset(client);
    std::thread::sleep(ms(100));
    gate.open();
    eventually(secs(10), "the backend's connection ends", || backend.active() == 0);
    assert_eq!(backend.counts().resets_seen.load(Ordering::Relaxed), 1);
    let log = proxy.wait_access_log(1);
    assert_eq!(log[0]["cause"], "client-reset", "{:#}", log[0]);
}

fn thousand_simultaneous_connections_are_served(engine: Engine) {
    let backend = ScriptedBackend::start(backend::echo());
    let proxy = relay_to(engine, &backend);
    let clients: Vec<_> = (0..1000).map(|_| connect(proxy.addr("web"))).collect();
    for (number, mut client) in clients.iter().enumerate() {
        client.write_all(&number.to_le_bytes()).unwrap();
    }
    for (number, mut client) in clients.iter().enumerate() {
        let mut echoed = [0; 8];
        client.read_exact(&mut echoed).unwrap();
        assert_eq!(usize::from_le_bytes(echoed), number);
    }
    assert_eq!(proxy.backend("web", "a")["sessions_active"], 1000);
}

fn iperf3_runs_both_ways_in_parallel(engine: Engine) {
    if !have(&["iperf3"]) {
        return;
    }
    let server = Iperf3::start();
    let proxy =
        TestProxy::start(Conf::simple(engine, Pool::new("web").backend("a", server.address)));
    for (what, arguments) in [
        ("up", &["-n", "1G"][..]),
        ("down", &["-n", "1G", "-R"]),
        ("4 streams both ways", &["-t", "2", "-P", "4", "--bidir"]),
    ] {
        let rate = iperf3_client(proxy.addr("web"), arguments);
        assert!(rate > 1e7, "{what}: {rate} bit/s");
        measured(&format!("iperf3 {what}: {:.1} Gbit/s", rate / 1e9));
    }
}
