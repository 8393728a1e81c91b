//! Writing of the log: its text format, and a queue that never blocks.
//!
//! Used by the balancer and its supervisor. It never decides what to log.

pub mod log_queue;
pub mod logfmt;
