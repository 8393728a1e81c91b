//! Sockets that this process has from another one: of an old process, or of one that has
//! crashed and whose sockets its supervisor holds.
//!
//! Filled by `upgrade` and `supervised`, taken by `listeners`. It opens nothing.

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
    /// By the addresses that heartbeats are received at.
    pub(super) heartbeats: Vec<(SocketAddr, OwnedFd)>,
}

// === impl GivenSockets ===

impl GivenSockets {
    /// The admin listener, where it is the one that `wanted` names.
    pub(super) fn take_admin(&mut self, wanted: &Admin) -> Option<AdminListener> {
        let (offered, socket) = self.admin.take()?;
        (offered.listen == wanted.listen.to_string())
            .then(|| admin::take_over(wanted, socket, offered.file))?
    }
}
