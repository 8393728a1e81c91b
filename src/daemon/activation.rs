//! Listening sockets that a service manager has passed (sd_listen_fds(3)).
//!
//! Taken once, first thing in the process, and matched to the configuration by
//! address when it is known. A socket that nothing in the configuration asks for
//! is an error: somebody would connect to it and wait.

use super::Failure;
use super::binds::{BindSockets, SocketOwner};
use crate::admin::{self, AdminListener};
use socket2::Socket;
use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tidegate_core::model::{AdminListen, BindKey, Config};
use tidegate_net::fd_channel;

/// What was passed and not yet asked for.
#[derive(Debug)]
pub struct PassedSockets(Vec<PassedSocket>);

#[derive(Debug)]
struct PassedSocket {
    socket: Socket,
    /// The manager's word for it.
    name: String,
    address: AdminListen,
}

/// Takes what the environment says was passed, with the manager's words for it. To be
/// called before anything opens a descriptor.
///
/// # Errors
/// A descriptor is closed.
pub fn passed() -> Result<Vec<(String, OwnedFd)>, Failure> {
    let variable = |name: &str| std::env::var(name).ok();
    if variable("LISTEN_PID") != Some(std::process::id().to_string()) {
        return Ok(Vec::new());
    }
    let count = variable("LISTEN_FDS").unwrap_or_default();
    let count: usize =
        count.parse().map_err(|_| refuse(format!("LISTEN_FDS = {count:?} is not a number")))?;
    let fds = fd_channel::take_activated(count).map_err(|error| refuse(error.to_string()))?;
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let named = |name: String| if name.is_empty() { "unknown".to_owned() } else { name };
    Ok(names.map(named).zip(fds).collect())
}

fn refuse(why: String) -> Failure {
    Failure::Runtime(format!("socket activation: {why}"))
}

// === impl PassedSockets ===

impl PassedSockets {
    /// Looks at what was passed.
    ///
    /// # Errors
    /// One is no listening stream socket.
    pub fn of(passed: Vec<(String, OwnedFd)>) -> Result<PassedSockets, Failure> {
        let passed =
            passed.into_iter().map(|(name, fd)| PassedSocket::of(fd.into(), name).map_err(refuse));
        Ok(PassedSockets(passed.collect::<Result<_, _>>()?))
    }

    /// The admin listener, if it is among them.
    pub(super) fn take_admin(&mut self, config: &Config) -> Option<AdminListener> {
        let at = self.0.iter().position(|passed| passed.address == config.admin.listen)?;
        admin::take_over(&config.admin, self.0.swap_remove(at).socket.into(), None)
    }

    /// Everything else.
    ///
    /// # Errors
    /// Some of it is no bind address of `config`.
    pub(super) fn take_sockets(
        self,
        config: &Config,
    ) -> Result<BTreeMap<BindKey, BindSockets>, Failure> {
        let binds = config.frontends.iter().flat_map(|frontend| &frontend.binds);
        let wanted: HashSet<&BindKey> = binds.map(|bind| &bind.key).collect();
        let mut groups: BTreeMap<BindKey, BindSockets> = BTreeMap::new();
        let mut unmatched = Vec::new();
        for passed in self.0 {
            match passed.address {
                AdminListen::Tcp(address) if wanted.contains(&BindKey::tcp(address)) => {
                    let empty =
                        || BindSockets { sockets: Vec::new(), holder: SocketOwner::ServiceManager };
                    let group = groups.entry(BindKey::tcp(address)).or_insert_with(empty);
                    group.sockets.push(Arc::new(passed.socket));
                }
                other => unmatched.push(format!("{other} ({})", passed.name)),
            }
        }
        if unmatched.is_empty() {
            return Ok(groups);
        }
        Err(Failure::Runtime(format!(
            "socket activation: no bind in the configuration matches {}",
            unmatched.join(", ")
        )))
    }
}

// === impl PassedSocket ===

impl PassedSocket {
    fn of(socket: Socket, name: String) -> Result<PassedSocket, String> {
        let stream = socket.r#type().is_ok_and(|kind| kind == socket2::Type::STREAM);
        if !stream || !socket.is_listener().unwrap_or(false) {
            return Err(format!("passed descriptor {name:?} is not a listening stream socket"));
        }
        let address = socket.local_addr().map_err(|error| error.to_string())?;
        let address = match (address.as_socket(), address.as_pathname()) {
            (Some(tcp), _) => AdminListen::Tcp(tcp),
            (None, Some(path)) => AdminListen::Unix(path.to_owned()),
            (None, None) => return Err(format!("passed descriptor {name:?} has no address")),
        };
        Ok(PassedSocket { socket, name, address })
    }
}
