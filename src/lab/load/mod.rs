//! The load generator and the servers that answer it, for `tidegate bench` and
//! `tidegate backend`.
//!
//! Called by `cli`. Each thread runs one epoll loop over its own sockets, without an
//! allocation per message, so that one core of it is faster than what it measures. It
//! knows nothing about the balancer: it handles bytes and counts only.

mod dial;
mod exchange;
mod open_loop;
mod plan;
mod report;
mod serve;
mod stream;
mod thread;
mod threads;

pub use crate::load::report::{LoadErrorKind, LoadReport};
pub use crate::load::threads::{LoadProgress, LoadThreads};
pub use plan::{CONNECTIONS_MAX, CloseMode, LoadMode, LoadPlan, SIZE_MAX};
pub use serve::{Behaviour, ServeReport, Service, serve};

use std::io;
use std::sync::mpsc;

/// The index of a window, from 0, and what one thread measured in it.
pub type ReportWindow = (u64, LoadReport);

/// Starts the load of `plan` on new threads. If the plan has windows, each thread sends
/// each of its windows to `windows`, in order, until the receiver is dropped.
///
/// # Errors
/// A thread cannot be started. Later errors of a thread are returned by
/// [`LoadThreads::join`].
pub fn start(
    plan: LoadPlan,
    windows: mpsc::Sender<ReportWindow>,
) -> io::Result<LoadThreads<LoadReport>> {
    let threads = plan.threads;
    let cpus = plan.cpus.clone();
    LoadThreads::start("load", threads, &cpus, move |handle| {
        crate::load::thread::run(&plan, &handle, &windows)
    })
}
