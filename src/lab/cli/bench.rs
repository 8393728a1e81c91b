//! `tidegate bench`: makes load and says what came of it.
//!
//! Called by `cli`. It turns arguments into a plan, watches the threads, and
//! prints; the load itself is `load`'s.

use crate::cli::threads::{self, WorkArgs};
use crate::load::{self, CloseMode, LoadErrorKind, LoadMode, LoadPlan, LoadReport, ReportWindow};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc;
use std::time::Duration;
use tidegate_client::command::{Exit, duration, print, print_json};

/// `tidegate bench`
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What each connection does.
    #[arg(value_enum, value_name = "MODE")]
    pub mode: ModeName,
    /// Target address.
    #[arg(long, value_name = "IP:PORT")]
    pub to: SocketAddr,
    /// Number of connections over all threads.
    #[arg(long, short, value_name = "N", default_value_t = 32,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(load::CONNECTIONS_MAX)))]
    pub connections: u32,
    /// Bytes per message, request or write, for example 64 or 128KiB [default: 64;
    /// upload 128KiB; idle and churn 0, no request].
    #[arg(long, value_name = "BYTES", value_parser = threads::size)]
    pub size: Option<usize>,
    /// Bytes per response [default: same as --size].
    #[arg(long, value_name = "BYTES", value_parser = threads::size)]
    pub answer: Option<usize>,
    /// Messages per second over all connections; required for open-loop.
    #[arg(long, value_name = "PER-SECOND", value_parser = rate)]
    pub rate: Option<f64>,
    /// Mean lifetime of a churn connection [default: 1s].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub lifetime: Option<Duration>,
    /// How short and churn connections are closed [default: fin].
    #[arg(long, value_enum)]
    pub close: Option<CloseName>,
    /// How long to measure, from when all connections are established.
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub duration: Duration,
    /// Print an interim result at this interval, then the total; with --json one
    /// line each.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub every: Option<Duration>,
    /// Number of source addresses, from 127.0.0.1 upwards [default: as many as the
    /// ports for the connections need].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=250))]
    pub sources: Option<u8>,
    /// Threads, CPUs and output.
    #[command(flatten)]
    pub work: WorkArgs,
}

/// The modes by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeName {
    /// Send a message, wait for the response, repeat.
    PingPong,
    /// Connect, send one request, read the response, close, repeat.
    Short,
    /// Send continuously.
    Upload,
    /// Receive continuously.
    Download,
    /// Send at a fixed rate; latency counts from the scheduled send time.
    OpenLoop,
    /// Hold connections open.
    Idle,
    /// Hold each connection for a random time, close it, repeat.
    Churn,
}

/// The ways to close by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CloseName {
    /// Close with FIN.
    Fin,
    /// Close with RST; leaves no port in TIME-WAIT.
    Reset,
}

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate bench --to 127.0.0.1:8080 ping-pong --connections 512 --for 30s
  tidegate bench --to 127.0.0.1:8080 open-loop --rate 20000 --json
  tidegate bench --to 127.0.0.1:8080 churn --connections 20000 --sources 4
  tidegate backend --listen 127.0.0.1:9000 echo     # something to measure

ping-pong, short and open-loop send --size bytes and wait for --answer bytes. The
server must answer in this way, as echo does. An HTTP server does not.

An interrupt ends the run early and prints the results so far. Exit code 3:
nothing was measured. Errors next to results are counted by kind and do not
change the exit code.";

/// Ports one source address has for one target by default: 32768 to 60999
/// (ip(7), ip_local_port_range), some kept for others.
const PORTS_OF_A_SOURCE: usize = 24_000;

/// Descriptors beside the connections.
const DESCRIPTORS_SPARE: u64 = 64;

