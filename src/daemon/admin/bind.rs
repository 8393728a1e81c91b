//! Binds the listener of the admin API.
//!
//! Called once by `daemon` at start.
//!
//! - Other users can never connect to a Unix socket, not even while it is created.
//! - A socket on which another process listens is never replaced.
//! - A file that is not a socket is never removed.

use super::serve::DroppedConnections;
use crate::unix_sockets::{self, PathUse};
use socket2::{Domain, SockAddr, Socket, Type};
use std::fs::{DirBuilder, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tidegate_core::model::{Admin, AdminListen};

/// A bound listener that is not served yet. Dropping it removes its socket file, unless
/// another process has replaced the file.
#[derive(Debug)]
pub struct AdminListener {
    pub(super) socket: BoundAdminSocket,
    pub(super) file: Option<SocketFile>,
    pub(super) dropped: DroppedConnections,
    address: AdminListen,
}

#[derive(Debug)]
pub(super) enum BoundAdminSocket {
    Unix(std::os::unix::net::UnixListener),
    Tcp(std::net::TcpListener),
}

/// The socket file of a listener.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode number.
    identity: (u64, u64),
    /// True while another process uses the file, so it must not be removed.
    kept: Arc<AtomicBool>,
}

/// Controls whether the socket file is removed when its listener is dropped. Shared with
/// the listener.
#[derive(Debug, Clone, Default)]
pub struct SocketFileLock {
    identity: Option<(u64, u64)>,
    kept: Arc<AtomicBool>,
}

/// Why the admin API cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum AdminBindError {
    /// Another process listens on the address.
    #[error("another process listens on {0}; stop it or choose another [admin] listen")]
    Live(AdminListen),
    /// The file at the path is not a socket.
    #[error("{} is not a socket; remove it or choose another [admin] listen", .0.display())]
    NotASocket(PathBuf),
    /// A system call failed.
    #[error("cannot {doing} {address}: {source}")]
    Io {
        /// The operation that failed, such as `bind`.
        doing: &'static str,
        /// The address.
        address: AdminListen,
        /// The error.
        source: io::Error,
    },
}

/// Length of the listen queue, used while [`super::serve`] is at its cap.
const BACKLOG: i32 = 128;

/// Binds the address of the configuration.
///
/// # Errors
/// See [`AdminBindError`]; each means that the API is not available.
pub fn bind(admin: &Admin) -> Result<AdminListener, AdminBindError> {
    let address = &admin.listen;
    match address {
        AdminListen::Unix(path) => bind_unix(path, address),
        AdminListen::Tcp(to) => {
            let socket = BoundAdminSocket::Tcp(bind_tcp(*to, address)?);
            Ok(AdminListener::new(socket, None, address))
        }
    }
}

/// Takes over the listener of another process. `file` is the identity of its socket file,
/// if it has one. The file is not removed until [`SocketFileLock::own`] is called.
/// Returns `None` if the file no longer exists or was replaced.
pub fn take_over(
    admin: &Admin,
    socket: OwnedFd,
    file: Option<(u64, u64)>,
) -> Option<AdminListener> {
    let socket = Socket::from(socket);
    socket.set_nonblocking(true).ok()?;
    let AdminListen::Unix(path) = &admin.listen else {
        let socket = BoundAdminSocket::Tcp(socket.into());
        return Some(AdminListener::new(socket, None, &admin.listen));
    };
    let file = match file {
        Some(identity) if identity_of(path).ok()? == identity => {
            let kept = Arc::new(AtomicBool::new(true));
            Some(SocketFile { path: path.clone(), identity, kept })
        }
        Some(_) => return None,
        None => None,
    };
    Some(AdminListener::new(BoundAdminSocket::Unix(socket.into()), file, &admin.listen))
}

/// Returns device and inode number.
fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

fn bind_tcp(
    to: SocketAddr,
    address: &AdminListen,
) -> Result<std::net::TcpListener, AdminBindError> {
    let bound = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        if to.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&to.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    match bound() {
        Ok(socket) => Ok(socket.into()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            Err(AdminBindError::Live(address.clone()))
        }
        Err(source) => {
            Err(AdminBindError::Io { doing: "listen on", address: address.clone(), source })
        }
    }
}

fn bind_unix(path: &Path, address: &AdminListen) -> Result<AdminListener, AdminBindError> {
    let fail = |doing| move |source| AdminBindError::Io { doing, address: address.clone(), source };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .map_err(fail("create the directory of"))?;
    let _lock = unix_sockets::lock(directory);
    refuse_unless_free(path, address)?;

    // The socket is bound under a temporary name, and renamed once its mode is set and it
    // listens. Clients never find it in another state.
    let temporary = directory.join(format!(".tg{}", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let socket = listen_unix(&temporary, path).inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    });
    let (socket, file) = socket.map_err(fail("listen on"))?;
    Ok(AdminListener::new(BoundAdminSocket::Unix(socket.into()), Some(file), address))
}

fn listen_unix(temporary: &Path, path: &Path) -> io::Result<(Socket, SocketFile)> {
    // Checks the length of the path before any file is created.
    SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(temporary)?)?;
    std::fs::set_permissions(temporary, Permissions::from_mode(0o600))?;
    socket.listen(BACKLOG)?;
    let identity = identity_of(temporary)?;
    std::fs::rename(temporary, path)?;
    Ok((socket, SocketFile { path: path.to_owned(), identity, kept: Arc::default() }))
}

