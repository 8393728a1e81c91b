//! `tidegate status`: the running balancer on one screen.
//!
//! Called by the command line; the admin API gives the facts. It shows what the
//! JSON says and works nothing out but words, columns and units; fields an
//! older balancer does not have show as `-`.

use super::table::{TextColumn, TextTable, wrap};
use hyper::Method;
use serde_json::Value;
use std::io::IsTerminal;
use std::time::Duration;
use tidegate_client::command::Exit;
use tidegate_client::http::{ClientArgs, ask, printable, report};

/// Asks and prints a table, or the JSON.
pub fn main(args: &ClientArgs) -> Exit {
    let answer = ask(args, Method::GET, "/v1/status");
    let width = terminal_width();
    report(args, answer, |status| fit(&printable(&render(status, width)), width))
}

/// Columns of the terminal; `None` where output goes elsewhere and is kept
/// whole.
pub(super) fn terminal_width() -> Option<usize> {
    let out = std::io::stdout();
    let size = out.is_terminal().then(|| rustix::termios::tcgetwinsize(&out).ok())??;
    (size.ws_col > 0).then_some(size.ws_col.into())
}

/// Cuts every line to `width` characters.
fn fit(text: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return text.to_owned() };
    let cut = |line: &str| match line.chars().count() > width {
        true => line.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
        false => line.to_owned(),
    };
    text.lines().map(cut).collect::<Vec<String>>().join("\n")
}

/// For a terminal of `width` columns; `None`: each row in one line.
fn render(status: &Value, width: Option<usize>) -> String {
    let mut text = head(status);
    for warning in list(&status["warnings"]) {
        text.push_str(&format!("warning: {}\n", cell_text(warning)));
    }
    text.push_str(&worker_problems(status));
    text.push_str(&heartbeat_summary(&status["heartbeat"]));
    text = wrap(text.trim_end(), width);
    text.push_str("\n\n");
    text.push_str(&frontends(list(&status["frontends"]), width));
    for pool in list(&status["pools"]) {
        text.push('\n');
        text.push_str(&pool_table(pool, width));
    }
    for backend in list(&status["leaving"]) {
        text.push_str(&format!(
            "\nleaving: {}/{} ({}) still holds {}\n",
            cell_text(&backend["pool"]),
            cell_text(&backend["name"]),
            cell_text(&backend["address"]),
            plural(&backend["sessions_active"], "session"),
        ));
    }
    let confinement = confinement(list(&status["confinement"]));
    if !confinement.is_empty() {
        text.push('\n');
        text.push_str(&wrap(&confinement, width));
    }
    text
}

fn head(status: &Value) -> String {
    format!(
        "tidegate {}: {}, generation {}, up {}\n{}, {} of {} sessions, engine {} ({})\n",
        cell_text(&status["version"]),
        cell_text(&status["state"]),
        cell_text(&status["generation"]),
        age(&status["uptime_seconds"]),
        plural(&status["workers"], "worker"),
        cell_text(&status["connections_active"]),
        cell_text(&status["connections_max"]),
        cell_text(&status["engine"]),
        cell_text(&status["engine_reason"]),
    )
}

/// Workers that are stalled or have panicked; mostly there is nothing to say.
fn worker_problems(status: &Value) -> String {
    let mut text = String::new();
    for stalled in list(&status["stalled"]) {
        text.push_str(&format!(
            "WORKER {} STALLED for {}, while {}\n",
            cell_text(&stalled["worker"]),
            age(&stalled["seconds"]),
            cell_text(&stalled["stage"]),
        ));
    }
    if status["worker_panics_total"].as_u64().is_some_and(|panics| panics > 0) {
        text.push_str(&format!(
            "{}, {} of workers: see the log\n",
            plural(&status["worker_panics_total"], "panic"),
            plural(&status["worker_restarts_total"], "restart"),
        ));
    }
    text
}

