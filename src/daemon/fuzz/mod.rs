//! Any bytes into every parser: the entry points of the fuzz targets in
//! `tests/fuzz`, each of which panics where its parser breaks its word.
//!
//! Built for tests and for the fuzzer alone. Called by the targets, and by the
//! mutation test below, so that a machine without the fuzzer tries them, too.

pub mod config;
pub mod heartbeat;

pub use super::admin::fuzz as admin;
pub use super::upgrade::fuzz as handshake;

#[cfg(test)]
mod tests;
