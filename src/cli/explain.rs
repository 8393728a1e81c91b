//! `tidegate explain`: explains in text one backend, one session, or what would happen to a
//! new connection.
//!
//! Called by the command line with a document of the admin API. It prints the document's
//! facts, most important first, and computes nothing.

mod forecast;
mod sentences;
mod session;

use super::completions;
use super::drain::{self, BackendRef};
use super::sources;
use super::table::{age, cell_text, or_dash, plural, terminal_width, wrap};
use clap::Args;
use hyper::Method;
use sentences::number;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use tidegate_api::explain::{
    AgentDoc, EjectionDoc, ExplainDoc, FailuresDoc, GuardsDoc, HeartbeatDoc, LastProbeDoc,
    PicksDoc, ProbeDoc, SenderDoc, SlowStartDoc, WeightDoc,
};
use tidegate_api::names::{ProbeResultName, PulseName};
use tidegate_api::status::{RejectedDoc, TransitionDoc};
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, backend_path, report, segment};
use tidegate_core::model::WEIGHT_MAX;

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate explain web/10.0.0.11:8080
  tidegate explain --session 4711
  tidegate explain --client 10.1.2.3 --frontend web
  tidegate explain --client 10.1.2.3 --frontend web --without web/b
  tidegate explain --client 10.1.2.3 --frontend web --with weight:web/a=5";

/// Columns of texts that consist of sentences.
const TEXT_WIDTH: usize = 80;

/// `tidegate explain`
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// Explain the state of this backend.
    #[arg(value_name = "POOL/BACKEND", value_parser = drain::target, add = completions::backends())]
    #[arg(required_unless_present_any = ["session", "of"], conflicts_with_all = ["session", "of"])]
    pub target: Option<BackendRef>,
    /// Explain the picks of this session: its number in the access log.
    #[arg(long, value_name = "N", conflicts_with = "of")]
    pub session: Option<NonZeroU64>,
    /// Show where a new connection of this client would go: an IP address, or IP:PORT.
    #[arg(id = "of", long = "client", value_name = "ADDR", requires = "frontend")]
    #[arg(value_parser = address)]
    pub of: Option<String>,
    /// Frontend that the client connects to.
    #[arg(long, value_name = "NAME", requires = "of", add = completions::frontends())]
    pub frontend: Option<String>,
    /// Address that the client connects to, IP or IP:PORT. Default: the first bind of
    /// the frontend.
    #[arg(long, value_name = "LOCAL", requires = "of", value_parser = address)]
    pub address: Option<String>,
    /// Assume that this backend is not eligible. Can be repeated.
    #[arg(long, value_name = "POOL/BACKEND", requires = "of", value_parser = drain::target)]
    #[arg(add = completions::backends())]
    pub without: Vec<BackendRef>,
    /// Assume another configured weight, 1 to 1000. Can be repeated.
    #[arg(id = "with", long = "with", value_name = "weight:POOL/BACKEND=N", requires = "of")]
    #[arg(value_parser = assumed_weight)]
    pub weights: Vec<String>,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Fetches an explanation and prints it as text or as JSON.
pub fn main(args: &ExplainArgs) -> Exit {
    let client = &args.client;
    if let Some(number) = args.session {
        let answer = ask(client, Method::GET, &format!("/v1/explain?session={number}"));
        return report(client, answer, |told| wrap(&session::render(told), Some(text_width())));
    }
    if let Some(target) = &args.target {
        let path = backend_path(&target.pool, &target.backend, "explain");
        let answer = ask(client, Method::GET, &path);
        let width = terminal_width();
        return report(client, answer, |facts| wrap(&render(facts, width), width));
    }
    let answer = ask(client, Method::GET, &forecast_path(args));
    report(client, answer, |told| wrap(&forecast::render(told), Some(text_width())))
}

fn text_width() -> usize {
    terminal_width().map_or(TEXT_WIDTH, |width| width.min(TEXT_WIDTH))
}

fn forecast_path(args: &ExplainArgs) -> String {
    let parameters =
        [("client", &args.of), ("frontend", &args.frontend), ("address", &args.address)];
    let mut query: Vec<String> = Vec::new();
    for (name, value) in parameters {
        query.extend(value.iter().map(|value| format!("{name}={}", segment(value))));
    }
    for BackendRef { pool, backend } in &args.without {
        query.push(format!("without={}", segment(format!("{pool}/{backend}"))));
    }
    query.extend(args.weights.iter().map(|weight| format!("with={}", segment(weight))));
    format!("/v1/explain?{}", query.join("&"))
}

