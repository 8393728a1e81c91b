//! Picks the source address of a probe.
//!
//! Used by probes of TCP backends. The probes of each backend use the source
//! addresses of the pool in turn, as its sessions do, so probes and sessions use the
//! same paths. A source address that this host cannot use is skipped. It says
//! nothing about the backend.

use super::{ProbeError, connect_tcp};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tidegate_config as config;
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::SourceAddr;
use tidegate_core::table::source_addrs::SOURCE_ADDRS_TRIED_MAX;
use tidegate_core::table::state::BackendId;
use tokio::net::TcpStream;

/// Number of the next source address for each probed backend.
#[derive(Debug, Default)]
pub(super) struct Turns(HashMap<BackendId, usize>);

/// Connects from the source address number `turn`. If this host cannot use that
/// address, tries the following ones, at most [`WAYS_TRIED_MAX`] in total. If no
/// source address has the family of `to`, the kernel chooses the source address.
pub(super) async fn connect(
    (sources, turn): (&[SourceAddr], usize),
    to: SocketAddr,
    reset: bool,
) -> Result<TcpStream, ProbeError> {
    let fits = |source: &&SourceAddr| source.ip().is_ipv4() == to.is_ipv4();
    let fitting: Vec<SourceAddr> = sources.iter().filter(fits).copied().collect();
    let mut failed = None;
    for step in 0..fitting.len().min(SOURCE_ADDRS_TRIED_MAX) {
        let source = fitting[turn.wrapping_add(step) % fitting.len()];
        match connect_tcp(Some(source.ip()), to, reset).await {
            Err(ProbeError::Local(reason, kind)) if depends_on_source(kind) => {
                failed = Some(ProbeError::Local(format!("{reason} (source {source})"), kind));
            }
            result => return result,
        }
    }
    match failed {
        Some(failed) => Err(failed),
        None => connect_tcp(None, to, reset).await,
    }
}

/// Returns the source address number `turn` for datagrams; the unspecified address if none has
/// the family of `to`.
pub(super) fn of_turn((sources, turn): (&[SourceAddr], usize), to: SocketAddr) -> IpAddr {
    let fitting: Vec<IpAddr> = sources
        .iter()
        .map(|source| source.ip())
        .filter(|ip| ip.is_ipv4() == to.is_ipv4())
        .collect();
    match (fitting.len(), to) {
        (0, SocketAddr::V4(_)) => Ipv4Addr::UNSPECIFIED.into(),
        (0, SocketAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        (count, _) => fitting[turn % count],
    }
}

/// Returns whether another source address may work despite this local error.
fn depends_on_source(kind: LocalErrorKind) -> bool {
    match kind {
        LocalErrorKind::Ports | LocalErrorKind::Route | LocalErrorKind::Other => true,
        LocalErrorKind::Descriptors | LocalErrorKind::Memory => false,
    }
}

// === impl Turns ===

impl Turns {
    /// Largest number of entries: the number of backends that a configuration can
    /// have. At the bound, all backends restart with their first source address.
    const KNOWN_MAX: usize = config::BACKENDS_MAX;

    /// Returns the number of the source address for the next probe of the backend.
    pub(super) fn next(&mut self, backend: BackendId, sources: &[SourceAddr]) -> usize {
        if sources.len() < 2 {
            return 0;
        }
        if self.0.len() >= Turns::KNOWN_MAX && !self.0.contains_key(&backend) {
            self.0.clear();
        }
        let turn = self.0.entry(backend).or_default();
        let now = *turn;
        *turn = turn.wrapping_add(1);
        now
    }
}
