//! The network tests: client, Tidegate and backends on separate hosts, joined by links that can
//! lose, delay, reorder and partition.
//!
//! Hosts are network namespaces of this kernel, and no packet leaves the machine. Run the
//! tests with `scripts/test` as root. Without root every test reports that it is skipped, and
//! in CI (`CI` is set) it fails unless `TIDEGATE_NO_NETNS` is set. The machine's own network
//! configuration is never changed. `README.md` in this directory lists the fault cases.

// The program must not sleep or read the clock directly. Tests can.
#![allow(clippy::disallowed_methods)]
// A failed unwrap fails the test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite. No other crate links it.
#![allow(unreachable_pub)]

#[allow(dead_code, unused_imports, unused_macros)]
#[path = "../common/mod.rs"]
mod common;

mod cpu_limit;
#[allow(dead_code)]
mod hosts;
#[allow(dead_code)]
mod link;
#[allow(dead_code)]
mod netns;
#[allow(dead_code)]
mod testbed;
mod traffic;
mod trials;
mod watch;

mod admin;
mod binds;
mod channel;
mod detection;
mod emulator;
mod faults;
mod floods;
mod ports;
#[allow(dead_code)]
mod scenes;
mod silence;
mod streams;
