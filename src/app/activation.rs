//! Listening sockets that a service manager has passed (sd_listen_fds(3)).
//!
//! Taken once, first thing in the process, and matched to the configuration by
//! address when it is known. A socket that nothing in the configuration asks for
//! is an error: somebody would connect to it and wait.

use super::Failure;
use super::binds::{Group, Holder};
use crate::admin::{self, AdminListener};
use crate::config::{AdminListen, Config};
use crate::net::handover;
use socket2::Socket;
use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What was passed and not yet asked for.
#[derive(Debug)]
pub struct Activated(Vec<Passed>);

#[derive(Debug)]
struct Passed {
    socket: Socket,
    /// The manager's word for it.
    name: String,
    address: AdminListen,
}

// === impl Activated ===

impl Activated {
    /// Takes what the environment says was passed. To be called before anything
    /// opens a descriptor.
    ///
    /// # Errors
    /// A descriptor is closed, or is no listening stream socket.
    pub fn take() -> Result<Option<Activated>, Failure> {
        let variable = |name: &str| std::env::var(name).ok();
        if variable("LISTEN_PID") != Some(std::process::id().to_string()) {
            return Ok(None);
        }
        let refuse = |why: String| Failure::Runtime(format!("socket activation: {why}"));
        let count = variable("LISTEN_FDS").unwrap_or_default();
        let count: usize = count
            .parse()
            .map_err(|_| refuse(format!("LISTEN_FDS is {count:?}, which is no number")))?;
        let fds = handover::take_activated(count).map_err(|error| refuse(error.to_string()))?;
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':').map(str::to_owned);
        let passed = |fd: OwnedFd| {
            let name = names.next().filter(|name| !name.is_empty());
            Passed::of(fd.into(), name.unwrap_or_else(|| "unknown".to_owned())).map_err(refuse)
        };
        Ok(Some(Activated(fds.into_iter().map(passed).collect::<Result<_, _>>()?)))
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
    ) -> Result<BTreeMap<SocketAddr, Group>, Failure> {
        let binds: HashSet<&SocketAddr> =
            config.frontends.iter().flat_map(|frontend| &frontend.binds).collect();
        let wanted = |address: &SocketAddr| binds.contains(address);
        let mut groups: BTreeMap<SocketAddr, Group> = BTreeMap::new();
        let mut unmatched = Vec::new();
        for passed in self.0 {
            match passed.address {
                AdminListen::Tcp(address) if wanted(&address) => {
                    let empty = || Group { sockets: Vec::new(), holder: Holder::Manager };
                    let group = groups.entry(address).or_insert_with(empty);
                    group.sockets.push(Arc::new(passed.socket));
                }
                other => unmatched.push(format!("{other} ({})", passed.name)),
            }
        }
        if unmatched.is_empty() {
            return Ok(groups);
        }
        Err(Failure::Runtime(format!(
            "socket activation: no bind of the configuration is {}",
            unmatched.join(", ")
        )))
    }
}

// === impl Passed ===

impl Passed {
    fn of(socket: Socket, name: String) -> Result<Passed, String> {
        let stream = socket.r#type().is_ok_and(|kind| kind == socket2::Type::STREAM);
        if !stream || !socket.is_listener().unwrap_or(false) {
            return Err(format!("what was passed as {name:?} is no listening stream socket"));
        }
        let address = socket.local_addr().map_err(|error| error.to_string())?;
        let address = match (address.as_socket(), address.as_pathname()) {
            (Some(tcp), _) => AdminListen::Tcp(tcp),
            (None, Some(path)) => AdminListen::Unix(path.to_owned()),
            (None, None) => return Err(format!("what was passed as {name:?} has no address")),
        };
        Ok(Passed { socket, name, address })
    }
}
