//! Serves the admin API: accepts connections, bounds their number, ends them.
//!
//! Started by `daemon` on the runtime of the control thread. A slow or silent client
//! occupies one of [`CONNECTIONS_MAX`] connections until a newer client needs it. It
//! never delays a request of another client.

use super::bind::BoundAdminSocket;
use super::events;
use super::guard::Transport;
use super::routes::{ApiState, router};
use super::stream::StreamHub;
use super::{AdminListener, AdminRequest, Observables, ReadyState, TokenStore};
use axum::Router;
use hyper::body::Incoming;
use hyper::http::Extensions;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tidegate_core::metrics::counters::{LocalErrorPlace, WorkerCounters};
use tidegate_dataplane::local_errors;
use tidegate_net::clock;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Cap on open connections: eight browsers, which open six each, and a few scrapers. At the cap,
/// the connection that has been idle for longest is closed and counted. If no connection
/// is idle, new connections wait in the listen queue.
const CONNECTIONS_MAX: usize = 64;

/// Idle time after which a connection can be closed for a newer one. A client sends its
/// request within one round trip after it connects.
const IDLE_MIN: Duration = Duration::from_millis(100);

/// Timeout for a complete request head, on a new or an idle connection.
const HEADER_READ_MAX: Duration = Duration::from_secs(5);

/// Maximum age of a connection, idle or busy. It keeps clients that read slowly without
/// end from occupying all connections.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);

/// Timeout for sending the last answer when a connection or the API ends.
const LINGER_MAX: Duration = Duration::from_secs(1);

/// Pause after a failed accept, for example without free descriptors. It prevents a busy
/// loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Minimum time between two log lines about failed accepts.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Limit on the length of a request head. The length is checked after each read of at
/// most this size, so every head longer than twice the limit is answered with 431.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Limit on header lines in a request; browsers and scrapers send about 20.
const HEADERS_MAX: usize = 64;

enum Acceptor {
    Unix(UnixListener),
    Tcp(TcpListener),
}

enum AdminStream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// The Unix connection of a request, attached to the request.
#[derive(Debug, Clone)]
pub(super) struct AskedOver(pub(super) Arc<OwnedFd>);

/// Counter of connections closed to accept newer ones. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct DroppedConnections(Arc<AtomicU64>);

/// The client of a connection, as events name it. Attached to each request.
#[derive(Debug, Clone)]
pub(super) struct AskedBy(Arc<str>);

/// What the requests of a connection carry.
#[derive(Debug, Clone)]
struct ConnectionPeer {
    asked_over: Option<AskedOver>,
    asked_by: AskedBy,
}

/// The running API.
struct AdminServer {
    acceptor: Acceptor,
    routes: Router,
    counters: Arc<WorkerCounters>,
    dropped: DroppedConnections,
    closing: watch::Sender<bool>,
    tasks: JoinSet<()>,
    /// At most [`CONNECTIONS_MAX`]. The task of each connection holds the other reference.
    open: Vec<Arc<OpenConnection>>,
}

/// The state of one connection that the accept loop needs.
#[derive(Debug)]
struct OpenConnection {
    /// Start of the idle time; `None` while a request is being answered.
    idle_since: Mutex<Option<Instant>>,
    /// The answer is a stream, which can be older than [`CONNECTION_AGE_MAX`].
    streams: AtomicBool,
    stream_ended: Notify,
    /// Asks the connection's task to close it.
    close: Notify,
}

/// The connection of a stream. Attached to each request.
#[derive(Debug, Clone)]
pub(super) struct StreamingConnection(Weak<OpenConnection>);

