//! Output of the demo: lines on standard output, and a progress bar on a terminal.
//!
//! Used by the demo only. Without a terminal, with `NO_COLOR` or with `TERM=dumb` it
//! writes no control characters.

use indicatif::{ProgressBar, ProgressStyle};
use std::convert::Infallible;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};
use tidegate_net::clock;

/// Interval between updates of the bar.
const STEP: Duration = Duration::from_millis(100);

/// Standard output was closed by its reader.
#[derive(Debug)]
pub(crate) struct OutputClosed;

/// Standard output and the progress bar.
#[derive(Debug)]
pub(crate) struct Screen {
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Screen {
    /// Creates the output for a demo of this length.
    pub(crate) fn new(length: Duration) -> Screen {
        let bar = fancy().then(|| {
            let bar = ProgressBar::new(length.as_millis() as u64);
            let style = ProgressStyle::with_template("{spinner} {bar:30} {elapsed} {wide_msg}");
            // The template is a constant. If it were invalid, the bar would have the
            // default style.
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Screen { bar, started: clock::now() }
    }

    /// Writes one line.
    pub(crate) fn line(&self, text: &str) -> Result<(), OutputClosed> {
        let write = || {
            let mut out = io::stdout().lock();
            writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|_| OutputClosed)
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Shows the current step next to the bar.
    pub(crate) fn now(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    /// Updates the bar; never returns.
    pub(crate) async fn progress(&self) -> Infallible {
        loop {
            if let Some(bar) = &self.bar {
                bar.set_position((clock::now() - self.started).as_millis() as u64);
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// Removes the bar.
    pub(crate) fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Returns whether control characters can be used.
fn fancy() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    io::stdout().is_terminal() && io::stderr().is_terminal() && !dumb && !set("NO_COLOR")
}
