//! The checks of the double: TTLs that run out, connects and HTTP requests to the services,
//! and the removal of services that stay critical.
//!
//! One task of [`super`] runs [`watch`]. Each connect has a task of its own.

use super::catalog::AGENT;
use super::documents::{CheckPlan, DoubleCheck, DoubleStatus};
use super::{DoubleShared, DoubleState};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How often the double looks at its checks.
const TICK: Duration = Duration::from_millis(20);

/// What the double reads of the answer to an HTTP check.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// When which check is due, by check id.
#[derive(Debug, Default)]
pub(super) struct CheckClocks(BTreeMap<String, CheckClock>);

#[derive(Debug, Clone, Copy)]
struct CheckClock {
    /// Next run, or end of the TTL.
    due: Instant,
    critical_since: Option<Instant>,
}

/// Runs the checks, forever.
pub(super) async fn watch(shared: Arc<DoubleShared>) {
    loop {
        tokio::time::sleep(TICK).await;
        let now = clock::now();
        let due = due(&mut shared.lock(), now, shared.settings.deregister_min);
        for id in due.removed {
            shared.change(|state| remove(state, &id));
        }
        for id in due.expired {
            shared.change(|state| {
                state.catalog.set_status(&id, DoubleStatus::Critical, "TTL expired")
            });
        }
        for (id, plan) in due.runs {
            tokio::spawn(run(Arc::clone(&shared), id, plan));
        }
    }
}

#[derive(Default)]
struct DueChecks {
    expired: Vec<String>,
    runs: Vec<(String, CheckPlan)>,
    removed: Vec<String>,
}

fn due(state: &mut DoubleState, now: Instant, deregister_min: Duration) -> DueChecks {
    let mut due = DueChecks::default();
    let known: Vec<&DoubleCheck> =
        state.catalog.checks().filter(|check| check.node == AGENT).collect();
    state.clocks.0.retain(|id, _| known.iter().any(|check| check.check_id == *id));
    for check in known.into_iter().filter(|check| check.plan.has_work()) {
        let first = now + check.plan.first();
        let clock = state.clocks.0.entry(check.check_id.clone());
        let clock = clock.or_insert(CheckClock { due: first, critical_since: None });
        let critical = check.status == DoubleStatus::Critical;
        clock.critical_since = critical.then(|| clock.critical_since.unwrap_or(now));
        let limit = check.plan.deregister_after.map(|after| after.max(deregister_min));
        let since = clock.critical_since.map(|since| now.duration_since(since));
        if limit.is_some_and(|limit| since.is_some_and(|since| since >= limit)) {
            due.removed.push(check.check_id.clone());
        } else if now >= clock.due && check.plan.ttl.is_some() {
            if !critical {
                due.expired.push(check.check_id.clone());
            }
        } else if now >= clock.due {
            clock.due = now + check.plan.interval;
            due.runs.push((check.check_id.clone(), check.plan.clone()));
        }
    }
    due
}

fn remove(state: &mut DoubleState, check: &str) {
    if let Some(key) = state.catalog.check(check).map(DoubleCheck::service_key) {
        state.catalog.remove_service(&key);
    }
}

async fn run(shared: Arc<DoubleShared>, id: String, plan: CheckPlan) {
    let result = match plan.http.is_empty() {
        true => tokio::time::timeout(plan.timeout, TcpStream::connect(&plan.tcp)).await.map(
            |connected| match connected {
                Ok(_) => (DoubleStatus::Passing, format!("TCP connect {}: Success", plan.tcp)),
                Err(error) => (DoubleStatus::Critical, error.to_string()),
            },
        ),
        false => {
            tokio::time::timeout(plan.timeout, get(&plan.http)).await.map(|answer| match answer {
                Ok(code @ 200..300) => (DoubleStatus::Passing, format!("HTTP GET: {code}")),
                Ok(429) => (DoubleStatus::Warning, "HTTP GET: 429".to_owned()),
                Ok(code) => (DoubleStatus::Critical, format!("HTTP GET: {code}")),
                Err(error) => (DoubleStatus::Critical, error.to_string()),
            })
        }
    };
    let (status, output) =
        result.unwrap_or_else(|_| (DoubleStatus::Critical, "timeout".to_owned()));
    shared.change(|state| state.catalog.set_status(&id, status, &output));
}

/// The status code of a GET.
async fn get(url: &str) -> std::io::Result<u16> {
    let rest = url.strip_prefix("http://").ok_or(std::io::ErrorKind::Unsupported)?;
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let mut stream = TcpStream::connect(host).await?;
    let path = if path.is_empty() { "/" } else { path };
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    // To its end: a close with unread data would reset the connection.
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await?;
    let code = answer.get(9..12).and_then(|code| std::str::from_utf8(code).ok()?.parse().ok());
    code.ok_or(std::io::ErrorKind::InvalidData.into())
}

// === impl CheckClocks ===

impl CheckClocks {
    /// A client reported: the TTL starts again.
    pub(super) fn reported(&mut self, id: &str) {
        self.forget(id);
    }

    /// The check begins as a new one.
    pub(super) fn forget(&mut self, id: &str) {
        self.0.remove(id);
    }
}

// === impl CheckPlan ===

impl CheckPlan {
    fn has_work(&self) -> bool {
        self.ttl.is_some() || !self.http.is_empty() || !self.tcp.is_empty()
    }

    /// Time to the first run, spread over the interval; or the TTL.
    fn first(&self) -> Duration {
        self.ttl.unwrap_or_else(|| self.interval.mul_f64(fastrand::f64()))
    }
}
