//! `tidegate run`: runs the balancer in the foreground.
//!
//! Called by the command line. It collects what the process was started with (sockets of
//! an old process or a service manager), starts the role below, waits for its end and
//! returns the exit code.
//!
//! - Supervisor: the default. It can continue a supervisor that executed this program.
//! - Supervised process: started by a supervisor.
//! - Process without a supervisor: `--single`.
//! - Probe helper: `--probe-helper`, started by a process that serves.
//! - Check: `--supervisor-check`, before a supervisor executes this program.

use super::RunArgs;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use tidegate_client::command::Exit;
use tidegate_daemon::probe_helper::HelperRole;
use tidegate_daemon::{
    self as daemon, Before, Failure, Notifier, OldProcess, Options, PassedSockets,
    ProcessEnvironment, Supervised,
};
use tidegate_logging::logfmt::one_line;
use tidegate_net::fd_channel;
use tidegate_supervisor::program::Program;
use tidegate_supervisor::{self as supervisor, Link};

/// Runs the balancer until it exits.
pub fn main(args: RunArgs) -> Exit {
    if let Some(version) = args.supervisor_check {
        return check(version);
    }
    if let Some(role) = args.probe_helper.as_deref() {
        return probe_helper(role, args.config.path());
    }
    // Before any other descriptor is opened.
    if let Some(ended) = supervisor::resume() {
        return supervisor_exit(ended.map_err(|error| error.to_string()));
    }
    match Link::from_environment() {
        Ok(Some((link, given))) => {
            let supervised = Supervised::new(Arc::clone(&link), given, args.config.path());
            serve(&args, || supervised_environment(&args, &link, supervised))
        }
        // A new process of an upgrade without a supervisor has no supervisor either.
        Ok(None) if args.single || std::env::var_os(fd_channel::MARK).is_some() => {
            serve(&args, || single_environment(&args))
        }
        Ok(None) => supervise(&args),
        Err(error) => {
            eprintln!("tidegate: cannot read the message of the supervisor: {error}");
            Exit::Failed
        }
    }
}

fn probe_helper(role: &str, config: &Path) -> Exit {
    let unknown = || io::Error::other(format!("unknown role {role}"));
    let role = HelperRole::named(role).ok_or_else(unknown);
    match role.and_then(|role| daemon::probe_helper::run_helper(role, config)) {
        Ok(()) => Exit::Fine,
        Err(error) => {
            eprintln!("tidegate: probe helper: {error}");
            Exit::Failed
        }
    }
}

fn supervise(args: &RunArgs) -> Exit {
    let run = || -> Result<u8, Failure> {
        let activated = daemon::passed()?.into_iter();
        let kept = activated.map(|(name, fd)| (daemon::activated_name(&name), fd)).collect();
        let failed = |error: io::Error| Failure::Runtime(error.to_string());
        let program = Program::of_this_process(child_arguments(args)).map_err(failed)?;
        supervisor::run(program, args.pid_file.clone(), kept).map_err(failed)
    };
    supervisor_exit(run().map_err(|failure| failure.to_string()))
}

fn supervisor_exit(ended: Result<u8, String>) -> Exit {
    match ended {
        Ok(code) => Exit::of(code),
        Err(failure) => {
            eprintln!("tidegate: cannot run the supervisor: {failure}");
            Exit::Failed
        }
    }
}

fn check(version: u32) -> Exit {
    match supervisor::check(version) {
        Ok(()) => Exit::Fine,
        Err(why) => {
            eprintln!("tidegate: {}", one_line(&why));
            Exit::Refused
        }
    }
}

fn serve(
    args: &RunArgs,
    environment: impl FnOnce() -> Result<ProcessEnvironment, Failure>,
) -> Exit {
    let running = environment().and_then(|environment| {
        let options =
            Options { config: args.config.path().to_owned(), signals: true, logging: true };
        daemon::start_within(options, environment)
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
        daemon::RunEnd::Drained { .. } => Exit::Fine,
        daemon::RunEnd::SecondSignal
        | daemon::RunEnd::ThreadExited
        | daemon::RunEnd::ControlPanicked => Exit::Failed,
    }
}

fn supervised_environment(
    args: &RunArgs,
    link: &Arc<Link>,
    supervised: Supervised,
) -> Result<ProcessEnvironment, Failure> {
    let old_process = OldProcess::connect()?;
    let notifier = Notifier::to_supervisor(Arc::clone(link));
    let place = old_process.as_ref().and_then(OldProcess::admin_listen);
    // Before there are threads. The supervisor started this process, so it has not inherited
    // the sandbox of the old process.
    let upgrade = old_process.is_some() || supervised.takes_over();
    let instead = supervised.instead();
    let before = Before { inherited: &[], admin: place, helper: None, upgrade, instead };
    let confined = daemon::confine(args.config.path(), None, before)?;
    Ok(ProcessEnvironment {
        old_process,
        supervised,
        notifier,
        confined,
        ..ProcessEnvironment::default()
    })
}

fn single_environment(args: &RunArgs) -> Result<ProcessEnvironment, Failure> {
    let passed = daemon::passed()?;
    let activated = (!passed.is_empty()).then(|| PassedSockets::of(passed)).transpose()?;
    let mut old_process = OldProcess::connect()?;
    let helper = old_process.as_mut().and_then(OldProcess::take_helper);
    let program = Program::of_this_process(single_arguments(args))
        .inspect_err(|error| eprintln!("tidegate: upgrades in place are not available: {error}"))
        .ok();
    let notifier = Notifier::from_environment();
    let pid_file = args.pid_file.clone();
    let before = Before {
        inherited: old_process.as_ref().map_or(&[][..], OldProcess::confined),
        admin: old_process.as_ref().and_then(OldProcess::admin_listen),
        helper,
        upgrade: old_process.is_some(),
        instead: None,
    };
    // Before there are threads and before any other descriptor is opened.
    let confined = daemon::confine(args.config.path(), pid_file.as_deref(), before)?;
    let supervised = Supervised::default();
    Ok(ProcessEnvironment {
        old_process,
        activated,
        supervised,
        program,
        notifier,
        pid_file,
        confined,
    })
}

/// Returns the arguments for a new process without a supervisor.
fn single_arguments(args: &RunArgs) -> Vec<OsString> {
    let mut arguments = child_arguments(args);
    arguments.push("--single".into());
    if let Some(pid_file) = &args.pid_file {
        arguments.extend(["--pid-file".into(), pid_file.into()]);
    }
    arguments
}

/// Returns the arguments for a supervised process.
fn child_arguments(args: &RunArgs) -> Vec<OsString> {
    vec!["run".into(), "--config".into(), args.config.path().into()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command};
    use clap::Parser;

    #[test]
    fn new_process_gets_the_same_arguments() {
        for line in ["run -c a --single", "run --single a --pid-file b"] {
            let parse = |arguments: Vec<OsString>| {
                let all = std::iter::once("tidegate".into()).chain(arguments);
                match Cli::try_parse_from(all).unwrap().command {
                    Command::Run(args) => args,
                    _ => panic!("another command"),
                }
            };
            let first = parse(line.split(' ').map(OsString::from).collect());
            let next = parse(single_arguments(&first));
            assert_eq!(
                (first.config.path(), &first.pid_file, first.single),
                (next.config.path(), &next.pid_file, next.single)
            );
        }
    }
}
