//! Reads a file that holds a secret: a heartbeat key, the admin token, or the token,
//! password or private key of a registry's client.
//!
//! Used by `heartbeat::key_file`, `daemon::admin::token` and `discovery::secret`. No other
//! code reads secrets.
//! It rejects files that users other than the owner can access. It never waits for a
//! writer, and never stores or shows the content of a file.

use rustix::fs::{FileType, Mode, OFlags};
use std::io::{self, Read};
use std::path::Path;
use zeroize::Zeroizing;

/// The users that may have access to a secret file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Openness {
    /// Only its owner: 0600 at most.
    OwnerAlone,
    /// Its owner and its group: 0660 at most.
    OwnerAndGroup,
    /// All users read, only its owner writes: 0644 at most. For a file that an
    /// orchestrator mounts into a container, where no other user exists.
    AllMayRead,
}

/// Why a file was rejected. The message has no path; the caller adds it.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It cannot be opened or read.
    #[error("cannot be read: {}", plain(.0))]
    Unreadable(#[source] io::Error),
    /// It is a directory, a device or a FIFO.
    #[error("is not a regular file")]
    NotAFile,
    /// Other users have access to it.
    #[error("is accessible to others than {allowed} (mode {mode:04o}); run chmod {chmod}")]
    Open {
        /// The users that may have access, as text.
        allowed: &'static str,
        /// Its permission bits.
        mode: u32,
        /// The permission bits to set.
        chmod: &'static str,
    },
    /// Another user owns it and can change it.
    #[error("is owned by user {owner}; it must be owned by root or by user {own}")]
    Foreign {
        /// User ID of its owner.
        owner: u32,
        /// User ID of this process.
        own: u32,
    },
    /// It is longer than any secret.
    #[error("is too large: more than {0} bytes")]
    TooLarge(usize),
}

/// Reads the file at `path`, at most `bytes_max` bytes. The bytes are overwritten on drop.
///
/// It does not wait for the writer of a FIFO: it opens the file with `O_NONBLOCK` and
/// checks the type before the first read (open(2)).
///
/// # Errors
/// See [`SecretFileError`].
pub fn read(
    path: &Path,
    openness: Openness,
    bytes_max: usize,
) -> Result<Zeroizing<Vec<u8>>, SecretFileError> {
    let unreadable = SecretFileError::Unreadable;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| unreadable(e.into()))?;
    // fstat(2) checks the opened file, even if the path has been replaced.
    let status = rustix::fs::fstat(&fd).map_err(|e| unreadable(e.into()))?;
    if !FileType::from_raw_mode(status.st_mode).is_file() {
        return Err(SecretFileError::NotAFile);
    }
    let mode = status.st_mode & 0o7777;
    let (forbidden, allowed, chmod) = match openness {
        Openness::OwnerAlone => (0o077, "its owner", "0600"),
        Openness::OwnerAndGroup => (0o007, "its owner and group", "0640"),
        Openness::AllMayRead => (0o022, "its owner for writing", "0644"),
    };
    if mode & forbidden != 0 {
        return Err(SecretFileError::Open { allowed, mode, chmod });
    }
    let own = rustix::process::geteuid().as_raw();
    if status.st_uid != own && status.st_uid != 0 {
        return Err(SecretFileError::Foreign { owner: status.st_uid, own });
    }
    // The buffer never grows, so no copy of the secret stays in freed memory.
    let mut bytes = Zeroizing::new(Vec::with_capacity(bytes_max + 1));
    let file = std::fs::File::from(fd);
    file.take(bytes_max as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > bytes_max {
        return Err(SecretFileError::TooLarge(bytes_max));
    }
    Ok(bytes)
}

/// Returns the text of an OS error without Rust's "(os error 2)".
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn file_that_other_users_can_access_is_rejected_with_its_mode() {
        for (openness, good, bad) in [
            (Openness::OwnerAlone, [0o600, 0o400], [0o640, 0o604, 0o610]),
            (Openness::OwnerAndGroup, [0o640, 0o600], [0o644, 0o602, 0o641]),
            (Openness::AllMayRead, [0o644, 0o600], [0o666, 0o622, 0o664]),
        ] {
            for mode in good {
                let (_dir, path) = file(b"s", mode);
                assert_eq!(read(&path, openness, 9).unwrap().as_slice(), b"s");
            }
            for mode in bad {
                let (_dir, path) = file(b"s", mode);
                let said = read(&path, openness, 9).unwrap_err().to_string();
                assert!(said.contains(&format!("mode {mode:04o}")), "{said}");
            }
        }
    }

    #[test]
    fn file_of_another_user_is_rejected() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (_dir, path) = file(b"s", 0o600);
        std::os::unix::fs::chown(&path, Some(4321), None).unwrap();
        let said = read(&path, Openness::OwnerAlone, 9).unwrap_err().to_string();
        assert!(said.starts_with("is owned by user 4321; it must be owned by root"), "{said}");
    }

    #[test]
    fn special_and_large_files_are_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |path: &Path| read(path, Openness::OwnerAlone, 9).unwrap_err();
        assert!(matches!(refused(dir.path()), SecretFileError::NotAFile));
        assert!(matches!(refused(Path::new("/dev/zero")), SecretFileError::NotAFile));
        let gone = refused(&dir.path().join("gone")).to_string();
        assert_eq!(gone, "cannot be read: no such file or directory");
        let (_dir, path) = file(b"0123456789", 0o600);
        assert!(matches!(refused(&path), SecretFileError::TooLarge(9)));
        let whole = read(&path, Openness::OwnerAlone, 10).unwrap();
        assert_eq!(whole.as_slice(), b"0123456789");
    }
}
