//! The bearer tokens of admin requests over TCP: one for every request, and one that only reads.
//!
//! Loaded from their files at start and on reload, and checked by `guard` in constant time.
//! They are never logged, never shown by `Debug`, and overwritten when they are dropped.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tidegate_heartbeat::secret_file::{self, Openness, SecretFileError};

use arc_swap::ArcSwap;
use zeroize::Zeroizing;

/// A secret of at least 16 visible ASCII characters.
pub struct Token(Zeroizing<Box<[u8]>>);

/// The tokens of a configuration.
#[derive(Debug, Default)]
pub struct Tokens {
    /// Authorizes every request.
    pub full: Option<Token>,
    /// Authorizes requests that change nothing.
    pub read: Option<Token>,
}

/// The tokens in force. They are shared with the running API and replaced on reload.
#[derive(Debug, Default)]
pub struct TokenStore(ArcSwap<Tokens>);

/// Why a token file was rejected.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read, or other users can read or write it.
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

/// Lower limit: shorter tokens can be guessed.
const TOKEN_MIN: usize = 16;

/// Upper limit: a longer text suggests the wrong file.
const TOKEN_MAX: usize = 1024;

/// Upper limit on the file: a token and the white space around it.
const FILE_BYTES_MAX: usize = 4096;

// === impl Token ===

impl Token {
    /// Reads a token file; white space around the token is ignored.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub fn load(path: &Path) -> Result<Token, TokenError> {
        // The group can read it, for example the group of Prometheus.
        let text = match secret_file::read(path, Openness::OwnerAndGroup, FILE_BYTES_MAX) {
            Ok(text) => text,
            Err(SecretFileError::TooLarge(_)) => {
                return Err(TokenError::Unfit { path: path.to_owned() });
            }
            Err(why) => return Err(TokenError::File { path: path.to_owned(), why }),
        };
        Token::new(&text).ok_or_else(|| TokenError::Unfit { path: path.to_owned() })
    }

    /// Returns `None` if the trimmed text is not a valid token.
    pub fn new(text: &[u8]) -> Option<Token> {
        let text = text.trim_ascii();
        let fit = (TOKEN_MIN..=TOKEN_MAX).contains(&text.len())
            && text.iter().all(|byte| byte.is_ascii_graphic());
        fit.then(|| Token(Zeroizing::new(text.into())))
    }

    /// Compares in a time that depends only on the lengths.
    pub fn matches(&self, candidate: &[u8]) -> bool {
        let differing = self.0.iter().zip(candidate).fold(0, |sum, (a, b)| sum | (a ^ b));
        // `black_box` keeps the optimiser from leaving the loop at the first difference.
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
    /// Without a full token every POST over TCP is rejected.
    pub fn new(tokens: Tokens) -> TokenStore {
        TokenStore(ArcSwap::from_pointee(tokens))
    }

    /// Replaces the tokens for all later requests.
    pub fn set(&self, tokens: Tokens) {
        self.0.store(Arc::new(tokens));
    }

    /// Returns the tokens in force.
    pub fn get(&self) -> Arc<Tokens> {
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
    fn token_is_trimmed_and_matches_only_itself() {
        let token = load(b"  0123456789abcdef\r\n", 0o640).unwrap();
        assert!(token.matches(b"0123456789abcdef"));
        for other in [&b"0123456789abcdeF"[..], b"0123456789abcde", b"0123456789abcdef0", b""] {
            assert!(!token.matches(other));
        }
    }

    #[test]
    fn short_long_and_non_ascii_tokens_are_rejected() {
        let long = vec![b'x'; TOKEN_MAX + 1];
        let tail = [&b"0123456789abcdef"[..], &[b' '; 5000], b"x"].concat();
        let strange = [0xC3; 20];
        for text in [&b"0123456789abcde"[..], b"", b"0123456789 abcdefgh", &long, &tail, &strange] {
            assert!(matches!(load(text, 0o600), Err(TokenError::Unfit { .. })));
        }
    }

    #[test]
    fn file_open_to_other_users_is_rejected() {
        for mode in [0o644, 0o602, 0o666] {
            assert!(matches!(
                load(b"0123456789abcdef", mode),
                Err(TokenError::File { why: SecretFileError::Open { mode: got, .. }, .. })
                    if got == mode
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
        let stored = format!("{:?}", TokenStore::new(Tokens { full: Some(token), read: None }));
        assert!(!alone.contains("0123") && !stored.contains("0123"), "{alone} {stored}");
    }
}
