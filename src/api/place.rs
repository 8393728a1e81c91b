//! Where the admin socket may be if the configuration does not say.
//!
//! Read by the balancer, which chooses one, and by clients, which look for a balancer
//! there. Nothing here makes a directory, binds or connects.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tidegate_core::model::ADMIN_SOCKET;

/// The socket's name in its directory.
pub const SOCKET: &str = "admin.sock";

/// Every place that a balancer of this user takes by itself, best first.
pub fn places() -> Vec<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|directory| directory.is_absolute());
    let mut places = vec![PathBuf::from(ADMIN_SOCKET)];
    places.extend(runtime.map(|directory| directory.join("tidegate").join(SOCKET)));
    places.push(PathBuf::from(format!("/tmp/tidegate-{uid}")).join(SOCKET));
    places
}

/// Whether only root or this user can have put a socket there.
///
/// # Errors
/// Why not.
pub fn trusted(socket: &Path) -> io::Result<()> {
    let directory = socket.parent().unwrap_or(Path::new("."));
    let found = std::fs::symlink_metadata(directory)?;
    let own = rustix::process::geteuid().as_raw();
    if found.is_dir() && (socket == Path::new(ADMIN_SOCKET) || found.uid() == own) {
        return Ok(());
    }
    Err(refused(directory, "is not a directory of this user"))
}

/// The error of a directory that is not fit.
pub fn refused(directory: &Path, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("{} {why}", directory.display()))
}