/// Checks an IP address with or without a port.
fn address(text: &str) -> Result<String, String> {
    let valid = text.parse::<IpAddr>().is_ok() || text.parse::<SocketAddr>().is_ok();
    match valid {
        true => Ok(text.to_owned()),
        false => Err("expected an IP address or IP:PORT, for example 10.1.2.3".to_owned()),
    }
}

/// Checks `weight:POOL/BACKEND=N`.
fn assumed_weight(text: &str) -> Result<String, String> {
    let parts = text.strip_prefix("weight:").and_then(|rest| rest.rsplit_once('='));
    let valid = parts.is_some_and(|(backend, weight)| {
        let weight = weight.parse::<u16>();
        drain::target(backend).is_ok()
            && weight.is_ok_and(|weight| (1..=WEIGHT_MAX).contains(&weight))
    });
    match valid {
        true => Ok(text.to_owned()),
        false => Err("expected weight:POOL/BACKEND=N, N from 1 to 1000".to_owned()),
    }
}

/// Renders for a terminal of `width` columns. `None`: one line per row of the history.
fn render(facts: &ExplainDoc, width: Option<usize>) -> String {
    let mut text = format!(
        "{}/{} at {}{}{}\n{}{} {}\n\n",
        cell_text(&facts.pool),
        cell_text(&facts.backend),
        cell_text(&facts.address),
        if facts.registered { ", registered by heartbeats" } else { "" },
        backup(facts),
        verdict(facts),
        // `although` continues the verdict.
        if facts.why.starts_with("although ") { "" } else { ":" },
        cell_text(&facts.why),
    );
    let mut line = |name: &str, what: String| {
        let mut name = name;
        for part in what.lines() {
            let _ = writeln!(text, "{name:<12}{part}");
            name = "";
        }
    };
    line("State", format!("{} for {}", facts.observation, age(facts.observation_seconds)));
    line("Operator", format!("{} for {}", facts.intent, age(facts.intent_seconds)));
    line("Weight", weight(&facts.weight));
    line("Picks", picks(&facts.picks));
    line("Sessions", sessions(facts));
    line("Slow start", facts.slow_start.as_ref().map_or("not in progress".into(), slow_start));
    line("Failures", failures(&facts.failures));
    let none = || "not configured".to_owned();
    line("Probes", facts.probe.as_ref().map_or_else(none, probes));
    if facts.probe.is_some() || facts.last_probe.is_some() {
        let none = || "none has ended in this process".to_owned();
        line("Last probe", facts.last_probe.as_ref().map_or_else(none, last_probe));
    }
    if let Some(role) = &facts.role {
        let rank = if role.outranked { ", but it is not the primary in force" } else { "" };
        line("Role", format!("{} for {}{rank}", role.name, age(role.seconds)));
    }
    if let Some(agent) = &facts.agent {
        line("Agent", agent_words(agent));
    }
    line("Heartbeats", facts.heartbeat.as_ref().map_or_else(none, heartbeats));
    line("Ejection", ejection(&facts.ejection));
    for announced in &facts.announced {
        line("Source", sources::announced(announced));
    }
    line("Guards", guards(&facts.guards, facts.heartbeat.is_some()));
    text.push_str("\nHistory, newest first:\n");
    text.push_str(&history(&facts.history, width));
    text
}

fn backup(facts: &ExplainDoc) -> String {
    match (facts.backup, facts.tier) {
        (false, _) => String::new(),
        (true, 0 | 1) => ", backup".to_owned(),
        (true, tier) => format!(", backup of tier {tier}"),
    }
}

fn verdict(facts: &ExplainDoc) -> &'static str {
    match (facts.eligible, facts.ejection.trial_seconds) {
        (true, Some(_)) => "IN ROTATION for one trial session at a time",
        (true, None) if facts.backup => "IN ROTATION as a backup",
        (true, None) => "IN ROTATION",
        (false, _) => "NOT IN ROTATION",
    }
}

fn weight(weight: &WeightDoc) -> String {
    let WeightDoc { effective, configured, health_percent, ramp_percent, load_percent } = weight;
    format!(
        "{effective} = {configured} x {health_percent}% health x {ramp_percent}% slow start \
         x {load_percent}% load"
    )
}

fn picks(picks: &PicksDoc) -> String {
    let PicksDoc { backend, pool } = picks;
    if *pool == 0 {
        return "no recent picks of this pool are recorded".to_owned();
    }
    let (chosen, all) = (number(u64::from(*backend)), number(u64::from(*pool)));
    let percent = f64::from(*backend) / f64::from(*pool) * 100.0;
    format!("{chosen} of the last {all} picks of this pool ({percent:.1}%)")
}

