//! Fuzz target: arbitrary bytes as the answers of services to probes.
//!
//! Called by the fuzzer and by the mutation test. The first byte says which kind of probe reads
//! the others. It checks:
//!
//! - Nothing panics.
//! - A probe ends, and reads at most 64 KiB.
//! - A reason has at most `REASON_BYTES_MAX` bytes, without control characters.

use crate::probe::fuzz::{KINDS, answered};
use crate::probe::{REASON_BYTES_MAX, fuzz::Answered};

/// See the module's documentation.
pub fn check(data: &[u8]) {
    let Some((kind, answer)) = data.split_first() else { return };
    let Answered { reason, bytes_read } = answered(usize::from(*kind) % KINDS, answer);
    assert!(bytes_read <= 64 * 1024, "{bytes_read}");
    if let Some(reason) = reason {
        assert!(reason.len() <= REASON_BYTES_MAX, "{reason}");
        assert!(!reason.contains(char::is_control), "{reason:?}");
    }
}
