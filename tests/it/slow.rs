//! Thousands of slow clients and their effect on the latency of other clients and on memory.
//!
//! 400 slow clients by default, and 5,000 with `TIDEGATE_LONG=1`.

use crate::common::backend::{ScriptedBackend, script};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::servers::Running;
use crate::common::{
    Engine, eventually, long, measured, ms, on_every_engine, on_every_engine_quiet, proc, secs,
    skip,
};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_every_engine!(
    client_that_never_reads_stalls_only_its_own_session,
    session_of_a_slow_reader_is_not_idle,
);
on_every_engine_quiet!(slow_clients_do_not_affect_latency_or_memory);

/// `tidegate backend` in one of its modes, in a separate process.
pub struct Service {
    pub address: SocketAddr,
    _running: Running,
}

impl Service {
    pub fn start(mode: &str) -> Service {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut command = Command::new(PROGRAM);
        command.args(["backend", "--listen", &address.to_string(), mode]).stdout(Stdio::null());
        let running = Running::start(&mut command);
        eventually(secs(10), "the service listens", || TcpStream::connect(address).is_ok());
        Service { address, _running: running }
    }
}

/// Starts Tidegate with an endless stream (`stream`) and an echo (`echo`).
fn start(engine: Engine, keys: &str) -> (TestProxy, [Service; 2]) {
    let [source, echo] = ["source", "echo"].map(Service::start);
    let conf = Conf::new(engine)
        .process(keys)
        .frontend("stream", "stream", "")
        .frontend("echo", "echo", "")
        .pool(Pool::new("stream").backend("source", source.address))
        .pool(Pool::new("echo").backend("echo", echo.address));
    (TestProxy::start(conf), [source, echo])
}

/// Connects a client with the segment size of Ethernet. With the segment size of loopback the
/// kernel buffers megabytes per connection, which does not occur on a network.
fn slow_client(number: usize, address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_tcp_mss(1400).unwrap();
    socket.set_recv_buffer_size(8 * 1024).unwrap();
    let source = Ipv4Addr::new(127, 0, 3, (number / 2000 + 1) as u8);
    socket.bind(&SockAddr::from(SocketAddr::from((source, 0)))).unwrap();
    socket.connect_timeout(&address.into(), secs(10)).expect("connect");
    socket.set_nonblocking(true).unwrap();
    TcpStream::from(socket)
}

fn client_that_never_reads_stalls_only_its_own_session(engine: Engine) {
    let (proxy, _services) = start(engine, "");
    let relayed =
        || proxy.metric("tidegate_bytes_total", &[("frontend", "stream"), ("direction", "out")]);
    let never_reads = slow_client(0, proxy.addr("stream"));
    let mut last = -1.0;
    eventually(secs(20), "the sender is stalled", || {
        std::thread::sleep(ms(300));
        let now = relayed();
        std::mem::replace(&mut last, now) == now && now > 0.0
    });
    // The socket buffers of both connections, and one pipe.
    assert!(last < 32.0 * 1048576.0, "{last} bytes accepted for a client that does not read");
    let mut reads = connect(proxy.addr("stream"));
    let mut block = vec![0; 1 << 20];
    (0..64).for_each(|_| reads.read_exact(&mut block).expect("the stream of another client"));
    let echo = connect(proxy.addr("echo"));
    assert_eq!(client::exchange(&echo, b"well").unwrap(), b"well");
    let before = proxy.cpu_time();
    drop(reads);
    std::thread::sleep(secs(1));
    let spent = proxy.cpu_time() - before;
    assert!(spent < ms(400), "a stalled session costs {spent:?} of CPU per second");
    drop(never_reads);
}

/// Slow clients. One half reads a little of an endless stream from time to time, the other
/// half sends a byte from time to time.
struct SlowClients {
    readers: Vec<TcpStream>,
    talkers: Vec<TcpStream>,
}

impl SlowClients {
    fn gather(proxy: &TestProxy, size: usize) -> SlowClients {
        let [stream, echo] = ["stream", "echo"].map(|name| proxy.addr(name));
        let join = |range: std::ops::Range<usize>, to| range.map(|n| slow_client(n, to)).collect();
        SlowClients { readers: join(0..size / 2, stream), talkers: join(size / 2..size, echo) }
    }

    /// Every client reads or sends a little about once per second.
    fn run_slowly(&self, over: &AtomicBool) {
        let mut buffer = [0; 512];
        while !over.load(Ordering::Relaxed) {
            let clients = self.readers.iter().zip(&self.talkers);
            for (mut reader, mut talker) in clients {
                let _ = reader.read(&mut buffer);
                let _ = talker.write(b"x");
                let _ = talker.read(&mut buffer);
                std::thread::sleep(Duration::from_secs(1) / self.readers.len() as u32);
            }
        }
    }
}

