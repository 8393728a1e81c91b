//! `tidegate explain`: why one backend gets what it gets, in words.
//!
//! Called by the command line; the admin API gives the facts. It shows what the
//! JSON says, most important first; fields an older balancer does not have show
//! as `-`.

use super::DrainArgs;
use super::status::{age, cell_text, list, plural, terminal_width};
use super::table::wrap;
use hyper::Method;
use serde_json::Value;
use std::fmt::Write;
use tidegate_client::command::Exit;
use tidegate_client::http::{ask, printable, report, segment};

/// Asks and prints the explanation, or the JSON.
pub fn main(args: &DrainArgs) -> Exit {
    let (pool, backend) = (segment(&args.target.pool), segment(&args.target.backend));
    let path = format!("/v1/pools/{pool}/backends/{backend}/explain");
    let answer = ask(&args.client, Method::GET, &path);
    let width = terminal_width();
    report(&args.client, answer, |facts| wrap(&printable(&render(facts)), width))
}

fn render(facts: &Value) -> String {
    let mut text = format!(
        "{}/{} at {}{}{}\n{}: {}\n\n",
        cell_text(&facts["pool"]),
        cell_text(&facts["backend"]),
        cell_text(&facts["address"]),
        if facts["registered"] == true { ", registered by its heartbeats" } else { "" },
        if facts["backup"] == true { ", a backup" } else { "" },
        verdict(facts),
        cell_text(&facts["why"]),
    );
    let mut line = |name: &str, what: String| {
        let mut name = name;
        for part in what.lines() {
            let _ = writeln!(text, "{name:<12}{part}");
            name = "";
        }
    };
    let lasting = |state: &str, seconds: &str| {
        format!("{} for {}", cell_text(&facts[state]), age(&facts[seconds]))
    };
    line("State", lasting("observation", "observation_seconds"));
    line("Operator", lasting("intent", "intent_seconds"));
    line("Weight", weight(&facts["weight"]));
    line("Sessions", sessions(facts));
    line("Slow start", slow_start(&facts["slow_start"]));
    line("Failures", failures(&facts["failures"]));
    line("Probes", probes(&facts["probe"]));
    line("Heartbeats", heartbeats(&facts["heartbeat"]));
    line("Ejection", ejection(&facts["ejection"]));
    line("Guards", guards(&facts["guards"]));
    text.push_str("\nWhat happened, newest first:\n");
    text.push_str(&history(list(&facts["history"])));
    text
}

fn verdict(facts: &Value) -> String {
    match facts["eligible"].as_bool() {
        Some(true) if !facts["ejection"]["trial_seconds"].is_null() => {
            "TAKES one trial session at a time".to_owned()
        }
        Some(true) => "TAKES new sessions".to_owned(),
        Some(false) => "takes NO new sessions".to_owned(),
        None => "-".to_owned(),
    }
}

fn weight(weight: &Value) -> String {
    format!(
        "{} = {} x {}% (health) x {}% (slow start) x {}% (load)",
        cell_text(&weight["effective"]),
        cell_text(&weight["configured"]),
        cell_text(&weight["health_percent"]),
        cell_text(&weight["ramp_percent"]),
        cell_text(&weight["load_percent"]),
    )
}

fn sessions(facts: &Value) -> String {
    let active = cell_text(&facts["sessions_active"]);
    match (facts["connections_max"].as_u64(), facts["connections_max_in_force"].as_u64()) {
        (Some(0) | None, _) => format!("{active} now, no cap"),
        (Some(cap), Some(now)) if now != cap => {
            format!("{active} now, at most {now} by its slow start, then {cap}")
        }
        (Some(cap), _) => format!("{active} now, at most {cap}"),
    }
}

fn slow_start(ramp: &Value) -> String {
    if ramp.is_null() {
        return "none under way".to_owned();
    }
    let (percent, since) = (cell_text(&ramp["percent"]), age(&ramp["seconds"]));
    format!("{percent}% after {since} of {}", age(&ramp["takes_seconds"]))
}

fn failures(failures: &Value) -> String {
    let within = short(&failures["within_seconds"]);
    let mut text = match &failures["last"] {
        Value::Null => format!("none in the last {within}"),
        last => format!(
            "{}, {} before a first byte in the last {within}; last {} ago: {}",
            plural(&failures["connects"], "failed connect"),
            plural(&failures["early_resets"], "reset"),
            short(&failures["last_seconds_ago"]),
            cell_text(last),
        ),
    };
    if failures["in_a_row"].as_u64().is_some_and(|row| row > 0) {
        let _ = write!(text, "; {} in a row", cell_text(&failures["in_a_row"]));
        if !failures["eject_at"].is_null() {
            let _ = write!(text, ", {} eject it", cell_text(&failures["eject_at"]));
        }
    }
    let _ =
        write!(text, "; {} since the start", plural(&failures["connects_total"], "failed connect"));
    text
}

