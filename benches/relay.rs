//! Cost of a relayed message on each engine: one connection through a worker to an echo
//! backend, both in this process, over loopback. Run with `cargo bench --bench relay`;
//! the last argument filters by name.
//!
//! Worker, backend and client each have a thread. With fewer than three free cores they
//! share cores, and the result is the sum of their times.

#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;
use tidegate_config as config;
use tidegate_core::control::{ControlEvent, Controller};
use tidegate_core::decision::rings::Decisions;
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::model::BindKey;
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::table::publish::TablePublisher;
use tidegate_dataplane::accept::wait_queue::SlotWaiters;
use tidegate_dataplane::access_log::{AccessLog, AccessLogDestination};
use tidegate_dataplane::worker::context::{ProcessContext, ReportQueue};
use tidegate_dataplane::worker::{EngineKind, Worker, WorkerCommand, WorkerConfig};
use tidegate_lab::load::{Behaviour, Service, serve};
use tidegate_net::clock;
use tidegate_net::listen;

const SIZES: [(usize, &str); 3] = [(64, "64 B"), (16 * 1024, "16 KiB"), (1024 * 1024, "1 MiB")];

/// Minimum capacity of loopback sockets. A message up to this size is written
/// completely before its echo is read.
const FITS: usize = 16 * 1024;

/// Starts a worker that sends everything on `bind` to `backend`.
fn balancer(runtime: EngineKind, bind: SocketAddr, backend: SocketAddr) -> Worker {
    let text = format!(
        "[frontend.web]\nbind = [\"{bind}\"]\npool = \"web\"\n\
         [[pool.web.backend]]\naddress = \"{backend}\"\n"
    );
    let mut controller = Controller::new(1, 7);
    let config = config::parse(&text, "bench.toml").expect("valid");
    controller.apply(ControlEvent::Configure(Arc::new(config)), clock::now());
    let (_log, mut senders) = AccessLog::start(AccessLogDestination::Off, 1).unwrap();
    let worker = Worker::start(WorkerConfig {
        id: 0,
        cpu: None,
        runtime,
        spin: None,
        shared: ProcessContext {
            in_flight: Arc::default(),
            sessions: Arc::default(),
            waiters: Arc::new(SlotWaiters::new()),
            numbers: Arc::default(),
            decisions: Arc::new(Decisions::new(1)),
            reports: Arc::new(ReportQueue::new()),
            ended: Arc::default(),
            buffers: Arc::default(),
        },
        tables: TablePublisher::new(controller.current_table()),
        counters: Arc::new(WorkerCounters::new(Cause::COUNT, Phase::COUNT)),
        access_log: senders.remove(0),
        seed: 7,
    })
    .unwrap();
    let socket = listen::bind(bind, 1).unwrap().remove(0);
    worker.mailbox.send(WorkerCommand::Listen(BindKey::tcp(bind), Arc::new(socket)));
    worker
}

/// Returns a loopback address that is not in use.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Sends a message and reads its echo, repeatedly.
struct Client {
    stream: TcpStream,
    message: Vec<u8>,
    /// Starts another thread's send of a large message while the echo is read.
    go: Option<mpsc::Sender<()>>,
}

impl Client {
    fn new(to: SocketAddr, size: usize) -> Client {
        let stream = TcpStream::connect(to).unwrap();
        stream.set_nodelay(true).unwrap();
        let message = vec![b'x'; size];
        let go = (size > FITS).then(|| {
            let (go, asked) = mpsc::channel();
            let (mut stream, message) = (stream.try_clone().unwrap(), message.clone());
            thread::spawn(move || {
                while asked.recv().is_ok() {
                    stream.write_all(&message).unwrap();
                }
            });
            go
        });
        Client { stream, message, go }
    }

    fn exchange(&mut self) {
        match &self.go {
            Some(go) => go.send(()).unwrap(),
            None => self.stream.write_all(&self.message).unwrap(),
        }
        self.stream.read_exact(&mut self.message).unwrap();
    }
}

fn relay(c: &mut Criterion) {
    let (_backends, addresses) = serve(Service {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        behaviour: Behaviour::Echo,
        threads: 1,
        cpus: Vec::new(),
        duration: None,
        skip: 0,
    })
    .unwrap();
    let mut engines = vec![EngineKind::Epoll];
    match EngineKind::io_uring_allowed() {
        Ok(()) => engines.insert(0, EngineKind::IoUring),
        Err(error) => eprintln!("no io_uring here ({error}): only the epoll engine is measured"),
    }
    for runtime in engines {
        let bind = free_address();
        let worker = balancer(runtime, bind, addresses[0]);
        for (size, name) in SIZES {
            let mut client = Client::new(bind, size);
            client.exchange();
            let mut group = c.benchmark_group(format!("relay {name} and back"));
            // Both directions.
            group.throughput(Throughput::Bytes(2 * size as u64));
            group.bench_function(BenchmarkId::from_parameter(runtime.name()), |b| {
                b.iter(|| client.exchange());
            });
            group.finish();
        }
        worker.mailbox.send(WorkerCommand::Stop);
        worker.join();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = relay
}
criterion_main!(benches);
