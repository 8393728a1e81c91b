//! The texts of a configuration file and of the files that it names.
//!
//! `daemon` collects them after each accepted configuration, and [`super::load_kept`]
//! reads them. A new process uses them if the old process crashed and the files on disk
//! are bad. The texts hold secrets, so `Debug` never shows them.

use super::source;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use tidegate_core::model::Config;
use zeroize::Zeroizing;

/// Most bytes of named files that are collected: four times the largest file. Files
/// beyond it are read from disk.
const NAMED_BYTES_MAX: usize = 4 * source::FILE_BYTES_MAX;

/// The texts of one accepted configuration.
#[derive(Clone, PartialEq, Eq)]
pub struct Texts {
    path: PathBuf,
    text: String,
    named: BTreeMap<PathBuf, Zeroizing<Vec<u8>>>,
}

// === impl Texts ===

impl Texts {
    /// Collects `text`, which was read from `path` and parsed to `config`. Reads the files
    /// that `config` names.
    pub fn of(path: &Path, text: String, config: &Config) -> Texts {
        let mut room = NAMED_BYTES_MAX;
        let mut named = BTreeMap::new();
        for path in config.named_files() {
            let bytes = source::read_file(&path).ok().map(Zeroizing::new);
            if let Some(bytes) = bytes.filter(|bytes| bytes.len() <= room) {
                room -= bytes.len();
                named.insert(path, bytes);
            }
        }
        Texts { path: path.to_owned(), text, named }
    }

    /// Returns the path of the configuration file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the text of the configuration file.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Returns the bytes of a named file; `None` if they were not collected.
    pub fn named(&self, path: &Path) -> Option<&[u8]> {
        self.named.get(path).map(|bytes| bytes.as_slice())
    }

    /// Returns the paths of the named files.
    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.named.keys()
    }

    /// Encodes the texts for another process: each path and each text after its length.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut all = Zeroizing::new(Vec::new());
        let own = std::iter::once((&self.path, self.text.as_bytes()));
        let named = self.named.iter().map(|(path, bytes)| (path, bytes.as_slice()));
        for (path, bytes) in own.chain(named) {
            for part in [path.as_os_str().as_bytes(), bytes] {
                all.extend((part.len() as u64).to_le_bytes());
                all.extend(part);
            }
        }
        all
    }

    /// Decodes the texts of another process. Returns `None` if the bytes are malformed.
    pub fn decode(mut bytes: &[u8]) -> Option<Texts> {
        let (path, text) = (take(&mut bytes)?, take(&mut bytes)?);
        let text = String::from_utf8(text.to_vec()).ok()?;
        let mut named = BTreeMap::new();
        while !bytes.is_empty() {
            let (path, bytes) = (take(&mut bytes)?, take(&mut bytes)?);
            named.insert(path_of(path), Zeroizing::new(bytes.to_vec()));
        }
        Some(Texts { path: path_of(path), text, named })
    }
}

fn take<'b>(bytes: &mut &'b [u8]) -> Option<&'b [u8]> {
    let (length, rest) = bytes.split_first_chunk()?;
    let (part, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    *bytes = rest;
    Some(part)
}

fn path_of(bytes: &[u8]) -> PathBuf {
    OsString::from_vec(bytes.to_vec()).into()
}

impl std::fmt::Debug for Texts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Texts { path, text, named } = self;
        let (bytes, named) = (text.len(), named.len());
        write!(f, "Texts({}, {bytes} bytes, {named} named files)", path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts_survive_encoding_and_debug_shows_no_secret() {
        let named = BTreeMap::from([("/key".into(), Zeroizing::new(vec![0xFF, 0, 7]))]);
        let texts = Texts { path: "a b".into(), text: "x = 1\n".into(), named };
        let again = Texts::decode(&texts.encode()).unwrap();
        assert_eq!(again, texts);
        assert_eq!(again.named(Path::new("/key")), Some(&[0xFF, 0, 7][..]));
        assert_eq!(again.named(Path::new("/other")), None);
        assert_eq!(format!("{again:?}"), "Texts(a b, 6 bytes, 1 named files)");
    }

    proptest! {
        #[test]
        fn decoding_arbitrary_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Texts::decode(&bytes);
        }
    }
}
