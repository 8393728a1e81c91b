//! What an answer offers: announcements that can become members, and the number of those
//! that cannot.
//!
//! [`View`](super::View) calls [`Offers::of`] with each complete answer. It knows neither
//! the view's members nor the time.

use super::RefusedCounts;
use super::member::RAW_BYTES_MAX;
use crate::discovery::{Announced, MEMBERS_MAX, Wish};
use crate::model::{AnnouncedWeights, ViewGuards};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tidegate_heartbeat::wire::is_backend_name;

/// The announcements of an answer that can become members.
#[derive(Debug)]
pub(super) struct Offers<'s> {
    /// Sorted by address, unique by address; at most `backends_max`.
    pub(super) list: Vec<OfferedMember<'s>>,
    pub(super) refused: RefusedCounts,
}

/// An announcement that can become a member.
#[derive(Debug)]
pub(super) struct OfferedMember<'s> {
    /// IPv4-mapped IPv6 is IPv4 here.
    pub(super) address: SocketAddr,
    pub(super) from: &'s Announced,
    /// At least 1.
    pub(super) weight: u16,
    /// A weight of 0 is maintenance, so it wishes to drain.
    pub(super) wish: Wish,
}

// === impl Offers ===

impl<'s> Offers<'s> {
    /// Checks each announcement.
    pub(super) fn of(members: &'s [Announced], guards: &ViewGuards) -> Offers<'s> {
        let mut refused = RefusedCounts::default();
        let mut list = Vec::with_capacity(members.len());
        for from in members {
            let address = canonical(from.address);
            if !is_usable(address) || !guards.permit(address.ip()) {
                refused.addresses += 1;
                continue;
            }
            let (weight, wish) = weight_and_wish(from, guards, &mut refused);
            list.push(OfferedMember { address, from, weight, wish });
        }
        list.sort_by(|a, b| (a.address, &a.from.name).cmp(&(b.address, &b.from.name)));
        let all = list.len();
        list.dedup_by_key(|offer| offer.address);
        refused.duplicate = (all - list.len()) as u32;
        let most = (guards.backends_max as usize).min(MEMBERS_MAX);
        refused.too_many = list.len().saturating_sub(most) as u32;
        list.truncate(most);
        let is_bad = |offer: &&OfferedMember<'_>| !has_valid_name(&offer.from.name, offer.address);
        refused.bad_name = list.iter().filter(is_bad).count() as u32;
        Offers { list, refused }
    }
}

// === impl OfferedMember ===

impl OfferedMember<'_> {
    /// Returns the state in the words of the source, cut off at its bound.
    pub(super) fn raw(&self) -> Arc<str> {
        let text = self.raw_text();
        if text.len() == self.from.raw.len() { Arc::clone(&self.from.raw) } else { text.into() }
    }

    pub(super) fn raw_text(&self) -> &str {
        super::cut(&self.from.raw, RAW_BYTES_MAX)
    }
}

/// Returns the name of the member: the announced one if it is valid, else the address.
pub(super) fn member_name(announced: &Arc<str>, address: SocketAddr) -> Arc<str> {
    if is_backend_name(announced, address) {
        Arc::clone(announced)
    } else {
        address.to_string().into()
    }
}

/// Whether the announced name is valid, or an address in any spelling.
fn has_valid_name(name: &str, address: SocketAddr) -> bool {
    match name.parse::<SocketAddr>() {
        Ok(written) => canonical(written) == address,
        Err(_) => is_backend_name(name, address),
    }
}

/// Returns the address with IPv4-mapped IPv6 as IPv4, and without a flow label.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(_) => address,
        SocketAddr::V6(mut v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(IpAddr::V4(v4), v6.port()),
            None => {
                v6.set_flowinfo(0);
                SocketAddr::V6(v6)
            }
        },
    }
}

/// Whether a backend can listen at the address.
pub(super) fn is_usable(address: SocketAddr) -> bool {
    let ip = address.ip();
    let is_broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !is_broadcast
}

fn weight_and_wish(
    from: &Announced,
    guards: &ViewGuards,
    refused: &mut RefusedCounts,
) -> (u16, Wish) {
    let weight = match guards.weights {
        AnnouncedWeights::Use => from.weight.unwrap_or(1),
        AnnouncedWeights::Ignore => 1,
    };
    let most = guards.weight_max.max(1);
    refused.weight_clamped += u32::from(weight > most);
    let wish = match (weight, from.wish) {
        (0, Wish::Sessions | Wish::Starting) => Wish::Draining,
        (_, wish) => wish,
    };
    (weight.clamp(1, most), wish)
}
