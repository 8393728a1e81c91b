//! Heartbeats over real sockets: senders, the receiver, the sidecar and the Python example.
//!
//! Everything runs on loopback. Unit tests check the format and the verification of a
//! datagram. These tests check that heartbeats arrive.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]
#![allow(unreachable_pub)]

mod flood;
mod receiver;
mod sender;
mod setup;
mod sidecar;
#[allow(dead_code)]
#[path = "../common/wait.rs"]
mod wait;
