//! Explanations in the demo: of a backend that is down, of a session that was retried, and of
//! the next pick.
//!
//! Run by `show` after a backend was killed. It compares each explanation with what the
//! demo's own clients measured, and records failed checks.

use super::place::NAME;
use super::screen::OutputClosed;
use super::show::{DemoScript, MEASURES_MAX};
use super::traffic::{RequestCounts, request};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tidegate_api::decision::{DecisionDoc, ForecastDocument, SessionExplanation};
use tidegate_api::names::{FailureName, SkipReasonName, WhyName};
use tidegate_net::clock;
use tokio::time::sleep;

/// Maximum time until the line of a session is in the access log.
const LOGGED_MAX: Duration = Duration::from_millis(500);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Address of the demo's clients.
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The fields of an access-log line that the demo uses.
#[derive(Debug, Deserialize)]
pub(crate) struct LoggedSession {
    session: u64,
    client: String,
    pub(crate) backend: Option<String>,
    pub(crate) cause: String,
    pub(crate) phase: String,
    pub(crate) code: String,
    tries: Vec<LoggedTry>,
}

/// A failed connect attempt of an access-log line.
#[derive(Debug, Deserialize)]
struct LoggedTry {
    backend: String,
    failure: FailureName,
}

// === impl DemoScript ===

impl DemoScript<'_> {
    /// Prints what `tidegate explain` reports for a backend that is down, for a session that
    /// was retried because of it, and for the next client.
    pub(crate) async fn explain(
        &self,
        name: &str,
        tally: &RequestCounts,
        retried: u64,
    ) -> Result<(), OutputClosed> {
        self.explain_backend(name).await?;
        if retried > 0 {
            self.explain_session(name, tally).await?;
        }
        self.explain_next(name).await
    }

    async fn explain_backend(&self, name: &str) -> Result<(), OutputClosed> {
        let facts = match self.balancer.explained(name).await {
            Ok(facts) => facts,
            Err(error) => {
                self.broken(format!("cannot explain {name}: {error}"));
                return Ok(());
            }
        };
        let why = &facts.why;
        self.say(&format!("`tidegate explain` on {name}: {why}"))?;
        if !facts.eligible && why.contains("down") && why.contains("failed") {
            self.sum_up(&format!("explained while down: {name}: {why}"));
        } else {
            self.broken(format!("wrong explanation of {name}, which is down: {why}"));
        }
        Ok(())
    }

    /// Explains a session that was refused by `name` first.
    async fn explain_session(&self, name: &str, tally: &RequestCounts) -> Result<(), OutputClosed> {
        let retried =
            |one: &LoggedSession| one.is_refused_by(name) && tally.served_by(&one.client).is_some();
        let Some(logged) = self.logged_session(retried).await else {
            self.broken("no retried session is in the access log".to_owned());
            return Ok(());
        };
        let number = logged.session;
        let told = match self.balancer.explained_session(number).await {
            Ok(told) => told,
            Err(error) => {
                self.broken(format!("cannot explain session {number}: {error}"));
                return Ok(());
            }
        };
        let attempts: Vec<String> = told.decisions.iter().map(attempt).collect();
        self.say(&format!("`tidegate explain --session {number}`: {}", attempts.join(" ")))?;
        let measured = tally.served_by(&logged.client).unwrap_or("-");
        if is_retry(&told, name, measured) && told.client == logged.client {
            self.say(&format!("the client of session {number} was answered by {measured}"))?;
            self.sum_up(&format!("explained session {number}: {name} refused, {measured} served"));
        } else {
            self.broken(format!(
                "wrong explanation of session {number}, which {measured} served: {told:?}"
            ));
        }
        Ok(())
    }

    /// Forecasts the pick for the next client, and sends that client.
    async fn explain_next(&self, down: &str) -> Result<(), OutputClosed> {
        for _ in 0..MEASURES_MAX {
            let before = self.seen().await;
            let told = match self.balancer.forecast(CLIENT).await {
                Ok(told) => told,
                Err(error) => {
                    self.broken(format!("cannot forecast the next pick: {error}"));
                    return Ok(());
                }
            };
            let answer = request(self.balancer.frontend).await;
            let after = self.seen().await;
            let alone = after.sessions.saturating_sub(before.sessions) <= 1;
            if before.serial == after.serial && alone {
                return self.judge_next(down, &told, answer.map_err(|error| error.to_string()));
            }
        }
        self.broken("the next pick could not be measured without interference".to_owned());
        Ok(())
    }

    fn judge_next(
        &self,
        down: &str,
        told: &ForecastDocument,
        answer: Result<(String, String), String>,
    ) -> Result<(), OutputClosed> {
        let forecast = told.pick.as_ref().map_or("no backend", |pick| &pick.backend.backend);
        let skipped = told.pool.iter().flat_map(|pool| &pool.skipped);
        let skips = skipped
            .filter(|one| one.backend.backend == down && one.reason == SkipReasonName::Down)
            .count();
        let name = answer.map_or_else(|error| error, |(_, name)| name);
        self.say(&format!(
            "`tidegate explain --client {CLIENT} --frontend {NAME}`: {forecast} is next, {down} is \
             skipped. The next client was answered by {name}"
        ))?;
        let certain = told.pick.as_ref().is_some_and(|pick| pick.certain);
        if skips == 1 && certain && forecast == name {
            self.sum_up(&format!("forecast: the next client goes to {forecast}, and it did"));
        } else {
            self.broken(format!("wrong forecast, {name} answered: {told:?}"));
        }
        Ok(())
    }

    /// Returns the first line of the access log that `matches`.
    pub(crate) async fn logged_session(
        &self,
        matches: impl Fn(&LoggedSession) -> bool,
    ) -> Option<LoggedSession> {
        let deadline = clock::now() + LOGGED_MAX;
        while clock::now() < deadline {
            let text = std::fs::read_to_string(self.place.access_log()).unwrap_or_default();
            // The last line can be incomplete.
            let mut lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
            if let Some(found) = lines.find(&matches) {
                return Some(found);
            }
            sleep(POLL_INTERVAL).await;
        }
        None
    }
}

