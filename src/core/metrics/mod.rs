//! Counting and recording, knowing nothing of sessions.
//!
//! Called by the workers (write), the admin API (read) and `daemon`. Every counter
//! has one writing thread; readers sum over the shards. Nothing here decides
//! anything.

pub mod counters;
pub mod histograms;
pub mod progress;
