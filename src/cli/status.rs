//! `tidegate status`: the running balancer on one screen.
//!
//! Called by the command line; the admin API gives the facts. It shows what the
//! JSON says and works nothing out but words, columns and units; fields an
//! older balancer does not have show as `-`.

use super::Exit;
use super::client::{ClientArgs, ask, printable, report};
use hyper::Method;
use serde_json::Value;
use std::io::IsTerminal;
use std::time::Duration;

/// Asks and prints a table, or the JSON.
pub fn main(args: &ClientArgs) -> Exit {
    let answer = ask(args, Method::GET, "/v1/status");
    report(args, answer, |status| fit(&printable(&render(status)), terminal_width()))
}

/// Columns of the terminal; `None` where output goes elsewhere and is kept
/// whole.
fn terminal_width() -> Option<usize> {
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

fn render(status: &Value) -> String {
    let mut text = head(status);
    text.push_str(&confinement(list(&status["confinement"])));
    for warning in list(&status["warnings"]) {
        text.push_str(&format!("warning: {}\n", word(warning)));
    }
    text.push_str(&troubled_workers(status));
    text.push_str(&channel(&status["heartbeat"]));
    text.push('\n');
    text.push_str(&frontends(list(&status["frontends"])));
    for pool in list(&status["pools"]) {
        text.push('\n');
        text.push_str(&pool_table(pool));
    }
    for backend in list(&status["leaving"]) {
        text.push_str(&format!(
            "\nleaving: {}/{} ({}) still holds {} sessions\n",
            word(&backend["pool"]),
            word(&backend["name"]),
            word(&backend["address"]),
            word(&backend["sessions_active"]),
        ));
    }
    text
}

fn head(status: &Value) -> String {
    format!(
        "tidegate {}: {}, generation {}, up {}\n{} workers, engine {} ({}), {} of {} sessions\n",
        word(&status["version"]),
        word(&status["state"]),
        word(&status["generation"]),
        age(&status["uptime_seconds"]),
        word(&status["workers"]),
        word(&status["engine"]),
        word(&status["engine_reason"]),
        word(&status["connections_active"]),
        word(&status["connections_max"]),
    )
}

/// Workers that are stalled or have panicked; mostly there is nothing to say.
fn troubled_workers(status: &Value) -> String {
    let mut text = String::new();
    for stalled in list(&status["stalled"]) {
        text.push_str(&format!(
            "WORKER {} STALLED for {}, while {}\n",
            word(&stalled["worker"]),
            age(&stalled["seconds"]),
            word(&stalled["stage"]),
        ));
    }
    if status["worker_panics_total"].as_u64().is_some_and(|panics| panics > 0) {
        text.push_str(&format!(
            "{} panics, {} restarts of workers: see the log\n",
            word(&status["worker_panics_total"]),
            word(&status["worker_restarts_total"]),
        ));
    }
    text
}

/// What holds the process in, and what could and does not; nothing where an older
/// balancer does not say.
fn confinement(layers: &[Value]) -> String {
    let named = |layer: &Value| format!("{} ({})", word(&layer["layer"]), word(&layer["detail"]));
    let (held, not): (Vec<_>, Vec<_>) = layers.iter().partition(|layer| layer["in_force"] == true);
    let line = |head: &str, layers: Vec<&Value>| match layers.is_empty() {
        true => String::new(),
        false => {
            format!("{head}: {}\n", layers.into_iter().map(named).collect::<Vec<_>>().join(", "))
        }
    };
    line("confined by", held) + &line("not confined by", not)
}

fn frontends(frontends: &[Value]) -> String {
    let mut table = Table::new(&[
        "FRONTEND",
        "BIND",
        "POOL",
        "<ACTIVE",
        "<SESSIONS",
        "<IN",
        "<OUT",
        "<REFUSED",
    ]);
    for frontend in frontends {
        let binds: Vec<String> = list(&frontend["binds"]).iter().map(word).collect();
        table.row(vec![
            word(&frontend["name"]),
            binds.join(","),
            word(&frontend["pool"]),
            word(&frontend["sessions_active"]),
            word(&frontend["sessions_total"]),
            size(&frontend["bytes_in_total"]),
            size(&frontend["bytes_out_total"]),
            word(&frontend["refused_total"]),
        ]);
    }
    table.finish()
}

fn pool_table(pool: &Value) -> String {
    let backends = list(&pool["backends"]);
    let eligible = backends.iter().filter(|b| b["eligible"] == true).count();
    let (name, balance) = (word(&pool["name"]), word(&pool["balance"]));
    let title = format!(
        "POOL {name}: {balance}, {eligible} of {} eligible{}\n",
        backends.len(),
        remarks(pool)
    );
    let mut table = Table::new(&[
        "BACKEND",
        "ADDRESS",
        "STATE",
        "<WEIGHT",
        "<ACTIVE",
        "<SESSIONS",
        "<FAILED",
        "<P50",
        "<P99",
        "LAST CHANGE",
    ]);
    for backend in backends {
        table.row(vec![
            word(&backend["name"]),
            word(&backend["address"]),
            state(backend),
            weight(backend),
            word(&backend["sessions_active"]),
            word(&backend["sessions_total"]),
            word(&backend["connect_failures_total"]),
            latency(&backend["connect_seconds"]["p50"]),
            latency(&backend["connect_seconds"]["p99"]),
            last_change(&backend["last_transition"]),
        ]);
    }
    title + &table.finish()
}

/// What else there is to say of a pool.
fn remarks(pool: &Value) -> String {
    let mut text = String::new();
    if let Some(queued) = pool["queued"].as_u64().filter(|queued| *queued > 0) {
        text.push_str(&format!(", {queued} waiting"));
    }
    if let Some(max) = pool["registered_max"].as_u64().filter(|max| *max > 0) {
        text.push_str(&format!(", {} registered of {max}", word(&pool["registered"])));
    }
    match pool["none_eligible"].as_str() {
        Some("try-all") => text.push_str(", NOBODY ELIGIBLE: all are tried"),
        Some("former") => text.push_str(", no verdict yet: former backends serve"),
        Some("wait") => text.push_str(", no verdict yet: clients wait for one"),
        Some(_) => text.push_str(", NOBODY ELIGIBLE: clients are refused"),
        None => {}
    }
    if !pool["frozen"].is_null() {
        text.push_str(&format!(
            "\nFROZEN for {}: {}; no silent backend is taken out",
            age(&pool["frozen"]["seconds"]),
            word(&pool["frozen"]["reason"])
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
        word(&rejection["pool"]),
        word(&rejection["backend"]),
        word(&rejection["from"]),
        word(&rejection["reason"]),
        word(&rejection["total"]),
        age(&rejection["seconds_ago"]),
        word(&rejection["help"]),
    )
}

/// Heartbeats as a whole, where they are taken.
fn channel(heartbeat: &Value) -> String {
    if heartbeat.is_null() {
        return String::new();
    }
    let listen: Vec<String> = list(&heartbeat["listen"]).iter().map(word).collect();
    let mut text = format!(
        "heartbeats on {}: {} taken, {} refused, {} lost in the kernel\n",
        listen.join(","),
        word(&heartbeat["accepted_total"]),
        word(&heartbeat["rejected_total"]),
        word(&heartbeat["kernel_drops_total"]),
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
            word(&heartbeat["frozen"]["reason"])
        ));
    }
    text
}

/// The one word that matters most: what an operator did, then an ejection, then
/// what its own heartbeats ask for, then what probes and heartbeats show.
fn state(backend: &Value) -> String {
    let mut state = match backend["intent"].as_str() {
        Some(intent) if intent != "ready" => intent.to_owned(),
        _ if backend["ejected"] == true => "ejected".to_owned(),
        _ if is_told(&backend["heartbeat"]["sender_state"]) => {
            word(&backend["heartbeat"]["sender_state"])
        }
        _ => word(&backend["observation"]),
    };
    if backend["backup"] == true {
        state.push_str(" backup");
    }
    if backend["registered"] == true {
        state.push_str(" registered");
    }
    state
}

/// Whether its own heartbeats ask for no sessions.
fn is_told(sender_state: &Value) -> bool {
    sender_state.as_str().is_some_and(|state| state != "ready")
}

/// `3`, or `1/3` while it takes part with less.
fn weight(backend: &Value) -> String {
    let (full, effective) = (word(&backend["weight"]), word(&backend["effective_weight"]));
    if backend["eligible"] == true && full != effective {
        return format!("{effective}/{full}");
    }
    full
}

fn last_change(transition: &Value) -> String {
    if transition.is_null() {
        return "-".to_owned();
    }
    let (from, to) = (word(&transition["from"]), word(&transition["to"]));
    format!(
        "{from} -> {to} {} ago: {}",
        age(&transition["seconds_ago"]),
        word(&transition["reason"])
    )
}

pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// One line of text for any value.
pub(super) fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.replace('\n', " "),
        other => other.to_string(),
    }
}

