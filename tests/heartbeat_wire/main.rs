//! Heartbeats over real sockets: senders, the receiver, the sidecar and a
//! sender that is not ours.
//!
//! Everything runs on loopback. What a datagram must look like and which are
//! believed is tested beside the code; here it is whether they arrive.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]
#![allow(unreachable_pub)]

mod flood;
mod place;
mod receiver;
mod sender;
mod sidecar;
#[allow(dead_code)]
#[path = "../common/wait.rs"]
mod wait;
