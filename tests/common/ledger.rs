//! The stream ledger: thousands of seeded streams whose every byte is known.
//!
//! A client sends its seed as the first 8 bytes; from it both ends derive how
//! much goes each way, in which writes, and who closes how. Each end hashes
//! what it sends, and compares and hashes what it receives; [`Ledger::run`]
//! matches both ends and names every stream that differs by its seed. It never
//! judges by totals alone.

use super::backend::{Conn, Script, script};
use super::client::try_connect;
use super::{eventually, patience, secs};
use socket2::Socket;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// Length of the common block all content is cut from: a prime, so that no
/// buffer size divides it and a repeated or skipped buffer shows.
const BLOCK_LEN: usize = 1_048_573;

static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = fastrand::Rng::with_seed(0x7469_6465);
    (0..BLOCK_LEN).map(|_| random.u8(..)).collect()
});

/// Who ends the stream, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
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
pub struct Plan {
    pub seed: u64,
    pub up: u64,
    pub down: u64,
    pub order: Order,
}

/// How large streams are.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Log-uniform from 0 to this.
    pub most: u64,
    /// One stream in so many is 1 to 4 MiB instead; 0 for none.
    pub large_one_in: u64,
}

/// What one end says about a stream.
#[derive(Debug, Clone)]
struct Side {
    sent: u64,
    sent_hash: u64,
    received: u64,
    received_hash: u64,
    fault: Option<String>,
}

/// Both ends' records and the count of streams.
pub struct Ledger {
    sizes: Sizes,
    aborts: bool,
    /// How long an end waits for a byte, and one end for the other's record.
    silence: Duration,
    backend: Mutex<HashMap<u64, Side>>,
    pub bytes_up: AtomicU64,
    pub bytes_down: AtomicU64,
    faults: Mutex<Vec<String>>,
    streams: AtomicU64,
}

// === impl Plan ===

impl Plan {
    fn of(seed: u64, sizes: Sizes, aborts: bool) -> Plan {
        let mut random = fastrand::Rng::with_seed(seed);
        let large = sizes.large_one_in > 0 && random.u64(..sizes.large_one_in) == 0;
        let mut size = || match large {
            true => random.u64(1 << 20..4 << 20),
            false => {
                let log = random.f64() * ((sizes.most + 1) as f64).ln();
                log.exp() as u64 - 1
            }
        };
        let (up, down) = (size(), size());
        let order = match random.u8(..100) {
            0..=19 => Order::ClientFinFirst,
            20..=39 => Order::BackendFinFirst,
            40..=59 => Order::Together,
            60..=77 => Order::ClientCloses,
            78..=95 => Order::BackendCloses,
            _ if !aborts => Order::Together,
            96..=97 => Order::ClientAborts,
            _ => Order::BackendAborts,
        };
        Plan { seed, up, down, order }
    }

    fn aborts(&self) -> bool {
        matches!(self.order, Order::ClientAborts | Order::BackendAborts)
    }
}

// === impl Ledger ===

impl Ledger {
    pub fn new(sizes: Sizes) -> Arc<Ledger> {
        Ledger::make(sizes, true, secs(20))
    }

    /// Without streams that end in a reset: every stream must be whole.
    pub fn without_aborts(sizes: Sizes) -> Arc<Ledger> {
        Ledger::make(sizes, false, secs(20))
    }

    /// The same with little patience, for tests that break streams on purpose.
    pub fn impatient(sizes: Sizes) -> Arc<Ledger> {
        Ledger::make(sizes, false, Duration::from_secs(1))
    }

    fn make(sizes: Sizes, aborts: bool, silence: Duration) -> Arc<Ledger> {
        Arc::new(Ledger {
            sizes,
            aborts,
            silence: patience(silence),
            backend: Mutex::default(),
            bytes_up: AtomicU64::new(0),
            bytes_down: AtomicU64::new(0),
            faults: Mutex::default(),
            streams: AtomicU64::new(0),
        })
    }

