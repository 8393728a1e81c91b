//! `GET /v1/events`: reads the query, waits for events if asked to, and writes the answer.
//!
//! Mounted by `routes`. It asks nothing of the control loop. The list is filtered and written
//! on a blocking thread.
//!
//! A question that waits ends early if the API stops, so that a client can ask the new process
//! of an upgrade.

use super::questions::{bad, blocking, number, parameters};
use super::routes::{ApiState, ErrorResponse, JSON, long_answer, text};
use axum::extract::State;
use axum::response::Response;
use hyper::Uri;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::events::{EventDoc, EventsDoc};
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_net::clock;
use tokio::time::sleep_until;

/// Questions that wait at the same time. Further ones are answered at once.
pub(super) const WAITING_MAX: usize = 8;

/// Longest wait for an event. Shorter than the maximum age of a connection.
const WAIT_MAX: u64 = 30;

/// What a client wants to know.
#[derive(Debug, Default, PartialEq)]
struct EventQuery {
    /// Only events with a higher number.
    after: u64,
    /// Wait until an event matches, at most this time.
    wait: Option<Duration>,
    /// Only this many of the newest events that match.
    limit: Option<usize>,
    /// Only these kinds; empty: all.
    kinds: Vec<EventKindName>,
    /// Only these levels; empty: all.
    levels: Vec<EventLevelName>,
    /// Only events of this pool and its backends.
    pool: Option<String>,
    /// Only events at this Unix time or later.
    since: Option<f64>,
}

pub(super) async fn events(
    State(api): State<Arc<ApiState>>,
    uri: Uri,
) -> Result<Response, ErrorResponse> {
    let query = parse(uri.query().unwrap_or_default()).map_err(bad)?;
    let body = find(&api, query).await?;
    Ok(long_answer(JSON, body))
}

/// Returns the answer as soon as it has an event, or the wait has ended.
async fn find(api: &ApiState, mut query: EventQuery) -> Result<String, ErrorResponse> {
    let seat = query.wait.and_then(|_| api.waiting.try_acquire().ok());
    let until = clock::now() + query.wait.filter(|_| seat.is_some()).unwrap_or_default();
    let (mut newest, mut closing) = (api.events.watch(), api.closing.clone());
    let mut lost = 0;
    loop {
        newest.mark_unchanged();
        let mut document = api.events.after(query.after);
        document.lost += std::mem::take(&mut lost);
        let last = document.last;
        let (body, found, asked) = blocking(move || {
            document.events.retain(|event| query.matches(event));
            query.cut(&mut document);
            (text(&document), !document.events.is_empty(), (query, document.lost))
        })
        .await?;
        (query, lost) = asked;
        if found || clock::now() >= until {
            return Ok(body);
        }
        query.after = last;
        tokio::select! {
            _ = newest.changed() => {}
            () = sleep_until(until.into()) => return Ok(body),
            _ = closing.wait_for(|closing| *closing) => return Ok(body),
        }
    }
}

// === impl EventQuery ===

