//! Requests to Consul agents, with the token of the registry.
//!
//! The source and the registration of services use it. It reads the token file for each
//! request, so a replaced token needs no restart. It never logs a token.

use crate::client::{HttpClient, HttpEndpoint, HttpFailure, HttpRequest, HttpResponse};
use crate::resolver::Resolver;
use crate::secret::SecretFile;
use bytes::Bytes;
use hyper::Method;
use hyper::header::{HeaderName, HeaderValue};
use std::time::Duration;
use tidegate_core::model::RegistryConfig;

/// Header with the token. Agents of all versions read it.
const TOKEN: HeaderName = HeaderName::from_static("x-consul-token");

/// A client of one registry. Clones share the connections.
#[derive(Debug, Clone)]
pub struct ConsulClient {
    http: HttpClient,
    token: Option<SecretFile>,
}

// === impl ConsulClient ===

impl ConsulClient {
    /// A client without connections.
    pub fn new(registry: &RegistryConfig, resolver: Resolver) -> ConsulClient {
        let endpoint = HttpEndpoint { auth: None, ..HttpEndpoint::of(registry, resolver) };
        let token = registry.token_file.as_deref().map(SecretFile::new);
        ConsulClient { http: HttpClient::new(endpoint), token }
    }

    /// Sends a GET whose answer may take `wait` longer than the registry's timeout.
    ///
    /// # Errors
    /// No answer, or one that is not a success. The next request then uses another server.
    pub async fn get(&self, target: String, wait: Duration) -> Result<HttpResponse, HttpFailure> {
        let request = HttpRequest { wait, ..HttpRequest::get(target) };
        self.send(request).await
    }

    /// Sends a PUT.
    ///
    /// # Errors
    /// As [`get`](ConsulClient::get).
    pub async fn put(&self, target: String, body: Bytes) -> Result<HttpResponse, HttpFailure> {
        let request = HttpRequest { method: Method::PUT, body, ..HttpRequest::get(target) };
        self.send(request).await
    }

    /// Whether requests have no token.
    pub fn is_anonymous(&self) -> bool {
        self.token.is_none()
    }

    /// Resolves host names.
    pub fn resolver(&self) -> Resolver {
        self.http.endpoint().resolver.clone()
    }

    async fn send(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpFailure> {
        if let Some(file) = &self.token {
            request.headers.push((TOKEN, token(file)?));
        }
        let response = Box::pin(self.http.send(&request)).await?;
        match response.failure() {
            Some(failure) => {
                // Another agent can have a leader.
                if response.status >= 500 {
                    self.http.fail_over();
                }
                Err(failure)
            }
            None => Ok(response),
        }
    }
}

fn token(file: &SecretFile) -> Result<HeaderValue, HttpFailure> {
    let token = file.line().map_err(HttpFailure::local)?;
    let mut value = HeaderValue::from_str(&token).map_err(|_| {
        let path = file.path().display();
        HttpFailure::local(format_args!("the token in {path} cannot be sent in a header"))
    })?;
    value.set_sensitive(true);
    Ok(value)
}
