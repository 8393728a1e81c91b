//! The stream ledger: thousands of seeded streams with known content.
//!
//! Used by `tidegate selftest`, `tidegate streams` and integration tests. It never
//! judges by totals only.
//!
//! - A client sends its seed as the first 8 bytes. Both ends derive the number of bytes
//!   in each direction, the writes and the order of closing from it.
//! - Each end hashes what it sends, and compares and hashes what it receives.
//! - [`Ledger::run`] matches both ends and reports every stream that differs, with its
//!   seed.

mod backend;
mod end;

pub use backend::LedgerBackend;

use end::{StreamEnd, backend_side, client_side};
use socket2::{Domain, Socket, Type};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidegate_net::clock;

/// Connect timeout of a client.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Interval at which a waiting client checks whether to stop.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Interval at which a client checks for the record of the other end.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// Which end closes the stream, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseOrder {
    /// The client sends everything and FIN; then the backend answers.
    ClientFinFirst,
    /// The backend sends everything and FIN; then the client sends.
    BackendFinFirst,
    /// Both send at the same time, each with FIN at its end.
    Together,
    /// Both send at the same time; the client closes when it has received everything.
    ClientCloses,
    /// Both send at the same time; the backend closes when it has received everything.
    BackendCloses,
    /// The client resets halfway. The backend must hold a correct prefix.
    ClientAborts,
    /// The backend resets halfway. The client must hold a correct prefix.
    BackendAborts,
}

/// Parameters of one stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamPlan {
    /// The other fields follow from it.
    pub seed: u64,
    /// Bytes from the client, without the seed.
    pub up: u64,
    /// Bytes to the client.
    pub down: u64,
    /// Which end closes it, and how.
    pub order: CloseOrder,
}

/// Distribution of stream sizes.
#[derive(Debug, Clone, Copy)]
pub struct StreamSizes {
    /// Maximum; sizes are log-uniform from 0.
    pub most: u64,
    /// One in this number of streams has 1 to 4 MiB instead; 0 for none.
    pub large_one_in: u64,
}

/// Kind of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamFaultKind {
    /// The connect failed.
    Refused,
    /// The stream was reset, or ended early.
    Reset,
    /// Bytes were lost, added or changed.
    Wrong,
    /// No more data arrived.
    Silent,
}

/// A fault of one stream.
#[derive(Debug, Clone)]
pub struct StreamFault {
    /// Its kind.
    pub kind: StreamFaultKind,
    /// The stream; `None` while one end handles it.
    pub plan: Option<StreamPlan>,
    /// Description.
    pub text: String,
}

/// The records of both ends, the faults and the counts.
#[derive(Debug)]
pub struct Ledger {
    sizes: StreamSizes,
    aborts: bool,
    /// Time for which an end waits for a byte, and for the record of the other end.
    silence: Duration,
    backend: Mutex<HashMap<u64, StreamEnd>>,
    /// Bytes that the clients sent.
    pub bytes_up: AtomicU64,
    /// Bytes that the clients received.
    pub bytes_down: AtomicU64,
    faults: Mutex<Vec<StreamFault>>,
    streams: AtomicU64,
    excused: Mutex<HashSet<u64>>,
}

// === impl StreamPlan ===

impl StreamPlan {
    /// Derives the plan from the seed.
    pub fn of(seed: u64, sizes: StreamSizes, aborts: bool) -> StreamPlan {
        let mut random = fastrand::Rng::with_seed(seed);
        let large = sizes.large_one_in > 0 && random.u64(..sizes.large_one_in) == 0;
        let mut size = || match large {
            true => random.u64(1 << 20..4 << 20),
            false => {
                let log = random.f64() * ((sizes.most + 1) as f64).ln();
                (log.exp() as u64).saturating_sub(1)
            }
        };
        let (up, down) = (size(), size());
        let order = match random.u8(..100) {
            0..=19 => CloseOrder::ClientFinFirst,
            20..=39 => CloseOrder::BackendFinFirst,
            40..=59 => CloseOrder::Together,
            60..=77 => CloseOrder::ClientCloses,
            78..=95 => CloseOrder::BackendCloses,
            _ if !aborts => CloseOrder::Together,
            96..=97 => CloseOrder::ClientAborts,
            _ => CloseOrder::BackendAborts,
        };
        StreamPlan { seed, up, down, order }
    }

