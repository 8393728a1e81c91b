//! The hosts of a scene: client, Tidegate and backend in a row, with an impairable link on each
//! side.
//!
//! Created and repaired by `play`. All candidates of a scene run on Tidegate's host at the same
//! time and have the same faults.

use super::{Leg, Way};
use crate::link::channel::Impairment;
use crate::link::{Direction, Link};
use crate::netns::Namespace;
use std::net::Ipv4Addr;

pub struct Site {
    // Dropped in this order: the links before their hosts.
    /// End *a* is the client's.
    pub client_link: Link,
    /// End *a* is Tidegate's. The device is `link1` on both hosts.
    pub backend_link: Link,
    pub client: Namespace,
    pub balancer: Namespace,
    pub backend: Namespace,
}

// === impl Site ===

impl Site {
    #[track_caller]
    pub fn new(seed: u64) -> Site {
        let [client, balancer, backend] = ["client", "lb", "backend"].map(Namespace::new);
        let client_link = Link::join(&client, &balancer, 2, seed);
        let backend_link = Link::join(&balancer, &backend, 1, seed + 1);
        Site { client_link, backend_link, client, balancer, backend }
    }

    /// The address of all frontends.
    pub fn frontend(&self) -> Ipv4Addr {
        self.client_link.b()
    }

    /// The address of all backends.
    pub fn backend(&self) -> Ipv4Addr {
        self.backend_link.b()
    }

    pub fn change(&self, leg: Leg, way: Way, change: fn(&mut Impairment)) {
        let link = match leg {
            Leg::Client => &self.client_link,
            Leg::Backend => &self.backend_link,
        };
        let both: [(&Direction, Way); 2] = [(link.a_to_b(), Way::In), (link.b_to_a(), Way::Out)];
        for (direction, its) in both {
            if way == its || way == Way::Both {
                direction.change(change);
            }
        }
    }

    /// Makes both links perfect again, so that all connections can close.
    pub fn repair(&self) {
        self.client_link.set(Impairment::default());
        self.backend_link.set(Impairment::default());
    }
}
