//! `tidegate explain`: why one backend gets what it gets, in words.
//!
//! Called by the command line; the admin API gives the facts. It shows what the
//! document says, most important first, and works nothing out.

use super::DrainArgs;
use super::table::{age, cell_text, or_dash, plural, terminal_width, wrap};
use hyper::Method;
use std::fmt::Write;
use tidegate_api::explain::{
    EjectionDoc, ExplainDoc, FailuresDoc, GuardsDoc, HeartbeatDoc, ProbeDoc, SenderDoc,
    SlowStartDoc, WeightDoc,
};
use tidegate_api::status::{RejectedDoc, TransitionDoc};
use tidegate_client::command::Exit;
use tidegate_client::http::{ask, backend_path, report};

/// Asks and prints the explanation, or the JSON.
pub fn main(args: &DrainArgs) -> Exit {
    let path = backend_path(&args.target.pool, &args.target.backend, "explain");
    let answer = ask(&args.client, Method::GET, &path);
    report(&args.client, answer, |facts| wrap(&render(facts), terminal_width()))
}

fn render(facts: &ExplainDoc) -> String {
    let mut text = format!(
        "{}/{} at {}{}{}\n{}: {}\n\n",
        cell_text(&facts.pool),
        cell_text(&facts.backend),
        cell_text(&facts.address),
        if facts.registered { ", registered by its heartbeats" } else { "" },
        if facts.backup { ", a backup" } else { "" },
        verdict(facts),
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
    line("Sessions", sessions(facts));
    line("Slow start", facts.slow_start.as_ref().map_or("none under way".into(), slow_start));
    line("Failures", failures(&facts.failures));
    line("Probes", facts.probe.as_ref().map_or("none in this pool".into(), probes));
    let none = || "none taken in this pool".to_owned();
    line("Heartbeats", facts.heartbeat.as_ref().map_or_else(none, heartbeats));
    line("Ejection", ejection(&facts.ejection));
    line("Guards", guards(&facts.guards));
    text.push_str("\nWhat happened, newest first:\n");
    text.push_str(&history(&facts.history));
    text
}

fn verdict(facts: &ExplainDoc) -> &'static str {
    match (facts.eligible, facts.ejection.trial_seconds) {
        (true, Some(_)) => "TAKES one trial session at a time",
        (true, None) => "TAKES new sessions",
        (false, _) => "takes NO new sessions",
    }
}

fn weight(weight: &WeightDoc) -> String {
    let WeightDoc { effective, configured, health_percent, ramp_percent, load_percent } = weight;
    format!(
        "{effective} = {configured} x {health_percent}% (health) x {ramp_percent}% (slow start) \
         x {load_percent}% (load)"
    )
}

fn sessions(facts: &ExplainDoc) -> String {
    let active = facts.sessions_active;
    match (facts.connections_max, facts.connections_max_in_force) {
        (0, _) => format!("{active} now, no cap"),
        (cap, now) if now != cap => {
            format!("{active} now, at most {now} by its slow start, then {cap}")
        }
        (cap, _) => format!("{active} now, at most {cap}"),
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
            "{}, {} before a first byte in the last {within}; last {} ago: {}",
            plural(failures.connects, "failed connect"),
            plural(failures.early_resets, "reset"),
            or_dash(failures.last_seconds_ago.map(short)),
            cell_text(last),
        ),
    };
    if failures.in_a_row > 0 {
        let _ = write!(text, "; {} in a row", failures.in_a_row);
        if let Some(eject_at) = failures.eject_at {
            let _ = write!(text, ", {eject_at} eject it");
        }
    }
    let total = plural(failures.connects_total, "failed connect");
    let _ = write!(text, "; {total} since the start");
    text
}

fn probes(probe: &ProbeDoc) -> String {
    let (failed, connects) = (probe.failed_in_a_row, probe.connects_failed_in_a_row);
    let row = match (failed, connects, probe.succeeded_in_a_row) {
        (0, 0, 0) => String::new(),
        (0, 0, well) => format!("; {well} of {} successes in a row", probe.rise),
        (failed, connects, _) => format!(
            "; {} and {} failed in a row, {} take it out",
            plural(failed, "probe"),
            plural(connects, "connect"),
            probe.fall
        ),
    };
    let open = if probe.fails_open { "; it serves until its first result" } else { "" };
    format!(
        "{} for {} ({} each {}){row}{open}",
        probe.observation,
        age(probe.seconds),
        probe.kind,
        short(probe.interval_seconds),
    )
}

fn heartbeats(HeartbeatDoc { required, pulse, sender, rejected }: &HeartbeatDoc) -> String {
    let needed = if *required { "required" } else { "not required" };
    let mut text = match sender {
        None => format!("{pulse} ({needed}); none heard\n"),
        Some(sender) => format!("{pulse} ({needed}); {}", rhythm(sender)),
    };
    if let Some(last) = rejected {
        text.push_str(&rejection(last));
    }
    text
}

