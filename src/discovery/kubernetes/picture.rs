//! The slices of one service as a set of members.
//!
//! The source puts slices in and takes the set. An endpoint that moves between two slices is
//! in both or in none for a moment, so the picture keeps a missing endpoint for a time
//! before it leaves. Nothing here reads a clock or a socket.

use super::codec::{EndpointFacts, EndpointState, SliceFacts};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::labels::MemberLabels;
use tidegate_core::discovery::{Announced, Unreadable, Wish};

/// How long a missing endpoint stays. The controller of Kubernetes writes the slices of one
/// change within milliseconds, unless its requests are throttled.
pub(crate) const SETTLE: Duration = Duration::from_secs(1);

/// Most endpoints and slices of a service, together. A slice without endpoints also costs
/// memory.
pub(crate) const PARTS_MAX: usize = 100_000;

/// All slices of a service.
#[derive(Debug, Default)]
pub(crate) struct SlicePicture {
    slices: BTreeMap<Arc<str>, SliceFacts>,
    /// The endpoints of the last set by identity, and since when each is in no slice.
    shown: BTreeMap<EndpointIdentity, (EndpointFacts, Option<Instant>)>,
}

/// What stays of an endpoint that moves: its pod, else its address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum EndpointIdentity {
    Target(Arc<str>),
    Address(SocketAddr),
}

/// A set of members.
#[derive(Debug)]
pub(crate) struct ShownMembers {
    /// Sorted by name; at most [`MEMBERS_MAX`].
    pub(crate) members: Vec<Announced>,
    /// Endpoints without address or port, and those beyond the bound.
    pub(crate) unreadable: Unreadable,
    /// When a missing endpoint leaves.
    pub(crate) until: Option<Instant>,
}

// === impl SlicePicture ===

impl SlicePicture {
    /// Replaces all slices.
    pub(crate) fn replace(&mut self, slices: Vec<SliceFacts>) {
        self.slices = slices.into_iter().map(|slice| (Arc::clone(&slice.name), slice)).collect();
    }

    /// Adds or replaces a slice. An endpoint that vanishes before the next set keeps the
    /// state that the slice had last.
    pub(crate) fn put(&mut self, slice: SliceFacts) {
        for endpoint in &slice.endpoints {
            let shown = self.shown.get_mut(&EndpointIdentity::of(endpoint));
            // A pod with two addresses is in two slices and shown with one of them.
            if let Some((shown, _)) = shown.filter(|(shown, _)| shown.address == endpoint.address) {
                shown.state = endpoint.state;
            }
        }
        self.slices.insert(Arc::clone(&slice.name), slice);
    }

    /// Removes a slice.
    pub(crate) fn delete(&mut self, name: &str) {
        self.slices.remove(name);
    }

    /// Returns the number of slices and endpoints.
    pub(crate) fn size(&self) -> usize {
        parts(self.slices.values())
    }

    /// Whether the service has no slice. Kubernetes keeps an empty slice for a service
    /// without endpoints, so such a service does not exist.
    pub(crate) fn is_absent(&self) -> bool {
        self.slices.is_empty()
    }

    /// Returns the set at this time.
    pub(crate) fn show(&mut self, now: Instant) -> ShownMembers {
        let mut current = BTreeMap::new();
        for endpoint in self.slices.values().flat_map(|slice| &slice.endpoints) {
            keep_better(&mut current, endpoint);
        }
        let mut until: Option<Instant> = None;
        for (identity, (endpoint, missing)) in std::mem::take(&mut self.shown) {
            // An endpoint that served no sessions moves nothing.
            if endpoint.state == EndpointState::Out || current.contains_key(&identity) {
                continue;
            }
            let since = missing.unwrap_or(now);
            let leaves = since + SETTLE;
            if now < leaves {
                until = Some(until.map_or(leaves, |until| until.min(leaves)));
                current.insert(identity, (endpoint, Some(since)));
            }
        }
        self.shown = current;
        let (members, beyond) = self.members();
        let mut unreadable = Unreadable::unnamed(beyond);
        self.slices.values().for_each(|slice| unreadable.merge(&slice.unreadable));
        ShownMembers { members, unreadable, until }
    }

