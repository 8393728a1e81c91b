//! The probe helper: a process outside of the sandbox that runs the commands of `exec` probes.
//!
//! `sandbox` starts it before it gives up its rights, because the sandbox allows no command. The
//! balancer and the helper share a Unix socket that keeps message boundaries. Each request carries
//! a pipe for its reply, so that the old and the new process of an upgrade without a supervisor
//! can use the same helper.
//!
//! - A closed pipe cancels its request: the helper kills the command.
//! - The helper reads the configuration file itself, and runs only commands that the file has
//!   ([`named_commands`]). A balancer that an attacker controls can choose the time, the pool and
//!   the values of placeholders, and nothing else.
//! - It ends when no process has the other end of the socket.
//!
//! | process | what it does |
//! |---|---|
//! | keeper | starts the runner, and starts another one if it ends with an error |
//! | runner | starts, kills and reaps commands |
//!
//! | file | part |
//! |---|---|
//! | `message` | the messages |
//! | `link` | the balancer's end |
//! | `process` | start of both processes, and the keeper |
//! | `runner`, `running` | the runner and one running command |
//! | `named_commands` | the commands of the configuration file |

mod link;
mod message;
mod named_commands;
mod process;
mod runner;
mod running;
#[cfg(test)]
mod tests;

pub(crate) use link::{CommandResult, ProbeHelper};
pub(crate) use process::HelperSocket;
pub use process::{HelperRole, run_helper};

use std::time::Duration;

/// Commands that run at the same time; more wait. Each is a process, so a pool of hanging
/// backends must not fill the process table of the host.
pub const COMMANDS_RUNNING_MAX: usize = 64;

/// Longest wait for one of them. A longer wait is a local error.
pub(crate) const COMMAND_WAIT_MAX: Duration = Duration::from_secs(3);
