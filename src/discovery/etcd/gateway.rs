//! Sends requests to the JSON gateway of etcd.
//!
//! The follower and the registration call it. It logs in with user and password, renews a
//! token that the server no longer accepts, and classifies refusals. It repeats nothing
//! else and keeps no state about the store.

use super::codec::{
    AuthenticateAnswer, AuthenticateRequest, EtcdHeader, GatewayRefusal, LISTED_MAX,
    RANGES_PER_TRANSACTION, RangeAnswer, RangeRequest, ReadStep, ReadTransaction,
    ReadTransactionAnswer, WatchCreate, WatchRequest,
};
use super::watch::WatchStream;
use crate::client::{HttpClient, HttpEndpoint, HttpFailure, HttpRequest};
use crate::parse::off_runtime;
use crate::resolver::Resolver;
use crate::secret::SecretFile;
use bytes::Bytes;
use hyper::Method;
use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_core::discovery::SourceFailure;
use tidegate_core::model::RegistryConfig;
use tokio::time::timeout;

/// Deadline of a ping. A member without a leader does not answer it.
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Ends a watch if its member has no leader.
const HAS_LEADER: HeaderName = HeaderName::from_static("grpc-metadata-hasleader");

/// Requests to one cluster. Clones share connections and the token.
#[derive(Debug, Clone)]
pub struct EtcdGateway(Arc<GatewayShared>);

#[derive(Debug)]
struct GatewayShared {
    client: HttpClient,
    login: Option<EtcdLogin>,
    /// The last token; `None`: none yet, or the server has no users.
    token: Mutex<Option<HeaderValue>>,
}

#[derive(Debug)]
struct EtcdLogin {
    user: String,
    password: SecretFile,
}

/// A request that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayFailure {
    /// What happened.
    pub http: HttpFailure,
    /// The server answered and refused this request; others can succeed.
    pub refused: bool,
}

// === impl EtcdGateway ===

impl EtcdGateway {
    /// A gateway without connections and without a token.
    pub fn new(registry: &RegistryConfig, resolver: Resolver) -> EtcdGateway {
        let endpoint = HttpEndpoint { auth: None, ..HttpEndpoint::of(registry, resolver) };
        let login = match (&registry.user, &registry.password_file) {
            (Some(user), Some(file)) => {
                Some(EtcdLogin { user: user.clone(), password: SecretFile::new(file) })
            }
            _ => None,
        };
        let client = HttpClient::new(endpoint);
        EtcdGateway(Arc::new(GatewayShared { client, login, token: Mutex::new(None) }))
    }

