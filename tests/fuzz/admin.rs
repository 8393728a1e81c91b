//! See `tidegate_daemon::fuzz::admin`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_daemon::fuzz::admin::check(data));
