//! Errors of binding an address: which socket uses it, which process holds that socket,
//! and what the operator can do.
//!
//! Created by `binds` and `preflight`. Start, reload and `check` show the text.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use tidegate_config::{Origin, Problem, Spot};
use tidegate_core::model::{BackendAddr, BindKey, Config};
use tidegate_net::holders::{self, Holder, ListeningSocket};

/// An address that could not be bound.
#[derive(Debug)]
pub(super) struct BindError {
    pub(super) key: Box<BindKey>,
    pub(super) error: io::Error,
    /// A socket that already listens on this address.
    pub(super) other: Option<ListeningSocket>,
    /// The process that holds that socket, if this process has the right to see it.
    holder: Option<Holder>,
}

/// Returns the processes that listen on the ports of `config`. Called before the sandbox
/// removes the right to inspect other processes.
pub(super) fn holders_in_the_way(config: &Config) -> Vec<(u64, Holder)> {
    let binds = config.frontends.iter().flat_map(|frontend| &frontend.binds);
    let addresses = binds.filter_map(|bind| bind.key.socket_addr());
    let ports: HashSet<u16> = addresses.map(|address| address.port()).collect();
    let mut others = holders::listening().unwrap_or_default();
    others.retain(|other| ports.contains(&other.address.port()));
    others.truncate(HOLDERS_MAX);
    others
        .iter()
        .filter_map(|other| holders::holder(other.socket).map(|holder| (other.socket, holder)))
        .collect()
}

/// Sockets whose process is looked up at most.
const HOLDERS_MAX: usize = 16;

impl BindError {
    /// Creates the error and looks up the socket that uses the address.
    pub(super) fn new(key: &BindKey, error: io::Error) -> BindError {
        let Some(address) = key.socket_addr() else { return BindError::of_unix(key, error) };
        let taken = error.kind() == ErrorKind::AddrInUse;
        let all = if taken { holders::listening().unwrap_or_default() } else { Vec::new() };
        let exact = all.iter().find(|other| other.address == address);
        let wide = all.iter().find(|other| holders::overlap(other.address, address));
        // An IPv6 wildcard socket may also accept IPv4.
        let both = all.iter().find(|other| {
            other.address.ip().is_unspecified() && other.address.port() == address.port()
        });
        let other = exact.or(wide).or(both).copied();
        let holder = other.and_then(|other| holders::holder(other.socket));
        BindError { key: Box::new(key.clone()), error, other, holder }
    }

    fn of_unix(key: &BindKey, error: io::Error) -> BindError {
        let taken = error.kind() == ErrorKind::AddrInUse;
        let socket = key.unix_path().filter(|_| taken).and_then(holders::listening_at);
        let holder = socket.and_then(holders::holder);
        BindError { key: Box::new(key.clone()), error, other: None, holder }
    }

    /// Creates the error for an address that `other` uses.
    pub(super) fn taken(key: &BindKey, other: ListeningSocket) -> BindError {
        let holder = holders::holder(other.socket);
        BindError {
            key: Box::new(key.clone()),
            error: ErrorKind::AddrInUse.into(),
            other: Some(other),
            holder,
        }
    }

    /// Adds the process from an earlier lookup.
    pub(super) fn with(mut self, known: &[(u64, Holder)]) -> BindError {
        let known =
            known.iter().find(|(socket, _)| self.other.is_some_and(|o| o.socket == *socket));
        self.holder = self.holder.or_else(|| known.map(|(_, holder)| holder.clone()));
        self
    }

    /// Returns whether a `tidegate` process uses the address.
    pub(super) fn is_held_by_this_program(&self) -> bool {
        self.holder.as_ref().is_some_and(|holder| holder.program == "tidegate")
    }

    /// Returns the problem with its position in the file.
    pub(super) fn problem(&self, config: &Config, origin: &Origin) -> Problem {
        let mut message = self.to_string();
        let backend = self.other.and_then(|other| backend_at(config, other.address));
        if let Some(name) = &backend {
            message.push_str(&format!("; it is backend {name} of this file"));
        }
        origin.error(&Spot::Bind((*self.key).clone()), message, self.help(backend.is_some()))
    }

