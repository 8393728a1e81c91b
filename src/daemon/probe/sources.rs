//! From which of the pool's sources a probe starts.
//!
//! Used by the probes of TCP backends. Probes take the sources in turn, each
//! backend for itself, as its sessions do: so they see what sessions see. A
//! source that this host cannot use is passed over and proves nothing about
//! the backend.

use super::{ProbeError, connect_tcp};
use std::collections::HashMap;
use std::net::SocketAddr;
use tidegate_config as config;
use tidegate_core::metrics::counters::LocalErrorKind;
use tidegate_core::model::{ProbeKind, SourceAddr};
use tidegate_core::table::source_addrs::SOURCE_ADDRS_TRIED_MAX;
use tidegate_core::table::state::BackendId;
use tokio::net::TcpStream;

/// Whose turn it is, for each backend that is probed.
#[derive(Debug, Default)]
pub(super) struct Turns(HashMap<BackendId, usize>);

/// Connects from the source whose turn it is, or from one of those after it
/// where this host cannot use it; where none is of the family, from where the
/// kernel chooses.
pub(super) async fn connect(
    (sources, turn): (&[SourceAddr], usize),
    to: SocketAddr,
    kind: &ProbeKind,
) -> Result<TcpStream, ProbeError> {
    let fits = |source: &&SourceAddr| source.ip().is_ipv4() == to.is_ipv4();
    let fitting: Vec<SourceAddr> = sources.iter().filter(fits).copied().collect();
    let mut failed = None;
    for step in 0..fitting.len().min(SOURCE_ADDRS_TRIED_MAX) {
        let source = fitting[turn.wrapping_add(step) % fitting.len()];
        match connect_tcp(Some(source.ip()), to, kind).await {
            Err(ProbeError::Local(reason, kind)) if of_source(kind) => {
                failed = Some(ProbeError::Local(format!("{reason} (source {source})"), kind));
            }
            decided => return decided,
        }
    }
    match failed {
        Some(failed) => Err(failed),
        None => connect_tcp(None, to, kind).await,
    }
}

/// Trouble that another source may not have: no free port, no such address, no
/// way from there.
fn of_source(kind: LocalErrorKind) -> bool {
    match kind {
        LocalErrorKind::Ports | LocalErrorKind::Route | LocalErrorKind::Other => true,
        LocalErrorKind::Descriptors | LocalErrorKind::Memory => false,
    }
}

// === impl Turns ===

impl Turns {
    /// Backends whose turn is known: as many as a file may have. Beyond it all
    /// begin again with their first source.
    const KNOWN_MAX: usize = config::BACKENDS_MAX;

    /// The place in the pool's list that the backend's next probe begins at.
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
