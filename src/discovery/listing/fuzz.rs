//! Entry point of the fuzz target in `tests/fuzz`: any bytes to the decoder of lists.
//!
//! Built only for tests and for the fuzzer. It panics if the decoder violates a guarantee:
//! the members of a list are unique and usable, and a refused list has a reason.

use super::{decode_list, decode_member};
use std::collections::BTreeSet;
use tidegate_core::control::MEMBERS_MAX;

/// See the module's documentation.
pub fn check(data: &[u8]) {
    match decode_list(data) {
        Ok(members) => {
            assert!(members.len() <= MEMBERS_MAX);
            let names: BTreeSet<&str> = members.iter().map(|member| &*member.name).collect();
            let addresses: BTreeSet<_> = members.iter().map(|member| member.address).collect();
            assert_eq!((names.len(), addresses.len()), (members.len(), members.len()));
            assert!(members.iter().all(|member| member.address.port() > 0));
            assert!(members.iter().all(|member| member.weight != Some(0)));
        }
        Err(problem) => assert!(!problem.message.is_empty()),
    }
    let _ = decode_member(data, "a");
}
