//! The integration suite: a real balancer process between real and scripted
//! peers, every behaviour on every engine.
//!
//! One binary, so that it links once; one module for each promise. Run it with
//! `scripts/test`. It never looks inside the program: files, signals, the
//! command line, the admin API, sockets and /proc are all it uses.

// Tests wait and read the clock; the program under test may not.
#![allow(clippy::disallowed_methods)]
// A failed unwrap in a test is a failed test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite, which nobody else links.
#![allow(unreachable_pub)]

// A helper may wait for its first user; a test that no macro lists may not.
#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;

mod accounting;
mod balance;
mod binds;
mod cli;
mod confinement;
mod drain;
mod engine;
mod explain;
mod failover;
mod harness;
mod heartbeats;
mod heartbeats_flood;
mod heartbeats_rejected;
mod hostile;
mod idle;
mod limits;
mod logs;
mod ordinary_user;
mod panics;
mod passive;
mod probes;
mod relay;
mod reload;
mod rewrites;
mod routes;
mod scrapes;
mod settling;
mod shortage;
mod slow;
mod sources;
mod state;
mod storms;
