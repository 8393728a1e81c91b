//! `[[frontend.NAME.route]]`: the conditions of each route and its target.
//!
//! Called by `frontend`. It rejects routes that no connection can take. It never checks
//! whether the pools exist; `cross` does.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use toml::Spanned;
use toml::de::DeValue;

use super::frontend::one_or_more;
use super::sources;
use crate::address::port_number;
use crate::file::{Field, Section};
use crate::value::{self, ValueError, shown};
use tidegate_core::model::{Bind, RouteConfig, RouteTarget};

/// Most routes of a frontend. Each connection can be compared with all of them.
pub const ROUTES_MAX: usize = 255;

/// Most ranges and ports in all routes of a frontend. Each connection can be compared with
/// all of them.
const CONDITIONS_MAX: usize = 1_024;

/// Routes, and the name and the place of each pool that they name.
pub(super) type RoutesRead = (Vec<RouteConfig>, Vec<(Arc<str>, Range<usize>)>);

/// A route with the places of its conditions.
struct RouteRead<'r, 'a> {
    section: Section<'r, 'a>,
    sources: Vec<Spanned<IpNet>>,
    ports: Vec<Spanned<RangeInclusive<u16>>>,
    addresses: Vec<Spanned<IpNet>>,
    target: Field<RouteTarget>,
    /// A condition is wrong, so checks of the whole route are skipped.
    is_bad: bool,
}

pub(super) fn read(frontend: &Section<'_, '_>, name: &str, binds: &[Bind]) -> RoutesRead {
    let label = format!("frontend.{}.route", value::cut(name));
    let sections = frontend.array_of_tables("route", &label);
    let read: Vec<RouteRead<'_, '_>> = sections.into_iter().map(RouteRead::read).collect();
    refuse_too_many(&read);
    for (at, route) in read.iter().enumerate().take(ROUTES_MAX) {
        route.refuse_without_condition();
        route.refuse_unreachable(name, binds);
        route.refuse_covered(&read[..at]);
    }
    let mut pools = Vec::new();
    let mut routes = Vec::with_capacity(read.len());
    for route in read {
        if let Field::Good(target) = &route.target
            && let RouteTarget::Pool(pool) = target.get_ref()
        {
            pools.push((Arc::clone(pool), target.span()));
        }
        routes.push(route.finish());
    }
    (routes, pools)
}

fn refuse_too_many(routes: &[RouteRead<'_, '_>]) {
    if let Some(first) = routes.get(ROUTES_MAX) {
        let message = format!("{} routes are more than the {ROUTES_MAX} allowed", routes.len());
        first.error(message, None);
    }
    let mut conditions = 0;
    for route in routes {
        conditions += route.sources.len() + route.ports.len() + route.addresses.len();
        if conditions > CONDITIONS_MAX {
            let what = "the routes of a frontend have at most";
            return route.error(format!("{what} {CONDITIONS_MAX} ranges and ports"), None);
        }
    }
}

// === impl RouteRead ===

impl<'r, 'a> RouteRead<'r, 'a> {
    fn read(section: Section<'r, 'a>) -> RouteRead<'r, 'a> {
        let before = section.report.errors();
        let sources = ranges(&section, "sources");
        let addresses = ranges(&section, "addresses");
        let ports = ports(&section);
        let is_bad = section.report.errors() > before;
        let target = target(&section);
        RouteRead { section, sources, ports, addresses, target, is_bad }
    }

    fn error(&self, message: String, help: Option<&str>) {
        let help = help.map(str::to_owned);
        self.section.report.error(self.section.header.clone(), ValueError { message, help });
    }

    fn has_condition(&self) -> bool {
        !(self.sources.is_empty() && self.ports.is_empty() && self.addresses.is_empty())
    }

    fn refuse_without_condition(&self) {
        if !self.is_bad && !self.has_condition() {
            let message = "this route has no condition, so it matches every connection";
            let help = "add sources, ports or addresses; \
                        connections that match no route use the frontend's pool";
            self.error(message.to_owned(), Some(help));
        }
    }

