//! The supervisor: the small parent that `tidegate run` is. It holds a copy of every
//! listening socket, starts the process that serves, passes signals on to it, reaps, and
//! starts another at once when it crashes.
//!
//! `cli::run` calls [`run`]; the processes it starts talk to it through a [`Link`]. The
//! parent opens no network socket, reads no configuration and none of what its children
//! leave with it, and has one thread; the messages it takes are a fixed set
//! (`message`). The files: `parent` (its loop), `children` (what it knows of each and how
//! it starts them), `program` (which program that is), `manager` (telling a service
//! manager), `pid_file`, `log`, `store` (what survives a crash), `reexec` and `state` (how
//! it comes to run the program of an upgrade), `link` (the children's side).
//!
//! # Who is what
//!
//! One child is the *main* one: signals go to it, and what it says of itself is passed
//! on to the service manager. An upgrade starts a *successor* at the word of the main
//! one; it becomes the main one when the old one says that it serves. The old one is
//! *stepping down* for a second, in which it goes on if the new one ends, and then
//! *leaving*: it drains.
//!
//! A worker that falls is still replaced inside its process (`dataplane::worker::supervisor`): that keeps
//! the sessions of the other workers, which another process has none of.
//!
//! # Why this process has all rights
//!
//! It gives up none, so that each process it starts gives up its own: a release that
//! needs one more system call or capability can be upgraded to. What could be attacked
//! runs in its children, which can ask it for few things: to keep sockets, to start the
//! program it was itself started from, and to start another one only when root or this
//! process's own user has asked for that over the admin socket, which it looks at itself.
//! That last check separates a child that has become another user (`[process] user`). It
//! cannot separate a child of the same user, which passes it by a process of its own.

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

pub use link::{Link, News, SupervisorState};
pub use message::Wish;
pub use parent::run;
pub use reexec::{check, resume};
pub use store::Store;
