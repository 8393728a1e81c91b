//! See `tidegate_discovery::etcd::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_discovery::etcd::fuzz::check(data));
