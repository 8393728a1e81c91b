//! `/v1/pools/{pool}/rebalance`: closes sessions of backends above their share.
//!
//! Mounted by `routes`. One request closes at most `limit` sessions and answers; `tidegate
//! rebalance` sends one per second. It keeps no state between requests.

use super::AdminRequest;
use super::questions::{bad, number, parameters};
use super::routes::{ApiState, ErrorResponse, JSON, answer, text};
use super::serve::AskedBy;
use super::sessions::{end_each, list, time};
use crate::event_log::NewEvent;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;
use hyper::http::Extensions;
use hyper::{StatusCode, Uri};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_api::sessions::{RebalanceDoc, RebalancedBackendDoc};
use tidegate_core::model::Policy;
use tidegate_core::outcome::Cause;
use tidegate_core::rebalance::{BackendExcess, excess_of};
use tidegate_core::sessions::{
    ListedSession, SESSION_LIST_MAX, SessionFilter, SessionOrder, SessionQuery, SessionsEnded,
    SessionsToEnd,
};
use tidegate_core::table::PoolTable;

/// What a request asks for.
#[derive(Debug, PartialEq)]
struct Wanted {
    /// A backend may have this part more than its share.
    tolerance: f64,
    /// Sessions that are closed at most.
    limit: usize,
    /// Only sessions without a byte for this time are closed.
    idle: Duration,
    /// Sessions of the pool when the rebalance began; `None`: now.
    total: Option<u64>,
    /// Closes nothing.
    dry_run: bool,
}

pub(super) async fn rebalance(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
    extensions: Extensions,
    pool: Result<Path<String>, PathRejection>,
) -> Result<Response, ErrorResponse> {
    let Ok(Path(pool)) = pool else {
        return Err(ErrorResponse::new(StatusCode::NOT_FOUND, "unknown pool", uri.path()));
    };
    let wanted = parse(uri.query().unwrap_or_default()).map_err(bad)?;
    let asked = pool.clone();
    let table = api.ask(|reply| AdminRequest::PoolTable { pool: asked, reply }).await?;
    let table = table
        .ok_or_else(|| ErrorResponse::new(StatusCode::NOT_FOUND, "unknown pool", pool.as_str()))?;
    if table.spec.balance == Policy::SourceHash {
        let detail = "source-hash sends a client to the same backend again; change weights instead";
        return Err(ErrorResponse::new(StatusCode::CONFLICT, "cannot rebalance", detail));
    }
    let loads = table.loads();
    let total = wanted.total.unwrap_or_else(|| loads.iter().map(|load| load.sessions).sum());
    let backends = excess_of(&loads, total, wanted.tolerance);
    let ended = match wanted.dry_run {
        true => SessionsEnded::default(),
        false => close(&api, &table, &backends, &wanted).await?,
    };
    if ended.ended > 0 {
        let words = format!("{} sessions closed by a rebalance", ended.ended);
        let event =
            NewEvent::new(EventKindName::Operator, EventLevelName::Info, pool.as_str(), words);
        api.events.record(event.by(AskedBy::of(&extensions)));
    }
    Ok(answer(JSON, text(&document(pool, total, &backends, ended))))
}

/// Closes the idlest sessions of the backends with an excess.
async fn close(
    api: &ApiState,
    table: &PoolTable,
    backends: &[BackendExcess],
    wanted: &Wanted,
) -> Result<SessionsEnded, ErrorResponse> {
    let mut quotas: HashMap<&str, u64> = backends
        .iter()
        .filter(|backend| backend.excess > 0)
        .map(|backend| (&*backend.name, backend.excess))
        .collect();
    if quotas.is_empty() || wanted.limit == 0 {
        return Ok(SessionsEnded::default());
    }
    let filter = SessionFilter {
        pool: Some(table.spec.name.to_string()),
        backends: Some(quotas.keys().map(|name| (*name).to_owned()).collect()),
        idle: Some(wanted.idle),
        ..SessionFilter::default()
    };
    let order = SessionOrder::Idle;
    let query = SessionQuery { filter, order, limit: SESSION_LIST_MAX };
    let (found, _) = list(api, &Arc::new(query)).await?;
    let chosen = choose(&found.sessions, &mut quotas, wanted.limit);
    let most = chosen.len() as u64;
    let order = SessionsToEnd::new(chosen, Cause::Rebalanced, most).idle_for(wanted.idle);
    end_each(api, order).await
}

