//! Whether this host's clock is kept in step with others.
//!
//! Used by senders of heartbeats, whose receivers reject a clock that is off.

#![allow(unsafe_code)]

/// What the kernel was told by whatever keeps its clock (adjtimex(2)); `None`
/// where it does not say. Some time services tell the kernel nothing, so `false`
/// is a reason to look, not a proof.
pub fn is_synchronised() -> Option<bool> {
    // SAFETY: `timex` is made of numbers alone, for which zeroes are valid.
    let mut asked: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `asked` is valid for writes; its `modes` of zero changes nothing.
    let state = unsafe { libc::adjtimex(&raw mut asked) };
    (state >= 0).then_some(state != libc::TIME_ERROR && asked.status & libc::STA_UNSYNC == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_says_whether_the_clock_is_synchronised() {
        // Which of the two depends on the host; it is read without privileges.
        assert!(is_synchronised().is_some());
    }
}
