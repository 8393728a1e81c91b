//! Slow clients by the thousand, and what everybody else notices of them: the
//! latency of others, the balancer's memory, and who is stalled by whom.
//!
//! A small crowd by default; the full 5,000 with `TIDEGATE_LONG=1`.

use crate::common::backend::{ScriptedBackend, script};
use crate::common::client::{self, End, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::ports::free_port;
use crate::common::proxy::{PROGRAM, TestProxy};
use crate::common::servers::Running;
use crate::common::{
    Engine, eventually, long, measured, ms, on_every_engine, on_every_engine_alone, proc, secs,
    skip,
};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_every_engine!(
    client_that_never_reads_stalls_only_its_own_sender,
    a_slow_reader_whose_kernel_has_no_room_for_seconds_is_not_idle,
);
on_every_engine_alone!(slow_clients_leave_others_their_latency_and_the_host_its_memory);

/// `tidegate backend` in that mode, in a process of its own.
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

/// A balancer before an endless stream (`stream`) and an echo (`echo`).
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

/// A client with segments as on Ethernet: with loopback's the kernel lets every
/// one of them queue megabytes, for which no network has a use.
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

fn client_that_never_reads_stalls_only_its_own_sender(engine: Engine) {
    let (proxy, _services) = start(engine, "");
    let relayed =
        || proxy.metric("tidegate_bytes_total", &[("frontend", "stream"), ("direction", "out")]);
    let never_reads = slow_client(0, proxy.addr("stream"));
    let mut last = -1.0;
    eventually(secs(20), "its sender is stalled", || {
        std::thread::sleep(ms(300));
        let now = relayed();
        std::mem::replace(&mut last, now) == now && now > 0.0
    });
    // The kernel's buffers of both connections, and one pipe between.
    assert!(last < 32.0 * 1048576.0, "{last} bytes taken from a sender nobody reads");
    let mut reads = connect(proxy.addr("stream"));
    let mut block = vec![0; 1 << 20];
    (0..64).for_each(|_| reads.read_exact(&mut block).expect("another client's stream goes on"));
    let echo = connect(proxy.addr("echo"));
    assert_eq!(client::exchange(&echo, b"well").unwrap(), b"well");
    let before = proxy.cpu_time();
    drop(reads);
    std::thread::sleep(secs(1));
    let spent = proxy.cpu_time() - before;
    assert!(spent < ms(400), "a stalled session costs {spent:?} of CPU a second");
    drop(never_reads);
}

/// Half of them read a little at times from a stream without end, the others say
/// a byte at times and nothing more.
struct Crowd {
    readers: Vec<TcpStream>,
    talkers: Vec<TcpStream>,
}

impl Crowd {
    fn gather(proxy: &TestProxy, size: usize) -> Crowd {
        let [stream, echo] = ["stream", "echo"].map(|name| proxy.addr(name));
        let join = |range: std::ops::Range<usize>, to| range.map(|n| slow_client(n, to)).collect();
        Crowd { readers: join(0..size / 2, stream), talkers: join(size / 2..size, echo) }
    }

    /// Each does its little about once a second.
    fn dawdle(&self, over: &AtomicBool) {
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

/// The 99th percentile of echoes, a fresh one each millisecond over 8 sessions.
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

/// Waits until the senders to all those who read slowly are held back: thousands
/// of streams that begin, and fill every buffer there is, are another load.
fn wait_until_stalled(proxy: &TestProxy) {
    const CALM_FOR: u32 = 4;
    let (mut last, mut calm) = (0.0, 0);
    eventually(secs(60), "no sender is faster than its reader", || {
        std::thread::sleep(ms(500));
        let now =
            proxy.metric("tidegate_bytes_total", &[("frontend", "stream"), ("direction", "out")]);
        // They read 1.3 MB a second.
        let stalled = now - std::mem::replace(&mut last, now) < 1e6;
        calm = if stalled { calm + 1 } else { 0 };
        calm == CALM_FOR
    });
}

fn slow_clients_leave_others_their_latency_and_the_host_its_memory(engine: Engine) {
    let (size, lasting, rounds) = if long() { (5000, secs(5), 8) } else { (400, ms(1500), 2) };
    if proc::raise_own_fd_limit() < 2 * size as u64 + 500 {
        return skip("the hard limit of descriptors is too low");
    }
    let (proxy, _services) = start(engine, "buffers_max = \"32MiB\"");
    // First-use costs are not the crowd's.
    drop(Crowd::gather(&proxy, 100));
    p99(&proxy, ms(500));
    let before = proxy.rss_kib();
    let (mut alone, mut crowded, mut grown, mut held) = (Vec::new(), Vec::new(), 0, 0.0_f64);
    for _ in 0..rounds {
        alone.push(p99(&proxy, lasting));
        let crowd = Crowd::gather(&proxy, size);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| crowd.dawdle(&over));
            wait_until_stalled(&proxy);
            crowded.push(p99(&proxy, lasting));
            over.store(true, Ordering::Relaxed);
        });
        grown = grown.max(proxy.rss_kib().saturating_sub(before));
        held = held.max(proxy.metric("tidegate_buffered_bytes", &[]));
        drop(crowd);
        eventually(secs(30), "the crowd is gone", || {
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
    // What is documented: the budget, two rings' pools, and the sessions.
    let pools = if engine == Engine::IoUring { 2 * 16 * 1024 } else { 0 };
    let bound = 32 * 1024 + pools + 4 * size as u64 + 4 * 1024;
    assert!(grown <= bound, "{grown} KiB grown, {bound} allowed");
    assert!(held <= (32 * 1024 + pools + 512) as f64 * 1024.0, "{held} B buffered");
    // Timing is for reading; only a collapse is a failure.
    assert!(with < without * 20 + ms(50), "{without:?} without, {with:?} with");
}

/// Its kernel makes room in lumps, for which so slow a reader takes longer than any of
/// the two timers.
fn a_slow_reader_whose_kernel_has_no_room_for_seconds_is_not_idle(engine: Engine) {
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
        got += client.read(&mut piece).expect("the stream goes on");
        std::thread::sleep(ms(250));
    }
    assert!(got < ANSWER / 2, "{got} bytes: not a slow reader");
    // From now on it is a quick one, which ends.
    let rest = (ANSWER - got) as u64;
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), End::Fin(rest));
}
