//! `tidegate run`: the balancer in the foreground.
//!
//! Called by `cli`. It starts `app`, waits for its end and turns that into an
//! exit code.

use super::{Exit, RunArgs};
use crate::app::{self, Failure, Options};
use std::io::IsTerminal;

/// Runs the balancer until it is told to stop.
pub fn main(args: RunArgs) -> Exit {
    let options = Options { config: args.config, signals: true, logging: true };
    let running = match app::start(options) {
        Ok(running) => running,
        Err(Failure::Config(problems)) => {
            eprintln!("{}", problems.render(std::io::stderr().is_terminal()));
            return Exit::Refused;
        }
        Err(failure @ Failure::Runtime(_)) => {
            eprintln!("tidegate: {failure}");
            return Exit::Failed;
        }
    };
    match running.wait() {
        app::Exit::Drained { .. } => Exit::Fine,
        app::Exit::Forced | app::Exit::WorkerDied => Exit::Failed,
    }
}
