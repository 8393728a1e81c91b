//! Member sources: they ask files, HTTP servers, DNS and registries for the members of
//! pools.
//!
//! `daemon` starts one thread for all sources and tells it the questions of the
//! configuration. The sources run on that thread, so an answer of many megabytes delays no
//! decision about a backend. Each answer goes into a newest-only [`slot`](tell), from which
//! the control loop takes it. A source decides nothing: the views of `core::discovery` do.

pub mod backoff;
pub mod client;
pub mod consul;
pub mod dispatch;
pub mod dns;
pub mod etcd;
pub mod file;
pub mod http;
pub mod kubernetes;
pub mod lines;
pub mod listing;
#[cfg(test)]
mod mutated_inputs;
pub mod parse;
pub mod register;
pub mod resolver;
pub mod secret;
pub mod tell;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod thread;
pub mod zookeeper;