/// The two largest units.
pub(super) fn age(seconds: &Value) -> String {
    let Some(whole) = seconds.as_f64().map(|s| s as u64) else { return "-".to_owned() };
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

/// Columns as wide as their widest cell; those headed `<` are set flush right.
struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

// === impl Table ===

impl Table {
    fn new(header: &[&str]) -> Table {
        Table {
            right: header.iter().map(|name| name.starts_with('<')).collect(),
            rows: vec![header.iter().map(|name| name.trim_start_matches('<').to_owned()).collect()],
        }
    }

    fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn finish(&self) -> String {
        let width = |column: usize| {
            self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), right) in row.iter().zip(&widths).zip(&self.right) {
                match right {
                    true => line.push_str(&format!("{cell:>width$}  ")),
                    false => line.push_str(&format!("{cell:<width$}  ")),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
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
            2 workers, engine epoll (configured), 12 of 100000 sessions
            warning: process.workers: 2 runs until a restart, then 4

            FRONTEND  BIND                    POOL  ACTIVE  SESSIONS     IN      OUT  REFUSED
            web       0.0.0.0:8080,[::]:8080  web       12     12345  999 B  5.0 GiB        0

            POOL web: random, 1 of 2 eligible
            BACKEND  ADDRESS           STATE            WEIGHT  ACTIVE  SESSIONS  FAILED     P50      P99  LAST CHANGE
            a        10.0.0.11:8080    suspect             1/3      12     12000       0  213 us  31.2 ms  -
            b        unix:/run/b.sock  draining backup       1       0       345       7       -    2.5 s  up -> draining 1m 15s ago: operator

            leaving: web/c (10.0.0.9:80) still holds 2 sessions
        "#]]
        .assert_eq(&render(&example()));
    }

    #[test]
    fn lines_are_cut_to_the_terminal() {
        let text = fit(&render(&example()), Some(20));
        assert!(text.lines().all(|line| line.chars().count() <= 20), "{text}");
        assert!(text.starts_with("tidegate 0.1.0: ser…\n"));
        assert_eq!(fit("äöü", Some(3)), "äöü");
    }

    #[test]
    fn an_answer_without_the_fields_still_prints() {
        assert!(render(&json!({})).starts_with("tidegate -: -, generation -, up -\n"));
        assert!(render(&json!({"pools": [{"backends": [{}]}]})).contains("0 of 1 eligible"));
    }

    #[test]
    fn sizes_and_ages_keep_two_figures_that_matter() {
        let sizes: Vec<String> =
            [0u64, 1023, 1024, 1_048_575, u64::MAX].map(|n| size(&json!(n))).into();
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "16.0 EiB"]);
        let ages: Vec<String> = [0, 59, 61, 3600, 90_000].map(|n| age(&json!(n))).into();
        assert_eq!(ages, ["0s", "59s", "1m 1s", "1h 0m", "1d 1h"]);
    }
}