/// Serves until `stop` completes, then finishes the answers in progress and removes the
/// socket file. Requires a tokio runtime with I/O and time.
///
/// # Errors
/// The listener cannot be registered with the runtime.
pub async fn serve(
    listener: AdminListener,
    tokens: Arc<TokenStore>,
    requests: mpsc::Sender<AdminRequest>,
    readiness: ReadyState,
    counters: Arc<WorkerCounters>,
    observables: Observables,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let AdminListener { socket, file: _file, dropped, .. } = listener;
    let (acceptor, entrance) = match socket {
        BoundAdminSocket::Unix(unix) => {
            (Acceptor::Unix(UnixListener::from_std(unix)?), Transport::Unix)
        }
        BoundAdminSocket::Tcp(tcp) => {
            let entrance = Transport::Tcp(tcp.local_addr()?);
            (Acceptor::Tcp(TcpListener::from_std(tcp)?), entrance)
        }
    };
    let (closing, closed) = watch::channel(false);
    let waiting = Semaphore::new(events::WAITING_MAX);
    let Observables { events, streams } = observables;
    let hub = StreamHub::new(streams);
    let state =
        ApiState { entrance, tokens, requests, readiness, events, waiting, hub, closing: closed };
    let routes = router(Arc::new(state));
    let (tasks, open) = (JoinSet::new(), Vec::new());
    let mut server = AdminServer { acceptor, routes, counters, dropped, closing, tasks, open };
    server.accept_until(stop).await;
    let AdminServer { acceptor, closing, mut tasks, .. } = server;
    drop(acceptor);
    closing.send_replace(true);
    // Connections that are still open after the timeout are dropped with the task set.
    let _ = timeout(LINGER_MAX, async { while tasks.join_next().await.is_some() {} }).await;
    Ok(())
}