    fn aborts(&self) -> bool {
        matches!(self.order, CloseOrder::ClientAborts | CloseOrder::BackendAborts)
    }
}

// === impl StreamFault ===

impl StreamFault {
    fn new(kind: StreamFaultKind, text: impl Into<String>) -> StreamFault {
        StreamFault { kind, plan: None, text: text.into() }
    }

    fn of(doing: impl fmt::Display, error: &io::Error) -> StreamFault {
        let kind = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => StreamFaultKind::Silent,
            io::ErrorKind::ConnectionRefused => StreamFaultKind::Refused,
            _ => StreamFaultKind::Reset,
        };
        StreamFault::new(kind, format!("{doing}: {error}"))
    }
}

impl fmt::Display for StreamFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.plan {
            Some(StreamPlan { seed, up, down, order }) => write!(
                f,
                "stream with seed {seed}, {up} B up, {down} B down, end {order:?}: {}",
                self.text
            ),
            None => f.write_str(&self.text),
        }
    }
}

// === impl Ledger ===

impl Ledger {
    /// Creates a ledger of streams with these sizes. With `aborts`, some end with a
    /// reset. `silence` is the time for which an end waits for a byte.
    pub fn new(sizes: StreamSizes, aborts: bool, silence: Duration) -> Ledger {
        Ledger {
            sizes,
            aborts,
            silence,
            backend: Mutex::default(),
            bytes_up: AtomicU64::new(0),
            bytes_down: AtomicU64::new(0),
            faults: Mutex::default(),
            streams: AtomicU64::new(0),
            excused: Mutex::default(),
        }
    }

    /// Runs the streams of `seeds`, at most `at_once` at the same time, to `addresses`
    /// in turn.
    pub fn run(&self, addresses: &[SocketAddr], seeds: Range<u64>, at_once: usize) {
        let next = AtomicU64::new(seeds.start);
        self.run_clients(addresses, at_once, || {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            (seed < seeds.end).then_some(seed)
        });
    }

    /// Runs streams with ascending seeds from `first` until `stop` is set.
    pub fn run_from(
        &self,
        first: u64,
        addresses: &[SocketAddr],
        stop: &AtomicBool,
        at_once: usize,
    ) {
        let next = AtomicU64::new(first);
        self.run_clients(addresses, at_once, || {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            (!stop.load(Ordering::Relaxed)).then_some(seed)
        });
    }

    /// Runs streams as [`Ledger::run_from`] does, at `rate` streams per second. If
    /// `at_once` streams are open, the next stream starts late.
    pub fn run_paced(
        &self,
        first: u64,
        addresses: &[SocketAddr],
        stop: &AtomicBool,
        at_once: usize,
        rate: f64,
    ) {
        let (next, begin) = (AtomicU64::new(0), clock::now());
        self.run_clients(addresses, at_once, || {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let due = begin + Duration::from_secs_f64(number as f64 / rate);
            while !stop.load(Ordering::Relaxed) {
                match due.saturating_duration_since(clock::now()) {
                    Duration::ZERO => return Some(first + number),
                    wait => clock::pause(wait.min(STOP_POLL_INTERVAL)),
                }
            }
            None
        });
    }

    /// Returns the number of streams that the clients have started.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Returns all faults.
    pub fn faults(&self) -> Vec<StreamFault> {
        held(&self.faults).clone()
    }

    /// Returns whether both ends of every stream were matched.
    pub fn is_settled(&self) -> bool {
        held(&self.backend).is_empty()
    }

    /// Ignores all later faults of this stream, because the test causes them.
    pub fn excuse(&self, seed: u64) {
        held(&self.excused).insert(seed);
    }

