//! See `tidegate_daemon::fuzz::probe`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_daemon::fuzz::probe::check(data));
