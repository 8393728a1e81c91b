//! The bearer token that admin requests over TCP carry.
//!
//! Read from its file at start and on reload, compared in constant time. It is
//! never logged, never shown by `Debug`, and overwritten when it is dropped.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidegate_heartbeat::secret_file::{self, Openness, SecretFileError};

use arc_swap::ArcSwapOption;
use zeroize::Zeroizing;

/// A secret of at least 16 visible ASCII characters.
pub struct Token(Zeroizing<Box<[u8]>>);

/// The token in force, replaced on reload; shared with the running API.
#[derive(Debug, Default)]
pub struct TokenStore(ArcSwapOption<Token>);

/// Why a token file was refused.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read, or others could.
    #[error("the token file {} {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: SecretFileError,
    },
    /// Too short, too long or not visible ASCII.
    #[error(
        "the token file {} must hold {TOKEN_MIN} to {TOKEN_MAX} visible ASCII characters on one line",
        path.display()
    )]
    Unfit {
        /// Which.
        path: PathBuf,
    },
}

/// Shorter ones can be guessed.
const TOKEN_MIN: usize = 16;

/// Longer ones are no token but the wrong file.
const TOKEN_MAX: usize = 1024;

/// A token and white space around it.
const FILE_BYTES_MAX: usize = 4096;

// === impl Token ===

impl Token {
    /// Reads a token file; white space around the token is ignored.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn load(path: &Path) -> Result<Token, TokenError> {
        // A group may share it: Prometheus's, say.
        let text = match secret_file::read(path, Openness::OwnerAndGroup, FILE_BYTES_MAX) {
            Ok(text) => text,
            Err(SecretFileError::TooLarge(_)) => {
                return Err(TokenError::Unfit { path: path.to_owned() });
            }
            Err(why) => return Err(TokenError::File { path: path.to_owned(), why }),
        };
        Token::new(&text).ok_or_else(|| TokenError::Unfit { path: path.to_owned() })
    }

    /// `None` unless the trimmed text is a fit token.
    pub fn new(text: &[u8]) -> Option<Token> {
        let text = text.trim_ascii();
        let fit = (TOKEN_MIN..=TOKEN_MAX).contains(&text.len())
            && text.iter().all(|byte| byte.is_ascii_graphic());
        fit.then(|| Token(Zeroizing::new(text.into())))
    }

    /// Compares in a time that depends on the lengths alone.
    pub fn matches(&self, candidate: &[u8]) -> bool {
        let differing = self.0.iter().zip(candidate).fold(0, |sum, (a, b)| sum | (a ^ b));
        // Keeps the optimiser from leaving the loop at the first difference.
        let differing = std::hint::black_box(differing);
        self.0.len() == candidate.len() && differing == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

// === impl TokenStore ===

impl TokenStore {
    /// With no token every POST over TCP is refused.
    pub fn new(token: Option<Token>) -> TokenStore {
        TokenStore(ArcSwapOption::new(token.map(Arc::new)))
    }

    /// Replaces the token for all requests from now on.
    pub fn set(&self, token: Option<Token>) {
        self.0.store(token.map(Arc::new));
    }

    /// The token in force.
    pub fn get(&self) -> Option<Arc<Token>> {
        self.0.load_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn load(text: &[u8], mode: u32) -> Result<Token, TokenError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        Token::load(file.path())
    }

    #[test]
    fn a_token_is_trimmed_and_matches_only_itself() {
        let token = load(b"  0123456789abcdef\r\n", 0o640).unwrap();
        assert!(token.matches(b"0123456789abcdef"));
        for other in [&b"0123456789abcdeF"[..], b"0123456789abcde", b"0123456789abcdef0", b""] {
            assert!(!token.matches(other));
        }
    }

    #[test]
    fn short_long_or_strange_tokens_are_unfit() {
        let long = vec![b'x'; TOKEN_MAX + 1];
        let tail = [&b"0123456789abcdef"[..], &[b' '; 5000], b"x"].concat();
        let strange = [0xC3; 20];
        for text in [&b"0123456789abcde"[..], b"", b"0123456789 abcdefgh", &long, &tail, &strange] {
            assert!(matches!(load(text, 0o600), Err(TokenError::Unfit { .. })));
        }
    }

    #[test]
    fn a_file_everyone_may_read_or_write_is_refused() {
        for mode in [0o644, 0o602, 0o666] {
            assert!(matches!(
                load(b"0123456789abcdef", mode),
                Err(TokenError::File { why: SecretFileError::Open { mode: told, .. }, .. })
                    if told == mode
            ));
        }
        let missing = Token::load(Path::new("/no/such/token"));
        let why = missing.map(drop).unwrap_err().to_string();
        assert_eq!(why, "the token file /no/such/token cannot be read: no such file or directory");
    }

    #[test]
    fn debug_output_hides_the_token() {
        let token = Token::new(b"0123456789abcdef").unwrap();
        let alone = format!("{token:?}");
        let stored = format!("{:?}", TokenStore::new(Some(token)));
        assert!(!alone.contains("0123") && !stored.contains("0123"), "{alone} {stored}");
    }
}