fn sessions(facts: &ExplainDoc) -> String {
    let active = facts.sessions_active;
    match (facts.connections_max, facts.connections_max_in_force) {
        (0, _) => format!("{active} open, no cap"),
        (cap, now) if now != cap => {
            format!("{active} open, cap {now} during slow start, then {cap}")
        }
        (cap, _) => format!("{active} open, cap {cap}"),
    }
}

fn slow_start(ramp: &SlowStartDoc) -> String {
    format!("{}% after {} of {}", ramp.percent, age(ramp.seconds), age(ramp.takes_seconds))
}

fn failures(failures: &FailuresDoc) -> String {
    let within = short(failures.within_seconds);
    let mut text = match &failures.last {
        None => format!("none in the last {within}"),
        Some(last) => format!(
            "{}, {} before the first byte in the last {within}; last {} ago: {}",
            plural(failures.connects, "failed connect"),
            plural(failures.early_resets, "reset"),
            or_dash(failures.last_seconds_ago.map(short)),
            cell_text(last),
        ),
    };
    if failures.in_a_row > 0 {
        let _ = write!(text, "; {} in a row", failures.in_a_row);
        let _ = match failures.eject_at {
            Some(eject_at) => write!(text, ", ejection at {eject_at}"),
            None => write!(text, ", ejection is off"),
        };
    }
    // These include resets of unused connections.
    let total = plural(failures.connects_total, "failed attempt");
    let _ = write!(text, "; {total} since the start");
    text
}

fn probes(probe: &ProbeDoc) -> String {
    let (failed, connects) = (probe.failed_in_a_row, probe.connects_failed_in_a_row);
    let row = match (failed, connects, probe.succeeded_in_a_row) {
        (0, 0, 0) => String::new(),
        (0, 0, succeeded) => format!("; {succeeded} of {} successes in a row", probe.rise),
        (failed, connects, _) => format!(
            "; {} and {} failed in a row, down at {}",
            plural(failed, "probe"),
            plural(connects, "connect"),
            probe.fall
        ),
    };
    let open = if probe.fails_open { "; in rotation until its first result" } else { "" };
    format!(
        "{} for {} ({}, every {}){row}{open}",
        probe.observation,
        age(probe.seconds),
        probe.kind,
        short(probe.interval_seconds),
    )
}

/// Returns what an agent has said: `up, ready, 75% of the weight`.
fn agent_words(agent: &AgentDoc) -> String {
    let verdict = agent.verdict.as_ref().map(|verdict| cell_text(verdict));
    let cap = (agent.connections_max > 0)
        .then(|| format!("at most {}", plural(agent.connections_max, "session")));
    let weight = format!("{}% of the weight", agent.weight_percent);
    let wish = cell_text(&agent.wish);
    let words: Vec<String> = verdict.into_iter().chain([wish, weight]).chain(cap).collect();
    words.join(", ")
}

fn last_probe(last: &LastProbeDoc) -> String {
    let took = last.took_seconds.map_or_else(String::new, |took| format!(" after {}", short(took)));
    let kind = if last.confirmation { " (confirmation probe)" } else { "" };
    let result = match &last.result {
        ProbeResultName::Success => "succeeded",
        ProbeResultName::Failure => "failed",
        ProbeResultName::Undecided => "said nothing about the backend",
        ProbeResultName::NotRun => "not run because of a local error",
        other => other.name(),
    };
    let ago = short(last.ended_seconds_ago);
    format!("{result}{took}, {ago} ago{kind}: {}", cell_text(&last.detail))
}

fn heartbeats(HeartbeatDoc { required, pulse, sender, rejected }: &HeartbeatDoc) -> String {
    let needed = if *required { "required" } else { "optional" };
    let pulse = pulse_text(pulse);
    let mut text = match sender {
        None => format!("{pulse} ({needed}); none received\n"),
        Some(sender) => format!("{pulse} ({needed}); {}", sender_lines(sender)),
    };
    if let Some(last) = rejected {
        text.push_str(&rejection(last));
    }
    text
}

/// Returns `pulse` in words. The JSON output has its name.
fn pulse_text(pulse: &PulseName) -> &str {
    match pulse {
        PulseName::Absent => "none",
        PulseName::Awaited => "waiting for heartbeats",
        PulseName::Beating => "on time",
        PulseName::Suspect => "overdue",
        PulseName::Vouched => "overdue, confirmation probe succeeded",
        PulseName::Silent => "overdue, confirmation failed",
        other => other.name(),
    }
}

