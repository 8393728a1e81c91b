//! Forwards requests of a browser on this host to the admin API of a running balancer.
//!
//! Called by `tidegate ui`. Browsers cannot open a Unix socket, and other users of this host must
//! not use it. So every request but those for the files of the page needs a secret, which only the
//! printed address has. It never keeps an answer, and never starts a balancer.

use crate::http::{Address, ClientArgs, ClientError, read_token};
use crate::reach::{ClientStream, Reached, connect};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections of browsers at once. A browser opens six per host.
const CONNECTIONS_MAX: usize = 24;

/// Timeout for a request head.
const HEADER_READ_MAX: Duration = Duration::from_secs(10);

/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Length of the secret in bytes, before it is written in hexadecimal digits.
const SECRET_BYTES: usize = 24;

/// A forwarder that is bound and not yet served.
#[derive(Debug)]
pub struct Forwarder {
    listener: std::net::TcpListener,
    door: Door,
}

/// What a request must have, and where it goes.
#[derive(Debug)]
struct Door {
    /// The address of the page: `Host` must name it.
    port: u16,
    /// The value of `Authorization`.
    secret: String,
    places: Vec<Address>,
    /// The token of the admin API over TCP.
    token: Option<HeaderValue>,
}

/// Status, error and detail.
type Refusal = (StatusCode, &'static str, &'static str);

type Body = BoxBody<Bytes, hyper::Error>;

// === impl Forwarder ===

impl Forwarder {
    /// Binds a port of 127.0.0.1 (0: any) and draws a secret.
    ///
    /// # Errors
    /// The port is in use, or the admin address or the token file is wrong.
    pub fn bind(args: &ClientArgs, port: u16) -> Result<Forwarder, ClientError> {
        let reached = Reached::balancer(args)?;
        let token = args.token_file.as_deref().or(reached.token_file.as_deref());
        let token = token.map(read_token).transpose()?;
        let token = token.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
        let failed = |what: &str, error: io::Error| {
            ClientError::Unreachable(format!("cannot {what}: {error}"))
        };
        let wanted = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = std::net::TcpListener::bind(wanted)
            .map_err(|error| failed(&format!("listen on {wanted}"), error))?;
        let address = listener.local_addr().map_err(|error| failed("read the address", error))?;
        let secret = secret().map_err(|error| failed("read /dev/urandom", error))?;
        let door = Door { port: address.port(), secret, places: reached.places, token };
        Ok(Forwarder { listener, door })
    }

    /// Returns the address of the page. Its secret is in the fragment, which browsers never send.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/#token={}", self.door.port, self.door.secret)
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// The runtime cannot be started.
    pub fn serve(self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            self.listener.set_nonblocking(true)?;
            let listener = TcpListener::from_std(self.listener)?;
            let (door, free) = (Arc::new(self.door), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
            loop {
                let Ok(place) = Arc::clone(&free).acquire_owned().await else { return Ok(()) };
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                };
                let door = Arc::clone(&door);
                tokio::spawn(async move {
                    connection(stream, door).await;
                    drop(place);
                });
            }
        })
    }
}

fn secret() -> io::Result<String> {
    let mut bytes = [0; SECRET_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

async fn connection(stream: TcpStream, door: Arc<Door>) {
    let service = service_fn(move |request| {
        let door = Arc::clone(&door);
        async move { Ok::<_, hyper::Error>(door.answer(request).await) }
    });
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADER_READ_MAX);
    // An error matters only to the browser.
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

// === impl Door ===

impl Door {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        if let Err((status, error, detail)) = self.check(&request) {
            return problem(status, error, detail);
        }
        match self.forward(request).await {
            Ok(response) => response,
            Err(why) => problem(StatusCode::BAD_GATEWAY, "no answer of the balancer", &why),
        }
    }

    fn check(&self, request: &Request<Incoming>) -> Result<(), Refusal> {
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        let own = [format!("127.0.0.1:{}", self.port), format!("localhost:{}", self.port)];
        if !host.is_some_and(|host| own.iter().any(|name| name.eq_ignore_ascii_case(host))) {
            let detail = "use the address that tidegate ui has printed";
            return Err((StatusCode::FORBIDDEN, "host not allowed", detail));
        }
        let path = request.uri().path();
        if path == "/" || path.starts_with("/page/") {
            return Ok(());
        }
        let given = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
        let given = given.and_then(|value| value.strip_prefix(b"Bearer "));
        if given.is_some_and(|given| same(given, self.secret.as_bytes())) {
            return Ok(());
        }
        let detail = "use the whole address that tidegate ui has printed";
        Err((StatusCode::UNAUTHORIZED, "unauthorized", detail))
    }

    /// Sends the request over a new connection. The answer is passed on as it arrives.
    async fn forward(&self, mut request: Request<Incoming>) -> Result<Response<Body>, String> {
        request.headers_mut().remove(AUTHORIZATION);
        if let Some(token) = &self.token {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        let (_, stream) = connect(&self.places).await.map_err(|error| error.to_string())?;
        let answered = match stream {
            ClientStream::Unix(stream) => send(stream, request).await,
            ClientStream::Tcp(stream) => send(stream, request).await,
        };
        answered.map(|response| response.map(BodyExt::boxed)).map_err(|error| error.to_string())
    }
}

async fn send(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Incoming>,
) -> hyper::Result<Response<Incoming>> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer. Its error is also the error of the body.
    tokio::spawn(connection);
    sender.send_request(request).await
}

/// Compares in a time that depends only on the lengths.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differing) == 0
}

/// An error in the format of the admin API.
fn problem(status: StatusCode, error: &str, detail: &str) -> Response<Body> {
    let document = tidegate_api::answers::ErrorDoc {
        error: error.to_owned(),
        detail: detail.to_owned(),
        problems: None,
    };
    let text = serde_json::to_string(&document).unwrap_or_default();
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