    /// Reports conditions that no bind can meet, because clients connect only to ports and
    /// addresses of binds. A wildcard bind has every address of its family.
    fn refuse_unreachable(&self, name: &str, binds: &[Bind]) {
        if self.is_bad || binds.is_empty() {
            return;
        }
        let has_port = |bind: &Bind, ports: &RangeInclusive<u16>| {
            bind.key.socket_addr().is_some_and(|address| ports.contains(&address.port()))
        };
        let complain = |place: Range<usize>, what: String| {
            let message = format!("no bind of frontend {} {what}", shown(name));
            self.section.report.error(place, ValueError::new(message));
        };
        if let Some(first) = self.sources.first()
            && binds
                .iter()
                .all(|bind| bind.key.unix_path().is_some() && !bind.options.proxy_protocol)
        {
            complain(first.span(), "has clients with an IP address".to_owned());
        }
        let mut complete = true;
        for ports in &self.ports {
            if !binds.iter().any(|bind| has_port(bind, ports.get_ref())) {
                complete = false;
                complain(ports.span(), format!("has port {}", show_ports(ports.get_ref())));
            }
        }
        for range in &self.addresses {
            if !binds.iter().any(|bind| receives(bind, range.get_ref())) {
                complete = false;
                complain(range.span(), format!("listens in {}", range.get_ref()));
            }
        }
        let any_port = |bind: &Bind| self.ports.iter().any(|ports| has_port(bind, ports.get_ref()));
        let any_range = |bind: &Bind| self.addresses.iter().any(|r| receives(bind, r.get_ref()));
        let takes = |bind: &Bind| {
            (self.ports.is_empty() || any_port(bind))
                && (self.addresses.is_empty() || any_range(bind))
        };
        if complete && !binds.iter().any(takes) {
            let place = self.section.header.clone();
            complain(place, "has both one of these ports and one of these addresses".to_owned());
        }
    }

    /// Reports a route whose connections all match an earlier route.
    fn refuse_covered(&self, before: &[RouteRead<'_, '_>]) {
        let judged = |route: &RouteRead<'_, '_>| !route.is_bad && route.has_condition();
        let Some(other) = before.iter().find(|other| judged(other) && other.covers(self)) else {
            return;
        };
        if judged(self) {
            let place = self.section.report.place_name(&other.section.header);
            let message = "this route is never taken: every connection that it matches takes";
            let help = "put the narrower route first, or remove one of the two";
            self.error(format!("{message} the route at {place}"), Some(help));
        }
    }

    fn covers(&self, other: &RouteRead<'_, '_>) -> bool {
        let within = |inner: &RangeInclusive<u16>, outer: &RangeInclusive<u16>| {
            outer.start() <= inner.start() && inner.end() <= outer.end()
        };
        let any_port = 1..=u16::MAX;
        covers(&self.sources, &other.sources, &any_range(), |inner, outer| outer.contains(inner))
            && covers(&self.addresses, &other.addresses, &any_range(), |inner, outer| {
                outer.contains(inner)
            })
            && covers(&self.ports, &other.ports, &[any_port], within)
    }

    fn finish(self) -> RouteConfig {
        self.section.finish();
        let plain = |ranges: Vec<Spanned<IpNet>>| ranges.into_iter().map(Spanned::into_inner);
        RouteConfig {
            sources: plain(self.sources).collect(),
            ports: self.ports.into_iter().map(Spanned::into_inner).collect(),
            addresses: plain(self.addresses).collect(),
            target: self.target.or(RouteTarget::Refuse),
        }
    }
}

/// Returns whether each of `inner` lies within an element of `outer`. An empty list means
/// `everything`.
fn covers<T>(
    outer: &[Spanned<T>],
    inner: &[Spanned<T>],
    everything: &[T],
    within: impl Fn(&T, &T) -> bool,
) -> bool {
    let covered = |one: &T| outer.iter().any(|range| within(one, range.get_ref()));
    match (outer, inner) {
        ([], _) => true,
        (_, []) => everything.iter().all(covered),
        (_, inner) => inner.iter().all(|one| covered(one.get_ref())),
    }
}

