//! The stream ledger: thousands of seeded streams whose every byte is known.
//!
//! Used by `tidegate selftest` and by the integration tests. A client sends its
//! seed as the first 8 bytes; from it both ends derive how much goes each way, in
//! which writes, and who closes how. Each end hashes what it sends, and compares
//! and hashes what it receives; [`Ledger::run`] matches both ends and names every
//! stream that differs by its seed. It never judges by totals alone.

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

/// A connect takes no longer on a machine that works.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// A client that waits for its stream's time looks this often whether to stop.
const STOP_LOOK: Duration = Duration::from_millis(50);

/// Between looks for the other end's record.
const LOOK: Duration = Duration::from_micros(200);

/// Who ends the stream, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseOrder {
    /// The client sends all and FIN; only then does the backend answer.
    ClientFinFirst,
    /// The backend sends all and FIN; only then does the client send.
    BackendFinFirst,
    /// Both send at once, each with FIN at its end.
    Together,
    /// Both send at once; the client closes once it has everything.
    ClientCloses,
    /// Both send at once; the backend closes once it has everything.
    BackendCloses,
    /// The client resets in the middle: the backend holds a true prefix.
    ClientAborts,
    /// The backend resets in the middle: the client holds a true prefix.
    BackendAborts,
}

/// Everything about one stream.
#[derive(Debug, Clone, Copy)]
pub struct StreamPlan {
    /// All else follows from it.
    pub seed: u64,
    /// Bytes from the client, without the seed.
    pub up: u64,
    /// Bytes to the client.
    pub down: u64,
    /// Who ends it.
    pub order: CloseOrder,
}

/// How large streams are.
#[derive(Debug, Clone, Copy)]
pub struct StreamSizes {
    /// Log-uniform from 0 to this.
    pub most: u64,
    /// One stream in so many is 1 to 4 MiB instead; 0 for none.
    pub large_one_in: u64,
}

/// What kind of wrong a fault is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamFaultKind {
    /// No connection was to be had.
    Refused,
    /// It was reset, or ended early.
    Reset,
    /// Bytes were lost, added or changed.
    Wrong,
    /// Nothing came any more.
    Silent,
}

/// One thing that went wrong with one stream.
#[derive(Debug, Clone)]
pub struct StreamFault {
    /// What kind.
    pub kind: StreamFaultKind,
    /// With which stream; `None` within one end of it.
    pub plan: Option<StreamPlan>,
    /// In words.
    pub text: String,
}

/// Both ends' records and the count of streams.
#[derive(Debug)]
pub struct Ledger {
    sizes: StreamSizes,
    aborts: bool,
    /// How long an end waits for a byte, and one end for the other's record.
    silence: Duration,
    backend: Mutex<HashMap<u64, StreamEnd>>,
    /// Bytes the clients have sent.
    pub bytes_up: AtomicU64,
    /// Bytes the clients have received.
    pub bytes_down: AtomicU64,
    faults: Mutex<Vec<StreamFault>>,
    streams: AtomicU64,
    excused: Mutex<HashSet<u64>>,
}

// === impl StreamPlan ===

impl StreamPlan {
    /// What that seed stands for.
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
            Some(plan) => write!(f, "{plan:?}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

// === impl Ledger ===

impl Ledger {
    /// Streams of those sizes; with `aborts`, some end in a reset. `silence` is
    /// how long an end waits for a byte.
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

    /// Runs the streams of `seeds`, at most `at_once` together, each to one of
    /// `addresses` in turn.
    pub fn run(&self, addresses: &[SocketAddr], seeds: Range<u64>, at_once: usize) {
        let next = AtomicU64::new(seeds.start);
        self.run_clients(addresses, at_once, || {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            (seed < seeds.end).then_some(seed)
        });
    }

    /// Runs streams from the seed `first` on until `stop` is set.
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

    /// The same, but stream number n not before n / `rate` seconds have passed,
    /// whether or not earlier ones have ended while there is one of `at_once` free.
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
                    wait => clock::pause(wait.min(STOP_LOOK)),
                }
            }
            None
        });
    }

    /// Streams the clients have run.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Everything that differed.
    pub fn faults(&self) -> Vec<StreamFault> {
        held(&self.faults).clone()
    }

    /// Whether both ends of every stream have reported.
    pub fn is_settled(&self) -> bool {
        held(&self.backend).is_empty()
    }

    /// Whatever goes wrong with that stream from now on is somebody's doing.
    pub fn excuse(&self, seed: u64) {
        held(&self.excused).insert(seed);
    }

    /// The backend's end of one stream. `begun` is told its seed.
    pub fn serve(&self, socket: &Socket, begun: impl FnOnce(u64)) {
        let mut seed = [0; 8];
        // A probe connects and says nothing.
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
            // The client does not wait for this record, so it is judged here.
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
            // An aborting client's seed may itself never arrive.
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
            clock::pause(LOOK);
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

/// A thread that panicked left nothing half done in here.
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
    // After a fault the rest is missing of course, and said once.
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
