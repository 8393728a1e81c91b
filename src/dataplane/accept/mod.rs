//! From the listening socket to an admitted connection.
//!
//! Called by the worker. It never reads a byte of a client.
//!
//! - `listener` accepts.
//! - [`permit`] checks caps and client sources.
//! - [`wait_queue`] holds listeners and clients that wait for a slot.

pub(crate) mod listener;
pub mod permit;
pub mod wait_queue;
