//! Checks that span sections: pools that frontends name, addresses that clash, bounds on
//! counts.
//!
//! Called once per file, after every section was read. It never takes more time than
//! linear in the size of the file.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::binds::BindCount;
use super::client_port;
use super::frontend::FrontendRead;
use super::globals::AdminRead;
use super::pool::PoolRead;
use super::{BACKENDS_MAX, BINDS_MAX, FRONTENDS_MAX, POOLS_MAX};
use crate::diagnose::ProblemCollector;
use crate::value::{ValueError, did_you_mean_or, shown};
use tidegate_core::model::{AdminListen, BackendAddr, BindKey};

/// Makes all checks. `all_pools`: no pool is missing in `pools` because of an error in the
/// file that is reported elsewhere.
pub(super) fn check(
    report: &ProblemCollector<'_>,
    admin: &AdminRead,
    (frontends, bind_count): (&[FrontendRead], BindCount),
    pools: &[PoolRead],
    all_pools: bool,
) {
    routes(report, frontends, pools, all_pools);
    counts(report, frontends, bind_count, pools);
    let taken = binds(report, frontends);
    admin_address(report, admin, &taken);
    loops(report, admin, pools, &taken);
    // A socket on one interface gets no connection of this host to itself.
    let everywhere = taken.by_interface.get(&None);
    client_port::check(report, frontends, pools, |backend, address, place| {
        let bind = everywhere.and_then(|taken| taken.reaches(address));
        bind.inspect(|bind| loop_error(report, backend, bind, place)).is_some()
    });
}

/// Reports the first probe that runs a command, if no process runs commands.
pub(super) fn exec_probes(report: &ProblemCollector<'_>, pools: &[PoolRead], helper: bool) {
    let first = pools.iter().find_map(|pool| pool.exec.clone());
    if let Some(place) = first.filter(|_| !helper) {
        let complaint = ValueError::new("a probe of kind \"exec\" without probe_helper");
        let help = "set probe_helper = true in [process]: the sandbox allows no commands, so \
                    another process runs them";
        report.error(place, complaint.help(help));
    }
}

/// Reports unknown pools that frontends and routes name. Warns of unused pools.
fn routes(
    report: &ProblemCollector<'_>,
    frontends: &[FrontendRead],
    pools: &[PoolRead],
    all_pools: bool,
) {
    let known: HashSet<&str> = pools.iter().map(|pool| &*pool.model.name).collect();
    let (mut used, mut routed) = (HashSet::new(), HashSet::new());
    for frontend in frontends {
        let own = frontend.pool.iter().map(|place| (&frontend.model.pool, place));
        for (name, place) in own.chain(frontend.route_pools.iter().map(|(name, at)| (name, at))) {
            used.insert(&**name);
            routed.extend((!frontend.route_pools.is_empty()).then_some(&**name));
            if all_pools && !known.contains(&**name) {
                report.error_with(place.clone(), || unknown_pool(name, pools));
            }
        }
    }
    used.extend(pools.iter().filter_map(|pool| pool.model.of.as_deref()));
    for pool in pools {
        if !used.contains(&*pool.model.name) {
            let message = format!("no frontend uses pool {}", shown(&pool.model.name));
            report.warning(pool.place.clone(), ValueError::new(message));
        }
        // A route can lead to any pool, so a frontend with routes queues clients in all
        // of its pools.
        if let Some(place) = &pool.queue_timeout
            && !routed.contains(&*pool.model.name)
        {
            let message = "queue_timeout has no effect: no client waits without queue_max";
            report.warning(place.clone(), ValueError::new(message));
        }
    }
}

fn unknown_pool(name: &str, pools: &[PoolRead]) -> ValueError {
    let names = pools.iter().map(|pool| &*pool.model.name);
    let complaint = ValueError::new(format!("there is no pool {}", shown(name)));
    complaint.help(did_you_mean_or(name, names, || match pools {
        [] => "add [pool.NAME] with at least one [[pool.NAME.backend]]".to_owned(),
        [only] => format!("the only pool is {}", shown(&only.model.name)),
        _ => "name one of the [pool.NAME] tables".to_owned(),
    }))
}

