//! The demo's clients: short requests at a steady rate, and long-lived connections.
//!
//! Used by the demo only. They are real connections through the frontend, and every
//! answer and failure is counted. The rate is at most [`RATE`]: more would exhaust the
//! local ports of the host.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

/// Short requests per second. A closed connection keeps its port for a minute (RFC
/// 9293, TIME-WAIT), and Linux has 28,232 ports by default.
pub(crate) const RATE: u32 = 400;

/// Short requests per second while the demo waits for its end.
pub(crate) const RATE_SLOW: u32 = 20;

/// Number of clients that share the rate.
const CLIENTS: u32 = 8;

/// Timeout of a request.
const REQUEST_MAX: Duration = Duration::from_secs(2);

/// Maximum number of failures that are stored; all are counted.
const FAILURES_KEPT: usize = 1000;

/// Number of answers of which the client and the backend are stored.
const SERVED_KEPT: usize = 4096;

/// Number of long-lived connections.
pub(crate) const LONG_LIVED: usize = 10;

/// Time between two exchanges on a long-lived connection.
const EXCHANGE_EVERY: Duration = Duration::from_millis(200);

const REQUEST: &[u8] = b"who\n";
const ANSWER_MAX: usize = 64;

/// Running clients with short requests.
#[derive(Debug)]
pub(crate) struct Traffic {
    plan: Arc<TrafficPlan>,
    clients: JoinSet<()>,
}

#[derive(Debug)]
struct TrafficPlan {
    frontend: SocketAddr,
    names: Vec<String>,
    budget: Mutex<RequestBudget>,
    tally: Mutex<RequestCounts>,
}

#[derive(Debug)]
struct RequestBudget {
    begun: u64,
    /// Maximum number of requests.
    max: u64,
}

/// Results of the requests of one measurement.
#[derive(Debug, Default, Clone)]
pub(crate) struct RequestCounts {
    /// Answers per backend, in order.
    pub(crate) answered: Vec<u64>,
    /// Answers with an unknown name.
    pub(crate) unknown: u64,
    pub(crate) failed: u64,
    /// The first failures.
    pub(crate) failures: Vec<FailedRequest>,
    /// Client address, as in the access log, and backend of the last answers.
    pub(crate) served: VecDeque<(String, String)>,
}

/// A request without an answer.
#[derive(Debug, Clone)]
pub(crate) struct FailedRequest {
    pub(crate) begun: Instant,
    pub(crate) why: String,
}

/// The long-lived connections. Dropping it closes them.
#[derive(Debug)]
pub(crate) struct LongLived {
    connections: Arc<Mutex<Vec<LongLivedConnection>>>,
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

/// The state of a long-lived connection.
#[derive(Debug, Clone)]
pub(crate) struct LongLivedConnection {
    /// The backend that answers on it.
    pub(crate) backend: String,
    pub(crate) exchanges: u64,
    /// Its local address, as in the access log.
    pub(crate) client: SocketAddr,
    /// Why it ended early.
    pub(crate) broken: Option<String>,
    /// Whether it was closed on request, with FIN from both sides.
    pub(crate) closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data are counts, which are consistent after a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Traffic ===

impl Traffic {
    /// Starts `rate` requests per second. `names` are the names of the backends, in
    /// order.
    pub(crate) fn start(frontend: SocketAddr, names: Vec<String>, rate: u32) -> Traffic {
        let tally = RequestCounts { answered: vec![0; names.len()], ..RequestCounts::default() };
        let plan = Arc::new(TrafficPlan {
            frontend,
            names,
            budget: Mutex::new(RequestBudget { begun: 0, max: u64::MAX }),
            tally: Mutex::new(tally),
        });
        let every = Duration::from_secs(1) * CLIENTS / rate;
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            let first = every * number / CLIENTS;
            clients.spawn(client(Arc::clone(&plan), first, every));
        }
        Traffic { plan, clients }
    }

    /// Continues until the number of requests is a multiple of `round`, and returns all
    /// results.
    pub(crate) async fn finish(mut self, round: u64) -> RequestCounts {
        {
            let mut budget = lock(&self.plan.budget);
            budget.max = budget.begun.max(1).next_multiple_of(round.max(1));
        }
        while self.clients.join_next().await.is_some() {}
        lock(&self.plan.tally).clone()
    }
}

async fn client(plan: Arc<TrafficPlan>, first: Duration, every: Duration) {
    let mut pace = tokio::time::interval_at((clock::now() + first).into(), every);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        if !plan.take_request() {
            return;
        }
        let begun = clock::now();
        let answer = tokio::time::timeout(REQUEST_MAX, request(plan.frontend)).await;
        plan.record(begun, answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())));
    }
}

