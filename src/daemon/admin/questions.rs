//! `GET /v1/explain`: reads the query, gets the facts and formats the answer.
//!
//! Mounted by `routes`. The control thread resolves names and hands over the table. Rings
//! are read, picks are rehearsed and documents are written on a blocking thread, so the
//! control thread never waits for a question.

use super::AdminRequest;
use super::decisions;
use super::forecast::{ForecastError, ForecastQuestion, LocalAddr, forecast};
use super::routes::{ApiState, ErrorResponse, JSON, answer, text};
use axum::extract::State;
use axum::response::Response;
use hyper::{StatusCode, Uri};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use tidegate_core::control::what_if::{AssumedChange, UnknownAssumption, WhatIf};
use tidegate_core::decision::rings::{FAILED_MAX, FIRST_MAX};
use tidegate_core::model::WEIGHT_MAX;
use tidegate_net::clock;

/// Changes that one question can assume.
const ASSUMED_MAX: usize = 64;

#[derive(Debug, PartialEq, Eq)]
enum Question {
    Session(u64),
    Client(ForecastQuestion),
}

pub(super) async fn explain(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
) -> Result<Response, ErrorResponse> {
    let question = parse(uri.query().unwrap_or_default()).map_err(bad)?;
    let body = match question {
        Question::Session(number) => explain_session(&api, number).await?,
        Question::Client(question) => explain_client(&api, question).await?,
    };
    Ok(answer(JSON, body))
}

async fn explain_session(api: &ApiState, number: u64) -> Result<String, ErrorResponse> {
    let records = api.ask(AdminRequest::Decisions).await?;
    let given_out = records.given_out.clone();
    let found = blocking(move || records.decisions.of_session(number)).await?;
    if found.is_empty() {
        let detail = unknown_session(number, &given_out);
        return Err(ErrorResponse::new(StatusCode::NOT_FOUND, "unknown session", detail));
    }
    let ids = decisions::ids(&found);
    let names = api.ask(|reply| AdminRequest::Names { ids, reply }).await?;
    blocking(move || text(&decisions::session(&found, &names))).await
}

/// Returns why no decision of the session is known.
fn unknown_session(number: u64, given_out: &std::ops::Range<u64>) -> String {
    if number >= given_out.end {
        return format!(
            "session {number} has not been accepted yet: numbers from {} on are unused",
            given_out.end
        );
    }
    if number < given_out.start {
        return format!(
            "session {number} was accepted by an earlier process, before an upgrade or a restart; \
             this process uses numbers from {} on",
            given_out.start
        );
    }
    format!(
        "no decision of session {number} is kept, or it has none yet: each worker keeps its last \
         {FIRST_MAX} first picks and its last {FAILED_MAX} failures and retries; a session that \
         waits in the queue of a pool has none, and numbers below {} can be unused",
        given_out.end
    )
}

async fn explain_client(
    api: &ApiState,
    question: ForecastQuestion,
) -> Result<String, ErrorResponse> {
    let assumed = question.assumed.clone();
    let basis = api.ask(|reply| AdminRequest::Forecast { assumed, reply }).await?;
    let basis = basis.map_err(unknown_assumption)?;
    let name = question.frontend.clone();
    let now = (clock::now(), fastrand::u64(..));
    let document =
        blocking(move || forecast(&question, basis, now).map(|told| text(&told))).await?;
    document.map_err(|error| match error {
        ForecastError::UnknownFrontend => {
            let detail = format!("there is no frontend {name:?}");
            ErrorResponse::new(StatusCode::NOT_FOUND, "unknown frontend", detail)
        }
        ForecastError::Address(detail) => bad(detail),
        ForecastError::Draining => {
            let detail = "this process drains and accepts no clients".to_owned();
            ErrorResponse::new(StatusCode::CONFLICT, "draining", detail)
        }
    })
}

fn unknown_assumption(unknown: UnknownAssumption) -> ErrorResponse {
    let WhatIf { pool, backend, .. } = unknown.assumed;
    super::routes::unknown(unknown.error, (pool, backend))
}

