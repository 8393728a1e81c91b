//! See `tidegate_daemon::fuzz::views`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_daemon::fuzz::views::check(data));
