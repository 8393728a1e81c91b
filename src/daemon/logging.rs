//! The program's log: text or JSON on standard error.
//!
//! Installed by `start`. `reload` changes the level. Nothing is logged per packet.

use std::sync::OnceLock;
use std::time::Duration;
use tidegate_core::model::{Log, LogFormat, LogLevel};
use tidegate_logging::log_queue::LogQueue;
use tidegate_logging::logfmt::Logfmt;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::EitherWriter as Either;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt, reload};

/// Changes the level of the log. On drop, waits until queued lines are written.
#[derive(Debug, Default)]
pub(super) struct LogHandle {
    level: Option<reload::Handle<LevelFilter, Registry>>,
    queue: Option<LogQueue>,
}

/// The queue of the installed log, for lines that are logged after the control loop has
/// dropped its [`LogHandle`].
static INSTALLED: OnceLock<LogQueue> = OnceLock::new();

/// How long to wait for the last lines to be written.
const FLUSH_MAX: Duration = Duration::from_millis(500);

impl LogHandle {
    /// Returns a handle without effect, for a balancer inside another program.
    pub(super) fn none() -> LogHandle {
        LogHandle::default()
    }

    /// Installs the log for the whole process. No effect if a log is already installed.
    pub(super) fn install(log: &Log) -> LogHandle {
        let (level, handle) = reload::Layer::new(filter(log.level));
        let base = tracing_subscriber::registry().with(level);
        // Without a queue, lines are written directly to standard error.
        let queue = LogQueue::start(std::io::stderr(), log_dropped).ok();
        let to = queue.clone();
        let writer = move || match &to {
            Some(queue) => Either::A(queue.line()),
            None => Either::B(std::io::stderr()),
        };
        let installed = match log.format {
            LogFormat::Text => {
                let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
                let layer = fmt::layer().fmt_fields(Logfmt).with_writer(writer).with_ansi(ansi);
                base.with(layer).try_init()
            }
            LogFormat::Json => base.with(fmt::layer().json().with_writer(writer)).try_init(),
        };
        let level = installed.is_ok().then_some(handle);
        let queue = queue.filter(|_| level.is_some());
        if let Some(queue) = &queue {
            let _ = INSTALLED.set(queue.clone());
        }
        LogHandle { queue, level }
    }

    /// Returns the number of lines dropped because of a slow reader or a full disk.
    pub(super) fn dropped(&self) -> u64 {
        self.queue.as_ref().map_or(0, LogQueue::dropped)
    }

    /// Changes the level.
    pub(super) fn set_level(&self, level: LogLevel) {
        if let Some(handle) = &self.level {
            // Fails only after the log was dropped, at the end of the process.
            let _ = handle.modify(|current| *current = filter(level));
        }
    }
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        if let Some(queue) = &self.queue {
            queue.flush(FLUSH_MAX);
        }
    }
}

/// Waits until all queued lines are written, at most [`FLUSH_MAX`].
pub(super) fn flush() {
    if let Some(queue) = INSTALLED.get() {
        queue.flush(FLUSH_MAX);
    }
}

fn log_dropped(dropped: u64) {
    tracing::warn!(dropped, "log lines dropped; the log reader is too slow or its disk is full");
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}