    /// Reads all entries below a prefix, at most one more than a set can have. The read is
    /// linearizable.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub async fn list(&self, prefix: &str) -> Result<RangeAnswer, GatewayFailure> {
        let limit = LISTED_MAX as i64;
        let request = RangeRequest { limit, ..RangeRequest::below(prefix) };
        let answer: RangeAnswer = self.call("/v3/kv/range", &request).await?;
        answer.header.check()?;
        Ok(answer)
    }

    /// Reads several ranges, each transaction at one revision.
    ///
    /// # Errors
    /// No answer, or a refusal of any range.
    pub async fn read_all(
        &self,
        ranges: Vec<RangeRequest>,
    ) -> Result<(EtcdHeader, Vec<RangeAnswer>), GatewayFailure> {
        let mut answers = Vec::with_capacity(ranges.len());
        let mut header = EtcdHeader::default();
        for part in ranges.chunks(RANGES_PER_TRANSACTION) {
            let success = part.iter().cloned().map(|request_range| ReadStep { request_range });
            let request = ReadTransaction { success: success.collect() };
            let answer: ReadTransactionAnswer = self.call("/v3/kv/txn", &request).await?;
            answer.header.check()?;
            if answer.responses.len() != part.len() {
                return Err(protocol("the transaction has another number of answers"));
            }
            // The oldest revision holds for all of them.
            if answers.is_empty() || answer.header.revision < header.revision {
                header = answer.header;
            }
            answers.extend(answer.responses.into_iter().map(|step| step.response_range));
        }
        Ok((header, answers))
    }

    /// Asks whether the member has a leader, with a short deadline.
    ///
    /// # Errors
    /// The member has none, or it does not answer. The next request goes to another member.
    pub async fn ping(&self, prefix: &str) -> Result<(), GatewayFailure> {
        let key = RangeRequest::below(prefix).key;
        let request = RangeRequest { key, count_only: true, ..RangeRequest::default() };
        let limit = PING_TIMEOUT.min(self.0.client.endpoint().timeout);
        let Ok(answer) =
            timeout(limit, self.call::<_, RangeAnswer>("/v3/kv/range", &request)).await
        else {
            self.fail_over();
            let text = format_args!("no answer to a linearizable read after {limit:.1?}");
            return Err(HttpFailure::new(SourceFailure::Timeout, text).into());
        };
        match answer {
            Ok(answer) => answer.header.check(),
            // The member asked its leader before it looked at the permission.
            Err(failure) if failure.refused => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Opens one stream with several watches.
    ///
    /// # Errors
    /// The stream did not begin.
    pub async fn watch(&self, watches: Vec<WatchCreate>) -> Result<WatchStream, GatewayFailure> {
        let mut body = Vec::new();
        for create_request in watches {
            serde_json::to_writer(&mut body, &WatchRequest { create_request }).map_err(protocol)?;
        }
        let mut request = self.request("/v3/watch", body.into()).await?;
        request.headers.push((HAS_LEADER, HeaderValue::from_static("true")));
        let mut stream = self.0.client.open(&request).await?;
        match stream.failure(self.0.client.endpoint().timeout).await {
            Some(failure) => Err(failure.into()),
            None => Ok(WatchStream::new(stream)),
        }
    }

    /// The next request logs in again.
    pub fn forget_token(&self) {
        self.set_token(None);
    }

    /// The next request goes to another member.
    pub fn fail_over(&self) {
        self.0.client.fail_over();
    }

    /// Sends a request and reads the answer. A token that the server does not accept is
    /// renewed.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub async fn call<Q: Serialize, A: DeserializeOwned + Send + 'static>(
        &self,
        path: &'static str,
        question: &Q,
    ) -> Result<A, GatewayFailure> {
        let body = Bytes::from(serde_json::to_vec(question).map_err(protocol)?);
        match self.exchange(path, body.clone()).await? {
            Ok(answer) => parse(answer).await,
            Err(refusal) if refusal.token && self.0.login.is_some() => {
                self.forget_token();
                let again = self.exchange(path, body).await?;
                parse(again.map_err(GatewayFailure::of)?).await
            }
            Err(refusal) => Err(GatewayFailure::of(refusal)),
        }
    }

    async fn exchange(
        &self,
        path: &'static str,
        body: Bytes,
    ) -> Result<Result<Bytes, GatewayRefusal>, GatewayFailure> {
        let request = self.request(path, body).await?;
        self.send(&request).await
    }

    async fn send(
        &self,
        request: &HttpRequest,
    ) -> Result<Result<Bytes, GatewayRefusal>, GatewayFailure> {
        let answer = self.0.client.send(request).await?;
        if answer.failure().is_none() {
            return Ok(Ok(answer.body));
        }
        Ok(Err(GatewayRefusal::of_answer(answer.status, &answer.body)))
    }

    /// Forms a request with a token if there is a user.
    async fn request(
        &self,
        path: &'static str,
        body: Bytes,
    ) -> Result<HttpRequest, GatewayFailure> {
        let mut request = post(path, body);
        if let Some(login) = &self.0.login {
            let known = self.0.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let token = match known {
                Some(token) => Some(token),
                None => self.log_in(login).await?,
            };
            request.headers.extend(token.map(|token| (AUTHORIZATION, token)));
        }
        Ok(request)
    }

    /// Asks for a token. The password file is read each time. A server without users gives
    /// no token, and needs none.
    async fn log_in(&self, login: &EtcdLogin) -> Result<Option<HeaderValue>, GatewayFailure> {
        let password = login.password.line().map_err(HttpFailure::local)?;
        let question = AuthenticateRequest { name: &login.user, password: &password };
        let body = serde_json::to_vec(&question).map_err(protocol)?;
        let answer = match self.send(&post("/v3/auth/authenticate", body.into())).await? {
            Ok(answer) => answer,
            Err(refusal) if refusal.no_users => return Ok(None),
            // No request can succeed without a token.
            Err(refusal) => return Err(HttpFailure::new(refusal.why, refusal.message).into()),
        };
        let answer: AuthenticateAnswer = serde_json::from_slice(&answer).map_err(protocol)?;
        let mut token = HeaderValue::from_str(&answer.token).map_err(protocol)?;
        token.set_sensitive(true);
        self.set_token(Some(token.clone()));
        Ok(Some(token))
    }

    fn set_token(&self, token: Option<HeaderValue>) {
        *self.0.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }
}

fn post(path: &'static str, body: Bytes) -> HttpRequest {
    HttpRequest { method: Method::POST, body, ..HttpRequest::get(path) }
}

async fn parse<A: DeserializeOwned + Send + 'static>(body: Bytes) -> Result<A, GatewayFailure> {
    off_runtime(body.len(), move || serde_json::from_slice(&body)).await?.map_err(protocol)
}

fn protocol(error: impl std::fmt::Display) -> GatewayFailure {
    HttpFailure::protocol(format_args!("unexpected answer of etcd: {error}")).into()
}

// === impl EtcdHeader ===

impl EtcdHeader {
    /// Refuses an answer that did not come from etcd, such as `{}`: it would mean an empty
    /// store.
    fn check(self) -> Result<(), GatewayFailure> {
        match self.revision > 0 && self.cluster_id > 0 {
            true => Ok(()),
            false => Err(protocol("the header has no revision or no cluster")),
        }
    }
}

// === impl GatewayFailure ===

impl GatewayFailure {
    fn of(GatewayRefusal { why, message, .. }: GatewayRefusal) -> GatewayFailure {
        // A member without a leader refuses every request.
        let refused = matches!(why, SourceFailure::Auth | SourceFailure::NotFound);
        GatewayFailure { http: HttpFailure::new(why, message), refused }
    }
}

impl From<HttpFailure> for GatewayFailure {
    fn from(http: HttpFailure) -> GatewayFailure {
        GatewayFailure { http, refused: false }
    }
}
