//! The integration tests: a real Tidegate process between real and scripted peers, on both
//! engines.
//!
//! One binary, so that it links once, with one module per topic. Run it with
//! `scripts/test`. It uses only files, signals, the command line, the admin API, sockets
//! and `/proc`, and never looks inside the program.

// The program must not sleep or read the clock directly. Tests can.
#![allow(clippy::disallowed_methods)]
// A failed unwrap fails the test.
#![allow(clippy::unwrap_used)]
// Helpers are public to the suite. No other crate links it.
#![allow(unreachable_pub)]

// A helper can be unused. A test that no macro lists is an error.
#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;

mod accounting;
mod agents;
mod balance;
mod binds;
mod cli;
mod client_first;
mod confinement;
mod dashboard;
mod databases;
mod discovery;
mod drain;
mod engine;
mod events;
mod exec_probes;
mod explain;
mod failover;
mod harness;
mod heartbeats;
mod heartbeats_flood;
mod heartbeats_rejected;
mod history;
mod hostile;
mod idle;
mod includes;
mod limits;
mod logs;
mod on_down;
mod ordinary_user;
mod panics;
mod passive;
mod probes;
mod proxy_protocol;
mod rates;
mod rebalance;
mod registers;
mod relay;
mod reload;
mod rewrites;
mod routes;
mod scrapes;
mod session_age;
mod sessions;
mod settling;
mod shells;
mod shortage;
mod slow;
mod sources;
mod state;
mod storms;
mod stream;
mod syslog;
mod tiers;
mod twins;
mod unix_binds;
mod waiting;
mod why;
mod why_ledger;
