//! Conditions of routes, and `tcp-request` rules that accept or reject clients.
//!
//! Part of the translation of frontends.

use super::Translator;
use super::acl::{AclTerm, AclTest, Acls};
use super::frontend::list;
use super::lines::{Directive, ProxyLines};
use crate::draft::{DraftFrontend, DraftRoute, quoted};
use crate::prefix::AddressPrefix;
use crate::report::LineVerdict::{Approximated, Dropped, NotPossible, Translated, WithoutEffect};
use crate::report::SourceLine;
use crate::times::toml_time;

/// Largest number of connections in `rate` and `burst`.
const RATE_MAX: u64 = 1_000_000;

/// What the rules of a frontend have in common.
#[derive(Default)]
struct RuleState {
    /// Lists of clients, with their lines.
    allow: Vec<(String, SourceLine)>,
    deny: Vec<(String, SourceLine)>,
    /// Clients that an `accept` rule names before any rule rejects all others.
    accepted: Vec<(String, SourceLine)>,
    /// A rule looks at the protocol that clients speak.
    protocol: bool,
}

impl Translator<'_> {
    /// Returns a route for each alternative of the condition of a line.
    ///
    /// # Errors
    /// What a route cannot express.
    pub(super) fn route_conditions(
        &mut self,
        acls: &Acls,
        line: &Directive,
        start: usize,
    ) -> Result<Vec<DraftRoute>, String> {
        let alternatives = acls.condition(line.from(start))?;
        let routes: Result<Vec<DraftRoute>, String> =
            alternatives.iter().map(|terms| route(terms, line.at)).collect();
        for term in alternatives.iter().flatten() {
            for at in &term.at {
                match (&routes, &term.test) {
                    (_, AclTest::Unknown(why)) => self.report.lose(*at, NotPossible, why.clone()),
                    (Ok(_), _) => self.report.note(*at, Translated, "condition of a route"),
                    (Err(_), _) => {
                        self.report.note(*at, Dropped, "the rule that needs it is left out");
                    }
                }
            }
        }
        routes
    }

    /// Translates the `tcp-request` rules of a frontend.
    pub(super) fn rules(
        &mut self,
        in_force: &ProxyLines<'_>,
        acls: &Acls,
        frontend: &mut DraftFrontend,
    ) {
        let mut state = RuleState::default();
        let rules = in_force.all("tcp-request");
        for rule in rules {
            match (rule.word(1), rule.word(2)) {
                ("inspect-delay", _) => {}
                ("connection" | "session" | "content", "reject") => {
                    self.reject(in_force, acls, rule, &mut state, frontend);
                }
                ("connection" | "session" | "content", "accept") => {
                    self.accept(acls, rule, &mut state);
                }
                (_, action) if action.starts_with("track-sc") && rule.word(3) == "src" => {
                    self.report.note(rule.at, Translated, "limits are per client source");
                }
                _ => {
                    let why = "Tidegate has no such rule";
                    self.report.lose(rule.at, NotPossible, why);
                }
            }
        }
        for delay in rules.iter().filter(|rule| rule.word(1) == "inspect-delay") {
            self.inspect_delay(delay, &state, frontend);
        }
        self.consistent(&mut state, frontend);
        let lists = [("allow", &state.allow), ("deny", &state.deny)];
        for (key, entries) in lists {
            if !entries.is_empty() {
                let values: Vec<String> = entries.iter().map(|entry| entry.0.clone()).collect();
                let lines: Vec<SourceLine> = entries.iter().map(|entry| entry.1).collect();
                frontend.sources.set(key, list(&values), &lines);
            }
        }
        self.table(in_force, frontend);
    }

    /// Makes the lists mean the same as the rules. Rules that reject add up in HAProxy, and the
    /// longest prefix decides in Tidegate.
    fn consistent(&mut self, state: &mut RuleState, frontend: &DraftFrontend) {
        let denied: Vec<AddressPrefix> =
            state.deny.iter().filter_map(|entry| AddressPrefix::parse(&entry.0)).collect();
        let before = state.allow.len();
        state.allow.retain(|(text, _)| {
            AddressPrefix::parse(text)
                .is_none_or(|allowed| !denied.iter().any(|denied| denied.contains(allowed)))
        });
        let rejects = !denied.is_empty() || !frontend.sources.is_empty();
        for (_, at) in &state.accepted {
            if rejects || !frontend.routes.is_empty() {
                let why = "a rule that accepts before others reject has no counterpart";
                self.report.lose(*at, NotPossible, why);
            }
        }
        if before > 0 && state.allow.is_empty() {
            for (_, at) in &state.deny {
                self.report.lose(*at, NotPossible, "the rules reject every client");
            }
        }
    }

    fn reject(
        &mut self,
        in_force: &ProxyLines<'_>,
        acls: &Acls,
        rule: &Directive,
        state: &mut RuleState,
        frontend: &mut DraftFrontend,
    ) {
        let unless = match rule.word(3) {
            "if" => false,
            "unless" => true,
            _ => return self.reject_others(rule, state),
        };
        let alternatives = match acls.condition(rule.from(4)) {
            Ok(alternatives) => alternatives,
            Err(why) => return self.report.lose(rule.at, NotPossible, why),
        };
        if unless && (alternatives.len() > 1 || alternatives.iter().any(|terms| terms.len() > 1)) {
            let why = "a negated condition can have one test only";
            return self.report.lose(rule.at, NotPossible, why);
        }
        for terms in &alternatives {
            for at in terms.iter().flat_map(|term| &term.at) {
                self.report.note(*at, Translated, "condition of a rule");
            }
            match terms.as_slice() {
                [term] => self.reject_one(in_force, rule, term, unless, state, frontend),
                _ => match route(terms, rule.at) {
                    Ok(refused) => {
                        self.report.note(rule.at, Translated, "route with refuse = true");
                        frontend.routes.push(refused);
                    }
                    Err(why) => self.report.lose(rule.at, NotPossible, why),
                },
            }
        }
    }

    /// Translates a rule with one test.
    fn reject_one(
        &mut self,
        in_force: &ProxyLines<'_>,
        rule: &Directive,
        term: &AclTerm,
        unless: bool,
        state: &mut RuleState,
        frontend: &mut DraftFrontend,
    ) {
        let at = rule.at;
        match (&term.test, term.negated != unless) {
            (AclTest::Sources(sources), false) => {
                self.report.note(at, Translated, "sources.deny");
                state.deny.extend(sources.iter().map(|source| (source.clone(), at)));
            }
            (AclTest::Sources(sources), true) if state.allow.is_empty() => {
                self.report.note(at, Translated, "sources.allow");
                state.allow.extend(sources.iter().map(|source| (source.clone(), at)));
            }
            (AclTest::Connections(number), false) => {
                let text = format!("sources.connections_max = {number}");
                self.report.note(at, Translated, text);
                frontend.sources.set("connections_max", number.to_string(), &[at]);
            }
            (AclTest::Rate(number), false) => self.rate(in_force, at, *number, frontend),
            (AclTest::Protocol(name), true) => {
                state.protocol = true;
                let why = format!("clients that fail {name} are served, and the backend decides");
                self.report.lose(at, Dropped, why);
            }
            (AclTest::Unknown(why), _) => self.report.lose(at, NotPossible, why.clone()),
            (_, false) => match route(std::slice::from_ref(term), at) {
                Ok(refused) if !refused.keys.is_empty() => {
                    self.report.note(at, Translated, "route with refuse = true");
                    frontend.routes.push(refused);
                }
                Ok(_) => self.report.lose(at, NotPossible, "it rejects every client"),
                Err(why) => self.report.lose(at, NotPossible, why),
            },
            _ => self.report.lose(at, NotPossible, "a route has no negated condition"),
        }
    }

    /// A `reject` without condition: clients that a rule before accepts are served.
    fn reject_others(&mut self, rule: &Directive, state: &mut RuleState) {
        if state.accepted.is_empty() || !state.allow.is_empty() {
            let why = "it rejects every client that no rule before accepts";
            return self.report.lose(rule.at, NotPossible, why);
        }
        state.allow.append(&mut state.accepted);
        self.report.note(rule.at, Translated, "all others are denied, see sources.allow");
    }

    fn accept(&mut self, acls: &Acls, rule: &Directive, state: &mut RuleState) {
        let read = match rule.word(3) {
            "if" => acls.condition(rule.from(4)),
            "" => {
                return self.report.note(rule.at, WithoutEffect, "clients are accepted by default");
            }
            _ => Err("a negated condition has no counterpart".to_owned()),
        };
        let alternatives = match read {
            Ok(alternatives) => alternatives,
            Err(why) => return self.report.lose(rule.at, NotPossible, why),
        };
        for term in alternatives.iter().flatten() {
            for at in &term.at {
                self.report.note(*at, Translated, "condition of a rule");
            }
            match &term.test {
                AclTest::Sources(sources) if !term.negated => {
                    self.report.note(rule.at, Translated, "see sources.allow");
                    state.accepted.extend(sources.iter().map(|s| (s.clone(), rule.at)));
                }
                AclTest::Protocol(_) | AclTest::Always if !term.negated => {
                    let why = "Tidegate does not read the bytes of clients";
                    self.report.note(rule.at, Dropped, why);
                }
                AclTest::Unknown(why) => self.report.lose(rule.at, NotPossible, why.clone()),
                _ => self.report.lose(rule.at, NotPossible, "it has no counterpart"),
            }
        }
    }

    fn inspect_delay(
        &mut self,
        delay: &Directive,
        state: &RuleState,
        frontend: &mut DraftFrontend,
    ) {
        let time = crate::times::time(delay.word(2), 1).filter(|time| *time > 0);
        match time {
            Some(time) if state.protocol => {
                let time = toml_time(time);
                let why = format!("client_first = {time}: clients that stay silent are rejected");
                self.report.note(delay.at, Approximated, why);
                frontend.keys.set("client_first", time, &[delay.at]);
            }
            _ => {
                let why = "no rule is left that reads the first bytes of clients";
                self.report.note(delay.at, Dropped, why);
            }
        }
    }

    /// Sets `rate` from a number of connections in the period of the table.
    fn rate(
        &mut self,
        in_force: &ProxyLines<'_>,
        at: SourceLine,
        number: u64,
        frontend: &mut DraftFrontend,
    ) {
        let table = in_force.last("stick-table");
        let period = table.and_then(|table| period(&table.words.join(" ")));
        let Some(period) = period.filter(|period| *period > 0 && number > 0) else {
            let why = "the stick-table of this rule has no conn_rate";
            return self.report.lose(at, NotPossible, why);
        };
        let units = [(1_000, "s"), (60_000, "m"), (3_600_000, "h")];
        let exact = units.iter().find(|(length, _)| *length == period);
        let (length, unit) = exact.copied().unwrap_or((3_600_000, "h"));
        let scaled = u128::from(number) * u128::from(length) / u128::from(period);
        let scaled = u64::try_from(scaled).unwrap_or(RATE_MAX).clamp(1, RATE_MAX);
        let rate = format!("{scaled}/{unit}");
        frontend.sources.set("rate", quoted(&rate), &[at]);
        frontend.sources.set("burst", number.min(RATE_MAX).to_string(), &[at]);
        let why = format!(
            "sources.rate = \"{rate}\", burst = {number}: a token bucket instead of a sliding \
             counter"
        );
        self.report.note(at, Approximated, why);
    }

    /// Notes a table that only counts clients.
    fn table(&mut self, in_force: &ProxyLines<'_>, frontend: &DraftFrontend) {
        let limits = ["connections_max", "rate"];
        let used = limits.iter().any(|key| frontend.sources.get(key).is_some());
        if let (Some(table), true) = (in_force.last("stick-table"), used) {
            self.report.note(table.at, Translated, "Tidegate counts client sources itself");
        }
    }
}

