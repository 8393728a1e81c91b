//! Notifications for a service manager (sd_notify(3)): ready, reloading, stopping, alive.
//!
//! Used by the supervisor and, in a process without a supervisor, by `daemon::notify`. It
//! sends datagrams to `NOTIFY_SOCKET` and never waits. Without that variable it sends
//! nothing. Lost notifications are not repeated; the first in a row is logged.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tidegate_net::clock;

/// Environment variable with the address of the service manager.
pub(super) const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// Environment variables with the watchdog timeout, and the process that must notify.
pub(super) const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
pub(super) const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// A notice about the service, for a service manager or from a process to its supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceNotice {
    /// It serves with the configuration in force.
    Ready,
    /// It reloads the configuration. [`ServiceNotice::Ready`] follows.
    Reloading,
    /// It drains.
    Stopping,
    /// The notification for the watchdog.
    Alive,
    /// The process with this ID provides the service.
    MainProcess(u32),
}

/// The connection to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct Manager {
    to: Option<io::Result<(UnixDatagram, SocketAddr)>>,
    /// The last notification was lost, and this is logged.
    lost: AtomicBool,
}

// === impl Manager ===

impl Manager {
    /// Makes the connection that the environment names.
    pub fn from_environment() -> Manager {
        std::env::var_os(NOTIFY_SOCKET).map_or_else(Manager::default, |path| Manager::at(&path))
    }

    /// Makes the connection to a path or an abstract name.
    pub fn at(path: &OsStr) -> Manager {
        let to = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok((socket, address(path)?))
        });
        // An error is logged with the first notification, when the log is installed.
        Manager { to: Some(to), lost: AtomicBool::new(false) }
    }

    /// Sends a notification without waiting.
    pub fn tell(&self, notice: ServiceNotice) {
        match notice {
            ServiceNotice::Ready => self.send(&format!("READY=1\nMAINPID={}", std::process::id())),
            ServiceNotice::Reloading => {
                self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", clock::monotonic_micros()));
            }
            ServiceNotice::Stopping => self.send("STOPPING=1"),
            ServiceNotice::Alive => self.send("WATCHDOG=1"),
            ServiceNotice::MainProcess(pid) => self.send(&format!("MAINPID={pid}")),
        }
    }

    fn send(&self, message: &str) {
        let sent = match &self.to {
            None => return,
            Some(Ok((socket, to))) => socket.send_to_addr(message.as_bytes(), to).map(drop),
            Some(Err(error)) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        let lost_before = self.lost.swap(sent.is_err(), Ordering::Relaxed);
        if let (Err(error), false) = (sent, lost_before) {
            tracing::warn!(%error, notification = message, "cannot notify the service manager");
        }
    }
}

/// Returns the watchdog timeout of the service manager, if this process must notify.
pub fn watchdog() -> Option<Duration> {
    let for_this_process = std::env::var_os(WATCHDOG_PID)
        .is_none_or(|pid| pid.to_str() == Some(&std::process::id().to_string()));
    micros(std::env::var_os(WATCHDOG_USEC).filter(|_| for_this_process))
}

fn micros(text: Option<OsString>) -> Option<Duration> {
    let micros = text?.to_str()?.parse::<u64>().ok().filter(|micros| *micros > 1)?;
    Some(Duration::from_micros(micros))
}

/// Parses a path, or an abstract name after `@` (unix(7)).
fn address(path: &OsStr) -> io::Result<SocketAddr> {
    match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    }
}

/// Receives the next message at `socket`. For tests of this and other crates.
#[cfg(any(test, feature = "testing"))]
pub fn next_message(socket: &UnixDatagram) -> io::Result<String> {
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut bytes = [0; 200];
    let n = socket.recv(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..n]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_sent_to_a_path_or_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::at(path.as_os_str());
        manager.tell(ServiceNotice::Ready);
        assert_eq!(
            next_message(&socket).unwrap(),
            format!("READY=1\nMAINPID={}", std::process::id())
        );
        manager.tell(ServiceNotice::Reloading);
        let said = next_message(&socket).unwrap();
        let micros = said.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(micros.parse::<u64>().unwrap() > 0);

        let name = format!("tidegate-notify-{}", std::process::id());
        let socket =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Manager::at(OsStr::new(&format!("@{name}"))).tell(ServiceNotice::Stopping);
        assert_eq!(next_message(&socket).unwrap(), "STOPPING=1");
    }

    #[test]
    fn invalid_watchdog_timeout_is_ignored() {
        for text in ["0", "-1", "soon", ""] {
            assert_eq!(micros(Some(text.into())), None, "{text}");
        }
        assert_eq!(micros(Some("3000000".into())), Some(Duration::from_secs(3)));
    }
}
