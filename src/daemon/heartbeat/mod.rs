//! Receives and verifies heartbeats.
//!
//! Used by the control loop through `heartbeats`. It makes no decision about backends.

pub mod receive;
pub mod verify;
