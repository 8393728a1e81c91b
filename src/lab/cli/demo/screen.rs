//! What people see: lines on standard output, and below them, on a terminal, a
//! progress bar.
//!
//! Used by the demo alone. Without a terminal, with `NO_COLOR` or a dumb one,
//! no control character is ever written.

use indicatif::{ProgressBar, ProgressStyle};
use std::convert::Infallible;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};
use tidegate_net::clock;

/// How often the bar moves.
const STEP: Duration = Duration::from_millis(100);

/// Nobody reads standard output any more.
#[derive(Debug)]
pub(crate) struct OutputClosed;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Screen {
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Screen {
    /// For a demo of that length.
    pub(crate) fn new(length: Duration) -> Screen {
        let bar = fancy().then(|| {
            let bar = ProgressBar::new(length.as_millis() as u64);
            let style = ProgressStyle::with_template("{spinner} {bar:30} {elapsed} {wide_msg}");
            // The template is a constant; a bad one would leave the usual look.
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

    /// Says beside the bar what is going on.
    pub(crate) fn now(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    /// Moves the bar, for ever.
    pub(crate) async fn progress(&self) -> Infallible {
        loop {
            if let Some(bar) = &self.bar {
                bar.set_position((clock::now() - self.started).as_millis() as u64);
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// Takes the bar away.
    pub(crate) fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Whether control characters are welcome.
fn fancy() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    io::stdout().is_terminal() && io::stderr().is_terminal() && !dumb && !set("NO_COLOR")
}
