//! Registration of a descriptor with the runtime of a worker.
//!
//! Used by the listener and the engines. It waits only for readiness and never starts an
//! operation, so dropping a wait loses nothing.

#![allow(unsafe_code)]

use super::epoll::Epoll;
use super::ring::RingWaker;
use socket2::Socket;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A type that owns one descriptor and keeps the same descriptor open for its lifetime.
pub trait StableFd: AsRawFd + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

impl sealed::Sealed for Epoll {}
impl StableFd for Epoll {}
impl sealed::Sealed for RingWaker {}
impl StableFd for RingWaker {}
impl sealed::Sealed for Arc<Socket> {}
impl StableFd for Arc<Socket> {}

/// Registers `owner` with the current runtime, which wakes waiting tasks when the
/// descriptor becomes readable (edge-triggered).
pub fn watch_readable<T: StableFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `StableFd` is sealed to types that own their descriptor, never replace it,
    // and close it only on drop. The `AsyncFd` owns `owner` (for `Arc` and `RingWaker`, a
    // share of it), so the descriptor stays open as long as the `AsyncFd` exists.
    let watched = unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) };
    watched.map_err(Into::into)
}