/// Runs `work` on a blocking thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ErrorResponse> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        // The work has panicked, or the process ends.
        let detail = error.to_string();
        ErrorResponse::new(StatusCode::INTERNAL_SERVER_ERROR, "cannot render the answer", detail)
    })
}

pub(super) fn bad(detail: String) -> ErrorResponse {
    ErrorResponse::new(StatusCode::BAD_REQUEST, "invalid query", detail)
}

/// Returns the parameters of a query. An error names a parameter without a readable value.
pub(super) fn parameters(query: &str) -> impl Iterator<Item = Result<(&str, String), String>> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decoded(value).filter(|value| !value.is_empty());
        value.map(|value| (key, value)).ok_or_else(|| format!("{key} is empty or not UTF-8"))
    })
}

/// Reads a whole number.
pub(super) fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{key} is not a whole number: {value:?}"))
}

/// Reads the query. The error names the parameter that is wrong.
fn parse(query: &str) -> Result<Question, String> {
    let (mut session, mut client, mut frontend, mut address) = (None, None, None, None);
    let mut assumed = Vec::new();
    for parameter in parameters(query) {
        let (key, value) = parameter?;
        let known = match key {
            "session" => session.replace(session_number(&value)?).is_none(),
            "client" => client.replace(client_address(&value)?).is_none(),
            "frontend" => frontend.replace(value).is_none(),
            "address" => address.replace(local_address(&value)?).is_none(),
            "without" => push(&mut assumed, without(&value)?)?,
            "with" => push(&mut assumed, with(&value)?)?,
            _ => {
                return Err(format!(
                    "unknown parameter {key:?}; expected session, client, frontend, address, \
                     without or with"
                ));
            }
        };
        if !known {
            return Err(format!("{key} is given twice"));
        }
    }
    match (session, client, frontend) {
        (Some(number), None, None) if address.is_none() && assumed.is_empty() => {
            Ok(Question::Session(number))
        }
        (Some(_), ..) => Err("session cannot be combined with other parameters".to_owned()),
        (None, Some(client), Some(frontend)) => {
            Ok(Question::Client(ForecastQuestion { client, frontend, local: address, assumed }))
        }
        (None, None, _) => Err("session or client is missing".to_owned()),
        (None, Some(_), None) => Err("frontend is missing".to_owned()),
    }
}

fn push(assumed: &mut Vec<WhatIf>, one: WhatIf) -> Result<bool, String> {
    if assumed.len() == ASSUMED_MAX {
        return Err(format!("more than {ASSUMED_MAX} parameters without and with"));
    }
    assumed.push(one);
    Ok(true)
}

fn session_number(value: &str) -> Result<u64, String> {
    let number = value.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| format!("session is not a number above 0: {value:?}"))
}

fn client_address(value: &str) -> Result<SocketAddr, String> {
    match local_address(value) {
        Ok(LocalAddr::Socket(address)) => Ok(address),
        Ok(LocalAddr::Ip(ip)) => Ok(SocketAddr::new(ip, 0)),
        Err(_) => Err(format!("client is not an IP address or IP:PORT: {value:?}")),
    }
}

fn local_address(value: &str) -> Result<LocalAddr, String> {
    let ip = value.parse::<IpAddr>().map(LocalAddr::Ip);
    ip.or_else(|_| value.parse().map(LocalAddr::Socket))
        .map_err(|_| format!("address is not an IP address or IP:PORT: {value:?}"))
}

fn without(value: &str) -> Result<WhatIf, String> {
    let wrong = || format!("without is not POOL/BACKEND: {value:?}");
    let (pool, backend) = backend(value).ok_or_else(wrong)?;
    Ok(WhatIf { pool, backend, change: AssumedChange::Excluded })
}

