//! See `tidegate::fuzz::heartbeat`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::fuzz::heartbeat::check(data));
