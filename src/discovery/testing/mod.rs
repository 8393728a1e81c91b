//! Servers for tests whose behaviour a test scripts.

pub mod dns_liar;
