//! `/v1/health/service/NAME`: blocking queries as the page "Blocking Queries" describes
//! them.
//!
//! [`super::routes`] calls it. A query with an index above the present one waits until the
//! index is higher still, as Consul does: a client that ignores an index that went back
//! misses changes here, too.

use super::documents::go_duration;
use super::http::{DoubleReply, DoubleRequest};
use super::routes::RequestRights;
use super::{ConsulFault, DoubleShared, DoubleState};
use std::pin::pin;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Parameters of the endpoint.
pub(super) const PARAMS: [&str; 9] =
    ["index", "wait", "tag", "ns", "filter", "passing", "stale", "consistent", "cached"];

const WAIT_DEFAULT: Duration = Duration::from_secs(300);
const WAIT_MAX: Duration = Duration::from_secs(600);

/// A query that was read.
struct DoubleQuery<'r> {
    name: &'r str,
    index: u64,
    wait: Duration,
    tags: Vec<&'r str>,
    passing: bool,
}

/// Answers a query, at once or when something changes.
pub(super) async fn service(
    shared: &DoubleShared,
    request: &DoubleRequest,
    name: &str,
    rights: RequestRights,
) -> DoubleReply {
    let query = match query(request, name) {
        Ok(query) => query,
        Err(refused) => return refused,
    };
    let jitter = query.wait.mul_f64(fastrand::f64() / 16.0);
    let deadline = clock_after(query.wait + jitter);
    let restores = shared.lock().restores;
    loop {
        let mut changed = pin!(shared.changed.notified());
        changed.as_mut().enable();
        let at_once = {
            let state = shared.lock();
            // A restore ends the blocked queries.
            health_reply(&state, &query, rights, state.restores != restores)
        };
        if let Some(reply) = at_once {
            return reply;
        }
        if timeout_at(deadline, changed).await.is_err() {
            let at_end = health_reply(&shared.lock(), &query, rights, true);
            return at_end.unwrap_or_else(|| DoubleReply::text(500, "no reply"));
        }
    }
}

fn clock_after(time: Duration) -> Instant {
    Instant::from_std(tidegate_net::clock::now() + time)
}

fn query<'r>(request: &'r DoubleRequest, name: &'r str) -> Result<DoubleQuery<'r>, DoubleReply> {
    let bad = |text: &str| DoubleReply::text(400, text);
    if request.param("stale").is_some() && request.param("consistent").is_some() {
        return Err(bad("Cannot specify ?stale with ?consistent, conflicting semantics."));
    }
    if request.param("ns").is_some() {
        let text = "Invalid query parameter: \"ns\" - Namespaces are a Consul Enterprise feature";
        return Err(bad(text));
    }
    if request.param("dc").is_some_and(|dc| dc != "dc1") {
        return Err(DoubleReply::text(500, "No path to datacenter"));
    }
    let index = request.param("index").map_or(Ok(0), str::parse);
    let wait = request.param("wait").map_or(Some(WAIT_DEFAULT), go_duration);
    let passing = match request.param("passing") {
        None | Some("false" | "0") => false,
        Some("" | "true" | "1") => true,
        Some(_) => return Err(bad("Invalid value for ?passing")),
    };
    let mut tags: Vec<&str> = request.params("tag").collect();
    tags.extend(request.param("filter").map_or(Ok(Vec::new()), filtered_tags)?);
    Ok(DoubleQuery {
        name,
        index: index.map_err(|_| bad("Invalid index"))?,
        wait: wait.ok_or_else(|| bad("Invalid wait time"))?.min(WAIT_MAX),
        tags,
        passing,
    })
}

/// The one filter that the double knows: `"TAG" in Service.Tags`, joined by `and`.
fn filtered_tags(filter: &str) -> Result<Vec<&str>, DoubleReply> {
    let term = |term: &'_ str| -> Option<(usize, usize)> {
        let tag = term.trim().strip_suffix("in Service.Tags")?.trim();
        let tag = tag.strip_prefix('"')?.strip_suffix('"')?;
        let start = tag.as_ptr() as usize - filter.as_ptr() as usize;
        Some((start, start + tag.len()))
    };
    let terms = filter.split(" and ").map(|text| {
        term(text).map(|(start, end)| &filter[start..end]).ok_or_else(|| {
            let text = format!("Failed to create boolean expression evaluator: {text:?}");
            DoubleReply::text(400, text)
        })
    });
    terms.collect()
}

/// The reply of this moment; `None` while the query must wait.
fn health_reply(
    state: &DoubleState,
    query: &DoubleQuery<'_>,
    rights: RequestRights,
    at_end: bool,
) -> Option<DoubleReply> {
    let own = state.catalog.index_of(query.name);
    let (mut index, mut leader) = (own, true);
    let mut answer = state.catalog.instances(query.name, &query.tags, query.passing);
    let filtered = !rights.rights.read && !answer.is_empty();
    if filtered {
        answer.clear();
    }
    match state.fault {
        ConsulFault::NoLeader => return Some(DoubleReply::text(500, "No cluster leader")),
        ConsulFault::EmptyWithoutLeader => {
            (answer, leader) = (Vec::new(), false);
        }
        ConsulFault::IndexZero => index = 0,
        ConsulFault::Status(status) => return Some(DoubleReply::text(status, "scripted failure")),
        _ if query.index >= own && query.index > 0 && !at_end => return None,
        _ => {}
    }
    let mut reply = DoubleReply::json(&answer);
    reply.headers.extend([
        ("X-Consul-Index", index.to_string()),
        ("X-Consul-Knownleader", leader.to_string()),
        ("X-Consul-Lastcontact", state.last_contact.as_millis().to_string()),
    ]);
    if state.tokens.is_some() {
        reply.headers.push(("X-Consul-Default-Acl-Policy", "deny".to_owned()));
    }
    if filtered && !rights.anonymous {
        reply.headers.push(("X-Consul-Results-Filtered-By-Acls", "true".to_owned()));
    }
    Some(reply)
}
