//! The program's log: text or JSON on standard error or to a syslog receiver.
//!
//! Installed by `start`. `reload` changes the level. Nothing is logged per packet.

use std::io::Stderr;
use std::sync::OnceLock;
use std::time::Duration;
use tidegate_core::model::{Log, LogFormat, LogLevel, LogTarget, SyslogFacility, SyslogReceiver};
use tidegate_logging::log_queue::{LineWriter, LogQueue};
use tidegate_logging::logfmt::Logfmt;
use tidegate_logging::syslog::{
    SyslogAddress, SyslogConnection, SyslogForm, SyslogHeader, SyslogSeverity, SyslogWriter,
};
use tidegate_net::clock;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;
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

/// Makes a writer for each line.
#[derive(Debug)]
struct LogWriters {
    queue: Option<LogQueue>,
    /// What each line starts with, for syslog.
    header: Option<SyslogHeader>,
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
        let syslog = match &log.target {
            LogTarget::Stderr => None,
            LogTarget::Syslog(receiver) => {
                Some((syslog_address(receiver), syslog_header(receiver, log.facility, "log")))
            }
        };
        // Without a queue, lines are written directly to standard error.
        let queue = match &syslog {
            None => LogQueue::start(std::io::stderr(), log_dropped),
            Some((address, _)) => {
                let connection = SyslogConnection::new(address.clone(), clock::now);
                LogQueue::start(SyslogWriter::new(connection), log_dropped)
            }
        }
        .ok();
        let to_syslog = syslog.is_some();
        let writer = LogWriters { queue: queue.clone(), header: syslog.map(|(_, header)| header) };
        let text = || fmt::layer().fmt_fields(Logfmt);
        let installed = match log.format {
            // Messages of syslog have a time in their headers.
            LogFormat::Text if to_syslog => {
                base.with(text().with_ansi(false).without_time().with_writer(writer)).try_init()
            }
            LogFormat::Text => {
                let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
                base.with(text().with_writer(writer).with_ansi(ansi)).try_init()
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

impl<'a> MakeWriter<'a> for LogWriters {
    type Writer = Either<LineWriter, Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        self.writer(SyslogSeverity::Info)
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        self.writer(match *event.level() {
            Level::ERROR => SyslogSeverity::Error,
            Level::WARN => SyslogSeverity::Warning,
            Level::INFO => SyslogSeverity::Info,
            Level::DEBUG | Level::TRACE => SyslogSeverity::Debug,
        })
    }
}

impl LogWriters {
    fn writer(&self, severity: SyslogSeverity) -> Either<LineWriter, Stderr> {
        let Some(queue) = &self.queue else { return Either::B(std::io::stderr()) };
        let mut start = Vec::new();
        if let Some(header) = &self.header {
            let time = humantime::format_rfc3339_micros(clock::wall());
            header.append(severity, &time, &mut start);
        }
        Either::A(queue.line_after(start))
    }
}

/// Converts the receiver of the configuration to that of the member `logging`.
pub(super) fn syslog_address(receiver: &SyslogReceiver) -> SyslogAddress {
    match receiver {
        SyslogReceiver::Local(path) | SyslogReceiver::Unix(path) => {
            SyslogAddress::Unix(path.clone())
        }
        SyslogReceiver::Udp(address) => SyslogAddress::Udp(*address),
        SyslogReceiver::Tcp(address) => SyslogAddress::Tcp(*address),
    }
}

/// Returns the header of the messages of one log.
pub(super) fn syslog_header(
    receiver: &SyslogReceiver,
    facility: SyslogFacility,
    kind: &'static str,
) -> SyslogHeader {
    let form = match receiver {
        SyslogReceiver::Local(_) => SyslogForm::Local,
        SyslogReceiver::Unix(_) | SyslogReceiver::Udp(_) | SyslogReceiver::Tcp(_) => {
            SyslogForm::Rfc5424
        }
    };
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    SyslogHeader { form, facility: facility.number(), host, pid: std::process::id(), kind }
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
