//! `tidegate explain --client`: what would happen to a new connection now.
//!
//! Called by `explain`. It prints the document's facts and computes nothing.

use super::sentences::{PickedTier, Tense, backend, name, number, skipped, why};
use super::short;
use crate::table::{cell_text, plural};
use std::fmt::Write;
use std::net::SocketAddr;
use tidegate_api::decision::{
    AdmissionDoc, AssumedDoc, FiguresDoc, ForecastDocument, PickDoc, PoolStepDoc, RefusalDoc,
    RouteDoc, SkippedDoc, SourceUsageDoc,
};
use tidegate_api::names::{
    CauseName, PolicyName, RouteConditionName, SkipReasonName, WaitName, WhyName,
};
use tidegate_api::status::TierShareDoc;

/// Shares that the text names; it counts the others.
const SHARES_SHOWN: usize = 8;

pub(super) fn render(forecast: &ForecastDocument) -> String {
    let mut text = format!("{}\n", headline(forecast));
    if !forecast.assumed.is_empty() {
        let _ = writeln!(text, "{}", assumed(forecast));
    }
    text.push('\n');
    let mut steps = vec![("may connect", admission(&forecast.admission, forecast))];
    steps.extend(forecast.route.as_ref().map(|one| ("route", route(one, forecast))));
    steps.extend(forecast.pool.as_ref().map(|pool| ("pool", pool_step(pool))));
    if let Some(pick) = &forecast.pick {
        let policy = forecast.pool.as_ref().map(|pool| &pool.policy);
        steps.push(("pick", pick_step(pick, policy)));
        steps.push(("if it fails", retries(pick, forecast.pool.as_ref())));
    }
    if let Some(refusal) = &forecast.refusal {
        steps.push(("result", refusal_step(refusal)));
    }
    for (place, (label, what)) in steps.iter().enumerate() {
        let _ = writeln!(text, "{} {label:<11}  {what}", place + 1);
    }
    text
}

/// Returns the first line: where the client would go.
fn headline(forecast: &ForecastDocument) -> String {
    let client = client(forecast.client);
    let start = format!("{client} on {}", cell_text(&forecast.frontend));
    if let Some(pick) = &forecast.pick {
        let several = forecast.pool.as_ref().is_some_and(|pool| pool.candidates > 1);
        let how = match (&pick.figures, pick.certain) {
            (FiguresDoc::Turn { .. }, true) if several => {
                "if no other session comes first".to_owned()
            }
            (_, true) => "certain".to_owned(),
            (_, false) => {
                let share = pick.shares.first().map_or(0.0, |share| share.percent);
                format!("most likely ({share}%)")
            }
        };
        return format!("{start} would go to {}, {how}.", backend(&pick.backend));
    }
    match &forecast.refusal {
        Some(RefusalDoc {
            waits_for: Some(WaitName::ListenQueue | WaitName::FrontendCap | WaitName::ProcessCap),
            ..
        }) => format!("{start} would wait in the listen queue."),
        Some(RefusalDoc { waits_for: Some(_), waits_seconds, .. }) => {
            format!("{start} would wait for a backend, at most {}.", short(*waits_seconds))
        }
        Some(refusal) => format!("{start} would be reset: {}.", cause(&refusal.cause)),
        None => format!("{start} would get no backend."),
    }
}

/// Returns the client without the port that the question did not name.
fn client(client: SocketAddr) -> String {
    if client.port() == 0 { client.ip().to_string() } else { client.to_string() }
}

fn assumed(forecast: &ForecastDocument) -> String {
    let one = |assumed: &AssumedDoc| {
        let backend = format!("{}/{}", cell_text(&assumed.pool), cell_text(&assumed.backend));
        match assumed.weight {
            None => format!("without {backend}"),
            Some(weight) => format!("{backend} with weight {weight}"),
        }
    };
    let list: Vec<_> = forecast.assumed.iter().map(one).collect();
    let mut text = format!("Assumed: {}.", list.join(", "));
    let unchanged = forecast.pick.as_ref().and_then(|pick| pick.unchanged.as_ref());
    let concerned = forecast
        .pool
        .as_ref()
        .is_some_and(|pool| forecast.assumed.iter().any(|assumed| assumed.pool == pool.name));
    match (unchanged, &forecast.pool) {
        (Some(other), _) => {
            let _ = write!(text, " Without these changes: {}.", backend(other));
        }
        (None, Some(pool)) if !concerned => {
            let _ = write!(text, " They do not concern pool {}.", cell_text(&pool.name));
        }
        _ => {}
    }
    text
}