// === impl LoggedSession ===

impl LoggedSession {
    pub(crate) fn is_of(&self, client: &str) -> bool {
        self.client == client
    }

    /// Whether its only failed attempt was refused by that backend.
    fn is_refused_by(&self, name: &str) -> bool {
        let [only] = &*self.tries else { return false };
        only.backend == name && only.failure == FailureName::Refused
    }
}

/// Describes a connect attempt as a sentence.
fn attempt(decision: &DecisionDoc) -> String {
    let DecisionDoc { attempt, why, .. } = decision;
    let name = decision.backend.as_ref().map_or("no backend", |one| &one.backend);
    let millis = |seconds: Option<f64>| format!("{:.2} ms", seconds.unwrap_or(0.0) * 1e3);
    match &decision.failure {
        Some(failure) => {
            let after = millis(decision.failed_after_seconds);
            format!("Attempt {attempt}: {name} ({why}) failed after {after}: {failure}.")
        }
        None => {
            let after = millis(decision.connect_seconds);
            format!("Attempt {attempt}: {name} ({why}) connected after {after}.")
        }
    }
}

/// Whether `first` refused the session, and `last` served it as a retry.
fn is_retry(told: &SessionExplanation, first: &str, last: &str) -> bool {
    let is = |decision: &DecisionDoc, name: &str| {
        decision.backend.as_ref().is_some_and(|backend| backend.backend == name)
    };
    let [one, other] = &*told.decisions else { return false };
    is(one, first)
        && one.failure == Some(FailureName::Refused)
        && is(other, last)
        && other.why == WhyName::Retry
        && other.failure.is_none()
}
