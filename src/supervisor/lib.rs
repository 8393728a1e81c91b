//! The supervisor: the parent process of `tidegate run`. It holds a copy of every
//! listening socket, starts the serving process, passes signals on to it, reaps children,
//! and starts a new serving process if it crashes.
//!
//! `cli::run` calls [`run`]. Children communicate with the supervisor through a [`Link`].
//! The supervisor has one thread. It never opens a network socket, never reads the
//! configuration or the stores of its children, and accepts only a fixed set of messages.
//!
//! - `parent`: the loop.
//! - `children`: the state of each child and its start.
//! - `program`: which program to start.
//! - `message`, `link`: the messages, and the side of the children.
//! - `manager`, `pid_file`, `log`: service manager, PID file, log.
//! - `store`: the state that survives a crash.
//! - `reexec`, `state`: how the supervisor changes to the binary of an upgrade.
//!
//! # Roles of children
//!
//! - *Main*: gets the signals. The supervisor passes its notices on to the service
//!   manager.
//! - *Successor*: the new process of an upgrade, requested by the main process. It becomes
//!   main when the old process reports that it serves.
//! - *Stepping down*: the old process, for a second. If the new process ends within that
//!   time, the old process resumes the service.
//! - *Leaving*: the old process after that second. It drains.
//!
//! A panicked worker is restarted in its process (`dataplane::worker::supervisor`), which
//! keeps the sessions of the other workers.
//!
//! # Rights of the supervisor
//!
//! The supervisor keeps all its rights, and each child drops its own. So an upgrade can
//! go to a release that needs another system call or capability. All code that handles
//! untrusted input runs in children. A child can request only these actions:
//!
//! - to hold sockets;
//! - to start the program that the supervisor was started from;
//! - to start another program, if root or the user of the supervisor requested it over
//!   the admin socket. The supervisor checks that connection itself.
//!
//! The last check stops a child that runs as another user (`[process] user`). It cannot
//! stop a child of the same user, which can evade it with a process that it forks.

mod children;
pub mod link;
mod log;
pub mod manager;
mod message;
mod parent;
pub mod pid_file;
pub mod program;
mod reexec;
mod state;
mod store;

pub use link::{Link, SupervisorEvent, SupervisorState};
pub use message::SuccessorChanges;
pub use parent::run;
pub use reexec::{check, resume};
pub use store::Store;