fn admission(admission: &AdmissionDoc, forecast: &ForecastDocument) -> String {
    let mut text = match &admission.rule {
        Some(rule) if rule.allows => format!("Yes: {} allows it.", cell_text(&rule.range)),
        Some(rule) => format!("No: {} denies it.", cell_text(&rule.range)),
        None if !admission.has_rules => "Yes: every client may connect.".to_owned(),
        None if is_denied(forecast) => "No: no range of `allow` contains it.".to_owned(),
        None => "Yes: no range of `deny` contains it.".to_owned(),
    };
    if let Some(source) = &admission.source {
        let _ = write!(text, " {}", source_usage(source));
    }
    if admission.connections_max > 0 {
        let max = u64::from(admission.connections_max);
        let (open, max_text) = (number(u64::from(admission.sessions)), number(max));
        let _ = write!(text, " The frontend has {open} of {max_text} sessions.");
        if u64::from(admission.sessions) >= max {
            text.push_str(" New clients wait in the listen queue.");
        }
    }
    text
}

fn is_denied(forecast: &ForecastDocument) -> bool {
    forecast.refusal.as_ref().is_some_and(|refusal| refusal.cause == CauseName::Denied)
}

fn source_usage(usage: &SourceUsageDoc) -> String {
    let source = cell_text(&usage.source);
    let open = plural(usage.connections, "connection");
    let mut text = match usage.connections_max {
        0 => format!("{source} has {open}"),
        max => format!("{source} has {open} of {}", number(u64::from(max))),
    };
    if let Some(rate) = &usage.rate {
        let _ = write!(text, ", rate limit {}", cell_text(rate));
    }
    text.push_str(if usage.exceeded { ": a limit is exceeded." } else { "." });
    text
}

fn route(route: &RouteDoc, forecast: &ForecastDocument) -> String {
    let mut text = match (route.position, route.routes) {
        (_, 0) => "The frontend's pool: there are no routes.".to_owned(),
        (Some(position), routes) => format!("Route {position} of {routes} matches."),
        (None, routes) => {
            let routes = plural(routes, "route");
            format!("The frontend's pool: none of {routes} matches.")
        }
    };
    let local = forecast.local;
    for mismatch in &route.mismatches {
        let values = cell_text(&mismatch.values);
        let seen = match &mismatch.condition {
            RouteConditionName::Ports => format!("port {} is not {values}", local.port()),
            RouteConditionName::Addresses => format!("{} is not in {values}", local.ip()),
            RouteConditionName::Sources => format!("{} is not in {values}", forecast.client.ip()),
            RouteConditionName::Other(other) => format!("{} is not {values}", cell_text(other)),
        };
        let _ = write!(text, " Route {} does not match: {seen}.", mismatch.position);
    }
    text
}

fn pool_step(pool: &PoolStepDoc) -> String {
    let candidates = plural(pool.candidates, "backend");
    let mut text = format!("{}: {} over {candidates}.", cell_text(&pool.name), pool.policy);
    if let shares @ [_, _, ..] = &*pool.tier_shares {
        let share = |one: &TierShareDoc| format!("tier {} {}%", one.tier, one.percent);
        let shares: Vec<String> = shares.iter().map(share).collect();
        let _ = write!(text, " Shares of the tiers: {}.", shares.join(", "));
    }
    if let Some(passed) = skipped(&pool.skipped, pool.skipped_total) {
        let _ = write!(text, " Not available: {passed}.");
    }
    if pool.queued > 0 {
        let _ = write!(text, " {} in its queue first.", plural(pool.queued, "client"));
    }
    text
}

