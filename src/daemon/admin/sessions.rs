//! `/v1/sessions`: reads the query, asks every worker and writes the answer. Ends sessions.
//!
//! Mounted by `routes`. The control thread passes the query on and does not wait. The lists of
//! the workers are joined on a blocking thread.

use super::questions::{bad, blocking, number, parameters};
use super::routes::{ANSWER_MAX, ApiState, ErrorResponse, JSON, answer, long_answer, text};
use super::serve::AskedBy;
use super::{AdminRequest, AskedWorkers};
use crate::event_log::NewEvent;
use axum::extract::State;
use axum::response::Response;
use hyper::http::Extensions;
use hyper::{StatusCode, Uri};
use ipnet::IpNet;
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_api::sessions::{OpenSessionDoc, SessionsDoc, SessionsEndedDoc};
use tidegate_core::outcome::{Cause, Phase};
use tidegate_core::sessions::{
    ListedSession, SESSION_LIST_MAX, SessionList, SessionOrder, SessionQuery, SessionsEnded,
    SessionsToEnd,
};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Sessions of an answer, if the query does not say how many.
const LIMIT: usize = 100;

pub(super) async fn sessions(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
) -> Result<Response, ErrorResponse> {
    let query = Arc::new(parse(uri.query().unwrap_or_default()).map_err(bad)?);
    let (list, elsewhere) = list(&api, &query).await?;
    let body = blocking(move || text(&document(&list, elsewhere)));
    Ok(long_answer(JSON, body.await?))
}

pub(super) async fn close(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    extensions: Extensions,
) -> Result<Response, ErrorResponse> {
    end(&api, &uri, Cause::ClosedByOperator, AskedBy::of(&extensions)).await
}

pub(super) async fn reset(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    extensions: Extensions,
) -> Result<Response, ErrorResponse> {
    end(&api, &uri, Cause::ResetByOperator, AskedBy::of(&extensions)).await
}

/// Ends the first sessions that match.
async fn end(
    api: &ApiState,
    uri: &Uri,
    cause: Cause,
    who: String,
) -> Result<Response, ErrorResponse> {
    let mut query = parse(uri.query().unwrap_or_default()).map_err(bad)?;
    let most = std::mem::replace(&mut query.limit, SESSION_LIST_MAX);
    let (SessionList { matched, sessions, .. }, _) = list(api, &Arc::new(query)).await?;
    let numbers: Vec<u64> = sessions.iter().map(|session| session.number).collect();
    let (first, others) = numbers.split_at(most.min(numbers.len()));
    let mut done = SessionsEndedDoc { matched, ..SessionsEndedDoc::default() };
    // Others take the place of those that cannot be ended now.
    for numbers in [first, others] {
        let left = (most as u64).saturating_sub(done.ended);
        if left > 0 && !numbers.is_empty() {
            let order = SessionsToEnd::new(numbers.iter().copied().collect(), cause, left);
            let ended = end_each(api, order).await?;
            done.ended += ended.ended;
            done.busy += ended.busy;
        }
    }
    if done.ended > 0 {
        let verb = if cause == Cause::ClosedByOperator { "closed" } else { "reset" };
        let words = format!("{} of {matched} sessions that match {verb}", done.ended);
        let which = uri.query().map_or_else(String::new, |query| format!(": {query}"));
        let event = NewEvent::new(
            EventKindName::Operator,
            EventLevelName::Info,
            "tidegate",
            words + &which,
        );
        api.events.record(event.by(who));
    }
    Ok(answer(JSON, text(&done)))
}

/// Ends sessions on every worker. Returns what all of them have ended.
pub(super) async fn end_each(
    api: &ApiState,
    order: SessionsToEnd,
) -> Result<SessionsEnded, ErrorResponse> {
    let order = Arc::new(order);
    let pending = api.ask(|reply| AdminRequest::EndSessions { order, reply }).await?;
    let mut all = SessionsEnded::default();
    for done in answers(pending).await? {
        all.ended += done.ended;
        all.busy += done.busy;
        all.spoke += done.spoke;
    }
    Ok(all)
}

/// Returns the list of all workers, and the number of open sessions of old processes.
pub(super) async fn list(
    api: &ApiState,
    query: &Arc<SessionQuery>,
) -> Result<(SessionList, u64), ErrorResponse> {
    let ask = |reply| AdminRequest::Sessions { query: Arc::clone(query), reply };
    let AskedWorkers { lists, elsewhere } = api.ask(ask).await?;
    let (lists, query) = (answers(lists).await?, Arc::clone(query));
    let merged = blocking(move || SessionList::merge(lists, &query)).await?;
    Ok((merged, elsewhere.into()))
}

/// Waits for the answer of every worker.
async fn answers<T>(pending: Vec<oneshot::Receiver<T>>) -> Result<Vec<T>, ErrorResponse> {
    let mut all = Vec::with_capacity(pending.len());
    for (worker, answer) in pending.into_iter().enumerate() {
        let answered = timeout(ANSWER_MAX, answer).await.ok().and_then(Result::ok);
        let missing = || {
            let detail = format!("worker {worker} did not answer within {ANSWER_MAX:?}");
            let error = "no answer from a worker";
            ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, error, detail)
        };
        all.push(answered.ok_or_else(missing)?);
    }
    Ok(all)
}

