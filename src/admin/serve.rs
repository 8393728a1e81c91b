//! Serving the admin API: accept, bound, end.
//!
//! Runs on the control thread's runtime until `app` stops it. A slow or silent
//! client costs one of [`CONNECTIONS_MAX`] slots for a bounded time and holds
//! up nobody else's request.

use super::bind::Listening;
use super::guard::Entrance;
use super::routes::{Api, router};
use super::{AdminListener, Readiness, Request, TokenStore};
use axum::Router;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections served at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 32;

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

/// A request's head may be this long; beyond it the answer is 431.
const HEAD_BYTES_MAX: usize = 64 * 1024;

enum Acceptor {
    Unix(UnixListener),
    Tcp(TcpListener),
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Serves until `stop` completes, then lets answers under way go out and removes
/// the socket file. Needs a tokio runtime with I/O and time.
///
/// # Errors
/// The listener cannot be registered with the runtime.
pub async fn serve(
    listener: AdminListener,
    tokens: Arc<TokenStore>,
    requests: mpsc::Sender<Request>,
    readiness: Readiness,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let AdminListener { socket, file: _file, .. } = listener;
    let (acceptor, entrance) = match socket {
        Listening::Unix(unix) => (Acceptor::Unix(UnixListener::from_std(unix)?), Entrance::Unix),
        Listening::Tcp(tcp) => {
            let entrance = Entrance::Tcp(tcp.local_addr()?);
            (Acceptor::Tcp(TcpListener::from_std(tcp)?), entrance)
        }
    };
    let routes = router(Arc::new(Api { entrance, tokens, requests, readiness }));
    let (closing, _) = watch::channel(false);
    let mut connections = JoinSet::new();
    accept_until(stop, &acceptor, &routes, &closing, &mut connections).await;
    drop(acceptor);
    closing.send_replace(true);
    // Whatever is left after that is cut off.
    let _ = timeout(LINGER_MAX, async { while connections.join_next().await.is_some() {} }).await;
    Ok(())
}

async fn accept_until(
    stop: impl Future<Output = ()>,
    acceptor: &Acceptor,
    routes: &Router,
    closing: &watch::Sender<bool>,
    connections: &mut JoinSet<()>,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut stop = pin!(stop);
    loop {
        while connections.try_join_next().is_some() {}
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot.expect("the semaphore is never closed"), acceptor.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            () = &mut stop => return,
            next = next => next,
        };
        let (routes, closing) = (routes.clone(), closing.subscribe());
        match accepted {
            Ok(Stream::Unix(stream)) => {
                connections.spawn(connection(stream, routes, closing, slot))
            }
            Ok(Stream::Tcp(stream)) => connections.spawn(connection(stream, routes, closing, slot)),
            Err(error) => {
                tracing::warn!(%error, "the admin API cannot accept a connection");
                tokio::select! {
                    () = &mut stop => return,
                    () = sleep(ACCEPT_PAUSE) => continue,
                }
            }
        };
    }
}

/// One client, from accept to close; holds a slot for as long.
pub(super) async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    routes: Router,
    mut closing: watch::Receiver<bool>,
    _slot: OwnedSemaphorePermit,
) {
    let asked = Arc::new(AtomicBool::new(false));
    let (routes, noted) = (TowerToHyperService::new(routes), Arc::clone(&asked));
    let service = service_fn(move |request| {
        noted.store(true, Ordering::Relaxed);
        routes.call(request)
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        // Clients such as `nc -N` end their side after the request.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = pin!(served);
    tokio::select! {
        // What went wrong is the client's to know.
        _ = served.as_mut() => return,
        _ = closing.wait_for(|closing| *closing) => {}
        () = sleep(CONNECTION_LIFE_MAX) => {}
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

// === impl Acceptor ===

impl Acceptor {
    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Acceptor::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
            Acceptor::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // A peer that is gone already is noticed on the first read.
                let _ = stream.set_nodelay(true);
                Ok(Stream::Tcp(stream))
            }
        }
    }
}