impl EventQuery {
    fn matches(&self, event: &EventDoc) -> bool {
        let of_pool = |pool: &String| {
            let rest = event.subject.strip_prefix(&**pool);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        (self.kinds.is_empty() || self.kinds.contains(&event.kind))
            && (self.levels.is_empty() || self.levels.contains(&event.level))
            && self.pool.as_ref().is_none_or(of_pool)
            && self.since.is_none_or(|since| event.at >= since)
    }

    /// Leaves the newest events up to the limit.
    fn cut(&self, document: &mut EventsDoc) {
        let more = document.events.len().saturating_sub(self.limit.unwrap_or(usize::MAX));
        document.events.drain(..more);
    }
}

/// Reads the query. The error names the parameter that is wrong.
fn parse(query: &str) -> Result<EventQuery, String> {
    let mut parsed = EventQuery::default();
    for pair in parameters(query) {
        let (key, value) = pair?;
        match key {
            "after" => parsed.after = number(key, &value)?,
            "wait" => parsed.wait = Some(wait(&value)?),
            "limit" => parsed.limit = Some(number(key, &value)?),
            "kind" => parsed.kinds.push(kind(&value)?),
            "level" => parsed.levels.push(level(&value)?),
            "pool" => parsed.pool = Some(value),
            "since" => {
                let since = value.parse().ok().filter(|since: &f64| since.is_finite());
                let wrong = || format!("since is not a Unix time in seconds: {value:?}");
                parsed.since = Some(since.ok_or_else(wrong)?);
            }
            _ => {
                return Err(format!(
                    "unknown parameter {key:?}; expected after, wait, limit, kind, level, pool or \
                     since"
                ));
            }
        }
    }
    Ok(parsed)
}

fn wait(value: &str) -> Result<Duration, String> {
    let seconds = number("wait", value)?;
    let allowed = (1..=WAIT_MAX).contains(&seconds);
    let bounds = || format!("wait is {value}; expected 1 to {WAIT_MAX} seconds");
    allowed.then(|| Duration::from_secs(seconds)).ok_or_else(bounds)
}

fn kind(value: &str) -> Result<EventKindName, String> {
    match EventKindName::from(value) {
        EventKindName::Other(_) => Err(format!(
            "unknown kind {value:?}; expected state, operator, config, process or limit"
        )),
        kind => Ok(kind),
    }
}

fn level(value: &str) -> Result<EventLevelName, String> {
    match EventLevelName::from(value) {
        EventLevelName::Other(_) => {
            Err(format!("unknown level {value:?}; expected good, info, warn or bad"))
        }
        level => Ok(level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(subject: &str, kind: EventKindName, at: f64) -> EventDoc {
        let (subject, text, who) = (subject.to_owned(), String::new(), String::new());
        let level = EventLevelName::Info;
        EventDoc { seq: 1, at, kind, level, subject, text, who, changes: Vec::new() }
    }

    #[test]
    fn query_selects_by_pool_kind_level_and_time() {
        let matches = |query: &str, subject: &str| {
            parse(query).unwrap().matches(&event(subject, EventKindName::State, 100.5))
        };
        assert!(matches("", "tidegate"));
        assert!(matches("pool=web", "web") && matches("pool=web", "web/a"));
        assert!(!matches("pool=web", "web2") && !matches("pool=web", "frontend web"));
        assert!(matches("pool=a%2Fb", "a/b/c"));
        assert!(matches("kind=state&kind=limit", "web") && !matches("kind=limit", "web"));
        assert!(matches("level=info", "web") && !matches("level=bad&level=warn", "web"));
        assert!(matches("since=100.5", "web") && !matches("since=100.6", "web"));
    }

    #[test]
    fn limit_leaves_the_newest_events() {
        let all = [1.0, 2.0, 3.0].map(|at| Arc::new(event("web", EventKindName::State, at)));
        let mut document = EventsDoc { events: all.to_vec(), last: 3, lost: 0 };
        parse("limit=2").unwrap().cut(&mut document);
        assert_eq!(document.events, all[1..]);
    }

    #[test]
    fn invalid_query_names_the_parameter() {
        let wrong = [
            ("after=-1", "after is not a whole number"),
            ("wait=0", "wait is 0; expected 1 to 30 seconds"),
            ("wait=31", "wait is 31; expected 1 to 30 seconds"),
            ("limit=x", "limit is not a whole number"),
            ("kind=staet", "unknown kind \"staet\""),
            ("level=good&level=", "level is empty"),
            ("since=NaN", "since is not a Unix time"),
            ("pol=web", "unknown parameter \"pol\""),
        ];
        for (query, error) in wrong {
            let found = parse(query).unwrap_err();
            assert!(found.starts_with(error), "{query}: {found}");
        }
    }
}
