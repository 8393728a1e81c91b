//! The command line: parses the arguments and calls the function of the subcommand.
//!
//! Called by the binary, which exits with the code that [`main`] returns. Each subcommand
//! has its own file and returns an [`Exit`].

pub mod check;
pub mod completions;
pub mod drain;
pub mod events;
pub mod explain;
pub mod heartbeat;
pub mod import;
pub mod man;
pub mod ready;
pub mod rebalance;
pub mod register;
pub mod reload;
mod resolve;
pub mod run;
pub mod schema;
pub mod sessions;
pub mod shutdown;
mod sources;
pub mod status;
mod table;
#[cfg(test)]
mod testing;
pub mod ui;
pub mod upgrade;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tidegate_client::command::Exit;
use tidegate_client::http::ClientArgs;
use tidegate_lab::cli::demo::DemoArgs;
use tidegate_net::signals;

/// Tidegate: a TCP load balancer.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, arg_required_else_help = true, after_help = HELP)]
#[command(max_term_width = 80)]
pub struct Cli {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

const HELP: &str = "\
Example:
  tidegate check --config /etc/tidegate/tidegate.toml
  tidegate run --config /etc/tidegate/tidegate.toml

Exit codes: 0 success; 1 rejected configuration or request; 2 usage error;
3 runtime failure (address in use, admin API unreachable).";

/// All subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the balancer in the foreground.
    ///
    /// SIGTERM or SIGINT drains and exits. If leave_delay is set, the drain starts
    /// after it, or at a second signal. A signal during the drain exits at once.
    /// SIGHUP reloads the configuration. SIGUSR2 upgrades the binary in place.
    #[command(
        alias = "start",
        override_usage = "tidegate run [OPTIONS] <FILE>",
        after_help = "Example:\n  tidegate run --config /etc/tidegate/tidegate.toml"
    )]
    Run(RunArgs),
    /// Validate a configuration file.
    #[command(
        override_usage = "tidegate check <FILE>",
        after_help = "Example:\n  tidegate check /etc/tidegate/tidegate.toml"
    )]
    Check(CheckArgs),
    /// Print the JSON Schema of a configuration file, for editors.
    #[command(after_help = schema::HELP)]
    Schema,
    /// Print a script for completion in a shell.
    #[command(after_help = completions::HELP)]
    Completions(completions::CompletionsArgs),
    /// Write manual pages.
    #[command(after_help = man::HELP)]
    Man(man::ManArgs),
    /// Translate a configuration of another balancer.
    #[command(after_help = import::HELP)]
    Import(import::ImportArgs),
    /// Demonstrate failover, reload and upgrade with built-in backends.
    #[command(after_help = "Example:\n  tidegate demo --backends 4 --play 5m")]
    Demo(DemoArgs),
    /// Check whether the running balancer accepts new clients.
    #[command(after_help = ready::HELP)]
    Ready(ClientArgs),
    /// Reload the configuration of the running balancer.
    #[command(after_help = "Example:\n  tidegate reload --admin unix:/run/tidegate/admin.sock")]
    Reload(ClientArgs),
    /// Replace the running balancer with a new process, losing no connection.
    #[command(after_help = upgrade::HELP)]
    Upgrade(upgrade::UpgradeArgs),
    /// Show frontends, pools and backends of the running balancer.
    #[command(after_help = "Example:\n  tidegate status\n  tidegate status --json | jq .pools")]
    Status(ClientArgs),
    /// List open sessions.
    #[command(after_help = sessions::HELP)]
    Sessions(Box<sessions::SessionsArgs>),
    /// Close idle sessions of backends above their share, until the pool is even.
    #[command(after_help = rebalance::HELP)]
    Rebalance(Box<rebalance::RebalanceArgs>),
    /// Show what has happened: state changes, reloads, orders, upgrades.
    #[command(after_help = events::HELP)]
    Events(events::EventsArgs),
    /// Open the operator page in a browser on this host.
    #[command(after_help = ui::HELP)]
    Ui(ui::UiArgs),
    /// Explain the state of a backend, the picks of a session, or a future pick.
    #[command(after_help = explain::HELP)]
    Explain(explain::ExplainArgs),
    /// Stop new sessions on a backend; its open sessions continue.
    #[command(after_help = drain::HELP)]
    Drain(drain::DrainOrder),
    /// Allow new sessions on a drained backend.
    #[command(after_help = "Example:\n  tidegate undrain web/10.0.0.11:8080")]
    Undrain(DrainArgs),
    /// Drain the running balancer and stop it, as SIGTERM does.
    #[command(
        alias = "stop",
        after_help = "Example:\n  tidegate shutdown --admin 127.0.0.1:9900 --token-file token"
    )]
    Shutdown(ClientArgs),
    /// Test that reloads, upgrades and failing backends lose nothing.
    #[command(after_help = tidegate_lab::cli::selftest::HELP)]
    Selftest(tidegate_lab::cli::selftest::SelftestArgs),
    /// Send heartbeats for a local service.
    #[command(after_help = heartbeat::HELP)]
    Heartbeat(heartbeat::HeartbeatArgs),
    /// Keep a local service registered in a registry.
    #[command(after_help = register::HELP)]
    Register(Box<register::RegisterArgs>),
    /// Generate load on a TCP service and report rates and latency.
    #[command(after_help = tidegate_lab::cli::bench::HELP)]
    Bench(tidegate_lab::cli::bench::BenchArgs),
    /// Send verifiable streams through a balancer to built-in backends.
    #[command(after_help = tidegate_lab::cli::streams::HELP)]
    Streams(tidegate_lab::cli::streams::StreamsArgs),
    /// Run test servers that behave well or badly.
    #[command(after_help = tidegate_lab::cli::backend::HELP)]
    Backend(tidegate_lab::cli::backend::BackendArgs),
}

