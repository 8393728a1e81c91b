//! `tidegate backend`: servers that answer load, correctly or with faults.
//!
//! Called by `cli`. It turns arguments into a service, watches the threads and prints
//! their counts. The serving is done by `load`.

use crate::cli::threads::{self, WorkArgs};
use crate::load::{self, Behaviour, ServeReport, Service};
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_client::command::{Exit, duration, print, print_json, socket_address};

/// `tidegate backend`
#[derive(Debug, Args)]
pub struct BackendArgs {
    /// How to treat connections.
    #[arg(value_enum, value_name = "MODE")]
    pub mode: BehaviourName,
    /// Address to listen on; port 0 picks a free port; repeatable.
    #[arg(long, value_name = "IP:PORT", required = true, value_parser = socket_address)]
    pub listen: Vec<SocketAddr>,
    /// Bytes of a request, for respond [default: 64].
    #[arg(long, value_name = "BYTES", value_parser = threads::size)]
    pub request: Option<usize>,
    /// Bytes of a response or write [default: respond and half-close 64, source
    /// 128KiB].
    #[arg(long, value_name = "BYTES", value_parser = threads::size)]
    pub size: Option<usize>,
    /// Bytes that reset echoes before it resets; 0 resets at once [default: 0].
    #[arg(long, value_name = "BYTES", value_parser = threads::size)]
    pub after: Option<usize>,
    /// Bytes at the start of each connection that echo does not send back, for
    /// example the 28 of a PROXY header [default: 0].
    #[arg(long, value_name = "BYTES", value_parser = threads::size)]
    pub skip: Option<usize>,
    /// Bytes per second that slow-read reads from each connection [default: 1KiB].
    #[arg(long, value_name = "BYTES", value_parser = threads::size)]
    pub rate: Option<usize>,
    /// How long hiccup pauses [default: 200ms].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub pause: Option<Duration>,
    /// Time from one pause of hiccup to the next [default: 1s].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub every: Option<Duration>,
    /// Stop after this time [default: on SIGTERM or SIGINT].
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    pub duration: Option<Duration>,
    /// Threads, CPUs and output.
    #[command(flatten)]
    pub work: WorkArgs,
}

/// Names of the behaviours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BehaviourName {
    /// Send back what is received.
    Echo,
    /// Answer every --request bytes with --size bytes.
    Respond,
    /// Receive and discard.
    Sink,
    /// Send continuously.
    Source,
    /// Echo, but pause for --pause in every --every.
    Hiccup,
    /// Accept and never read, answer or close.
    Stall,
    /// Echo --after bytes, then reset the connection.
    Reset,
    /// Answer, send FIN, keep receiving.
    HalfClose,
    /// Read --rate bytes per second from each connection.
    SlowRead,
}

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate backend --listen 127.0.0.1:9000 echo
  tidegate backend --listen 127.0.0.1:9000 respond --size 1KiB
  tidegate backend --listen 127.0.0.1:9000 reset --after 10KiB --for 1m --json

It prints the bound addresses at start and the counts at the end.";

/// Runs the command.
pub fn main(args: &BackendArgs) -> Exit {
    let service = match service(args) {
        Ok(service) => service,
        Err(why) => {
            eprintln!("error: {why}\n\nFor more information, try '--help'.");
            return Exit::Usage;
        }
    };
    match run(args, service) {
        Ok(()) => Exit::Fine,
        Err(error) => {
            eprintln!("tidegate: backend: {error}");
            Exit::Failed
        }
    }
}

fn run(args: &BackendArgs, service: Service) -> std::io::Result<()> {
    tidegate_net::limits::raise_descriptor_limit();
    let (load_threads, bound) = load::serve(service)?;
    let addresses: Vec<String> = bound.iter().map(ToString::to_string).collect();
    if args.work.json {
        print_json(&BTreeMap::from([("listening", addresses)]));
    } else {
        print(&format!("listening on {}", addresses.join(", ")));
    }
    threads::watch(&load_threads)?;
    let served = load_threads.join()?;
    let sum = served.iter().fold(ServeReport::default(), |sum, one| sum.merge(one));
    match args.work.json {
        true => print_json(&sum),
        false => print(&shown(&sum)),
    }
    Ok(())
}

fn service(args: &BackendArgs) -> Result<Service, String> {
    use BehaviourName as N;
    let only = |given: bool, option: &str, fits: &[N], names: &str| {
        let fits = !given || fits.contains(&args.mode);
        if fits { Ok(()) } else { Err(format!("{option} applies to {names} only")) }
    };
    only(args.request.is_some(), "--request", &[N::Respond], "respond")?;
    let sized = [N::Respond, N::Source, N::HalfClose];
    only(args.size.is_some(), "--size", &sized, "respond, source and half-close")?;
    only(args.after.is_some(), "--after", &[N::Reset], "reset")?;
    only(args.skip.is_some(), "--skip", &[N::Echo], "echo")?;
    only(args.rate.is_some(), "--rate", &[N::SlowRead], "slow-read")?;
    only(args.pause.is_some(), "--pause", &[N::Hiccup], "hiccup")?;
    only(args.every.is_some(), "--every", &[N::Hiccup], "hiccup")?;
    let behaviour = match args.mode {
        N::Echo => Behaviour::Echo,
        N::Respond => Behaviour::Respond {
            request: above_zero("--request", args.request.unwrap_or(64))?,
            answer: above_zero("--size", args.size.unwrap_or(64))?,
        },
        N::Sink => Behaviour::Sink,
        N::Source => {
            Behaviour::Source { size: above_zero("--size", args.size.unwrap_or(128 * 1024))? }
        }
        N::Hiccup => hiccup(args)?,
        N::Stall => Behaviour::Stall,
        N::Reset => Behaviour::Reset { after: args.after.unwrap_or(0) as u64 },
        N::HalfClose => Behaviour::HalfClose { answer: args.size.unwrap_or(64) },
        N::SlowRead => {
            Behaviour::SlowRead { rate: above_zero("--rate", args.rate.unwrap_or(1024))? as u64 }
        }
    };
    Ok(Service {
        listen: args.listen.clone(),
        behaviour,
        skip: args.skip.unwrap_or(0) as u64,
        threads: args.work.threads,
        cpus: args.work.cpus()?,
        duration: args.duration,
    })
}

fn hiccup(args: &BackendArgs) -> Result<Behaviour, String> {
    let pause = args.pause.unwrap_or(Duration::from_millis(200));
    let every = args.every.unwrap_or(Duration::from_secs(1));
    if pause >= every {
        return Err("--pause must be shorter than --every".to_owned());
    }
    Ok(Behaviour::Hiccup { pause, every })
}

fn above_zero(option: &str, value: usize) -> Result<usize, String> {
    if value == 0 { Err(format!("{option} must be greater than zero")) } else { Ok(value) }
}

fn shown(served: &ServeReport) -> String {
    let ServeReport { accepted, open, requests, bytes_in, bytes_out, failed, reset, refused } =
        *served;
    format!(
        "accepted {accepted}, open {open}, requests {requests}, received {bytes_in} bytes, \
         sent {bytes_out} bytes, failed {failed}, reset {reset}, not accepted {refused}"
    )
}
