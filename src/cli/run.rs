//! `tidegate run`: the balancer in the foreground.
//!
//! Called by `cli`. It takes what the process was started with (sockets of a
//! process before or of a service manager), starts `app`, waits for its end and
//! turns that into an exit code.

use super::{Exit, RunArgs};
use crate::app::{self, Activated, Failure, Notifier, Options, Predecessor, Program, Surroundings};
use crate::telemetry::logfmt::one_line;
use std::ffi::OsString;
use std::io::IsTerminal;

/// Runs the balancer until it is told to stop.
pub fn main(args: RunArgs) -> Exit {
    let running = surroundings(&args).and_then(|surroundings| {
        let options = Options { config: args.config, signals: true, logging: true };
        app::start_within(options, surroundings)
    });
    let running = match running {
        Ok(running) => running,
        Err(Failure::Config(problems)) => {
            eprintln!("{}", problems.render(std::io::stderr().is_terminal()));
            return Exit::Refused;
        }
        Err(Failure::At(problem)) => {
            eprintln!("{}", problem.render(std::io::stderr().is_terminal()));
            return Exit::Failed;
        }
        Err(failure @ Failure::Runtime(_)) => {
            eprintln!("tidegate: {}", one_line(&failure.to_string()));
            return Exit::Failed;
        }
    };
    match running.wait() {
        app::Exit::Drained { .. } => Exit::Fine,
        app::Exit::Forced | app::Exit::WorkerDied | app::Exit::ControlDied => Exit::Failed,
    }
}

fn surroundings(args: &RunArgs) -> Result<Surroundings, Failure> {
    // Before anything opens a descriptor.
    let activated = Activated::take()?;
    let predecessor = Predecessor::greet()?;
    let program = Program::of_this_process(arguments(args))
        .inspect_err(|error| eprintln!("tidegate: upgrades in place are off: {error}"))
        .ok();
    let notifier = Notifier::from_environment();
    let pid_file = args.pid_file.clone();
    // Before there are threads, and before anything else is opened.
    let confined = app::confine(&args.config, pid_file.as_deref(), predecessor.as_ref())?;
    Ok(Surroundings { predecessor, activated, program, notifier, pid_file, confined })
}

/// What has another process do what this one was asked to.
fn arguments(args: &RunArgs) -> Vec<OsString> {
    let RunArgs { config, pid_file } = args;
    let mut words = vec!["run".into(), "--config".into(), config.into()];
    if let Some(pid_file) = pid_file {
        words.extend(["--pid-file".into(), pid_file.into()]);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn the_next_process_is_asked_for_the_same() {
        for line in ["run -c a", "run --config=a --pid-file b"] {
            let parse = |words: Vec<OsString>| {
                let all = std::iter::once("tidegate".into()).chain(words);
                match Cli::try_parse_from(all).unwrap().command {
                    Command::Run(args) => args,
                    _ => panic!("another command"),
                }
            };
            let first = parse(line.split(' ').map(OsString::from).collect());
            let next = parse(arguments(&first));
            assert_eq!((first.config, first.pid_file), (next.config, next.pid_file));
        }
    }
}