/// Makes load as told.
pub fn main(args: &BenchArgs) -> Exit {
    let plan = match plan(args) {
        Ok(plan) => plan,
        Err(why) => {
            eprintln!("error: {why}\n\nFor more information, try '--help'.");
            return Exit::Usage;
        }
    };
    match run(args, plan) {
        Ok(report) => {
            show(args, &report);
            if done(args.mode, &report) > 0 {
                return Exit::Fine;
            }
            eprintln!("tidegate: bench: nothing was measured{}", hint(args, &report));
            Exit::Failed
        }
        Err(why) => {
            eprintln!("tidegate: bench: {why}");
            Exit::Failed
        }
    }
}

/// What the mode needs of a server, if the server seems not to have it.
fn hint(args: &BenchArgs, report: &LoadReport) -> String {
    let wrong = [LoadErrorKind::Excess, LoadErrorKind::Closed, LoadErrorKind::Unanswered];
    let count = |kind: &LoadErrorKind| report.errors(*kind);
    let asks = matches!(args.mode, ModeName::PingPong | ModeName::Short | ModeName::OpenLoop);
    if !asks || wrong.iter().all(|kind| count(kind) == 0) {
        return String::new();
    }
    let what = match count(&LoadErrorKind::Excess) {
        0 => "did not send a response of that length",
        _ => "sent more than that",
    };
    let name = args.mode.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
    format!(
        ": {name} sends --size bytes and waits for --answer bytes (as many, by default); the \
         server at {} {what}. Measure a server that does, such as `tidegate backend --listen \
         IP:PORT echo`. For an HTTP server use an HTTP load generator, or `tidegate bench` with \
         idle or churn, which send no request",
        args.to
    )
}

fn run(args: &BenchArgs, plan: LoadPlan) -> Result<LoadReport, String> {
    let limit = tidegate_net::limits::raise_descriptor_limit();
    let needed = plan.connections as u64 + DESCRIPTORS_SPARE;
    if needed > limit {
        return Err(format!(
            "{} connections need {needed} descriptors; the limit is {limit} (ulimit -Hn)",
            plan.connections
        ));
    }
    let (windows, over) = mpsc::channel();
    let crew = load::start(plan, windows).map_err(|error| error.to_string())?;
    let reports = std::thread::scope(|scope| {
        scope.spawn(move || show_windows(args, over));
        threads::watch(&crew)?;
        crew.join()
    });
    let reports = reports.map_err(|error| error.to_string())?;
    let sum = reports.into_iter().reduce(|sum, report| sum.merge(&report));
    sum.ok_or_else(|| "no thread was started".to_owned())
}

fn plan(args: &BenchArgs) -> Result<LoadPlan, String> {
    senseless(args)?;
    let (mode, size) = mode(args)?;
    let size = args.size.unwrap_or(size);
    if size == 0 && !matches!(args.mode, ModeName::Idle | ModeName::Churn) {
        return Err("--size must be greater than zero".to_owned());
    }
    let connections = args.connections as usize;
    if connections < args.work.threads {
        return Err("--connections must be at least --threads".to_owned());
    }
    Ok(LoadPlan {
        target: args.to,
        mode,
        connections,
        size,
        answer: args.answer.unwrap_or(size).max(1),
        duration: args.duration,
        window: args.every,
        threads: args.work.threads,
        cpus: args.work.cpus()?,
        sources: sources(args)?,
    })
}

/// Refuses what the parser cannot: options that mean nothing in a mode.
fn senseless(args: &BenchArgs) -> Result<(), String> {
    use ModeName as M;
    let only = |given: bool, option: &str, fits: bool, modes: &str| {
        if given && !fits { Err(format!("{option} applies to {modes} only")) } else { Ok(()) }
    };
    let asks = !matches!(args.mode, M::Upload | M::Download);
    let closes = matches!(args.mode, M::Short | M::Churn);
    only(args.rate.is_some(), "--rate", args.mode == M::OpenLoop, "open-loop")?;
    only(args.lifetime.is_some(), "--lifetime", args.mode == M::Churn, "churn")?;
    only(args.close.is_some(), "--close", closes, "short and churn")?;
    only(args.answer.is_some(), "--answer", asks, "modes that send requests")?;
    only(args.size.is_some(), "--size", args.mode != M::Download, "modes that send")
}

