//! `agent-check` of servers.
//!
//! Called by `checks`. A pool has one probe, so an agent is asked only in a pool without
//! `check`.

use super::checks::{Checks, INTER, note_without};
use super::lines::ProxyLines;
use super::server::HaproxyServer;
use crate::available::Available;
use crate::draft::{DraftPool, quoted};
use crate::report::{ImportReport, LineVerdict};
use crate::times::toml_time;

/// Translates the agents of a pool without `check`.
pub(super) fn probe(
    in_force: &ProxyLines<'_>,
    servers: &[HaproxyServer],
    can: Available,
    report: &mut ImportReport,
    pool: &mut DraftPool,
) {
    let asked: Vec<&HaproxyServer> =
        servers.iter().filter(|server| server.has("agent-check")).collect();
    let Some(first) = asked.first() else { return };
    let at = first.line_of("agent-check");
    let ports: Vec<_> = asked.iter().map(|server| server.argument("agent-port")).collect();
    if !can.agent || ports.iter().any(|port| port.is_none() || *port != ports[0]) {
        for server in &asked {
            let why = "the agents of a pool listen at one port";
            report.lose(server.line_of("agent-check"), LineVerdict::NotPossible, why);
        }
        return;
    }
    let why = "it has no agent in HAProxy; Tidegate asks an agent of every backend of the pool";
    note_without("agent-check", servers, why, report);
    let (keys, of_pool) = (&mut pool.probe, &mut pool.keys);
    Checks { in_force, report, keys, of_pool, at, can }.agent(&asked);
}

/// Notes the agents of servers that have `check` too.
pub(super) fn refuse(checked: &[&HaproxyServer], report: &mut ImportReport) {
    for server in checked.iter().filter(|server| server.has("agent-check")) {
        let why = "a pool has one probe, and it does what check says; without check, the probe asks \
                   the agent";
        report.lose(server.line_of("agent-check"), LineVerdict::NotPossible, why);
    }
}

impl Checks<'_, '_> {
    fn agent(&mut self, asked: &[&HaproxyServer]) {
        self.set("kind", "\"agent\"", self.at);
        self.same_for_all(asked, "agent-port", |checks, port, at| checks.set("port", port, at));
        self.same_for_all(asked, "agent-addr", |checks, address, at| {
            checks.set("address", quoted(address), at);
        });
        self.same_for_all(asked, "agent-send", |checks, send, at| {
            checks.set("send", quoted(send), at);
        });
        let inter = self.time(asked, "agent-inter");
        let (interval, at) = inter.unwrap_or((INTER, self.at));
        if inter.is_some() {
            self.set("interval", toml_time(interval), at);
        }
        self.keep("timeout", toml_time(interval), at);
        self.keep("fast_interval", toml_time(interval), at);
        let why = "an agent that does not answer makes its backend down after fall = 3 probes; in \
                   HAProxy it has no effect. A weight above 100% is 100%";
        for server in asked {
            self.report.note(server.line_of("agent-check"), LineVerdict::Approximated, why);
        }
    }
}
