//! Checks periodically how many local ports each backend uses.
//!
//! Part of `telemetry`. It compares the counts of the table with the limits of the
//! kernel, a few backends per step. It reserves no ports.

use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_core::control::source_ports::{self, PortLimits, PortLook, PortWatch, Reuse};
use tidegate_core::control::{Controller, Notice};
use tidegate_core::table::state::BackendState;
use tidegate_net::ports::LocalPorts;

/// Warnings shown in status.
const WARNINGS_MAX: usize = 8;

/// Backends checked per step. A step takes about 0.5 ms.
const BACKENDS_MAX: usize = 1_000;

/// Time between two steps of a check.
const PAUSE: Duration = Duration::from_millis(1);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct PortSampler {
    next: Instant,
    /// Shared with a running rendering.
    watch: Arc<PortWatch>,
    local_ports: LocalPorts,
    /// The running check, and when it started.
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

    /// Returns when [`PortSampler::sample`] is due.
    pub(super) fn due(&self) -> Instant {
        self.next
    }

    /// Returns the results so far.
    pub(super) fn watch(&self) -> Arc<PortWatch> {
        Arc::clone(&self.watch)
    }

    /// Returns the limits of the kernel.
    pub(super) fn limits(&self) -> PortLimits {
        let reuse = match self.local_ports.tw_reuse {
            0 => Reuse::Never,
            1 => Reuse::Always,
            _ => Reuse::Loopback,
        };
        PortLimits { ports: self.local_ports.count, reuse }
    }

    /// Checks the ports of up to [`BACKENDS_MAX`] backends. Returns notices after the
    /// last backend.
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

/// Returns the warnings about local ports, at most [`WARNINGS_MAX`].
pub(super) fn warnings<'a>(
    watch: &PortWatch,
    limits: PortLimits,
    backends: impl Iterator<Item = &'a Arc<BackendState>>,
) -> Vec<String> {
    let mut warnings = Vec::new();
    for backend in backends.filter(|_| watch.warnings() > 0) {
        for addr in backend.source_addrs.load().iter() {
            if watch.is_warned(backend.id, addr.source()) && warnings.len() < WARNINGS_MAX {
                let used = watch.used(backend, addr, limits);
                warnings.push(source_ports::warning_text(backend, addr, used, limits));
            }
        }
    }
    warnings
}