    fn help(&self, backend: bool) -> Option<String> {
        let Some(address) = self.key.socket_addr() else { return self.help_for_unix() };
        let port = address.port();
        let help = match self.error.raw_os_error() {
            _ if backend && address.ip().is_unspecified() => {
                "bind one address of this host instead of the wildcard, or use another port for the frontend or the backend"
            }
            Some(libc::EACCES) if port < 1024 => {
                "use a port above 1023, or start as root with [process] user, or use config/tidegate.service, or set the capability: setcap cap_net_bind_service=ep PROGRAM"
            }
            None if self.error.kind() == ErrorKind::PermissionDenied => {
                "Tidegate keeps capabilities only for what the file has at the start; \
                 start again, as root or with the capability"
            }
            Some(libc::EADDRNOTAVAIL) => {
                "to listen on an address that an interface gets later, write { address = \"...\", freebind = true }"
            }
            _ if self.other.is_some() && self.holder.is_none() => {
                "run `ss -ltnp` as root to see the process; stop it, or use another port"
            }
            _ if self.other.is_some() => "stop that process, or use another port",
            _ => return None,
        };
        Some(help.to_owned())
    }
}

impl BindError {
    fn help_for_unix(&self) -> Option<String> {
        let help = match self.error.kind() {
            ErrorKind::AddrInUse => "stop the process that listens there, or use another path",
            ErrorKind::AlreadyExists => "remove the file, or use another path",
            ErrorKind::NotFound => "create the directory; the user of Tidegate must own it",
            ErrorKind::PermissionDenied => {
                "the user of Tidegate needs the right to write to the directory"
            }
            _ => return None,
        };
        Some(help.to_owned())
    }
}

/// Returns `POOL/NAME` of a backend with this address.
fn backend_at(config: &Config, address: SocketAddr) -> Option<String> {
    let address = BackendAddr::Tcp(address);
    config.pools.iter().find_map(|pool| {
        let backend = pool.backends.iter().find(|backend| backend.address == address)?;
        Some(format!("{}/{}", pool.name, backend.name))
    })
}

impl std::fmt::Display for BindError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let BindError { key, error, other, holder } = self;
        // `error` has no errno if `foreign` found the socket before bind(2).
        let why = match error.raw_os_error() {
            None if error.get_ref().is_none() => {
                io::Error::from_raw_os_error(libc::EADDRINUSE).to_string()
            }
            _ => error.to_string(),
        };
        write!(f, "cannot listen on {key}: {why}")?;
        let Some(ListeningSocket { address, user, .. }) = other else {
            let missing = error.raw_os_error() == Some(libc::EADDRNOTAVAIL);
            let hint = if missing { ": no interface of this host has that address" } else { "" };
            f.write_str(hint)?;
            return match holder {
                Some(Holder { pid, program }) => {
                    write!(f, "; process {pid} ({program}) listens there")
                }
                None => Ok(()),
            };
        };
        match holder {
            Some(holder) if holder.pid == std::process::id() => {
                write!(f, "; this process itself listens on {address}")
            }
            Some(holder) => {
                write!(f, "; process {} ({}) listens on {address}", holder.pid, holder.program)
            }
            None => write!(f, "; a process of user {user} listens on {address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: i32, address: &str) -> BindError {
        let error = io::Error::from_raw_os_error(errno);
        BindError { key: Box::new(address.parse().unwrap()), error, other: None, holder: None }
    }

    #[test]
    fn help_names_the_capability_for_a_low_port_and_freebind_for_an_absent_address() {
        let low = refused(libc::EACCES, "0.0.0.0:80").help(false).unwrap();
        assert!(low.contains("a port above 1023") && low.contains("cap_net_bind_service"));
        assert_eq!(refused(libc::EACCES, "0.0.0.0:8080").help(false), None);
        let absent = refused(libc::EADDRNOTAVAIL, "192.0.2.1:80");
        assert!(absent.to_string().ends_with("no interface of this host has that address"));
        assert!(absent.help(false).unwrap().contains("freebind = true"));
    }

    #[test]
    fn message_names_a_process_from_an_earlier_lookup() {
        let address = "127.0.0.1:80".parse().unwrap();
        let other = Some(ListeningSocket { address, socket: 7, user: 33 });
        let holder = Holder { pid: 42, program: "nginx".to_owned() };
        let refused = BindError { other, ..refused(libc::EADDRINUSE, "0.0.0.0:80") };
        assert!(refused.to_string().ends_with("; a process of user 33 listens on 127.0.0.1:80"));
        assert!(refused.help(false).unwrap().contains("`ss -ltnp`"));
        let refused = refused.with(&[(6, Holder { pid: 1, ..holder.clone() }), (7, holder)]);
        assert!(refused.to_string().ends_with("; process 42 (nginx) listens on 127.0.0.1:80"));
        assert!(refused.help(false).unwrap().starts_with("stop that process"));
    }
}
