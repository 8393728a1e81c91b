//! Backends without a port, which take the port that the client connected to.
//!
//! Called by `cross` once per file. It checks that every port that can occur leads to a port,
//! and not to Tidegate itself.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;

use super::frontend::FrontendRead;
use super::pool::PoolRead;
use crate::diagnose::ProblemCollector;
use crate::value::{ValueError, shown};
use tidegate_core::model::{BackendAddr, BindKey, RouteConfig, RouteTarget};

/// Most pairs of a backend and a bind that are checked for a loop.
const PAIRS_MAX: usize = 1_000_000;

/// A way from a frontend to a pool: through a route, or without one.
type Way<'f> = (&'f FrontendRead, Option<&'f RouteConfig>);

/// Makes all checks. `loops` reports a backend if the address is a bind, and returns whether
/// it is one.
pub(super) fn check(
    report: &ProblemCollector<'_>,
    frontends: &[FrontendRead],
    pools: &[PoolRead],
    mut loops: impl FnMut(&BackendAddr, SocketAddr, &Range<usize>) -> bool,
) {
    let is_one = |pool: &&PoolRead| {
        pool.model.backends.iter().any(|b| matches!(b.address, BackendAddr::ClientPort(..)))
    };
    let mut concerned = pools.iter().filter(is_one).peekable();
    if concerned.peek().is_none() {
        return;
    }
    let ways = ways(frontends);
    let mut pairs_left = PAIRS_MAX;
    for pool in concerned {
        let ways = ways.get(&*pool.model.name).map_or(&[][..], Vec::as_slice);
        for (backend, place) in pool.model.backends.iter().zip(&pool.address_places) {
            let BackendAddr::ClientPort(_, offset) = backend.address else { continue };
            needs_no_port_elsewhere(report, pool, &backend.address, place);
            if let Some((frontend, bind)) = ways.iter().find_map(unix_bind) {
                report.error(place.clone(), no_client_port(frontend, bind, &backend.address));
                continue;
            }
            if let Some((frontend, port)) = without_port(ways, offset) {
                report.error(place.clone(), out_of_range(frontend, port, offset));
                continue;
            }
            let ports = ways.iter().flat_map(ports).take(pairs_left);
            for address in ports.filter_map(|port| backend.address.tcp(port)) {
                pairs_left -= 1;
                if loops(&backend.address, address, place) {
                    break;
                }
            }
        }
    }
}

/// Returns the ways to each pool.
fn ways(frontends: &[FrontendRead]) -> HashMap<&str, Vec<Way<'_>>> {
    let mut ways: HashMap<&str, Vec<Way<'_>>> = HashMap::new();
    for frontend in frontends {
        ways.entry(&frontend.model.pool).or_default().push((frontend, None));
        for route in &frontend.model.routes {
            if let RouteTarget::Pool(pool) = &route.target {
                ways.entry(pool).or_default().push((frontend, Some(route)));
            }
        }
    }
    ways
}

/// Returns a Unix socket whose clients take this way. They meet no condition on ports.
fn unix_bind<'f>(&(frontend, route): &Way<'f>) -> Option<(&'f FrontendRead, &'f BindKey)> {
    if route.is_some_and(|route| !route.ports.is_empty() || !route.addresses.is_empty()) {
        return None;
    }
    let mut keys = frontend.model.binds.iter().map(|bind| &bind.key);
    keys.find(|key| key.unix_path().is_some()).map(|key| (frontend, key))
}

fn no_client_port(frontend: &FrontendRead, bind: &BindKey, backend: &BackendAddr) -> ValueError {
    let name = shown(&frontend.model.name);
    let message = format!(
        "backend {backend} has no port, but clients of {bind} of frontend {name} have none either"
    );
    ValueError::new(message).help("give the backend a port")
}

/// Returns the ports of the clients on this way.
fn ports<'f>(&(frontend, route): &Way<'f>) -> impl Iterator<Item = u16> + use<'f> {
    let addresses = frontend.model.binds.iter().filter_map(|bind| bind.key.socket_addr());
    let all = addresses.map(|address| address.port());
    all.filter(move |port| {
        route.is_none_or(|route| {
            route.ports.is_empty() || route.ports.iter().any(|ports| ports.contains(port))
        })
    })
}

/// Returns a port of a client that leads to no port.
fn without_port<'f>(ways: &[Way<'f>], offset: i32) -> Option<(&'f FrontendRead, u16)> {
    ways.iter().find_map(|way| {
        let wrong = |port: &u16| !(1..=i32::from(u16::MAX)).contains(&(i32::from(*port) + offset));
        ports(way).find(wrong).map(|port| (way.0, port))
    })
}

fn out_of_range(frontend: &FrontendRead, port: u16, offset: i32) -> ValueError {
    let name = shown(&frontend.model.name);
    let sum = i32::from(port) + offset;
    ValueError::new(format!("port {port} of frontend {name} leads to port {sum}"))
        .help("ports are 1 to 65535; change the offset or the ports of the frontend")
}

/// Reports parts of the pool that need the port of a backend.
fn needs_no_port_elsewhere(
    report: &ProblemCollector<'_>,
    pool: &PoolRead,
    address: &BackendAddr,
    place: &Range<usize>,
) {
    let complain = |what: &str, help: String| {
        let message = format!("backend {address} has no port, but {what}");
        report.error(place.clone(), ValueError::new(message).help(help));
    };
    let name = crate::value::cut(&pool.model.name);
    if pool.model.probe.as_ref().is_some_and(|probe| probe.target.port.is_none()) {
        complain(
            "the probes of the pool need one",
            format!("write port in [pool.{name}.probe], or give each backend a port"),
        );
    }
    if pool.model.heartbeat.as_ref().is_some_and(|heartbeat| heartbeat.require) {
        complain(
            "the pool requires heartbeats, which name an address with a port",
            format!("give each backend a port, or remove require from [pool.{name}.heartbeat]"),
        );
    }
}
