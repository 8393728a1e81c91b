//! Reads a heartbeat secret from its file.
//!
//! Used by `tidegate heartbeat` and by services that send for themselves; the keys
//! of a configuration are read with it, by `config`, under the same bounds. It
//! refuses files others could have read, keeps nothing, and never shows what a
//! file holds.

use super::keys::{SECRET_BYTES_MAX, SECRET_BYTES_MIN, Secret};
use rustix::fs::{Mode, OFlags};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Why a key file was refused.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be opened or read.
    #[error("cannot read the key file {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, a device, a pipe.
    #[error("the key file {} is not a regular file", path.display())]
    NotAFile {
        /// Which.
        path: PathBuf,
    },
    /// Group or others may read, write or execute it.
    #[error(
        "the key file {} is open to others than its owner (mode {mode:04o}); use chmod 0600",
        path.display()
    )]
    Open {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody else could change it.
    #[error(
        "the key file {} belongs to user {owner}; it must belong to root or to user {us}, \
         who reads it",
        path.display()
    )]
    Foreign {
        /// Which.
        path: PathBuf,
        /// Its owner's number.
        owner: u32,
        /// Ours.
        us: u32,
    },
    /// Too short or too long.
    #[error(
        "the key file {} holds {found}; a secret has {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} \
         (head -c 32 /dev/urandom makes one)",
        path.display()
    )]
    Unfit {
        /// Which.
        path: PathBuf,
        /// Such as `12 bytes`, never what they are.
        found: String,
    },
}

/// Reads the secret in the file at `path`: its bytes as they are, without one
/// newline at the end if there is one.
///
/// # Errors
/// See [`KeyFileError`].
pub fn read(path: &Path) -> Result<Secret, KeyFileError> {
    let path_buf = || path.to_owned();
    let unreadable = |source: io::Error| KeyFileError::Unreadable { path: path_buf(), source };
    // Non-blocking: a FIFO put there by mistake must not stop the start.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| unreadable(e.into()))?;
    // Of what was opened, not of what the path names by then.
    let status = rustix::fs::fstat(&fd).map_err(|e| unreadable(e.into()))?;
    if !rustix::fs::FileType::from_raw_mode(status.st_mode).is_file() {
        return Err(KeyFileError::NotAFile { path: path_buf() });
    }
    let mode = status.st_mode & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Open { path: path_buf(), mode });
    }
    let us = rustix::process::geteuid().as_raw();
    if status.st_uid != us && status.st_uid != 0 {
        return Err(KeyFileError::Foreign { path: path_buf(), owner: status.st_uid, us });
    }
    // Room for a newline and one byte too many: it never grows, so no copy of
    // the secret is left behind.
    let room = SECRET_BYTES_MAX + 2;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    let file = std::fs::File::from(fd);
    file.take(room as u64).read_to_end(&mut bytes).map_err(unreadable)?;
    let secret = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    Secret::new(secret).map_err(|unfit| {
        let more = if bytes.len() == room { " or more" } else { "" };
        KeyFileError::Unfit { path: path_buf(), found: format!("{} bytes{more}", unfit.0) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    fn refusal(content: &[u8], mode: u32) -> String {
        let (_dir, path) = file(content, mode);
        let said = read(&path).unwrap_err().to_string();
        assert!(said.contains(path.to_str().unwrap()), "{said}");
        said
    }

    #[test]
    fn one_newline_at_the_end_is_not_part_of_the_secret() {
        let (_dir, with) = file(&[&[7; 32][..], b"\n"].concat(), 0o600);
        let (_dir, without) = file(&[7; 32], 0o400);
        let tags = [with, without].map(|path| read(&path).unwrap().tag(b"x"));
        assert_eq!(tags[0], tags[1]);
        assert!(refusal(&[&[7; 31][..], b"\n"].concat(), 0o600).contains("31 bytes"));
    }

    #[test]
    fn a_file_others_may_read_is_refused_with_its_mode() {
        for mode in [0o640, 0o604, 0o666, 0o610] {
            let said = refusal(&[7; 32], mode);
            assert!(said.contains(&format!("{mode:04o}")), "{said}");
        }
    }

    #[test]
    fn short_and_endless_files_are_refused_without_their_content() {
        assert!(refusal(b"secret", 0o600).contains("holds 6 bytes"));
        assert!(refusal(&[b'x'; 5000], 0o600).contains("or more"));
        assert!(!refusal(b"secret", 0o600).contains("secret\""));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read(dir.path()), Err(KeyFileError::NotAFile { .. })));
        let gone = dir.path().join("gone");
        assert!(matches!(read(&gone), Err(KeyFileError::Unreadable { .. })));
    }
}
