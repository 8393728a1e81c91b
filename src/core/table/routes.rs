//! Routing: the pool of a connection, from what is known at accept.
//!
//! The first route of a frontend whose conditions all hold decides. If none matches,
//! the frontend's pool is used. Called once per session, and again for a queued session
//! when the table changes. Nothing here picks a backend.

use super::{FrontendRoute, PoolTable};
use crate::model::{ClientAddr, RouteConfig};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What is known of an accepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionFacts {
    /// The client's address.
    pub client: ClientAddr,
    /// The address that the client connected to.
    pub local: SocketAddr,
}

/// Number of the route that a connection uses: its position in the frontend from 1, or
/// 0 for the frontend's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RouteNumber(u8);

// === impl RouteNumber ===

impl RouteNumber {
    /// Returns the position from 1; `None` for the frontend's pool.
    pub fn position(self) -> Option<u8> {
        (self.0 > 0).then_some(self.0)
    }
}

// === impl FrontendRoute ===

impl FrontendRoute {
    /// Returns the first route whose conditions all hold.
    #[inline]
    pub fn route(&self, facts: &ConnectionFacts) -> RouteNumber {
        if self.routes.is_empty() {
            return RouteNumber::default();
        }
        let first = (1..=u8::MAX).zip(&self.spec.routes).find(|(_, route)| matches(route, facts));
        RouteNumber(first.map_or(0, |(position, _)| position))
    }

    /// Returns the pool of this route; `None` if the route rejects the connection.
    #[inline]
    pub fn pool_of(&self, number: RouteNumber) -> Option<&Arc<PoolTable>> {
        match number.position() {
            None => Some(&self.pool),
            Some(position) => self.routes.get(usize::from(position) - 1)?.as_ref(),
        }
    }

    /// Returns every pool that the frontend routes to, its own pool last. A pool with
    /// several routes appears several times.
    pub fn pools(&self) -> impl Iterator<Item = &Arc<PoolTable>> {
        self.routes.iter().flatten().chain(std::iter::once(&self.pool))
    }

    /// Returns whether a route has a condition on the address that clients connect to.
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

/// Returns whether the address is in one of the ranges, or the list is empty.
fn lies_in(ranges: &[IpNet], address: IpAddr) -> bool {
    ranges.is_empty() || ranges.iter().any(|range| range.contains(&address.to_canonical()))
}
