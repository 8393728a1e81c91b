//! `tidegate status`: shows the running balancer on one screen.
//!
//! Called by the command line with the document of the admin API. It chooses words,
//! columns and units, and computes no other facts.

use super::sources;
use super::table::{
    TextColumn, TextTable, age, cell_text, or_dash, plural, size, terminal_width, wrap,
};
use hyper::Method;
use std::time::Duration;
use tidegate_api::names::{IntentName, NoneEligible, ObservationName, SenderStateName};
use tidegate_api::status::{
    BackendDoc, FindingDoc, FrontendDoc, HeartbeatChannelDoc, PoolDoc, RejectedDoc,
    SandboxLayerDoc, StatusDoc, TierShareDoc, TransitionDoc,
};
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, report};

/// Fetches the status and prints it as tables or as JSON.
pub fn main(args: &ClientArgs) -> Exit {
    let answer = ask(args, Method::GET, "/v1/status");
    let width = terminal_width();
    report(args, answer, |status| fit(&render(status, width), width))
}

/// Truncates every line to `width` characters.
fn fit(text: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return text.to_owned() };
    let cut = |line: &str| match line.chars().count() > width {
        true => line.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
        false => line.to_owned(),
    };
    text.lines().map(cut).collect::<Vec<String>>().join("\n")
}

/// Renders for a terminal of `width` columns. `None`: one line per table row.
fn render(status: &StatusDoc, width: Option<usize>) -> String {
    let mut text = head(status);
    text.push_str(&findings(&status.trouble));
    for warning in &status.warnings {
        text.push_str(&format!("warning: {}\n", cell_text(warning)));
    }
    text.push_str(&worker_problems(status));
    text.push_str(&status.heartbeat.as_ref().map_or_else(String::new, heartbeat_summary));
    text = wrap(text.trim_end(), width);
    text.push_str("\n\n");
    text.push_str(&frontends(&status.frontends, width));
    for pool in &status.pools {
        text.push('\n');
        text.push_str(&pool_table(pool, width));
    }
    for backend in &status.leaving {
        text.push_str(&format!(
            "\nremoved: {}/{} ({}) still has {}\n",
            cell_text(&backend.pool),
            cell_text(&backend.name),
            cell_text(&backend.address),
            plural(backend.sessions_active, "open session"),
        ));
    }
    let confinement = confinement(&status.confinement);
    if !confinement.is_empty() {
        text.push('\n');
        text.push_str(&wrap(&confinement, width));
    }
    text
}

fn head(status: &StatusDoc) -> String {
    let StatusDoc { state, generation, engine, connections_active, connections_max, .. } = status;
    format!(
        "tidegate {}: {state}, generation {generation}, up {}\n\
         {}, {connections_active} of {connections_max} sessions, engine {engine} ({})\n",
        cell_text(&status.version),
        age(status.uptime_seconds),
        plural(status.workers, "worker"),
        cell_text(&status.engine_reason),
    )
}

/// Lists what is wrong, worst first, without the warnings that have lines of their own.
fn findings(findings: &[FindingDoc]) -> String {
    let line = |finding: &FindingDoc| {
        let since =
            finding.since_seconds.map_or_else(String::new, |since| format!(" for {}", age(since)));
        let parts = [&finding.why, &finding.effect].into_iter().filter(|part| !part.is_empty());
        let parts: Vec<String> = parts.map(|part| cell_text(part)).collect();
        let why = if parts.is_empty() { String::new() } else { format!(": {}", parts.join(" ")) };
        let mark = if finding.severity >= 2 { "PROBLEM" } else { "problem" };
        format!("{mark}: {}{since}{why}\n", cell_text(&finding.title))
    };
    findings.iter().filter(|finding| finding.kind != "warning").map(line).collect()
}

/// Describes stalled workers and panics; usually empty.
fn worker_problems(status: &StatusDoc) -> String {
    let mut text = String::new();
    for stalled in &status.stalled {
        text.push_str(&format!(
            "WORKER {} STALLED for {} ({})\n",
            stalled.worker,
            age(stalled.seconds),
            cell_text(&stalled.stage),
        ));
    }
    if status.worker_panics_total > 0 {
        text.push_str(&format!(
            "{}, {}; see the log\n",
            plural(status.worker_panics_total, "panic"),
            plural(status.worker_restarts_total, "worker restart"),
        ));
    }
    text
}

