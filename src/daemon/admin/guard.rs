//! Checks every admin request before it is routed.
//!
//! Mounted by `routes` as a layer around all endpoints. It bounds request bodies and
//! never reads their content.
//!
//! - Unix socket: the mode of the file is the access check. A forwarder can make the socket
//!   reachable for browsers, so the checks of web pages apply here, too.
//! - TCP: `Host` must be an address or `localhost`, against web pages that use DNS
//!   rebinding. The bearer token is checked last.
//! - A request of a web page (`Origin`, `Sec-Fetch-Site`) must come from the operator page.

use super::Token;
use super::page::is_page;
use super::routes::{ApiState, ErrorResponse};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::header::{
    AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN,
};
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

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Checks the head, discards the body and calls the route.
pub(super) async fn guard(
    State(api): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Response {
    let (parts, body) = request.into_parts();
    let checked = check_host(&parts.headers, parts.uri.host(), parts.version, api.entrance)
        .and_then(|()| check_origin(parts.uri.path(), &parts.headers))
        .and_then(|()| check_token(&parts.method, parts.uri.path(), &parts.headers, &api));
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
    let bad = |status, detail: &str| ErrorResponse::new(status, "host not allowed", detail);
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().unwrap_or_default(),
        (None, _) if entrance == Transport::Unix => return Ok(()),
        // Browsers always send `Host`, so the request is not from a web page.
        (None, _) if version == Version::HTTP_10 && target.is_none() => return Ok(()),
        _ => return Err(bad(StatusCode::BAD_REQUEST, "send exactly one Host header")),
    };
    let allowed = |host: &str| match entrance {
        // `curl --unix-socket` works with any name without a dot. DNS rebinding needs a dot.
        Transport::Unix => is_ip_or_localhost(host) || !host.contains('.'),
        Transport::Tcp(_) => is_ip_or_localhost(host),
    };
    if allowed(host) && target.is_none_or(allowed) {
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

/// Rejects requests of web pages other than the operator page. Only browsers send these headers
/// (Fetch standard, section 3.2; Fetch Metadata Request Headers, section 2). The files of the page
/// themselves can be opened from anywhere.
fn check_origin(path: &str, headers: &HeaderMap) -> Result<(), ErrorResponse> {
    let bad =
        |detail: &str| ErrorResponse::new(StatusCode::FORBIDDEN, "origin not allowed", detail);
    if is_page(path) {
        return Ok(());
    }
    if headers.contains_key(ORIGIN) && !is_own_origin(headers) {
        return Err(bad("only the page of this API may send requests"));
    }
    match headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes) {
        None | Some(b"same-origin" | b"none") => Ok(()),
        Some(_) => Err(bad("requests of other sites are rejected")),
    }
}

/// Whether `Origin` occurs once and names the host of the request, which is an address or
/// `localhost`.
fn is_own_origin(headers: &HeaderMap) -> bool {
    let mut origins = headers.get_all(ORIGIN).iter();
    let (Some(origin), None) = (origins.next(), origins.next()) else { return false };
    let (Ok(origin), Some(host)) = (origin.to_str(), headers.get(HOST)) else { return false };
    let Ok(host) = host.to_str() else { return false };
    let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
    is_ip_or_localhost(host) && authority.is_some_and(|own| own.eq_ignore_ascii_case(host))
}

/// Checks the token. Over TCP every POST needs it, and off loopback every request but those of
/// [`needs_no_token`].
fn check_token(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    api: &ApiState,
) -> Result<(), ErrorResponse> {
    let Transport::Tcp(listen) = api.entrance else { return Ok(()) };
    let changes = method == Method::POST;
    if !changes && (listen.ip().is_loopback() || needs_no_token(path)) {
        return Ok(());
    }
    let denied = |status, error, detail| Err(ErrorResponse::new(status, error, detail));
    let tokens = api.tokens.get();
    if tokens.full.is_none() && (changes || tokens.read.is_none()) {
        let detail = "set [admin] token_file to allow this over TCP, or use a Unix socket";
        return denied(StatusCode::FORBIDDEN, "no token configured", detail);
    }
    let Some(given) = bearer_token(headers, &AUTHORIZATION) else {
        let detail = "missing header: Authorization: Bearer TOKEN";
        return denied(StatusCode::UNAUTHORIZED, "unauthorized", detail);
    };
    let matches = |token: &Option<Token>| token.as_ref().is_some_and(|token| token.matches(given));
    // Both are compared, so that the time does not tell which one is similar.
    match (matches(&tokens.full), matches(&tokens.read)) {
        (true, _) => Ok(()),
        (false, true) if !changes => Ok(()),
        (false, true) => {
            denied(StatusCode::FORBIDDEN, "read-only token", "use the token of [admin] token_file")
        }
        (false, false) => denied(StatusCode::UNAUTHORIZED, "unauthorized", "wrong token"),
    }
}

/// Load balancers and supervisors ask for the health without a token. The page asks for it itself.
fn needs_no_token(path: &str) -> bool {
    is_page(path) || path == "/live" || path == "/ready"
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
