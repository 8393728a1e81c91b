//! Load, measurement and demonstration: the load generator, the ledger of streams, and the
//! commands `bench`, `backend`, `streams`, `selftest` and `demo`.
//!
//! Called by the command line and the tests. The balancer itself uses none of it.

pub mod cli;
pub mod ledger;
pub mod load;
