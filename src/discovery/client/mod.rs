//! A small HTTP/1.1 client for registries and lists.
//!
//! Each registry has one [`HttpClient`], which all questions to it share. The client keeps
//! idle connections, tries the servers in random order and leaves one that failed. Every
//! wait and every answer has a bound. It follows no redirects, accepts no compression and
//! gives no meaning to a body.

mod answer;
mod dial;
mod failure;
mod tls;

pub use answer::{ANSWER_BYTES_MAX, HttpResponse, HttpStream, status_failure};
pub use dial::HEAD_BYTES_MAX;
pub(crate) use dial::{ByteStream, open_stream};
pub use failure::{DETAIL_BYTES_MAX, HttpFailure, failure_of_io, short_text};
pub use tls::{InlinePem, trusted_certificates};

use crate::resolver::Resolver;
use crate::secret::SecretFile;
use answer::{check_head, failure_of_hyper, whole_body};
use bytes::Bytes;
use dial::RequestSender;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, HOST, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::{RegistryConfig, ServerAddr, TlsClientConfig};
use tidegate_net::clock;
use tokio::time::timeout;

/// Most idle connections of a client.
pub const IDLE_CONNECTIONS_MAX: usize = 32;

/// An idle connection is not used after this time. Servers close idle connections after 60 s
/// or later.
const IDLE_TIME_MAX: Duration = Duration::from_secs(30);

/// Which servers are asked, and how.
#[derive(Debug, Clone)]
pub struct HttpEndpoint {
    /// At least one.
    pub servers: Vec<ServerAddr>,
    /// Timeout of a connect with all handshakes, and of an answer beyond the request's own
    /// wait.
    pub timeout: Duration,
    /// `None`: plain TCP.
    pub tls: Option<TlsClientConfig>,
    /// Texts that are used instead of the files of `tls`.
    pub inline_pem: InlinePem,
    /// A token for `Authorization: Bearer`, read again for each request. A request that has
    /// this header is not changed.
    pub auth: Option<SecretFile>,
    /// Resolves the servers' names.
    pub resolver: Resolver,
}

/// One request.
#[derive(Clone)]
pub struct HttpRequest {
    /// The client repeats a request that a closed idle connection lost, except POST.
    pub method: Method,
    /// Path and query, percent-encoded.
    pub target: String,
    /// In addition to `host`, `user-agent` and `authorization`.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Empty for GET.
    pub body: Bytes,
    /// How long the server may delay the answer; added to the timeout of [`HttpClient::send`].
    pub wait: Duration,
}

/// A client of one registry. Clones share the connections.
#[derive(Debug, Clone)]
pub struct HttpClient(Arc<ClientShared>);

#[derive(Debug)]
struct ClientShared {
    endpoint: HttpEndpoint,
    state: Mutex<ClientState>,
}

#[derive(Debug)]
struct ClientState {
    /// Positions of the servers in random order. The first is asked.
    order: Vec<usize>,
    /// Connections to the first server, the newest last.
    idle: Vec<(RequestSender, Instant)>,
}

/// A connection in use.
struct Connected {
    sender: RequestSender,
    server: usize,
    reused: bool,
}

// === impl HttpEndpoint ===

impl HttpEndpoint {
    /// The servers, the timeout, TLS and the token of a registry.
    pub fn of(registry: &RegistryConfig, resolver: Resolver) -> HttpEndpoint {
        HttpEndpoint {
            servers: registry.servers.clone(),
            timeout: registry.timeout,
            tls: registry.tls.clone(),
            inline_pem: InlinePem::default(),
            auth: registry.token_file.as_deref().map(SecretFile::new),
            resolver,
        }
    }
}

// === impl HttpRequest ===

impl HttpRequest {
    /// A GET without headers, body and wait.
    pub fn get(target: impl Into<String>) -> HttpRequest {
        HttpRequest {
            method: Method::GET,
            target: target.into(),
            headers: Vec::new(),
            body: Bytes::new(),
            wait: Duration::ZERO,
        }
    }
}

