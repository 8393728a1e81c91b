//! Telling a service manager how this process is (sd_notify(3)): ready, reloading,
//! stopping, alive.
//!
//! Used by the supervisor and, where there is none, by `daemon::notify`. Datagrams to
//! `NOTIFY_SOCKET`, sent without waiting; one that is lost is lost, and the log names the
//! first in a row. Without that variable nothing is sent.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tidegate_net::clock;

/// Where to send.
pub(super) const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// How long the manager waits for a word before it acts, and whose word.
pub(super) const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
pub(super) const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// What is told of the service, to a manager or by a process to its supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceNotice {
    /// It serves, on the configuration in force.
    Ready,
    /// It reads the configuration again; [`ServiceNotice::Ready`] ends that.
    Reloading,
    /// It drains.
    Stopping,
    /// The sign of life that a watchdog wants.
    Alive,
    /// That process is the service from now on.
    MainProcess(u32),
}

/// The way to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct Manager {
    to: Option<io::Result<(UnixDatagram, SocketAddr)>>,
    /// The last message was lost: the log says so once.
    lost: AtomicBool,
}

// === impl Manager ===

impl Manager {
    /// As the environment says.
    pub fn from_environment() -> Manager {
        std::env::var_os(NOTIFY_SOCKET).map_or_else(Manager::default, |path| Manager::at(&path))
    }

    /// At a path or an abstract name.
    pub fn at(path: &OsStr) -> Manager {
        let to = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok((socket, address(path)?))
        });
        // What is wrong with it is logged with the first message: there is a log by then.
        Manager { to: Some(to), lost: AtomicBool::new(false) }
    }

    /// Tells it; a message that is lost is lost.
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

/// What the manager wants a sign of life within, where it wants one of this process.
pub fn watchdog() -> Option<Duration> {
    let for_us = std::env::var_os(WATCHDOG_PID)
        .is_none_or(|pid| pid.to_str() == Some(&std::process::id().to_string()));
    micros(std::env::var_os(WATCHDOG_USEC).filter(|_| for_us))
}

fn micros(text: Option<OsString>) -> Option<Duration> {
    let micros = text?.to_str()?.parse::<u64>().ok().filter(|micros| *micros > 1)?;
    Some(Duration::from_micros(micros))
}

/// A path, or an abstract name behind `@` (unix(7)).
fn address(path: &OsStr) -> io::Result<SocketAddr> {
    match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    }
}

/// The next message at `socket`, for tests of this member and of others.
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
    fn messages_go_to_a_path_or_an_abstract_name() {
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
    fn a_senseless_watchdog_is_none() {
        for text in ["0", "-1", "soon", ""] {
            assert_eq!(micros(Some(text.into())), None, "{text}");
        }
        assert_eq!(micros(Some("3000000".into())), Some(Duration::from_secs(3)));
    }
}
