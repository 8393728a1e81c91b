//! Sockets from another process: from the old process of an upgrade, or from a crashed
//! process whose sockets the supervisor holds.
//!
//! Filled by `upgrade` and `supervised`, used by `listeners`. It opens no socket.

use super::binds::BindSockets;
use super::upgrade::OfferedAdmin;
use crate::admin::{self, AdminListener};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use tidegate_core::model::{Admin, BindKey};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct GivenSockets {
    pub(super) binds: BTreeMap<BindKey, BindSockets>,
    pub(super) admin: Option<(OfferedAdmin, OwnedFd)>,
    /// Sockets for heartbeats with their configured addresses.
    pub(super) heartbeats: Vec<(SocketAddr, OwnedFd)>,
}

// === impl GivenSockets ===

impl GivenSockets {
    /// Takes the admin listener, if it listens on the address that `wanted` names.
    pub(super) fn take_admin(&mut self, wanted: &Admin) -> Option<AdminListener> {
        let (offered, socket) = self.admin.take()?;
        (offered.listen == wanted.listen.to_string())
            .then(|| admin::take_over(wanted, socket, offered.file))?
    }
}
