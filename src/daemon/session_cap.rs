//! Lowers the session cap to what the file descriptor limit allows.
//!
//! Used by `config_reloads` for each configuration that is put in force. It opens no
//! file.

use std::sync::Arc;
use tidegate_core::balance::count::COUNT_MAX;
use tidegate_core::model::Config;

/// File descriptors that are not available to sessions: standard streams, log files,
/// epoll sets, rings, admin connections, probes.
const DESCRIPTORS_RESERVED: u64 = 256;

/// File descriptors per session: client and backend connection.
const DESCRIPTORS_PER_SESSION: u64 = 2;

/// Session cap of a file descriptor limit.
#[derive(Debug)]
pub(super) struct SessionCap {
    descriptors: u64,
    /// Configured and effective cap in the last warning.
    warned: Option<(u32, u32)>,
}

impl SessionCap {
    pub(super) fn new(descriptors: u64) -> SessionCap {
        SessionCap { descriptors, warned: None }
    }

    /// Returns `config` with `connections_max` lowered to what the file descriptor limit
    /// allows. Logs a warning if the configured or the effective value is new.
    pub(super) fn apply(&mut self, config: &Arc<Config>, listeners: usize) -> Arc<Config> {
        let own = DESCRIPTORS_RESERVED + listeners as u64;
        let allowed = self.descriptors.saturating_sub(own) / DESCRIPTORS_PER_SESSION;
        let allowed = u32::try_from(allowed.max(1)).unwrap_or(u32::MAX).min(COUNT_MAX);
        if config.process.connections_max <= allowed {
            self.warned = None;
            return Arc::clone(config);
        }
        if self.is_news(config.process.connections_max, allowed) {
            tracing::warn!(
                connections_max = config.process.connections_max,
                effective = allowed,
                descriptors = self.descriptors,
                "descriptor limit too low for connections_max; raise LimitNOFILE or ulimit -n"
            );
        }
        let mut lowered = Config::clone(config);
        lowered.process.connections_max = allowed;
        Arc::new(lowered)
    }

    fn is_news(&mut self, wanted: u32, allowed: u32) -> bool {
        self.warned.replace((wanted, allowed)) != Some((wanted, allowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_descriptor_limit_causes_one_warning_per_value() {
        let mut cap = SessionCap::new(1024);
        assert!(cap.is_news(5000, 384));
        assert!(!cap.is_news(5000, 384), "a reload does not repeat the warning");
        assert!(cap.is_news(5000, 380) && cap.is_news(6000, 380));
    }
}
