//! Reports the state of the process to a service manager, directly or through the
//! supervisor.
//!
//! Owned by `lifecycle`. It reports ready, reloading, stopping, watchdog notifications,
//! and the main process after an upgrade. It never decides about the state.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_supervisor::Link;
use tidegate_supervisor::manager::{self, Manager, ServiceNotice};

/// Sends notifications to a service manager, if there is one.
#[derive(Debug, Default)]
pub struct Notifier {
    to: Recipient,
    /// Half of the watchdog time of the service manager.
    beat: Option<Duration>,
    next_beat: Option<Instant>,
    /// Another process is the main process of the service.
    quiet: bool,
}

#[derive(Debug, Default)]
enum Recipient {
    #[default]
    None,
    Manager(Manager),
    Supervisor(Arc<Link>),
}

// === impl Notifier ===

impl Notifier {
    /// Creates a notifier for the service manager that the environment names.
    pub fn from_environment() -> Notifier {
        Notifier::new(Recipient::Manager(Manager::from_environment()), manager::watchdog())
    }

    /// Creates a notifier that uses the supervisor.
    pub fn to_supervisor(link: Arc<Link>) -> Notifier {
        Notifier::new(Recipient::Supervisor(link), manager::watchdog())
    }

    fn new(to: Recipient, watchdog: Option<Duration>) -> Notifier {
        let beat = watchdog.map(|time| time / 2);
        Notifier { to, beat, next_beat: None, quiet: false }
    }

    /// Reports that the process serves with the configuration in force.
    pub(super) fn ready(&self) {
        self.tell(ServiceNotice::Ready);
    }

    /// Reports the start of a reload. [`Notifier::ready`] reports its end.
    pub(super) fn reloading(&self) {
        self.tell(ServiceNotice::Reloading);
    }

    pub(super) fn stopping(&self) {
        self.tell(ServiceNotice::Stopping);
    }

    /// Reports the new process as the main process. This process then sends nothing.
    pub(super) fn hand_over(&mut self, pid: u32) {
        self.tell(ServiceNotice::MainProcess(pid));
        self.quiet = true;
    }

    /// Reports this process as the serving process again.
    pub(super) fn resume(&mut self) {
        self.quiet = false;
        self.ready();
    }

    /// Returns when [`Notifier::beat`] is due; `None` without a watchdog.
    pub(super) fn next_beat(&self, now: Instant) -> Option<Instant> {
        self.beat.filter(|_| !self.quiet)?;
        Some(self.next_beat.unwrap_or(now))
    }

    /// Notifies the watchdog, unless a worker has been `stalled` for the watchdog time.
    /// The service manager then acts after one more watchdog time.
    pub(super) fn beat(&mut self, now: Instant, stalled: Option<Duration>) {
        if let Some(beat) = self.beat {
            if stalled.is_none_or(|stalled| stalled < beat * 2) {
                self.tell(ServiceNotice::Alive);
            }
            self.next_beat = Some(now + beat);
        }
    }

    fn tell(&self, notice: ServiceNotice) {
        match &self.to {
            _ if self.quiet => {}
            Recipient::None => {}
            Recipient::Manager(manager) => manager.tell(notice),
            Recipient::Supervisor(link) => link.notify(notice),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;
    use tidegate_net::clock;
    use tidegate_supervisor::manager::next_message;

    #[test]
    fn watchdog_is_notified_at_half_its_time_while_this_is_the_main_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let to = Recipient::Manager(Manager::at(path.as_os_str()));
        let mut notifier = Notifier::new(to, Some(Duration::from_secs(3)));
        let now = clock::now();
        assert_eq!(notifier.next_beat(now), Some(now));
        notifier.beat(now, None);
        assert_eq!(next_message(&socket).unwrap(), "WATCHDOG=1");
        let three = Duration::from_secs(3);
        notifier.beat(now, Some(three));
        notifier.beat(now, Some(three - Duration::from_millis(1)));
        assert_eq!(next_message(&socket).unwrap(), "WATCHDOG=1", "sent once");
        assert_eq!(notifier.next_beat(now), Some(now + Duration::from_millis(1500)));
        notifier.hand_over(77);
        assert_eq!(next_message(&socket).unwrap(), "MAINPID=77");
        notifier.beat(now, None);
        notifier.stopping();
        assert_eq!(notifier.next_beat(now), None);
        notifier.resume();
        assert!(next_message(&socket).unwrap().starts_with("READY=1"), "nothing before READY");
    }
}