/// Returns what a sender reports and the timing of its heartbeats, one line each.
fn sender_lines(sender: &SenderDoc) -> String {
    let mut text = format!(
        "last {} ago, suspect after {}, expires after {}\n",
        or_dash(sender.silent_seconds.map(short)),
        short(sender.timeout_seconds),
        short(sender.ttl_seconds),
    );
    let _ = writeln!(
        text,
        "sender: {} for {}, weight {}, load {}/1000 ({:.0} smoothed), {} connections",
        sender.state,
        age(sender.state_seconds),
        sender.weight_asked,
        sender.load,
        sender.load_smoothed,
        sender.in_flight,
    );
    let _ = writeln!(
        text,
        "timing: every {} (measured {}), jitter {}, {} may be missing in a row at {:.1}% loss",
        short(sender.interval_seconds),
        short(sender.interval_learned_seconds),
        short(sender.jitter_seconds),
        sender.missing_allowed,
        sender.loss * 100.0,
    );
    let _ = writeln!(
        text,
        "detector: {} for {}, suspected {}x, down {}x, phi {:?} (normal) {:?} (exponential)",
        sender.detector,
        age(sender.detector_seconds),
        sender.suspicions_total,
        sender.downs_total,
        sender.phi_normal,
        sender.phi_exponential,
    );
    let _ = writeln!(
        text,
        "key {}, incarnation {}, sequence {}; {} received, {} lost ({:.1}%) in {}",
        sender.key,
        or_dash(sender.incarnation),
        or_dash(sender.sequence),
        sender.received_total,
        sender.lost_total,
        sender.lost_share * 100.0,
        age(sender.known_seconds),
    );
    if let Some(held) = &sender.held {
        let _ = writeln!(text, "HELD IN ROTATION although confirmed down: {}", cell_text(held));
    }
    text
}

/// Describes the last rejected heartbeat in the backend's name.
fn rejection(last: &RejectedDoc) -> String {
    let mut text = format!(
        "rejected: {} so far, last {} ago from {} (key {}): {}",
        last.total,
        age(last.seconds_ago),
        or_dash(last.from),
        or_dash(last.key),
        cell_text(&last.reason),
    );
    if let Some(skew) = last.skew_seconds {
        let direction = if skew < 0.0 { "behind" } else { "ahead" };
        let _ = write!(text, ", its clock is {} {direction}", short(skew.abs()));
    }
    let unsigned = if last.signed { "" } else { "; NOT VERIFIED: any host can have sent it" };
    let _ = write!(text, "{unsigned}\n  {}", cell_text(&last.help));
    text
}

fn ejection(ejection: &EjectionDoc) -> String {
    let EjectionDoc { total, held_total, in_a_row, .. } = ejection;
    let counts = format!("{total} so far, {held_total} prevented by a guard");
    match (ejection.ejected, ejection.trial_seconds) {
        (true, _) => {
            let left = or_dash(ejection.seconds_left.map(age));
            format!("EJECTED for {left} more (ejection {in_a_row} in a row); {counts}")
        }
        (false, Some(lasts)) => format!("ON TRIAL for {}; {counts}", age(lasts)),
        (false, None) if ejection.on => format!("not ejected; {counts}"),
        (false, None) => "off".to_owned(),
    }
}

/// Describes the guards. Only heartbeats have senders to count.
fn guards(guards: &GuardsDoc, heartbeats: bool) -> String {
    let mut text = String::new();
    if guards.channel_silent {
        text.push_str("NO HEARTBEATS RECEIVED: silence is ignored, only probes decide\n");
    }
    for (frozen, which) in [(&guards.pool_frozen, "this pool"), (&guards.all_frozen, "all pools")] {
        if let Some(frozen) = frozen {
            let (why, since) = (cell_text(&frozen.reason), age(frozen.seconds));
            let _ = writeln!(
                text,
                "FROZEN for {since}: silent backends of {which} stay in rotation: {why}"
            );
        }
    }
    if let Some(prevented) = &guards.prevented {
        let (evidence, reason) = (cell_text(&prevented.evidence), cell_text(&prevented.reason));
        let _ = writeln!(text, "PREVENTS THE REMOVAL of this backend: {reason}; {evidence}");
    }
    if text.is_empty() {
        text.push_str("none active\n");
    }
    if !heartbeats {
        return text;
    }
    let _ = write!(
        text,
        "senders {}, heard {}, suspect {}, down {}; at most {}% can be removed",
        guards.pool_senders,
        guards.pool_heard,
        guards.pool_suspect,
        guards.pool_down,
        guards.max_ejected_percent,
    );
    text
}