fn any_range() -> [IpNet; 2] {
    [Ipv4Net::default().into(), Ipv6Net::default().into()]
}

/// Returns whether clients of the bind can have connected to an address of the range.
fn receives(bind: &Bind, range: &IpNet) -> bool {
    let Some(ip) = bind.key.socket_addr().map(|address| address.ip()) else { return false };
    let same_family = ip.is_ipv4() == matches!(range, IpNet::V4(_));
    range.contains(&ip) || (ip.is_unspecified() && same_family)
}

fn ranges(section: &Section<'_, '_>, key: &'static str) -> Vec<Spanned<IpNet>> {
    if section.node(key).is_none() {
        return Vec::new();
    }
    let wants = ("a range or a list of ranges", "ranges such as \"10.0.0.0/8\"");
    one_or_more(section, key, wants, "[\"10.0.0.0/8\"]", sources::range)
}

/// Reads `ports`: a number, a range such as `"8000-8010"`, or a list of both.
fn ports(section: &Section<'_, '_>) -> Vec<Spanned<RangeInclusive<u16>>> {
    let key = "ports";
    let Some(node) = section.node(key) else { return Vec::new() };
    let nodes = match node.get_ref() {
        DeValue::Array(array) if array.is_empty() => {
            let complaint = ValueError::new("ports lists no port");
            section.report.error(node.span(), complaint.help("write ports = [443]"));
            return Vec::new();
        }
        DeValue::Array(array) => array,
        _ => std::slice::from_ref(node),
    };
    let mut all = Vec::with_capacity(nodes.len());
    for node in nodes {
        let read = match node.get_ref() {
            DeValue::Integer(number) => {
                let value = i128::from_str_radix(number.as_str(), number.radix());
                let text = value.map_or_else(|_| number.to_string(), |value| value.to_string());
                port_range(&text)
            }
            DeValue::String(text) => port_range(text),
            _ => {
                let wants = "ports such as 443 or \"8000-8010\"";
                let _: Field<()> = section.wrong_type(key, node, wants);
                continue;
            }
        };
        match read {
            Ok(ports) => all.push(Spanned::new(node.span(), ports)),
            Err(complaint) => section.report.error(node.span(), complaint.named(key)),
        }
    }
    all
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, ValueError> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    if first.is_empty() || last.is_empty() {
        let complaint = ValueError::new(format!("{} is not a port or a range", shown(text)));
        return Err(complaint.help("write a port such as 443 or a range such as \"8000-8010\""));
    }
    let ports = port_number(text, first)?..=port_number(text, last)?;
    if ports.is_empty() {
        let help = format!("write \"{}-{}\"", ports.end(), ports.start());
        return Err(ValueError::new(format!("{} ends before it starts", shown(text))).help(help));
    }
    Ok(ports)
}

fn show_ports(ports: &RangeInclusive<u16>) -> String {
    match (ports.start(), ports.end()) {
        (first, last) if first == last => first.to_string(),
        (first, last) => format!("{first}-{last}"),
    }
}

/// Reads `pool = "NAME"` or `refuse = true`.
fn target(section: &Section<'_, '_>) -> Field<RouteTarget> {
    let pool = section
        .text("pool", "the name of a pool", |text| Ok(RouteTarget::Pool(Arc::<str>::from(text))));
    let refuse = section.boolean("refuse");
    match (pool, refuse) {
        (Field::Good(_), Field::Good(refuse)) if *refuse.get_ref() => {
            let complaint = ValueError::new("a route has either pool or refuse, not both");
            section.report.error(refuse.span(), complaint.help("remove pool or refuse"));
            Field::Bad
        }
        (Field::Absent, Field::Good(refuse)) if *refuse.get_ref() => {
            Field::Good(Spanned::new(refuse.span(), RouteTarget::Refuse))
        }
        (Field::Absent, Field::Absent | Field::Good(_)) => {
            section.missing("pool", "\"NAME\", or refuse = true");
            Field::Bad
        }
        (pool, _) => pool,
    }
}