/// Lists the sandbox layers in force, and the others with the reason.
fn confinement(layers: &[SandboxLayerDoc]) -> String {
    let in_force = |layer: &&SandboxLayerDoc| layer.in_force;
    let name = |layer: &SandboxLayerDoc| cell_text(&layer.layer);
    let reason =
        |layer: &SandboxLayerDoc| format!("{} ({})", name(layer), cell_text(&layer.detail));
    let line = |head: &str, layers: Vec<String>| match layers.is_empty() {
        true => String::new(),
        false => format!("{head}: {}\n", layers.join(", ")),
    };
    line("sandbox", layers.iter().filter(in_force).map(name).collect())
        + &line("sandbox not applied", layers.iter().filter(|l| !in_force(l)).map(reason).collect())
}

fn frontends(frontends: &[FrontendDoc], width: Option<usize>) -> String {
    let mut table = TextTable::new([
        TextColumn::left("FRONTEND", 0),
        TextColumn::left("BIND", 1),
        TextColumn::left("POOL", 0),
        TextColumn::right("ACTIVE", 0),
        TextColumn::right("SESSIONS", 2),
        TextColumn::right("IN", 4),
        TextColumn::right("OUT", 3),
        TextColumn::right("REFUSED", 0),
    ]);
    for frontend in frontends {
        let binds: Vec<String> = frontend.binds.iter().map(ToString::to_string).collect();
        let cells = vec![
            cell_text(&frontend.name),
            binds.join(","),
            cell_text(&frontend.pool),
            frontend.sessions_active.to_string(),
            frontend.sessions_total.to_string(),
            size(frontend.bytes_in_total),
            size(frontend.bytes_out_total),
            frontend.refused_total.to_string(),
        ];
        table.row(cells, String::new());
    }
    table.finish(width)
}

fn pool_table(pool: &PoolDoc, width: Option<usize>) -> String {
    let backends = &pool.backends;
    let eligible = backends.iter().filter(|backend| backend.eligible).count();
    let title = format!(
        "POOL {}: {}{}, {eligible} of {} eligible{}",
        cell_text(&pool.name),
        pool.balance,
        pool_origin(pool),
        backends.len(),
        pool_remarks(pool)
    );
    // Without a configured name, the address is the name.
    let named = backends.iter().any(|backend| backend.name != backend.address);
    let columns = [
        TextColumn::left("BACKEND", 0),
        TextColumn::left("ADDRESS", if named { 1 } else { 5 }),
        TextColumn::left("STATE", 0),
        TextColumn::right("WEIGHT", 0),
        TextColumn::right("ACTIVE", 0),
        TextColumn::right("SESSIONS", 2),
        TextColumn::right("FAILED", 0),
        TextColumn::right("CONNECT P50", 4),
        TextColumn::right("CONNECT P99", 3),
    ];
    let mut table = TextTable::noted(columns, "LAST CHANGE");
    for backend in backends {
        let cells = vec![
            cell_text(&backend.name),
            cell_text(&backend.address),
            state(backend, pool),
            weight(backend),
            backend.sessions_active.to_string(),
            backend.sessions_total.to_string(),
            backend.connect_failures_total.to_string(),
            or_dash(backend.connect_seconds.p50.map(latency)),
            or_dash(backend.connect_seconds.p99.map(latency)),
        ];
        table.row(cells, backend.last_transition.as_ref().map_or_else(String::new, last_change));
    }
    let mut text = wrap(&title, width) + "\n" + &table.finish(width);
    for source in &pool.sources {
        text.push_str(&wrap(&format!("source {}\n", sources::describe(source)), width));
    }
    text
}

/// Returns the role that a pool needs, and the pool whose backends it uses.
fn pool_origin(pool: &PoolDoc) -> String {
    let role = pool.role.as_ref().map_or_else(String::new, |role| format!(", role {role}"));
    let of = pool.of.as_deref().map_or_else(String::new, |of| format!(", of {}", cell_text(of)));
    role + &of
}

