//! Looks at the local ports of backends now and then, a few backends in one turn.
//!
//! Part of `telemetry`. It only reads what the table counts and what the kernel allows;
//! it reserves nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::source_ports::{self, PortLimits, PortLook, PortWatch, Reuse};
use tidegate_core::control::{Controller, Notice};
use tidegate_core::table::state::BackendState;
use tidegate_net::ports::LocalPorts;

/// Warnings that status shows.
const WARNINGS_MAX: usize = 8;

/// Backends whose local ports are looked at in one turn: some half a millisecond.
const BACKENDS_MAX: usize = 1_000;

/// From one turn of a look to the next.
const PAUSE: Duration = Duration::from_millis(1);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct PortSampler {
    next: Instant,
    /// Shared with a rendering that is under way.
    watch: Arc<PortWatch>,
    local_ports: LocalPorts,
    /// The look that is under way, and when it began.
    look: Option<(PortLook, Instant)>,
}

// === impl PortSampler ===

impl PortSampler {
    pub(super) fn new(now: Instant) -> PortSampler {
        PortSampler {
            next: now,
            watch: Arc::default(),
            local_ports: LocalPorts::open(),
            look: None,
        }
    }

    /// When [`PortSampler::sample`] is wanted next.
    pub(super) fn due(&self) -> Instant {
        self.next
    }

    /// What is known of the ports.
    pub(super) fn watch(&self) -> Arc<PortWatch> {
        Arc::clone(&self.watch)
    }

    /// What the kernel allows.
    pub(super) fn limits(&self) -> PortLimits {
        let reuse = match self.local_ports.tw_reuse {
            0 => Reuse::Never,
            1 => Reuse::Always,
            _ => Reuse::Loopback,
        };
        PortLimits { ports: self.local_ports.count, reuse }
    }

    /// Looks at some backends' ports; gives what there is to say once all backends have
    /// had their turn.
    pub(super) fn sample(&mut self, controller: &Controller, now: Instant) -> Vec<Notice> {
        let (mut look, began) = self.look.take().unwrap_or_else(|| {
            self.local_ports.read();
            (PortLook::default(), now)
        });
        let limits = self.limits();
        let watch = Arc::make_mut(&mut self.watch);
        let backends = controller.backends_after(look.after()).take(BACKENDS_MAX);
        watch.sample(&mut look, backends, limits);
        if controller.backends_after(look.after()).next().is_some() {
            self.look = Some((look, began));
            self.next = now + PAUSE;
            return Vec::new();
        }
        self.next = (began + source_ports::LOOK).max(now + PAUSE);
        watch.complete(look)
    }
}

/// What an operator should know of local ports, in words; [`WARNINGS_MAX`] at most.
pub(super) fn warnings<'a>(
    watch: &PortWatch,
    limits: PortLimits,
    backends: impl Iterator<Item = &'a Arc<BackendState>>,
) -> Vec<String> {
    let mut words = Vec::new();
    for backend in backends.filter(|_| watch.warnings() > 0) {
        for way in backend.source_addrs.load().iter() {
            if watch.is_warned(backend.id, way.source()) && words.len() < WARNINGS_MAX {
                let used = watch.used(backend, way, limits);
                words.push(source_ports::warning_text(backend, way, used, limits));
            }
        }
    }
    words
}
