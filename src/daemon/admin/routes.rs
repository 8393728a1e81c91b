//! The endpoints of the admin API. Each asks the control loop and formats the answer.
//!
//! Mounted by `serve`, behind `guard`. Handlers hold no state. They wait for the control
//! loop at most [`ANSWER_MAX`], a reload [`RELOAD_MAX`], an upgrade longer.

use super::body::ChunkedBody;
use super::events::events;
use super::guard::{Transport, guard};
use super::page;
use super::questions;
use super::rebalance::rebalance;
use super::serve::AskedBy;
use super::sessions;
use super::status_query::StatusSelection;
use super::stream::{self, StreamHub};
use super::upgrade::upgrade;
use super::{AdminRequest, HistoryPart, ProblemDoc, ReadyState, ReloadError, TokenStore};
use crate::event_log::EventLog;
use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::header::{CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use hyper::http::Extensions;
use hyper::{Method, StatusCode, Uri};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::answers::{ErrorDoc, IntentDoc, StateDoc};
use tidegate_api::names::ServiceState;
use tidegate_core::control::OperatorError;
use tidegate_core::health::Intent;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

/// State shared by all requests.
#[derive(Debug)]
pub(super) struct ApiState {
    pub(super) entrance: Transport,
    pub(super) tokens: Arc<TokenStore>,
    pub(super) requests: mpsc::Sender<AdminRequest>,
    pub(super) readiness: ReadyState,
    pub(super) events: EventLog,
    /// Places for questions that wait for an event.
    pub(super) waiting: Semaphore,
    /// The open streams.
    pub(super) hub: StreamHub,
    /// True once the API stops.
    pub(super) closing: watch::Receiver<bool>,
}

/// An error answer: status code and document.
#[derive(Debug)]
pub(super) struct ErrorResponse {
    status: StatusCode,
    document: ErrorDoc,
}

/// Timeout for an answer of the control loop. A client learns more from a 503 than from
/// its own timeout.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Timeout for a reload, which can wait until a program has finished writing a file.
const RELOAD_MAX: Duration = Duration::from_secs(12);

/// Most members that an error names.
const MEMBERS_SHOWN_MAX: usize = 16;

const TEXT_METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
pub(super) const JSON: &str = "application/json";

/// Returns the router of all endpoints, behind the guard.
pub(super) fn router(api: Arc<ApiState>) -> Router {
    let router = Router::new();
    #[cfg(debug_assertions)]
    let router = super::faults::mount(router);
    router
        .route("/", get(page::index))
        .route("/page/{file}", get(page::file))
        .route("/live", get(live))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/status", get(status))
        .route("/v1/events", get(events))
        .route("/v1/stream", get(stream::stream))
        .route("/v1/sessions", get(sessions::sessions))
        .route("/v1/sessions/close", post(sessions::close))
        .route("/v1/sessions/reset", post(sessions::reset))
        .route("/v1/explain", get(questions::explain))
        .route("/v1/reload", post(reload))
        .route("/v1/upgrade", post(upgrade))
        .route("/v1/shutdown", post(shutdown))
        .route("/v1/pools/{pool}/rebalance", post(rebalance))
        .route("/v1/pools/{pool}/backends/{name}/drain", post(drain))
        .route("/v1/pools/{pool}/backends/{name}/undrain", post(undrain))
        .route("/v1/pools/{pool}/backends/{name}/explain", get(explain))
        .route("/v1/pools/{pool}/backends/{name}/history", get(history))
        .route("/v1/pools/{pool}/backends/{name}/minute", get(minute))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&api), guard))
        .with_state(api)
}

async fn live(State(api): State<Arc<ApiState>>) -> Response {
    answer(JSON, text(&StateDoc { state: api.readiness.state() }))
}

async fn ready(State(api): State<Arc<ApiState>>) -> Result<Response, ErrorResponse> {
    let state = api.readiness.state();
    let detail = match (api.readiness.stalled(), api.readiness.undecided()) {
        (Some(worker), _) => format!("worker {worker} is stalled"),
        _ if state != ServiceState::Serving => state.to_string(),
        (None, 0) => return Ok(answer(JSON, text(&StateDoc { state }))),
        (None, 1) => "1 pool waits for its first probe or heartbeat result".to_owned(),
        (None, pools) => format!("{pools} pools wait for their first probe or heartbeat results"),
    };
    Err(ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, "not ready", detail))
}

async fn metrics(State(api): State<Arc<ApiState>>) -> Result<Response, ErrorResponse> {
    Ok(long_answer(TEXT_METRICS, api.ask(AdminRequest::Metrics).await?))
}

