//! Telling a service manager how the process is (sd_notify(3)): ready, reloading,
//! stopping, alive, and which process to look at after an upgrade.
//!
//! Owned by the control loop. Datagrams to `NOTIFY_SOCKET`, sent without waiting;
//! one that is lost is lost. Without that variable nothing is sent.

use crate::clock;
use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// Without a watchdog there is nothing to do for so long.
const NEVER: Duration = Duration::from_secs(3600);

/// The way to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
    /// Half of what the manager waits before it acts.
    beat: Option<Duration>,
    next_beat: Option<Instant>,
}

// === impl Notifier ===

impl Notifier {
    /// As the environment says.
    pub fn from_environment() -> Notifier {
        let variable = |name: &str| std::env::var_os(name);
        let Some(path) = variable("NOTIFY_SOCKET") else { return Notifier::default() };
        let for_us = variable("WATCHDOG_PID")
            .is_none_or(|pid| pid.to_str() == Some(&std::process::id().to_string()));
        let micros = variable("WATCHDOG_USEC").filter(|_| for_us);
        Notifier::to(&path, micros.as_deref())
    }

    fn to(path: &OsStr, watchdog_micros: Option<&OsStr>) -> Notifier {
        let micros = watchdog_micros
            .and_then(OsStr::to_str)
            .and_then(|text| text.parse::<u64>().ok())
            .filter(|micros| *micros > 1);
        let to = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok((socket, address(path)?))
        });
        match to {
            Ok(to) => Notifier {
                to: Some(to),
                beat: micros.map(|micros| Duration::from_micros(micros / 2)),
                next_beat: None,
            },
            Err(error) => {
                tracing::warn!(%error, "NOTIFY_SOCKET cannot be used");
                Notifier::default()
            }
        }
    }

    /// Serving, on the configuration in force.
    pub(super) fn ready(&self) {
        self.send(&format!("READY=1\nMAINPID={}", std::process::id()));
    }

    /// Reading the configuration again; [`Notifier::ready`] ends it.
    pub(super) fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", clock::monotonic_micros()));
    }

    pub(super) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Another process is the service now.
    pub(super) fn successor(&mut self, pid: u32) {
        self.send(&format!("MAINPID={pid}"));
        // What it says of itself counts, and this one's word no longer.
        *self = Notifier::default();
    }

    /// When [`Notifier::beat`] is wanted next.
    pub(super) fn next_beat(&self, now: Instant) -> Instant {
        match self.beat {
            Some(_) => self.next_beat.unwrap_or(now),
            None => now + NEVER,
        }
    }

    /// The control loop is alive, and so are the workers: said unless one has
    /// been `stalled` for as long as the manager waits. Another such time later
    /// it acts.
    pub(super) fn beat(&mut self, now: Instant, stalled: Option<Duration>) {
        if let Some(beat) = self.beat {
            if stalled.is_none_or(|stalled| stalled < beat * 2) {
                self.send("WATCHDOG=1");
            }
            self.next_beat = Some(now + beat);
        }
    }

    fn send(&self, message: &str) {
        if let Some((socket, to)) = &self.to
            && let Err(error) = socket.send_to_addr(message.as_bytes(), to)
        {
            tracing::warn!(%error, "the service manager cannot be told: {message:?}");
        }
    }
}

/// A path, or an abstract name behind `@` (unix(7)).
fn address(path: &OsStr) -> std::io::Result<SocketAddr> {
    match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = [0; 200];
        let n = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    }

    #[test]
    fn messages_go_to_a_path_or_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::to(path.as_os_str(), None);
        notifier.ready();
        assert_eq!(receive(&manager), format!("READY=1\nMAINPID={}", std::process::id()));
        notifier.reloading();
        let said = receive(&manager);
        let micros = said.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(micros.parse::<u64>().unwrap() > 0);

        let name = format!("tidegate-notify-{}", std::process::id());
        let manager =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notifier::to(OsStr::new(&format!("@{name}")), None).stopping();
        assert_eq!(receive(&manager), "STOPPING=1");
    }

    #[test]
    fn the_watchdog_is_fed_at_half_its_time_until_somebody_else_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let mut notifier = Notifier::to(path.as_os_str(), Some(OsStr::new("3000000")));
        let now = clock::now();
        assert_eq!(notifier.next_beat(now), now);
        notifier.beat(now, None);
        assert_eq!(receive(&manager), "WATCHDOG=1");
        let three = Duration::from_secs(3);
        notifier.beat(now, Some(three));
        notifier.beat(now, Some(three - Duration::from_millis(1)));
        assert_eq!(receive(&manager), "WATCHDOG=1", "said once");
        assert_eq!(notifier.next_beat(now), now + Duration::from_millis(1500));
        notifier.successor(77);
        assert_eq!(receive(&manager), "MAINPID=77");
        notifier.beat(now, None);
        notifier.stopping();
        manager.set_nonblocking(true).unwrap();
        assert!(manager.recv(&mut [0; 9]).is_err());
        assert!(notifier.next_beat(now) > now + Duration::from_secs(60));
    }

    #[test]
    fn a_senseless_watchdog_is_none() {
        for text in ["0", "-1", "soon", ""] {
            let notifier = Notifier::to(OsStr::new("/nowhere"), Some(OsStr::new(text)));
            assert!(notifier.beat.is_none(), "{text}");
        }
    }
}