/// Returns the remarks in the title line of a pool: queue, registrations, guards.
fn pool_remarks(pool: &PoolDoc) -> String {
    let mut text = String::new();
    if pool.queued > 0 {
        text.push_str(&format!(", {} queued", pool.queued));
    }
    if pool.registered_max > 0 {
        text.push_str(&format!(", {} of {} registered", pool.registered, pool.registered_max));
    }
    text.push_str(&serving_tiers(pool));
    text.push_str(match pool.none_eligible {
        Some(NoneEligible::TryAll) => ", NO BACKEND ELIGIBLE: trying all",
        Some(NoneEligible::Former) => ", waiting for first results: former backends serve",
        Some(NoneEligible::Wait) => ", waiting for first results: clients are queued",
        Some(NoneEligible::Queue) => ", NO BACKEND ELIGIBLE: clients are queued",
        Some(_) => ", NO BACKEND ELIGIBLE: clients are reset",
        None => "",
    });
    if let Some(frozen) = &pool.frozen {
        text.push_str(&format!(
            "\nFROZEN for {}: {}; silent backends stay in rotation",
            age(frozen.seconds),
            cell_text(&frozen.reason)
        ));
    }
    text
}

/// Returns which tiers serve, unless tier 0 serves alone.
fn serving_tiers(pool: &PoolDoc) -> String {
    match &*pool.tier_shares {
        [] | [TierShareDoc { tier: 0, .. }] => String::new(),
        [one] => format!(", tier {} serves", one.tier),
        several => {
            let share = |one: &TierShareDoc| format!("tier {} {}%", one.tier, one.percent);
            let shares: Vec<String> = several.iter().map(share).collect();
            format!(", {}", shares.join(", "))
        }
    }
}

/// Cap on senders whose rejected heartbeats are shown.
const REJECTIONS_SHOWN_MAX: usize = 5;

/// Describes one sender whose heartbeats are rejected.
fn rejected(rejection: &RejectedDoc) -> String {
    let skew = rejection.skew_seconds.filter(|skew| skew.abs() >= 1.0);
    let skew = skew.map_or_else(String::new, |skew| format!(", clock {skew:+.0}s"));
    format!(
        "  rejected: {}/{} from {}: {}{skew}, {}, last {} ago; {}\n",
        or_dash(rejection.pool.as_deref().map(cell_text)),
        or_dash(rejection.backend.as_deref().map(cell_text)),
        or_dash(rejection.from),
        cell_text(&rejection.reason),
        plural(rejection.total, "time"),
        age(rejection.seconds_ago),
        cell_text(&rejection.help),
    )
}

/// Describes the heartbeat receiver and the guards of all pools.
fn heartbeat_summary(heartbeat: &HeartbeatChannelDoc) -> String {
    let listen: Vec<String> = heartbeat.listen.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "heartbeats on {}: {} accepted, {} rejected, {} dropped by the kernel\n",
        listen.join(","),
        heartbeat.accepted_total,
        heartbeat.rejected_total,
        heartbeat.kernel_drops_total,
    );
    for rejection in heartbeat.rejections.iter().take(REJECTIONS_SHOWN_MAX) {
        text.push_str(&rejected(rejection));
    }
    if heartbeat.rejections.len() > REJECTIONS_SHOWN_MAX {
        text.push_str("  more rejected senders are in --json\n");
    }
    if heartbeat.silent {
        text.push_str("NO HEARTBEATS RECEIVED: only probes decide\n");
    }
    if let Some(frozen) = &heartbeat.frozen {
        text.push_str(&format!(
            "FROZEN for {}, all pools: {}; silent backends stay in rotation\n",
            age(frozen.seconds),
            cell_text(&frozen.reason)
        ));
    }
    text
}