/// Lists the changes. If a row is wider than `width`, every reason is below its row.
fn history(transitions: &[TransitionDoc], width: Option<usize>) -> String {
    if transitions.is_empty() {
        return "  none\n".to_owned();
    }
    let row = |transition: &TransitionDoc| {
        let TransitionDoc { from, to, seconds_ago, lasted_seconds, .. } = transition;
        let (ago, change) = (age(*seconds_ago), format!("{from} -> {to}"));
        format!("  {ago:>8} ago  {change:<20} after {:<8} ", age(*lasted_seconds))
    };
    let length = |t: &TransitionDoc| row(t).chars().count() + cell_text(&t.reason).chars().count();
    let below = width.is_some_and(|width| transitions.iter().any(|t| length(t) > width));
    let mut text = String::new();
    for transition in transitions {
        let (row, reason) = (row(transition), cell_text(&transition.reason));
        let _ = match below {
            true => writeln!(text, "{}\n{:16}{reason}", row.trim_end(), ""),
            false => writeln!(text, "{row}{reason}"),
        };
    }
    text
}

/// Formats a short time: `40 us`, `40 ms`, `1.25 s`, `2m 3s`.
fn short(seconds: f64) -> String {
    match seconds {
        _ if seconds > 0.0 && seconds < 0.000_1 => format!("{:.0} us", seconds * 1e6),
        _ if seconds < 0.01 => format!("{:.1} ms", seconds * 1e3),
        _ if seconds < 1.0 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 60.0 => format!("{} s", (seconds * 100.0).round() / 100.0),
        _ => age(seconds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn explanation_shows_the_verdict_before_the_details() {
        let facts = crate::testing::explanation();
        expect![[r#"
            web/a at 10.0.0.11:8080, registered by heartbeats
            NOT IN ROTATION: down: 2 confirmation probes failed

            State       down for 1m 15s
            Operator    ready for 2h 1m
            Weight      0 = 10 x 0% health x 100% slow start x 65% load
            Picks       512 of the last 4,096 picks of this pool (12.5%)
            Sessions    3 open, no cap
            Slow start  not in progress
            Failures    3 failed connects, 1 reset before the first byte in the last 12 s; last 1.25 s ago: connection refused; 2 in a row, ejection at 5; 9 failed attempts since the start
            Probes      not configured
            Last probe  failed after 100 ms, 400 ms ago (confirmation probe): timed out after 100ms while connecting
            Heartbeats  overdue, confirmation failed (required); last 1m 15s ago, suspect after 325 ms, expires after 10 s
                        sender: ready for 2h 1m, weight 10, load 500/1000 (480 smoothed), 3 connections
                        timing: every 100 ms (measured 100 ms), jitter 1.2 ms, 3 may be missing in a row at 0.1% loss
                        detector: down for 1m 15s, suspected 1x, down 1x, phi 300.0 (normal) 300.0 (exponential)
                        key 1, incarnation 17, sequence 72000; 71990 received, 10 lost (0.0%) in 2h 1m
            Ejection    not ejected; 0 so far, 0 prevented by a guard
            Guards      FROZEN for 600ms: silent backends of this pool stay in rotation: 2 of 4 backends became suspect together
                        senders 5, heard 2, suspect 2, down 1; at most 50% can be removed

            History, newest first:
                1m 15s ago  suspect -> down      after 200ms    2 confirmation probes failed
                1m 15s ago  up -> suspect        after 1h 56m   no heartbeat for 325 ms
        "#]]
        .assert_eq(&render(&facts, None));
    }

    #[test]
    fn reasons_that_do_not_fit_are_below_their_rows() {
        let facts = crate::testing::explanation();
        let text = history(&facts.history, Some(79));
        let first =
            "    1m 15s ago  suspect -> down      after 200ms\n                2 confirmation";
        assert!(text.starts_with(first), "{text}");
        assert_eq!(history(&facts.history, Some(80)), history(&facts.history, None));
    }

    #[test]
    fn guards_count_senders_only_with_heartbeats() {
        let facts = crate::testing::explanation();
        assert!(guards(&facts.guards, true).contains("senders 5"));
        assert!(!guards(&facts.guards, false).contains("senders"));
    }
}
