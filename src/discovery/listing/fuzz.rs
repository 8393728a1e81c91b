//! Entry point of the fuzz target in `tests/fuzz`: any bytes to the decoder of lists.
//!
//! Built only for tests and for the fuzzer. It panics if the decoder violates a guarantee:
//! the members of a list are unique and usable, and a refused list has a reason.

use super::{LISTED_NAME_BYTES_MAX, decode_list, decode_member};
use std::collections::BTreeSet;
use tidegate_core::control::MEMBERS_MAX;
use tidegate_core::discovery::Announced;

/// See the module's documentation.
pub fn check(data: &[u8]) {
    let decoded = decode_list(data);
    assert_eq!(decoded, decode_list(data));
    match decoded {
        Ok(members) => {
            assert!(members.len() <= MEMBERS_MAX);
            let names: BTreeSet<&str> = members.iter().map(|member| &*member.name).collect();
            let addresses: BTreeSet<_> = members.iter().map(|member| member.address).collect();
            assert_eq!((names.len(), addresses.len()), (members.len(), members.len()));
            members.iter().for_each(assert_usable);
        }
        Err(problem) => assert!(!problem.message.is_empty()),
    }
    if let Ok(member) = decode_member(data, "a") {
        assert_usable(&member);
    }
}

/// Panics if no decoder of one-member values may give this member.
pub(crate) fn assert_usable(member: &Announced) {
    let ip = member.address.ip();
    assert!(member.address.port() > 0 && member.weight != Some(0), "{member:?}");
    assert!(!ip.to_canonical().is_unspecified() && !ip.to_canonical().is_multicast(), "{member:?}");
    assert!((1..=LISTED_NAME_BYTES_MAX).contains(&member.name.len()), "{member:?}");
    assert!(!member.name.contains(|c: char| c.is_control() || c.is_whitespace()), "{member:?}");
}