/// The 99th percentile of the times of echoes, one per millisecond over 8 sessions.
fn p99(proxy: &TestProxy, lasting: Duration) -> Duration {
    let sessions: Vec<TcpStream> = (0..8).map(|_| connect(proxy.addr("echo"))).collect();
    let (start, mut took) = (Instant::now(), Vec::new());
    for number in 0.. {
        let due = start + ms(1) * number;
        if due >= start + lasting {
            break;
        }
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let begun = Instant::now();
        client::exchange(&sessions[number as usize % 8], &[7; 64]).expect("an echo");
        took.push(begun.elapsed());
    }
    took.sort();
    took[took.len() * 99 / 100]
}

/// Waits until the streams of all slow readers are stalled. While streams fill their buffers,
/// the load is different.
fn wait_until_stalled(proxy: &TestProxy) {
    const CALM_FOR: u32 = 4;
    let (mut last, mut calm) = (0.0, 0);
    eventually(secs(60), "every stream is stalled", || {
        std::thread::sleep(ms(500));
        let now =
            proxy.metric("tidegate_bytes_total", &[("frontend", "stream"), ("direction", "out")]);
        // The slow readers read 1.3 MB per second.
        let stalled = now - std::mem::replace(&mut last, now) < 1e6;
        calm = if stalled { calm + 1 } else { 0 };
        calm == CALM_FOR
    });
}

fn slow_clients_do_not_affect_latency_or_memory(engine: Engine) {
    let (size, lasting, rounds) = if long() { (5000, secs(5), 8) } else { (400, ms(700), 2) };
    if proc::raise_own_fd_limit() < 2 * size as u64 + 500 {
        return skip("the hard limit of descriptors is too low");
    }
    let (proxy, _services) = start(engine, "buffers_max = \"32MiB\"");
    // Costs of the first use are not costs of slow clients.
    drop(SlowClients::gather(&proxy, 100));
    p99(&proxy, ms(500));
    let before = proxy.rss_kib();
    let (mut alone, mut crowded, mut grown, mut held) = (Vec::new(), Vec::new(), 0, 0.0_f64);
    for _ in 0..rounds {
        alone.push(p99(&proxy, lasting));
        let crowd = SlowClients::gather(&proxy, size);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| crowd.run_slowly(&over));
            wait_until_stalled(&proxy);
            crowded.push(p99(&proxy, lasting));
            over.store(true, Ordering::Relaxed);
        });
        grown = grown.max(proxy.rss_kib().saturating_sub(before));
        held = held.max(proxy.metric("tidegate_buffered_bytes", &[]));
        drop(crowd);
        eventually(secs(30), "every slow client has disconnected", || {
            proxy.metric("tidegate_sessions_active", &[]) == 0.0
        });
    }
    alone.sort();
    crowded.sort();
    let [without, with] = [&alone, &crowded].map(|rounds| rounds[rounds.len() / 2]);
    measured(&format!(
        "{size} slow clients: p99 of others {without:.0?} without, {with:.0?} with ({alone:.0?}, \
         {crowded:.0?}); {grown} KiB of memory grown, {held:.0} B buffered"
    ));
    // The documented bound: `buffers_max`, the buffer pools of two rings, and the sessions.
    let pools = if engine == Engine::IoUring { 2 * 16 * 1024 } else { 0 };
    let bound = 32 * 1024 + pools + 4 * size as u64 + 4 * 1024;
    assert!(grown <= bound, "{grown} KiB grown, {bound} allowed");
    assert!(held <= (32 * 1024 + pools + 512) as f64 * 1024.0, "{held} B buffered");
    // The latency is mainly a measurement. Only a collapse fails the test.
    assert!(with < without * 20 + ms(50), "{without:?} without, {with:?} with");
}

/// The kernel reports free buffer space in large steps. A slow reader needs more time per step
/// than either timeout allows.
fn session_of_a_slow_reader_is_not_idle(engine: Engine) {
    const ANSWER: usize = 1 << 20;
    let backend = ScriptedBackend::start(script(|conn| {
        let _ = conn.write_all(&vec![7; ANSWER]);
        conn.drain();
    }));
    let pool = Pool::new("web").backend("a", backend.address());
    let keys = "idle_timeout = \"1s\"\nhalf_closed_timeout = \"1s\"";
    let proxy = TestProxy::start(Conf::new(engine).frontend("web", "web", keys).pool(pool));
    let mut client = connect(proxy.addr("web"));
    let (mut piece, mut got) = (vec![0; 4096], 0);
    let until = Instant::now() + secs(8);
    while Instant::now() < until {
        got += client.read(&mut piece).expect("more bytes");
        std::thread::sleep(ms(250));
    }
    assert!(got < ANSWER / 2, "{got} bytes: not a slow reader");
    // From here on the client reads quickly and closes.
    let rest = (ANSWER - got) as u64;
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(rest));
}