    fn members(&self) -> (Vec<Announced>, u32) {
        let endpoints = || self.shown.values().map(|(endpoint, _)| endpoint);
        let anything_ready = endpoints().any(|endpoint| endpoint.state == EndpointState::Ready);
        let mut by_name: BTreeMap<&str, &EndpointFacts> = BTreeMap::new();
        for endpoint in endpoints().filter(|endpoint| endpoint.state != EndpointState::Out) {
            match by_name.entry(&endpoint.name) {
                Entry::Vacant(free) => {
                    free.insert(endpoint);
                }
                // A pod and its successor of the same name: the better one.
                Entry::Occupied(mut first) if is_better(endpoint, first.get()) => {
                    first.insert(endpoint);
                }
                Entry::Occupied(_) => {}
            }
        }
        let beyond = by_name.len().saturating_sub(MEMBERS_MAX) as u32;
        let endpoints = by_name.into_values().take(MEMBERS_MAX);
        (endpoints.map(|endpoint| announced(endpoint, anything_ready)).collect(), beyond)
    }
}

// === impl EndpointIdentity ===

impl EndpointIdentity {
    fn of(endpoint: &EndpointFacts) -> EndpointIdentity {
        match &endpoint.target {
            Some(target) => EndpointIdentity::Target(Arc::clone(target)),
            None => EndpointIdentity::Address(endpoint.address),
        }
    }
}

/// Returns the number of slices and of their endpoints.
pub(crate) fn parts<'s>(slices: impl IntoIterator<Item = &'s SliceFacts>) -> usize {
    slices.into_iter().map(|slice| 1 + slice.endpoints.len()).sum()
}

/// Adds an endpoint. A target in several slices keeps its best state.
fn keep_better(
    all: &mut BTreeMap<EndpointIdentity, (EndpointFacts, Option<Instant>)>,
    endpoint: &EndpointFacts,
) {
    match all.entry(EndpointIdentity::of(endpoint)) {
        Entry::Vacant(free) => {
            free.insert((endpoint.clone(), None));
        }
        Entry::Occupied(mut first) => {
            if is_better(endpoint, &first.get().0) {
                first.insert((endpoint.clone(), None));
            }
        }
    }
}

/// The better state, then IPv4 before IPv6: a pod with both is one member.
fn is_better(one: &EndpointFacts, other: &EndpointFacts) -> bool {
    let rank = |endpoint: &EndpointFacts| (endpoint.state, std::cmp::Reverse(endpoint.address));
    rank(one) > rank(other)
}

