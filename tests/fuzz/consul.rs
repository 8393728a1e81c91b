//! See `tidegate_discovery::consul::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_discovery::consul::fuzz::check(data));
