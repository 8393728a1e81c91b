//! The process-wide part of the model: `[process]`, `[admin]`, `[log]`.
//!
//! `validate` fills it, `daemon` reads it. It is part of `Config` and checks nothing
//! itself.

use super::text_forms;
use super::text_forms::words;
use serde::Serialize;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// `[process]`. A reload applies changes of `leave_delay`, `drain_timeout`,
/// `upgrade_timeout`, `connections_max` and `buffers_max`. Changes of the other keys
/// need a restart, or for most of them an upgrade.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProcessConfig {
    /// `None`: one worker per CPU the process may use.
    #[serde(serialize_with = "text_forms::or_auto")]
    pub workers: Option<usize>,
    /// Pin each worker to its CPU.
    pub pin: bool,
    /// Relay engine.
    pub engine: EngineChoice,
    /// Time for which a worker polls after its last activity before it sleeps.
    #[serde(serialize_with = "text_forms::timer")]
    pub spin: Option<Duration>,
    /// Time for which the process still accepts clients after a stop request, while
    /// `/ready` already fails; 0 skips it.
    #[serde(serialize_with = "text_forms::duration")]
    pub leave_delay: Duration,
    /// Time after that in which sessions can finish.
    #[serde(serialize_with = "text_forms::duration")]
    pub drain_timeout: Duration,
    /// Time in which the new process of an upgrade must be ready.
    #[serde(serialize_with = "text_forms::duration")]
    pub upgrade_timeout: Duration,
    /// Cap on sessions of the whole process.
    pub connections_max: u32,
    /// Maximum number of bytes held for all sessions: received and unsent data, and the
    /// sizes of pipes.
    #[serde(serialize_with = "text_forms::size")]
    pub buffers_max: usize,
    /// User that the process switches to before it opens anything, by name or number;
    /// `None`: no switch.
    pub user: Option<String>,
    /// Group to switch to; `None`: the groups of `user` in the user database.
    pub group: Option<String>,
    /// Use of the sandbox.
    pub sandbox: Sandbox,
    /// Directory in which operator intents survive a restart: an absolute path. `None`:
    /// they are not stored.
    #[serde(serialize_with = "text_forms::or_off")]
    pub state: Option<PathBuf>,
    /// Run the commands of `exec` probes in a process outside of the sandbox.
    pub probe_helper: bool,
}

/// `sandbox = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// All layers that the kernel supports.
    Auto,
    /// All layers; the process does not start without them.
    On,
    /// No layers.
    Off,
}

/// `engine = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// The faster engine, currently epoll; see `daemon::start`.
    Auto,
    /// io_uring; epoll with a logged reason if io_uring is not available.
    IoUring,
    /// Never uses io_uring.
    Epoll,
}

/// Default address of the admin API.
pub const ADMIN_SOCKET: &str = "/run/tidegate/admin.sock";

/// `[admin]`. A change of `listen` needs a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Admin {
    /// Address of the admin API.
    #[serde(serialize_with = "text_forms::shown")]
    pub listen: AdminListen,
    /// File with the bearer token (trailing white space is ignored).
    pub token_file: Option<PathBuf>,
    /// File with a bearer token for requests that change nothing.
    pub read_token_file: Option<PathBuf>,
    /// Maximum number of backends for which the metrics contain series per backend.
    pub backend_metrics_max: u32,
}

/// Address of the admin API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminListen {
    /// A Unix socket, mode 0600.
    Unix(PathBuf),
    /// A TCP address. An address other than loopback requires a token file.
    Tcp(SocketAddr),
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Log {
    /// Least severe level that is written.
    pub level: LogLevel,
    /// Text for people, JSON for programs.
    pub format: LogFormat,
    /// Destination of log lines.
    #[serde(serialize_with = "text_forms::shown")]
    pub target: LogTarget,
    /// Facility of log lines in syslog.
    pub facility: SyslogFacility,
    /// Destination of access-log lines.
    #[serde(serialize_with = "text_forms::shown")]
    pub access: AccessLogTarget,
    /// Facility of access-log lines in syslog.
    pub access_facility: SyslogFacility,
}

