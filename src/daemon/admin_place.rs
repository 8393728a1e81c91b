//! Chooses the directory of the admin socket if the configuration does not name it.
//!
//! Called by `confine` and `start`. The command line searches for a balancer in the same
//! directories. It creates directories; it never binds or connects.
//!
//! - `/run/tidegate` is used first. If the user cannot write there, the directory
//!   `tidegate` in the user's runtime directory is used, then a directory of the user in
//!   `/tmp`.
//! - An upgrade keeps the address of the old process.

use super::Failure;
use rustix::fs::{Access, AtFlags, CWD};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use tidegate_api::place::places;
use tidegate_core::model::{ADMIN_SOCKET, Admin, AdminListen};

/// Where this process listens, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) listen: AdminListen,
    /// Why it is not the first of [`places`].
    pub(super) reason: Option<String>,
}

/// No access for other users.
const OWNER_ONLY: u32 = 0o700;

/// Chooses the address. `before`: where the old process listens.
///
/// # Errors
/// None of [`places`] can be used.
pub(super) fn settle(admin: &Admin, before: Option<&str>) -> Result<Place, Failure> {
    let here = |path: &Path| AdminListen::Unix(path.to_owned());
    if !admin.is_default() {
        return Ok(Place { listen: admin.listen.clone(), reason: None });
    }
    let places = places();
    let kept = places.iter().find(|path| before == Some(&here(path).to_string()));
    if let Some(kept) = kept {
        return Ok(Place { listen: here(kept), reason: None });
    }
    let mut reasons = Vec::new();
    for path in &places {
        match prepare(path) {
            Ok(()) => {
                let reason = (!reasons.is_empty()).then(|| reasons.join("; "));
                return Ok(Place { listen: here(path), reason });
            }
            Err(why) => reasons.push(why),
        }
    }
    let all = reasons.join("; ");
    Err(Failure::Runtime(format!(
        "no usable directory for the admin socket: {all}; correct a directory or set [admin] listen"
    )))
}

/// Creates the directory of `path` if necessary and checks that a socket can be created
/// in it.
fn prepare(path: &Path) -> Result<(), String> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let shared = path == Path::new(ADMIN_SOCKET);
    let mode = if shared { 0o755 } else { OWNER_ONLY };
    let made = std::fs::DirBuilder::new().recursive(shared).mode(mode).create(directory);
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(format!("cannot create {}: {error}", directory.display()));
        }
        Ok(()) | Err(_) => {}
    }
    let fit = if shared { writable(directory) } else { private(directory) };
    fit.map_err(|error| format!("cannot use {}: {error}", directory.display()))
}

fn writable(directory: &Path) -> io::Result<()> {
    let may = Access::WRITE_OK | Access::EXEC_OK;
    Ok(rustix::fs::accessat(CWD, directory, may, AtFlags::EACCESS)?)
}

/// Checks that this user owns the directory and that other users have no access to it.
fn private(directory: &Path) -> io::Result<()> {
    let found = std::fs::symlink_metadata(directory)?;
    let refused = |why: &str| io::Error::new(io::ErrorKind::PermissionDenied, why);
    if !found.is_dir() {
        return Err(refused("not a directory"));
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(refused("owned by another user"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(refused("accessible to other users; run chmod 700 on it"));
    }
    writable(directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_api::place::SOCKET;

    fn admin(listen: &str) -> Admin {
        Admin {
            listen: AdminListen::Unix(listen.into()),
            token_file: None,
            read_token_file: None,
            backend_metrics_max: 0,
        }
    }

    #[test]
    fn configured_address_is_used_unchanged() {
        let place = settle(&admin("/nowhere/a.sock"), Some("unix:/run/b.sock")).unwrap();
        let listen = AdminListen::Unix("/nowhere/a.sock".into());
        assert_eq!(place, Place { listen, reason: None });
    }

    #[test]
    fn upgrade_keeps_the_address_of_the_old_process() {
        let last = places().pop().unwrap();
        let before = format!("unix:{}", last.display());
        let place = settle(&admin(ADMIN_SOCKET), Some(&before)).unwrap();
        assert_eq!(place, Place { listen: AdminListen::Unix(last), reason: None });
    }

    #[test]
    fn directory_with_access_for_others_is_rejected_and_not_changed() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("tidegate");
        assert_eq!(prepare(&own.join(SOCKET)), Ok(()));
        assert_eq!(std::fs::metadata(&own).unwrap().mode() & 0o777, OWNER_ONLY);
        assert_eq!(prepare(&own.join(SOCKET)), Ok(()));
        std::fs::set_permissions(&own, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(prepare(&own.join(SOCKET)).unwrap_err().contains("accessible to other users"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&own, &link).unwrap();
        assert!(prepare(&link.join(SOCKET)).unwrap_err().contains("not a directory"));
        assert!(prepare(&dir.path().join("no/such/a.sock")).unwrap_err().contains("cannot create"));
    }
}