fn counts(
    report: &ProblemCollector<'_>,
    frontends: &[FrontendRead],
    binds: BindCount,
    pools: &[PoolRead],
) {
    let too_many = |place: Range<usize>, what: &str, max: usize, count: usize| {
        report.error(
            place,
            ValueError::new(format!("{count} {what} are more than the {max} allowed")),
        );
    };
    if let Some(first) = frontends.get(FRONTENDS_MAX) {
        let place = first.pool.clone().unwrap_or(0..0);
        too_many(place, "frontends", FRONTENDS_MAX, frontends.len());
    }
    if let Some(first) = binds.beyond {
        too_many(first, "bind addresses", BINDS_MAX, binds.total);
    }
    if let Some(first) = pools.get(POOLS_MAX) {
        too_many(first.place.clone(), "pools", POOLS_MAX, pools.len());
    }
    let backends =
        pools.iter().flat_map(|pool| pool.address_places.iter().chain(&pool.name_places));
    if let Some(first) = backends.clone().nth(BACKENDS_MAX) {
        too_many(first.clone(), "backends", BACKENDS_MAX, backends.count());
    }
}

/// The bind that uses an address.
#[derive(Clone)]
struct TakenBy<'f> {
    frontend: &'f str,
    place: Range<usize>,
}

/// The addresses of all binds.
#[derive(Default)]
struct AllAddresses<'f> {
    /// Whatever the interface.
    all: OwnAddresses<'f>,
    /// The addresses on one interface; `None`: on every interface.
    by_interface: HashMap<Option<Arc<str>>, OwnAddresses<'f>>,
    /// Unix sockets.
    unix: HashMap<PathBuf, TakenBy<'f>>,
}

/// TCP addresses of binds, indexed by address and by port.
#[derive(Default)]
struct OwnAddresses<'f> {
    exact: HashMap<SocketAddr, TakenBy<'f>>,
    /// The wildcard bind per port and address family.
    wildcard: HashMap<(u16, bool), SocketAddr>,
    /// The first other bind per port and address family.
    specific: HashMap<(u16, bool), SocketAddr>,
}

fn binds<'f>(report: &ProblemCollector<'_>, frontends: &'f [FrontendRead]) -> AllAddresses<'f> {
    let mut taken = AllAddresses::default();
    // Two ranges clash at many ports. The first one says enough.
    let mut reported = None;
    for frontend in frontends {
        for (bind, place) in frontend.model.binds.iter().zip(&frontend.bind_places) {
            if let Some(path) = bind.key.unix_path() {
                if let Some(by) = taken.unix.get(path) {
                    report.error_with(place.clone(), || by.repeated(report, &bind.key));
                    continue;
                }
                let by = TakenBy { frontend: &frontend.model.name, place: place.clone() };
                taken.unix.insert(path.to_owned(), by);
            }
            let Some(address) = bind.key.socket_addr() else { continue };
            if let Some((other, set)) = taken.clash(&bind.key, address) {
                if reported.replace(place.clone()).as_ref() != Some(place) {
                    report
                        .error_with(place.clone(), || set.clash_complaint(report, address, other));
                }
                continue;
            }
            taken.insert(&bind.key, address, &frontend.model.name, place);
        }
    }
    taken
}

fn admin_address(report: &ProblemCollector<'_>, admin: &AdminRead, taken: &AllAddresses<'_>) {
    if let (AdminListen::Unix(path), Some(place)) = (&admin.model.listen, &admin.listen)
        && let Some(by) = taken.unix.get(path)
    {
        report.error(place.clone(), by.repeated(report, &BindKey::unix(path.clone())));
    }
    let taken = &taken.all;
    if let (AdminListen::Tcp(address), Some(place)) = (&admin.model.listen, &admin.listen)
        && let Some(other) = taken.clash(*address)
    {
        report.error(place.clone(), taken.clash_complaint(report, *address, other));
    }
}

/// Reports backends that are an address of this process.
///
/// Each session to such a backend would open another session, until a cap is reached.
fn loops(
    report: &ProblemCollector<'_>,
    admin: &AdminRead,
    pools: &[PoolRead],
    taken: &AllAddresses<'_>,
) {
    // A socket on one interface gets no connection of this host to itself.
    let (unix, taken) = (&taken.unix, taken.by_interface.get(&None));
    for pool in pools {
        for (backend, place) in pool.model.backends.iter().zip(&pool.address_places) {
            let tcp = match &backend.address {
                BackendAddr::Tcp(address) => taken.and_then(|taken| taken.reaches(*address)),
                BackendAddr::Unix(path) => unix.get(path),
                BackendAddr::ClientPort(..) => None,
            };
            if let Some(bind) = tcp {
                loop_error(report, &backend.address, bind, place);
            } else if is_admin(&backend.address, &admin.model.listen) {
                let complaint = ValueError::new("this backend is the admin API of this process");
                report.error(place.clone(), complaint);
            }
        }
    }
}

