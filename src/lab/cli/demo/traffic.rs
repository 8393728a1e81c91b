//! The demo's clients: short requests at a steady rate, and connections that
//! stay open the whole time.
//!
//! Used by the demo alone. They are real connections through the frontend, and
//! every answer and every failure is counted. They never hurry: more requests
//! than [`RATE`] a second would use up a machine's local ports.

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

/// Short requests a second. A closed connection keeps its port for a minute
/// (RFC 9293, TIME-WAIT), and Linux has 28,232 of them unless told otherwise.
pub(crate) const RATE: u32 = 400;

/// The same while the demo only waits for its end.
pub(crate) const RATE_SLOW: u32 = 20;

/// Clients that share the rate.
const CLIENTS: u32 = 8;

/// A request that takes longer has failed.
const REQUEST_MAX: Duration = Duration::from_secs(2);

/// Failures kept with their time; more are only counted.
const FAILURES_KEPT: usize = 1000;

/// Connections that stay open.
pub(crate) const LONG_LIVED: usize = 10;

/// Time between two exchanges on one of those.
const EXCHANGE_EVERY: Duration = Duration::from_millis(200);

const QUESTION: &[u8] = b"who\n";
const ANSWER_MAX: usize = 64;

/// Short requests under way.
#[derive(Debug)]
pub(crate) struct Traffic {
    plan: Arc<TrafficPlan>,
    clients: JoinSet<()>,
}

#[derive(Debug)]
struct TrafficPlan {
    frontend: SocketAddr,
    names: Vec<String>,
    tickets: Mutex<RequestBudget>,
    tally: Mutex<RequestCounts>,
}

#[derive(Debug)]
struct RequestBudget {
    begun: u64,
    /// No more than these.
    max: u64,
}

/// What came of the requests of one stretch.
#[derive(Debug, Default, Clone)]
pub(crate) struct RequestCounts {
    /// By backend, in order.
    pub(crate) answered: Vec<u64>,
    /// Answered with a name that is none of ours.
    pub(crate) strangers: u64,
    pub(crate) failed: u64,
    /// The first of them.
    pub(crate) failures: Vec<FailedRequest>,
}

/// A request without an answer.
#[derive(Debug, Clone)]
pub(crate) struct FailedRequest {
    pub(crate) begun: Instant,
    pub(crate) why: String,
}

/// The connections that stay open. Dropping it closes them.
#[derive(Debug)]
pub(crate) struct LongLived {
    standing: Arc<Mutex<Vec<LongLivedConnection>>>,
    enough: watch::Sender<bool>,
    clients: JoinSet<()>,
}

