//! Serving the admin API: accept, bound, end.
//!
//! Runs on the control thread's runtime until `daemon` stops it. A slow or silent
//! client costs one of [`CONNECTIONS_MAX`] seats until somebody newer wants it,
//! and holds up nobody else's request.

use super::bind::BoundAdminSocket;
use super::guard::Transport;
use super::routes::{ApiState, router};
use super::{AdminListener, AdminRequest, ReadyState, TokenStore};
use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::{LocalErrorPlace, WorkerCounters};
use tidegate_dataplane::local_errors;
use tidegate_net::clock;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections served at once: a few people, a few scrapers, and room for all of
/// them to come twice. Beyond it the one that has asked nothing for longest makes
/// room, which is counted; while all are asking, newer ones wait in the kernel's
/// queue.
const CONNECTIONS_MAX: usize = 32;

/// How long a connection may ask nothing before it has to make room: whoever
/// connects to ask does so within a round trip.
const IDLE_MIN: Duration = Duration::from_millis(100);

/// A request's head must be there this soon, on a new or an idle connection.
const HEADER_READ_MAX: Duration = Duration::from_secs(5);

/// A connection is closed after this however busy, so that clients who read
/// slowly for ever cannot hold all slots.
const CONNECTION_LIFE_MAX: Duration = Duration::from_secs(60);

/// Time for a last answer to go out when a connection or the API ends.
const LINGER_MAX: Duration = Duration::from_secs(1);

/// How often a connection at its end is looked at until it has asked for
/// something.
const FIRST_REQUEST_STEP: Duration = Duration::from_millis(5);

/// Pause after a failed accept (no descriptors, say), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Failed accepts are told of at most so often.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// A request's head may be this long; beyond twice of it the answer is 431 for
/// certain, as it is measured after each read, of this length at most.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Lines in it; browsers and scrapers send about twenty.
const HEADERS_MAX: usize = 64;

enum Acceptor {
    Unix(UnixListener),
    Tcp(TcpListener),
}

enum AdminStream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// The Unix socket over which a request came; goes with it.
#[derive(Debug, Clone)]
pub(super) struct AskedOver(pub(super) Arc<OwnedFd>);

/// Connections closed to make room for newer ones; clones share it.
#[derive(Debug, Clone, Default)]
pub struct DroppedConnections(Arc<AtomicU64>);

/// Everybody served; at most [`CONNECTIONS_MAX`].
struct ConnectionTable {
    taken: VecDeque<Arc<ConnectionEntry>>,
    /// Somebody has left.
    left: Arc<Notify>,
    crowding: DroppedConnections,
}

struct ConnectionEntry {
    /// A request is being answered.
    asking: AtomicBool,
    /// Since when it is not.
    idle: Mutex<Instant>,
    /// It is to make room.
    leave: Notify,
    gone: AtomicBool,
    left: Arc<Notify>,
}

/// A connection's hold on its seat.
struct ConnectionGuard(Arc<ConnectionEntry>);

/// Serves until `stop` completes, then lets answers under way go out and removes
/// the socket file. Needs a tokio runtime with I/O and time.
///
/// # Errors
/// The listener cannot be registered with the runtime.
pub async fn serve(
    listener: AdminListener,
    tokens: Arc<TokenStore>,
    requests: mpsc::Sender<AdminRequest>,
    readiness: ReadyState,
    counters: Arc<WorkerCounters>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let AdminListener { socket, file: _file, crowding, .. } = listener;
    let (acceptor, entrance) = match socket {
        BoundAdminSocket::Unix(unix) => {
            (Acceptor::Unix(UnixListener::from_std(unix)?), Transport::Unix)
        }
        BoundAdminSocket::Tcp(tcp) => {
            let entrance = Transport::Tcp(tcp.local_addr()?);
            (Acceptor::Tcp(TcpListener::from_std(tcp)?), entrance)
        }
    };
    let routes = router(Arc::new(ApiState { entrance, tokens, requests, readiness }));
    let (closing, _) = watch::channel(false);
    let mut connections = JoinSet::new();
    let seats = ConnectionTable { taken: VecDeque::new(), left: Arc::default(), crowding };
    let accepting = Accepting { acceptor: &acceptor, counters: &counters };
    accept_until(stop, accepting, &routes, &closing, &mut connections, seats).await;
    drop(acceptor);
    closing.send_replace(true);
    // Whatever is left after that is cut off.
    let _ = timeout(LINGER_MAX, async { while connections.join_next().await.is_some() {} }).await;
    Ok(())
}

/// Where connections come from, and where trouble with that is counted.
struct Accepting<'a> {
    acceptor: &'a Acceptor,
    counters: &'a WorkerCounters,
}