fn probes(probe: &Value) -> String {
    if probe.is_null() {
        return "none in this pool".to_owned();
    }
    let count = |key: &str| probe[key].as_u64().unwrap_or(0);
    let (failed, connects) = (count("failed_in_a_row"), count("connects_failed_in_a_row"));
    let row = match (failed, connects, count("succeeded_in_a_row")) {
        (0, 0, 0) => String::new(),
        (0, 0, well) => format!("; {well} of {} successes in a row", cell_text(&probe["rise"])),
        (failed, connects, _) => format!(
            "; {} and {} failed in a row, {} take it out",
            plural(&failed.into(), "probe"),
            plural(&connects.into(), "connect"),
            cell_text(&probe["fall"])
        ),
    };
    let open = if probe["fails_open"] == true { "; it serves until its first result" } else { "" };
    format!(
        "{} for {} ({} each {}){row}{open}",
        cell_text(&probe["observation"]),
        age(&probe["seconds"]),
        cell_text(&probe["kind"]),
        short(&probe["interval_seconds"]),
    )
}

fn heartbeats(heartbeat: &Value) -> String {
    if heartbeat.is_null() {
        return "none taken in this pool".to_owned();
    }
    let needed = if heartbeat["required"] == true { "required" } else { "not required" };
    let sender = &heartbeat["sender"];
    let rejected = rejected(&heartbeat["rejected"]);
    if sender.is_null() {
        let text = format!("{} ({needed}); none heard\n{rejected}", cell_text(&heartbeat["pulse"]));
        return text.trim_end().to_owned();
    }
    let mut text = format!(
        "{} ({needed}); last one {} ago, suspect after {}, expires after {}\n",
        cell_text(&heartbeat["pulse"]),
        short(&sender["silent_seconds"]),
        short(&sender["timeout_seconds"]),
        short(&sender["ttl_seconds"]),
    );
    let _ = writeln!(
        text,
        "sender: {} for {}, asks for weight {}, load {} of 1000 ({} smoothed), {} connections",
        cell_text(&sender["state"]),
        age(&sender["state_seconds"]),
        cell_text(&sender["weight_asked"]),
        cell_text(&sender["load"]),
        rounded(&sender["load_smoothed"]),
        cell_text(&sender["in_flight"]),
    );
    let _ = writeln!(
        text,
        "rhythm: each {} (learned {}), jitter {}; {} may be missing in a row, at a loss of {}%",
        short(&sender["interval_seconds"]),
        short(&sender["interval_learned_seconds"]),
        short(&sender["jitter_seconds"]),
        cell_text(&sender["missing_allowed"]),
        percent(&sender["loss"]),
    );
    let _ = writeln!(
        text,
        "detector: {} for {}, {}, {} down, phi {} (normal) {} (exponential)",
        cell_text(&sender["detector"]),
        age(&sender["detector_seconds"]),
        plural(&sender["suspicions_total"], "suspicion"),
        plural(&sender["downs_total"], "time"),
        cell_text(&sender["phi_normal"]),
        cell_text(&sender["phi_exponential"]),
    );
    let _ = writeln!(
        text,
        "key {}, incarnation {}, sequence {}; {} received, {} lost ({}%) in {}",
        cell_text(&sender["key"]),
        cell_text(&sender["incarnation"]),
        cell_text(&sender["sequence"]),
        cell_text(&sender["received_total"]),
        cell_text(&sender["lost_total"]),
        percent(&sender["lost_share"]),
        age(&sender["known_seconds"]),
    );
    if !sender["held"].is_null() {
        let _ = writeln!(text, "HELD, though confirmed to be gone: {}", cell_text(&sender["held"]));
    }
    text + &rejected
}

/// The last heartbeat in its name that was rejected; empty where there is none.
fn rejected(last: &Value) -> String {
    if last.is_null() {
        return String::new();
    }
    let mut text = format!(
        "rejected: {} so far, last {} ago from {} (key {}): {}",
        cell_text(&last["total"]),
        age(&last["seconds_ago"]),
        cell_text(&last["from"]),
        cell_text(&last["key"]),
        cell_text(&last["reason"]),
    );
    if let Some(skew) = last["skew_seconds"].as_f64() {
        let way = if skew < 0.0 { "behind" } else { "ahead" };
        let _ = write!(text, ", its clock is {} {way}", short(&skew.abs().into()));
    }
    let proof =
        if last["signed"] == true { "" } else { "; NOT SIGNED, so anything may have sent it" };
    let _ = write!(text, "{proof}\n  {}", cell_text(&last["help"]));
    text
}

fn ejection(ejection: &Value) -> String {
    let counts = format!(
        "{} so far, {} held back by the pool's guard",
        cell_text(&ejection["total"]),
        cell_text(&ejection["held_total"])
    );
    if ejection["ejected"] == true {
        let left = age(&ejection["seconds_left"]);
        return format!(
            "EJECTED for another {left} ({} in a row); {counts}",
            cell_text(&ejection["in_a_row"])
        );
    }
    if !ejection["trial_seconds"].is_null() {
        return format!("ON TRIAL for {}; {counts}", age(&ejection["trial_seconds"]));
    }
    if ejection["on"] == false {
        return "off in this pool".to_owned();
    }
    format!("not now; {counts}")
}

