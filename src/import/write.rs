//! Writes the common model as TOML, and removes what Tidegate rejects.
//!
//! Called after a reader has filled the model. Each part has a comment with its source lines.
//! The output passes `tidegate check`: a rejected part is removed, and its source lines are NOT
//! POSSIBLE.

use crate::defaults::DraftDefaults;
use crate::draft::{Draft, DraftFrontend, DraftKey, DraftKeys, DraftPool, quoted};
use crate::report::{ImportReport, LineVerdict, SourceLine};
use std::collections::BTreeSet;

/// Most source lines in the comment of a key. A key of `[defaults]` can have one for each section.
const PLACES_MAX: usize = 6;

/// One line of the output.
struct OutLine {
    text: String,
    at: Vec<SourceLine>,
    /// Number of the table.
    table: usize,
    /// The table cannot do without this line.
    required: bool,
}

/// The output in the making.
struct Output<'r> {
    lines: Vec<OutLine>,
    /// For each table the one that it is a part of.
    parents: Vec<Option<usize>>,
    report: &'r ImportReport,
}

/// Returns the TOML text. Removes every part that Tidegate rejects and reports it. `None` if no
/// frontend is left.
pub(crate) fn write(
    draft: &Draft,
    shared: &DraftDefaults,
    report: &mut ImportReport,
) -> Option<String> {
    let mut output = Output { lines: Vec::new(), parents: Vec::new(), report };
    output.draft(draft, shared);
    let Output { mut lines, parents, .. } = output;
    // Each pass removes a line, so the passes end.
    loop {
        if !lines.iter().any(|line| line.text.starts_with("[frontend.")) {
            return None;
        }
        let text = joined(&lines);
        let problems = match tidegate_config::parse(&text, "output") {
            Ok(_) => return Some(text),
            Err(problems) => problems,
        };
        // A value can have several lines.
        let numbers: Vec<usize> = (0..lines.len())
            .flat_map(|number| std::iter::repeat_n(number, lines[number].text.split('\n').count()))
            .collect();
        let number = |line: usize| numbers.get(line.saturating_sub(1)).copied();
        let wrong: Vec<(usize, String)> = problems
            .list
            .iter()
            .map(|problem| (number(problem.line).unwrap_or(usize::MAX), problem.message.clone()))
            .collect();
        remove(&mut lines, &parents, &wrong, report);
    }
}

/// Removes the lines of problems, with the tables that need them.
fn remove(
    lines: &mut Vec<OutLine>,
    parents: &[Option<usize>],
    wrong: &[(usize, String)],
    report: &mut ImportReport,
) {
    let (mut gone_tables, mut gone_lines) = (BTreeSet::new(), BTreeSet::new());
    for (number, message) in wrong {
        let number = (*number).min(lines.len().saturating_sub(1));
        let Some(line) = lines.get(number) else { continue };
        for at in &line.at {
            report.lose(*at, LineVerdict::NotPossible, format!("Tidegate rejects it: {message}"));
        }
        gone_lines.insert(number);
        if line.required || line.text.is_empty() {
            gone_tables.insert(line.table);
        }
    }
    for (table, parent) in parents.iter().enumerate() {
        if parent.is_some_and(|parent| gone_tables.contains(&parent)) {
            gone_tables.insert(table);
        }
    }
    let (mut number, mut gone) = (0, BTreeSet::new());
    lines.retain(|line| {
        number += 1;
        let goes = gone_lines.contains(&(number - 1)) || gone_tables.contains(&line.table);
        if goes {
            gone.extend(line.at.iter().copied());
        }
        !goes
    });
    let used: BTreeSet<SourceLine> = lines.iter().flat_map(|line| &line.at).copied().collect();
    for at in gone.difference(&used) {
        report.note(*at, LineVerdict::Dropped, "the part that needs it is left out");
    }
}

fn joined(lines: &[OutLine]) -> String {
    let mut text = String::new();
    for line in lines {
        text.push_str(&line.text);
        text.push('\n');
    }
    text
}

// === impl Output ===

