//! See `tidegate::fuzz::admin`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::fuzz::admin::check(data));
