//! Telling how the process is: a service manager, or the supervisor, which tells one.
//!
//! Owned by the control loop, which says when: ready, reloading, stopping, alive, and
//! which process to look at after an upgrade. It knows the watchdog's times.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_supervisor::Link;
use tidegate_supervisor::manager::{self, Manager, ServiceNotice};

/// The way to whom it concerns, if there is anybody.
#[derive(Debug, Default)]
pub struct Notifier {
    to: To,
    /// Half of what the manager waits before it acts.
    beat: Option<Duration>,
    next_beat: Option<Instant>,
    /// Another process speaks for the service.
    quiet: bool,
}

#[derive(Debug, Default)]
enum To {
    #[default]
    Nobody,
    Manager(Manager),
    Supervisor(Arc<Link>),
}

// === impl Notifier ===

impl Notifier {
    /// To the service manager that the environment names.
    pub fn from_environment() -> Notifier {
        Notifier::new(To::Manager(Manager::from_environment()), manager::watchdog())
    }

    /// To the supervisor.
    pub fn to_supervisor(link: Arc<Link>) -> Notifier {
        Notifier::new(To::Supervisor(link), manager::watchdog())
    }

    fn new(to: To, watchdog: Option<Duration>) -> Notifier {
        let beat = watchdog.map(|time| time / 2);
        Notifier { to, beat, next_beat: None, quiet: false }
    }

    /// Serving, on the configuration in force.
    pub(super) fn ready(&self) {
        self.tell(ServiceNotice::Ready);
    }

    /// Reading the configuration again; [`Notifier::ready`] ends it.
    pub(super) fn reloading(&self) {
        self.tell(ServiceNotice::Reloading);
    }

    pub(super) fn stopping(&self) {
        self.tell(ServiceNotice::Stopping);
    }

    /// Another process is the service now: what it says of itself counts, and this one's
    /// word no longer.
    pub(super) fn successor(&mut self, pid: u32) {
        self.tell(ServiceNotice::MainProcess(pid));
        self.quiet = true;
    }

    /// This process is the service again.
    pub(super) fn goes_on(&mut self) {
        self.quiet = false;
        self.ready();
    }

    /// When [`Notifier::beat`] is wanted next; never without a watchdog.
    pub(super) fn next_beat(&self, now: Instant) -> Option<Instant> {
        self.beat.filter(|_| !self.quiet)?;
        Some(self.next_beat.unwrap_or(now))
    }

    /// The control loop is alive, and so are the workers: said unless one has
    /// been `stalled` for as long as the manager waits. Another such time later
    /// it acts.
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
            To::Nobody => {}
            To::Manager(manager) => manager.tell(notice),
            To::Supervisor(link) => link.notify(notice),
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
    fn the_watchdog_is_fed_at_half_its_time_while_this_process_is_the_service() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let to = To::Manager(Manager::at(path.as_os_str()));
        let mut notifier = Notifier::new(to, Some(Duration::from_secs(3)));
        let now = clock::now();
        assert_eq!(notifier.next_beat(now), Some(now));
        notifier.beat(now, None);
        assert_eq!(next_message(&socket).unwrap(), "WATCHDOG=1");
        let three = Duration::from_secs(3);
        notifier.beat(now, Some(three));
        notifier.beat(now, Some(three - Duration::from_millis(1)));
        assert_eq!(next_message(&socket).unwrap(), "WATCHDOG=1", "said once");
        assert_eq!(notifier.next_beat(now), Some(now + Duration::from_millis(1500)));
        notifier.successor(77);
        assert_eq!(next_message(&socket).unwrap(), "MAINPID=77");
        notifier.beat(now, None);
        notifier.stopping();
        assert_eq!(notifier.next_beat(now), None);
        notifier.goes_on();
        assert!(next_message(&socket).unwrap().starts_with("READY=1"), "nothing meanwhile");
    }
}