    /// The backend's end, for as many backends as wanted.
    pub fn script(self: &Arc<Ledger>) -> Script {
        let ledger = self.clone();
        script(move |conn| ledger.serve(conn))
    }

    /// Runs the streams of `seeds`, at most `at_once` together, each to one of
    /// `addresses` in turn.
    pub fn run(&self, addresses: &[SocketAddr], seeds: std::ops::Range<u64>, at_once: usize) {
        let next = AtomicU64::new(seeds.start);
        self.run_clients(addresses, at_once, || {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            (seed < seeds.end).then_some(seed)
        });
    }

    /// Runs streams until `stop` is set.
    pub fn run_until(&self, addresses: &[SocketAddr], stop: &AtomicBool, at_once: usize) {
        let next = AtomicU64::new(1);
        self.run_clients(addresses, at_once, || {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            (!stop.load(Ordering::Relaxed)).then_some(seed)
        });
    }

    /// Streams the clients have run.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Everything that differed, each with its seed.
    pub fn faults(&self) -> Vec<String> {
        self.faults.lock().expect("no panic in here").clone()
    }

    /// Panics with the first differences, if there are any.
    #[track_caller]
    pub fn assert_clean(&self) {
        let faults = self.faults();
        let first: Vec<&String> = faults.iter().take(10).collect();
        assert!(faults.is_empty(), "{} of {} streams: {first:#?}", faults.len(), self.streams());
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
                        let address = addresses[seed as usize % addresses.len()];
                        self.run_one(address, seed);
                    }
                });
            }
        });
    }

    fn run_one(&self, address: SocketAddr, seed: u64) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        let plan = Plan::of(seed, self.sizes, self.aborts);
        let client = match try_connect(address) {
            Ok(stream) => {
                let socket = Socket::from(stream);
                socket.set_read_timeout(Some(self.silence)).expect("set a deadline");
                client_side(&socket, &plan)
            }
            Err(error) => return self.fault(&plan, format!("connect: {error}")),
        };
        self.bytes_up.fetch_add(client.sent + 8, Ordering::Relaxed);
        self.bytes_down.fetch_add(client.received, Ordering::Relaxed);
        // An aborting client's seed may itself never arrive.
        let mut backend = None;
        let deadline = std::time::Instant::now() + self.silence;
        while backend.is_none() && std::time::Instant::now() < deadline {
            backend = self.backend.lock().expect("no panic in here").remove(&seed);
            if backend.is_none() {
                if plan.order == Order::ClientAborts {
                    return;
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        let Some(backend) = backend else {
            return self.fault(&plan, format!("never ended at the backend; client: {client:?}"));
        };
        for difference in compare(&plan, &client, &backend) {
            self.fault(&plan, difference);
        }
    }

    fn fault(&self, plan: &Plan, what: String) {
        self.faults.lock().expect("no panic in here").push(format!("{plan:?}: {what}"));
    }

    fn serve(&self, conn: &Conn) {
        let mut seed = [0; 8];
        if (&*conn.socket).read_exact(&mut seed).is_err() {
            return;
        }
        let plan = Plan::of(u64::from_le_bytes(seed), self.sizes, self.aborts);
        conn.socket.set_read_timeout(Some(self.silence)).expect("set a deadline");
        let side = backend_side(&conn.socket, &plan);
        if plan.order == Order::ClientAborts {
            // The client does not wait for this record, so it is judged here.
            if let Some(fault) = side.fault {
                self.fault(&plan, format!("backend: {fault}"));
            }
            return;
        }
        self.backend.lock().expect("no panic in here").insert(plan.seed, side);
    }

    /// Waits until no record waits for its other end.
    pub fn settle(&self) {
        eventually(secs(20), "both ends of every stream have reported", || {
            self.backend.lock().expect("no panic in here").is_empty()
        });
    }
}

fn compare(plan: &Plan, client: &Side, backend: &Side) -> Vec<String> {
    let mut differences = Vec::new();
    for (end, side) in [("client", client), ("backend", backend)] {
        if let Some(fault) = &side.fault {
            differences.push(format!("{end}: {fault}"));
        }
    }
    if plan.aborts() {
        return differences;
    }
    if (client.sent, client.sent_hash) != (backend.received, backend.received_hash) {
        differences.push(format!("up: sent {} but {} came", client.sent, backend.received));
    }
    if (backend.sent, backend.sent_hash) != (client.received, client.received_hash) {
        differences.push(format!("down: sent {} but {} came", backend.sent, client.received));
    }
    differences
}

// === one end ===

/// One direction's content: a walk around the block from a seeded start.
#[derive(Clone, Copy)]
struct Pattern(u64);

impl Pattern {
    fn up(seed: u64) -> Pattern {
        Pattern(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) % BLOCK_LEN as u64)
    }

    fn down(seed: u64) -> Pattern {
        Pattern(seed.wrapping_mul(0xC2B2_AE3D_27D4_EB4F) % BLOCK_LEN as u64)
    }

    /// The bytes from `position`, up to `most` of them or the block's edge.
    fn at(self, position: u64, most: usize) -> &'static [u8] {
        let start = ((self.0 + position) % BLOCK_LEN as u64) as usize;
        &BLOCK[start..BLOCK_LEN.min(start + most)]
    }
}

