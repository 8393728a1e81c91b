//! Collects the facts for the findings of `core::finding`, and writes the findings.
//!
//! Called by `status` and `stream` on a thread of rendering. It reads no clock.

use super::snapshot::AdminSnapshot;
use super::status::millis;
use std::sync::Arc;
use std::time::Duration;
use tidegate_api::events::EventDoc;
use tidegate_api::names::{EventKindName, EventLevelName};
use tidegate_api::status::FindingDoc;
use tidegate_core::finding::{Finding, FindingFacts, LEAD_WITHIN, LeadEvent, RefusedRate, find};
use tidegate_core::metrics::counters::WorkerCounters;
use tidegate_core::outcome::RefusedReason;
use tidegate_core::traffic::TrafficHistory;

/// Characters of an event that a finding quotes.
const EVENT_MAX: usize = 120;

/// Returns what is wrong, worst first.
pub(super) fn found(snapshot: &AdminSnapshot, traffic: &TrafficHistory) -> Vec<FindingDoc> {
    let refused: Vec<RefusedRate> = snapshot
        .control
        .frontends
        .iter()
        .flat_map(|frontend| refused(&frontend.state.name, traffic))
        .collect();
    let lead = |since: Duration| lead(snapshot, since);
    let facts = FindingFacts {
        control: &snapshot.control,
        now: snapshot.now,
        queued: &snapshot.queued,
        refused: &refused,
        connections: (snapshot.connections_active, snapshot.connections_max),
        rejected_reload: rejected_reload(snapshot),
        warnings: warnings(snapshot),
        lead: &lead,
    };
    find(&facts).into_iter().map(document).collect()
}

/// Returns the rejected clients of a frontend by reason; only those with a rate.
pub(super) fn refused(frontend: &Arc<str>, traffic: &TrafficHistory) -> Vec<RefusedRate> {
    let rates = traffic.refused(frontend).into_iter().zip(RefusedReason::ALL);
    // A rate halves in 7 s. Below this value it is the rest of an old one.
    let rates = rates.filter(|(rate, _)| *rate >= 0.05);
    let of = |(rate, reason): (f64, RefusedReason)| RefusedRate {
        frontend: Arc::clone(frontend),
        reason: reason.name(),
        text: in_words(reason),
        rate,
    };
    rates.map(of).collect()
}

fn in_words(reason: RefusedReason) -> &'static str {
    match reason {
        RefusedReason::NoBackend => "no backend is eligible",
        RefusedReason::LocalResource => "this host is out of descriptors, memory or ports",
        RefusedReason::QueueTimeout => "no backend slot became free within the queue timeout",
        RefusedReason::ConnectFailed => "every connect attempt failed",
        RefusedReason::Denied => "`sources` or `proxy_protocol` deny the client address",
        RefusedReason::SourceConnections => "a client source reached its connection limit",
        RefusedReason::SourceRate => "a client source exceeded its rate limit",
        RefusedReason::Route => "a route rejects the connection",
        RefusedReason::ProxyHeaderMissing => "a peer sent no PROXY header",
        RefusedReason::ProxyHeaderMalformed => "a peer sent an invalid PROXY header",
        RefusedReason::ProxyHeaderTimeout => "a PROXY header was incomplete at its timeout",
        RefusedReason::ProxyHeaderCrc => "the checksum of a PROXY header was wrong",
    }
}

fn warnings(snapshot: &AdminSnapshot) -> Vec<String> {
    let stalled = |(worker, counters): (usize, &Arc<WorkerCounters>)| {
        let stalled = counters.pulse.stalled_for()?;
        Some(format!("worker {worker} has made no progress for {:.0} s", stalled.as_secs_f64()))
    };
    let stalled = snapshot.workers.iter().enumerate().filter_map(stalled);
    snapshot.warnings.iter().chain(&snapshot.other_warnings).cloned().chain(stalled).collect()
}

/// The newest event of the configuration is a rejected reload, if the last one was rejected.
fn rejected_reload(snapshot: &AdminSnapshot) -> Option<(String, Duration)> {
    let of_config = |event: &EventDoc| event.kind == EventKindName::Config;
    let newest = snapshot.event_log.newest(0.0, f64::INFINITY, of_config)?;
    let since = Duration::try_from_secs_f64(snapshot.wall - newest.at).unwrap_or_default();
    (newest.level == EventLevelName::Bad).then(|| (newest.text.clone(), since))
}

/// Returns the newest event that can be the cause of a problem of this age.
fn lead(snapshot: &AdminSnapshot, since: Duration) -> Option<LeadEvent> {
    let began = snapshot.wall - since.as_secs_f64();
    let event = snapshot.event_log.newest(began - LEAD_WITHIN.as_secs_f64(), began, |event| {
        matches!(
            event.kind,
            EventKindName::Config | EventKindName::Operator | EventKindName::Process
        )
    })?;
    let text = match (&event.kind, &*event.who) {
        (EventKindName::Config, "") => event.subject.clone(),
        (EventKindName::Config, who) => format!("{} by {who}", event.subject),
        _ => {
            let text: String = event.text.chars().take(EVENT_MAX).collect();
            format!("the event \"{}: {text}\"", event.subject)
        }
    };
    Some(LeadEvent { text, before: Duration::from_secs_f64((began - event.at).max(0.0)) })
}

fn document(finding: Finding) -> FindingDoc {
    FindingDoc {
        kind: finding.kind.name().to_owned(),
        severity: finding.severity as u8,
        state: finding.state.map(|state| state.name().to_owned()),
        short: finding.short,
        title: finding.title,
        why: finding.why,
        effect: finding.effect,
        since_seconds: finding.since.map(millis),
        pool: finding.pool.map(|pool| pool.to_string()),
        backend: finding.backend.map(|backend| backend.to_string()),
        backends: finding.backends as u64,
    }
}