/// What a sender says and how its rhythm reads, in lines.
fn rhythm(sender: &SenderDoc) -> String {
    let mut text = format!(
        "last one {} ago, suspect after {}, expires after {}\n",
        or_dash(sender.silent_seconds.map(short)),
        short(sender.timeout_seconds),
        short(sender.ttl_seconds),
    );
    let _ = writeln!(
        text,
        "sender: {} for {}, asks for weight {}, load {} of 1000 ({:.0} smoothed), {} connections",
        sender.state,
        age(sender.state_seconds),
        sender.weight_asked,
        sender.load,
        sender.load_smoothed,
        sender.in_flight,
    );
    let _ = writeln!(
        text,
        "rhythm: each {} (learned {}), jitter {}; {} may be missing in a row, at a loss of {:.1}%",
        short(sender.interval_seconds),
        short(sender.interval_learned_seconds),
        short(sender.jitter_seconds),
        sender.missing_allowed,
        sender.loss * 100.0,
    );
    let _ = writeln!(
        text,
        "detector: {} for {}, {}, {} down, phi {:?} (normal) {:?} (exponential)",
        sender.detector,
        age(sender.detector_seconds),
        plural(sender.suspicions_total, "suspicion"),
        plural(sender.downs_total, "time"),
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
        let _ = writeln!(text, "HELD, though confirmed to be gone: {}", cell_text(held));
    }
    text
}

/// The last heartbeat in its name that was rejected.
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
        let way = if skew < 0.0 { "behind" } else { "ahead" };
        let _ = write!(text, ", its clock is {} {way}", short(skew.abs()));
    }
    let proof = if last.signed { "" } else { "; NOT SIGNED, so anything may have sent it" };
    let _ = write!(text, "{proof}\n  {}", cell_text(&last.help));
    text
}

fn ejection(ejection: &EjectionDoc) -> String {
    let EjectionDoc { total, held_total, in_a_row, .. } = ejection;
    let counts = format!("{total} so far, {held_total} held back by the pool's guard");
    match (ejection.ejected, ejection.trial_seconds) {
        (true, _) => {
            let left = or_dash(ejection.seconds_left.map(age));
            format!("EJECTED for another {left} ({in_a_row} in a row); {counts}")
        }
        (false, Some(lasts)) => format!("ON TRIAL for {}; {counts}", age(lasts)),
        (false, None) if ejection.on => format!("not now; {counts}"),
        (false, None) => "off in this pool".to_owned(),
    }
}

fn guards(guards: &GuardsDoc) -> String {
    let mut text = String::new();
    if guards.channel_silent {
        text.push_str(
            "NO HEARTBEATS AT ALL arrive: silence makes no backend suspect, probes decide\n",
        );
    }
    for (frozen, whom) in [(&guards.pool_frozen, "this pool"), (&guards.all_frozen, "any pool")] {
        if let Some(frozen) = frozen {
            let (why, since) = (cell_text(&frozen.reason), age(frozen.seconds));
            let _ = writeln!(
                text,
                "FROZEN for {since}: no silent backend of {whom} is taken out: {why}"
            );
        }
    }
    if text.is_empty() {
        text.push_str("none in force\n");
    }
    let _ = write!(
        text,
        "senders in this pool: {}, heard {}, suspect {}, down {}; at most {}% may be out",
        guards.pool_senders,
        guards.pool_heard,
        guards.pool_suspect,
        guards.pool_down,
        guards.max_ejected_percent,
    );
    text
}

fn history(transitions: &[TransitionDoc]) -> String {
    if transitions.is_empty() {
        return "  nothing yet\n".to_owned();
    }
    let mut text = String::new();
    for TransitionDoc { from, to, reason, seconds_ago, lasted_seconds } in transitions {
        let _ = writeln!(
            text,
            "  {:>8} ago  {:<20} after {:<8} {}",
            age(*seconds_ago),
            format!("{from} -> {to}"),
            age(*lasted_seconds),
            cell_text(reason),
        );
    }
    text
}

/// A short time: `40 ms`, `1.25 s`, `2m 3s`.
fn short(seconds: f64) -> String {
    match seconds {
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
    fn a_tired_operator_reads_the_reason_first() {
        let facts = crate::testing::explanation();
        expect![[r#"
            web/a at 10.0.0.11:8080, registered by its heartbeats
            takes NO new sessions: it is down: 2 confirming probes failed

            State       down for 1m 15s
            Operator    ready for 2h 1m
            Weight      0 = 10 x 0% (health) x 100% (slow start) x 65% (load)
            Sessions    3 now, no cap
            Slow start  none under way
            Failures    3 failed connects, 1 reset before a first byte in the last 12 s; last 1.25 s ago: connection refused; 2 in a row, 5 eject it; 9 failed connects since the start
            Probes      none in this pool
            Heartbeats  silent (required); last one 1m 15s ago, suspect after 325 ms, expires after 10 s
                        sender: ready for 2h 1m, asks for weight 10, load 500 of 1000 (480 smoothed), 3 connections
                        rhythm: each 100 ms (learned 100 ms), jitter 1.2 ms; 3 may be missing in a row, at a loss of 0.1%
                        detector: down for 1m 15s, 1 suspicion, 1 time down, phi 300.0 (normal) 300.0 (exponential)
                        key 1, incarnation 17, sequence 72000; 71990 received, 10 lost (0.0%) in 2h 1m
            Ejection    not now; 0 so far, 0 held back by the pool's guard
            Guards      FROZEN for 600ms: no silent backend of this pool is taken out: 2 of 4 backends became suspect together
                        senders in this pool: 5, heard 2, suspect 2, down 1; at most 50% may be out

            What happened, newest first:
                1m 15s ago  suspect -> down      after 200ms    2 confirming probes failed
                1m 15s ago  up -> suspect        after 1h 56m   no heartbeat for 325 ms
        "#]]
        .assert_eq(&render(&facts));
    }
}