impl Output<'_> {
    fn draft(&mut self, draft: &Draft, shared: &DraftDefaults) {
        self.keys_table("[process]", &draft.process, None, &[]);
        self.keys_table("[log]", &draft.log, None, &[]);
        self.keys_table("[dns]", &draft.dns, None, &[]);
        self.keys_table("[defaults.frontend]", &shared.frontend, None, &[]);
        self.keys_table("[defaults.pool]", &shared.pool, None, &[]);
        self.keys_table("[defaults.probe]", &shared.probe, None, &[]);
        for frontend in &draft.frontends {
            self.frontend(frontend);
        }
        for pool in &draft.pools {
            self.pool(pool);
        }
    }

    fn frontend(&mut self, frontend: &DraftFrontend) {
        let path = format!("frontend.{}", key(&frontend.name));
        let table = self.table(&format!("[{path}]"), None, &frontend.at);
        let mut binds: Vec<String> = frontend.binds.iter().map(|bind| bind.0.clone()).collect();
        let at: Vec<SourceLine> = frontend.binds.iter().map(|bind| bind.1).collect();
        match binds.len() {
            1 => self.line(table, true, &at, format!("bind = {}", binds.swap_remove(0))),
            _ => {
                self.line(table, true, &[], "bind = [".to_owned());
                for (bind, at) in &frontend.binds {
                    self.line(table, false, &[*at], format!("  {bind},"));
                }
                self.line(table, true, &[], "]".to_owned());
            }
        }
        self.line(table, true, &frontend.at, format!("pool = {}", quoted(&frontend.pool)));
        self.keys(table, &frontend.keys, &frontend.at);
        self.keys_table(&format!("[{path}.sources]"), &frontend.sources, Some(table), &frontend.at);
        if !frontend.proxy.is_empty() {
            let at = &frontend.accept_proxy;
            let part = self.table(&format!("[{path}.proxy_protocol]"), Some(table), at);
            self.line(part, true, at, format!("from = {}", frontend.proxy));
        }
        for route in &frontend.routes {
            let at = route.at.clone();
            let part = self.table(&format!("[[{path}.route]]"), Some(table), &at);
            for DraftKey { name, value, at } in &route.keys.0 {
                self.line(part, true, at, format!("{name} = {value}"));
            }
            let target = route.pool.as_ref().map(|pool| format!("pool = {}", quoted(pool)));
            self.line(part, true, &at, target.unwrap_or_else(|| "refuse = true".to_owned()));
        }
    }

    fn pool(&mut self, pool: &DraftPool) {
        let path = format!("pool.{}", key(&pool.name));
        let table = self.table(&format!("[{path}]"), None, &pool.at);
        self.keys(table, &pool.keys, &pool.at);
        let probe = format!("[{path}.probe]");
        if let Some(kind) = pool.probe.0.iter().find(|key| key.name == "kind") {
            let part = self.table(&probe, Some(table), &kind.at);
            for DraftKey { name, value, at } in &pool.probe.0 {
                // Without its kind, port or answer the probe would accept other backends.
                let required = !matches!(*name, "rise" | "fall" | "down_interval");
                let text = format!("{name} = {value}");
                self.line(part, required, at, text);
            }
        }
        self.keys_table(&format!("[{path}.ejection]"), &pool.ejection, Some(table), &pool.at);
        for backend in &pool.backends {
            let part = self.table(&format!("[[{path}.backend]]"), Some(table), &backend.at);
            self.line(part, true, &backend.at, format!("name = {}", quoted(&backend.name)));
            self.line(part, true, &backend.at, format!("address = {}", quoted(&backend.address)));
            self.keys(part, &backend.keys, &backend.at);
        }
    }

    /// Writes a table that is left out if it has no keys.
    fn keys_table(
        &mut self,
        header: &str,
        keys: &DraftKeys,
        parent: Option<usize>,
        at: &[SourceLine],
    ) {
        if !keys.is_empty() {
            let table = self.table(header, parent, at);
            self.keys(table, keys, at);
        }
    }

    /// Begins a table: an empty line, its source lines, its header.
    fn table(&mut self, header: &str, parent: Option<usize>, at: &[SourceLine]) -> usize {
        let table = self.parents.len();
        self.parents.push(parent);
        if !self.lines.is_empty() {
            self.line(table, false, &[], String::new());
        }
        if !at.is_empty() {
            let places = self.places(at);
            self.line(table, false, &[], format!("# {places}"));
        }
        self.line(table, true, at, header.to_owned());
        table
    }

    fn keys(&mut self, table: usize, keys: &DraftKeys, of_table: &[SourceLine]) {
        for DraftKey { name, value, at } in &keys.0 {
            let mut text = format!("{name} = {value}");
            let short = (1..=PLACES_MAX).contains(&at.len());
            if short && at.iter().any(|at| !of_table.contains(at)) {
                text.push_str(&format!("  # {}", self.places(at)));
            }
            self.line(table, false, at, text);
        }
    }

    fn line(&mut self, table: usize, required: bool, at: &[SourceLine], text: String) {
        self.lines.push(OutLine { text, at: at.to_vec(), table, required });
    }

    /// Returns `FILE:LINE, LINE`.
    fn places(&self, at: &[SourceLine]) -> String {
        let mut sorted = at.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let mut text = String::new();
        let mut file = None;
        for at in sorted {
            match file == Some(at.file) {
                true => text.push_str(&format!(", {}", at.line)),
                false => {
                    let separator = if text.is_empty() { "" } else { ", " };
                    text.push_str(&format!("{separator}{}", self.report.place(at)));
                }
            }
            file = Some(at.file);
        }
        // A file name can have any character.
        text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
    }
}

/// Returns a name as a TOML key.
fn key(name: &str) -> String {
    match name.contains('.') || name.is_empty() {
        true => quoted(name),
        false => name.to_owned(),
    }
}
