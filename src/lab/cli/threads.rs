//! Common parts of `bench` and `backend`: waiting for threads, the progress line, and
//! text forms of sizes and times.
//!
//! It does not know what the threads do.

use crate::load::{LoadProgress, LoadThreads};
use clap::Args;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tidegate_net::clock;
use tidegate_net::cpu;
use tokio::signal::unix::{SignalKind, signal};

/// Threads, CPUs and output.
#[derive(Debug, Args)]
pub struct WorkArgs {
    /// Number of threads.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = threads)]
    pub threads: usize,
    /// CPUs to pin the threads to, for example 1 or 2,3 [default: not pinned].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub cpu: Vec<usize>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Maximum number of threads; the largest machines have about that many CPUs.
const THREADS_MAX: usize = 1024;

/// Maximum size of a message, write or answer.
const SIZE_MAX: usize = crate::load::SIZE_MAX;

/// Interval at which the threads are checked. The end of a run is noticed with up to
/// this delay.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Interval between updates of the progress line.
const PROGRESS: Duration = Duration::from_millis(500);

// === impl WorkArgs ===

impl WorkArgs {
    /// Returns the CPUs, if this process can run on all of them.
    pub(crate) fn cpus(&self) -> Result<Vec<usize>, String> {
        let available = cpu::available();
        match self.cpu.iter().find(|cpu| !available.contains(cpu)) {
            Some(cpu) => Err(format!("--cpu {cpu}: this process can run only on {available:?}")),
            None => Ok(self.cpu.clone()),
        }
    }
}

/// Waits until the threads end. SIGINT and SIGTERM stop them. Prints progress if
/// standard error is a terminal.
pub(crate) fn watch<T: Send + 'static>(load_threads: &LoadThreads<T>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut line = ProgressLine::new(clock::now());
        let mut look = tokio::time::interval(POLL_INTERVAL);
        loop {
            tokio::select! {
                _ = interrupt.recv() => load_threads.stop(),
                _ = terminate.recv() => load_threads.stop(),
                _ = look.tick() => {}
            }
            if load_threads.finished() {
                line.clear();
                return Ok(());
            }
            line.show(clock::now(), load_threads.gauges());
        }
    })
}

/// The progress line.
struct ProgressLine {
    live: bool,
    began: Instant,
    last: Instant,
    units: u64,
    bytes: u64,
    shown: bool,
}

impl ProgressLine {
    fn new(now: Instant) -> ProgressLine {
        let live = io::stderr().is_terminal();
        ProgressLine { live, began: now, last: now, units: 0, bytes: 0, shown: false }
    }

    fn show<'g>(&mut self, now: Instant, gauges: impl Iterator<Item = &'g LoadProgress>) {
        let since = now.duration_since(self.last);
        if !self.live || since < PROGRESS {
            return;
        }
        let (mut units, mut bytes, mut errors, mut open) = (0, 0, 0, 0);
        let mut started = true;
        for gauge in gauges {
            units += gauge.units.load(Relaxed);
            bytes += gauge.bytes.load(Relaxed);
            errors += gauge.errors.load(Relaxed);
            open += gauge.open.load(Relaxed);
            started &= gauge.started.load(Relaxed);
        }
        let each_second =
            |now: u64, before: u64| now.saturating_sub(before) as f64 / since.as_secs_f64();
        let (rate, mib) =
            (each_second(units, self.units), each_second(bytes, self.bytes) / 1048576.0);
        let doing = if started { "" } else { "connecting, " };
        let seconds = now.duration_since(self.began).as_secs();
        // A progress line that cannot be written does not stop the run.
        let _ = write!(
            io::stderr(),
            "\r\x1b[K{seconds} s: {doing}{open} open, {rate:.0} /s, {mib:.1} MiB/s, {errors} errors"
        );
        (self.last, self.units, self.bytes, self.shown) = (now, units, bytes, true);
    }

    fn clear(&self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// Formats a time for people: three or four digits and a unit.
pub(crate) fn span(span: Duration) -> String {
    let nanos = span.as_nanos() as f64;
    match nanos {
        n if n < 1e3 => format!("{n:.0} ns"),
        n if n < 1e6 => format!("{:.1} µs", n / 1e3),
        n if n < 1e9 => format!("{:.2} ms", n / 1e6),
        n => format!("{:.2} s", n / 1e9),
    }
}

/// Formats bytes for people: three decimals and a unit.
pub(crate) fn amount(bytes: f64) -> String {
    match bytes {
        b if b < 1048576.0 => format!("{:.3} KiB", b / 1024.0),
        b if b < 1073741824.0 => format!("{:.3} MiB", b / 1048576.0),
        b => format!("{:.3} GiB", b / 1073741824.0),
    }
}

/// Parses a size: `64`, `512B`, `128KiB`, `1MiB`.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        _ => return Err("expected a size such as 64, 128KiB or 1MiB".to_owned()),
    };
    let size = number.parse::<usize>().ok().and_then(|n| n.checked_mul(scale));
    match size {
        Some(size) if size <= SIZE_MAX => Ok(size),
        Some(_) => Err(format!("at most {} MiB", SIZE_MAX >> 20)),
        None => Err("expected a size such as 64, 128KiB or 1MiB".to_owned()),
    }
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(count) if (1..=THREADS_MAX).contains(&count) => Ok(count),
        _ => Err(format!("expected a number from 1 to {THREADS_MAX}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_accept_only_binary_units() {
        let read = |text| size(text).ok();
        assert_eq!(
            [read("64"), read("512B"), read("128KiB"), read("1MiB"), read("0")],
            [Some(64), Some(512), Some(131_072), Some(1_048_576), Some(0)]
        );
        for wrong in ["", "KiB", "64kb", "-1", "1.5KiB", "17MiB", "99999999999999999999"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn amounts_are_shown_in_the_unit_that_fits() {
        let shown = [512.0, 3.5 * 1048576.0, 2147483648.0].map(amount);
        assert_eq!(shown, ["0.500 KiB", "3.500 MiB", "2.000 GiB"]);
    }

    #[test]
    fn spans_are_shown_in_the_unit_that_fits() {
        let shown = [870, 12_340, 45_600_000, 3_210_000_000].map(|n| span(Duration::from_nanos(n)));
        assert_eq!(shown, ["870 ns", "12.3 µs", "45.60 ms", "3.21 s"]);
    }
}
