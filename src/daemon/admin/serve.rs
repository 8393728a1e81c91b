//! Serving the admin API: accept, bound, end.
//!
//! Runs on the control thread's runtime until `daemon` stops it. A slow or silent
//! client costs one of [`CONNECTIONS_MAX`] connections until a newer client needs it,
//! and delays no request of another client.

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
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// Connections served at once: a few people, a few scrapers, and the same number again.
/// Beyond it the connection that has asked nothing for longest is closed, which is
/// counted; while all of them are asking, newer ones wait in the listen queue.
const CONNECTIONS_MAX: usize = 32;

/// How long a connection may ask nothing before it can be closed for a newer one: a
/// client that connects to ask does so within a round trip.
const IDLE_MIN: Duration = Duration::from_millis(100);

/// A request's head must be complete after this time, on a new or an idle connection.
const HEADER_READ_MAX: Duration = Duration::from_secs(5);

/// A connection is closed after this time however busy, so that clients that never stop
/// reading slowly cannot hold all of them.
const CONNECTION_LIFE_MAX: Duration = Duration::from_secs(60);

/// Time for a last answer to go out when a connection or the API ends.
const LINGER_MAX: Duration = Duration::from_secs(1);

/// Pause after a failed accept (no descriptors, say), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Between two log lines about failed accepts.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

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

/// Connections closed for newer ones; clones share it.
#[derive(Debug, Clone, Default)]
pub struct DroppedConnections(Arc<AtomicU64>);

/// The API while it is served.
struct AdminServer {
    acceptor: Acceptor,
    routes: Router,
    counters: Arc<WorkerCounters>,
    dropped: DroppedConnections,
    closing: watch::Sender<bool>,
    tasks: JoinSet<()>,
    /// At most [`CONNECTIONS_MAX`]; its task holds the other reference to each.
    open: Vec<Arc<OpenConnection>>,
}

/// One connection, as far as the others need to know it.
struct OpenConnection {
    /// Since when no request is being answered; `None` while one is.
    idle_since: Mutex<Option<Instant>>,
    /// It has to go.
    close: Notify,
}

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
    let AdminListener { socket, file: _file, crowding: dropped, .. } = listener;
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
    let (tasks, open) = (JoinSet::new(), Vec::new());
    let mut server = AdminServer { acceptor, routes, counters, dropped, closing, tasks, open };
    server.accept_until(stop).await;
    let AdminServer { acceptor, closing, mut tasks, .. } = server;
    drop(acceptor);
    closing.send_replace(true);
    // What is left after that is cut off.
    let _ = timeout(LINGER_MAX, async { while tasks.join_next().await.is_some() {} }).await;
    Ok(())
}

/// One connection, from accept to close.
async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    asked_over: Option<AskedOver>,
    routes: Router,
    mut closing: watch::Receiver<bool>,
    own: Arc<OpenConnection>,
) {
    let (asked, mut first_request) = watch::channel(false);
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(|mut request: hyper::Request<Incoming>| {
        asked.send_replace(true);
        own.set_idle_since(None);
        if let Some(asked_over) = &asked_over {
            request.extensions_mut().insert(asked_over.clone());
        }
        let answer = routes.call(request);
        async {
            let answer = answer.await;
            own.set_idle_since(Some(clock::now()));
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
    let silent = tokio::select! {
        // An error is the client's to notice.
        _ = served.as_mut() => return,
        _ = closing.wait_for(|closing| *closing) => false,
        () = sleep(CONNECTION_LIFE_MAX) => false,
        () = own.close.notified() => !*first_request.borrow(),
    };
    if silent {
        return;
    }
    // An accepted connection is answered: its first request may be on its way. `serve`
    // bounds this.
    tokio::select! {
        _ = served.as_mut() => return,
        _ = first_request.wait_for(|asked| *asked) => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = timeout(LINGER_MAX, served).await;
}

/// Serves a stream that came from no listener.
#[cfg(any(test, fuzzing))]
pub(super) async fn only_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    routes: Router,
    closing: watch::Receiver<bool>,
) {
    connection(stream, None, routes, closing, Arc::new(OpenConnection::new())).await;
}

// === impl DroppedConnections ===

impl DroppedConnections {
    /// How many, since the start.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
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
            // After the accept, so that no connection is closed for none. What was
            // accepted is served even if the end comes first.
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
        self.counters.local_trouble(local_errors::local_kind(error), LocalErrorPlace::Admin);
        let now = clock::now();
        if logged.is_none_or(|logged| now >= logged + LOG_INTERVAL) {
            *logged = Some(now);
            tracing::warn!(%error, "cannot accept an admin connection; retrying");
        }
    }

    /// Waits until there are fewer than [`CONNECTIONS_MAX`]; closes the longest idle one
    /// for it. Nothing is lost when this is dropped half-way.
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
                // None yet.
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
                self.tasks.spawn(connection(stream, asked_over, routes, closing, own))
            }
            AdminStream::Tcp(stream) => {
                self.tasks.spawn(connection(stream, None, routes, closing, own))
            }
        };
    }
}

// === impl OpenConnection ===

impl OpenConnection {
    fn new() -> OpenConnection {
        OpenConnection { idle_since: Mutex::new(Some(clock::now())), close: Notify::new() }
    }

    fn idle_since(&self) -> Option<Instant> {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_idle_since(&self, since: Option<Instant>) {
        *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = since;
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