fn pick_step(pick: &PickDoc, policy: Option<&PolicyName>) -> String {
    let tier = PickedTier { tier: pick.tier, spills: pick.spills };
    let reason = why(&pick.why, policy, &pick.figures, None, tier, Tense::Present);
    let mut text = format!("{} {reason}.", name(&pick.backend));
    if pick.shares.len() > 1 {
        let share = |share: &tidegate_api::decision::ShareDoc| {
            format!("{} {}%", name(&share.backend), share.percent)
        };
        let mut list: Vec<_> = pick.shares.iter().take(SHARES_SHOWN).map(share).collect();
        let more = pick.shares.len().saturating_sub(SHARES_SHOWN);
        if more > 0 {
            list.push(format!("{more} more"));
        }
        let draws = number(u64::from(pick.draws));
        let _ = write!(text, " Shares in {draws} draws: {}.", list.join(", "));
    }
    text
}

fn retries(pick: &PickDoc, pool: Option<&PoolStepDoc>) -> String {
    let within = short(pick.connect_timeout_seconds);
    let attempts = plural(pick.attempts_max, "attempt");
    let mut text = match &*pick.retries {
        [] if pick.attempts_max < 2 => {
            return format!("The connect timeout is {within}. There is no retry.");
        }
        // No draw decides the retries of a hash, so an empty list means that none is free.
        [] if pick.why == WhyName::Only || matches!(pick.figures, FiguresDoc::Slot { .. }) => {
            let full = |one: &SkippedDoc| one.reason == SkipReasonName::AtCap;
            match pool.is_some_and(|pool| pool.skipped.iter().any(full)) {
                true => "The client waits for a slot of another backend, at most queue_timeout.",
                false => "No other backend can be picked now.",
            }
            .to_owned()
        }
        [] => "Another backend is tried.".to_owned(),
        [first, rest @ ..] => {
            let then = rest.iter().map(|one| format!(", then {}", name(one)));
            format!("{} is tried{}.", name(first), then.collect::<String>())
        }
    };
    let _ = write!(text, " At most {attempts}, each of at most {within}.");
    text
}

fn refusal_step(refusal: &RefusalDoc) -> String {
    let RefusalDoc { cause: name, phase, waits_for, waits_seconds } = refusal;
    let log = format!("The access log has cause {name}, phase {phase}.");
    let within = short(*waits_seconds);
    match waits_for {
        None => format!("The client is reset at once: {}. {log}", cause(name)),
        Some(WaitName::ListenQueue) => listen_queue(
            "No backend is free, and the queue of the pool is full or off (queue_max).",
        ),
        Some(WaitName::FrontendCap) => {
            listen_queue("The frontend is at its cap (connections_max).")
        }
        Some(WaitName::ProcessCap) => {
            listen_queue("The process is at its cap (process.connections_max).")
        }
        Some(WaitName::AtCap) => format!(
            "All backends are at their caps. The client waits for a slot, and is reset after \
             {within}. {log}"
        ),
        Some(WaitName::NoVerdict) => format!(
            "No backend has a probe result or heartbeat yet. The client waits for the first, and \
             is reset after {within}. {log}"
        ),
        Some(WaitName::NoneEligible) => format!(
            "No backend is eligible (when_none_eligible = \"wait\"). The client waits for one, and \
             is reset after {within}. {log}"
        ),
        Some(WaitName::Other(other)) => {
            format!("The client waits ({}), and is reset after {within}. {log}", cell_text(other))
        }
    }
}

fn listen_queue(reason: &str) -> String {
    format!(
        "{reason} The client waits in the listen queue, without a timeout, until it is accepted."
    )
}

