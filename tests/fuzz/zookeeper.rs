//! See `tidegate_discovery::zookeeper::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_discovery::zookeeper::fuzz::check(data));
