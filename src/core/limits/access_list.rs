//! Access lists: allowed and denied address ranges of clients.
//!
//! The configuration builds them. The listener checks each accepted connection. Pure;
//! it counts nothing and knows no limits (see `client_sources`).
//!
//! The longest prefix that contains an address decides. Ranges are nested or disjoint.
//! A list is therefore flattened once, when it is built, into the addresses at which
//! the result changes. A lookup is one binary search: 17 steps for 100,000 ranges.

use ipnet::IpNet;
use std::net::IpAddr;

/// Result of a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// The client is admitted.
    Allowed,
    /// The client is rejected.
    Denied,
}

/// Flattened allow and deny lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessList {
    v4: Box<[RangeStart<u32>]>,
    v6: Box<[RangeStart<u128>]>,
    rules: usize,
}

/// `rule` applies from this address up to the next start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RangeStart<T> {
    from: T,
    rule: Rule,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    access: Access,
    /// A range decides; otherwise no range contains the address.
    listed: bool,
}

/// A range, inclusive at both ends.
struct Range {
    first: u128,
    last: u128,
    access: Access,
}

// === impl AccessList ===

impl AccessList {
    /// Builds a list. An address outside all ranges is denied if `allow` is not empty,
    /// and allowed otherwise. A range in both lists is denied.
    pub fn new(allow: &[IpNet], deny: &[IpNet]) -> AccessList {
        let access = if allow.is_empty() { Access::Allowed } else { Access::Denied };
        let otherwise = Rule { access, listed: false };
        let of_kind = |v4: bool| -> Vec<Range> {
            let allowed = allow.iter().map(|net| (net, Access::Allowed));
            let denied = deny.iter().map(|net| (net, Access::Denied));
            allowed
                .chain(denied)
                .filter(|(net, _)| net.addr().is_ipv4() == v4)
                .map(|(net, access)| Range {
                    first: number(net.network()),
                    last: number(net.broadcast()),
                    access,
                })
                .collect()
        };
        let narrow = |change: RangeStart<u128>| {
            // IPv4 ranges fit 32 bits.
            u32::try_from(change.from).ok().map(|from| RangeStart { from, rule: change.rule })
        };
        AccessList {
            v4: flatten(of_kind(true), otherwise).into_iter().filter_map(narrow).collect(),
            v6: flatten(of_kind(false), otherwise).into_boxed_slice(),
            rules: allow.len() + deny.len(),
        }
    }

    /// Returns whether `address` is allowed. An IPv4-mapped IPv6 address is treated as
    /// IPv4.
    #[inline]
    pub fn of(&self, address: IpAddr) -> Access {
        self.rule_of(address).access
    }

    /// Returns whether any range contains `address`.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.rule_of(address).listed
    }

    #[inline]
    fn rule_of(&self, address: IpAddr) -> Rule {
        match address.to_canonical() {
            IpAddr::V4(v4) => verdict(&self.v4, v4.to_bits()),
            IpAddr::V6(v6) => verdict(&self.v6, v6.to_bits()),
        }
    }

    /// Returns the number of ranges in both lists.
    pub fn rules(&self) -> usize {
        self.rules
    }
}