/// Returns the state of a backend in few words. The operator's intent comes first, then the
/// state its sender reports, the wish of a member source, an ejection, a trial, and the
/// observation.
fn state(backend: &BackendDoc, pool: &PoolDoc) -> String {
    let heartbeat = backend.heartbeat.as_ref();
    let reported = heartbeat.and_then(|heartbeat| heartbeat.sender_state.as_ref());
    let reported = reported.filter(|state| **state != SenderStateName::Ready);
    // It is in rotation, and nothing observes it.
    let unobserved =
        backend.observation == ObservationName::Unknown && backend.eligible && !pool.probes;
    let verifies = backend.unverified && backend.observation == ObservationName::Unknown;
    let mut state = match (reported, wish(backend)) {
        _ if backend.intent != IntentName::Ready => backend.intent.name().to_owned(),
        (Some(reported), _) => reported.name().to_owned(),
        (None, Some(wish)) => wish,
        _ if backend.ejected => "ejected".to_owned(),
        _ if backend.on_trial => "trial".to_owned(),
        _ if verifies && !backend.eligible => "verifying".to_owned(),
        _ if verifies => "unverified".to_owned(),
        _ if unobserved && pool.heartbeats => "not heard".to_owned(),
        _ if unobserved => "no probes".to_owned(),
        _ => backend.observation.name().to_owned(),
    };
    if let Some(role) = &backend.role {
        let rank = if role.outranked { "outranked " } else { "" };
        state.push_str(&format!(" {rank}{} {}", role.name, age(role.seconds)));
    }
    match backend.tier {
        0 | 1 if backend.backup => state.push_str(" backup"),
        0 | 1 => {}
        tier => state.push_str(&format!(" backup tier {tier}")),
    }
    if backend.registered {
        state.push_str(" registered");
    }
    state
}

/// Returns the wish of a member source that decides, with the source. A suspect backend that
/// is down here is down.
fn wish(backend: &BackendDoc) -> Option<String> {
    let wish = backend.wish.as_ref()?;
    let is_suspect = backend.observation == ObservationName::Suspect;
    if wish == "suspect" && (backend.ejected || backend.on_trial || !is_suspect) {
        return None;
    }
    let source = backend.wished_by.as_ref().map(|source| format!(" ({})", cell_text(source)));
    Some(cell_text(wish) + &source.unwrap_or_default())
}

/// Returns `3`, or `1/3` while the effective weight is lower.
fn weight(backend: &BackendDoc) -> String {
    match backend.eligible && backend.effective_weight != f64::from(backend.weight) {
        true => format!("{}/{}", backend.effective_weight, backend.weight),
        false => backend.weight.to_string(),
    }
}

fn last_change(transition: &TransitionDoc) -> String {
    let TransitionDoc { from, to, reason, seconds_ago, .. } = transition;
    format!("{from} -> {to} {} ago: {}", age(*seconds_ago), cell_text(reason))
}

