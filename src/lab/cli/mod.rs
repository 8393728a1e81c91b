//! The commands of the lab, one file each: arguments in, exit code out.
//!
//! Called by `cli`. They talk to a balancer as any client does.

pub mod backend;
pub mod bench;
pub mod demo;
pub mod selftest;
pub mod streams;
pub(crate) mod threads;