impl fmt::Debug for HttpRequest {
    /// Shows neither headers nor the body, which can contain secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({} bytes)", self.method, self.target, self.body.len())
    }
}

// === impl HttpClient ===

impl HttpClient {
    /// A client without connections.
    pub fn new(endpoint: HttpEndpoint) -> HttpClient {
        let mut order: Vec<usize> = (0..endpoint.servers.len()).collect();
        fastrand::shuffle(&mut order);
        let state = Mutex::new(ClientState { order, idle: Vec::new() });
        HttpClient(Arc::new(ClientShared { endpoint, state }))
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &HttpEndpoint {
        &self.0.endpoint
    }

    /// Sends one request and reads the whole answer. The deadline is `endpoint.timeout` plus
    /// `request.wait`. Statuses of failures are answers: see [`HttpResponse::failure`].
    ///
    /// # Errors
    /// No whole answer arrived. The next request then uses another server.
    pub async fn send(&self, request: &HttpRequest) -> Result<HttpResponse, HttpFailure> {
        let limit = self.0.endpoint.timeout + request.wait;
        let asked = AtomicUsize::new(usize::MAX);
        let exchange = async {
            let (answer, used) = self.head(request, &asked).await?;
            let (head, body) = answer.into_parts();
            let body =
                whole_body(body).await.map_err(|failure| self.failed(used.server, failure))?;
            self.keep(used);
            Ok(HttpResponse { status: head.status.as_u16(), headers: head.headers, body })
        };
        self.within(limit, &asked, Box::pin(exchange)).await
    }

    /// Sends one request whose answer is a stream. The head must arrive within
    /// `endpoint.timeout`.
    ///
    /// # Errors
    /// As [`send`](HttpClient::send).
    pub async fn open(&self, request: &HttpRequest) -> Result<HttpStream, HttpFailure> {
        let asked = AtomicUsize::new(usize::MAX);
        let opening = async {
            let (answer, used) = self.head(request, &asked).await?;
            let server = self.0.endpoint.servers[used.server].to_string();
            Ok(HttpStream::new(answer, server, used.sender))
        };
        self.within(self.0.endpoint.timeout, &asked, Box::pin(opening)).await
    }

    /// The next request uses another server and a new connection.
    pub fn fail_over(&self) {
        self.0.lock().leave_first();
    }

    /// Runs an exchange up to a limit. `asked` is the server that has the request.
    async fn within<T>(
        &self,
        limit: Duration,
        asked: &AtomicUsize,
        exchange: impl Future<Output = Result<T, HttpFailure>>,
    ) -> Result<T, HttpFailure> {
        if let Ok(result) = timeout(limit, exchange).await {
            return result;
        }
        let text = format_args!("no answer after {limit:.1?}");
        let failure = HttpFailure::new(SourceFailure::Timeout, text);
        let server = asked.load(Ordering::Relaxed);
        Err(match server < self.0.endpoint.servers.len() {
            true => self.failed(server, failure),
            false => failure,
        })
    }

    /// Sends the request and waits for the head. A request that an idle connection lost is
    /// sent again over a new one, unless the server can have acted on it.
    async fn head(
        &self,
        request: &HttpRequest,
        asked: &AtomicUsize,
    ) -> Result<(Response<hyper::body::Incoming>, Connected), HttpFailure> {
        let mut may_reuse = true;
        loop {
            let mut used = self.connection(may_reuse).await?;
            asked.store(used.server, Ordering::Relaxed);
            let message = self.message(request, used.server)?;
            match used.sender.send_request(message).await {
                Ok(answer) => {
                    check_head(&answer).map_err(|failure| self.failed(used.server, failure))?;
                    return Ok((answer, used));
                }
                Err(error) => {
                    let unsent = error.is_canceled();
                    let repeatable = unsent || request.method != Method::POST;
                    let lost = unsent || error.is_incomplete_message() || error.is_closed();
                    if !(used.reused && repeatable && lost) {
                        return Err(self.failed(used.server, failure_of_hyper(&error)));
                    }
                    may_reuse = false;
                }
            }
        }
    }

    /// Takes an idle connection or opens one.
    async fn connection(&self, may_reuse: bool) -> Result<Connected, HttpFailure> {
        let mut idle = if may_reuse { self.0.lock().take_idle() } else { None };
        while let Some((mut sender, server)) = idle {
            if sender.ready().await.is_ok() {
                return Ok(Connected { sender, server, reused: true });
            }
            idle = self.0.lock().take_idle();
        }
        let order = self.0.lock().order.clone();
        let dialled = dial::dial(&self.0.endpoint, &order).await;
        let (sender, server) = match dialled {
            Ok(dialled) => dialled,
            Err(failure) => {
                self.fail_over();
                return Err(failure);
            }
        };
        self.0.lock().prefer(server);
        Ok(Connected { sender, server, reused: false })
    }

    fn message(
        &self,
        request: &HttpRequest,
        server: usize,
    ) -> Result<Request<Full<Bytes>>, HttpFailure> {
        let invalid = |error| HttpFailure::local(format_args!("cannot form the request: {error}"));
        let host = match &self.0.endpoint.servers[server] {
            ServerAddr::Unix(_) => "localhost".to_owned(),
            address => address.to_string(),
        };
        let mut message = Request::builder()
            .method(&request.method)
            .uri(&request.target)
            .header(HOST, host)
            .header(USER_AGENT, concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(request.body.clone()))
            .map_err(invalid)?;
        for (name, value) in &request.headers {
            message.headers_mut().append(name, value.clone());
        }
        if let Some(auth) = &self.0.endpoint.auth
            && !message.headers().contains_key(AUTHORIZATION)
        {
            message.headers_mut().insert(AUTHORIZATION, bearer(auth)?);
        }
        Ok(message)
    }

    /// Leaves a server that failed.
    fn failed(&self, server: usize, failure: HttpFailure) -> HttpFailure {
        let mut state = self.0.lock();
        if state.order.first() == Some(&server) {
            state.leave_first();
        }
        drop(state);
        failure.at(&self.0.endpoint.servers[server])
    }

    /// Keeps a connection whose answer was read to its end.
    fn keep(&self, used: Connected) {
        let mut state = self.0.lock();
        let wanted = state.order.first() == Some(&used.server) && !used.sender.is_closed();
        if wanted && state.idle.len() < IDLE_CONNECTIONS_MAX {
            state.idle.push((used.sender, clock::now()));
        }
    }
}

/// Returns the value of `Authorization` with the token in this file.
fn bearer(file: &SecretFile) -> Result<HeaderValue, HttpFailure> {
    let token = file.line().map_err(HttpFailure::local)?;
    let text = zeroize::Zeroizing::new(format!("Bearer {}", token.as_str()));
    let mut value = HeaderValue::from_str(&text).map_err(|_| {
        let path = file.path().display();
        HttpFailure::local(format_args!("the token in {path} cannot be sent in a header"))
    })?;
    value.set_sensitive(true);
    Ok(value)
}

// === impl ClientShared, ClientState ===

impl ClientShared {
    fn lock(&self) -> MutexGuard<'_, ClientState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientState {
    fn leave_first(&mut self) {
        self.idle.clear();
        if !self.order.is_empty() {
            self.order.rotate_left(1);
        }
    }

    /// Puts a server that accepted a connection first.
    fn prefer(&mut self, server: usize) {
        while self.order.first().is_some_and(|first| *first != server) {
            self.leave_first();
        }
    }

    fn take_idle(&mut self) -> Option<(RequestSender, usize)> {
        let now = clock::now();
        self.idle.retain(|(sender, since)| {
            !sender.is_closed() && now.duration_since(*since) < IDLE_TIME_MAX
        });
        let (sender, _) = self.idle.pop()?;
        Some((sender, *self.order.first()?))
    }
}

#[cfg(test)]
mod tests;