fn latency(seconds: f64) -> String {
    let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    match time.as_micros() {
        0..=999 => format!("{} us", time.as_micros()),
        1_000..=999_999 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::status as example;
    use expect_test::expect;
    use tidegate_api::names::BackendStateName;
    use tidegate_api::status::QuantilesDoc;

    #[test]
    fn status_fits_on_one_screen() {
        expect![[r#"
            tidegate 0.1.0: serving, generation 3, up 2h 3m
            2 workers, 12 of 100000 sessions, engine epoll (configured)
            PROBLEM: web/c is down for 41s: 3 probes failed. Its 25% of new sessions goes to the other 2.
            problem: Open sessions are near the cap
            warning: process.workers: 2 runs until a restart, then 4

            FRONTEND  BIND                    POOL  ACTIVE  SESSIONS     IN      OUT  REFUSED
            web       0.0.0.0:8080,[::]:8080  web       12     12345  999 B  5.0 GiB        0

            POOL web: random, 1 of 2 eligible
            BACKEND  ADDRESS           STATE            WEIGHT  ACTIVE  SESSIONS  FAILED  CONNECT P50  CONNECT P99  LAST CHANGE
            a        10.0.0.11:8080    suspect             1/3      12     12000       0       213 us      31.2 ms
            b        unix:/run/b.sock  draining backup       1       0       345       7            -        2.5 s  up -> draining 1m 15s ago: operator

            removed: web/c (10.0.0.9:80) still has 2 open sessions
        "#]]
        .assert_eq(&render(&example(), None));
    }

    #[test]
    fn state_names_the_source_that_restricts_a_backend() {
        let status = example();
        let pool = PoolDoc { probes: false, ..status.pools[0].clone() };
        let shown = |wish: Option<&str>, observation: &str, unverified, eligible| {
            let backend = BackendDoc {
                wish: wish.map(str::to_owned),
                wished_by: wish.map(|_| "consul".to_owned()),
                observation: observation.into(),
                unverified,
                eligible,
                ..pool.backends[0].clone()
            };
            let ejected = BackendDoc { ejected: true, ..backend.clone() };
            (state(&backend, &pool), state(&ejected, &pool))
        };
        let draining = "draining (consul)".to_owned();
        assert_eq!(shown(Some("draining"), "unknown", false, false), (draining.clone(), draining));
        assert_eq!(shown(Some("starting"), "up", false, false).0, "starting (consul)");
        let (suspect, ejected) = shown(Some("suspect"), "suspect", false, true);
        assert_eq!((&*suspect, &*ejected), ("suspect (consul)", "ejected"));
        assert_eq!(shown(Some("suspect"), "down", false, false).0, "down");
        assert_eq!(shown(None, "unknown", true, false).0, "verifying");
        assert_eq!(shown(None, "unknown", true, true).0, "unverified");
        assert_eq!(shown(None, "unknown", false, true).0, "no probes");
    }

    #[test]
    fn lines_are_truncated_to_the_terminal_width() {
        let text = fit(&render(&example(), Some(20)), Some(20));
        assert!(text.lines().all(|line| line.chars().count() <= 20), "{text}");
        assert!(text.starts_with("tidegate 0.1.0:\n"), "{text}");
        assert_eq!(fit("äöü", Some(3)), "äöü");
    }

    #[test]
    fn state_and_reason_are_complete_in_80_columns() {
        let mut status = example();
        let pool = &mut status.pools[0];
        let backend = |name: &str, state: &str, reason: &str| BackendDoc {
            name: name.to_owned(),
            address: name.to_owned(),
            weight: 1,
            effective_weight: 1.0,
            observation: state.into(),
            sessions_total: 1_234_567,
            connect_failures_total: 3,
            connect_seconds: QuantilesDoc { p50: Some(0.0002), p99: Some(0.03) },
            last_transition: Some(TransitionDoc {
                from: BackendStateName::Up,
                to: state.into(),
                reason: reason.to_owned(),
                seconds_ago: 0.25,
                lasted_seconds: 3.0,
            }),
            ..pool.backends[0].clone()
        };
        let reason = "3 probes failed in a row, last: connection refused";
        pool.backends = vec![
            backend("10.100.200.11:8080", "down", reason),
            backend("10.100.200.12:8080", "unknown", "ejection ended"),
        ];
        pool.probes = false;
        let layer = |layer: &str, in_force, detail: &str| SandboxLayerDoc {
            layer: layer.to_owned(),
            in_force,
            detail: detail.to_owned(),
        };
        status.confinement = vec![
            layer("seccomp", true, "a filter of 120 calls"),
            layer("landlock", false, "disabled in this kernel"),
        ];
        expect![[r#"
            tidegate 0.1.0: serving, generation 3, up 2h 3m
            2 workers, 12 of 100000 sessions, engine epoll (configured)
            PROBLEM: web/c is down for 41s: 3 probes failed. Its 25% of new sessions goes to
                the other 2.
            problem: Open sessions are near the cap
            warning: process.workers: 2 runs until a restart, then 4

            FRONTEND  BIND                    POOL  ACTIVE  SESSIONS      OUT  REFUSED
            web       0.0.0.0:8080,[::]:8080  web       12     12345  5.0 GiB        0

            POOL web: random, 2 of 2 eligible
            BACKEND             STATE      WEIGHT  ACTIVE  SESSIONS  FAILED  CONNECT P99
            10.100.200.11:8080  down            1      12   1234567       3      30.0 ms
                up -> down 250ms ago: 3 probes failed in a row, last: connection refused
            10.100.200.12:8080  no probes       1      12   1234567       3      30.0 ms
                up -> unknown 250ms ago: ejection ended

            removed: web/c (10.0.0.9:80) still has 2 open sessions

            sandbox: seccomp
            sandbox not applied: landlock (disabled in this kernel)"#]]
        .assert_eq(&render(&status, Some(80)));
        let text = render(&status, Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains(reason) && text.contains("no probes"), "{text}");
    }
}
