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

pub use crate::load::report::{Kind, Report};
pub use crate::load::threads::{Crew, Gauge};
pub use plan::{CONNECTIONS_MAX, Close, Mode, Plan, SIZE_MAX};
pub use serve::{Behaviour, Served, Service, serve};

use std::io;
use std::sync::mpsc;

/// What one thread measured in a window, and which window of the measured time
/// that was, from 0 on.
pub type Window = (u64, Report);

/// Starts the load that `plan` describes, on threads of its own. Where it has
/// windows, each thread sends every one of its own to `windows`, in order, until
/// nobody receives them any more.
///
/// # Errors
/// A thread cannot be had. What a thread cannot do once it runs comes out of
/// [`Crew::join`].
pub fn start(plan: Plan, windows: mpsc::Sender<Window>) -> io::Result<Crew<Report>> {
    let threads = plan.threads;
    let cpus = plan.cpus.clone();
    Crew::start("load", threads, &cpus, move |place| {
        crate::load::thread::run(&plan, &place, &windows)
    })
}
