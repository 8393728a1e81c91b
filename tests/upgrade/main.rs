//! Upgrades in place: another process takes the sockets, and nobody outside
//! notices; and if it cannot, nothing has happened.
//!
//! A real balancer process, its successors, real and scripted peers, on every
//! engine where it matters. It never looks inside the program.

// Tests wait and read the clock; the program under test may not.
#![allow(clippy::disallowed_methods)]
// A failed unwrap in a test is a failed test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite, which nobody else links.
#![allow(unreachable_pub)]

// A helper may wait for its first user; a test that no macro lists may not.
#[allow(dead_code, unused_imports, unused_macros)]
#[path = "../common/mod.rs"]
mod common;

mod broken;
mod continuity;
mod crash;
mod elsewhere;
mod heartbeats;
mod in_force;
mod manager;
mod reexec;
mod selftest;
mod signals;
mod state;
