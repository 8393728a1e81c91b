//! See `tidegate_discovery::resolver::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_discovery::resolver::fuzz::check_files(data));