/// Returns the longest of these ranges that contains the address. An IPv4-mapped IPv6
/// address is treated as IPv4.
pub fn longest_range(ranges: &[IpNet], address: IpAddr) -> Option<IpNet> {
    let address = address.to_canonical();
    let containing = ranges.iter().filter(|range| range.contains(&address));
    containing.max_by_key(|range| range.prefix_len()).copied()
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Returns the rule at `address`. The first start is 0, so a start at or before
/// `address` always exists.
fn verdict<T: Copy + Ord>(changes: &[RangeStart<T>], address: T) -> Rule {
    let after = changes.partition_point(|change| change.from <= address);
    changes[after - 1].rule
}

/// Flattens the ranges with a sweep. `open` is a stack of the ranges that contain the
/// current address, innermost on top. The innermost has the longest prefix.
fn flatten(mut ranges: Vec<Range>, otherwise: Rule) -> Vec<RangeStart<u128>> {
    // Outer before inner. Of two equal ranges the denied range is last, so it decides.
    ranges.sort_by_key(|r| (r.first, std::cmp::Reverse(r.last), r.access == Access::Denied));
    let mut changes = vec![RangeStart { from: 0, rule: otherwise }];
    let mut open: Vec<Range> = Vec::new();
    for range in ranges {
        close_before(&mut open, Some(range.first), otherwise, &mut changes);
        change(&mut changes, range.first, Rule { access: range.access, listed: true });
        open.push(range);
    }
    close_before(&mut open, None, otherwise, &mut changes);
    changes.dedup_by_key(|change| change.rule);
    changes
}

/// Closes the ranges that end before `next`; all of them if `next` is `None`.
fn close_before(
    open: &mut Vec<Range>,
    next: Option<u128>,
    otherwise: Rule,
    changes: &mut Vec<RangeStart<u128>>,
) {
    while let Some(range) = open.pop_if(|range| next.is_none_or(|next| range.last < next)) {
        let outer = |outer: &Range| Rule { access: outer.access, listed: true };
        let rule = open.last().map_or(otherwise, outer);
        if let Some(after) = range.last.checked_add(1) {
            change(changes, after, rule);
        }
    }
}

/// Adds a start. A start at the same address is replaced.
fn change(changes: &mut Vec<RangeStart<u128>>, from: u128, rule: Rule) {
    match changes.last_mut() {
        Some(last) if last.from == from => last.rule = rule,
        _ => changes.push(RangeStart { from, rule }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn of(list: &AccessList, address: &str) -> Access {
        list.of(address.parse().unwrap())
    }

    #[test]
    fn list_contains_the_addresses_of_its_ranges_whether_they_are_allowed_or_denied() {
        let list = AccessList::new(&nets(&["10.0.0.0/8"]), &nets(&["10.1.0.0/16", "12.0.0.0/8"]));
        let contains = |address: &str| list.contains(address.parse().unwrap());
        for (address, inside) in [
            ("9.255.255.255", false),
            ("10.0.0.0", true),
            ("10.1.0.1", true),
            ("10.255.255.255", true),
            ("11.0.0.0", false),
            ("12.0.0.0", true),
            ("13.0.0.0", false),
            ("::1", false),
        ] {
            assert_eq!(contains(address), inside, "{address}");
        }
        assert_eq!(of(&list, "11.0.0.0"), Access::Denied);
    }

    #[test]
    fn without_rules_every_client_is_allowed() {
        let list = AccessList::new(&[], &[]);
        for address in ["0.0.0.0", "10.1.2.3", "255.255.255.255", "::", "ffff::1"] {
            assert_eq!(of(&list, address), Access::Allowed);
        }
    }

    #[test]
    fn client_outside_the_allowed_ranges_is_denied_in_both_families() {
        let list = AccessList::new(&nets(&["10.0.0.0/8"]), &[]);
        assert_eq!(of(&list, "10.255.255.255"), Access::Allowed);
        assert_eq!(of(&list, "11.0.0.0"), Access::Denied);
        assert_eq!(of(&list, "9.255.255.255"), Access::Denied);
        assert_eq!(of(&list, "2001:db8::1"), Access::Denied);
    }

    #[test]
    fn longest_range_of_a_list_is_found() {
        let ranges = nets(&["10.0.0.0/8", "10.1.2.0/24", "2001:db8::/32"]);
        let found = |address: &str| longest_range(&ranges, address.parse().unwrap());
        assert_eq!(found("10.1.2.3"), Some(ranges[1]));
        assert_eq!(found("::ffff:10.2.0.1"), Some(ranges[0]));
        assert_eq!(found("2001:db8::1"), Some(ranges[2]));
        assert_eq!(found("192.0.2.1"), None);
    }

    #[test]
    fn longest_prefix_decides() {
        let allow = nets(&["10.0.0.0/8", "10.1.2.0/24", "0.0.0.0/0", "2001:db8::/32"]);
        let deny = nets(&["10.1.0.0/16", "10.1.2.3/32", "2001:db8:1::/48", "255.0.0.0/8"]);
        let list = AccessList::new(&allow, &deny);
        for (address, access) in [
            ("10.0.0.1", Access::Allowed),
            ("10.1.0.1", Access::Denied),
            ("10.1.2.1", Access::Allowed),
            ("10.1.2.3", Access::Denied),
            ("10.1.2.4", Access::Allowed),
            ("10.1.3.0", Access::Denied),
            ("10.2.0.0", Access::Allowed),
            ("192.0.2.1", Access::Allowed),
            ("255.255.255.255", Access::Denied),
            ("2001:db8::1", Access::Allowed),
            ("2001:db8:1::1", Access::Denied),
            ("2001:db8:2::1", Access::Allowed),
        ] {
            assert_eq!(of(&list, address), access, "{address}");
        }
    }

    #[test]
    fn range_in_both_lists_is_denied() {
        let both = nets(&["192.0.2.0/24"]);
        assert_eq!(of(&AccessList::new(&both, &both), "192.0.2.7"), Access::Denied);
    }

    #[test]
    fn ipv4_mapped_address_is_treated_as_ipv4() {
        let list = AccessList::new(&[], &nets(&["192.0.2.0/24"]));
        assert_eq!(of(&list, "::ffff:192.0.2.9"), Access::Denied);
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        // Addresses vary in few bits, so that ranges are nested and adjacent.
        let v4 = (0u32..16, 0u32..16, 0u8..=32).prop_map(|(high, low, length)| {
            let address = std::net::Ipv4Addr::from_bits(high << 28 | low);
            IpNet::new(address.into(), length).unwrap().trunc()
        });
        let v6 = (0u128..16, 0u128..16, 0u8..=128).prop_map(|(high, low, length)| {
            let address = std::net::Ipv6Addr::from_bits(high << 124 | low);
            IpNet::new(address.into(), length).unwrap().trunc()
        });
        prop_oneof![v4, v6]
    }

    /// The rule itself, applied to every range.
    fn by_hand(allow: &[IpNet], deny: &[IpNet], address: IpAddr) -> Access {
        let longest = |nets: &[IpNet]| {
            nets.iter().filter(|net| net.contains(&address)).map(|net| net.prefix_len()).max()
        };
        match (longest(allow), longest(deny)) {
            (None, None) if allow.is_empty() => Access::Allowed,
            (Some(allowed), denied) if denied.is_none_or(|denied| allowed > denied) => {
                Access::Allowed
            }
            _ => Access::Denied,
        }
    }

    proptest! {
        #[test]
        fn lookup_matches_the_rule_applied_to_every_range(
            allow in prop::collection::vec(any_net(), 0..8),
            deny in prop::collection::vec(any_net(), 0..8),
        ) {
            let list = AccessList::new(&allow, &deny);
            let ends = allow.iter().chain(&deny).flat_map(|net| [net.network(), net.broadcast()]);
            for end in ends {
                for step in [-1i8, 0, 1] {
                    let address: IpAddr = match end {
                        IpAddr::V4(a) => std::net::Ipv4Addr::from_bits(
                            a.to_bits().wrapping_add_signed(step.into())).into(),
                        IpAddr::V6(a) => std::net::Ipv6Addr::from_bits(
                            a.to_bits().wrapping_add_signed(step.into())).into(),
                    };
                    if address.to_canonical() == address {
                        prop_assert_eq!(list.of(address), by_hand(&allow, &deny, address));
                    }
                }
            }
        }
    }
}
