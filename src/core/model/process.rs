//! The model of what concerns the whole process: `[process]`, `[admin]`, `[log]`.
//!
//! Filled by `validate`, read by `daemon`; part of `Config`. It checks nothing itself.

use super::text_forms;
use super::text_forms::words;
use serde::Serialize;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// `[process]`. All but `leave_delay`, `drain_timeout`, `upgrade_timeout`, `connections_max` and
/// `buffers_max` need a restart to change; most of the others may change with an
/// upgrade.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProcessConfig {
    /// `None`: one worker per CPU the process may use.
    #[serde(serialize_with = "text_forms::or_auto")]
    pub workers: Option<usize>,
    /// Pin each worker to its CPU.
    pub pin: bool,
    /// Requested engine.
    pub engine: EngineChoice,
    /// How long a worker polls after its last activity before it sleeps.
    #[serde(serialize_with = "text_forms::timer")]
    pub spin: Option<Duration>,
    /// How long it goes on accepting after it was told to stop, while `/ready` says
    /// no already; zero: not at all.
    #[serde(serialize_with = "text_forms::duration")]
    pub leave_delay: Duration,
    /// How long sessions may go on after that.
    #[serde(serialize_with = "text_forms::duration")]
    pub drain_timeout: Duration,
    /// How long a new process may take to serve when the program is upgraded.
    #[serde(serialize_with = "text_forms::duration")]
    pub upgrade_timeout: Duration,
    /// Sessions at once in the whole process.
    pub connections_max: u32,
    /// Bytes held for sessions, all together: received and not yet sent, and
    /// pipes by their size.
    #[serde(serialize_with = "text_forms::size")]
    pub buffers_max: usize,
    /// Whom the process becomes before it opens anything, by name or number;
    /// `None`: it stays who started it.
    pub user: Option<String>,
    /// With which group; `None`: the groups the user database gives `user`.
    pub group: Option<String>,
    /// Whether it confines itself.
    pub sandbox: Sandbox,
    /// Where operators' intents survive a restart: an absolute path. `None`: nowhere.
    #[serde(serialize_with = "text_forms::or_off")]
    pub state: Option<PathBuf>,
}

/// `sandbox = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// As far as the kernel has it.
    Auto,
    /// Wholly, or not at all: then the process does not start.
    On,
    /// Not at all.
    Off,
}

/// `engine = ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// Whichever is ahead today: epoll; see `daemon::start`.
    Auto,
    /// io_uring, or epoll with the reason logged where it is refused.
    IoUring,
    /// Never touch io_uring.
    Epoll,
}

/// Where the admin API listens unless told otherwise.
pub const ADMIN_SOCKET: &str = "/run/tidegate/admin.sock";

/// `[admin]`. A change of where it listens needs a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Admin {
    /// Where the API listens.
    #[serde(serialize_with = "text_forms::shown")]
    pub listen: AdminListen,
    /// File holding the bearer token (trailing white space ignored).
    pub token_file: Option<PathBuf>,
    /// With more backends than that the metrics have no series of each.
    pub backend_metrics_max: u32,
}

/// An admin address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminListen {
    /// A Unix socket, mode 0600.
    Unix(PathBuf),
    /// A TCP address; anything but loopback has a `token_file`.
    Tcp(SocketAddr),
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Log {
    /// Least severe level written.
    pub level: LogLevel,
    /// Text for people, JSON for machines.
    pub format: LogFormat,
    /// Where access-log lines go.
    #[serde(serialize_with = "text_forms::shown")]
    pub access: AccessLogTarget,
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
    /// Appended to this file; reopened when the file is moved away.
    File(PathBuf),
}

words!(EngineChoice: "auto" => Auto, "io_uring" => IoUring, "epoll" => Epoll);
words!(Sandbox: "auto" => Auto, "on" => On, "off" => Off);
words!(
    LogLevel: "error" => Error, "warn" => Warn, "info" => Info, "debug" => Debug, "trace" => Trace
);
words!(LogFormat: "text" => Text, "json" => Json);

// === impl Admin ===

impl Admin {
    /// The default place. A process that cannot use it chooses another one.
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
        }
    }
}
