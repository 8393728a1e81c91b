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
    /// The address that the client connected to; `None`: a Unix socket.
    pub local: Option<SocketAddr>,
}

/// Number of the route that a connection uses: its position in the frontend from 1, or
/// 0 for the frontend's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RouteNumber(u8);

/// A condition of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteCondition {
    /// The port that the client connected to (`ports`).
    Port,
    /// The address that the client connected to (`addresses`).
    Address,
    /// The client's address (`sources`).
    Source,
}

/// A route that does not match a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Position of the route in the frontend, from 1.
    pub position: u8,
    /// The first condition that does not hold.
    pub condition: RouteCondition,
}

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
        self.first_match(facts, |_, _| {})
    }

    /// Returns the same as [`FrontendRoute::route`], and for each route before it, in order,
    /// the first condition that does not hold.
    pub fn route_recorded(&self, facts: &ConnectionFacts) -> (RouteNumber, Vec<Mismatch>) {
        let mut mismatches = Vec::new();
        let number = self.first_match(facts, |position, condition| {
            mismatches.push(Mismatch { position, condition });
        });
        (number, mismatches)
    }

    /// Calls `mismatch` for each route that does not match.
    #[inline]
    fn first_match(
        &self,
        facts: &ConnectionFacts,
        mut mismatch: impl FnMut(u8, RouteCondition),
    ) -> RouteNumber {
        for (position, route) in (1..=u8::MAX).zip(&self.spec.routes) {
            match failed_condition(route, facts) {
                None => return RouteNumber(position),
                Some(condition) => mismatch(position, condition),
            }
        }
        RouteNumber::default()
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

/// Returns the first condition of the route that does not hold; `None`: the route matches.
#[inline]
fn failed_condition(route: &RouteConfig, facts: &ConnectionFacts) -> Option<RouteCondition> {
    let has_port = || {
        let port = facts.local.map(|local| local.port());
        port.is_some_and(|port| route.ports.iter().any(|ports| ports.contains(&port)))
    };
    match () {
        () if !route.ports.is_empty() && !has_port() => Some(RouteCondition::Port),
        () if !lies_in(&route.addresses, facts.local.map(|local| local.ip())) => {
            Some(RouteCondition::Address)
        }
        () if !lies_in(&route.sources, facts.client.ip()) => Some(RouteCondition::Source),
        () => None,
    }
}

/// Returns whether the address is in one of the ranges, or the list is empty. No range has the
/// clients of a Unix socket.
fn lies_in(ranges: &[IpNet], address: Option<IpAddr>) -> bool {
    let lies = |address: IpAddr| ranges.iter().any(|range| range.contains(&address));
    ranges.is_empty() || address.is_some_and(|address| lies(address.to_canonical()))
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use crate::model::{FrontendId, PeerAddr, PoolId, RouteTarget};
    use crate::table::build::{FrontendInput, PoolInput, TableInput, build};
    use crate::table::state::FrontendState;
    use crate::testing;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    /// Ranges that contain about half of the addresses 10.0.0.0 to 10.0.0.3.
    fn ranges() -> impl Strategy<Value = Vec<IpNet>> {
        let range = (0..4_u8, 30..=32_u8).prop_map(|(last, length)| {
            IpNet::new(Ipv4Addr::new(10, 0, 0, last).into(), length).unwrap()
        });
        proptest::collection::vec(range, 0..3)
    }

    prop_compose! {
        fn any_route()(
            sources in ranges(),
            addresses in ranges(),
            ports in proptest::collection::vec((0..4_u16).prop_map(|port| port..=port), 0..3),
        ) -> RouteConfig {
            RouteConfig { sources, ports, addresses, target: RouteTarget::Refuse }
        }
    }

    fn frontend(routes: Vec<RouteConfig>) -> Arc<FrontendRoute> {
        let pool = testing::pool("web");
        let mut frontend = testing::frontend("in", 80, &pool);
        frontend.routes = routes;
        let state = FrontendState::new(FrontendId(1), "in".into(), 1, 1);
        let pool = PoolInput {
            id: PoolId(1),
            spec: Arc::new(pool),
            backends: Vec::new(),
            stand_ins: Vec::new(),
            undecided: false,
        };
        let input = TableInput {
            generation: 1,
            serial: 1,
            connections_max: 0,
            frontends: vec![FrontendInput { state: Arc::new(state), spec: frontend }],
            pools: vec![pool],
        };
        Arc::clone(&build(&input, None).frontends[0])
    }

    proptest! {
        #[test]
        fn recorded_route_is_the_route_and_each_earlier_one_fails_its_condition(
            routes in proptest::collection::vec(any_route(), 0..6),
            (client, local, port) in (0..4_u8, 0..4_u8, 0..4_u16),
        ) {
            let frontend = frontend(routes.clone());
            let address = |last, port| SocketAddr::from(([10, 0, 0, last], port));
            let client = ClientAddr::of_peer(PeerAddr::new(address(client, 9)));
            let facts = ConnectionFacts { client, local: Some(address(local, port)) };
            let (number, mismatches) = frontend.route_recorded(&facts);
            prop_assert_eq!(number, frontend.route(&facts));
            let before = number.position().map_or(routes.len(), |n| usize::from(n) - 1);
            prop_assert_eq!(mismatches.len(), before);
            for (place, mismatch) in mismatches.iter().enumerate() {
                prop_assert_eq!(usize::from(mismatch.position), place + 1);
                let route = &routes[place];
                let holds = match mismatch.condition {
                    RouteCondition::Port => route.ports.iter().any(|p| p.contains(&port)),
                    RouteCondition::Address => lies_in(&route.addresses, facts.local.map(|local| local.ip())),
                    RouteCondition::Source => lies_in(&route.sources, client.ip()),
                };
                prop_assert!(!holds);
            }
        }
    }
}