/// What holds the process in; what could and does not, with its reason. Nothing if an
/// older balancer does not say.
fn confinement(layers: &[Value]) -> String {
    let held = |layer: &&Value| layer["in_force"] == true;
    let name = |layer: &Value| cell_text(&layer["layer"]);
    let reason = |layer: &Value| format!("{} ({})", name(layer), cell_text(&layer["detail"]));
    let line = |head: &str, layers: Vec<String>| match layers.is_empty() {
        true => String::new(),
        false => format!("{head}: {}\n", layers.join(", ")),
    };
    line("confined by", layers.iter().filter(held).map(name).collect())
        + &line("not confined by", layers.iter().filter(|l| !held(l)).map(reason).collect())
}

fn frontends(frontends: &[Value], width: Option<usize>) -> String {
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
        let binds: Vec<String> = list(&frontend["binds"]).iter().map(cell_text).collect();
        let cells = vec![
            cell_text(&frontend["name"]),
            binds.join(","),
            cell_text(&frontend["pool"]),
            cell_text(&frontend["sessions_active"]),
            cell_text(&frontend["sessions_total"]),
            size(&frontend["bytes_in_total"]),
            size(&frontend["bytes_out_total"]),
            cell_text(&frontend["refused_total"]),
        ];
        table.row(cells, String::new());
    }
    table.finish(width)
}

fn pool_table(pool: &Value, width: Option<usize>) -> String {
    let backends = list(&pool["backends"]);
    let eligible = backends.iter().filter(|b| b["eligible"] == true).count();
    let (name, balance) = (cell_text(&pool["name"]), cell_text(&pool["balance"]));
    let title = format!(
        "POOL {name}: {balance}, {eligible} of {} eligible{}",
        backends.len(),
        pool_remarks(pool)
    );
    // A backend without a name of its own is named after its address.
    let named = backends.iter().any(|backend| backend["name"] != backend["address"]);
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
            cell_text(&backend["name"]),
            cell_text(&backend["address"]),
            state(backend, pool),
            weight(backend),
            cell_text(&backend["sessions_active"]),
            cell_text(&backend["sessions_total"]),
            cell_text(&backend["connect_failures_total"]),
            latency(&backend["connect_seconds"]["p50"]),
            latency(&backend["connect_seconds"]["p99"]),
        ];
        table.row(cells, last_change(&backend["last_transition"]));
    }
    wrap(&title, width) + "\n" + &table.finish(width)
}

/// What else there is to say of a pool.
fn pool_remarks(pool: &Value) -> String {
    let mut text = String::new();
    if let Some(queued) = pool["queued"].as_u64().filter(|queued| *queued > 0) {
        text.push_str(&format!(", {queued} waiting"));
    }
    if let Some(max) = pool["registered_max"].as_u64().filter(|max| *max > 0) {
        text.push_str(&format!(", {} registered of {max}", cell_text(&pool["registered"])));
    }
    match pool["none_eligible"].as_str() {
        Some("try-all") => text.push_str(", NO BACKEND ELIGIBLE: all are tried"),
        Some("former") => text.push_str(", no verdict yet: former backends serve"),
        Some("wait") => text.push_str(", no verdict yet: clients wait for one"),
        Some(_) => text.push_str(", NO BACKEND ELIGIBLE: clients are refused"),
        None => {}
    }
    if !pool["frozen"].is_null() {
        text.push_str(&format!(
            "\nFROZEN for {}: {}; no silent backend is taken out",
            age(&pool["frozen"]["seconds"]),
            cell_text(&pool["frozen"]["reason"])
        ));
    }
    text
}

/// Senders whose rejected heartbeats the text shows.
const REJECTIONS_SHOWN_MAX: usize = 5;