/// `tidegate run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The configuration.
    #[command(flatten)]
    pub config: ConfigFile,
    /// Write the ID of the process to signal to this file.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Serve in this process, without a supervisor.
    #[arg(long)]
    pub single: bool,
    /// Check whether this program can take over a supervisor's state of this version, given
    /// on standard input. A supervisor calls it before it executes this program.
    #[arg(long, value_name = "VERSION", hide = true)]
    pub supervisor_check: Option<u32>,
    /// Run commands of probes for a process that serves, in this role. That process starts it.
    #[arg(long, value_name = "ROLE", hide = true)]
    pub probe_helper: Option<String>,
}

/// `tidegate check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The configuration.
    #[command(flatten)]
    pub config: ConfigFile,
    /// Also ask every member source once and print what it announces.
    #[arg(long)]
    pub resolve: bool,
}

/// The file of `run` and `check`, with or without `--config`.
#[derive(Debug, Args)]
pub struct ConfigFile {
    /// Configuration file (TOML).
    #[arg(value_name = "FILE", required_unless_present = "config", conflicts_with = "config")]
    file: Option<PathBuf>,
    /// Configuration file (TOML); same as FILE.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// `tidegate undrain` and `tidegate explain`; part of `tidegate drain`
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Pool and backend, separated by the first slash.
    #[arg(value_name = "POOL/BACKEND", value_parser = drain::target, add = completions::backends())]
    pub target: drain::BackendRef,
    /// How to reach the balancer.
    #[command(flatten)]
    pub client: ClientArgs,
}

// === impl ConfigFile ===

impl ConfigFile {
    /// Returns the path. clap requires exactly one of the two.
    pub fn path(&self) -> &Path {
        self.file.as_deref().or(self.config.as_deref()).unwrap_or(Path::new(""))
    }
}

/// Parses the arguments of this process and runs the subcommand.
pub fn main() -> ExitCode {
    // Signals are blocked first, so that none ends the process before `run` handles them.
    let before = signals::block();
    completions::answer();
    let cli = match parse(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(error) => {
            // If standard error is closed, the message is lost.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Fine }.into();
        }
    };
    if !matches!(cli.command, Command::Run(_)) {
        before.restore();
    }
    dispatch(cli.command).into()
}

/// Parses a command line. An error about the value of `--wait` gets a tip, because the value
/// needs an equals sign: `drain --wait POOL/BACKEND` has none.
fn parse(arguments: Vec<OsString>) -> Result<Cli, clap::Error> {
    let waits = arguments.iter().any(|argument| argument == "--wait");
    Cli::try_parse_from(arguments).map_err(|mut error| {
        let rejected = [ErrorKind::UnknownArgument, ErrorKind::ValueValidation];
        if waits && rejected.contains(&error.kind()) {
            let tip = "write the time after an equals sign: '--wait=TIME'".into();
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
        }
        error
    })
}

