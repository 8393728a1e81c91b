//! See `tidegate_discovery::listing::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_discovery::listing::fuzz::check(data));
