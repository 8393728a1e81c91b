//! Checks every admin request before it is routed.
//!
//! Mounted by `routes` as a layer around all endpoints. It bounds request bodies and
//! never reads their content.
//!
//! - Unix socket: the mode of the file is the access check.
//! - TCP: `Host` must be an address or `localhost`, against web pages that use DNS
//!   rebinding. `Origin` must be absent. The bearer token is checked last.

use super::routes::{ApiState, ErrorResponse};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, ORIGIN};
use hyper::{Method, StatusCode, Version};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// The kind of listener that accepted a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// A Unix socket. A client that can open it may make every request.
    Unix,
    /// TCP, with the listen address.
    Tcp(SocketAddr),
}

/// Limit on request bodies. No request needs a body. A body up to this length is read and
/// discarded, so that the connection stays usable.
const BODY_MAX: usize = 64 * 1024;

/// Timeout for a complete body.
const BODY_READ_MAX: Duration = Duration::from_secs(5);

/// Checks the head, discards the body and calls the route.
pub(super) async fn guard(
    State(api): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    let (parts, body) = request.into_parts();
    let checked = check_host(&parts.headers, parts.uri.host(), parts.version, api.entrance)
        .and_then(|()| check_origin(&parts.method, &parts.headers, api.entrance))
        .and_then(|()| check_token(&parts.method, &parts.headers, &api));
    if let Err(rejection) = checked {
        return rejection.into_response();
    }
    if let Err(rejection) = discard(&parts.headers, body).await {
        return rejection.into_response();
    }
    next.run(Request::from_parts(parts, Body::empty())).await
}

/// Checks `Host` (RFC 9112 section 3.2). The header must occur once. The authority of an
/// absolute request target is checked too, because it overrides the header.
fn check_host(
    headers: &HeaderMap,
    target: Option<&str>,
    version: Version,
    entrance: Transport,
) -> Result<(), ErrorResponse> {
    if entrance == Transport::Unix {
        return Ok(());
    }
    let bad = |status, detail: &str| ErrorResponse::new(status, "host not allowed", detail);
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host,
        // Browsers always send `Host`, so the request is not from a web page.
        (None, _) if version == Version::HTTP_10 && target.is_none() => return Ok(()),
        _ => return Err(bad(StatusCode::BAD_REQUEST, "send exactly one Host header")),
    };
    let known = |host: &str| is_ip_or_localhost(host);
    if host.to_str().is_ok_and(known) && target.is_none_or(known) {
        return Ok(());
    }
    Err(bad(StatusCode::FORBIDDEN, "Host must be an IP address or localhost"))
}

/// Accepts `IP`, `IP:PORT`, `[IP6]`, `[IP6]:PORT`, `localhost` and `localhost:PORT`. The
/// listen address always has one of these forms.
fn is_ip_or_localhost(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split_once(']').is_some_and(|(address, port)| {
            address.parse::<Ipv6Addr>().is_ok()
                && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
        });
    }
    let (name, port) = host.split_once(':').unwrap_or((host, "80"));
    is_port(port)
        && (name.eq_ignore_ascii_case("localhost")
            || matches!(name.parse::<IpAddr>(), Ok(IpAddr::V4(_))))
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

/// Rejects requests of web pages: only browsers send `Origin`. Web pages must not change
/// anything, and over TCP they must not read anything either.
fn check_origin(
    method: &Method,
    headers: &HeaderMap,
    entrance: Transport,
) -> Result<(), ErrorResponse> {
    let applies = method == Method::POST || entrance != Transport::Unix;
    if applies && headers.contains_key(ORIGIN) {
        let detail = "requests with an Origin header are rejected";
        return Err(ErrorResponse::new(StatusCode::FORBIDDEN, "origin not allowed", detail));
    }
    Ok(())
}

/// Checks the token. Over TCP every POST needs it, and off loopback every request.
fn check_token(method: &Method, headers: &HeaderMap, api: &ApiState) -> Result<(), ErrorResponse> {
    let Transport::Tcp(listen) = api.entrance else { return Ok(()) };
    if method != Method::POST && listen.ip().is_loopback() {
        return Ok(());
    }
    let Some(token) = api.tokens.get() else {
        let detail = "set [admin] token_file to allow this over TCP, or use a Unix socket";
        return Err(ErrorResponse::new(StatusCode::FORBIDDEN, "no token configured", detail));
    };
    match bearer_token(headers, &AUTHORIZATION) {
        Some(candidate) if token.matches(candidate) => Ok(()),
        given => {
            let detail = match given {
                Some(_) => "wrong token",
                None => "missing header: Authorization: Bearer TOKEN",
            };
            Err(ErrorResponse::new(StatusCode::UNAUTHORIZED, "unauthorized", detail))
        }
    }
}

/// Parses a bearer token (RFC 6750 section 2.1). The case of the scheme does not matter
/// (RFC 9110 section 11.1).
fn bearer_token<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h [u8]> {
    let value = headers.get(name)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

async fn discard(headers: &HeaderMap, body: Body) -> Result<(), ErrorResponse> {
    let too_large = || {
        let detail = format!("request bodies are limited to {BODY_MAX} bytes");
        ErrorResponse::new(StatusCode::PAYLOAD_TOO_LARGE, "body too large", detail)
    };
    let announced =
        headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > BODY_MAX as u64) {
        return Err(too_large());
    }
    let read = Limited::new(body, BODY_MAX).collect();
    match tokio::time::timeout(BODY_READ_MAX, read).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(ErrorResponse::new(
            StatusCode::BAD_REQUEST,
            "cannot read the body",
            error.to_string(),
        )),
        Err(_) => {
            let detail = format!("the body did not arrive within {BODY_READ_MAX:?}");
            Err(ErrorResponse::new(StatusCode::REQUEST_TIMEOUT, "body too slow", detail))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_ip_or_localhost;

    #[test]
    fn host_must_be_an_address_or_localhost() {
        for host in ["127.0.0.1", "127.0.0.1:9900", "[::1]", "[::1]:80", "localhost", "LocalHost:1"]
        {
            assert!(is_ip_or_localhost(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "::1",
            "[::1",
            "[::1]x",
            "[evil]",
            "localhost:",
            "localhost:x",
            "127.0.0.1:+1",
            "127.1",
            "user@localhost",
            "[127.0.0.1]",
        ] {
            assert!(!is_ip_or_localhost(host), "{host}");
        }
    }
}
