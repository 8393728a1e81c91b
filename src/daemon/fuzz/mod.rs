//! Entry points of the fuzz targets in `tests/fuzz`. Each passes arbitrary bytes to a
//! parser and panics if the parser violates a guarantee.
//!
//! Built only for tests and for the fuzzer. The mutation tests call the same functions, so
//! they also run on a machine without the fuzzer.

pub mod config;
pub mod heartbeat;
pub mod probe;
pub mod views;

pub use super::admin::fuzz as admin;
pub use super::upgrade::fuzz as handshake;

#[cfg(test)]
mod tests;
