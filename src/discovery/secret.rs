//! Files with the token, the password or the private key of a client of a registry.
//!
//! [`client`](crate::client) reads the token for each request, and the private key for each
//! connection. Sources read passwords the same way. So a rotated file needs no restart.
//! Nothing here keeps a secret or shows one.

use std::path::{Path, PathBuf};
use tidegate_heartbeat::secret_file::{self, Openness};
use zeroize::Zeroizing;

/// Longest secret. Tokens of Kubernetes have about 1 KiB, private keys up to 4 KiB.
pub const SECRET_BYTES_MAX: usize = 16 * 1024;

/// A file with a secret. It holds the path only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretFile {
    path: PathBuf,
    openness: Openness,
}

/// Why a secret cannot be used. The message names the file.
#[derive(Debug, thiserror::Error)]
pub enum SecretProblem {
    /// The file cannot be read, or other users have access to it.
    #[error("cannot use secret file {path}: it {cause}")]
    File {
        /// The file.
        path: String,
        /// The cause.
        cause: secret_file::SecretFileError,
    },
    /// The content is not one line of text.
    #[error("cannot use secret file {path}: it {fault}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong.
        fault: &'static str,
    },
}

impl SecretFile {
    /// A file that an administrator writes: accessible to its owner and group only.
    pub fn new(path: &Path) -> SecretFile {
        SecretFile { path: path.to_owned(), openness: Openness::OwnerAndGroup }
    }

    /// A file that an orchestrator mounts, such as the token of a Kubernetes service
    /// account: only its owner may write it.
    pub fn mounted(path: &Path) -> SecretFile {
        SecretFile { path: path.to_owned(), openness: Openness::AllMayRead }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all bytes, at most [`SECRET_BYTES_MAX`].
    ///
    /// # Errors
    /// The file cannot be read, is too long or too open.
    pub fn bytes(&self) -> Result<Zeroizing<Vec<u8>>, SecretProblem> {
        secret_file::read(&self.path, self.openness, SECRET_BYTES_MAX)
            .map_err(|cause| SecretProblem::File { path: self.path.display().to_string(), cause })
    }

    /// Reads one line of text, without spaces around it.
    ///
    /// # Errors
    /// As [`bytes`](SecretFile::bytes), or the content is empty, not UTF-8 or has several lines.
    pub fn line(&self) -> Result<Zeroizing<String>, SecretProblem> {
        let bytes = self.bytes()?;
        let problem =
            |fault| SecretProblem::Content { path: self.path.display().to_string(), fault };
        let text = std::str::from_utf8(&bytes).map_err(|_| problem("is not UTF-8"))?.trim();
        if text.is_empty() {
            return Err(problem("is empty"));
        }
        if text.contains(char::is_control) {
            return Err(problem("contains more than one line"));
        }
        Ok(Zeroizing::new(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn secret(content: &[u8], mode: u32) -> (tempfile::TempDir, SecretFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (dir, SecretFile::new(&path))
    }

    #[test]
    fn a_line_is_read_again_each_time() {
        let (_dir, file) = secret(b" one\n", 0o600);
        assert_eq!(file.line().unwrap().as_str(), "one");
        std::fs::write(file.path(), "two").unwrap();
        assert_eq!(file.line().unwrap().as_str(), "two");
        assert!(!format!("{file:?}").contains("two"));
    }

    #[test]
    fn unusable_files_are_named_without_their_content() {
        for (content, mode, fault) in [
            (&b"hidden"[..], 0o644, "is accessible to others"),
            (b" \n", 0o600, "is empty"),
            (b"hidden\nhidden", 0o600, "more than one line"),
            (b"\xff", 0o600, "is not UTF-8"),
        ] {
            let (_dir, file) = secret(content, mode);
            let said = file.line().unwrap_err().to_string();
            assert!(said.contains(fault) && said.contains("/token: it "), "{said}");
            assert!(!said.contains("hidden"), "{said}");
        }
        let (_dir, file) = secret(b"mounted", 0o644);
        assert!(SecretFile::mounted(file.path()).line().is_ok());
    }
}