/// The mode and the size it has where none is given.
fn mode(args: &BenchArgs) -> Result<(LoadMode, usize), String> {
    let close = match args.close {
        Some(CloseName::Reset) => CloseMode::Reset,
        Some(CloseName::Fin) | None => CloseMode::Fin,
    };
    let lifetime = args.lifetime.unwrap_or(Duration::from_secs(1));
    Ok(match args.mode {
        ModeName::PingPong => (LoadMode::PingPong, 64),
        ModeName::Short => (LoadMode::Short(close), 64),
        ModeName::Upload => (LoadMode::Upload, 128 * 1024),
        ModeName::Download => (LoadMode::Download, 1),
        ModeName::OpenLoop => {
            let rate = args.rate.ok_or("open-loop needs --rate")?;
            (LoadMode::OpenLoop { rate }, 64)
        }
        ModeName::Idle => (LoadMode::Idle, 0),
        ModeName::Churn => (LoadMode::Churn { lifetime, close }, 0),
    })
}

fn sources(args: &BenchArgs) -> Result<u8, String> {
    let many = matches!(args.to.ip(), IpAddr::V4(ip) if ip.is_loopback());
    match args.sources {
        Some(n) if n > 1 && !many => Err("--sources needs a target in 127.0.0.0/8".to_owned()),
        Some(n) => Ok(n),
        None if many => {
            let needed = (args.connections as usize).div_ceil(PORTS_OF_A_SOURCE);
            Ok(u8::try_from(needed).unwrap_or(250))
        }
        None => Ok(1),
    }
}

// === what is printed ===

/// What the mode is about: requests, connections or bytes.
fn done(mode: ModeName, report: &LoadReport) -> u64 {
    match mode {
        ModeName::PingPong | ModeName::Short | ModeName::OpenLoop => report.requests,
        ModeName::Upload => report.bytes_out,
        ModeName::Download => report.bytes_in,
        ModeName::Idle | ModeName::Churn => report.opened,
    }
}

fn show(args: &BenchArgs, report: &LoadReport) {
    let document = || document(args, report, None);
    match (args.work.json, args.every) {
        (true, None) => print(&serde_json::to_string_pretty(&document()).unwrap_or_default()),
        (true, Some(_)) => print_json(&document()),
        (false, _) => print(lines(args, report).trim_end()),
    }
}

/// Prints each window once every thread has handed in its part, until the threads
/// have ended.
fn show_windows(args: &BenchArgs, over: mpsc::Receiver<ReportWindow>) {
    let mut parts: BTreeMap<u64, (usize, LoadReport)> = BTreeMap::new();
    for (number, part) in over {
        let (count, sum) = match parts.remove(&number) {
            Some((count, sum)) => (count + 1, sum.merge(&part)),
            None => (1, part),
        };
        if count < args.work.threads {
            parts.insert(number, (count, sum));
            continue;
        }
        // What a thread that was held up left out never comes.
        parts = parts.split_off(&number);
        match args.work.json {
            true => print_json(&document(args, &sum, Some(number))),
            false => print(&window_line(args, number, &sum)),
        }
    }
}

fn window_line(args: &BenchArgs, number: u64, report: &LoadReport) -> String {
    let seconds = report.elapsed.as_secs_f64();
    let amount = done(args.mode, report) as f64;
    let mut text = format!("{number:>6}: {:>10.0} /s", amount / seconds.max(f64::MIN_POSITIVE));
    if report.latencies() > 0 {
        for (percentile, name) in [(50.0, "p50"), (99.0, "p99")] {
            let _ = write!(text, "  {name} {}", threads::span(report.latency_at(percentile)));
        }
    }
    let _ = write!(text, "  {} errors", report.errors_total());
    text
}

