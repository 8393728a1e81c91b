//! Whether the clock of this host is synchronised.
//!
//! Used by heartbeat senders, because a receiver rejects heartbeats if the clocks differ
//! too much. It never changes the clock.

#![allow(unsafe_code)]

/// Returns whether the kernel's clock is synchronised (adjtimex(2)). `None`: the kernel
/// does not report it.
///
/// Some time services do not report to the kernel, so `false` is only a hint.
pub fn is_synchronised() -> Option<bool> {
    // SAFETY: `timex` consists of integers, for which zero is valid.
    let mut asked: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `asked` is valid for writes. `modes` is zero, so the call changes nothing.
    let state = unsafe { libc::adjtimex(&raw mut asked) };
    (state >= 0).then_some(state != libc::TIME_ERROR && asked.status & libc::STA_UNSYNC == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_says_whether_the_clock_is_synchronised() {
        // The value depends on the host. Reading it needs no privileges.
        assert!(is_synchronised().is_some());
    }
}