async fn status(State(api): State<Arc<ApiState>>, uri: Uri) -> Result<Response, ErrorResponse> {
    let selection = StatusSelection::parse(uri.query().unwrap_or_default());
    let selection = selection.map_err(questions::bad)?;
    if !selection.is_everything() {
        let named = (selection.pool.clone().unwrap_or_default(), selection.named_backend());
        let ask = |reply| AdminRequest::Observe { latencies: true, reply };
        let observed = api.ask(ask).await?;
        let render = move || {
            let latency = observed.latencies.lock();
            super::status::render_selected(&observed.snapshot, &latency, &selection)
        };
        let text = questions::blocking(render).await?.map_err(|error| unknown(error, named))?;
        return Ok(long_answer(JSON, text));
    }
    Ok(long_answer(JSON, api.ask(AdminRequest::Status).await?))
}

async fn reload(
    State(api): State<Arc<ApiState>>,
    extensions: Extensions,
) -> Result<Response, ErrorResponse> {
    let who = AskedBy::of(&extensions);
    match api.ask_within(RELOAD_MAX, |reply| AdminRequest::Reload { who, reply }).await? {
        Ok(reloaded) => Ok(answer(JSON, text(&reloaded))),
        Err(ReloadError::Problems(problems)) => Err(refused_file(problems)),
        Err(ReloadError::NotNow(why)) => {
            Err(ErrorResponse::new(StatusCode::CONFLICT, "reload rejected", why))
        }
    }
}

fn refused_file(problems: Vec<ProblemDoc>) -> ErrorResponse {
    let detail = match &*problems {
        [one] => one.message.clone(),
        several => format!("{} problems", several.len()),
    };
    let error = "configuration rejected; the previous one stays in effect";
    let mut refused = ErrorResponse::new(StatusCode::UNPROCESSABLE_ENTITY, error, detail);
    refused.document.problems = Some(problems);
    refused
}

async fn shutdown(
    State(api): State<Arc<ApiState>>,
    extensions: Extensions,
) -> Result<Response, ErrorResponse> {
    let who = AskedBy::of(&extensions);
    api.ask(|reply| AdminRequest::Shutdown { who, reply }).await?;
    Ok(answer(JSON, text(&StateDoc { state: ServiceState::Draining })))
}

type BackendPath = Result<Path<(String, String)>, PathRejection>;

async fn drain(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    extensions: Extensions,
    named: BackendPath,
) -> Result<Response, ErrorResponse> {
    set_intent(&api, &uri, named, Intent::Draining, AskedBy::of(&extensions)).await
}

async fn undrain(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    extensions: Extensions,
    named: BackendPath,
) -> Result<Response, ErrorResponse> {
    set_intent(&api, &uri, named, Intent::Ready, AskedBy::of(&extensions)).await
}

async fn explain(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    named: BackendPath,
) -> Result<Response, ErrorResponse> {
    let (pool, backend) = names(named, &uri)?;
    let asked = (pool.clone(), backend.clone());
    let explained = api.ask(|reply| AdminRequest::Explain { pool, backend, reply }).await?;
    let explained = explained.map_err(|error| unknown(error, asked))?;
    Ok(answer(JSON, questions::blocking(move || explained.write()).await?))
}

async fn history(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    named: BackendPath,
) -> Result<Response, ErrorResponse> {
    history_part(&api, &uri, named, HistoryPart::Hour).await
}

async fn minute(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    named: BackendPath,
) -> Result<Response, ErrorResponse> {
    history_part(&api, &uri, named, HistoryPart::Minute).await
}

async fn history_part(
    api: &ApiState,
    uri: &Uri,
    named: BackendPath,
    part: HistoryPart,
) -> Result<Response, ErrorResponse> {
    let (pool, backend) = names(named, uri)?;
    let asked = (pool.clone(), backend.clone());
    let found = api.ask(|reply| AdminRequest::History { pool, backend, part, reply }).await?;
    let found = found.map_err(|error| unknown(error, asked))?;
    Ok(answer(JSON, questions::blocking(move || found.write()).await?))
}

async fn set_intent(
    api: &ApiState,
    uri: &Uri,
    named: BackendPath,
    intent: Intent,
    who: String,
) -> Result<Response, ErrorResponse> {
    let (pool, backend) = names(named, uri)?;
    let asked = (pool.clone(), backend.clone());
    let ask = |reply| AdminRequest::SetIntent { pool, backend, intent, who, reply };
    match api.ask(ask).await? {
        Ok(()) => {
            let (pool, backend) = asked;
            let document = IntentDoc { pool, backend, intent: intent.name().into() };
            Ok(answer(JSON, text(&document)))
        }
        Err(error) => Err(unknown(error, asked)),
    }
}