/// Returns why a client gets no backend.
fn cause(cause: &CauseName) -> String {
    match cause {
        CauseName::Denied => "its address is denied".to_owned(),
        CauseName::SourceConnections => "its client source has too many connections".to_owned(),
        CauseName::SourceRate => "its client source exceeds the rate limit".to_owned(),
        CauseName::Route => "the route rejects it".to_owned(),
        CauseName::NoBackend => "no backend is eligible".to_owned(),
        other => cell_text(other.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::wrap;
    use expect_test::expect;

    const EXAMPLE: &str = r#"{
        "frontend": "web", "client": "10.1.2.3:0", "local": "0.0.0.0:443", "table": 9,
        "assumed": [],
        "admission": {
            "allowed": true, "rule": {"allows": true, "range": "10.0.0.0/8"}, "has_rules": true,
            "source": {"source": "10.1.2.0/24", "connections": 3, "connections_max": 20,
                "rate": "10/s", "exceeded": false},
            "sessions": 7, "connections_max": 5000
        },
        "route": {"position": 2, "routes": 4, "mismatches": [
            {"position": 1, "condition": "sources", "values": "10.2.0.0/16"}]},
        "pool": {"name": "shop", "policy": "source-hash", "candidates": 3, "queued": 0,
            "skipped": [{"pool": "shop", "backend": "d", "address": "10.0.0.14:443",
                "reason": "down", "seconds": 41}], "skipped_total": 1},
        "pick": {
            "backend": {"pool": "shop", "backend": "b", "address": "10.0.0.12:443"},
            "certain": true, "why": "hash",
            "figures": {"kind": "slot", "slot": 40210, "slots": 65537, "alternative": 0},
            "shares": [], "draws": 0, "unchanged": null,
            "retries": [
                {"pool": "shop", "backend": "a", "address": "10.0.0.11:443"},
                {"pool": "shop", "backend": "c", "address": "10.0.0.13:443"}],
            "attempts_max": 3, "connect_timeout_seconds": 5.0
        },
        "refusal": null
    }"#;

    fn example() -> ForecastDocument {
        serde_json::from_str(EXAMPLE).expect("the document")
    }

    fn shown(forecast: &ForecastDocument) -> String {
        let text = wrap(&render(forecast), Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        text
    }

    fn refused(cause: &str, phase: &str, waits_for: Option<&str>) -> Option<RefusalDoc> {
        Some(RefusalDoc {
            cause: cause.into(),
            phase: phase.into(),
            waits_for: waits_for.map(WaitName::from),
            waits_seconds: if waits_for.is_some() { 5.0 } else { 0.0 },
        })
    }

    #[test]
    fn certain_pick_reads_as_numbered_steps() {
        expect![[r#"
            10.1.2.3 on web would go to shop/b (10.0.0.12:443), certain.

            1 may connect  Yes: 10.0.0.0/8 allows it. 10.1.2.0/24 has 3 connections of 20,
                           rate limit 10/s. The frontend has 7 of 5,000 sessions.
            2 route        Route 2 of 4 matches. Route 1 does not match: 10.1.2.3 is not in
                           10.2.0.0/16.
            3 pool         shop: source-hash over 3 backends. Not available: shop/d (down
                           for 41 s).
            4 pick         shop/b is chosen by the hash of the client's address (slot 40,211
                           of 65,537).
            5 if it fails  shop/a is tried, then shop/c. At most 3 attempts, each of at most
                           5 s."#]]
        .assert_eq(&shown(&example()));
    }

    #[test]
    fn draws_show_shares_and_assumptions() {
        let mut forecast = example();
        forecast.assumed = vec![
            AssumedDoc { pool: "shop".into(), backend: "d".into(), weight: None },
            AssumedDoc { pool: "shop".into(), backend: "a".into(), weight: Some(5) },
        ];
        forecast.admission.rule = None;
        let pick = forecast.pick.as_mut().expect("a pick");
        let other = pick.retries[0].clone();
        pick.certain = false;
        pick.why = "draw".into();
        pick.figures = FiguresDoc::Share { weight: 3.0, total: 5.0 };
        pick.draws = 100_000;
        let share = |backend: &tidegate_api::decision::BackendRefDoc, percent| {
            tidegate_api::decision::ShareDoc { backend: backend.clone(), percent }
        };
        pick.shares = vec![share(&pick.backend, 60.1), share(&other, 39.9)];
        (pick.unchanged, pick.retries) = (Some(other), Vec::new());
        expect![[r#"
            10.1.2.3 on web would go to shop/b (10.0.0.12:443), most likely (60.1%).
            Assumed: without shop/d, shop/a with weight 5. Without these changes: shop/a
                (10.0.0.11:443).

            1 may connect  Yes: no range of `deny` contains it. 10.1.2.0/24 has 3
                           connections of 20, rate limit 10/s. The frontend has 7 of 5,000
                           sessions.
            2 route        Route 2 of 4 matches. Route 1 does not match: 10.1.2.3 is not in
                           10.2.0.0/16.
            3 pool         shop: source-hash over 3 backends. Not available: shop/d (down
                           for 41 s).
            4 pick         shop/b is drawn at random (weight 3 of 5: 60.0%). Shares in
                           100,000 draws: shop/b 60.1%, shop/a 39.9%.
            5 if it fails  Another backend is tried. At most 3 attempts, each of at most 5
                           s."#]]
        .assert_eq(&shown(&forecast));
    }

    #[test]
    fn retry_waits_for_a_slot_if_the_other_backends_are_at_their_caps() {
        let mut forecast = example();
        let (pick, pool) = (forecast.pick.as_mut().expect("a pick"), forecast.pool.as_mut());
        (pick.why, pick.figures, pick.retries) = (WhyName::Only, FiguresDoc::None, Vec::new());
        pool.expect("a pool").skipped[0].reason = SkipReasonName::AtCap;
        let shown = render(&forecast);
        let last = shown.lines().last();
        expect![[r#"
            Some(
                "5 if it fails  The client waits for a slot of another backend, at most queue_timeout. At most 3 attempts, each of at most 5 s.",
            )
        "#]]
        .assert_debug_eq(&last);
        forecast.pool.as_mut().expect("a pool").skipped.clear();
        assert!(render(&forecast).contains("No other backend can be picked now. At most 3"));
    }

    #[test]
    fn each_refusal_says_what_the_client_sees() {
        let mut forecast = example();
        forecast.pick = None;
        let mut text = String::new();
        for (cause, phase, waits) in [
            ("denied", "admit", None),
            ("source-connections", "admit", None),
            ("source-rate", "admit", None),
            ("route", "admit", None),
            ("no-backend", "admit", None),
            ("queue-timeout", "queue", Some("at-cap")),
            ("queue-timeout", "queue", Some("listen-queue")),
            ("queue-timeout", "queue", Some("frontend-cap")),
            ("queue-timeout", "queue", Some("process-cap")),
            ("queue-timeout", "queue", Some("no-verdict")),
        ] {
            forecast.refusal = refused(cause, phase, waits);
            let shown = render(&forecast);
            let lines = [shown.lines().next(), shown.lines().last()];
            let _ = writeln!(text, "{}\n{}", lines[0].unwrap_or(""), lines[1].unwrap_or(""));
        }
        expect![[r#"
            10.1.2.3 on web would be reset: its address is denied.
            4 result       The client is reset at once: its address is denied. The access log has cause denied, phase admit.
            10.1.2.3 on web would be reset: its client source has too many connections.
            4 result       The client is reset at once: its client source has too many connections. The access log has cause source-connections, phase admit.
            10.1.2.3 on web would be reset: its client source exceeds the rate limit.
            4 result       The client is reset at once: its client source exceeds the rate limit. The access log has cause source-rate, phase admit.
            10.1.2.3 on web would be reset: the route rejects it.
            4 result       The client is reset at once: the route rejects it. The access log has cause route, phase admit.
            10.1.2.3 on web would be reset: no backend is eligible.
            4 result       The client is reset at once: no backend is eligible. The access log has cause no-backend, phase admit.
            10.1.2.3 on web would wait for a backend, at most 5 s.
            4 result       All backends are at their caps. The client waits for a slot, and is reset after 5 s. The access log has cause queue-timeout, phase queue.
            10.1.2.3 on web would wait in the listen queue.
            4 result       No backend is free, and the queue of the pool is full or off (queue_max). The client waits in the listen queue, without a timeout, until it is accepted.
            10.1.2.3 on web would wait in the listen queue.
            4 result       The frontend is at its cap (connections_max). The client waits in the listen queue, without a timeout, until it is accepted.
            10.1.2.3 on web would wait in the listen queue.
            4 result       The process is at its cap (process.connections_max). The client waits in the listen queue, without a timeout, until it is accepted.
            10.1.2.3 on web would wait for a backend, at most 5 s.
            4 result       No backend has a probe result or heartbeat yet. The client waits for the first, and is reset after 5 s. The access log has cause queue-timeout, phase queue.
        "#]].assert_eq(&text);
    }
}