fn document(list: &SessionList, elsewhere: u64) -> SessionsDoc {
    let sessions = list.sessions.iter().map(session).collect();
    SessionsDoc { sessions, matched: list.matched, open: list.open, elsewhere }
}

fn session(listed: &ListedSession) -> OpenSessionDoc {
    let (pool, backend) = listed.backend.as_ref().map(|(pool, name)| (pool, name)).unzip();
    let seconds = |time: Duration| time.as_millis() as f64 / 1_000.0;
    OpenSessionDoc {
        session: listed.number,
        worker: listed.worker,
        client: listed.client.to_string(),
        frontend: listed.frontend.to_string(),
        pool: pool.map(ToString::to_string),
        backend: backend.map(ToString::to_string),
        phase: listed.phase.map_or("setup", Phase::name).to_owned(),
        age_seconds: seconds(listed.figures.age),
        idle_seconds: seconds(listed.figures.idle),
        bytes_in: listed.figures.bytes_in,
        bytes_out: listed.figures.bytes_out,
    }
}

/// Reads the query. The error names the parameter that is wrong.
fn parse(query: &str) -> Result<SessionQuery, String> {
    let mut parsed = SessionQuery { limit: LIMIT, ..SessionQuery::default() };
    for pair in parameters(query) {
        let (key, value) = pair?;
        parameter(&mut parsed, key, value)?;
    }
    Ok(parsed)
}

fn parameter(query: &mut SessionQuery, key: &str, value: String) -> Result<(), String> {
    let filter = &mut query.filter;
    match key {
        "frontend" => filter.frontend = Some(value),
        "pool" => filter.pool = Some(value),
        "backend" => filter.backend = Some(value),
        "client" => filter.client = Some(range(&value)?),
        "older" => filter.older = Some(time(key, &value)?),
        "idle" => filter.idle = Some(time(key, &value)?),
        "bytes" => filter.bytes = Some(number(key, &value)?),
        "session" => {
            let numbers = filter.numbers.get_or_insert_with(HashSet::new);
            numbers.insert(number(key, &value)?);
        }
        "sort" => query.order = order(&value)?,
        "limit" => {
            query.limit = number(key, &value)?;
            if query.limit > SESSION_LIST_MAX {
                return Err(format!(
                    "limit is {value}; at most {SESSION_LIST_MAX} sessions are listed"
                ));
            }
        }
        _ => {
            return Err(format!(
                "unknown parameter {key:?}; expected frontend, pool, backend, client, older, idle, \
                 bytes, session, sort or limit"
            ));
        }
    }
    Ok(())
}

pub(super) fn time(key: &str, value: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = value.parse().ok();
    let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.ok_or_else(|| format!("{key} is not a time in seconds: {value:?}"))
}

/// Reads an address or a range of addresses.
fn range(value: &str) -> Result<IpNet, String> {
    let one = value.parse::<IpAddr>().map(IpNet::from).ok();
    one.or_else(|| value.parse().ok())
        .ok_or_else(|| format!("client is not an address or a range such as 10.0.0.0/8: {value:?}"))
}

fn order(value: &str) -> Result<SessionOrder, String> {
    match value {
        "age" => Ok(SessionOrder::Age),
        "idle" => Ok(SessionOrder::Idle),
        "bytes" => Ok(SessionOrder::Bytes),
        _ => Err(format!("unknown order {value:?}; expected age, idle or bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::sessions::SessionFilter;

    #[test]
    fn query_sets_every_condition() {
        let query = parse(
            "frontend=web&pool=app&backend=a%2Fb&client=10.0.0.0/8&older=60&idle=1.5&bytes=7\
             &session=3&session=4&sort=idle&limit=1000",
        )
        .unwrap();
        let text = |text: &str| Some(text.to_owned());
        let wanted = SessionFilter {
            frontend: text("web"),
            pool: text("app"),
            backend: text("a/b"),
            backends: None,
            client: Some("10.0.0.0/8".parse().unwrap()),
            older: Some(Duration::from_secs(60)),
            idle: Some(Duration::from_millis(1_500)),
            bytes: Some(7),
            numbers: Some(HashSet::from([3, 4])),
        };
        assert_eq!((query.filter, query.order, query.limit), (wanted, SessionOrder::Idle, 1000));
        assert_eq!(parse("client=::1").unwrap().filter.client, Some("::1/128".parse().unwrap()));
        assert_eq!((parse("").unwrap().limit, parse("").unwrap().order), (100, SessionOrder::Age));
    }

    #[test]
    fn invalid_query_names_the_parameter() {
        for query in [
            "older=-1",
            "idle=1s",
            "bytes=1KiB",
            "client=web",
            "session=a",
            "sort=x",
            "limit=1001",
            "pol=a",
            "pool=",
        ] {
            let key = query.split('=').next().unwrap();
            let error = parse(query).unwrap_err();
            assert!(error.contains(if key == "sort" { "order" } else { key }), "{query}: {error}");
        }
    }
}
