//! Opens connections to the servers of an endpoint.
//!
//! [`HttpClient`](super::HttpClient) calls [`dial`] if no idle connection is left. A dial
//! tries each server within one timeout. Nothing here sends a request.

use super::failure::{HttpFailure, failure_of_io, with_causes};
use super::{HttpEndpoint, tls};
use crate::resolver::ResolveFailure;
use crate::tasks::{self, TaskKind};
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::ServerAddr;
use tidegate_net::clock;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// Longest head of an answer, in bytes.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Most header lines of an answer.
const HEADERS_MAX: usize = 256;

/// Time between two tests of a silent path.
const PATH_TEST: Duration = Duration::from_secs(3);

/// A connection ends after this time in which the peer acknowledges nothing.
const PATH_SILENCE_MAX: Duration = Duration::from_secs(12);

/// Most addresses of a server's name that are tried.
const ADDRESSES_MAX: usize = 16;

/// Sends requests over one connection.
pub(super) type RequestSender = SendRequest<Full<Bytes>>;

/// Tries the servers in this order. Each gets an equal share of the time that is left, so a
/// silent server leaves time for the next.
///
/// # Errors
/// The failure of the last server.
pub(super) async fn dial(
    endpoint: &HttpEndpoint,
    order: &[usize],
) -> Result<(RequestSender, usize), HttpFailure> {
    let start = clock::now();
    let mut failure = HttpFailure::local("no server is configured");
    for (tried, &index) in order.iter().enumerate() {
        let server = &endpoint.servers[index];
        let left = endpoint.timeout.saturating_sub(clock::now().duration_since(start));
        let share = left / (order.len() - tried) as u32;
        failure = match timeout(share, Box::pin(connect(endpoint, server))).await {
            Ok(Ok(sender)) => return Ok((sender, index)),
            Ok(Err(failure)) => failure.at(server),
            Err(_) => no_connection(share).at(server),
        };
    }
    Err(failure)
}

fn no_connection(after: Duration) -> HttpFailure {
    HttpFailure::new(SourceFailure::Timeout, format_args!("no connection after {after:.1?}"))
}

async fn connect(
    endpoint: &HttpEndpoint,
    server: &ServerAddr,
) -> Result<RequestSender, HttpFailure> {
    http(open_stream(endpoint, server).await?).await
}

/// A connection, with TLS if the endpoint uses TLS.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for S {}

/// Connects to one server, with the handshake of TLS. The caller bounds the time.
///
/// # Errors
/// No connection, or the handshake failed.
pub(crate) async fn open_stream(
    endpoint: &HttpEndpoint,
    server: &ServerAddr,
) -> Result<Box<dyn ByteStream>, HttpFailure> {
    match server {
        ServerAddr::Unix(path) => layer(endpoint, server, unix(path).await?).await,
        ServerAddr::Ip(address) => layer(endpoint, server, tcp(&[*address]).await?).await,
        ServerAddr::Name { host, port } => {
            let found = endpoint.resolver.host(host).await.map_err(no_address)?;
            let addresses: Vec<SocketAddr> = found
                .into_iter()
                .take(ADDRESSES_MAX)
                .map(|address| SocketAddr::new(address, *port))
                .collect();
            layer(endpoint, server, tcp(&addresses).await?).await
        }
    }
}

/// A name without addresses is a server out of reach, not a question without an answer.
fn no_address(failure: ResolveFailure) -> HttpFailure {
    let why = match failure.why {
        SourceFailure::NotFound => SourceFailure::Connect,
        why => why,
    };
    HttpFailure::new(why, failure)
}

async fn unix(path: &Path) -> Result<UnixStream, HttpFailure> {
    UnixStream::connect(path).await.map_err(|error| {
        let why = failure_of_io(&error, SourceFailure::Connect);
        HttpFailure::new(why, format_args!("cannot connect: {error}"))
    })
}

/// Connects to the first address that accepts.
async fn tcp(addresses: &[SocketAddr]) -> Result<TcpStream, HttpFailure> {
    let mut failure = HttpFailure::new(SourceFailure::Connect, "the name has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                set_options(&stream).map_err(HttpFailure::local)?;
                return Ok(stream);
            }
            Err(error) => {
                let why = failure_of_io(&error, SourceFailure::Connect);
                let text = format_args!("cannot connect to {address}: {error}");
                failure = HttpFailure::new(why, text);
            }
        }
    }
    Err(failure)
}

/// Makes the kernel test the path while a request waits for minutes. A server that restarted
/// without its connections answers the next test with RST (tcp(7)).
fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, PATH_TEST)?;
    sockopt::set_tcp_keepintvl(stream, PATH_TEST)?;
    sockopt::set_tcp_user_timeout(stream, PATH_SILENCE_MAX.as_millis() as u32)?;
    Ok(())
}

/// Does the handshake of TLS over a new connection.
async fn layer<S: ByteStream + 'static>(
    endpoint: &HttpEndpoint,
    server: &ServerAddr,
    stream: S,
) -> Result<Box<dyn ByteStream>, HttpFailure> {
    match &endpoint.tls {
        None => Ok(Box::new(stream)),
        Some(tls) => Ok(Box::new(tls::handshake(tls, &endpoint.inline_pem, server, stream).await?)),
    }
}

async fn http(stream: Box<dyn ByteStream>) -> Result<RequestSender, HttpFailure> {
    let handshake = http1::Builder::new()
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .handshake(TokioIo::new(stream));
    let (sender, connection) = handshake
        .await
        .map_err(|error| HttpFailure::new(SourceFailure::Connect, with_causes(&error)))?;
    // The task ends with the connection. The request reports errors.
    tokio::spawn(tasks::caught(TaskKind::Connection, connection));
    Ok(sender)
}