fn dispatch(command: Command) -> Exit {
    match command {
        Command::Run(args) => run::main(args),
        Command::Check(args) => check::main(&args),
        Command::Schema => schema::main(),
        Command::Completions(args) => completions::main(&args),
        Command::Man(args) => man::main(&args),
        Command::Import(args) => import::main(&args),
        Command::Demo(args) => tidegate_lab::cli::demo::main(args),
        Command::Ready(args) => ready::main(&args),
        Command::Reload(args) => reload::main(&args),
        Command::Upgrade(args) => upgrade::main(&args),
        Command::Status(args) => status::main(&args),
        Command::Sessions(args) => sessions::main(&args),
        Command::Rebalance(args) => rebalance::main(&args),
        Command::Events(args) => events::main(&args),
        Command::Ui(args) => ui::main(&args),
        Command::Explain(args) => explain::main(&args),
        Command::Drain(args) => drain::drain(&args),
        Command::Undrain(args) => drain::undrain(&args),
        Command::Shutdown(args) => shutdown::main(&args),
        Command::Selftest(args) => tidegate_lab::cli::selftest::main(&args),
        Command::Heartbeat(args) => heartbeat::main(&args),
        Command::Register(args) => register::main(&args),
        Command::Bench(args) => tidegate_lab::cli::bench::main(&args),
        Command::Streams(args) => tidegate_lab::cli::streams::main(&args),
        Command::Backend(args) => tidegate_lab::cli::backend::main(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::time::Duration;

    fn parse(arguments: &[&str]) -> Result<Command, clap::Error> {
        let all = [&["tidegate"], arguments].concat();
        super::parse(all.iter().map(OsString::from).collect()).map(|cli| cli.command)
    }

    #[test]
    fn command_line_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            let call = format!("Example:\n  tidegate {} ", command.get_name());
            let bare = format!("Example:\n  tidegate {}\n", command.get_name());
            assert!(help.contains(&call) || help.contains(&bare), "{help}");
        }
    }

    #[test]
    fn help_fits_80_columns() {
        let mut all = Cli::command();
        all.build();
        let mut texts = vec![all.render_long_help().to_string()];
        texts.extend(all.get_subcommands_mut().map(|one| one.render_long_help().to_string()));
        for text in texts {
            // clap does not wrap usage lines.
            let lines = text.lines().filter(|line| !line.starts_with("Usage: "));
            let wide: Vec<_> = lines.filter(|line| line.chars().count() > 80).collect();
            assert!(wide.is_empty(), "{wide:#?}");
        }
    }

    #[test]
    fn internal_options_are_hidden_from_help() {
        let line = ["run", "--config", "f", "--pid-file", "p", "--supervisor-check", "1"];
        let Command::Run(args) = parse(&line).unwrap() else { panic!("another command") };
        assert_eq!(args.supervisor_check, Some(1));
        let helper = parse(&["run", "--probe-helper", "keeper", "--config", "f"]).unwrap();
        let Command::Run(args) = helper else { panic!("another command") };
        assert_eq!(args.probe_helper.as_deref(), Some("keeper"));
        let mut all = Cli::command();
        let help = all.find_subcommand_mut("run").unwrap().render_long_help().to_string();
        assert!(help.contains("--pid-file") && !help.contains("supervisor-check"), "{help}");
        assert!(!help.contains("probe-helper"), "{help}");
    }

    #[test]
    fn first_slash_separates_pool_from_backend() {
        let Command::Drain(args) = parse(&["drain", "web/unix:/run/a.sock"]).unwrap() else {
            panic!("another command");
        };
        let target = args.what.target;
        let (pool, backend) = (target.pool.as_str(), target.backend.as_str());
        assert_eq!((pool, backend), ("web", "unix:/run/a.sock"));
        for wrong in ["web", "/a", "web/", ""] {
            assert_eq!(parse(&["drain", wrong]).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

    #[test]
    fn documented_command_lines_are_accepted() {
        for line in [
            "run --config f",
            "run f --single",
            "start --config f",
            "stop --admin unix:/x",
            "status --config f",
            "check --config f",
            "check f",
            "import haproxy.cfg",
            "import f --from haproxy -o t --report json --env A=1 --env B= --strict --force",
            "demo",
            "demo --backends 5 --for 1m",
            "demo --for 5s --play 10m",
            "run --config f --pid-file p",
            "run --config f --single",
            "reload",
            "selftest --reloads 1 --upgrades 2 --kills 3 --for 10s --seed 4",
            "upgrade --binary /b --config f --json",
            "status --json --admin unix:/x",
            "drain a/b --admin 127.0.0.1:9900 --json",
            "drain a/b --wait",
            "drain --wait=30s a/b",
            "ready --admin unix:/x",
            "explain a/b --admin 127.0.0.1:9900 --json",
            "explain --session 17 --json",
            "explain --client 10.0.0.1 --frontend web",
            "explain --client [::1]:80 --frontend web --address 10.0.0.2:80 --without a/b \
             --without a/c --with weight:a/unix:/run/d=sock=5 --config f",
            "undrain a/b --admin [::1]:9900 --token-file t",
            "shutdown --admin localhost:9900",
            "heartbeat --to 10.0.0.5:7946 --to [::1]:7946 --pool web --name a \
             --address 10.0.0.11:80 --key-id 1 --key-file f --drain 0",
            "register --etcd 127.0.0.1:2379 --etcd etcd.internal:2379 --service web \
             --address 10.0.0.5:80 --check http:/health --ttl 10s --tls --ca-file c \
             --user u --password-file f --label zone=a --when-down nothing",
            "register --consul unix:/run/consul.sock --token-file t --service web \
             --address [::1]:80",
            "register --zookeeper 127.0.0.1:2181 --path /a --service web --address 10.0.0.5:80",
        ] {
            parse(&line.split_whitespace().collect::<Vec<_>>()).expect(line);
        }
    }

    #[test]
    fn invalid_command_lines_are_usage_errors() {
        for line in [
            "run",
            "run f --config f",
            "nonsense",
            "status --admin example.com:80",
            "status --admin unix:",
            "status --admin 127.0.0.1",
            "status --admin 127.0.0.1:0",
            "import",
            "import f --from squid",
            "import f --env A",
            "demo --for 0s",
            "demo --for soon",
            "demo --backends 0",
            "drain",
            "drain a/b --wait=0s",
            "explain",
            "explain a",
            "explain a/b --session 1",
            "explain a/b --client 10.0.0.1 --frontend web",
            "explain --session 0",
            "explain --session 1 --client 10.0.0.1 --frontend web",
            "explain --session 1 --without a/b",
            "explain --client 10.0.0.1",
            "explain --frontend web",
            "explain a/b --without a/c",
            "explain --client host --frontend web",
            "explain --client 10.0.0.1 --frontend web --address x",
            "explain --client 10.0.0.1 --frontend web --without b",
            "explain --client 10.0.0.1 --frontend web --with a/b=2",
            "explain --client 10.0.0.1 --frontend web --with weight:a/b=1001",
            "drain a/b --wait=soon",
            "heartbeat",
            "heartbeat --to 10.0.0.5 --pool p --address 10.0.0.1:80 --key-id 1 --key-file f",
            "heartbeat --to 10.0.0.5:7 --pool p --address 0.0.0.0:80 --key-id 1 --key-file f",
        ] {
            let error = parse(&line.split(' ').collect::<Vec<_>>()).expect_err(line);
            assert!(error.use_stderr() && error.exit_code() == 2, "{line}");
        }
    }

    #[test]
    fn error_about_the_time_of_wait_shows_the_equals_sign() {
        for line in ["drain a/b --wait 10s", "drain --wait 10s a/b"] {
            let error = parse(&line.split(' ').collect::<Vec<_>>()).expect_err(line);
            assert!(error.to_string().contains("'--wait=TIME'"), "{error}");
        }
    }

    #[test]
    fn host_name_instead_of_an_address_is_explained() {
        for line in [
            "bench --to localhost:80 churn",
            "streams --to localhost:80 --listen 127.0.0.1:0",
            "backend --listen localhost:80 echo",
            "heartbeat --to localhost:80",
        ] {
            let error = parse(&line.split(' ').collect::<Vec<_>>()).expect_err(line);
            assert!(error.to_string().contains("expected IP:PORT, for example"), "{error}");
        }
    }

    #[test]
    fn demo_runs_40_s_by_default() {
        let Command::Demo(args) = parse(&["demo"]).unwrap() else { panic!("another command") };
        assert_eq!((args.backends, args.duration), (3, Duration::from_secs(40)));
    }
}
