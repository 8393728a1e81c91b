//! Listening sockets passed by a service manager (sd_listen_fds(3)).
//!
//! `cli` takes them at the start of the process. `listeners` matches them to the
//! configuration by address. A socket without a matching address in the configuration is
//! an error, because its clients would wait without an answer.

use super::Failure;
use super::binds::{BindSockets, SocketOwner};
use crate::admin::{self, AdminListener};
use socket2::Socket;
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidegate_core::model::{AdminListen, BindKey, Config};
use tidegate_net::fd_channel;

/// Passed sockets that are not matched to the configuration yet.
#[derive(Debug)]
pub struct PassedSockets(Vec<PassedSocket>);

#[derive(Debug)]
struct PassedSocket {
    socket: Socket,
    /// The name that the service manager gave it.
    name: String,
    address: AdminListen,
}

/// Takes the passed sockets and their names according to the environment. Must be called
/// before the process opens a file descriptor.
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
    /// Reads the addresses of passed sockets.
    ///
    /// # Errors
    /// A descriptor is not a listening stream socket.
    pub fn of(passed: Vec<(String, OwnedFd)>) -> Result<PassedSockets, Failure> {
        let passed =
            passed.into_iter().map(|(name, fd)| PassedSocket::of(fd.into(), name).map_err(refuse));
        Ok(PassedSockets(passed.collect::<Result<_, _>>()?))
    }

    /// Takes the admin listener, if it was passed.
    pub(super) fn take_admin(&mut self, config: &Config) -> Option<AdminListener> {
        let at = self.0.iter().position(|passed| passed.address == config.admin.listen)?;
        admin::take_over(&config.admin, self.0.swap_remove(at).socket.into(), None)
    }

    /// Takes all other sockets.
    ///
    /// # Errors
    /// A socket has no matching bind address in `config`.
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
                AdminListen::Tcp(address) if wanted.contains(&passed.key(address)) => {
                    let empty =
                        || BindSockets { sockets: Vec::new(), holder: SocketOwner::ServiceManager };
                    let group = groups.entry(passed.key(address)).or_insert_with(empty);
                    group.sockets.push(Arc::new(passed.socket));
                }
                AdminListen::Unix(path) if wanted.contains(&BindKey::unix(path.clone())) => {
                    let sockets = vec![Arc::new(passed.socket)];
                    let group = BindSockets { sockets, holder: SocketOwner::ServiceManager };
                    groups.insert(BindKey::unix(path), group);
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
    /// Returns the key of a bind that this socket can serve.
    fn key(&self, address: SocketAddr) -> BindKey {
        let interface = self.socket.device().ok().flatten();
        let interface = interface.and_then(|name| String::from_utf8(name).ok());
        BindKey::tcp(address).on(interface.map(Into::into))
    }

    fn of(socket: Socket, name: String) -> Result<PassedSocket, String> {
        let stream = socket.r#type().is_ok_and(|kind| kind == socket2::Type::STREAM);
        if !stream || !socket.is_listener().unwrap_or(false) {
            return Err(format!("passed descriptor {name:?} is not a listening stream socket"));
        }
        let address = socket.local_addr().map_err(|error| error.to_string())?;
        let abstract_name = address
            .as_abstract_namespace()
            .map(|name| PathBuf::from(OsString::from_vec([b"@", name].concat())));
        let path = address.as_pathname().map(Path::to_owned).or(abstract_name);
        let address = match (address.as_socket(), path) {
            (Some(tcp), _) => AdminListen::Tcp(tcp),
            (None, Some(path)) => AdminListen::Unix(path),
            (None, None) => return Err(format!("passed descriptor {name:?} has no address")),
        };
        Ok(PassedSocket { socket, name, address })
    }
}
