//! Prefixes of addresses, to compare rules of the sources with Tidegate's longest prefix.
//!
//! Called by the readers. Pure.

use std::net::IpAddr;

/// An address, or the leading bits of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AddressPrefix {
    v6: bool,
    bits: u128,
    length: u32,
}

impl AddressPrefix {
    /// Parses `ADDRESS` or `ADDRESS/LENGTH`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length.parse::<u32>().ok()?)),
            None => (text, None),
        };
        let (v6, bits, full) = match address.parse::<IpAddr>().ok()? {
            IpAddr::V4(ip) => (false, u128::from(u32::from(ip)), 32),
            IpAddr::V6(ip) => (true, u128::from(ip), 128),
        };
        let length = length.unwrap_or(full);
        (length <= full).then_some(AddressPrefix { v6, bits, length })
    }

    /// Returns true if every address of `narrow` is in this prefix.
    pub(crate) fn contains(self, narrow: AddressPrefix) -> bool {
        let shift = (if self.v6 { 128 } else { 32 }) - self.length;
        let top = |bits: u128| bits.checked_shr(shift).unwrap_or(0);
        self.v6 == narrow.v6 && self.length <= narrow.length && top(self.bits) == top(narrow.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::AddressPrefix;

    #[test]
    fn wider_prefix_contains_a_narrower_one() {
        let prefix = |text| AddressPrefix::parse(text).unwrap();
        assert!(prefix("10.0.0.0/8").contains(prefix("10.1.0.0/16")));
        assert!(prefix("::/0").contains(prefix("fd00::1")));
        assert!(!prefix("10.1.0.0/16").contains(prefix("10.0.0.0/8")));
        assert!(!prefix("0.0.0.0/0").contains(prefix("fd00::1")));
        assert_eq!((AddressPrefix::parse("10.0.0.0/33"), AddressPrefix::parse("a")), (None, None));
    }
}
