//! The HTTP source: a URL with a list of members.
//!
//! `thread` runs one [`run`] per question. It polls with `If-None-Match`, so an unchanged
//! list costs a few bytes. An answer that is not a readable list changes nothing.

use crate::backoff::Pause;
use crate::client::{HttpClient, HttpEndpoint, HttpFailure, HttpRequest, HttpResponse, InlinePem};
use crate::listing::decode_list;
use crate::parse::off_runtime;
use crate::resolver::Resolver;
use crate::secret::SecretFile;
use crate::tell::Teller;
use hyper::Uri;
use hyper::header::{ACCEPT, ETAG, HeaderValue, IF_NONE_MATCH};
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tidegate_core::discovery::{Announced, Told, Unreadable, WholeSet};
use tidegate_core::model::{ServerAddr, TlsClientConfig};

/// Timeout of a connect and of an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What is asked; see the keys of `kind = "http"`.
#[derive(Debug, Clone)]
pub struct ListUrl {
    /// `http://` or `https://`, without user and password.
    pub url: String,
    /// Time between two requests, plus or minus 10 %.
    pub interval: Duration,
    /// Trusted certificates; `None`: those of the system.
    pub ca_file: Option<PathBuf>,
    /// A bearer token.
    pub token_file: Option<PathBuf>,
}

/// The last list that was told.
#[derive(Debug, Default)]
struct LastList {
    etag: Option<HeaderValue>,
    digest: Option<u64>,
}

/// Asks for the list forever. Tells each change, and a sign of life for each answer without
/// one.
pub async fn run(question: ListUrl, resolver: Resolver, teller: Teller) -> Infallible {
    let (client, target) = match endpoint(&question, resolver) {
        Ok((endpoint, target)) => (HttpClient::new(endpoint), target),
        Err(failure) => {
            teller.tell(failure.told());
            std::future::pending().await
        }
    };
    let (mut pause, mut last) = (Pause::new(), LastList::default());
    loop {
        pause.begin();
        match ask(&client, &target, &mut last).await {
            Ok(told) => {
                teller.tell(told);
                pause.interval(question.interval).await;
            }
            Err(failure) => {
                teller.tell(failure.told());
                pause.failed().await;
            }
        }
    }
}

/// Sends one request. A failure keeps `last`.
async fn ask(client: &HttpClient, target: &str, last: &mut LastList) -> Result<Told, HttpFailure> {
    let mut request = HttpRequest::get(target);
    request.headers.push((ACCEPT, HeaderValue::from_static("application/json")));
    if let Some(etag) = &last.etag {
        request.headers.push((IF_NONE_MATCH, etag.clone()));
    }
    let answer = client.send(&request).await?;
    if let Some(failure) = answer.failure() {
        return Err(failure);
    }
    match answer.status {
        200 => read(answer, last).await,
        304 if last.etag.is_some() => Ok(Told::Alive),
        status => Err(HttpFailure::protocol(format_args!("status {status} has no list"))),
    }
}

async fn read(answer: HttpResponse, last: &mut LastList) -> Result<Told, HttpFailure> {
    let etag = answer.headers.get(ETAG).cloned();
    let digest = xxhash_rust::xxh3::xxh3_64(&answer.body);
    if last.digest == Some(digest) {
        last.etag = etag;
        return Ok(Told::Alive);
    }
    let body = answer.body;
    let length = body.len();
    let members = off_runtime(length, move || decode_list(&body)).await?;
    let members =
        members.map_err(|problem| HttpFailure::protocol(format_args!("list: {problem}")))?;
    let version = match &etag {
        Some(etag) => format!("etag {}", String::from_utf8_lossy(etag.as_bytes())),
        None => format!("digest {digest:016x}"),
    };
    *last = LastList { etag, digest: Some(digest) };
    Ok(whole(members, version))
}

/// A list is trusted: its server has no other state.
pub(crate) fn whole(members: Vec<Announced>, version: String) -> Told {
    Told::Whole(WholeSet {
        members: members.into(),
        version,
        trusted: true,
        unreadable: Unreadable::default(),
        keys: [].into(),
    })
}

/// Splits a URL into the endpoint and the target of requests.
fn endpoint(question: &ListUrl, resolver: Resolver) -> Result<(HttpEndpoint, String), HttpFailure> {
    let ListUrl { url, ca_file, token_file, .. } = question;
    let wrong = |cause: &str| HttpFailure::local(format_args!("URL {url:?}: {cause}"));
    let parsed: Uri = url.parse().map_err(|_| wrong("is not a URL"))?;
    let (tls, port) = match parsed.scheme_str() {
        Some("http") => (None, 80),
        Some("https") => {
            let ca_file = ca_file.clone();
            (Some(TlsClientConfig { ca_file, ..TlsClientConfig::default() }), 443)
        }
        _ => return Err(wrong("does not begin with http:// or https://")),
    };
    if parsed.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(wrong("contains a user; use token_file"));
    }
    let host = parsed.host().ok_or_else(|| wrong("has no host"))?;
    let port = parsed.port_u16().unwrap_or(port);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let server = match bare.parse::<IpAddr>() {
        Ok(ip) => ServerAddr::Ip(SocketAddr::new(ip, port)),
        Err(_) => ServerAddr::Name { host: host.into(), port },
    };
    let auth = token_file.as_deref().map(|path: &Path| SecretFile::new(path));
    let target = parsed.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let (servers, timeout) = (vec![server], TIMEOUT);
    let inline_pem = InlinePem::default();
    Ok((HttpEndpoint { servers, timeout, tls, inline_pem, auth, resolver }, target))
}

#[cfg(test)]
mod tests;
