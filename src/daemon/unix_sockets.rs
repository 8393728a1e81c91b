//! Unix sockets that this process listens on: finds out whether a path is in use, binds it, and
//! removes its file.
//!
//! Called by `binds`, and by `admin::bind` for its checks. It never replaces a socket on which
//! another process listens, and never removes a file that is not a socket.

use super::preflight::directory_of;
use rustix::fs::{FlockOperation, Mode, OFlags};
use socket2::{Domain, SockAddr, Socket, Type};
use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tidegate_net::stream;

/// Attempts and pause of [`lock`]; together at most 0.5 s.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// What is at the path of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathUse {
    /// Nothing.
    Free,
    /// A socket on which no process listens.
    Stale,
    /// A socket on which a process listens.
    Live,
    /// Another kind of file.
    NotASocket,
}

/// The file of a listening socket.
#[derive(Debug)]
pub(super) struct ListenFile {
    path: PathBuf,
    /// Device and inode number.
    identity: (u64, u64),
}

/// A file that was just made. Dropping it removes the file.
#[derive(Debug)]
pub(super) struct NewListenFile(Option<ListenFile>);

/// Returns what is at the path. Connects to a socket there.
pub(crate) fn inspect(path: &Path) -> io::Result<PathUse> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(PathUse::Free),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => return Ok(PathUse::NotASocket),
        Ok(_) => {}
    }
    let connected = || -> io::Result<()> {
        // A blocking connect would wait while the listen queue is full.
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    match connected().map_err(|error| (error.kind(), error)) {
        Err((io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound, _)) => Ok(PathUse::Stale),
        Ok(()) | Err((io::ErrorKind::WouldBlock, _)) => Ok(PathUse::Live),
        Err((_, error)) => Err(error),
    }
}

/// The error for a path with a file that is not a socket.
pub(super) fn not_a_socket() -> io::Error {
    io::Error::new(io::ErrorKind::AlreadyExists, "the file there is not a socket")
}

/// Locks the directory of a socket. Without the lock, two starting processes could find
/// the same stale socket, and one could remove the new socket of the other. Returns `None`
/// if the directory cannot be locked in time; the process then starts without the lock.
pub(crate) fn lock(directory: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty()).ok()?;
    for _ in 0..LOCK_TRIES {
        if rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Some(fd);
        }
        std::thread::park_timeout(LOCK_PAUSE);
    }
    None
}

/// Binds a socket that does not listen yet. Replaces a stale file. No client can connect before
/// the socket listens, so none finds the file with another mode.
///
/// # Errors
/// The path is in use, or the error of the kernel.
pub(super) fn bind(path: &Path, mode: u16) -> io::Result<(Socket, NewListenFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    let address = SockAddr::unix(stream::unix_name(path))?;
    if path.as_os_str().as_bytes().starts_with(b"@") {
        socket.bind(&address)?;
        return Ok((socket, NewListenFile(None)));
    }
    let _lock = lock(&directory_of(path));
    match inspect(path)? {
        PathUse::Free => {}
        PathUse::Stale => std::fs::remove_file(path)?,
        PathUse::Live => return Err(io::Error::from_raw_os_error(libc::EADDRINUSE)),
        PathUse::NotASocket => return Err(not_a_socket()),
    }
    socket.bind(&address)?;
    let file = NewListenFile(ListenFile::at(path));
    set_mode(path, mode)?;
    Ok((socket, file))
}

/// Sets the permissions of the file, if they differ.
pub(super) fn set_mode(path: &Path, mode: u16) -> io::Result<()> {
    if std::fs::symlink_metadata(path)?.mode() & 0o7777 == u32::from(mode) {
        return Ok(());
    }
    std::fs::set_permissions(path, Permissions::from_mode(mode.into()))
}

/// Returns device and inode number.
fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

// === impl ListenFile ===

impl ListenFile {
    /// Returns the present file at the path.
    pub(super) fn at(path: &Path) -> Option<ListenFile> {
        Some(ListenFile { path: path.to_owned(), identity: identity_of(path).ok()? })
    }

    /// Removes the file, unless another process has replaced it.
    pub(super) fn remove(&self) {
        if identity_of(&self.path).is_ok_and(|found| found == self.identity) {
            // On an error the file stays. It is stale then, and the next start replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

// === impl NewListenFile ===

impl NewListenFile {
    /// Keeps the file.
    pub(super) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewListenFile {
    fn drop(&mut self) {
        if let Some(file) = &self.0 {
            file.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn new_socket_has_its_mode_and_refuses_clients_until_it_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (socket, file) = bind(&path, 0o620).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o620);
        assert_eq!(
            UnixStream::connect(&path).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        socket.listen(1).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(file);
        assert!(!path.exists(), "a file that is not kept is removed");
    }

    #[test]
    fn live_socket_and_other_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let [live, file] = ["live", "file"].map(|name| dir.path().join(name));
        let _listener = UnixListener::bind(&live).unwrap();
        std::fs::write(&file, "precious").unwrap();
        assert_eq!(bind(&live, 0o600).unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
        let error = bind(&file, 0o600).unwrap_err().to_string();
        assert_eq!(error, "the file there is not a socket");
        UnixStream::connect(&live).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    }

    #[test]
    fn file_of_another_process_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let (_socket, file) = bind(&path, 0o600).unwrap();
        file.keep();
        let own = ListenFile::at(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        own.remove();
        assert!(path.exists());
    }
}
