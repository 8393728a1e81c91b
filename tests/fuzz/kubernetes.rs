//! See `tidegate_discovery::kubernetes::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_discovery::kubernetes::fuzz::check(data));