    /// Runs the backend's end of one stream. `begun` receives its seed.
    pub fn serve(&self, socket: &Socket, begun: impl FnOnce(u64)) {
        let mut seed = [0; 8];
        // A probe connects and sends nothing.
        if (&mut &*socket).read_exact(&mut seed).is_err() {
            return;
        }
        let plan = StreamPlan::of(u64::from_le_bytes(seed), self.sizes, self.aborts);
        begun(plan.seed);
        if socket.set_read_timeout(Some(self.silence)).is_err() {
            return;
        }
        let side = backend_side(socket, &plan);
        if plan.order == CloseOrder::ClientAborts {
            // The client does not wait for this record, so it is checked here.
            if let Some(fault) = side.fault {
                self.fault(&plan, StreamFault { text: format!("backend: {fault}"), ..fault });
            }
            return;
        }
        held(&self.backend).insert(plan.seed, side);
    }

    fn run_clients(
        &self,
        addresses: &[SocketAddr],
        at_once: usize,
        next: impl Fn() -> Option<u64> + Sync,
    ) {
        std::thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(|| {
                    while let Some(seed) = next() {
                        self.run_one(addresses[seed as usize % addresses.len()], seed);
                    }
                });
            }
        });
    }

    fn run_one(&self, address: SocketAddr, seed: u64) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        let plan = StreamPlan::of(seed, self.sizes, self.aborts);
        let client = match self.connect(address) {
            Ok(socket) => client_side(&socket, &plan),
            Err(error) => {
                let fault = StreamFault {
                    kind: StreamFaultKind::Refused,
                    ..StreamFault::of("connect", &error)
                };
                return self.fault(&plan, fault);
            }
        };
        self.bytes_up.fetch_add(client.sent + 8, Ordering::Relaxed);
        self.bytes_down.fetch_add(client.received, Ordering::Relaxed);
        let Some(backend) = self.other_end(&plan) else {
            // The reset of an aborting client can overtake its seed.
            if plan.order != CloseOrder::ClientAborts {
                let kind =
                    client.fault.as_ref().map_or(StreamFaultKind::Silent, |fault| fault.kind);
                let text = format!("stream did not end at the backend; client: {client:?}");
                self.fault(&plan, StreamFault::new(kind, text));
            }
            return;
        };
        for difference in compare(&plan, client, backend) {
            self.fault(&plan, difference);
        }
    }

    fn connect(&self, address: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.connect_timeout(&address.into(), CONNECT_MAX)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_read_timeout(Some(self.silence))?;
        socket.set_write_timeout(Some(self.silence))?;
        Ok(socket)
    }

    fn other_end(&self, plan: &StreamPlan) -> Option<StreamEnd> {
        let deadline = clock::now() + self.silence;
        loop {
            let backend = held(&self.backend).remove(&plan.seed);
            let waits = plan.order != CloseOrder::ClientAborts && !self.is_excused(plan.seed);
            if backend.is_some() || !waits || clock::now() >= deadline {
                return backend;
            }
            clock::pause(POLL_INTERVAL);
        }
    }

    fn is_excused(&self, seed: u64) -> bool {
        held(&self.excused).contains(&seed)
    }

    fn fault(&self, plan: &StreamPlan, fault: StreamFault) {
        if !self.is_excused(plan.seed) {
            held(&self.faults).push(StreamFault { plan: Some(*plan), ..fault });
        }
    }
}

/// Locks the mutex. A thread that panicked leaves consistent data.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn compare(plan: &StreamPlan, client: StreamEnd, backend: StreamEnd) -> Vec<StreamFault> {
    let mut differences = Vec::new();
    let (up, down) = (
        (client.sent, client.sent_hash) == (backend.received, backend.received_hash),
        (backend.sent, backend.sent_hash) == (client.received, client.received_hash),
    );
    let whole = client.fault.is_none() && backend.fault.is_none();
    for (end, side) in [("client", &client), ("backend", &backend)] {
        if let Some(fault) = &side.fault {
            let text = format!("{end}: {fault}");
            differences.push(StreamFault { text, ..fault.clone() });
        }
    }
    if plan.aborts() {
        return differences;
    }
    // After a fault of one end, missing bytes are part of the same fault.
    let kind = if whole { StreamFaultKind::Wrong } else { StreamFaultKind::Reset };
    if !up {
        let text =
            format!("client to backend: {} bytes sent, {} received", client.sent, backend.received);
        differences.push(StreamFault::new(kind, text));
    }
    if !down {
        let text =
            format!("backend to client: {} bytes sent, {} received", backend.sent, client.received);
        differences.push(StreamFault::new(kind, text));
    }
    differences
}