/// Connects, sends a request, reads a name and closes with FIN. Returns the client's address
/// and the name.
pub(crate) async fn request(frontend: SocketAddr) -> io::Result<(String, String)> {
    let mut stream = TcpStream::connect(frontend).await?;
    let client = stream.local_addr()?.to_string();
    let name = exchange(&mut stream).await?;
    // The request has its answer, so an error during close is not a failure.
    let _ = close(stream).await;
    Ok((client, name))
}

async fn exchange(stream: &mut TcpStream) -> io::Result<String> {
    stream.write_all(REQUEST).await?;
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    while !answer.ends_with(b"\n") {
        if answer.len() >= ANSWER_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(String::from_utf8_lossy(&answer).trim_end().to_owned())
}

/// Sends FIN and waits for the FIN of the peer.
async fn close(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    while stream.read(&mut [0u8; ANSWER_MAX]).await? > 0 {}
    Ok(())
}

// === impl TrafficPlan ===

impl TrafficPlan {
    fn take_request(&self) -> bool {
        let mut budget = lock(&self.budget);
        let left = budget.begun < budget.max;
        budget.begun += u64::from(left);
        left
    }

    fn record(&self, begun: Instant, answer: io::Result<(String, String)>) {
        let mut tally = lock(&self.tally);
        match answer {
            Ok((client, name)) => {
                match self.names.iter().position(|known| *known == name) {
                    Some(index) => tally.answered[index] += 1,
                    None => tally.unknown += 1,
                }
                if tally.served.len() == SERVED_KEPT {
                    tally.served.pop_front();
                }
                tally.served.push_back((client, name));
            }
            Err(error) => {
                tally.failed += 1;
                if tally.failures.len() < FAILURES_KEPT {
                    tally.failures.push(FailedRequest { begun, why: error.to_string() });
                }
            }
        }
    }
}

// === impl RequestCounts ===

impl RequestCounts {
    /// Returns the number of requests.
    pub(crate) fn total(&self) -> u64 {
        self.answered.iter().sum::<u64>() + self.unknown + self.failed
    }

    /// Returns the backend that answered the client at that address.
    pub(crate) fn served_by(&self, client: &str) -> Option<&str> {
        let found = self.served.iter().rev().find(|(known, _)| known == client);
        found.map(|(_, backend)| &**backend)
    }

    /// Returns the failed requests that started at `when` or later.
    pub(crate) fn failed_since(&self, when: Instant) -> Vec<&FailedRequest> {
        self.failures.iter().filter(|failed| failed.begun >= when).collect()
    }
}

// === impl LongLived ===

impl LongLived {
    /// Opens [`LONG_LIVED`] connections and waits for an answer on each.
    pub(crate) async fn open(frontend: SocketAddr) -> io::Result<LongLived> {
        let (stop, stopped) = watch::channel(false);
        let connections = Arc::new(Mutex::new(Vec::new()));
        let mut clients = JoinSet::new();
        for index in 0..LONG_LIVED {
            let mut stream = TcpStream::connect(frontend).await?;
            let client = stream.local_addr()?;
            let backend = tokio::time::timeout(REQUEST_MAX, exchange(&mut stream)).await??;
            let first =
                LongLivedConnection { backend, exchanges: 1, client, broken: None, closed: false };
            lock(&connections).push(first);
            clients.spawn(keep_open(stream, index, Arc::clone(&connections), stopped.clone()));
        }
        Ok(LongLived { connections, stop, clients })
    }

    /// Returns the current state of the connections.
    pub(crate) fn connections(&self) -> Vec<LongLivedConnection> {
        lock(&self.connections).clone()
    }

    /// Makes one more exchange on each connection and closes it.
    pub(crate) async fn close(mut self) -> Vec<LongLivedConnection> {
        self.stop.send_replace(true);
        while self.clients.join_next().await.is_some() {}
        self.connections()
    }
}

async fn keep_open(
    mut stream: TcpStream,
    index: usize,
    connections: Arc<Mutex<Vec<LongLivedConnection>>>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let last =
            tokio::time::timeout(EXCHANGE_EVERY, stop.wait_for(|stopped| *stopped)).await.is_ok();
        let answer = tokio::time::timeout(REQUEST_MAX, exchange(&mut stream)).await;
        let known = lock(&connections)[index].backend.clone();
        let failure = match answer {
            Ok(Ok(name)) if name == known => None,
            Ok(Ok(name)) => Some(format!("answered by {name}")),
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer".to_owned()),
        };
        if failure.is_some() {
            lock(&connections)[index].broken = failure;
            return;
        }
        lock(&connections)[index].exchanges += 1;
        if last {
            let closed = tokio::time::timeout(REQUEST_MAX, close(stream)).await;
            lock(&connections)[index].closed = matches!(closed, Ok(Ok(())));
            return;
        }
    }
}
