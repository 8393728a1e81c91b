//! See `tidegate::daemon::fuzz::handshake`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate::daemon::fuzz::handshake::check(data));
