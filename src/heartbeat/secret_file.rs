//! Reads a file that holds a secret: a key of heartbeats, the admin token.
//!
//! Used by `heartbeat::key_file` and `daemon::admin::token`, and through the first by
//! `config`: there is no other reader of secrets. It refuses files that others
//! than their owner could have read or written, keeps nothing, never waits, and
//! never shows what a file holds.

use rustix::fs::{FileType, Mode, OFlags};
use std::io::{self, Read};
use std::path::Path;
use zeroize::Zeroizing;

/// Who may use such a file beside its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Openness {
    /// Nobody: 0600 at most.
    OwnerAlone,
    /// Its group as well: 0660 at most.
    OwnerAndGroup,
}

/// Why a file was refused. The words name no path: who asked knows it.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It cannot be opened or read.
    #[error("cannot be read: {}", plain(.0))]
    Unreadable(#[source] io::Error),
    /// A directory, a device, a pipe.
    #[error("is not a regular file")]
    NotAFile,
    /// Others may read, write or execute it.
    #[error("is accessible to others than {allowed} (mode {mode:04o}); run chmod {chmod}")]
    Open {
        /// In words.
        allowed: &'static str,
        /// Its permission bits.
        mode: u32,
        /// Permission bits that would do.
        chmod: &'static str,
    },
    /// Somebody else could change it.
    #[error("is owned by user {owner}; it must be owned by root or by user {us}")]
    Foreign {
        /// Its owner's number.
        owner: u32,
        /// Ours.
        us: u32,
    },
    /// Not such a secret, whatever it is.
    #[error("is too large: more than {0} bytes")]
    TooLarge(usize),
}

/// The bytes of the file at `path`, at most `bytes_max`; they are overwritten
/// when they are dropped.
///
/// # Errors
/// See [`SecretFileError`]. A FIFO or device is refused, not waited for: it is
/// opened with `O_NONBLOCK` and looked at before the first read (open(2)).
pub fn read(
    path: &Path,
    openness: Openness,
    bytes_max: usize,
) -> Result<Zeroizing<Vec<u8>>, SecretFileError> {
    let unreadable = SecretFileError::Unreadable;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| unreadable(e.into()))?;
    // Of what was opened, not of what the path names by then.
    let status = rustix::fs::fstat(&fd).map_err(|e| unreadable(e.into()))?;
    if !FileType::from_raw_mode(status.st_mode).is_file() {
        return Err(SecretFileError::NotAFile);
    }
    let mode = status.st_mode & 0o7777;
    let (forbidden, allowed, chmod) = match openness {
        Openness::OwnerAlone => (0o077, "its owner", "0600"),
        Openness::OwnerAndGroup => (0o007, "its owner and group", "0640"),
    };
    if mode & forbidden != 0 {
        return Err(SecretFileError::Open { allowed, mode, chmod });
    }
    let us = rustix::process::geteuid().as_raw();
    if status.st_uid != us && status.st_uid != 0 {
        return Err(SecretFileError::Foreign { owner: status.st_uid, us });
    }
    // It never grows, so no copy of the secret is left behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(bytes_max + 1));
    let file = std::fs::File::from(fd);
    file.take(bytes_max as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > bytes_max {
        return Err(SecretFileError::TooLarge(bytes_max));
    }
    Ok(bytes)
}

/// The kernel's words without Rust's "(os error 2)".
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
    fn what_others_may_use_is_refused_with_its_mode() {
        for (openness, good, bad) in [
            (Openness::OwnerAlone, [0o600, 0o400], [0o640, 0o604, 0o610]),
            (Openness::OwnerAndGroup, [0o640, 0o600], [0o644, 0o602, 0o641]),
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
    fn a_file_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (_dir, path) = file(b"s", 0o600);
        std::os::unix::fs::chown(&path, Some(4321), None).unwrap();
        let said = read(&path, Openness::OwnerAlone, 9).unwrap_err().to_string();
        assert!(said.starts_with("is owned by user 4321; it must be owned by root"), "{said}");
    }

    #[test]
    fn what_is_no_file_or_too_large_is_refused() {
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
