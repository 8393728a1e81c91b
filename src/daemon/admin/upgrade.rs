//! `POST /v1/upgrade`: checks the request and formats the answer.
//!
//! Called by `routes`. The query can name another program and another configuration,
//! but only over the Unix socket. A TCP client with the token can operate the balancer,
//! but must not run programs as its user.

use super::guard::Transport;
use super::routes::{ApiState, ErrorResponse, JSON, answer, text};
use super::serve::{AskedBy, AskedOver};
use super::{AdminRequest, UpgradeError};
use axum::extract::State;
use axum::response::Response;
use hyper::http::Extensions;
use hyper::{StatusCode, Uri};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Timeout for the answer: longer than the longest `upgrade_timeout` plus the step after
/// it, and shorter than the maximum age of an admin connection.
const UPGRADE_MAX: Duration = Duration::from_secs(58);

#[derive(Debug, Default, PartialEq)]
struct UpgradeQuery {
    binary: Option<PathBuf>,
    config: Option<PathBuf>,
}

pub(super) async fn upgrade(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    extensions: Extensions,
) -> Result<Response, ErrorResponse> {
    let UpgradeQuery { binary, config } = parse_query(uri.query().unwrap_or_default())?;
    if (binary.is_some() || config.is_some()) && api.entrance != Transport::Unix {
        let detail = "binary and config can be set only over the Unix socket";
        return Err(ErrorResponse::new(StatusCode::FORBIDDEN, "not allowed over TCP", detail));
    }
    let asked_over = extensions.get().map(|AskedOver(socket)| Arc::clone(socket));
    let who = AskedBy::of(&extensions);
    let ask = |reply| AdminRequest::Upgrade { binary, config, asked_over, who, reply };
    match api.ask_within(UPGRADE_MAX, ask).await? {
        Ok(upgraded) => Ok(answer(JSON, text(&upgraded))),
        Err(UpgradeError::Refused(why)) => {
            Err(ErrorResponse::new(StatusCode::CONFLICT, "upgrade rejected", why))
        }
        Err(UpgradeError::Failed(why)) => {
            let error = "upgrade failed; the old process keeps serving";
            Err(ErrorResponse::new(StatusCode::UNPROCESSABLE_ENTITY, error, why))
        }
    }
}

fn parse_query(query: &str) -> Result<UpgradeQuery, ErrorResponse> {
    let bad = |detail: String| ErrorResponse::new(StatusCode::BAD_REQUEST, "invalid query", detail);
    let mut parsed = UpgradeQuery::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let path = decoded(value).filter(|path| !path.as_os_str().is_empty());
        let path = path.ok_or_else(|| bad(format!("{key} is not a path: {value:?}")))?;
        match key {
            "binary" => parsed.binary = Some(path),
            "config" => parsed.config = Some(path),
            _ => return Err(bad(format!("unknown parameter {key:?}; expected binary or config"))),
        }
    }
    Ok(parsed)
}

/// Percent-decodes a path. A path can contain any byte except NUL.
fn decoded(text: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                (digit(rest.next())? * 16 + digit(rest.next())?) as u8
            }
            byte => byte,
        };
        if byte == 0 {
            return None;
        }
        bytes.push(byte);
    }
    Some(OsString::from_vec(bytes).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_percent_decoded() {
        let got = parse_query("binary=%2Fopt%2Fa%20b&config=/etc/%C3%A4").unwrap();
        assert_eq!(got.binary, Some("/opt/a b".into()));
        assert_eq!(got.config, Some("/etc/\u{e4}".into()));
        assert_eq!(parse_query("").unwrap(), UpgradeQuery::default());
    }

    #[test]
    fn invalid_query_is_rejected() {
        for query in ["binary", "binary=", "binary=%2", "binary=%zz", "config=%00", "program=/x"] {
            assert!(parse_query(query).is_err(), "{query}");
        }
    }
}
