//! `tidegate streams`: seeded streams through a balancer that already runs.
//!
//! Called by `cli`. It runs both ends, clients and backends, and the ledger that
//! compares them. It neither starts nor queries the balancer.

use super::selftest::streams_with;
use crate::cli::threads;
use crate::ledger::{Ledger, LedgerBackend, StreamSizes};
use clap::Args;
use serde::Serialize;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidegate_client::command::{Exit, duration, print, print_json, socket_address};
use tidegate_net::clock;
use tokio::signal::unix::{SignalKind, signal};

/// `tidegate streams`
#[derive(Debug, Args)]
pub struct StreamsArgs {
    /// Balancer address that clients connect to; repeatable, used in turn.
    #[arg(long, value_name = "IP:PORT", required = true, value_parser = socket_address)]
    pub to: Vec<SocketAddr>,
    /// Address of a built-in backend; repeatable. The balancer must route all clients
    /// to these.
    #[arg(long, value_name = "IP:PORT", required = true, value_parser = socket_address)]
    pub listen: Vec<SocketAddr>,
    /// New streams per second.
    #[arg(long, value_name = "PER-SECOND", default_value_t = 10.0, value_parser = rate)]
    pub rate: f64,
    /// Concurrent streams; beyond this, streams start late.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub at_once: u16,
    /// Maximum stream size, except for one in 200 streams of 1 to 4 MiB.
    #[arg(long, value_name = "BYTES", default_value = "128KiB", value_parser = threads::size)]
    pub size: usize,
    /// Seed of the first stream; later streams count up from it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// How long to start new streams.
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub duration: Duration,
    /// Print interim counts at this interval.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub every: Option<Duration>,
    /// Print JSON, one object per line.
    #[arg(long)]
    pub json: bool,
}

/// Help after the options.
pub const HELP: &str = "\
Example:
  tidegate streams --to 127.0.0.1:8080 --listen 127.0.0.1:9001
  tidegate streams --to 127.0.0.1:8080 --listen 127.0.0.1:9001 \\
    --listen 127.0.0.1:9002 --rate 50 --for 1h --every 10s

The balancer at --to must have exactly the --listen addresses as backends of that
frontend. Some streams end with a reset on purpose. Exit code 0: nothing was lost;
3: something was lost, or no stream could be sent.";

/// One in this number of streams is large.
const LARGE_ONE_IN: u64 = 200;

/// Time without data after which an end reports a fault.
const SILENCE: Duration = Duration::from_secs(20);

/// Interval at which the end of the run is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Maximum number of faults that are printed.
const SHOWN_MAX: usize = 10;

/// Runs the command.
pub fn main(args: &StreamsArgs) -> Exit {
    match run(args) {
        Ok(ledger) => {
            show(args, &ledger, true);
            let faults = ledger.faults();
            for fault in faults.iter().take(SHOWN_MAX) {
                eprintln!("tidegate: streams: {fault}");
            }
            if faults.is_empty() && ledger.streams() > 0 { Exit::Fine } else { Exit::Failed }
        }
        Err(error) => {
            eprintln!("tidegate: streams: {error}");
            Exit::Failed
        }
    }
}

fn run(args: &StreamsArgs) -> io::Result<Arc<Ledger>> {
    let sizes = StreamSizes { most: args.size as u64, large_one_in: LARGE_ONE_IN };
    let ledger = Arc::new(Ledger::new(sizes, true, SILENCE));
    let backends = args.listen.iter().map(|address| {
        LedgerBackend::start_at(*address, Arc::clone(&ledger))
            .map_err(|error| io::Error::other(format!("cannot listen on {address}: {error}")))
    });
    // Dropped, and so stopped, after the last stream.
    let _backends = backends.collect::<io::Result<Vec<_>>>()?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            ledger.run_paced(args.seed, &args.to, &stop, args.at_once.into(), args.rate);
        });
        let watched = watch(args, &ledger);
        stop.store(true, Ordering::Relaxed);
        watched
    })?;
    Ok(ledger)
}

/// Waits for the end of the duration, SIGINT or SIGTERM, and prints interim counts.
fn watch(args: &StreamsArgs, ledger: &Ledger) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let end = clock::now() + args.duration;
        let mut shown = Ticker::new(clock::now(), args.every);
        let mut look = tokio::time::interval(POLL_INTERVAL);
        while clock::now() < end {
            tokio::select! {
                _ = interrupt.recv() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
                _ = look.tick() => {}
            }
            if shown.is_due(clock::now()) {
                show(args, ledger, false);
            }
        }
        Ok(())
    })
}

/// An event at regular intervals.
struct Ticker {
    every: Option<Duration>,
    next: Option<Instant>,
}

impl Ticker {
    fn new(now: Instant, every: Option<Duration>) -> Ticker {
        Ticker { every, next: every.map(|every| now + every) }
    }

    /// Returns whether the event is due. Missed events are skipped.
    fn is_due(&mut self, now: Instant) -> bool {
        let (Some(every), Some(next)) = (self.every, self.next) else { return false };
        if now < next {
            return false;
        }
        self.next = Some(if next + every > now { next + every } else { now + every });
        true
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct StreamsDoc {
    bytes_in: u64,
    bytes_out: u64,
    refused: usize,
    reset: usize,
    silent: usize,
    streams: u64,
    whole: bool,
    wrong: usize,
}

fn show(args: &StreamsArgs, ledger: &Ledger, whole: bool) {
    let [refused, reset, wrong, silent] = streams_with(&ledger.faults());
    let bytes_in = ledger.bytes_down.load(Ordering::Relaxed);
    let bytes_out = ledger.bytes_up.load(Ordering::Relaxed);
    let streams = ledger.streams();
    if args.json {
        let document =
            StreamsDoc { bytes_in, bytes_out, refused, reset, silent, streams, whole, wrong };
        return print_json(&document);
    }
    let megabytes = (bytes_in + bytes_out) / 1_000_000;
    let mut text = format!(
        "{streams} streams, {megabytes} MB: {refused} refused, {reset} reset, {wrong} bytes wrong"
    );
    if silent > 0 {
        text.push_str(&format!(", {silent} without data"));
    }
    print(&text);
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 1e5 => Ok(rate),
        _ => Err("expected a number above 0, at most 100000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_ticks_are_skipped() {
        let begin = clock::now();
        let mut pace = Ticker::new(begin, Some(Duration::from_secs(1)));
        let after = |tenths: u64| begin + Duration::from_millis(100 * tenths);
        let due = [9, 10, 11, 45, 46, 60].map(|tenths| pace.is_due(after(tenths)));
        assert_eq!(due, [false, true, false, true, false, true]);
        assert!(!Ticker::new(begin, None).is_due(after(100)));
    }
}