/// Returns the period of `conn_rate(PERIOD)` in milliseconds.
fn period(table: &str) -> Option<u64> {
    let (_, rest) = table.split_once("conn_rate(")?;
    crate::times::time(rest.split_once(')')?.0, 1)
}

/// Returns a route with these conditions. Without a pool it refuses.
fn route(terms: &[AclTerm], at: SourceLine) -> Result<DraftRoute, String> {
    let mut route = DraftRoute { at: vec![at], ..Default::default() };
    for term in terms {
        let (key, values) = match &term.test {
            AclTest::Unknown(why) => return Err(why.clone()),
            _ if term.negated => return Err("a route has no negated condition".to_owned()),
            AclTest::Sources(values) => ("sources", values),
            AclTest::Ports(values) => ("ports", values),
            AclTest::Destinations(values) => ("addresses", values),
            AclTest::Always => continue,
            _ => return Err("a route has no such condition".to_owned()),
        };
        if route.keys.get(key).is_some() {
            return Err("a route has one list of each kind".to_owned());
        }
        let value = match key {
            "ports" => ports(values),
            _ => list(values),
        };
        let mut lines = term.at.clone();
        lines.push(at);
        route.keys.set(key, value, &lines);
    }
    Ok(route)
}

/// Returns a TOML list of ports and ranges.
fn ports(values: &[String]) -> String {
    let items = values.iter().map(|value| match value.contains('-') {
        true => quoted(value),
        false => value.clone(),
    });
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}
