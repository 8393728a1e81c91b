//! Watching a descriptor of ours on the worker's runtime.
//!
//! Used by the listener and the engine for readiness only: no operation is ever
//! in flight here, so a dropped wait loses nothing.

#![allow(unsafe_code)]

use super::epoll::Epoll;
use super::ring::RingWaker;
use socket2::Socket;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An owner that keeps one descriptor open, and the same, for its whole life.
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

/// Registers `owner` with the current runtime, to be woken when it becomes
/// readable (edge-triggered).
pub fn watch_readable<T: StableFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `Steady` is sealed to types that own their descriptor, never
    // replace it, and close it only when dropped; the `AsyncFd` owns `owner`
    // (for the `Arc` and for `RingWaker`, a share of it), so it stays open as long as it does.
    let watched = unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) };
    watched.map_err(Into::into)
}
