//! Writing of the log: its text format, a queue that never blocks, and syslog.
//!
//! Used by the balancer and its supervisor. It never decides what to log.

pub mod log_queue;
pub mod logfmt;
pub mod syslog;