/// Until when one end reads.
#[derive(Clone, Copy, PartialEq)]
enum Until {
    /// FIN, after exactly the planned number of bytes.
    Fin,
    /// The planned number of bytes; the peer is not asked for a FIN.
    Count,
    /// Whatever comes first of FIN and RST: only what did come is checked.
    Anything,
}

fn client_side(socket: &Socket, plan: &Plan) -> Side {
    let mut half = Half::new(socket, plan.seed, Pattern::up(plan.seed), Pattern::down(plan.seed));
    let result = (&*socket).write_all(&plan.seed.to_le_bytes()).map_err(|e| format!("seed: {e}"));
    let result = result.and_then(|()| match plan.order {
        Order::ClientFinFirst => {
            half.send(plan.up, true).and_then(|()| half.receive(plan.down, Until::Fin))
        }
        Order::BackendFinFirst => {
            half.receive(plan.down, Until::Fin).and_then(|()| half.send(plan.up, true))
        }
        Order::Together => half.both(plan.up, true, plan.down, Until::Fin),
        Order::ClientCloses => half.both(plan.up, false, plan.down, Until::Count),
        Order::BackendCloses => half.both(plan.up, false, plan.down, Until::Fin),
        Order::ClientAborts => half.abort(plan.up / 2),
        Order::BackendAborts => half.suffer(plan.up, plan.down),
    });
    half.record(result.err())
}

fn backend_side(socket: &Socket, plan: &Plan) -> Side {
    let seed = !plan.seed;
    let mut half = Half::new(socket, seed, Pattern::down(plan.seed), Pattern::up(plan.seed));
    let result = match plan.order {
        Order::ClientFinFirst => {
            half.receive(plan.up, Until::Fin).and_then(|()| half.send(plan.down, true))
        }
        Order::BackendFinFirst => {
            half.send(plan.down, true).and_then(|()| half.receive(plan.up, Until::Fin))
        }
        Order::Together => half.both(plan.down, true, plan.up, Until::Fin),
        Order::ClientCloses => half.both(plan.down, false, plan.up, Until::Fin),
        Order::BackendCloses => half.both(plan.down, false, plan.up, Until::Count),
        Order::ClientAborts => half.suffer(plan.down, plan.up),
        Order::BackendAborts => half.abort(plan.down / 2),
    };
    half.record(result.err())
}

struct Half<'a> {
    socket: &'a Socket,
    random: fastrand::Rng,
    outgoing: Pattern,
    incoming: Pattern,
    sent: u64,
    received: u64,
    sent_hash: Xxh3,
    received_hash: Xxh3,
}