/// Serves one connection until it closes.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: ConnectionPeer,
    routes: Router,
    mut closing: watch::Receiver<bool>,
    own: Arc<OpenConnection>,
) {
    let (asked, mut first_request) = watch::channel(false);
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(|mut request: hyper::Request<Incoming>| {
        asked.send_replace(true);
        own.set_idle_since(None);
        let extensions = request.extensions_mut();
        extensions.insert(peer.asked_by.clone());
        extensions.insert(StreamingConnection(Arc::downgrade(&own)));
        if let Some(asked_over) = &peer.asked_over {
            extensions.insert(asked_over.clone());
        }
        let answer = routes.call(request);
        async {
            let answer = answer.await;
            if !own.streams.load(Ordering::Relaxed) {
                own.set_idle_since(Some(clock::now()));
            }
            answer
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        // Clients such as `nc -N` close their side after the request.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = pin!(served);
    let silent = tokio::select! {
        // An error matters only to the client.
        _ = served.as_mut() => return,
        _ = closing.wait_for(|closing| *closing) => false,
        () = own.too_old() => false,
        () = own.close.notified() => !*first_request.borrow(),
    };
    if silent {
        return;
    }
    // An accepted connection gets an answer: its first request can be in transit. `serve`
    // bounds the wait.
    tokio::select! {
        _ = served.as_mut() => return,
        _ = first_request.wait_for(|asked| *asked) => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = timeout(LINGER_MAX, served).await;
}

/// Serves a stream without a listener.
#[cfg(any(test, fuzzing))]
pub(super) async fn only_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    routes: Router,
    closing: watch::Receiver<bool>,
) {
    let peer = ConnectionPeer { asked_over: None, asked_by: AskedBy("test".into()) };
    connection(stream, peer, routes, closing, Arc::new(OpenConnection::new())).await;
}

// === impl DroppedConnections ===

impl DroppedConnections {
    /// Returns the count since the start.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

// === impl AskedBy ===

impl AskedBy {
    /// Returns the client of a request.
    pub(super) fn of(extensions: &Extensions) -> String {
        extensions.get().map_or_else(String::new, |AskedBy(who)| who.to_string())
    }

    fn of_unix(stream: &UnixStream) -> AskedBy {
        let who = match stream.peer_cred() {
            Ok(peer) => match peer.pid() {
                Some(pid) => format!("uid {}, pid {pid}", peer.uid()),
                None => format!("uid {}", peer.uid()),
            },
            Err(_) => "a client of the Unix socket".to_owned(),
        };
        AskedBy(who.into())
    }

    /// Over TCP every change needs the token.
    fn of_tcp(stream: &TcpStream) -> AskedBy {
        let who = match stream.peer_addr() {
            Ok(address) => format!("token, from {address}"),
            Err(_) => "token".to_owned(),
        };
        AskedBy(who.into())
    }
}

// === impl AdminServer ===

impl AdminServer {
    async fn accept_until(&mut self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut logged = None;
        loop {
            let accepted = tokio::select! {
                () = &mut stop => return,
                accepted = self.acceptor.accept() => accepted,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    self.accept_failed(&error, &mut logged);
                    tokio::select! {
                        () = &mut stop => return,
                        () = sleep(ACCEPT_PAUSE) => continue,
                    }
                }
            };
            // A connection is closed only after an accept, so that none is closed without
            // need. The accepted connection is served even if `stop` completes first.
            let stopped = tokio::select! {
                () = &mut stop => true,
                () = self.close_idlest() => false,
            };
            self.start(stream);
            if stopped {
                return;
            }
        }
    }

    fn accept_failed(&self, error: &io::Error, logged: &mut Option<Instant>) {
        self.counters.count_local_error(local_errors::local_kind(error), LocalErrorPlace::Admin);
        let now = clock::now();
        if logged.is_none_or(|logged| now >= logged + LOG_INTERVAL) {
            *logged = Some(now);
            tracing::warn!(%error, "cannot accept an admin connection; retrying");
        }
    }

    /// Waits until fewer than [`CONNECTIONS_MAX`] connections are open. Closes the one
    /// that has been idle for longest if necessary. Cancel safe.
    async fn close_idlest(&mut self) {
        loop {
            while self.tasks.try_join_next().is_some() {}
            self.open.retain(|one| Arc::strong_count(one) > 1);
            if self.open.len() < CONNECTIONS_MAX {
                return;
            }
            let idle = self.open.iter().enumerate();
            let idle = idle.filter_map(|(at, one)| Some((one.idle_since()?, at)));
            match idle.min() {
                Some((since, at)) if clock::now() >= since + IDLE_MIN => {
                    self.open.swap_remove(at).close.notify_one();
                    self.dropped.0.fetch_add(1, Ordering::Relaxed);
                }
                // No connection has been idle long enough.
                _ => {
                    let _ = timeout(IDLE_MIN, self.tasks.join_next()).await;
                }
            }
        }
    }

    fn start(&mut self, stream: AdminStream) {
        let own = Arc::new(OpenConnection::new());
        self.open.push(Arc::clone(&own));
        let (routes, closing) = (self.routes.clone(), self.closing.subscribe());
        match stream {
            AdminStream::Unix(stream) => {
                let asked_over = stream.as_fd().try_clone_to_owned().ok();
                let asked_over = asked_over.map(|socket| AskedOver(Arc::new(socket)));
                let peer = ConnectionPeer { asked_over, asked_by: AskedBy::of_unix(&stream) };
                self.tasks.spawn(connection(stream, peer, routes, closing, own))
            }
            AdminStream::Tcp(stream) => {
                let peer = ConnectionPeer { asked_over: None, asked_by: AskedBy::of_tcp(&stream) };
                self.tasks.spawn(connection(stream, peer, routes, closing, own))
            }
        };
    }
}

// === impl OpenConnection ===

impl OpenConnection {
    fn new() -> OpenConnection {
        OpenConnection {
            idle_since: Mutex::new(Some(clock::now())),
            streams: AtomicBool::new(false),
            stream_ended: Notify::new(),
            close: Notify::new(),
        }
    }

    /// Waits for the maximum age, and for the end of a stream.
    async fn too_old(&self) {
        sleep(CONNECTION_AGE_MAX).await;
        while self.streams.load(Ordering::Relaxed) {
            self.stream_ended.notified().await;
        }
    }

    fn idle_since(&self) -> Option<Instant> {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_idle_since(&self, since: Option<Instant>) {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}

// === impl StreamingConnection ===

impl StreamingConnection {
    /// The answer of the connection is a stream from now on.
    pub(super) fn begin(&self) {
        if let Some(connection) = self.0.upgrade() {
            connection.streams.store(true, Ordering::Relaxed);
        }
    }

    /// The stream has ended.
    pub(super) fn end(&self) {
        if let Some(connection) = self.0.upgrade() {
            connection.streams.store(false, Ordering::Relaxed);
            connection.set_idle_since(Some(clock::now()));
            connection.stream_ended.notify_one();
        }
    }

    /// Closes the connection, also if its client reads nothing.
    pub(super) fn close(&self) {
        if let Some(connection) = self.0.upgrade() {
            connection.close.notify_one();
        }
    }
}

// === impl Acceptor ===

impl Acceptor {
    async fn accept(&self) -> io::Result<AdminStream> {
        match self {
            Acceptor::Unix(listener) => Ok(AdminStream::Unix(listener.accept().await?.0)),
            Acceptor::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // An error here means a closed connection. The first read reports it.
                let _ = stream.set_nodelay(true);
                Ok(AdminStream::Tcp(stream))
            }
        }
    }
}