async fn accept_until(
    stop: impl Future<Output = ()>,
    Accepting { acceptor, counters }: Accepting<'_>,
    routes: &Router,
    closing: &watch::Sender<bool>,
    connections: &mut JoinSet<()>,
    mut seats: ConnectionTable,
) {
    let mut stop = pin!(stop);
    let mut told = None;
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = &mut stop => return,
            accepted = acceptor.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                counters.local_trouble(local_errors::local_kind(&error), LocalErrorPlace::Admin);
                let now = clock::now();
                if told.is_none_or(|told| now >= told + TELL_AGAIN) {
                    told = Some(now);
                    tracing::warn!(%error, "the admin API cannot accept a connection");
                }
                tokio::select! {
                    () = &mut stop => return,
                    () = sleep(ACCEPT_PAUSE) => continue,
                }
            }
        };
        // Only once there is somebody to make it for, who then is served even if
        // the end comes meanwhile.
        let stopped = tokio::select! {
            () = &mut stop => true,
            () = seats.close_idlest() => false,
        };
        let (routes, closing, seat) = (routes.clone(), closing.subscribe(), seats.take());
        match stream {
            AdminStream::Unix(stream) => {
                let asked_over = stream.as_fd().try_clone_to_owned().ok();
                let asked_over = asked_over.map(|socket| AskedOver(Arc::new(socket)));
                connections.spawn(connection(stream, asked_over, routes, closing, seat))
            }
            AdminStream::Tcp(stream) => {
                connections.spawn(connection(stream, None, routes, closing, seat))
            }
        };
        if stopped {
            return;
        }
    }
}

/// One client, from accept to close; holds a seat for as long.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    asked_over: Option<AskedOver>,
    routes: Router,
    mut closing: watch::Receiver<bool>,
    seat: ConnectionGuard,
) {
    let asked = Arc::new(AtomicBool::new(false));
    let (routes, noted) = (TowerToHyperService::new(routes), Arc::clone(&asked));
    let of_service = Arc::clone(&seat.0);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        noted.store(true, Ordering::Relaxed);
        if let Some(asked_over) = &asked_over {
            request.extensions_mut().insert(asked_over.clone());
        }
        let (seat, answer) = (Arc::clone(&of_service), routes.call(request));
        async move {
            seat.asking.store(true, Ordering::Relaxed);
            let answer = answer.await;
            seat.is_idle();
            answer
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        // Clients such as `nc -N` end their side after the request.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = pin!(served);
    let crowded_out = tokio::select! {
        // What went wrong is the client's to know.
        _ = served.as_mut() => return,
        _ = closing.wait_for(|closing| *closing) => false,
        () = sleep(CONNECTION_LIFE_MAX) => false,
        () = seat.0.leave.notified() => true,
    };
    if crowded_out && !asked.load(Ordering::Relaxed) {
        return;
    }
    // Whoever was accepted is answered: its first request may be on its way.
    // `serve` sets an end to this.
    while !asked.load(Ordering::Relaxed) {
        tokio::select! {
            _ = served.as_mut() => return,
            () = sleep(FIRST_REQUEST_STEP) => {}
        }
    }
    served.as_mut().graceful_shutdown();
    let _ = timeout(LINGER_MAX, served).await;
}

/// The only client there is, for whoever plays one without a listener.
#[cfg(any(test, fuzzing))]
pub(super) async fn only_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    routes: Router,
    closing: watch::Receiver<bool>,
) {
    let (taken, crowding) = (VecDeque::new(), DroppedConnections::default());
    let mut seats = ConnectionTable { taken, left: Arc::default(), crowding };
    connection(stream, None, routes, closing, seats.take()).await;
}

// === impl DroppedConnections ===

impl DroppedConnections {
    /// How many, since the start.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

// === impl ConnectionTable ===

impl ConnectionTable {
    /// Waits until a seat is free, which the longest idle connection sees to.
    /// Nothing is lost when this is given up half-way.
    async fn close_idlest(&mut self) {
        loop {
            self.taken.retain(|seat| !seat.gone.load(Ordering::Relaxed));
            if self.taken.len() < CONNECTIONS_MAX {
                return;
            }
            let now = clock::now();
            let idle = |seat: &ConnectionEntry| now.saturating_duration_since(seat.idle_since());
            let resting = self.taken.iter().enumerate().filter(|(_, seat)| !seat.is_asking());
            let longest = resting.map(|(at, seat)| (idle(seat), at)).max();
            match longest {
                Some((time, at)) if time >= IDLE_MIN => {
                    if let Some(seat) = self.taken.remove(at) {
                        seat.leave.notify_one();
                        self.crowding.0.fetch_add(1, Ordering::Relaxed);
                    }
                }
                // Nobody yet.
                _ => {
                    let _ = timeout(IDLE_MIN, self.left.notified()).await;
                }
            }
        }
    }

    fn take(&mut self) -> ConnectionGuard {
        let seat = Arc::new(ConnectionEntry {
            asking: AtomicBool::new(false),
            idle: Mutex::new(clock::now()),
            leave: Notify::new(),
            gone: AtomicBool::new(false),
            left: Arc::clone(&self.left),
        });
        self.taken.push_back(Arc::clone(&seat));
        ConnectionGuard(seat)
    }
}

// === impl ConnectionEntry ===

impl ConnectionEntry {
    fn is_asking(&self) -> bool {
        self.asking.load(Ordering::Relaxed)
    }

    fn idle_since(&self) -> Instant {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its answer is ready.
    fn is_idle(&self) {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = clock::now();
        self.asking.store(false, Ordering::Relaxed);
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.gone.store(true, Ordering::Relaxed);
        self.0.left.notify_one();
    }
}

// === impl Acceptor ===

impl Acceptor {
    async fn accept(&self) -> io::Result<AdminStream> {
        match self {
            Acceptor::Unix(listener) => Ok(AdminStream::Unix(listener.accept().await?.0)),
            Acceptor::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // A peer that is gone already is noticed on the first read.
                let _ = stream.set_nodelay(true);
                Ok(AdminStream::Tcp(stream))
            }
        }
    }
}