fn with(value: &str) -> Result<WhatIf, String> {
    let wrong = || format!("with is not weight:POOL/BACKEND=N: {value:?}");
    let (named, weight) =
        value.strip_prefix("weight:").and_then(|rest| rest.rsplit_once('=')).ok_or_else(wrong)?;
    let (pool, backend) = backend(named).ok_or_else(wrong)?;
    let weight = weight.parse().ok().filter(|weight| (1..=WEIGHT_MAX).contains(weight));
    let weight = weight
        .ok_or_else(|| format!("with has a weight that is not 1 to {WEIGHT_MAX}: {value:?}"))?;
    Ok(WhatIf { pool, backend, change: AssumedChange::Weight(weight) })
}

fn backend(text: &str) -> Option<(String, String)> {
    let (pool, backend) = text.split_once('/')?;
    (!pool.is_empty() && !backend.is_empty()).then(|| (pool.to_owned(), backend.to_owned()))
}

/// Percent-decodes a value; `None` if it is not UTF-8.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                (digit(rest.next())? * 16 + digit(rest.next())?) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_with_all_their_parameters() {
        assert_eq!(parse("session=17"), Ok(Question::Session(17)));
        let query = "client=10.1.2.3&frontend=web&address=[::1]:80&without=a%2Fb&\
                     with=weight:shop/10.0.0.1:80=5";
        let Ok(Question::Client(question)) = parse(query) else { panic!("not read") };
        assert_eq!(question.client, ([10, 1, 2, 3], 0).into());
        assert_eq!(question.local, Some(LocalAddr::Socket("[::1]:80".parse().unwrap())));
        let [out, weight] = &*question.assumed else { panic!("{question:?}") };
        assert_eq!((&*out.pool, &*out.backend, out.change), ("a", "b", AssumedChange::Excluded));
        assert_eq!((&*weight.backend, weight.change), ("10.0.0.1:80", AssumedChange::Weight(5)));
        let Ok(Question::Client(other)) = parse("client=[::1]:9&frontend=w&address=::1") else {
            panic!("not read")
        };
        assert_eq!(
            (other.client.port(), other.local),
            (9, Some(LocalAddr::Ip("::1".parse().unwrap())))
        );
    }

    #[test]
    fn wrong_query_is_rejected_with_the_name_of_the_parameter() {
        for (query, named) in [
            ("", "session or client is missing"),
            ("client=10.0.0.1", "frontend is missing"),
            ("frontend=web", "session or client is missing"),
            ("session=0", "session is not a number above 0"),
            ("session=x", "session is not"),
            ("session=", "session is empty"),
            ("session=%ff", "session is empty or not UTF-8"),
            ("session=1&session=2", "session is given twice"),
            ("session=1&client=10.0.0.1", "session cannot be combined"),
            ("session=1&without=a/b", "session cannot be combined"),
            ("client=host&frontend=web", "client is not an IP address"),
            ("client=10.0.0.1&frontend=web&address=x", "address is not an IP address"),
            ("client=10.0.0.1&frontend=web&without=b", "without is not POOL/BACKEND"),
            ("client=10.0.0.1&frontend=web&with=a/b=2", "with is not weight:"),
            ("client=10.0.0.1&frontend=web&with=weight:a/b=0", "weight that is not 1 to 1000"),
            ("client=10.0.0.1&frontend=web&with=weight:a/b=1001", "weight that is not"),
            ("sni=a", "unknown parameter \"sni\""),
        ] {
            let error = parse(query).expect_err(query);
            assert!(error.contains(named), "{query}: {error}");
        }
        let many = "client=10.0.0.1&frontend=web".to_owned() + &"&without=a/b".repeat(65);
        assert!(parse(&many).expect_err("too many").contains("more than 64"));
    }

    #[test]
    fn unknown_session_is_explained_by_its_number() {
        let told = |number| unknown_session(number, &(100..200));
        assert!(told(200).contains("has not been accepted yet"));
        assert!(told(99).contains("before an upgrade"));
        assert!(told(150).contains("last 4096 first picks and its last 1024 failures"));
        assert!(told(150).contains("waits in the queue of a pool has none, and numbers below 200"));
    }
}