/// `target = ...`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// A syslog receiver.
    Syslog(SyslogReceiver),
}

/// A syslog receiver. Its text starts with `syslog:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SyslogReceiver {
    /// A Unix datagram socket for lines of the C function `syslog`, usually `/dev/log`.
    Local(PathBuf),
    /// A Unix datagram socket for messages of RFC 5424.
    Unix(PathBuf),
    /// UDP, messages of RFC 5424.
    Udp(SocketAddr),
    /// TCP, messages of RFC 5424 with their lengths.
    Tcp(SocketAddr),
}

/// `facility = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SyslogFacility {
    User,
    Daemon,
    Local0,
    Local1,
    Local2,
    Local3,
    Local4,
    Local5,
    Local6,
    Local7,
}

/// `level = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// `format = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LogFormat {
    Text,
    Json,
}

/// `access = ...`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// No access log.
    Off,
    /// Standard output.
    Stdout,
    /// Appended to this file, which is reopened after a rotation.
    File(PathBuf),
    /// A syslog receiver.
    Syslog(SyslogReceiver),
}

words!(EngineChoice: "auto" => Auto, "io_uring" => IoUring, "epoll" => Epoll);
words!(Sandbox: "auto" => Auto, "on" => On, "off" => Off);
words!(
    LogLevel: "error" => Error, "warn" => Warn, "info" => Info, "debug" => Debug, "trace" => Trace
);
words!(LogFormat: "text" => Text, "json" => Json);
words!(
    SyslogFacility: "user" => User, "daemon" => Daemon, "local0" => Local0, "local1" => Local1,
    "local2" => Local2, "local3" => Local3, "local4" => Local4, "local5" => Local5,
    "local6" => Local6, "local7" => Local7
);

// === impl Admin ===

impl Admin {
    /// Returns whether `listen` is the default. If the default is not usable, the
    /// process chooses another path.
    pub fn is_default(&self) -> bool {
        self.listen == AdminListen::Unix(PathBuf::from(ADMIN_SOCKET))
    }
}

// === impl AdminListen ===

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminListen::Unix(path) => write!(f, "unix:{}", path.display()),
            AdminListen::Tcp(address) => address.fmt(f),
        }
    }
}

// === impl AccessLogTarget ===

impl fmt::Display for AccessLogTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AccessLogTarget::Off => f.write_str("off"),
            AccessLogTarget::Stdout => f.write_str("stdout"),
            AccessLogTarget::File(path) => path.display().fmt(f),
            AccessLogTarget::Syslog(receiver) => receiver.fmt(f),
        }
    }
}

// === impl LogTarget ===

impl fmt::Display for LogTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogTarget::Stderr => f.write_str("stderr"),
            LogTarget::Syslog(receiver) => receiver.fmt(f),
        }
    }
}

// === impl SyslogReceiver ===

impl fmt::Display for SyslogReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SyslogReceiver::Local(path) => write!(f, "syslog:{}", path.display()),
            SyslogReceiver::Unix(path) => write!(f, "syslog:unix:{}", path.display()),
            SyslogReceiver::Udp(address) => write!(f, "syslog:udp:{address}"),
            SyslogReceiver::Tcp(address) => write!(f, "syslog:tcp:{address}"),
        }
    }
}

// === impl SyslogFacility ===

impl SyslogFacility {
    /// The number of the facility in RFC 5424.
    pub fn number(self) -> u8 {
        match self {
            SyslogFacility::User => 1,
            SyslogFacility::Daemon => 3,
            SyslogFacility::Local0 => 16,
            SyslogFacility::Local1 => 17,
            SyslogFacility::Local2 => 18,
            SyslogFacility::Local3 => 19,
            SyslogFacility::Local4 => 20,
            SyslogFacility::Local5 => 21,
            SyslogFacility::Local6 => 22,
            SyslogFacility::Local7 => 23,
        }
    }
}