impl<'a> Half<'a> {
    fn new(socket: &'a Socket, seed: u64, outgoing: Pattern, incoming: Pattern) -> Half<'a> {
        Half {
            socket,
            random: fastrand::Rng::with_seed(seed),
            outgoing,
            incoming,
            sent: 0,
            received: 0,
            sent_hash: Xxh3::new(),
            received_hash: Xxh3::new(),
        }
    }

    fn record(self, fault: Option<String>) -> Side {
        Side {
            sent: self.sent,
            sent_hash: self.sent_hash.digest(),
            received: self.received,
            received_hash: self.received_hash.digest(),
            fault,
        }
    }

    /// Sends `len` bytes in writes of 1 B to 1 MB, then perhaps FIN.
    fn send(&mut self, len: u64, fin: bool) -> Result<(), String> {
        while self.sent < len {
            let most = self.random.f64() * (1e6f64).ln();
            let most = (most.exp() as usize).min((len - self.sent) as usize);
            let bytes = self.outgoing.at(self.sent, most);
            let n = match (&*self.socket).write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result.map_err(|e| format!("write at {}: {e}", self.sent))?,
            };
            self.sent_hash.update(&bytes[..n]);
            self.sent += n as u64;
        }
        if fin {
            self.socket.shutdown(Shutdown::Write).map_err(|e| format!("FIN: {e}"))?;
        }
        Ok(())
    }

    /// Receives, checking each byte.
    fn receive(&mut self, len: u64, until: Until) -> Result<(), String> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            if until == Until::Count && self.received >= len {
                return Ok(());
            }
            let n = match (&*self.socket).read(&mut buffer) {
                Ok(0) if until == Until::Anything || self.received == len => return Ok(()),
                Ok(0) => return Err(format!("FIN after {} of {len}", self.received)),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(format!("silence after {} of {len}", self.received));
                }
                Err(_) if until == Until::Anything => return Ok(()),
                Err(error) => return Err(format!("read at {} of {len}: {error}", self.received)),
            };
            self.check(&buffer[..n])?;
            if self.received > len {
                return Err(format!("{} bytes where {len} were sent", self.received));
            }
        }
    }

    fn check(&mut self, mut got: &[u8]) -> Result<(), String> {
        self.received_hash.update(got);
        while !got.is_empty() {
            let wanted = self.incoming.at(self.received, got.len());
            if got[..wanted.len()] != *wanted {
                let at = wanted.iter().zip(got).take_while(|(a, b)| a == b).count() as u64;
                return Err(format!("wrong byte at {}", self.received + at));
            }
            self.received += wanted.len() as u64;
            got = &got[wanted.len()..];
        }
        Ok(())
    }

    /// Sends and receives at once.
    fn both(&mut self, out: u64, fin: bool, into: u64, until: Until) -> Result<(), String> {
        let mut writer = Half::new(self.socket, self.random.u64(..), self.outgoing, self.incoming);
        let (written, read) = std::thread::scope(|scope| {
            let thread = scope.spawn(|| writer.send(out, fin));
            let read = self.receive(into, until);
            (thread.join().expect("the writer does not panic"), read)
        });
        self.sent = writer.sent;
        self.sent_hash = writer.sent_hash;
        read.and(written)
    }

    /// Sends some and resets.
    fn abort(&mut self, len: u64) -> Result<(), String> {
        let sent = self.send(len, false);
        self.socket.set_linger(Some(Duration::ZERO)).map_err(|e| e.to_string())?;
        sent
    }

    /// Goes on as planned while the peer resets: errors are expected, wrong
    /// bytes and silence are not.
    fn suffer(&mut self, out: u64, into: u64) -> Result<(), String> {
        let mut writer = Half::new(self.socket, self.random.u64(..), self.outgoing, self.incoming);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _ = writer.send(out, false);
            });
            self.receive(into, Until::Anything)
        })
    }
}