/// Returns pool and backend of a path.
fn names(named: BackendPath, uri: &Uri) -> Result<(String, String), ErrorResponse> {
    // The decoded path is not UTF-8, so it matches no name.
    named.map(|Path(names)| names).map_err(|_| not_found(uri))
}

pub(super) fn unknown(error: OperatorError, (pool, backend): (String, String)) -> ErrorResponse {
    let (error, detail) = match error {
        OperatorError::UnknownPool => {
            let detail = format!("there is no pool {pool:?}; tidegate status lists all pools");
            ("unknown pool", detail)
        }
        OperatorError::UnknownBackend => {
            let detail = format!(
                "pool {pool:?} has no backend {backend:?}; tidegate status lists its backends"
            );
            ("unknown backend", detail)
        }
        OperatorError::Members(members) => ("not one backend", not_one(&pool, &backend, &members)),
    };
    ErrorResponse::new(StatusCode::NOT_FOUND, error, detail)
}

/// Returns what to ask for instead of a backend whose address is a name.
fn not_one(pool: &str, backend: &str, members: &[Arc<str>]) -> String {
    let shown: Vec<&str> = members.iter().take(MEMBERS_SHOWN_MAX).map(|name| &**name).collect();
    let more = match members.len().saturating_sub(shown.len()) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let shown = shown.join(", ");
    match members.len() {
        0 => format!(
            "{backend:?} of pool {pool:?} has no members yet; tidegate status shows what its name \
             server says"
        ),
        1 => format!("{backend:?} of pool {pool:?} has 1 member: {shown}; ask for it"),
        count => format!(
            "{backend:?} of pool {pool:?} has {count} members: {shown}{more}; ask for one of them"
        ),
    }
}

async fn unknown_path(uri: Uri) -> ErrorResponse {
    not_found(&uri)
}

fn not_found(uri: &Uri) -> ErrorResponse {
    ErrorResponse::new(StatusCode::NOT_FOUND, "unknown path", uri.path())
}

async fn wrong_method(method: Method, uri: Uri) -> ErrorResponse {
    let detail = format!("{method} is not allowed on {}", uri.path());
    ErrorResponse::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed", detail)
}

pub(super) fn answer(content_type: &'static str, body: String) -> Response {
    ([(CONTENT_TYPE, content_type)], body).into_response()
}

pub(super) fn long_answer(content_type: &'static str, body: String) -> Response {
    ([(CONTENT_TYPE, content_type)], Body::new(ChunkedBody::new(body))).into_response()
}

pub(super) fn text(body: &impl Serialize) -> String {
    serde_json::to_string(body).expect("plain data always serialises")
}

// === impl ApiState ===

impl ApiState {
    /// Sends one request to the control loop and waits for its reply.
    pub(super) async fn ask<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<T>) -> AdminRequest,
    ) -> Result<T, ErrorResponse> {
        self.ask_within(ANSWER_MAX, make).await
    }

    /// Like [`ApiState::ask`], with another timeout.
    pub(super) async fn ask_within<T>(
        &self,
        limit: Duration,
        make: impl FnOnce(oneshot::Sender<T>) -> AdminRequest,
    ) -> Result<T, ErrorResponse> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.requests.send(make(reply)).await.ok()?;
            answer.await.ok()
        };
        let detail = match tokio::time::timeout(limit, exchange).await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => "the control loop has exited".to_owned(),
            Err(_) => format!(
                "the control loop did not answer within {limit:?}; \
                 the request can still take effect"
            ),
        };
        Err(ErrorResponse::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "no answer from the control loop",
            detail,
        ))
    }
}

// === impl ErrorResponse ===

impl ErrorResponse {
    pub(super) fn new(status: StatusCode, error: &str, detail: impl Into<String>) -> Self {
        let (error, detail) = (error.to_owned(), detail.into());
        ErrorResponse { status, document: ErrorDoc { error, detail, problems: None } }
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        let mut response = (self.status, answer(JSON, text(&self.document))).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer realm=\"tidegate\"");
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn question_about_a_name_is_answered_with_its_members() {
        let told = |count: usize| {
            let members = (0..count).map(|host| format!("pg@10.0.0.{host}:5432").into()).collect();
            let names = ("db".to_owned(), "pg".to_owned());
            unknown(OperatorError::Members(members), names).document.detail
        };
        assert!(told(0).contains("has no members yet"));
        assert_eq!(
            told(2),
            "\"pg\" of pool \"db\" has 2 members: pg@10.0.0.0:5432, pg@10.0.0.1:5432; ask for one of \
             them"
        );
        assert!(told(20).ends_with("pg@10.0.0.15:5432 and 4 more; ask for one of them"));
    }
}
