//! The network suite: client, balancer and backends as separate hosts, joined
//! by links that lose, delay, reorder and cut.
//!
//! Hosts are network namespaces of this kernel; no packet leaves the machine.
//! Run it with `scripts/test`, as root: without the rights it needs every test
//! is skipped loudly, and fails where `CI` is set unless `TIDEGATE_NO_NETNS`
//! says that the machine cannot. It never touches the machine's own network. Which
//! fault is tested where stands in `README.md` beside this file.

// Tests wait and read the clock; the program under test may not.
#![allow(clippy::disallowed_methods)]
// A failed unwrap in a test is a failed test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite, which nobody else links.
#![allow(unreachable_pub)]

#[allow(dead_code, unused_imports, unused_macros)]
#[path = "../common/mod.rs"]
mod common;

#[allow(dead_code)]
mod hosts;
#[allow(dead_code)]
mod link;
#[allow(dead_code)]
mod netns;
mod starve;
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
