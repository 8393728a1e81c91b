//! The program's log: text or JSON on standard error, its level changeable
//! while it runs.
//!
//! Set up once by `start`; `reload` changes the level. Never used per packet.

use crate::config::{Log, LogFormat, LogLevel};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt, reload};

/// Changes the level.
#[derive(Debug, Clone)]
pub(super) struct LogHandle(Option<reload::Handle<LevelFilter, Registry>>);

impl LogHandle {
    /// A log that somebody else keeps.
    pub(super) fn none() -> LogHandle {
        LogHandle(None)
    }

    /// Installs the log for the whole process. Where one is installed already,
    /// that one stays.
    pub(super) fn install(log: &Log) -> LogHandle {
        let (level, handle) = reload::Layer::new(filter(log.level));
        let base = tracing_subscriber::registry().with(level);
        let installed = match log.format {
            LogFormat::Text => {
                let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
                base.with(fmt::layer().with_writer(std::io::stderr).with_ansi(ansi)).try_init()
            }
            LogFormat::Json => {
                base.with(fmt::layer().json().with_writer(std::io::stderr)).try_init()
            }
        };
        LogHandle(installed.is_ok().then_some(handle))
    }

    /// Puts another level in force.
    pub(super) fn set_level(&self, level: LogLevel) {
        if let Some(handle) = &self.0 {
            // It fails only once the log is gone, at the very end.
            let _ = handle.modify(|current| *current = filter(level));
        }
    }
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
