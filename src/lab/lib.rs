//! Load, measurement and demonstration: the load generator, the stream ledger, and the
//! commands `bench`, `backend`, `streams`, `selftest` and `demo`.
//!
//! Called by the command line and by tests. The balancer itself does not use it.

pub mod cli;
pub mod ledger;
pub mod load;
