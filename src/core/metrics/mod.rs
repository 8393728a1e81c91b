//! Counters and recorders that know nothing about sessions.
//!
//! Workers write them; the admin API and `daemon` read them. Every counter has one
//! writing thread, and readers sum over the shards. Nothing here decides anything.

pub mod counters;
pub mod histograms;
pub mod progress;
