//! Which pool a connection goes to, by what is known of it at accept.
//!
//! A frontend's routes are asked in order; the first of which all conditions hold takes
//! the connection, else the frontend's pool does. Asked once for each session, and again
//! for one that waits in a queue when the table changes. Nothing here picks a backend.

use super::{FrontendRoute, PoolTable};
use crate::model::{ClientAddr, RouteConfig};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What is known of a connection once it is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionFacts {
    /// The client.
    pub client: ClientAddr,
    /// Where the client has connected to.
    pub local: SocketAddr,
}

/// The route a connection takes: its position in the frontend from 1, or 0 for the
/// frontend's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RouteNumber(u8);

// === impl RouteNumber ===

impl RouteNumber {
    /// Position from 1; `None` for the frontend's pool.
    pub fn position(self) -> Option<u8> {
        (self.0 > 0).then_some(self.0)
    }
}

// === impl FrontendRoute ===

impl FrontendRoute {
    /// The first route of which all conditions hold.
    #[inline]
    pub fn route(&self, facts: &ConnectionFacts) -> RouteNumber {
        if self.routes.is_empty() {
            return RouteNumber::default();
        }
        let first = (1..=u8::MAX).zip(&self.spec.routes).find(|(_, route)| matches(route, facts));
        RouteNumber(first.map_or(0, |(position, _)| position))
    }

    /// Where that route leads; `None` where it refuses.
    #[inline]
    pub fn pool_of(&self, number: RouteNumber) -> Option<&Arc<PoolTable>> {
        match number.position() {
            None => Some(&self.pool),
            Some(position) => self.routes.get(usize::from(position) - 1)?.as_ref(),
        }
    }

    /// Every pool it leads to, the frontend's last; a pool of several routes comes several
    /// times.
    pub fn pools(&self) -> impl Iterator<Item = &Arc<PoolTable>> {
        self.routes.iter().flatten().chain(std::iter::once(&self.pool))
    }

    /// Whether a route asks for the address that clients connect to.
    pub fn needs_local_address(&self) -> bool {
        self.spec.routes.iter().any(|route| !route.addresses.is_empty())
    }
}

fn matches(route: &RouteConfig, facts: &ConnectionFacts) -> bool {
    let port = facts.local.port();
    (route.ports.is_empty() || route.ports.iter().any(|ports| ports.contains(&port)))
        && lies_in(&route.addresses, facts.local.ip())
        && lies_in(&route.sources, facts.client.ip())
}

/// Whether the address lies in one of the ranges, or there is none.
fn lies_in(ranges: &[IpNet], address: IpAddr) -> bool {
    ranges.is_empty() || ranges.iter().any(|range| range.contains(&address.to_canonical()))
}
