//! What the control loop looks after now and then: local ports that run out,
//! and what a shortage on this machine has put off.
//!
//! Called by the control loop's ticks. It only ever tries again; what it cannot
//! do it leaves for the next time.

use super::control_loop::Control;
use crate::admin::ReloadError;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::ControlEffect;
use tidegate_core::control::source_ports::{self, PortLimits, PortLook, PortWatch, Reuse};
use tidegate_core::metrics::counters::LocalErrorPlace;
use tidegate_core::table::state::BackendState;
use tidegate_dataplane::local_errors;
use tidegate_net::clock;
use tidegate_net::ports::LocalPorts;

/// How often what was put off is tried again: well within the second in which
/// everything is to be back.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// Troubles that status shows.
const TROUBLES_MAX: usize = 8;

/// Backends whose local ports are looked at in one turn: some half a millisecond.
const PORTS_MAX: usize = 1_000;

/// From one turn of a look to the next.
const PORTS_PAUSE: Duration = Duration::from_millis(1);

/// What is looked after.
#[derive(Debug)]
pub(super) struct Maintenance {
    next: Instant,
    next_look: Instant,
    /// Shared with a rendering that is under way.
    pub(super) ports: Arc<PortWatch>,
    local_ports: LocalPorts,
    /// The look at them that is under way, and when it began.
    look: Option<(PortLook, Instant)>,
    /// A changed file that could not be read for want of something of ours.
    reload: bool,
}

// === impl Maintenance ===

impl Maintenance {
    pub(super) fn new(now: Instant) -> Maintenance {
        Maintenance {
            next: now,
            next_look: now,
            ports: Arc::default(),
            local_ports: LocalPorts::open(),
            look: None,
            reload: false,
        }
    }

    /// When [`Control::upkeep`] is wanted next.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    pub(super) fn limits(&self) -> PortLimits {
        let reuse = match self.local_ports.tw_reuse {
            0 => Reuse::Never,
            1 => Reuse::Always,
            _ => Reuse::Loopback,
        };
        PortLimits { ports: self.local_ports.count, reuse }
    }

    fn schedule_retry(&mut self) {
        self.next = self.next.min(clock::now() + TRY_AGAIN);
    }
}

/// What an operator had better know of, in words; a few of them at most.
pub(super) fn warnings<'a>(
    watch: &PortWatch,
    limits: PortLimits,
    backends: impl Iterator<Item = &'a Arc<BackendState>>,
) -> Vec<String> {
    let mut words = Vec::new();
    for backend in backends.filter(|_| watch.warnings() > 0) {
        for way in backend.ways.load().iter() {
            if watch.is_warned(backend.id, way.source()) && words.len() < TROUBLES_MAX {
                let used = watch.used(backend, way, limits);
                words.push(source_ports::warning_text(backend, way, used, limits));
            }
        }
    }
    words
}

impl Control {
    pub(super) async fn upkeep(&mut self) {
        let now = clock::now();
        if self.upkeep.reload && self.upgrades.postpones_reload() {
            // Whoever serves after it reads the file anyway.
            self.upkeep.reload = false;
        }
        // Nothing is bound anew any more.
        self.upkeep.reload &= self.draining.is_none();
        if self.upkeep.reload && can_read(&self.path) {
            self.upkeep.reload = false;
            self.reload_and_retry().await;
        }
        if now >= self.upkeep.next_look {
            self.look_at_ports(now);
        }
        self.upkeep.next = self.upkeep.next_look;
        if self.upkeep.reload {
            self.upkeep.schedule_retry();
        }
        self.write_pid_file();
    }

    /// Looks at some backends' ports, and says what came out once all have had
    /// their turn.
    fn look_at_ports(&mut self, now: Instant) {
        let (mut look, began) = self.upkeep.look.take().unwrap_or_else(|| {
            self.upkeep.local_ports.read();
            (PortLook::default(), now)
        });
        let limits = self.upkeep.limits();
        let watch = Arc::make_mut(&mut self.upkeep.ports);
        let backends = self.controller.backends_after(look.after()).take(PORTS_MAX);
        watch.sample(&mut look, backends, limits);
        if self.controller.backends_after(look.after()).next().is_some() {
            self.upkeep.look = Some((look, began));
            self.upkeep.next_look = now + PORTS_PAUSE;
            return;
        }
        let notices = watch.complete(look);
        self.upkeep.next_look = (began + source_ports::LOOK).max(now + PORTS_PAUSE);
        self.apply_effects(notices.into_iter().map(ControlEffect::Notice).collect());
    }

    /// Reloads because the file has changed or a signal came: nobody waits for
    /// the answer, so where we ran short of something it is done later.
    pub(super) async fn reload_and_retry(&mut self) {
        let Err(refused) = self.reload().await else { return };
        let ReloadError::Problems(problems) = refused else { return };
        let Some(error) = problems.iter().find_map(|problem| shortage(&problem.message)) else {
            return;
        };
        self.local.local_trouble(local_errors::local_kind(&error), LocalErrorPlace::Reload);
        tracing::warn!(%error, "the reload is tried again as soon as that is over");
        self.upkeep.reload = true;
        self.upkeep.schedule_retry();
    }

    /// Leaves this process's number; where it cannot be written, it is tried again. After
    /// an upgrade another process's number is to stand there.
    pub(super) fn write_pid_file(&mut self) {
        if self.upgrades.handed_over() {
            return;
        }
        if let Some(file) = &mut self.pid_file {
            file.write();
            if !file.is_written() {
                self.upkeep.schedule_retry();
            }
        }
    }
}

/// Whether the shortage is over, as far as a file can tell.
fn can_read(path: &std::path::Path) -> bool {
    match File::open(path) {
        Ok(_) => true,
        Err(error) => local_errors::local_error_kind(&error).is_none(),
    }
}

/// The shortage of our own that a refusal speaks of, by the kernel's words for
/// it: what comes from many places comes as text.
fn shortage(message: &str) -> Option<io::Error> {
    let message = message.to_lowercase();
    // One's words begin with another's: the longer first.
    let all = [libc::ENFILE, libc::EMFILE, libc::ENOMEM, libc::ENOBUFS, libc::ENOSPC];
    all.into_iter().map(io::Error::from_raw_os_error).find(|error| {
        let text = error.to_string().to_lowercase();
        let words = text.split(" (os error").next().unwrap_or_default();
        message.contains(words)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_told_from_a_bad_file() {
        let errno = |message| shortage(message).and_then(|error| error.raw_os_error());
        assert_eq!(errno("cannot open the file: too many open files"), Some(libc::EMFILE));
        assert_eq!(errno("x: Too many open files in system (os error 23)"), Some(libc::ENFILE));
        assert_eq!(errno("cannot open the file: no such file or directory"), None);
        assert_eq!(errno("unknown key \"pols\" in [frontend.web]"), None);
    }
}
