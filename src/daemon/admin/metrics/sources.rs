//! Metrics of member sources: the last word of each source, the age and the members of its
//! view, and its answers.
//!
//! Called by the metrics renderer. Pure. The label `source` is the kind of a `discover`
//! table, or the name of the backend whose address is a name.

use super::encoder::{Encoder, Family, counter, gauge};
use crate::admin::snapshot::AdminSnapshot;
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_core::control::{PoolStatus, SourceStatus};
use tidegate_core::discovery::SourceFailure;
use tidegate_discovery::resolver::QuestionResult;
use tidegate_discovery::tasks::TaskKind;
use tidegate_discovery::tell::SourceCounters;

#[rustfmt::skip]
mod families {
    use super::{Family, counter, gauge};

    pub(super) const UP: Family = gauge("tidegate_discovery_up", "1 if the last word of the member source was an answer, else 0.");
    pub(super) const AGE: Family = gauge("tidegate_discovery_view_age_seconds", "Time since the last complete answer or sign of life of the member source.");
    pub(super) const BACKENDS: Family = gauge("tidegate_discovery_backends", "Backends of the member source, by state: announced in its last answer, held although the answer lacks them, or refused by a guard.");
    pub(super) const ANSWERS: Family = counter("tidegate_discovery_answers_total", "Answers of the member source, by result.");
    pub(super) const FAILURES: Family = counter("tidegate_discovery_failures_total", "Failures of the member source, by reason.");
    pub(super) const RESTARTS: Family = counter("tidegate_discovery_watch_restarts_total", "Watches of the member source that began again.");
    pub(super) const RELISTS: Family = counter("tidegate_discovery_relists_total", "Complete lists of the member source after the first.");
    pub(super) const PANICS: Family = counter("tidegate_discovery_panics_total", "Panics of tasks of the member sources, by kind of task.");
    pub(super) const THREAD_RESTARTS: Family = counter("tidegate_discovery_thread_restarts_total", "Restarts of the thread of the member sources after a panic.");
    pub(super) const LOOKUPS: Family = counter("tidegate_resolver_lookups_total", "Lookups of names for which DNS servers were asked.");
    pub(super) const QUESTIONS: Family = counter("tidegate_resolver_questions_total", "Questions sent to DNS servers, by transport.");
    pub(super) const DNS_ANSWERS: Family = counter("tidegate_resolver_answers_total", "Answers of DNS servers and missing answers, by result.");
    pub(super) const UNANSWERED: Family = counter("tidegate_resolver_unanswered_total", "Questions that no DNS server answered.");
    pub(super) const CACHED: Family = gauge("tidegate_resolver_cache_questions", "Questions in the cache of the resolver, one per name and record type.");
    pub(super) const IGNORED: Family = counter("tidegate_members_ignored_total", "Members of sources that were ignored, by reason.");
}

/// Renders all member sources. Nothing is written without one.
pub(super) fn render(out: &mut Encoder, snapshot: &AdminSnapshot) {
    if snapshot.control.pools.iter().all(|pool| pool.sources.is_empty()) {
        return;
    }
    gauges(out, snapshot);
    answers(out, snapshot);
    counters(out, snapshot);
    tasks(out, snapshot);
    resolver(out, snapshot);
    let mut samples = out.family(&families::IGNORED);
    for (why, count) in &snapshot.ignored_members {
        samples.count(&[("reason", why.name())], *count);
    }
}

fn all(snapshot: &AdminSnapshot) -> impl Iterator<Item = (&PoolStatus, &SourceStatus)> {
    let pools = snapshot.control.pools.iter();
    pools.flat_map(|pool| pool.sources.iter().map(move |source| (pool, source)))
}

fn label(source: &SourceStatus) -> &str {
    source.key.backend.as_deref().unwrap_or(&source.label)
}

fn gauges(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let mut samples = out.family(&families::UP);
    for (pool, source) in all(snapshot) {
        let up = source.view.last_word.as_ref().is_some_and(|word| word.failure.is_none());
        samples.count(&[("pool", &pool.name), ("source", label(source))], up.into());
    }
    let mut samples = out.family(&families::AGE);
    for (pool, source) in all(snapshot) {
        if let Some(age) = source.view.confirmed {
            let labels = [("pool", &*pool.name), ("source", label(source))];
            samples.value(&labels, age.as_secs_f64());
        }
    }
    let mut samples = out.family(&families::BACKENDS);
    for (pool, source) in all(snapshot) {
        let refused = source.view.refused;
        let refused = refused.addresses + refused.too_many + refused.duplicate + refused.unreadable;
        let states = [
            ("announced", source.view.announced),
            ("held", source.view.held),
            ("refused", refused),
        ];
        for (state, count) in states {
            let labels = [("pool", &*pool.name), ("source", label(source)), ("state", state)];
            samples.count(&labels, count.into());
        }
    }
}

fn answers(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let mut samples = out.family(&families::ANSWERS);
    for (pool, source) in all(snapshot) {
        let counts = source.view.answers;
        let results = [
            ("changed", counts.changed),
            ("same", counts.same),
            ("held", counts.held),
            ("refused", counts.refused),
            ("failed", counts.failed),
        ];
        for (result, count) in results {
            let labels = [("pool", &*pool.name), ("source", label(source)), ("result", result)];
            samples.count(&labels, count);
        }
    }
}

type ReadCounter = fn(&SourceCounters) -> &AtomicU64;

fn counters(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let counted = |source: &SourceStatus| snapshot.source_counters.get(&source.key);
    let mut samples = out.family(&families::FAILURES);
    for (pool, source) in all(snapshot) {
        let Some(counters) = counted(source) else { continue };
        for why in SourceFailure::ALL {
            let labels = [("pool", &*pool.name), ("source", label(source)), ("reason", why.name())];
            samples.count(&labels, counters.failures(why));
        }
    }
    let read: [(&Family, ReadCounter); 2] =
        [(&families::RESTARTS, |c| &c.watch_restarts), (&families::RELISTS, |c| &c.relists)];
    for (family, of) in read {
        let mut samples = out.family(family);
        for (pool, source) in all(snapshot) {
            let Some(counters) = counted(source) else { continue };
            let labels = [("pool", &*pool.name), ("source", label(source))];
            samples.count(&labels, of(counters).load(Ordering::Relaxed));
        }
    }
}

fn tasks(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let mut samples = out.family(&families::PANICS);
    for kind in TaskKind::ALL {
        samples.count(&[("task", kind.name())], kind.panics());
    }
    out.family(&families::THREAD_RESTARTS).count(&[], snapshot.source_restarts);
}

fn resolver(out: &mut Encoder, snapshot: &AdminSnapshot) {
    let Some(resolver) = &snapshot.resolver else { return };
    let counters = resolver.counters();
    let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    out.family(&families::LOOKUPS).count(&[], of(&counters.lookups));
    let mut samples = out.family(&families::QUESTIONS);
    for (transport, counter) in [("udp", &counters.questions), ("tcp", &counters.over_tcp)] {
        samples.count(&[("transport", transport)], of(counter));
    }
    let mut samples = out.family(&families::DNS_ANSWERS);
    for result in QuestionResult::ALL {
        samples.count(&[("result", result.name())], counters.results(result));
    }
    out.family(&families::UNANSWERED).count(&[], of(&counters.failures));
    out.family(&families::CACHED).count(&[], resolver.cached() as u64);
}