fn announced(endpoint: &EndpointFacts, anything_ready: bool) -> Announced {
    let (wish, raw) = match endpoint.state {
        EndpointState::Ready => (Wish::Sessions, "ready"),
        // All pods terminate: those that still serve are better than none.
        EndpointState::Leaving if !anything_ready => (Wish::Sessions, "terminating"),
        EndpointState::Leaving | EndpointState::Out => (Wish::Draining, "terminating"),
    };
    Announced {
        name: Arc::clone(&endpoint.name),
        address: endpoint.address,
        weight: None,
        tier: 0,
        wish,
        raw: raw.into(),
        labels: MemberLabels::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EndpointState::{Leaving, Out, Ready};
    use tidegate_net::clock;

    fn endpoint(number: u8, state: EndpointState) -> EndpointFacts {
        EndpointFacts {
            target: Some(format!("uid-{number}").into()),
            name: format!("web-{number}").into(),
            address: SocketAddr::from(([10, 0, 0, number], 80)),
            state,
        }
    }

    fn slice(name: &str, endpoints: &[EndpointFacts]) -> SliceFacts {
        let version = String::new();
        SliceFacts {
            name: name.into(),
            version,
            endpoints: endpoints.to_vec(),
            unreadable: Unreadable::default(),
        }
    }

    fn shown(picture: &mut SlicePicture, now: Instant) -> Vec<(String, Wish)> {
        let members = picture.show(now).members.into_iter();
        members.map(|member| (member.name.to_string(), member.wish)).collect()
    }

    #[test]
    fn an_endpoint_that_terminates_and_vanishes_between_two_sets_gets_no_sessions() {
        let now = clock::now();
        let mut picture = SlicePicture::default();
        let (one, two) = (endpoint(1, Ready), endpoint(2, Ready));
        picture.replace(vec![slice("a", &[one.clone(), two.clone()])]);
        shown(&mut picture, now);
        picture.put(slice("a", &[endpoint(1, Leaving), two.clone()]));
        picture.put(slice("a", std::slice::from_ref(&two)));
        let wishes = shown(&mut picture, now);
        let expected = [("web-1", Wish::Draining), ("web-2", Wish::Sessions)];
        assert_eq!(wishes, expected.map(|(name, wish)| (name.to_owned(), wish)));
        picture.put(slice("a", &[endpoint(2, Out)]));
        picture.put(slice("a", &[]));
        assert_eq!(shown(&mut picture, now).len(), 1, "only the pod that terminates");
    }

    #[test]
    fn an_endpoint_that_moves_between_slices_never_leaves() {
        let now = clock::now();
        let mut picture = SlicePicture::default();
        let (one, two) = (endpoint(1, Ready), endpoint(2, Ready));
        picture.replace(vec![slice("a", &[one.clone(), two.clone()]), slice("b", &[])]);
        let both = shown(&mut picture, now);
        assert_eq!(both.len(), 2);
        // In none.
        picture.put(slice("a", std::slice::from_ref(&one)));
        let between = picture.show(now);
        assert_eq!((between.members.len(), between.until), (2, Some(now + SETTLE)));
        picture.put(slice("b", std::slice::from_ref(&two)));
        assert_eq!(shown(&mut picture, now + SETTLE), both);
        // In both.
        picture.put(slice("a", &[one.clone(), two]));
        assert_eq!(shown(&mut picture, now + SETTLE), both);
        // It leaves if it is in no slice for the time.
        picture.replace(vec![slice("a", &[one])]);
        assert_eq!(shown(&mut picture, now + SETTLE), both);
        assert_eq!(shown(&mut picture, now + SETTLE * 2).len(), 1);
    }

    #[test]
    fn terminating_endpoints_serve_only_while_nothing_is_ready() {
        let now = clock::now();
        let mut picture = SlicePicture::default();
        picture.replace(vec![slice("a", &[endpoint(1, Ready), endpoint(2, Leaving)])]);
        let drained = ("web-2".to_owned(), Wish::Draining);
        assert_eq!(shown(&mut picture, now)[1], drained);
        picture.put(slice("a", &[endpoint(1, Out), endpoint(2, Leaving)]));
        assert_eq!(shown(&mut picture, now), [("web-2".to_owned(), Wish::Sessions)]);
        picture.put(slice("a", &[endpoint(1, Out), endpoint(2, Out)]));
        assert!(shown(&mut picture, now).is_empty());
    }

    #[test]
    fn slices_and_endpoints_count_towards_the_bound() {
        let mut picture = SlicePicture::default();
        picture.put(slice("a", &[endpoint(1, Ready), endpoint(2, Out)]));
        picture.put(slice("b", &[]));
        assert_eq!(picture.size(), 4);
        picture.put(slice("a", &[]));
        assert_eq!(picture.size(), 2);
    }

    #[test]
    fn a_pod_with_two_addresses_is_one_member() {
        let mut picture = SlicePicture::default();
        let mut six = endpoint(1, Ready);
        six.address = SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, 1], 80));
        picture.replace(vec![slice("a6", &[six]), slice("b4", &[endpoint(1, Ready)])]);
        let members = picture.show(clock::now()).members;
        assert_eq!(members.len(), 1);
        assert!(members[0].address.is_ipv4());
    }

    #[test]
    fn the_successor_of_a_pod_takes_its_name_when_it_is_ready() {
        let now = clock::now();
        let mut picture = SlicePicture::default();
        let old = endpoint(1, Leaving);
        let mut new = endpoint(1, Out);
        (new.target, new.address) = (Some("uid-9".into()), "10.0.0.9:80".parse().unwrap());
        picture.replace(vec![slice("a", &[old.clone(), new.clone()])]);
        assert_eq!(picture.show(now).members[0].address, old.address);
        new.state = Ready;
        picture.replace(vec![slice("a", &[old, new.clone()])]);
        let members = picture.show(now).members;
        assert_eq!((members.len(), members[0].address), (1, new.address));
    }
}
