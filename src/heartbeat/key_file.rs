//! Reads a heartbeat secret from its file.
//!
//! Used by `config` for its keys, by `tidegate heartbeat`, and by services that send
//! heartbeats, so all have the same rules. It rejects the files that `secret_file`
//! rejects, and never stores or shows the content of a file.

use super::keys::{SECRET_BYTES_MAX, SECRET_BYTES_MIN, Secret};
use crate::secret_file::{self, Openness, SecretFileError};
use std::path::{Path, PathBuf};

/// Most bytes of white space after the longest secret.
const END_BYTES_MAX: usize = 16;

/// Why a key file was rejected.
#[derive(Debug, thiserror::Error)]
#[error("key file {} {why}", path.display())]
pub struct KeyFileError {
    /// Path of the file.
    pub path: PathBuf,
    /// The error.
    pub why: KeyFileProblem,
}

/// An error of a key file.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileProblem {
    /// It is not readable, or other users have access to it.
    #[error("{0}")]
    File(#[from] SecretFileError),
    /// The secret is too short or too long.
    #[error(
        "has {0}; a key must have {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes \
         (create one with: head -c 32 /dev/urandom)"
    )]
    Length(String),
}

/// Reads the secret in the file at `path`.
///
/// The secret is the content without its end. If the file is text (printable ASCII),
/// white space at the end is removed, so that line ends do not matter. In other files,
/// one newline at the end is removed.
///
/// # Errors
/// See [`KeyFileError`].
pub fn read(path: &Path) -> Result<Secret, KeyFileError> {
    secret(path).map_err(|why| KeyFileError { path: path.to_owned(), why })
}

/// Returns the secret in `bytes`, which were read earlier from the file at `path`.
///
/// # Errors
/// See [`KeyFileError`].
pub fn of_bytes(path: &Path, bytes: &[u8]) -> Result<Secret, KeyFileError> {
    fit(bytes).map_err(|why| KeyFileError { path: path.to_owned(), why })
}

fn secret(path: &Path) -> Result<Secret, KeyFileProblem> {
    let most = SECRET_BYTES_MAX + END_BYTES_MAX;
    let bytes = match secret_file::read(path, Openness::OwnerAlone, most) {
        Ok(bytes) => bytes,
        Err(SecretFileError::TooLarge(_)) => {
            return Err(KeyFileProblem::Length(format!("more than {SECRET_BYTES_MAX} bytes")));
        }
        Err(error) => return Err(error.into()),
    };
    fit(&bytes)
}

fn fit(bytes: &[u8]) -> Result<Secret, KeyFileProblem> {
    Secret::new(without_end(bytes))
        .map_err(|unfit| KeyFileProblem::Length(format!("{} bytes", unfit.0)))
}

fn without_end(bytes: &[u8]) -> &[u8] {
    let trimmed = bytes.trim_ascii_end();
    if trimmed.iter().all(|byte| matches!(byte, b' '..=b'~')) {
        return trimmed;
    }
    bytes.strip_suffix(b"\n").unwrap_or(bytes)
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
    fn white_space_at_the_end_of_a_text_is_not_part_of_the_secret() {
        let tag = |content: &[u8]| {
            let (_dir, path) = file(content, 0o600);
            read(&path).unwrap().tag(b"x")
        };
        let text = b"0123456789abcdef 0123456789abcdef";
        for end in ["\n", "\r\n", " ", "\n\n", " \t\r\n"] {
            assert_eq!(tag(&[text, end.as_bytes()].concat()), tag(text), "{end:?}");
        }
        assert_ne!(tag(&[b" ", &text[..]].concat()), tag(text), "only at the end");
        let binary = [&[200; 32][..], b"\r"].concat();
        assert_ne!(tag(&binary), tag(&binary[..32]), "random bytes stay as they are");
    }

    #[test]
    fn file_that_other_users_can_access_is_rejected_with_its_mode() {
        for mode in [0o640, 0o604, 0o666, 0o610] {
            let said = refusal(&[7; 32], mode);
            assert!(said.contains(&format!("{mode:04o}")), "{said}");
        }
    }

    #[test]
    fn errors_of_short_and_long_files_do_not_show_the_content() {
        assert!(refusal(b"secret", 0o600).contains("has 6 bytes"));
        assert!(refusal(&[b'x'; 5000], 0o600).contains("has more than 1024 bytes"));
        assert!(!refusal(b"secret", 0o600).contains("secret\""));
    }
}