/// One of those.
#[derive(Debug, Clone)]
pub(crate) struct LongLivedConnection {
    /// Who answers on it.
    pub(crate) backend: String,
    pub(crate) exchanges: u64,
    /// Its own side of the connection, as the access log names it.
    pub(crate) client: SocketAddr,
    /// Why it ended before it was told to.
    pub(crate) broken: Option<String>,
    /// It was told to end, and ended in order.
    pub(crate) closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain counts, whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Traffic ===

impl Traffic {
    /// Starts `rate` requests a second; `names` are the backends', in order.
    pub(crate) fn start(frontend: SocketAddr, names: Vec<String>, rate: u32) -> Traffic {
        let tally = RequestCounts { answered: vec![0; names.len()], ..RequestCounts::default() };
        let plan = Arc::new(TrafficPlan {
            frontend,
            names,
            tickets: Mutex::new(RequestBudget { begun: 0, max: u64::MAX }),
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

    /// Goes on until the number of requests is a multiple of `round`, and gives
    /// what came of all of them.
    pub(crate) async fn finish(mut self, round: u64) -> RequestCounts {
        {
            let mut tickets = lock(&self.plan.tickets);
            tickets.max = tickets.begun.max(1).next_multiple_of(round.max(1));
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
        if !plan.take_ticket() {
            return;
        }
        let begun = clock::now();
        let answer = tokio::time::timeout(REQUEST_MAX, request(plan.frontend)).await;
        plan.note(begun, answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())));
    }
}

/// Connects, asks, hears a name, and closes in order.
async fn request(frontend: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(frontend).await?;
    let name = exchange(&mut stream).await?;
    // The answer is what counts; how it closes is the balancer's account.
    let _ = close(stream).await;
    Ok(name)
}

async fn exchange(stream: &mut TcpStream) -> io::Result<String> {
    stream.write_all(QUESTION).await?;
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

/// FIN, and the other side's.
async fn close(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    while stream.read(&mut [0u8; ANSWER_MAX]).await? > 0 {}
    Ok(())
}

// === impl TrafficPlan ===

impl TrafficPlan {
    fn take_ticket(&self) -> bool {
        let mut tickets = lock(&self.tickets);
        let left = tickets.begun < tickets.max;
        tickets.begun += u64::from(left);
        left
    }

    fn note(&self, begun: Instant, answer: io::Result<String>) {
        let mut tally = lock(&self.tally);
        match answer {
            Ok(name) => match self.names.iter().position(|known| *known == name) {
                Some(index) => tally.answered[index] += 1,
                None => tally.strangers += 1,
            },
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
    /// Requests made.
    pub(crate) fn total(&self) -> u64 {
        self.answered.iter().sum::<u64>() + self.strangers + self.failed
    }

    /// Failed requests that began at `when` or later.
    pub(crate) fn failed_since(&self, when: Instant) -> Vec<&FailedRequest> {
        self.failures.iter().filter(|failed| failed.begun >= when).collect()
    }
}

// === impl LongLived ===

impl LongLived {
    /// Opens [`LONG_LIVED`] connections; returns once all of them were answered.
    pub(crate) async fn open(frontend: SocketAddr) -> io::Result<LongLived> {
        let (enough, told) = watch::channel(false);
        let standing = Arc::new(Mutex::new(Vec::new()));
        let mut clients = JoinSet::new();
        for index in 0..LONG_LIVED {
            let mut stream = TcpStream::connect(frontend).await?;
            let client = stream.local_addr()?;
            let backend = tokio::time::timeout(REQUEST_MAX, exchange(&mut stream)).await??;
            let first =
                LongLivedConnection { backend, exchanges: 1, client, broken: None, closed: false };
            lock(&standing).push(first);
            clients.spawn(stay(stream, index, Arc::clone(&standing), told.clone()));
        }
        Ok(LongLived { standing, enough, clients })
    }

    /// How they stand now.
    pub(crate) fn standing(&self) -> Vec<LongLivedConnection> {
        lock(&self.standing).clone()
    }

    /// Has each of them make one more exchange and close.
    pub(crate) async fn close(mut self) -> Vec<LongLivedConnection> {
        self.enough.send_replace(true);
        while self.clients.join_next().await.is_some() {}
        self.standing()
    }
}

async fn stay(
    mut stream: TcpStream,
    index: usize,
    standing: Arc<Mutex<Vec<LongLivedConnection>>>,
    mut enough: watch::Receiver<bool>,
) {
    loop {
        let last =
            tokio::time::timeout(EXCHANGE_EVERY, enough.wait_for(|told| *told)).await.is_ok();
        let answer = tokio::time::timeout(REQUEST_MAX, exchange(&mut stream)).await;
        let known = lock(&standing)[index].backend.clone();
        let trouble = match answer {
            Ok(Ok(name)) if name == known => None,
            Ok(Ok(name)) => Some(format!("answered by {name}")),
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer".to_owned()),
        };
        if trouble.is_some() {
            lock(&standing)[index].broken = trouble;
            return;
        }
        lock(&standing)[index].exchanges += 1;
        if last {
            let closed = tokio::time::timeout(REQUEST_MAX, close(stream)).await;
            lock(&standing)[index].closed = matches!(closed, Ok(Ok(())));
            return;
        }
    }
}
