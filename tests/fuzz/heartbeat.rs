//! See `tidegate_daemon::fuzz::heartbeat`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_daemon::fuzz::heartbeat::check(data));
