//! How the log is written: its text format, and a queue that never makes a writer wait.
//!
//! Used by the balancer and its supervisor. What is logged, and how much of it, is theirs
//! to say.

pub mod log_queue;
pub mod logfmt;
