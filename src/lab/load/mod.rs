//! Load and the servers that answer it: what `tidegate bench` and `tidegate
//! backend` run.
//!
//! Called by `cli`. Each thread is one epoll loop over its own sockets, with
//! no allocation for a message, so that a core of it outruns what it measures.
//! It knows nothing of the balancer and never uses it: frames and counts only.

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

/// What one thread measured in a window, and which window of the measured time
/// that was, from 0 on.
pub type ReportWindow = (u64, LoadReport);

/// Starts the load that `plan` describes, on threads of its own. Where it has
/// windows, each thread sends every one of its own to `windows`, in order, until
/// nobody receives them any more.
///
/// # Errors
/// A thread cannot be had. What a thread cannot do once it runs comes out of
/// [`LoadThreads::join`].
pub fn start(
    plan: LoadPlan,
    windows: mpsc::Sender<ReportWindow>,
) -> io::Result<LoadThreads<LoadReport>> {
    let threads = plan.threads;
    let cpus = plan.cpus.clone();
    LoadThreads::start("load", threads, &cpus, move |place| {
        crate::load::thread::run(&plan, &place, &windows)
    })
}
