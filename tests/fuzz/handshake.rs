//! See `tidegate_daemon::fuzz::handshake`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_daemon::fuzz::handshake::check(data));
