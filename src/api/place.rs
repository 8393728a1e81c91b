//! The default paths of the admin socket.
//!
//! The balancer chooses one of them, and clients try all. This module creates no directory,
//! binds no socket and opens no connection.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tidegate_core::model::ADMIN_SOCKET;

/// File name of the socket.
pub const SOCKET: &str = "admin.sock";

/// Returns the default paths for this user, in order of preference.
pub fn places() -> Vec<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|directory| directory.is_absolute());
    let mut places = vec![PathBuf::from(ADMIN_SOCKET)];
    places.extend(runtime.map(|directory| directory.join("tidegate").join(SOCKET)));
    places.push(PathBuf::from(format!("/tmp/tidegate-{uid}")).join(SOCKET));
    places
}

/// Checks that only root or this user can have created the socket.
///
/// # Errors
/// Another user can have created it, or the directory cannot be inspected.
pub fn trusted(socket: &Path) -> io::Result<()> {
    let directory = socket.parent().unwrap_or(Path::new("."));
    let found = std::fs::symlink_metadata(directory)?;
    let own = rustix::process::geteuid().as_raw();
    if found.is_dir() && (socket == Path::new(ADMIN_SOCKET) || found.uid() == own) {
        return Ok(());
    }
    Err(refused(directory, "is not a directory of this user"))
}

/// Returns the error for an unsuitable directory.
pub fn refused(directory: &Path, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("{} {why}", directory.display()))
}