/// Percentiles in reports, with their names.
const PERCENTILES: [(f64, &str); 6] = [
    (50.0, "p50"),
    (75.0, "p75"),
    (90.0, "p90"),
    (99.0, "p99"),
    (99.9, "p99.9"),
    (99.99, "p99.99"),
];

/// What `--json` prints.
#[derive(Serialize)]
struct BenchDoc {
    bytes_in: u64,
    bytes_in_per_second: f64,
    bytes_out: u64,
    bytes_out_per_second: f64,
    connections: u32,
    errors: BTreeMap<&'static str, u64>,
    errors_total: u64,
    late: u64,
    latency_seconds: BTreeMap<&'static str, f64>,
    mode: String,
    opened: u64,
    opened_per_second: f64,
    requests: u64,
    requests_per_second: f64,
    seconds: f64,
    threads: usize,
    to: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<u64>,
}

fn document(args: &BenchArgs, report: &LoadReport, window: Option<u64>) -> BenchDoc {
    let seconds = report.elapsed.as_secs_f64();
    let each_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let mut latency = BTreeMap::new();
    if report.latencies() > 0 {
        let at = |(percentile, name)| (name, report.latency_at(percentile).as_secs_f64());
        latency.extend(PERCENTILES.map(at));
        latency.insert("max", report.latency_max().as_secs_f64());
        latency.insert("mean", report.latency_mean().as_secs_f64());
    }
    BenchDoc {
        bytes_in: report.bytes_in,
        bytes_in_per_second: each_second(report.bytes_in),
        bytes_out: report.bytes_out,
        bytes_out_per_second: each_second(report.bytes_out),
        connections: args.connections,
        errors: report.errors_by_name().collect(),
        errors_total: report.errors_total(),
        late: report.late,
        latency_seconds: latency,
        mode: name(args.mode),
        opened: report.opened,
        opened_per_second: each_second(report.opened_timed),
        requests: report.requests,
        requests_per_second: each_second(report.requests),
        seconds,
        threads: args.work.threads,
        to: args.to,
        window,
    }
}

fn lines(args: &BenchArgs, report: &LoadReport) -> String {
    let mut text = String::new();
    let seconds = report.elapsed.as_secs_f64();
    let each_second = |count: u64| count as f64 / seconds.max(f64::MIN_POSITIVE);
    let (mode, threads) = (name(args.mode), args.work.threads);
    let _ = writeln!(
        text,
        "{mode} to {}: {} connections, {threads} thread{}, {seconds:.2} s",
        args.to,
        args.connections,
        if threads == 1 { "" } else { "s" }
    );
    for (label, total, timed) in [
        ("requests", report.requests, report.requests),
        ("late replies", report.late, 0),
        ("connections", report.opened, report.opened_timed),
    ] {
        if timed > 0 {
            let rate = each_second(timed);
            let _ = writeln!(text, "  {label:<12} {total:>12}  {rate:>12.0} /s");
        } else if total > 0 {
            let _ = writeln!(text, "  {label:<12} {total:>12}");
        }
    }
    for (label, bytes) in [("received", report.bytes_in), ("sent", report.bytes_out)] {
        if bytes > 0 {
            let (total, rate) =
                (threads::amount(bytes as f64), threads::amount(each_second(bytes)));
            let _ = writeln!(text, "  {label:<12} {total:>12}  {rate:>12}/s");
        }
    }
    if report.latencies() > 0 {
        for (percentile, name) in PERCENTILES {
            let _ =
                writeln!(text, "  {name:<12} {:>12}", threads::span(report.latency_at(percentile)));
        }
        let _ = writeln!(text, "  {:<12} {:>12}", "max", threads::span(report.latency_max()));
    }
    for (name, count) in report.errors_by_name() {
        let _ = writeln!(text, "  error {name}: {count}");
    }
    text
}

fn name(mode: ModeName) -> String {
    mode.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 1e8 => Ok(rate),
        _ => Err("expected a number above 0, at most 100000000".to_owned()),
    }
}
