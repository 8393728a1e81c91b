//! Requests to a running balancer: finding it, one request, its answer.
//!
//! Called by the command line and the lab. It starts and changes no balancer.

pub mod command;
pub mod http;
pub mod reach;
