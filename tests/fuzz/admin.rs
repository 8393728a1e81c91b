//! See `tidegate::daemon::fuzz::admin`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::daemon::fuzz::admin::check(data));
