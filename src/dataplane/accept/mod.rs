//! From the listening socket to an admitted connection: listeners, caps, wait queues.
//!
//! Called by the worker. Nothing here reads a byte of a client.

pub(crate) mod listener;
pub mod permit;
pub mod wait_queue;