fn guards(guards: &Value) -> String {
    let mut text = String::new();
    if guards["channel_silent"] == true {
        text.push_str(
            "NO HEARTBEATS AT ALL arrive: silence makes no backend suspect, probes decide\n",
        );
    }
    for (key, whom) in [("pool_frozen", "this pool"), ("all_frozen", "any pool")] {
        let frozen = &guards[key];
        if !frozen.is_null() {
            let (why, since) = (cell_text(&frozen["reason"]), age(&frozen["seconds"]));
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
        cell_text(&guards["pool_senders"]),
        cell_text(&guards["pool_heard"]),
        cell_text(&guards["pool_suspect"]),
        cell_text(&guards["pool_down"]),
        cell_text(&guards["max_ejected_percent"]),
    );
    text
}

fn history(transitions: &[Value]) -> String {
    if transitions.is_empty() {
        return "  nothing yet\n".to_owned();
    }
    let mut text = String::new();
    for transition in transitions {
        let change =
            format!("{} -> {}", cell_text(&transition["from"]), cell_text(&transition["to"]));
        let _ = writeln!(
            text,
            "  {:>8} ago  {change:<20} after {:<8} {}",
            age(&transition["seconds_ago"]),
            age(&transition["lasted_seconds"]),
            cell_text(&transition["reason"]),
        );
    }
    text
}

/// A short time: `40 ms`, `1.25 s`, `2m 3s`.
fn short(seconds: &Value) -> String {
    match seconds.as_f64() {
        None => "-".to_owned(),
        Some(value) if value < 0.01 => format!("{:.1} ms", value * 1e3),
        Some(value) if value < 1.0 => format!("{:.0} ms", value * 1e3),
        Some(value) if value < 60.0 => format!("{} s", (value * 100.0).round() / 100.0),
        Some(_) => age(seconds),
    }
}

fn percent(fraction: &Value) -> String {
    fraction.as_f64().map_or_else(|| "-".to_owned(), |value| format!("{:.1}", value * 100.0))
}

fn rounded(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use serde_json::json;

    #[test]
    fn a_tired_operator_reads_the_reason_first() {
        let sender = json!({
            "state": "ready", "state_seconds": 7300.0, "key": 1, "incarnation": 17,
            "sequence": 72000, "weight_asked": 10, "load": 500, "load_smoothed": 480.2,
            "in_flight": 3, "known_seconds": 7300.0, "detector": "down", "detector_seconds": 75.0,
            "received_total": 71990, "lost_total": 10, "lost_share": 0.0, "loss": 0.001, "jitter_seconds": 0.0012,
            "interval_seconds": 0.1, "interval_learned_seconds": 0.1, "missing_allowed": 3,
            "timeout_seconds": 0.325, "silent_seconds": 75.6, "ttl_seconds": 10.0,
            "phi_normal": 300.0, "phi_exponential": 300.0,
            "suspicions_total": 1, "downs_total": 1, "held": null,
        });
        let guards = json!({
            "channel_silent": false, "all_frozen": null, "max_ejected_percent": 50,
            "pool_frozen": {"reason": "2 of 4 backends became suspect together", "seconds": 0.6},
            "pool_down": 1, "pool_suspect": 2, "pool_heard": 2, "pool_senders": 5,
        });
        let history = json!([
            {"from": "suspect", "to": "down", "reason": "2 confirming probes failed",
             "seconds_ago": 75.0, "lasted_seconds": 0.2},
            {"from": "up", "to": "suspect", "reason": "no heartbeat for 325 ms",
             "seconds_ago": 75.2, "lasted_seconds": 7000.0},
        ]);
        let weight = json!({
            "effective": 0, "configured": 10,
            "health_percent": 0, "ramp_percent": 100, "load_percent": 65,
        });
        let facts = json!({
            "pool": "web", "backend": "a", "address": "10.0.0.11:8080", "registered": true,
            "eligible": false, "why": "it is down: 2 confirming probes failed",
            "observation": "down", "observation_seconds": 75.0,
            "intent": "ready", "intent_seconds": 7300.0,
            "connections_max": 0, "connections_max_in_force": 0, "sessions_active": 3,
            "weight": weight, "probe": null, "slow_start": null,
            "heartbeat": {"required": true, "pulse": "silent", "sender": sender},
            "failures": {"within_seconds": 12.0, "connects": 3, "early_resets": 1,
                "last": "connection refused", "last_seconds_ago": 1.25, "in_a_row": 2,
                "eject_at": 5, "connects_total": 9},
            "ejection": {"on": true, "ejected": false, "total": 0, "held_total": 0},
            "guards": guards, "history": history,
        });
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

    #[test]
    fn an_answer_without_the_fields_still_prints() {
        assert!(render(&json!({})).starts_with("-/- at -\n-: -\n"));
    }
}