fn loop_error(
    report: &ProblemCollector<'_>,
    backend: &BackendAddr,
    bind: &TakenBy<'_>,
    place: &Range<usize>,
) {
    report.error_with(place.clone(), || {
        let (frontend, first) = (shown(bind.frontend), report.place_name(&bind.place));
        ValueError::new(format!(
            "backend {backend} is frontend {frontend} of this file, bound at {first}"
        ))
        .help("Tidegate would connect to itself; give the address of a service")
    });
}

fn is_admin(backend: &BackendAddr, admin: &AdminListen) -> bool {
    match (backend, admin) {
        (BackendAddr::Tcp(backend), AdminListen::Tcp(admin)) => {
            backend == admin || (admin.ip().is_unspecified() && wildcard_reaches(admin, backend))
        }
        (BackendAddr::Unix(backend), AdminListen::Unix(admin)) => backend == admin,
        _ => false,
    }
}

/// Returns whether a connection to `to` is certain to arrive at a wildcard bind.
///
/// This is certain for loopback addresses only. For others, the kernel decides whether
/// they belong to this host.
fn wildcard_reaches(wildcard: &SocketAddr, to: &SocketAddr) -> bool {
    wildcard.port() == to.port() && wildcard.is_ipv4() == to.is_ipv4() && to.ip().is_loopback()
}

fn family_port(address: SocketAddr) -> (u16, bool) {
    (address.port(), matches!(address.ip(), IpAddr::V4(_)))
}

// === impl TakenBy ===

impl TakenBy<'_> {
    fn repeated(&self, report: &ProblemCollector<'_>, key: &BindKey) -> ValueError {
        let (frontend, place) = (shown(self.frontend), report.place_name(&self.place));
        ValueError::new(format!("{key} repeats a bind of frontend {frontend} at {place}"))
    }
}

// === impl AllAddresses ===

impl<'f> AllAddresses<'f> {
    fn insert(
        &mut self,
        key: &BindKey,
        address: SocketAddr,
        frontend: &'f str,
        place: &Range<usize>,
    ) {
        let by = TakenBy { frontend, place: place.clone() };
        self.all.insert(address, by.clone());
        let set = self.by_interface.entry(key.interface.clone()).or_default();
        set.insert(address, by);
    }

    /// Returns the earlier bind that `key` repeats or overlaps, and the set it is in.
    /// Sockets on different interfaces can have the same address.
    fn clash(&self, key: &BindKey, address: SocketAddr) -> Option<(SocketAddr, &OwnAddresses<'f>)> {
        let sets = match &key.interface {
            None => [Some(&self.all), None],
            interface => {
                [None, interface.clone()].map(|interface| self.by_interface.get(&interface))
            }
        };
        let clash = |set: &'_ OwnAddresses<'f>| set.clash(address);
        sets.into_iter().flatten().find_map(|set| Some((clash(set)?, set)))
    }
}

// === impl OwnAddresses ===

impl<'f> OwnAddresses<'f> {
    fn insert(&mut self, address: SocketAddr, by: TakenBy<'f>) {
        let side =
            if address.ip().is_unspecified() { &mut self.wildcard } else { &mut self.specific };
        side.entry(family_port(address)).or_insert(address);
        self.exact.entry(address).or_insert(by);
    }

    /// Returns the earlier bind that `address` repeats or overlaps.
    fn clash(&self, address: SocketAddr) -> Option<SocketAddr> {
        if self.exact.contains_key(&address) {
            return Some(address);
        }
        let wildcard = self.wildcard.get(&family_port(address));
        let specific =
            self.specific.get(&family_port(address)).filter(|_| address.ip().is_unspecified());
        wildcard.or(specific).copied()
    }

    fn clash_complaint(
        &self,
        report: &ProblemCollector<'_>,
        address: SocketAddr,
        other: SocketAddr,
    ) -> ValueError {
        let bind = &self.exact[&other];
        let (frontend, place) = (shown(bind.frontend), report.place_name(&bind.place));
        let how = if address == other {
            "repeats a bind".to_owned()
        } else {
            format!("overlaps {other}")
        };
        ValueError::new(format!("{address} {how} of frontend {frontend} at {place}"))
    }

    /// Returns the bind that a connection to `address` would arrive at.
    fn reaches(&self, address: SocketAddr) -> Option<&TakenBy<'f>> {
        let wildcard = || {
            let wildcard = self.wildcard.get(&family_port(address))?;
            wildcard_reaches(wildcard, &address).then_some(wildcard)
        };
        self.exact.get(&address).or_else(|| self.exact.get(wildcard()?))
    }
}
