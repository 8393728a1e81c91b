//! Servers for tests: they answer as a documented registry does, or as a test scripts it.
//! Some start a real server.
//!
//! Tests of this member and of the daemon use them, and the examples of this member run
//! them as programs. The balancer never does.

pub mod consul;
pub mod dns_liar;
pub mod dnsmasq;
pub mod etcd;
#[cfg(test)]
pub(crate) mod heard;
pub mod kubernetes;
pub mod mutations;
pub mod zookeeper;

/// Whether the long versions of the tests are requested (`TIDEGATE_LONG=1`).
#[cfg(test)]
pub(crate) fn is_long() -> bool {
    std::env::var("TIDEGATE_LONG").is_ok_and(|value| value == "1")
}
