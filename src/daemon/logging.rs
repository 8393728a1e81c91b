//! The program's log: text or JSON on standard error, its level changeable
//! while it runs.
//!
//! Set up once by `start`; `reload` changes the level. Never used per packet.

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

/// Changes the level, and sees to it that the last lines are written when it is
/// dropped.
#[derive(Debug, Default)]
pub(super) struct LogHandle {
    level: Option<reload::Handle<LevelFilter, Registry>>,
    queue: Option<LogQueue>,
}

/// The process's own log, for its very last lines: they come after everything that
/// the control loop owned, its handle included.
static INSTALLED: OnceLock<LogQueue> = OnceLock::new();

/// How long the last lines may take to be written.
const FLUSH_MAX: Duration = Duration::from_millis(500);

impl LogHandle {
    /// A log that somebody else keeps.
    pub(super) fn none() -> LogHandle {
        LogHandle::default()
    }

    /// Installs the log for the whole process. Where one is installed already,
    /// that one stays.
    pub(super) fn install(log: &Log) -> LogHandle {
        let (level, handle) = reload::Layer::new(filter(log.level));
        let base = tracing_subscriber::registry().with(level);
        // A log that cannot be queued is better than none.
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

    /// Lines lost so far to a stuck reader or a full disk.
    pub(super) fn dropped(&self) -> u64 {
        self.queue.as_ref().map_or(0, LogQueue::dropped)
    }

    /// Puts another level in force.
    pub(super) fn set_level(&self, level: LogLevel) {
        if let Some(handle) = &self.level {
            // It fails only once the log is gone, at the very end.
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

/// Waits until what has been logged is written, [`FLUSH_MAX`] at most.
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
