//! `stick-table` and `stick`: clients that return to the same server.
//!
//! Called by `pool`. Tidegate has no tables of clients; `source-hash` sends a client to the same
//! backend while the backend is eligible.

use super::lines::ProxyLines;
use crate::draft::DraftPool;
use crate::report::{ImportReport, LineVerdict};

/// Replaces the policy by `source-hash` if the section has `stick` rules.
pub(super) fn translate(
    in_force: &ProxyLines<'_>,
    pool: &mut DraftPool,
    report: &mut ImportReport,
) {
    let keywords = ["stick on", "stick match", "stick store-request", "stick store-response"];
    let rules: Vec<_> =
        keywords.iter().flat_map(|keyword| in_force.all(keyword).iter().copied()).collect();
    let table = in_force.last("stick-table");
    for rule in &rules {
        let expression = rule.word(2);
        let by_destination = expression == "dst" || expression == "dst_port";
        if by_destination || !matches!(rule.words.get(3).map(String::as_str), None | Some("table"))
        {
            let why = "Tidegate keeps no table of the servers that clients had";
            report.lose(rule.at, LineVerdict::NotPossible, why);
            continue;
        }
        let why = match expression {
            "src" => "a client changes its backend only if the pool changes",
            _ => "by address: clients behind one address get one backend",
        };
        let text = format!("balance = \"source-hash\": {why}");
        report.note(rule.at, LineVerdict::Approximated, text);
        pool.keys.set("balance", "\"source-hash\"", &[rule.at]);
        if let Some(balance) = in_force.last("balance") {
            let why = "balance = \"source-hash\", because clients stick to backends";
            report.note(balance.at, LineVerdict::Approximated, why);
        }
    }
    if let (Some(table), false) = (table, rules.is_empty()) {
        let why = "source-hash needs no table: two Tidegates with the same pool pick alike";
        report.note(table.at, LineVerdict::Dropped, why);
    }
    if let Some(persist) = in_force.last("persist") {
        let why = "by address instead of cookie, see balance";
        report.note(persist.at, LineVerdict::Approximated, why);
    }
}
