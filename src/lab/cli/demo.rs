//! `tidegate demo`: runs a balancer with backends and shows what it does.
//!
//! Called by the command line. It needs no configuration, no privileges and no network
//! except loopback. It prints only what it measured in the same run, and removes all
//! its files.
//!
//! Modules:
//!
//! - `backends`: the built-in servers
//! - `place`: the temporary directory and the configuration
//! - `balancer`: the balancer, a separate process, and its admin API
//! - `traffic`: the clients
//! - `show`: the order of events, and the checks
//! - `change`: reload and upgrade
//! - `explain`: explanations of a backend, of a session and of the next pick
//! - `split`: measured against expected distribution
//! - `screen`: output

mod backends;
mod balancer;
mod change;
mod explain;
mod place;
mod screen;
mod show;
mod split;
mod traffic;

use backends::Backends;
use balancer::{DemoBalancer, DemoEnded};
use clap::Args;
use place::DemoDirectory;
use screen::{OutputClosed, Screen};
use show::{DemoResult, DemoScript, Time};
use std::io;
use std::time::Duration;
use tidegate_client::command::{Exit, duration};
use tidegate_net::clock;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// `tidegate demo`
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Number of built-in backends.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub backends: u16,
    /// Duration of the demonstration, for example 20s or 1m.
    #[arg(long = "for", value_name = "TIME", default_value = "40s", value_parser = duration)]
    pub duration: Duration,
    /// Time at the end to try the balancer [default: what is left of --for].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub play: Option<Duration>,
}

/// Minimum duration of the whole demonstration.
const LENGTH_MIN: Duration = Duration::from_secs(5);

/// Additional drain time, if the demonstration takes longer than planned.
const DRAIN_MORE: Duration = Duration::from_secs(60);

/// Why the demo could not start.
type DemoError = String;

/// Signals that end the demo.
struct DemoStopSignals([Signal; 3]);

/// Runs the demo. Returns [`Exit::Fine`] only if all checks passed.
pub fn main(args: DemoArgs) -> Exit {
    match run(&args) {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("tidegate: demo: {error}");
            Exit::Failed
        }
    }
}

fn run(args: &DemoArgs) -> Result<Exit, DemoError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the async runtime: {error}"))?;
    // Before anything that must be cleaned up.
    let mut stop = DemoStopSignals::listen(&runtime)
        .map_err(|error| format!("cannot install signal handlers: {error}"))?;
    let started = clock::now();
    let length = args.duration.max(LENGTH_MIN);

    let backends = Backends::start(usize::from(args.backends))
        .map_err(|error| format!("cannot start the backends: {error}"))?;
    let drain = length + args.play.unwrap_or_default() + DRAIN_MORE;
    let place = DemoDirectory::create(drain).map_err(|error| error.to_string())?;
    let balancer = DemoBalancer::start(&place, backends.all())?;

    let screen = Screen::new(length);
    if length > args.duration {
        let asked = humantime::format_duration(args.duration);
        let takes = humantime::format_duration(LENGTH_MIN);
        let _ = screen.line(&format!(
            "--for {asked} is too short for the whole demonstration; it takes {takes}"
        ));
    }
    let time = Time { started, length, play: args.play };
    let show = DemoScript::new(&screen, &backends, &place, &balancer, time);
    let verdict = runtime.block_on(async {
        tokio::select! {
            ended = show.run() => ended.unwrap_or_else(|OutputClosed| show.cut_short("output closed")),
            () = stop.came() => show.cut_short("interrupted"),
            never = screen.progress() => match never {},
        }
    });
    runtime.block_on(balancer.shut_down());
    drop(show);
    Ok(finish(&screen, balancer, verdict))
}

/// Waits for the balancer to exit and prints the summary.
fn finish(screen: &Screen, balancer: DemoBalancer, mut verdict: DemoResult) -> Exit {
    let DemoEnded { cut, broken } = balancer.wait();
    if !broken.is_empty() {
        verdict.broken.extend(broken);
    } else if cut == 0 {
        verdict.summary.push("drained: all sessions finished, none was reset".to_owned());
    } else if verdict.cut_short {
        verdict.summary.push(format!("drained: {cut} sessions were reset"));
    } else {
        verdict.broken.push(format!("{cut} sessions were reset while the balancer drained"));
    }
    screen.close();
    let _ = screen.line("");
    let _ = screen.line("Summary");
    for line in &verdict.summary {
        let _ = screen.line(&format!("   {line}"));
    }
    for line in &verdict.broken {
        eprintln!("tidegate: demo: check failed: {line}");
    }
    if verdict.broken.is_empty() { Exit::Fine } else { Exit::Failed }
}

// === impl DemoStopSignals ===

impl DemoStopSignals {
    fn listen(runtime: &Runtime) -> io::Result<DemoStopSignals> {
        let _entered = runtime.enter();
        Ok(DemoStopSignals([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn came(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
