//! Receiving heartbeats: the sockets and their thread, and which datagrams are believed.
//!
//! Called by the control loop. Nothing here decides which backend takes traffic.

pub mod receive;
pub mod verify;
