//! How many sessions the limit on open descriptors allows.
//!
//! Used by `config_reloads` for each configuration that comes into force. It opens
//! nothing.

use std::sync::Arc;
use tidegate_core::balance::count::COUNT_MAX;
use tidegate_core::model::Config;

/// Descriptors kept for everything but sessions: standard streams, log files,
/// epoll sets, rings, admin connections, probes.
const DESCRIPTORS_RESERVED: u64 = 256;

/// A session's: client and backend.
const DESCRIPTORS_A_SESSION: u64 = 2;

/// How many sessions the descriptor limit allows.
#[derive(Debug)]
pub(super) struct SessionCap {
    descriptors: u64,
    /// What was wanted and what was allowed when it was last said.
    said: Option<(u32, u32)>,
}

impl SessionCap {
    pub(super) fn new(descriptors: u64) -> SessionCap {
        SessionCap { descriptors, said: None }
    }

    /// `config` with a `connections_max` that cannot run out of descriptors;
    /// says so where that lowers it to another figure than before.
    pub(super) fn apply(&mut self, config: &Arc<Config>, listeners: usize) -> Arc<Config> {
        let own = DESCRIPTORS_RESERVED + listeners as u64;
        let allowed = self.descriptors.saturating_sub(own) / DESCRIPTORS_A_SESSION;
        let allowed = u32::try_from(allowed.max(1)).unwrap_or(u32::MAX).min(COUNT_MAX);
        if config.process.connections_max <= allowed {
            self.said = None;
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
        self.said.replace((wanted, allowed)) != Some((wanted, allowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_on_descriptors_is_said_once_for_each_figure() {
        let mut cap = SessionCap::new(1024);
        assert!(cap.is_news(5000, 384));
        assert!(!cap.is_news(5000, 384), "every reload would say it again");
        assert!(cap.is_news(5000, 380) && cap.is_news(6000, 380));
    }
}
