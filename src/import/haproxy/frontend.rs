//! A `frontend` or the clients' side of a `listen`: one frontend.
//!
//! Called by `haproxy::Translator` once per section.

use super::Translator;
use super::acl::Acls;
use super::lines::{Directive, HaproxySection, ProxyLines};
use crate::draft::{DraftFrontend, DraftRoute, quoted, quoted_list};
use crate::report::LineVerdict::{Approximated, Dropped, NotPossible, Translated, WithoutEffect};
use crate::report::SourceLine;
use crate::times::{LONGEST, toml_time};

/// Most sessions that a cap can name.
const SESSIONS_MAX: u64 = 10_000_000;

impl Translator<'_> {
    /// Translates the section with this number.
    pub(super) fn frontend(&mut self, index: usize) {
        let sections = self.sections;
        let section = &sections[index];
        let in_force = ProxyLines::of(section, sections);
        let acls = Acls::read(in_force.all("acl"));
        let at = section.header.at;
        let name = self.frontend_names.take(&section.name);
        let mut frontend = DraftFrontend { name, at: vec![at], ..Default::default() };
        let binds = in_force.all("bind").iter();
        let ports: Vec<Option<u16>> =
            binds.flat_map(|line| self.bind(line, &mut frontend)).collect();
        if frontend.binds.is_empty() {
            self.report.lose(at, NotPossible, "no address is left to listen on");
        }
        self.report.note(at, Translated, format!("[frontend.{}]", frontend.name));
        let port = ports.first().copied().flatten();
        let port = port.filter(|port| ports.iter().all(|other| *other == Some(*port)));
        self.rules(&in_force, &acls, &mut frontend);
        self.routes(&in_force, &acls, port, &mut frontend);
        self.default_pool(index, &in_force, port, &mut frontend);
        self.cap(&in_force, &mut frontend);
        self.unused_acls(&in_force);
        if !frontend.accept_proxy.is_empty() {
            frontend.proxy = quoted_list(["0.0.0.0/0", "::/0"]);
        }
        if let Some(line) = in_force.last("backlog") {
            self.report.note(line.at, Dropped, "backlog is a key of a bind; its default is 65,535");
        }
        if frontend.pool.is_empty() {
            let why = "no backend of this frontend can be translated";
            self.report.lose(at, NotPossible, why);
        } else if !frontend.binds.is_empty() {
            self.draft.frontends.push(frontend);
        }
    }

    /// Returns why a computed name cannot be translated, with the backends that it can mean.
    fn computed_name(&self, name: &str) -> String {
        let start = name.split("%[").next().unwrap_or_default();
        let end = name.rsplit(']').next().unwrap_or_default();
        let fits = |name: &str| {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        };
        let backends = self.sections.iter().filter(|section| section.kind == "backend");
        let meant: Vec<&str> =
            backends.map(|section| &*section.name).filter(|name| fits(name)).collect();
        let which = match meant[..] {
            [] => "no backend has such a name".to_owned(),
            _ => format!("it can be {}", meant.join(", ")),
        };
        format!("the name of the backend is computed ({which}); write a rule per backend")
    }

    /// Adds a route per `use_backend`.
    fn routes(
        &mut self,
        in_force: &ProxyLines<'_>,
        acls: &Acls,
        port: Option<u16>,
        frontend: &mut DraftFrontend,
    ) {
        for line in in_force.all("use_backend") {
            let name = line.word(1);
            if name.contains("%[") {
                let why = self.computed_name(name);
                self.report.lose(line.at, NotPossible, why);
                continue;
            }
            let routes = match line.word(2) {
                "" => Ok(vec![DraftRoute::default()]),
                "if" => self.route_conditions(acls, line, 3),
                _ => Err("a route has no negated condition".to_owned()),
            };
            let routes = match routes {
                Ok(routes) => routes,
                Err(why) => {
                    self.report.lose(line.at, NotPossible, why);
                    continue;
                }
            };
            let Some(pool) = self.pool_named(name, line, port) else { continue };
            self.report.note(line.at, Translated, format!("route to pool {pool}"));
            for mut route in routes {
                // A route without condition is for every client.
                if route.keys.is_empty() {
                    let everyone = quoted_list(["0.0.0.0/0", "::/0"]);
                    route.keys.set("sources", everyone, &[line.at]);
                }
                route.at.insert(0, line.at);
                route.pool = Some(pool.clone());
                frontend.routes.push(route);
            }
        }
    }

    /// Returns the pool of a section with this name, for TCP.
    fn pool_named(&mut self, name: &str, line: &Directive, port: Option<u16>) -> Option<String> {
        let sections = self.sections;
        let is_pool = |section: &HaproxySection| {
            matches!(&*section.kind, "backend" | "listen") && section.name == name
        };
        let Some(index) = sections.iter().position(is_pool) else {
            self.report.lose(line.at, NotPossible, format!("there is no backend {name}"));
            return None;
        };
        if self.is_http(&sections[index]) {
            self.report.lose(line.at, NotPossible, format!("the backend {name} is for HTTP"));
            return None;
        }
        self.client_ports.entry(index).or_insert(port);
        Some(self.pool(index))
    }

    /// Sets the pool of clients that match no route, and the timeouts that go with it.
    fn default_pool(
        &mut self,
        index: usize,
        in_force: &ProxyLines<'_>,
        port: Option<u16>,
        frontend: &mut DraftFrontend,
    ) {
        let sections = self.sections;
        let section = &sections[index];
        let default = in_force.last("default_backend");
        for line in in_force.all("default_backend") {
            self.report.note(line.at, WithoutEffect, "a later line replaces it");
        }
        let own = section.kind == "listen" && default.is_none();
        if own {
            self.client_ports.entry(index).or_insert(port);
            frontend.pool = self.pool(index);
            return self.timeouts(in_force, in_force, frontend);
        }
        let pool = default.and_then(|line| self.pool_named(line.word(1), line, port));
        if let (Some(pool), Some(line)) = (&pool, default) {
            self.report.note(line.at, Translated, format!("pool = \"{pool}\""));
            frontend.pool.clone_from(pool);
            let backend = sections.iter().find(|section| {
                matches!(&*section.kind, "backend" | "listen") && section.name == line.word(1)
            });
            let backend = backend.map(|backend| ProxyLines::of(backend, sections));
            return self.timeouts(in_force, backend.as_ref().unwrap_or(in_force), frontend);
        }
        // HAProxy closes clients that no rule takes.
        let routed = frontend.routes.iter().find_map(|route| route.pool.clone());
        if let Some(pool) = routed {
            frontend.pool = pool;
            let mut rest = DraftRoute { at: vec![section.header.at], ..Default::default() };
            let everyone = quoted_list(["0.0.0.0/0", "::/0"]);
            rest.keys.set("sources", everyone, &[section.header.at]);
            frontend.routes.push(rest);
            self.timeouts(in_force, in_force, frontend);
        }
    }

    /// Sets the timeouts from those of the frontend and of its pool.
    ///
    /// A session of HAProxy ends after the smaller one of `client` and `server` without data in
    /// either direction. `tunnel` replaces both.
    fn timeouts(
        &mut self,
        clients: &ProxyLines<'_>,
        servers: &ProxyLines<'_>,
        frontend: &mut DraftFrontend,
    ) {
        let both = [clients.timeout("client"), servers.timeout("server")];
        let tunnel = servers.timeout("tunnel");
        let idle = match tunnel {
            Some((time, _)) => time,
            None => {
                both.iter().flatten().map(|one| one.0).filter(|time| *time > 0).min().unwrap_or(0)
            }
        };
        let lines: Vec<SourceLine> = match tunnel {
            Some((_, at)) => vec![at],
            None => both.iter().flatten().map(|one| one.1).collect(),
        };
        let value = toml_time(idle.min(LONGEST));
        let text = format!("idle_timeout = {value}");
        for at in &lines {
            self.report.note(*at, Translated, text.clone());
        }
        if let Some((_, at)) = tunnel {
            for (_, replaced) in both.iter().flatten() {
                self.report.note(*replaced, WithoutEffect, "timeout tunnel replaces it");
            }
            self.report.note(at, Translated, text);
        }
        if lines.is_empty() {
            let why = "there is no timeout client or server: idle_timeout = \"off\"";
            for at in frontend.at.clone() {
                self.report.note(at, Approximated, why);
            }
        }
        frontend.keys.set("idle_timeout", value.clone(), &lines);
        let fin = [clients.timeout("client-fin"), servers.timeout("server-fin")];
        let half = fin.iter().flatten().filter(|fin| fin.0 > 0).min();
        match half {
            Some((time, at)) => {
                let half = toml_time((*time).min(LONGEST));
                frontend.keys.set("half_closed_timeout", half.clone(), &[*at]);
                for (_, at) in fin.iter().flatten() {
                    let text = format!("half_closed_timeout = {half}");
                    self.report.note(*at, Translated, text);
                }
            }
            // Without these, the usual timeouts apply to sessions that are closed on one side.
            None => frontend.keys.set("half_closed_timeout", value, &lines),
        }
    }

    fn cap(&mut self, in_force: &ProxyLines<'_>, frontend: &mut DraftFrontend) {
        if let Some(line) = in_force.last("maxconn") {
            match line.word(1).parse::<u64>() {
                Ok(cap) => {
                    let cap = cap.min(SESSIONS_MAX);
                    let text = format!("connections_max = {cap}");
                    self.report.note(line.at, Translated, text);
                    frontend.keys.set("connections_max", cap.to_string(), &[line.at]);
                }
                Err(_) => self.report.lose(line.at, NotPossible, "it is not a number"),
            }
        }
        for off in ["disabled", "description"] {
            if let Some(line) = in_force.last(off) {
                self.report.note(line.at, WithoutEffect, "");
            }
        }
    }

    fn unused_acls(&mut self, in_force: &ProxyLines<'_>) {
        let undecided = self.report.undecided();
        for line in in_force.all("acl") {
            if undecided.contains(&line.at) {
                self.report.note(line.at, WithoutEffect, "no rule uses it");
            }
        }
    }
}

/// Sets a list of a route or of `sources`.
pub(super) fn list(values: &[String]) -> String {
    match values {
        [one] => quoted(one),
        _ => quoted_list(values.iter().map(String::as_str)),
    }
}
