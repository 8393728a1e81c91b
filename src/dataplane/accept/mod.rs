//! From the listening socket to a picked backend: listeners, caps, queues.
//!
//! Called by the worker. Nothing here reads a byte of a client.

pub mod admission;
pub mod gate;
pub(crate) mod listener;
pub(crate) mod queue;
pub(crate) mod slots;
