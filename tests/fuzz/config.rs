//! See `tidegate_daemon::fuzz::config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_daemon::fuzz::config::check(data));