/// Returns the numbers of the first sessions, at most the quota of each backend.
fn choose(
    sessions: &[ListedSession],
    quotas: &mut HashMap<&str, u64>,
    limit: usize,
) -> HashSet<u64> {
    let mut within = |session: &&ListedSession| {
        let (_, backend) = session.backend.as_ref()?;
        let quota = quotas.get_mut(&**backend)?;
        *quota = quota.checked_sub(1)?;
        Some(())
    };
    let chosen = sessions.iter().filter(|session| within(session).is_some());
    chosen.take(limit).map(|session| session.number).collect()
}

fn document(
    pool: String,
    total: u64,
    backends: &[BackendExcess],
    done: SessionsEnded,
) -> RebalanceDoc {
    let backend = |one: &BackendExcess| RebalancedBackendDoc {
        backend: one.name.to_string(),
        sessions: one.sessions,
        expected: (one.target * 10.0).round() / 10.0,
        excess: one.excess,
    };
    let SessionsEnded { ended, busy, spoke, .. } = done;
    let excess = backends.iter().map(|one| one.excess).sum();
    RebalanceDoc {
        pool,
        total,
        excess,
        ended,
        busy,
        spoke,
        backends: backends.iter().map(backend).collect(),
    }
}

/// Reads the query. The error names the parameter that is wrong.
fn parse(query: &str) -> Result<Wanted, String> {
    let mut wanted = Wanted {
        tolerance: 0.1,
        limit: 5,
        idle: Duration::from_secs(1),
        total: None,
        dry_run: false,
    };
    for pair in parameters(query) {
        let (key, value) = pair?;
        match key {
            "to" => wanted.tolerance = tolerance(&value)?,
            "limit" => wanted.limit = limit(&value)?,
            "idle" => wanted.idle = time(key, &value)?,
            "total" => wanted.total = Some(number(key, &value)?),
            "dry_run" => {
                wanted.dry_run = value
                    .parse()
                    .map_err(|_| format!("dry_run is not true or false: {value:?}"))?;
            }
            _ => {
                return Err(format!(
                    "unknown parameter {key:?}; expected to, limit, idle, total or dry_run"
                ));
            }
        }
    }
    Ok(wanted)
}

fn tolerance(value: &str) -> Result<f64, String> {
    let number: Option<f64> = value.parse().ok();
    let in_range = number.filter(|number| (0.0..=10.0).contains(number));
    in_range.ok_or_else(|| format!("to is not a fraction from 0 to 10: {value:?}"))
}

fn limit(value: &str) -> Result<usize, String> {
    match number("limit", value)? {
        limit if limit <= SESSION_LIST_MAX => Ok(limit),
        _ => Err(format!("limit is {value}; at most {SESSION_LIST_MAX} sessions are closed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_core::model::ClientAddr;
    use tidegate_core::sessions::SessionFigures;

    fn session(number: u64, backend: &str) -> ListedSession {
        ListedSession {
            number,
            worker: 0,
            client: ClientAddr::announced("10.0.0.1:1".parse().unwrap()),
            frontend: "web".into(),
            backend: Some(("web".into(), backend.into())),
            phase: None,
            figures: SessionFigures::default(),
        }
    }

    #[test]
    fn first_sessions_of_each_backend_are_chosen_up_to_its_excess() {
        let sessions =
            [session(1, "a"), session(2, "b"), session(3, "a"), session(4, "a"), session(5, "c")];
        let mut quotas = HashMap::from([("a", 2), ("b", 5)]);
        assert_eq!(choose(&sessions, &mut quotas.clone(), 10), HashSet::from([1, 2, 3]));
        assert_eq!(choose(&sessions, &mut quotas, 2), HashSet::from([1, 2]));
    }

    #[test]
    fn query_has_defaults_and_names_a_wrong_parameter() {
        let wanted = parse("to=0.05&limit=20&idle=2.5&total=2000&dry_run=true").unwrap();
        let expected = Wanted {
            tolerance: 0.05,
            limit: 20,
            idle: Duration::from_millis(2_500),
            total: Some(2_000),
            dry_run: true,
        };
        assert_eq!(wanted, expected);
        assert_eq!(parse("").unwrap().limit, 5);
        for query in ["to=-1", "to=x", "limit=1001", "idle=1s", "total=a", "dry_run=1", "rate=5"] {
            let key = query.split('=').next().unwrap();
            assert!(parse(query).unwrap_err().contains(key), "{query}");
        }
    }
}
