//! See `tidegate_core::proxy_protocol::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_core::proxy_protocol::fuzz::check(data));
