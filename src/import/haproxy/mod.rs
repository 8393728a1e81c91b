//! Reads `haproxy.cfg` (HAProxy 1.8 to 3.x) and translates what is for TCP.
//!
//! Called by [`crate::import`]. Steps: `lines` and `lex` make sections of directives;
//! `frontend` and `pool` translate them; `words` has the reasons for keywords without
//! counterpart.

mod acl;
mod agent_check;
mod bind;
mod check_rules;
mod checks;
mod external_check;
mod frontend;
mod globals;
mod lex;
mod lines;
mod pool;
mod rules;
mod server;
mod state;
mod sticky;
mod words;

use crate::ImportRequest;
use crate::available::Available;
use crate::draft::{Draft, UsedNames};
use crate::report::LineVerdict::{Approximated, Dropped, NotUnderstood, Translated, WithoutEffect};
use crate::report::{ImportReport, SourceLine};
pub(crate) use checks::CHECK_KEYWORDS;
use lines::{Directive, HaproxySection, ProxyLines};
use std::collections::{BTreeMap, BTreeSet};

/// Keywords that a frontend translates.
const OF_FRONTENDS: &[&str] = &[
    "bind",
    "mode",
    "maxconn",
    "default_backend",
    "use_backend",
    "acl",
    "tcp-request",
    "log",
    "option tcplog",
    "timeout client",
    "timeout client-fin",
    "disabled",
    "stick-table",
    "backlog",
];

/// Keywords that a pool translates, with those of its checks.
const OF_POOLS: &[&str] = &[
    "mode",
    "server",
    "default-server",
    "server-template",
    "balance",
    "hash-type",
    "retries",
    "option redispatch",
    "option allbackups",
    "timeout connect",
    "timeout server",
    "timeout server-fin",
    "timeout tunnel",
    "timeout queue",
    "stick on",
    "stick match",
    "stick store-request",
    "stick store-response",
    "stick-table",
    "source",
    "persist",
    "disabled",
    "acl",
    "log",
];

/// The translation of one file.
struct Translator<'t> {
    sections: &'t [HaproxySection],
    report: &'t mut ImportReport,
    draft: Draft,
    can: Available,
    http_as_tcp: bool,
    frontend_names: UsedNames,
    pool_names: UsedNames,
    /// Names of translated pools by the number of their section.
    pools: BTreeMap<usize, String>,
    /// The only port of the clients of a pool, by the number of its section.
    client_ports: BTreeMap<usize, Option<u16>>,
    global_logs: Vec<Directive>,
    /// Lines of `option tcplog`.
    tcplogs: BTreeSet<SourceLine>,
}

/// Reads a file and fills the report.
pub(crate) fn read(request: &ImportRequest<'_>, report: &mut ImportReport) -> Draft {
    let file = report.add_file(request.name);
    let mut environment = request.environment.clone();
    let sections = lines::sections(request.text, file, &mut environment, report);
    let mut translator = Translator {
        sections: &sections,
        report,
        draft: Draft::default(),
        can: Available::now(),
        http_as_tcp: request.http_as_tcp,
        frontend_names: UsedNames::default(),
        pool_names: UsedNames::default(),
        pools: BTreeMap::new(),
        client_ports: BTreeMap::new(),
        global_logs: Vec::new(),
        tcplogs: BTreeSet::new(),
    };
    translator.run();
    translator.draft
}