/// One sender whose heartbeats are rejected.
fn rejected(rejection: &Value) -> String {
    let skew = rejection["skew_seconds"].as_f64().filter(|skew| skew.abs() >= 1.0);
    let skew = skew.map_or_else(String::new, |skew| format!(", clock {skew:+.0}s"));
    format!(
        "  rejected: {}/{} from {}: {}{skew}, {} times, last {} ago; {}\n",
        cell_text(&rejection["pool"]),
        cell_text(&rejection["backend"]),
        cell_text(&rejection["from"]),
        cell_text(&rejection["reason"]),
        cell_text(&rejection["total"]),
        age(&rejection["seconds_ago"]),
        cell_text(&rejection["help"]),
    )
}

/// Heartbeats as a whole, where they are taken.
fn heartbeat_summary(heartbeat: &Value) -> String {
    if heartbeat.is_null() {
        return String::new();
    }
    let listen: Vec<String> = list(&heartbeat["listen"]).iter().map(cell_text).collect();
    let mut text = format!(
        "heartbeats on {}: {} taken, {} refused, {} lost in the kernel\n",
        listen.join(","),
        cell_text(&heartbeat["accepted_total"]),
        cell_text(&heartbeat["rejected_total"]),
        cell_text(&heartbeat["kernel_drops_total"]),
    );
    let rejections = list(&heartbeat["rejections"]);
    for rejection in rejections.iter().take(REJECTIONS_SHOWN_MAX) {
        text.push_str(&rejected(rejection));
    }
    if rejections.len() > REJECTIONS_SHOWN_MAX {
        text.push_str("  more rejected senders are in --json\n");
    }
    if heartbeat["silent"] == true {
        text.push_str("NO HEARTBEATS AT ALL arrive: probes alone decide\n");
    }
    if !heartbeat["frozen"].is_null() {
        text.push_str(&format!(
            "FROZEN for {}, all pools: {}; no silent backend is taken out\n",
            age(&heartbeat["frozen"]["seconds"]),
            cell_text(&heartbeat["frozen"]["reason"])
        ));
    }
    text
}

/// The one word that matters most: what an operator did, then an ejection, then
/// what its own heartbeats ask for, then what probes and heartbeats show, if the pool
/// has any.
fn state(backend: &Value, pool: &Value) -> String {
    let mut state = match backend["intent"].as_str() {
        Some(intent) if intent != "ready" => intent.to_owned(),
        _ if backend["ejected"] == true => "ejected".to_owned(),
        _ if asks_for_no_sessions(&backend["heartbeat"]["sender_state"]) => {
            cell_text(&backend["heartbeat"]["sender_state"])
        }
        _ if backend["on_trial"] == true => "trial".to_owned(),
        Some("ready") if never_known(backend, pool) => match pool["heartbeats"] == true {
            true => "not heard".to_owned(),
            false => "no probes".to_owned(),
        },
        _ => cell_text(&backend["observation"]),
    };
    if backend["backup"] == true {
        state.push_str(" backup");
    }
    if backend["registered"] == true {
        state.push_str(" registered");
    }
    state
}

/// Whether it serves, and nothing will say whether it works.
fn never_known(backend: &Value, pool: &Value) -> bool {
    backend["observation"] == "unknown" && backend["eligible"] == true && pool["probes"] == false
}

/// Whether its own heartbeats ask for no sessions.
fn asks_for_no_sessions(sender_state: &Value) -> bool {
    sender_state.as_str().is_some_and(|state| state != "ready")
}

/// `3`, or `1/3` while it takes part with less.
fn weight(backend: &Value) -> String {
    let (full, effective) =
        (cell_text(&backend["weight"]), cell_text(&backend["effective_weight"]));
    if backend["eligible"] == true && full != effective {
        return format!("{effective}/{full}");
    }
    full
}

fn last_change(transition: &Value) -> String {
    if transition.is_null() {
        return String::new();
    }
    let (from, to) = (cell_text(&transition["from"]), cell_text(&transition["to"]));
    format!(
        "{from} -> {to} {} ago: {}",
        age(&transition["seconds_ago"]),
        cell_text(&transition["reason"])
    )
}

pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// One line of text for any value.
pub(super) fn cell_text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.replace('\n', " "),
        other => other.to_string(),
    }
}

/// `1 worker`, `2 workers`.
pub(super) fn plural(count: &Value, what: &str) -> String {
    let s = if *count == 1 { "" } else { "s" };
    format!("{} {what}{s}", cell_text(count))
}

/// The two largest units.
pub(super) fn age(seconds: &Value) -> String {
    let Some(exact) = seconds.as_f64() else { return "-".to_owned() };
    if exact < 1.0 {
        return format!("{:.0}ms", (exact * 1e3).floor());
    }
    let whole = exact as u64;
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{whole}s"),
        (0, 0, _) => format!("{minutes}m {}s", whole % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

fn latency(seconds: &Value) -> String {
    let Some(seconds) = seconds.as_f64() else { return "-".to_owned() };
    let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    match time.as_micros() {
        0..=999 => format!("{} us", time.as_micros()),
        1_000..=999_999 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.1} s"),
    }
}

fn size(bytes: &Value) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let Some(bytes) = bytes.as_u64() else { return "-".to_owned() };
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 1023.95 {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use serde_json::json;

    fn example() -> Value {
        json!({
            "version": "0.1.0", "generation": 3, "engine": "epoll", "engine_reason": "configured",
            "workers": 2, "uptime_seconds": 7384.2, "state": "serving",
            "connections_active": 12, "connections_max": 100000,
            "warnings": ["process.workers: 2 runs until a restart, then 4"],
            "frontends": [{
                "name": "web", "binds": ["0.0.0.0:8080", "[::]:8080"], "pool": "web",
                "sessions_active": 12, "sessions_total": 12345, "bytes_in_total": 999,
                "bytes_out_total": 5_368_709_120u64, "refused_total": 0,
            }],
            "pools": [{"name": "web", "balance": "random", "backends": [
                {"name": "a", "address": "10.0.0.11:8080", "weight": 3, "effective_weight": 1,
                 "backup": false, "intent": "ready", "observation": "suspect", "ejected": false,
                 "eligible": true, "sessions_active": 12, "sessions_total": 12000,
                 "connect_failures_total": 0, "connect_seconds": {"p50": 0.000213, "p99": 0.0312},
                 "last_transition": null},
                {"name": "b", "address": "unix:/run/b.sock", "weight": 1, "effective_weight": 0,
                 "backup": true, "intent": "draining", "observation": "up", "ejected": true,
                 "eligible": false, "sessions_active": 0, "sessions_total": 345,
                 "connect_failures_total": 7, "connect_seconds": {"p50": null, "p99": 2.5},
                 "last_transition": {"from": "up", "to": "draining", "reason": "operator",
                                     "seconds_ago": 75.9, "lasted_seconds": 3.0}},
            ]}],
            "leaving": [{"pool": "web", "name": "c", "address": "10.0.0.9:80", "sessions_active": 2}],
        })
    }

    #[test]
    fn everything_stands_on_one_screen() {
        expect![[r#"
            tidegate 0.1.0: serving, generation 3, up 2h 3m
            2 workers, 12 of 100000 sessions, engine epoll (configured)
            warning: process.workers: 2 runs until a restart, then 4

            FRONTEND  BIND                    POOL  ACTIVE  SESSIONS     IN      OUT  REFUSED
            web       0.0.0.0:8080,[::]:8080  web       12     12345  999 B  5.0 GiB        0

            POOL web: random, 1 of 2 eligible
            BACKEND  ADDRESS           STATE            WEIGHT  ACTIVE  SESSIONS  FAILED  CONNECT P50  CONNECT P99  LAST CHANGE
            a        10.0.0.11:8080    suspect             1/3      12     12000       0       213 us      31.2 ms
            b        unix:/run/b.sock  draining backup       1       0       345       7            -        2.5 s  up -> draining 1m 15s ago: operator

            leaving: web/c (10.0.0.9:80) still holds 2 sessions
        "#]]
        .assert_eq(&render(&example(), None));
    }

    #[test]
    fn lines_are_cut_to_the_terminal() {
        let text = fit(&render(&example(), Some(20)), Some(20));
        assert!(text.lines().all(|line| line.chars().count() <= 20), "{text}");
        assert!(text.starts_with("tidegate 0.1.0:\n"), "{text}");
        assert_eq!(fit("äöü", Some(3)), "äöü");
    }

    #[test]
    fn state_and_reason_are_whole_in_eighty_columns() {
        let backend = |name: &str, state: &str, reason: &str| {
            json!({"name": name, "address": name, "weight": 1, "effective_weight": 1,
                "backup": false, "intent": "ready", "observation": state, "ejected": false,
                "eligible": true, "sessions_active": 12, "sessions_total": 1_234_567,
                "connect_failures_total": 3, "connect_seconds": {"p50": 0.0002, "p99": 0.03},
                "last_transition": {"from": "up", "to": state, "reason": reason,
                                    "seconds_ago": 0.25, "lasted_seconds": 3.0}})
        };
        let reason = "3 probes failed in a row, last: connection refused";
        let mut status = example();
        status["pools"][0]["backends"] = json!([
            backend("10.100.200.11:8080", "down", reason),
            backend("10.100.200.12:8080", "unknown", "ejection ended"),
        ]);
        status["pools"][0]["probes"] = json!(false);
        status["confinement"] = json!([
            {"layer": "seccomp", "in_force": true, "detail": "a filter of 120 calls"},
            {"layer": "landlock", "in_force": false, "detail": "disabled in this kernel"},
        ]);
        expect![[r#"
            tidegate 0.1.0: serving, generation 3, up 2h 3m
            2 workers, 12 of 100000 sessions, engine epoll (configured)
            warning: process.workers: 2 runs until a restart, then 4

            FRONTEND  BIND                    POOL  ACTIVE  SESSIONS      OUT  REFUSED
            web       0.0.0.0:8080,[::]:8080  web       12     12345  5.0 GiB        0

            POOL web: random, 2 of 2 eligible
            BACKEND             STATE      WEIGHT  ACTIVE  SESSIONS  FAILED  CONNECT P99
            10.100.200.11:8080  down            1      12   1234567       3      30.0 ms
                up -> down 250ms ago: 3 probes failed in a row, last: connection refused
            10.100.200.12:8080  no probes       1      12   1234567       3      30.0 ms
                up -> unknown 250ms ago: ejection ended

            leaving: web/c (10.0.0.9:80) still holds 2 sessions

            confined by: seccomp
            not confined by: landlock (disabled in this kernel)"#]]
        .assert_eq(&render(&status, Some(80)));
        let text = render(&status, Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains(reason) && text.contains("no probes"), "{text}");
    }

    #[test]
    fn an_answer_without_the_fields_still_prints() {
        assert!(render(&json!({}), None).starts_with("tidegate -: -, generation -, up -\n"));
        assert!(render(&json!({"pools": [{"backends": [{}]}]}), None).contains("0 of 1 eligible"));
    }

    #[test]
    fn sizes_and_ages_keep_two_figures_that_matter() {
        let sizes: Vec<String> =
            [0u64, 1023, 1024, 1_048_575, u64::MAX].map(|n| size(&json!(n))).into();
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "16.0 EiB"]);
        let ages: Vec<String> =
            [0.0, 0.325, 0.9999, 1.9, 59.0, 61.0, 3600.0, 90_000.0].map(|n| age(&json!(n))).into();
        assert_eq!(ages, ["0ms", "325ms", "999ms", "1s", "59s", "1m 1s", "1h 0m", "1d 1h"]);
    }
}