/// Returns an error unless the path is free or is a socket without a listening process.
fn refuse_unless_free(path: &Path, address: &AdminListen) -> Result<(), AdminBindError> {
    let fail = |source| AdminBindError::Io { doing: "inspect", address: address.clone(), source };
    match unix_sockets::inspect(path).map_err(fail)? {
        PathUse::Free | PathUse::Stale => Ok(()),
        PathUse::Live => Err(AdminBindError::Live(address.clone())),
        PathUse::NotASocket => Err(AdminBindError::NotASocket(path.to_owned())),
    }
}

// === impl AdminListener ===

impl AdminListener {
    fn new(
        socket: BoundAdminSocket,
        file: Option<SocketFile>,
        address: &AdminListen,
    ) -> AdminListener {
        AdminListener {
            socket,
            file,
            dropped: DroppedConnections::default(),
            address: address.clone(),
        }
    }

    /// Returns the counter of connections closed to accept newer ones.
    pub fn dropped(&self) -> DroppedConnections {
        self.dropped.clone()
    }

    /// Returns the configured address, with the bound port in place of port 0.
    pub fn address(&self) -> AdminListen {
        match &self.socket {
            BoundAdminSocket::Tcp(listener) => {
                listener.local_addr().map_or_else(|_| self.address.clone(), AdminListen::Tcp)
            }
            BoundAdminSocket::Unix(_) => self.address.clone(),
        }
    }

    /// Returns a second descriptor of the socket.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn share(&self) -> io::Result<OwnedFd> {
        match &self.socket {
            BoundAdminSocket::Unix(listener) => listener.as_fd().try_clone_to_owned(),
            BoundAdminSocket::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
        }
    }

    /// Returns the control over the removal of the file.
    pub fn file(&self) -> SocketFileLock {
        self.file.as_ref().map_or_else(SocketFileLock::default, |file| SocketFileLock {
            identity: Some(file.identity),
            kept: Arc::clone(&file.kept),
        })
    }
}

// === impl SocketFileLock ===

impl SocketFileLock {
    /// Returns device and inode number of the file, if the listener has a file.
    pub fn identity(&self) -> Option<(u64, u64)> {
        self.identity
    }

    /// Keeps the file when the listener is dropped, because another process uses it.
    pub fn hold_lock(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// Removes the file when the listener is dropped.
    pub fn own(&self) {
        self.kept.store(false, Ordering::Relaxed);
    }
}

// === impl SocketFile ===

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Relaxed) {
            return;
        }
        if identity_of(&self.path).is_ok_and(|found| found == self.identity) {
            // On an error the file stays. It is stale then, and the next start replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn at(path: &Path) -> Admin {
        Admin {
            listen: AdminListen::Unix(path.to_owned()),
            token_file: None,
            read_token_file: None,
            backend_metrics_max: 0,
        }
    }

    #[test]
    fn socket_is_private_and_removed_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/tidegate/admin.sock");
        let listener = bind(&at(&path)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        drop(UnixListener::bind(&path).unwrap());
        let _listener = bind(&at(&path)).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn socket_in_use_is_kept_even_with_a_full_listen_queue() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        socket.listen(0).unwrap();
        let error = bind(&at(&path)).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "another process listens on unix:{}; stop it or choose another [admin] listen",
                path.display()
            )
        );
        // The connection of the first check is never accepted and fills the queue.
        assert!(matches!(bind(&at(&path)), Err(AdminBindError::Live(_))));
        assert!(path.exists());
    }

    #[test]
    fn file_that_is_not_a_socket_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&at(&path)), Err(AdminBindError::NotASocket(_))));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(bind(&at(&link)), Err(AdminBindError::NotASocket(_))));
    }

    #[test]
    fn replaced_socket_file_survives_the_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let old = bind(&at(&path)).unwrap();
        std::fs::remove_file(&path).unwrap();
        let replacement = UnixListener::bind(&path).unwrap();
        drop(old);
        assert!(path.exists());
        drop(replacement);
    }

    #[test]
    fn listener_handed_to_another_process_keeps_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let old = bind(&at(&path)).unwrap();
        let (socket, file) = (old.share().unwrap(), old.file());
        let new = take_over(&at(&path), socket, file.identity()).unwrap();
        file.hold_lock();
        drop(old);
        UnixStream::connect(&path).unwrap();
        let (socket, keeper) = (new.share().unwrap(), new.file());
        drop(new);
        assert!(path.exists(), "the new listener did not own the file yet");
        let new = take_over(&at(&path), socket.try_clone().unwrap(), keeper.identity()).unwrap();
        new.file().own();
        drop(new);
        assert!(!path.exists());
        assert!(take_over(&at(&path), socket, keeper.identity()).is_none());
    }

    #[test]
    fn too_long_socket_path_is_an_error_and_creates_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x".repeat(120));
        assert!(matches!(bind(&at(&path)), Err(AdminBindError::Io { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn tcp_port_in_use_has_its_own_error() {
        let listen = AdminListen::Tcp("127.0.0.1:0".parse().unwrap());
        let first = bind(&Admin {
            listen,
            token_file: None,
            read_token_file: None,
            backend_metrics_max: 0,
        })
        .unwrap();
        let again = Admin {
            listen: first.address(),
            token_file: None,
            read_token_file: None,
            backend_metrics_max: 0,
        };
        assert!(matches!(bind(&again), Err(AdminBindError::Live(_))));
    }
}