impl Translator<'_> {
    fn run(&mut self) {
        let sections = self.sections;
        for section in sections.iter().filter(|section| section.kind == "global") {
            self.global(section);
        }
        let mut logs: Vec<&Directive> = Vec::new();
        let is_client_side = |kind: &str| kind == "frontend" || kind == "listen";
        for (index, section) in sections.iter().enumerate() {
            let in_force = ProxyLines::of(section, sections);
            if !is_client_side(&section.kind) {
                continue;
            }
            if self.is_http(section) {
                self.http_section(section, &in_force);
            } else if let Some(disabled) = own(section, &in_force, "disabled") {
                self.report.note(disabled.at, Translated, "");
                self.whole(section, Dropped, "it is disabled");
            } else if section.kind == "frontend" || !in_force.all("bind").is_empty() {
                self.frontend(index);
                logs.extend(in_force.last("log"));
                self.notes(section, &in_force);
            }
        }
        self.other_sections();
        self.logs(&logs);
        self.undecided();
    }

    /// Notes what is left: pools, `defaults`, `resolvers` and sections of HAProxy alone.
    fn other_sections(&mut self) {
        let sections = self.sections;
        let used = self.used_resolvers();
        for (index, section) in sections.iter().enumerate() {
            match &*section.kind {
                "backend" | "listen" if self.pools.contains_key(&index) => {
                    self.notes(section, &ProxyLines::of(section, sections));
                }
                "backend" if self.is_http(section) => {
                    self.whole(section, Dropped, "it is for HTTP");
                }
                "backend" => self.whole(section, Dropped, "no translated frontend uses it"),
                "listen" if self.report.is_undecided(section.header.at) => {
                    self.whole(section, Dropped, "it has no bind");
                }
                "global" | "frontend" | "listen" => {}
                "defaults" => {
                    let at = section.header.at;
                    self.report.note(at, Translated, "resolved into each section");
                }
                "resolvers" => self.resolvers(section, used.contains(&section.name)),
                _ => self.other(section),
            }
        }
    }

    /// Returns the names of `resolvers` sections that servers of translated pools name.
    fn used_resolvers(&self) -> BTreeSet<String> {
        let mut used = BTreeSet::new();
        for index in self.pools.keys() {
            let in_force = ProxyLines::of(&self.sections[*index], self.sections);
            for keyword in ["server", "default-server", "server-template"] {
                for line in in_force.all(keyword) {
                    let names = line.words.windows(2).filter(|pair| pair[0] == "resolvers");
                    used.extend(names.map(|pair| pair[1].clone()));
                }
            }
        }
        used
    }

    fn is_http(&self, section: &HaproxySection) -> bool {
        !self.http_as_tcp && ProxyLines::of(section, self.sections).mode() == "http"
    }

    /// Drops a section for HTTP as a whole.
    fn http_section(&mut self, section: &HaproxySection, in_force: &ProxyLines<'_>) {
        let has = |keyword: &str| !in_force.all(keyword).is_empty();
        let serves = ["server", "server-template", "use_backend", "default_backend"];
        let statistics = ["stats enable", "stats uri", "http-request"].iter().any(|word| has(word));
        if statistics && !serves.iter().any(|word| has(word)) {
            return self.whole(section, Dropped, "HTTP; Tidegate has an admin API, see [admin]");
        }
        self.whole(section, Dropped, "HTTP; --http-as-tcp balances it as TCP");
        for at in section.lines() {
            self.report.mark_lost(at);
        }
    }

    /// Notes every keyword of a translated section that nothing translates.
    fn notes(&mut self, section: &HaproxySection, in_force: &ProxyLines<'_>) {
        let mode = in_force.last("mode");
        for line in in_force.all("mode") {
            let last = mode.is_some_and(|mode| mode.at == line.at);
            match line.word(1) {
                "tcp" => self.report.note(line.at, Translated, ""),
                "http" if last => {
                    let why = "balanced as TCP: Tidegate does not read HTTP";
                    self.report.note(line.at, Approximated, why);
                }
                _ => self.report.note(line.at, WithoutEffect, "a section overrides it"),
            }
        }
        for keyword in in_force.keywords() {
            let handled = OF_FRONTENDS.contains(&keyword) || is_of_pools(keyword);
            let (verdict, why) = match words::proxy(keyword) {
                _ if handled => continue,
                Some(known) => known,
                None => (NotUnderstood, "the keyword is not known"),
            };
            for line in in_force.all(keyword) {
                self.report.note(line.at, verdict, why);
            }
        }
        self.tcplogs.extend(in_force.last("option tcplog").map(|line| line.at));
        self.misplaced(section);
    }

    /// Notes keywords that HAProxy ignores in this kind of section.
    fn misplaced(&mut self, section: &HaproxySection) {
        let in_force = ProxyLines::of(section, std::slice::from_ref(section));
        for keyword in in_force.keywords() {
            let (of_frontends, of_pools) = (OF_FRONTENDS.contains(&keyword), is_of_pools(keyword));
            let has_effect = match &*section.kind {
                "frontend" => of_frontends,
                "backend" => of_pools,
                _ => return,
            };
            if (of_frontends || of_pools) && !has_effect {
                for line in in_force.all(keyword) {
                    let why = format!("it has no effect in a {}", section.kind);
                    self.report.note(line.at, WithoutEffect, why);
                }
            }
        }
    }

    /// Decides lines that nothing has used: without effect in `defaults`, else not understood.
    fn undecided(&mut self) {
        let open: BTreeSet<SourceLine> = self.report.undecided().into_iter().collect();
        for section in self.sections.iter().filter(|section| section.kind == "defaults") {
            for line in section.directives.iter().filter(|line| open.contains(&line.at)) {
                let why = "no translated section uses it";
                self.report.note(line.at, WithoutEffect, why);
            }
        }
    }
}

fn is_of_pools(keyword: &str) -> bool {
    OF_POOLS.contains(&keyword) || CHECK_KEYWORDS.contains(&keyword)
}

/// Returns the directive if it is in the section itself.
fn own<'s>(
    section: &HaproxySection,
    in_force: &ProxyLines<'s>,
    keyword: &str,
) -> Option<&'s Directive> {
    in_force.last(keyword).filter(|line| section.directives.iter().any(|one| one.at == line.at))
}
