//! Upgrades: another process takes over the sockets without an effect on clients. A failed
//! upgrade changes nothing.
//!
//! Real Tidegate processes between real and scripted peers, on both engines if the engine
//! matters. The tests never look inside the program.

// The program must not sleep or read the clock directly. Tests can.
#![allow(clippy::disallowed_methods)]
// A failed unwrap fails the test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite. No other crate links it.
#![allow(unreachable_pub)]

// A helper can be unused. A test that no macro lists is an error.
#[allow(dead_code, unused_imports, unused_macros)]
#[path = "../common/mod.rs"]
mod common;

mod broken;
mod caps;
mod continuity;
mod crash;
mod elsewhere;
mod heartbeats;
mod in_force;
mod manager;
mod on_down;
mod reexec;
mod selftest;
mod signals;
mod state;
